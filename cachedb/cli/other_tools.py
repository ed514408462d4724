"""Understand the commands that users of docker, podman, skopeo and crane type.

Some are hidden aliases, because they mean the same here. For the others, one line names the command to use.
docs/reference/familiar-commands.md lists both kinds.
"""

from __future__ import annotations

import re

import click

__all__ = ["ALIASES", "OtherCommand", "check_arguments", "explain_option", "translate"]


class OtherCommand(click.UsageError):
    """A command that cachedb does not have; the message names the one to use."""


ALIASES = ("images", "rmi", "load", "save", "version")
"""The hidden commands of `aliases`; their options differ from those of the commands that they run."""

_SAME = {
    "list": "ls",
    "history": "show",
    "tree": "show",
    "cp": "copy",
    "du": "df",
    "check": "verify",
    "validate": "verify",
    "list-tags": "tags",
    "image ls": "images",
    "image list": "images",
    "image rm": "rmi",
    "image remove": "rmi",
    "image load": "load",
    "image save": "save",
    "image pull": "pull",
    "image push": "push",
    "image tag": "tag",
    "image exists": "exists",
    "image inspect": "show",
    "image history": "show",
    "image tree": "show",
    "image check": "verify",
    "manifest inspect": "inspect",
    "buildx imagetools": "imagetools",
    "imagetools inspect": "inspect",
    "system df": "df",
    "system check": "verify",
    "auth login": "login",
    "auth logout": "logout",
}
"""Commands of other tools, and the words that replace them: a command, or a key of the tables below."""

_LOGIN = "`cachedb pull` and `cachedb push` use the logins of podman, Docker and skopeo: run `skopeo login`"
_NO_CONTAINERS = "cachedb runs no containers: use `cachedb export NAME - | docker load`, then docker"
_NO_BUILDS = "cachedb builds no images: build with docker or buildah, then use `cachedb import ARCHIVE`"
_NO_EDITS = "cachedb edits no images: edit an export, then use `cachedb import LAYOUT`"
_REMOVE = "use `cachedb rm NAME`, which removes a name and frees the blobs that only it used"
_PRUNE = "use `cachedb prune`, which removes images, or `cachedb gc`, which frees blobs that no image uses"

_OTHERS = {
    "image prune": _PRUNE,
    "system prune": _PRUNE,
    "builder prune": _PRUNE,
    "clean": _PRUNE,
    "cleanup": _PRUNE,
    "delete": f"{_REMOVE}; nothing is deleted at a registry",
    "remove": _REMOVE,
    "untag": _REMOVE,
    "unhold": "use `cachedb release NAME`",
    "rename": "use `cachedb tag OLD NEW`, then `cachedb rm OLD`",
    "mv": "use `cachedb tag OLD NEW`, then `cachedb rm OLD`",
    "login": _LOGIN,
    "logout": _LOGIN,
    "search": "use `cachedb ls` for the cache, or `cachedb tags REPOSITORY` for a registry",
    "catalog": "cachedb lists no repositories of a registry: use `cachedb tags REPOSITORY` for the tags of one",
    "sync": "use `cachedb pull --from FILE` with a file of names, then `cachedb push --all-tags REPOSITORY`",
    "config": "use `cachedb show NAME`, or `cachedb inspect NAME` for an image at its registry",
    "info": "use `cachedb df`, or `cachedb db current` for the schema",
    "system info": "use `cachedb df`, or `cachedb db current` for the schema",
    "events": "use `cachedb ps`, which lists the processes that write to the cache",
    "top": "use `cachedb ps`, which lists the processes that write to the cache",
    "mount": "cachedb unpacks no images: use `cachedb export --format oci-dir NAME DIR`, then `umoci unpack`",
    "unmount": "cachedb mounts no images: use `cachedb export --format oci-dir NAME DIR`, then `umoci unpack`",
    "unpack": "cachedb unpacks no images: use `cachedb export --format oci-dir NAME DIR`, then `umoci unpack`",
    "scp": "use `cachedb export NAME - | ssh HOST cachedb import -`",
    "db heads": "use `cachedb db current`",
    "db status": "use `cachedb db current`",
    "db show": "use `cachedb db history -v`",
    "db migrate": "use `cachedb db upgrade`",
    "db stamp": "use `cachedb db upgrade` or `cachedb db downgrade`, which change the tables too",
    "migrate": "use `cachedb db upgrade`",
    "upgrade": "use `cachedb db upgrade`",
    "backup": "use `cachedb db backup`, or `cachedb copy DIR` for the blobs too",
    "restore": "use `cachedb db restore FILE`",
    "repair": "use `cachedb verify --repair`",
    "build": _NO_BUILDS,
    "buildx prune": _PRUNE,
    "buildx": _NO_BUILDS,
    "builder": _NO_BUILDS,
    "commit": _NO_BUILDS,
    "append": _NO_EDITS,
    "mutate": _NO_EDITS,
    "rebase": _NO_EDITS,
    "flatten": _NO_EDITS,
    "run": _NO_CONTAINERS,
    "exec": _NO_CONTAINERS,
    "create": _NO_CONTAINERS,
    "start": _NO_CONTAINERS,
    "stop": _NO_CONTAINERS,
    "kill": _NO_CONTAINERS,
    "logs": _NO_CONTAINERS,
    "compose": _NO_CONTAINERS,
    "container": _NO_CONTAINERS,
    "image": "use `cachedb ls`, `cachedb show`, `cachedb rm` or another command of `cachedb --help`",
    "system": "use `cachedb df`, `cachedb gc` or `cachedb verify`",
}
"""Commands of other tools, and what to use instead; a key of two words goes before one of one."""

