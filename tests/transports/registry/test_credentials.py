"""Credentials: which files and helpers are read, in which order, and that no secret is shown."""

from __future__ import annotations

import base64
import errno
import json
import logging
import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachedb.errors import CacheError, RegistryError
from cachedb.transports.registry import credentials
from cachedb.transports.registry.credentials import Credentials, find
from tests.support.processes import is_alive
from tests.support.waiting import wait_until

HUB = "https://index.docker.io/v1/"
REGISTRY = "registry.example.org:5000"
SECRET = "hunter2:with:colons"
NOT_FOUND = "echo credentials not found in native keychain; exit 1"

Helper = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty home, and hide the real one."""
    for name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return path


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    """Return a function that installs a credential helper, a shell script, and returns the file of its last request."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def install(name: str, script: str) -> Path:
        path, noted = programs / f"docker-credential-{name}", tmp_path / f"asked-{name}"
        path.write_text(f'#!/bin/sh\nserver=$(cat)\nprintf %s "$1 $server" > "{noted}"\n{script}\n')
        path.chmod(0o755)
        return noted

    return install


def answer(username: str, secret: str) -> str:
    return f"cat <<'END'\n{json.dumps({'ServerURL': 'x', 'Username': username, 'Secret': secret})}\nEND"


def entry(username: str, password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def username_of(found: Credentials | None) -> str | None:
    return None if found is None else found.username


def write_docker_config(home: Path, document: dict[str, Any]) -> Path:
    return write(home / ".docker/config.json", document)


# The files


def test_without_a_file_there_are_no_credentials() -> None:
    assert find(REGISTRY, "app") is None


def test_files_are_read_in_the_documented_order(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    places = ["run/containers/auth.json", "xdg/containers/auth.json", "docker/config.json"]
    files = [write(tmp_path / place, {"auths": {REGISTRY: entry(place)}}) for place in places]
    files.append(write(home / ".dockercfg", {REGISTRY: entry(".dockercfg")}))
    for file, place in zip(files, [*places, ".dockercfg"], strict=True):
        assert username_of(find(REGISTRY, "app")) == place
        file.unlink()
    assert find(REGISTRY, "app") is None


@pytest.mark.parametrize("place", [".config/containers/auth.json", ".docker/config.json"])
def test_files_are_in_the_home_if_no_variable_is_set(place: str, home: Path) -> None:
    write(home / place, {"auths": {REGISTRY: entry("me")}})
    assert username_of(find(REGISTRY, "app")) == "me"


def test_without_a_runtime_directory_the_first_file_is_in_run_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert credentials._SYSTEM_FOLDER == "/run/containers"
    monkeypatch.setattr(credentials, "_SYSTEM_FOLDER", str(tmp_path))
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("XDG_RUNTIME_DIR")
        else:
            monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert next(credentials._usual_files()) == f"{tmp_path}/{os.getuid()}/auth.json"


def test_a_system_folder_that_only_root_may_enter_is_skipped(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/run/containers")  # a mode would not stop root
    assert next(credentials._usual_files()) == str(home / ".config/containers/auth.json")


def test_a_file_without_the_registry_does_not_hide_the_next(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "run/containers/auth.json", {"auths": {"other.example.org": entry("other")}})
    write_docker_config(home, {"auths": {REGISTRY: entry("docker")}})
    assert username_of(find(REGISTRY, "app")) == "docker"


def test_a_named_file_is_the_only_one_that_is_read(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_docker_config(home, {"auths": {REGISTRY: entry("home"), "other.example.org": entry("home")}})
    by_variable = write(tmp_path / "by-variable.json", {"auths": {REGISTRY: entry("variable")}})
    by_argument = write(tmp_path / "by-argument.json", {"auths": {REGISTRY: entry("argument")}})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(by_variable))
    assert username_of(find(REGISTRY, "app")) == "variable"
    assert find("other.example.org", "app") is None
    assert username_of(find(REGISTRY, "app", by_argument)) == "argument"
    assert find("other.example.org", "app", by_argument) is None


def test_a_named_file_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.json"
    with pytest.raises(RegistryError, match=r"missing\.json"):
        find(REGISTRY, "app", missing)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(missing))
    with pytest.raises(RegistryError, match=r"missing\.json"):
        find(REGISTRY, "app")


@pytest.mark.parametrize("place", [".config/containers/auth.json", ".docker/config.json"])
def test_an_empty_variable_is_ignored(place: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / place, {"auths": {REGISTRY: entry("home")}})
    for name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.setenv(name, "")
    assert username_of(find(REGISTRY, "app")) == "home"


# The entries of a file


def test_the_most_specific_key_wins(home: Path) -> None:
    keys = {
        f"https://{REGISTRY}/v2/": "url",
        REGISTRY: "host",
        f"{REGISTRY}/team": "team",
        f"{REGISTRY}/team/app": "app",
    }
    write_docker_config(home, {"auths": {key: entry(name) for key, name in keys.items()}})
    assert username_of(find(REGISTRY, "team/app")) == "app"
    assert username_of(find(REGISTRY, "team/app2")) == "team"
    assert username_of(find(REGISTRY, "teams/app")) == "host"


def test_an_entry_of_a_namespace_is_not_used_for_the_whole_registry(home: Path) -> None:
    write_docker_config(home, {"auths": {f"{REGISTRY}/team": entry("team")}})
    assert find(REGISTRY, "other/app") is None


@pytest.mark.parametrize("key", [f"https://{REGISTRY}", f"http://{REGISTRY}/v1/", f"https://{REGISTRY}/v2/"])
def test_an_entry_of_a_url_is_used_for_its_host(key: str, home: Path) -> None:
    write_docker_config(home, {"auths": {key: entry("me")}})
    assert username_of(find(REGISTRY, "app")) == "me"
    assert find(REGISTRY.partition(":")[0], "app") is None


@pytest.mark.parametrize("key", [HUB, "docker.io", "index.docker.io", "https://registry-1.docker.io/v2/"])
@pytest.mark.parametrize("registry", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_all_names_of_docker_hub_are_equal(key: str, registry: str, home: Path) -> None:
    write_docker_config(home, {"auths": {key: entry("me")}})
    assert username_of(find(registry, "library/alpine")) == "me"
    assert find("quay.io", "library/alpine") is None


def test_the_path_of_a_key_in_dockercfg_is_ignored(home: Path) -> None:
    write(home / ".dockercfg", {f"{REGISTRY}/v1/": entry("me"), "docker.io/library/alpine": entry("hub")})
    assert username_of(find(REGISTRY, "app")) == "me"
    assert username_of(find("docker.io", "team/app")) == "hub"


# The content of an entry


def test_a_password_may_have_colons(home: Path) -> None:
    write_docker_config(home, {"auths": {REGISTRY: entry("me", "a:b:c")}})
    assert find(REGISTRY, "app") == Credentials("me", "a:b:c", "")


def test_trailing_nuls_are_removed_from_a_password(home: Path) -> None:
    write_docker_config(home, {"auths": {REGISTRY: entry("me", "secret\0\0\0")}})
    assert find(REGISTRY, "app") == Credentials("me", "secret", "")


def test_an_identity_token_may_stand_alone_or_with_other_fields(home: Path) -> None:
    write_docker_config(
        home, {"auths": {REGISTRY: entry("me", "") | {"identitytoken": "t"}, "quay.io": {"identitytoken": "u"}}}
    )
    assert find(REGISTRY, "app") == Credentials("me", "", "t")
    assert find("quay.io", "app") == Credentials("", "", "u")


def test_username_and_password_are_used_if_there_is_no_auth(home: Path) -> None:
    fields = {"username": "me", "password": "p"}
    write_docker_config(home, {"auths": {REGISTRY: fields, "quay.io": fields | entry("auth", "q")}})
    assert find(REGISTRY, "app") == Credentials("me", "p", "")
    assert find("quay.io", "app") == Credentials("auth", "q", "")


@pytest.mark.parametrize("empty", [{}, None, {"auth": ""}, {"auth": None}, {"email": "me@example.org"}, entry("", "")])
def test_an_empty_entry_is_skipped(empty: object, home: Path, tmp_path: Path) -> None:
    write(tmp_path / "run/containers/auth.json", {"auths": {REGISTRY: empty}})
    assert find(REGISTRY, "app") is None
    write_docker_config(home, {"auths": {REGISTRY: entry("docker")}})
    assert username_of(find(REGISTRY, "app")) == "docker"


# Helpers


def test_a_registrys_helper_is_tried_before_the_store_and_that_before_entries(home: Path, helper: Helper) -> None:
    helper("own", answer("own", "s"))
    helper("all", answer("all", "s"))
    document = {"auths": {REGISTRY: entry("auths")}, "credsStore": "all", "credHelpers": {REGISTRY: "own"}}
    write_docker_config(home, document)
    assert find(REGISTRY, "app") == Credentials("own", "s", "")
    write_docker_config(home, document | {"credHelpers": {}})
    assert find(REGISTRY, "app") == Credentials("all", "s", "")
    write_docker_config(home, {"auths": document["auths"]})
    assert find(REGISTRY, "app") == Credentials("auths", SECRET, "")


def test_an_empty_entry_is_looked_up_in_the_store(home: Path, helper: Helper) -> None:
    asked = helper("all", answer("all", "s"))
    write_docker_config(home, {"auths": {REGISTRY: {}}, "credsStore": "all"})
    assert username_of(find(REGISTRY, "app")) == "all"
    assert asked.read_text() == f"get {REGISTRY}"


@pytest.mark.parametrize(
    "document", [{"credsStore": "x"}, {"credHelpers": {HUB: "x"}}, {"credHelpers": {"docker.io": "x"}}]
)
def test_a_helper_is_asked_for_docker_hub_by_its_old_address(
    document: dict[str, Any], home: Path, helper: Helper
) -> None:
    asked = helper("x", answer("me", "s"))
    write_docker_config(home, document)
    assert username_of(find("docker.io", "library/alpine")) == "me"
    assert asked.read_text() == f"get {HUB}"


def test_an_empty_helper_disables_the_store_for_a_registry(home: Path) -> None:
    write_docker_config(
        home, {"auths": {REGISTRY: entry("auths")}, "credsStore": "missing", "credHelpers": {REGISTRY: ""}}
    )
    assert username_of(find(REGISTRY, "app")) == "auths"


def test_a_helpers_secret_for_the_user_token_is_an_identity_token(home: Path, helper: Helper) -> None:
    helper("x", answer("<token>", "refresh"))
    write_docker_config(home, {"credsStore": "x"})
    assert find(REGISTRY, "app") == Credentials("", "", "refresh")


@pytest.mark.parametrize("script", [NOT_FOUND, answer("", "")])
def test_entries_are_read_if_the_store_has_no_credentials(script: str, home: Path, helper: Helper) -> None:
    helper("x", script)
    path = write_docker_config(home, {"credsStore": "x", "auths": {REGISTRY: entry("auths")}})
    assert username_of(find(REGISTRY, "app")) == "auths"
    write(path, {"credsStore": "x"})
    assert find(REGISTRY, "app") is None


def test_the_next_file_is_read_if_a_registrys_helper_has_no_credentials(
    home: Path, tmp_path: Path, helper: Helper
) -> None:
    helper("x", NOT_FOUND)
    entries = {REGISTRY: entry("stale")}
    write(tmp_path / "run/containers/auth.json", {"credHelpers": {REGISTRY: "x"}, "auths": entries})
    write_docker_config(home, {"auths": {REGISTRY: entry("docker")}})
    assert username_of(find(REGISTRY, "app")) == "docker"


def test_the_answer_of_a_helper_that_reads_no_input_is_used(home: Path, tmp_path: Path, helper: Helper) -> None:
    helper("x", "")
    (tmp_path / "bin/docker-credential-x").write_text(f"#!/bin/sh\nexec <&-\n{answer('me', 's')}\n")
    write_docker_config(home, {"credsStore": "x"})
    assert username_of(find(REGISTRY, "app")) == "me"


def test_the_error_of_a_missing_helper_names_it(home: Path, helper: Helper) -> None:
    write_docker_config(home, {"credsStore": "missing"})
    with pytest.raises(RegistryError, match="install docker-credential-missing"):
        find(REGISTRY, "app")


def test_the_error_of_a_helper_that_cannot_be_run_names_it(home: Path, tmp_path: Path, helper: Helper) -> None:
    helper("x", "")
    (tmp_path / "bin/docker-credential-x").write_bytes(b"\x7fELF no more")
    write_docker_config(home, {"credsStore": "x"})
    with pytest.raises(RegistryError, match="cannot run docker-credential-x"):
        find(REGISTRY, "app")


@pytest.mark.parametrize("name", ["../x", "x/y", "x;y", "x y", "x\n", "x\0", "$(id)", 1, ["x"], "x" * 101])
def test_an_invalid_helper_name_is_refused(name: object, home: Path, tmp_path: Path, helper: Helper) -> None:
    asked = helper("x", answer("me", "s"))
    write_docker_config(home, {"credsStore": name})
    with pytest.raises(RegistryError, match="as a credential helper"):
        find(REGISTRY, "app")
    assert not asked.exists()


def collect_text(error: BaseException) -> str:
    """Return all text that a log could show of an error: its message, its causes and their attributes."""
    text = "".join(traceback.format_exception(error))
    while True:
        text += repr(error) + repr(vars(error))
        following = error.__cause__ or error.__context__
        if following is None:
            return text
        error = following


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (f"echo {SECRET}; echo {SECRET} >&2; exit 3", "docker-credential-x failed with exit code 3"),
        (f"echo {SECRET}; kill -9 $$", "docker-credential-x failed with exit code -9"),
        (f"echo {SECRET}", "docker-credential-x did not answer with credentials"),
        (
            f"""echo '{{"Username": "me", "Secret": ["{SECRET}"]}}'""",
            "docker-credential-x did not answer with credentials",
        ),
        (f"""echo '["{SECRET}"]'""", "docker-credential-x did not answer with credentials"),
        (f"printf '%070000d' 0; echo {SECRET}; sleep 100", "docker-credential-x wrote over 65536 bytes"),
        (f"echo {SECRET}; sleep 100", "docker-credential-x gave no answer in 0.5 seconds"),
    ],
)
def test_the_error_of_a_failed_helper_names_it_and_hides_its_output(
    script: str,
    message: str,
    home: Path,
    helper: Helper,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    helper("x", script)
    write_docker_config(home, {"credsStore": "x", "auths": {REGISTRY: entry("auths")}})
    if "no answer" in message:
        monkeypatch.setattr(credentials, "_TIMEOUT_SECONDS", 0.5)
    with caplog.at_level(logging.DEBUG), pytest.raises(RegistryError, match=message) as caught:
        find(REGISTRY, "app")
    shown = collect_text(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert SECRET not in shown


@pytest.mark.parametrize(
    "script", ["sleep 100 & echo $! > '{0}'; wait", "sleep 100 >&- & echo $! > '{0}'; exec >&-; wait"]
)
def test_a_hanging_helper_is_killed_with_its_children(
    script: str, home: Path, tmp_path: Path, helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    helper("x", script.format(pid))
    write_docker_config(home, {"credsStore": "x"})
    began = time.monotonic()
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + (30 if is_written(pid) else 0))
    monkeypatch.setattr(credentials, "time", later)
    with pytest.raises(RegistryError, match="docker-credential-x gave no answer in 30 seconds"):
        find(REGISTRY, "app")
    assert time.monotonic() - began < 80
    assert has_ended(int(pid.read_text()))


def test_a_helper_is_killed_when_its_answer_is_no_longer_needed(
    home: Path, tmp_path: Path, helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_TIMEOUT_SECONDS", 600.0)
    pid, stopped = tmp_path / "pid", threading.Event()
    helper("x", f"sleep 100 & echo $! > '{pid}'; wait")
    write_docker_config(home, {"credsStore": "x"})

    def stop() -> None:
        if wait_until(lambda: is_written(pid)):
            stopped.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(CacheError, match="cancelled: docker-credential-x is no longer needed"):
        find(REGISTRY, "app", stopped=stopped)
    stopper.join()
    assert has_ended(int(pid.read_text()))


@pytest.mark.slow
def test_an_interrupt_kills_a_helper_that_has_just_started(
    home: Path, helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = list[int]()

    class InterruptedPopen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            pids.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    helper("x", "exec sleep 600")
    write_docker_config(home, {"credsStore": "x"})
    monkeypatch.setattr(credentials, "_TIMEOUT_SECONDS", 600.0)
    monkeypatch.setattr(subprocess, "Popen", InterruptedPopen)
    with pytest.raises(KeyboardInterrupt):
        find(REGISTRY, "app")
    assert has_ended(pids[0])


def is_written(path: Path) -> bool:
    """Return whether a file contains a complete line."""
    return path.exists() and path.read_text().endswith("\n")


def has_ended(pid: int) -> bool:
    """Return whether a process ends in time; a zombie counts as ended."""
    return wait_until(lambda: not is_alive(pid))


# Invalid files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON " + SECRET.encode(),
        b'["' + SECRET.encode() + b'"]',
        b'{"auths": "\xff' + SECRET.encode() + b'"}',
        b"[" * 200_000,
        b"{}" + b" " * 1024 * 1024,
        b'{"auths": ["' + SECRET.encode() + b'"]}',
        b'{"credHelpers": "' + SECRET.encode() + b'"}',
    ],
    ids=["empty", "text", "list", "bytes", "deep", "large", "auths", "credHelpers"],
)
def test_the_error_of_an_invalid_file_names_it(content: bytes, home: Path) -> None:
    path = write_docker_config(home, {})
    path.write_bytes(content)
    with pytest.raises(RegistryError, match=r"config\.json' is not a JSON object .* log in again") as caught:
        find(REGISTRY, "app")
    assert SECRET not in collect_text(caught.value)


def test_a_file_of_the_largest_size_is_read(home: Path) -> None:
    path = write_docker_config(home, {"auths": {REGISTRY: entry("me")}})
    path.write_bytes(path.read_bytes().ljust(1024 * 1024))
    assert username_of(find(REGISTRY, "app")) == "me"


@pytest.mark.parametrize(
    "bad",
    [
        {"auth": base64.b64encode(SECRET.replace(":", "").encode()).decode()},
        {"auth": entry("me")["auth"] + "!"},
        {"auth": entry("me")["auth"].rstrip("=")[:-1]},
        {"auth": base64.b64encode(b"me:\xff" + SECRET.encode()).decode()},
        {"auth": SECRET + "\u00e9"},
        {"auth": [SECRET]},
        {"username": "me", "password": {"is": SECRET}},
        {"identitytoken": 1, "password": SECRET},
        [SECRET],
        SECRET,
    ],
)
def test_the_error_of_an_invalid_entry_names_it_and_hides_its_content(bad: object, home: Path) -> None:
    write_docker_config(home, {"auths": {REGISTRY: bad, "quay.io": entry("me")}})
    with pytest.raises(RegistryError, match=rf"the entry for '{REGISTRY}' in .*config\.json.* log in again") as caught:
        find(REGISTRY, "app")
    shown = collect_text(caught.value)
    assert SECRET not in shown
    assert base64.b64encode(SECRET.encode()).decode()[:12] not in shown
    assert username_of(find("quay.io", "app")) == "me"


def test_the_error_of_an_unreadable_file_names_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: str, mode: str) -> None:  # a mode would not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)

    monkeypatch.setattr(credentials, "open", refuse, raising=False)
    with pytest.raises(RegistryError, match=r"auth\.json': Permission denied: make it readable"):
        find(REGISTRY, "app")


def test_the_error_of_a_directory_in_place_of_the_file_names_it(home: Path) -> None:
    (home / ".docker/config.json").mkdir(parents=True)
    with pytest.raises(RegistryError, match=r"config\.json'.*s a directory"):
        find(REGISTRY, "app")


def test_secrets_are_not_in_the_representation() -> None:
    found = Credentials("me", "the-password", "the-token")
    for text in (repr(found), str(found), f"{found}", repr([found])):
        assert "me" in text
        assert "the-" not in text
