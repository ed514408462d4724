"""Credentials for a registry: found where ``podman login`` and ``docker login`` put them.

After containers-auth.json(5) and the code it is about (containers/image, pkg/docker/config); what only Docker's
config.json has is after docker/cli (cli/config), and the programs that keep secrets are asked as
docker-credential-helpers has it. No secret gets into an error, nor into what an error was caused by.
"""

from __future__ import annotations

import base64
import json
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from cachedb.errors import CacheError, RegistryError
from cachedb.text import shorten

__all__ = ["Credentials", "find"]


_FILE_LIMIT = 1024 * 1024  # bytes
_ANSWER_LIMIT = 64 * 1024  # bytes that a helper may write: tokens are of some thousands
_TIMEOUT = 30.0  # seconds that a helper may take
_NAP = 0.1  # seconds between two looks at whether its answer is wanted still
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,100}")
_NOT_FOUND = b"credentials not found in native keychain"
_HUB = "docker.io"
_HUB_HOSTS = {_HUB, "index.docker.io", "registry-1.docker.io"}
_HUB_URL = "https://index.docker.io/v1/"


class Credentials(NamedTuple):
    """What a registry, or who gives out its tokens, is shown."""

    username: str
    password: str
    identity_token: str  # a refresh token, to be used instead of the password; "" if there is none

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, ...)"


def find(
    registry: str,
    repository: str,
    authfile: str | os.PathLike[str] | None = None,
    *,
    stopped: threading.Event | None = None,
) -> Credentials | None:
    """Return the credentials for a repository, or None: it is asked for anonymously.

    Args:
        registry: its ``host[:port]``; Docker Hub is ``docker.io``.
        repository: in the registry, such as ``library/alpine``.
        authfile: the only file to look in; left out, ``$REGISTRY_AUTH_FILE`` is, or else the usual ones are.
        stopped: is set when nobody wants them any more; a helper that still thinks is ended then.

    Raises:
        RegistryError: if a file cannot be used, one that was named is not there, or a helper fails.
    """
    registry, stopped = _host(registry), stopped or threading.Event()
    named = authfile or os.environ.get("REGISTRY_AUTH_FILE")
    for file in [os.fspath(named)] if named else _usual_files():
        document = _load(file)
        if document is None and named:
            raise RegistryError(f"there is no file of credentials {file!r}: log in with it, or name another")
        found = None if document is None else _look_up(document, registry, repository, file, stopped)
        if found is not None:
            return found
    return None


def _usual_files() -> Iterator[str]:
    """Yield the files that may be there, in their order."""
    home = os.path.expanduser("~")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    yield os.path.join(runtime, "containers/auth.json") if runtime else f"/run/containers/{os.getuid()}/auth.json"
    yield os.path.join(os.environ.get("XDG_CONFIG_HOME") or f"{home}/.config", "containers/auth.json")
    yield os.path.join(os.environ.get("DOCKER_CONFIG") or f"{home}/.docker", "config.json")
    yield os.path.join(home, ".dockercfg")


def _load(file: str) -> dict[str, Any] | None:
    """Return what a file says, or None if there is none."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(_FILE_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        advice = "make it readable, or name another file in REGISTRY_AUTH_FILE"
        raise RegistryError(f"cannot read the credentials in {file!r}: {error.strerror}; {advice}") from error
    document = _json_object(data) if len(data) <= _FILE_LIMIT else None
    if document is None or not all(isinstance(document.get(name) or {}, dict) for name in ("auths", "credHelpers")):
        what = f"{file!r} is not a JSON object of at most {_FILE_LIMIT} bytes whose auths and credHelpers are objects"
        raise RegistryError(f"{what}: repair it, or remove it and log in again")
    if os.path.basename(file) == ".dockercfg":  # the old form: entries alone, whose keys are hosts with any path
        urls = {key if "://" in key or "/" not in key else f"https://{key}": document[key] for key in document}
        return {"auths": urls}
    return document


def _json_object(data: bytes) -> dict[str, Any] | None:
    # The parser's errors hold all of the text, so they go no further than here.
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _look_up(
    document: dict[str, Any], registry: str, repository: str, file: str, stopped: threading.Event
) -> Credentials | None:
    """Return what one file, and the helpers that it names, have: a registry's own, the one for all, the entries."""
    helper = _entry(document.get("credHelpers") or {}, registry)
    if helper:  # and if it has none, neither Docker nor containers/image looks at the entries
        return _ask(helper, registry, file, stopped)
    store = document.get("credsStore")
    # Its own being "" says: not the one for all.
    found = _ask(store, registry, file, stopped) if store and helper is None else None
    if found is not None:
        return found
    entry = _entry(document.get("auths") or {}, registry, repository)
    return _decode(entry, registry, file) if entry else None