_OPTIONS = {
    ("ls", "--no-trunc"): "use `cachedb ls --format json`, which prints whole digests",
    ("images", "--no-trunc"): "use `cachedb ls --format json`, which prints whole digests",
    ("rmi", "--all"): "use `cachedb rm $(cachedb ls -q)`",
    ("rmi", "-a"): "use `cachedb rm $(cachedb ls -q)`",
    ("pull", "--all-tags"): "use `cachedb tags REPOSITORY` for the tags, then `cachedb pull --from FILE`",
    ("pull", "-a"): "use `cachedb tags REPOSITORY` for the tags, then `cachedb pull --from FILE`",
    ("inspect", "--raw"): "use `cachedb pull NAME`, then `cachedb manifest NAME`",
    ("inspect", "--config"): "use `cachedb inspect --format json NAME`, which prints the values of the config",
    ("verify", "--tarball"): "use `cachedb import ARCHIVE`, which verifies every blob",
    ("verify", "--remote"): "use `cachedb pull NAME`, which verifies every blob",
    ("show", "--no-trunc"): "use `cachedb show --format json NAME`, which cuts nothing",
}
"""A command of ours with an option that other tools have, and what to use instead."""

_OURS_TOO = {"manifest"}  # first words that are also commands of ours: an image's name may follow them
_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.\w+)$")
_TRANSPORT = re.compile(r"(docker|oci|oci-archive|docker-archive|dir|docker-daemon|containers-storage):")


def translate(words: list[str]) -> list[str]:
    """Return the words of a command line in cachedb's own words.

    Raises:
        OtherCommand: if cachedb does not have the command; the message names the one to use.
    """
    for count in (2, 1):
        typed = " ".join(words[:count])
        if len(words) < count or (count == 2 and words[0] in _OURS_TOO and len(words) == count):
            continue
        if typed in _SAME:
            return translate([_SAME[typed], *words[count:]])
        if advice := _OTHERS.get(typed) or _OTHERS.get(typed.removeprefix("image ")):
            raise OtherCommand(f"no such command {typed!r}: {advice}")
    return words


def check_arguments(command: click.Command, words: list[str]) -> None:
    """Check that the arguments do not have the meaning that another tool gives them.

    Args:
        command: our command.
        words: its name, options and arguments.

    Raises:
        OtherCommand: if they have that meaning; the message names the command to use.
    """
    adviser = _ADVISERS.get(words[0])
    if adviser is not None and (advice := adviser(_list_arguments(command, words[1:]))):
        raise OtherCommand(f"{words[0]!r} has another meaning here: {advice}")


def _list_arguments(command: click.Command, words: list[str]) -> list[str]:
    """Return the words that are neither options nor values of options."""
    with_value = {
        name
        for option in command.params
        if isinstance(option, click.Option) and not option.is_flag
        for name in option.opts
    }
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in with_value]


def explain_option(error: click.NoSuchOption) -> str | None:
    """Return what to use instead of an option of another tool; None for an unknown option."""
    name = error.ctx.info_name if error.ctx else None
    return _OPTIONS.get((name or "", error.option_name))


# Commands of the same name with other arguments


def _advise_copy(names: list[str]) -> str | None:
    """Advise about `skopeo copy` and `crane copy`, which have a source and a destination."""
    if len(names) < 2:
        return None
    source, destination = names[-2:]
    name = source.removeprefix("docker://")
    match _find_transport(source):
        case "docker":
            get = f"`cachedb pull {name}`"
        case "docker-daemon" | "containers-storage":
            name = source.partition(":")[2]
            get = f"`{'docker' if source.startswith('docker') else 'podman'} save {name} | cachedb import -`"
        case _:
            name, get = "NAME", f"`cachedb import {source} NAME`"
    match _find_transport(destination):
        case "docker":
            put = f"`cachedb push {name} {destination.removeprefix('docker://')}`"
        case "docker-daemon" | "containers-storage":
            tool = "docker" if destination.startswith("docker") else "podman"
            put = f"`cachedb export {name} - | {tool} load`"
        case _:
            put = f"`cachedb export {name} {destination}`"
    return f"use {get}, then {put}"


def _find_transport(place: str) -> str:
    """Return the transport in front of a place; a place without one is at a registry."""
    found = _TRANSPORT.match(place)
    return found[1] if found else "docker"


def _advise_pull(names: list[str]) -> str | None:
    """Advise about `crane pull`, whose last argument is an archive."""
    if len(names) < 2 or not _ARCHIVE.search(names[-1]):
        return None
    return f"use `cachedb pull {names[0]}`, then `cachedb export {names[0]} {names[-1]}`"


def _advise_push(names: list[str]) -> str | None:
    """Advise about `crane push`, whose first argument is an archive."""
    if len(names) < 2 or not _ARCHIVE.search(names[0]):
        return None
    return f"use `cachedb import {names[0]} {names[1]}`, then `cachedb push {names[1]}`"


def _advise_inspect(names: list[str]) -> str | None:
    """Advise about `skopeo inspect` of an archive or of another storage."""
    if not names or _find_transport(names[-1]) == "docker":
        return None
    return f"use `cachedb import {names[-1]} NAME`, then `cachedb show NAME`"


def _advise_blob(names: list[str]) -> str | None:
    """Advise about `crane blob`, whose argument is a repository and a digest."""
    if len(names) != 1 or "@" not in names[0]:
        return None
    return f"use `cachedb blob cat {names[0].partition('@')[2]}`"


_ADVISERS = {
    "copy": _advise_copy,
    "pull": _advise_pull,
    "push": _advise_push,
    "inspect": _advise_inspect,
    "blob": _advise_blob,
}
