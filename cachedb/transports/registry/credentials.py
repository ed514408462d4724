"""Find the credentials for a registry where ``podman login`` and ``docker login`` put them.

This follows containers-auth.json(5) and its code (containers/image, pkg/docker/config). Docker's config.json follows
docker/cli (cli/config), and helper programs follow docker-credential-helpers. No error, nor its cause, contains a
secret.
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from cachedb.errors import CacheError, RegistryError
from cachedb.oci.names import HUB, HUB_HOSTS
from cachedb.progress import Advance
from cachedb.text import shorten
from cachedb.threads import in_threads

__all__ = ["Credentials", "find"]


_FILE_LIMIT = 1024 * 1024  # bytes
_ANSWER_LIMIT = 64 * 1024  # bytes that a helper may write; a token has a few thousand
_TIMEOUT_SECONDS = 30.0  # for a helper
_SYSTEM_FOLDER = "/run/containers"
_POLL_SECONDS = 0.1  # between checks for a stop
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,100}")
_NOT_FOUND = b"credentials not found in native keychain"
_HUB_URL = "https://index.docker.io/v1/"


class Credentials(NamedTuple):
    """Credentials for a registry or its token server."""

    username: str
    password: str
    identity_token: str  # a refresh token that replaces the password; "" if there is none
    registry_token: str = ""  # a bearer token that is sent to the registry as it is; "" if there is none

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, ...)"


def find(
    registry: str,
    repository: str,
    authfile: str | os.PathLike[str] | None = None,
    *,
    stopped: threading.Event | None = None,
) -> Credentials | None:
    """Return the credentials for a repository, or None for anonymous access.

    Args:
        registry: its ``host[:port]``; Docker Hub is ``docker.io``.
        repository: the repository in the registry, such as ``library/alpine``.
        authfile: the only file to read; the default is ``$REGISTRY_AUTH_FILE``, else the usual files.
        stopped: set to cancel a running helper.

    Raises:
        RegistryError: if a file is invalid, a given file does not exist, or a helper fails.
    """
    registry, stopped = _parse_registry(registry), stopped or threading.Event()
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
    """Yield the paths of credential files, which need not exist, in order of precedence."""
    home = os.path.expanduser("~")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield os.path.join(runtime, "containers/auth.json")
    elif os.access(_SYSTEM_FOLDER, os.X_OK):  # else only root can use the folder, so no login of this user is there
        yield f"{_SYSTEM_FOLDER}/{os.getuid()}/auth.json"
    yield os.path.join(os.environ.get("XDG_CONFIG_HOME") or f"{home}/.config", "containers/auth.json")
    yield os.path.join(os.environ.get("DOCKER_CONFIG") or f"{home}/.docker", "config.json")
    yield os.path.join(home, ".dockercfg")


def _load(file: str) -> dict[str, Any] | None:
    """Return the parsed content of a file, or None if it does not exist."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(_FILE_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        advice = "make it readable, or name another file in REGISTRY_AUTH_FILE"
        raise RegistryError(f"cannot read the credentials in {file!r}: {error.strerror}: {advice}") from error
    document = _parse_json_object(data) if len(data) <= _FILE_LIMIT else None
    if document is None or not all(isinstance(document.get(name) or {}, dict) for name in ("auths", "credHelpers")):
        what = f"{file!r} is not a JSON object of at most {_FILE_LIMIT} bytes whose auths and credHelpers are objects"
        raise RegistryError(f"{what}: repair it, or remove it and log in again")
    if os.path.basename(file) == ".dockercfg":  # the old format: only entries, with URLs as keys
        urls = {key if "://" in key or "/" not in key else f"https://{key}": document[key] for key in document}
        return {"auths": urls}
    return document


def _parse_json_object(data: bytes) -> dict[str, Any] | None:
    # The parser's errors contain the text and its secrets, so they must not leave this function.
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _look_up(
    document: dict[str, Any], registry: str, repository: str, file: str, stopped: threading.Event
) -> Credentials | None:
    """Return the credentials in one file: from the registry's helper, the default helper, or the entries."""
    helper = _find_entry(document.get("credHelpers") or {}, registry)
    if helper:  # like Docker and containers/image, ignore the entries even if the helper has no credentials
        return _ask_helper(helper, registry, file, stopped)
    store = document.get("credsStore")
    # An empty string as the registry's helper disables the default helper.
    found = _ask_helper(store, registry, file, stopped) if store and helper is None else None
    if found is not None:
        return found
    entry = _find_entry(document.get("auths") or {}, registry, repository)
    return _decode(entry, registry, file) if entry else None


def _find_entry(table: dict[str, Any], registry: str, repository: str = "") -> Any:  # noqa: ANN401 - any JSON value
    """Return the value of the most specific key, or of another spelling of the registry, or None."""
    key = f"{registry}/{repository}"
    while key:
        if key in table:
            return table[key]
        key = key.rpartition("/")[0]
    return next((table[key] for key in table if _parse_registry(key) == registry), None)