def _entry(table: dict[str, Any], registry: str, repository: str = "") -> Any:  # noqa: ANN401 - anything JSON has
    """Return what the most specific key has, or else a key that is another way to write the registry, or None."""
    key = f"{registry}/{repository}"
    while key:
        if key in table:
            return table[key]
        key = key.rpartition("/")[0]
    return next((table[key] for key in table if _host(key) == registry), None)


def _host(key: str) -> str:
    """Return the registry that a key is for; a path is cut off a URL only, elsewhere it is a namespace."""
    rest = key.removeprefix("http://").removeprefix("https://")
    host = rest if rest == key else rest.partition("/")[0]
    return _HUB if host in _HUB_HOSTS else host


def _decode(entry: object, registry: str, file: str) -> Credentials | None:
    """Return the credentials that an entry of ``auths`` has, or None if it is empty."""
    what = f"the entry for {shorten(registry)} in {file!r}"
    names = ("auth", "username", "password", "identitytoken")
    fields: list[Any] = [entry.get(name) or "" for name in names] if isinstance(entry, dict) else [None]
    if not all(isinstance(field, str) for field in fields):
        raise RegistryError(f"{what} is not an object of strings: log in again")
    auth, username, password, identity_token = fields
    if auth:
        try:
            pair = base64.b64decode("".join(auth.split()), validate=True).decode()
        except ValueError:
            pair = ""  # nothing is raised from here: the error has the secret
        username, colon, password = pair.partition(":")
        if not colon:
            raise RegistryError(f'{what} has an "auth" that is not user:password in base64: log in again')
    return _unless_empty(Credentials(username, password.strip("\0"), identity_token))  # Docker once wrote NULs


def _unless_empty(credentials: Credentials) -> Credentials | None:
    return credentials if any(credentials) else None


def _ask(helper: object, registry: str, file: str, stopped: threading.Event) -> Credentials | None:
    """Return what a credential helper has for a registry, or None if it has nothing."""
    if not isinstance(helper, str) or not _HELPER.fullmatch(helper):
        what = f"{file!r} has {shorten(helper)} as a credential helper"
        raise RegistryError(f"{what}: it is what follows docker-credential- in a program's name")
    program = f"docker-credential-{helper}"
    server = _HUB_URL if registry == _HUB else registry
    status, answer = _run(program, server, file, stopped)
    if status != 0 and answer.strip() == _NOT_FOUND:
        return None
    if status != 0:
        what = f"{program} failed with exit code {status} for {shorten(server)}"
        raise RegistryError(f"{what}: run `{program} get` with that as its input to see why")
    document = _json_object(answer) or {}
    username, secret = document.get("Username"), document.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise RegistryError(f"{program} answered with something else than credentials: update or replace it")
    return _unless_empty(Credentials("", "", secret) if username == "<token>" else Credentials(username, secret, ""))


def _run(program: str, server: str, file: str, stopped: threading.Event) -> tuple[int, bytes]:
    """Give a helper the server on its input; return its exit code and its output."""
    deadline = time.monotonic() + _TIMEOUT
    pipe = subprocess.PIPE
    try:  # in a session of its own, so that all it begins can be ended with it
        process = subprocess.Popen(  # noqa: S603 - no shell, and the user's own file names it
            [program, "get"], bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        advice = f"install {program}, or take it out of {file!r}"
        raise RegistryError(f"cannot run {program}: {error.strerror}; {advice}") from error
    with process, selectors.DefaultSelector() as selector:
        assert process.stdin
        assert process.stdout
        try:
            with suppress(BrokenPipeError):  # it may not care
                process.stdin.write(server.encode())
            process.stdin.close()
            selector.register(process.stdout, selectors.EVENT_READ)
            answer = b""
            while len(answer) <= _ANSWER_LIMIT:
                while not selector.select(_NAP):
                    if stopped.is_set():
                        raise CacheError(f"{program} was stopped, for nobody waits for its answer")
                    if time.monotonic() > deadline:
                        raise subprocess.TimeoutExpired(program, _TIMEOUT)
                chunk = process.stdout.read(_ANSWER_LIMIT)
                if not chunk:
                    return process.wait(max(0.0, deadline - time.monotonic())), answer
                answer += chunk
            raise RegistryError(f"{program} wrote over {_ANSWER_LIMIT} bytes: update or replace it")
        except subprocess.TimeoutExpired:
            what = f"{program} gave no answer in {_TIMEOUT:g} seconds"
            raise RegistryError(f"{what}: unlock what it keeps secrets in, and try again") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