def _parse_registry(key: str) -> str:
    """Return the registry of a key.

    The path of a URL is dropped. Any other path is a namespace, and stays.
    """
    rest = key.removeprefix("http://").removeprefix("https://")
    host = rest if rest == key else rest.partition("/")[0]
    return HUB if host in HUB_HOSTS else host


def _decode(entry: object, registry: str, file: str) -> Credentials | None:
    """Return the credentials of an entry of ``auths``, or None if it is empty."""
    what = f"the entry for {shorten(registry)} in {file!r}"
    names = ("auth", "username", "password", "identitytoken", "registrytoken")
    fields: list[Any] = [entry.get(name) or "" for name in names] if isinstance(entry, dict) else [None]
    if not all(isinstance(field, str) for field in fields):
        raise RegistryError(f"{what} is not an object of strings: log in again")
    auth, username, password, identity_token, registry_token = fields
    if auth:
        try:
            pair = base64.b64decode("".join(auth.split()), validate=True).decode()
        except ValueError:
            pair = ""  # do not raise from here: the error contains the secret
        username, colon, password = pair.partition(":")
        if not colon:
            raise RegistryError(f'{what} has an "auth" that is not user:password in base64: log in again')
    password = password.strip("\0")  # Docker once wrote NULs
    return _none_if_empty(Credentials(username, password, identity_token, registry_token))


def _none_if_empty(credentials: Credentials) -> Credentials | None:
    return credentials if any(credentials) else None


def _ask_helper(helper: object, registry: str, file: str, stopped: threading.Event) -> Credentials | None:
    """Return a helper's credentials for a registry, or None if it has none."""
    if not isinstance(helper, str) or not _HELPER.fullmatch(helper):
        what = f"{file!r} has {shorten(helper)} as a credential helper"
        raise RegistryError(f"{what}: give the part of the program's name after docker-credential-")
    program = f"docker-credential-{helper}"
    server = _HUB_URL if registry == HUB else registry
    status, answer = _run_helper(program, server, file, stopped)
    if status != 0 and answer.strip() == _NOT_FOUND:
        return None
    if status != 0:
        what = f"{program} failed with exit code {status} for {shorten(server)}"
        raise RegistryError(f"{what}: run `{program} get` with this name as its input to see why")
    document = _parse_json_object(answer) or {}
    username, secret = document.get("Username"), document.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise RegistryError(f"{program} did not answer with credentials: update or replace it")
    return _none_if_empty(Credentials("", "", secret) if username == "<token>" else Credentials(username, secret, ""))


def _run_helper(program: str, server: str, file: str, stopped: threading.Event) -> tuple[int, bytes]:
    """Run a helper with the server as its input; return its exit code and its output."""
    interrupted = threading.Event()

    def run(_item: None, _advance: Advance) -> tuple[int, bytes]:
        return _start_helper(program, server, file, lambda: stopped.is_set() or interrupted.is_set())

    # In a thread, because an interrupt of the main thread may come when the process runs and Popen has not returned.
    return in_threads(run, [None], lambda _: None, threads=1, stop=interrupted.set)[0]


def _start_helper(program: str, server: str, file: str, is_stopped: Callable[[], bool]) -> tuple[int, bytes]:
    """Start a helper and wait for its end, as `_run_helper` does."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    pipe = subprocess.PIPE
    try:  # in its own session, so that its child processes can be killed with it
        process = subprocess.Popen(  # noqa: S603 - no shell, and the user's own file names it
            [program, "get"], bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        advice = f"install {program}, or take it out of {file!r}"
        raise RegistryError(f"cannot run {program}: {error.strerror}: {advice}") from error
    with process, selectors.DefaultSelector() as selector:
        assert process.stdin
        assert process.stdout
        try:
            with suppress(BrokenPipeError):  # a helper need not read its input
                process.stdin.write(server.encode())
            process.stdin.close()
            selector.register(process.stdout, selectors.EVENT_READ)
            answer = b""
            while len(answer) <= _ANSWER_LIMIT:
                while not selector.select(_POLL_SECONDS):
                    if is_stopped():
                        raise CacheError(f"cancelled: {program} is no longer needed")
                    if time.monotonic() > deadline:
                        raise subprocess.TimeoutExpired(program, _TIMEOUT_SECONDS)
                chunk = process.stdout.read(_ANSWER_LIMIT)
                if not chunk:
                    return process.wait(max(0.0, deadline - time.monotonic())), answer
                answer += chunk
            raise RegistryError(f"{program} wrote over {_ANSWER_LIMIT} bytes: update or replace it")
        except subprocess.TimeoutExpired:
            what = f"{program} gave no answer in {_TIMEOUT_SECONDS:g} seconds"
            raise RegistryError(f"{what}: unlock its key store and try again") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
