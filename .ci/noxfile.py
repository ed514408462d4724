"""Run the tests on every Python and every kind of host that cachedb supports.

`nox -f .ci/noxfile.py --list` lists the sessions.
"""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"  # so that the tests also run in an environment without pip
nox.options.sessions = ["tests"]

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHONS = nox.project.python_versions(nox.project.load_toml(CHECKOUT / "pyproject.toml"))
"""The Pythons in the classifiers. If one is missing, CI fails; elsewhere nox skips it."""
FAST = ("-m", "not slow and not attack")
TEST_USER = "cachedb-ci"


def run_pytest(session: nox.Session, *arguments: str) -> None:
    """Install cachedb with its newest dependencies, and run the tests."""
    session.chdir(CHECKOUT)
    session.install("-e", ".[test]")
    session.run("pytest", "-q", "-n", "auto", *arguments, *session.posargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the fast tests."""
    run_pytest(session, *FAST)


@nox.session(python=PYTHONS)
def slow(session: nox.Session) -> None:
    """Run the tests that are not fast."""
    run_pytest(session, "-m", "slow or attack")


@nox.session(python=PYTHONS)
def full(session: nox.Session) -> None:
    """Run all tests."""
    run_pytest(session)


@nox.session(python=False)
@nox.parametrize("version", PYTHONS, ids=PYTHONS)
def user(session: nox.Session, version: str) -> None:
    """Run the fast tests, and the slow ones with peers, as a user without privileges.

    It needs root, creates the user, and needs a Python outside of root's home directory.
    """
    if os.geteuid():
        session.skip("only root can become another user: run `nox -s tests` instead")
    if TEST_USER not in {entry.pw_name for entry in pwd.getpwall()}:
        session.run(
            "useradd", "--create-home", TEST_USER, external=True
        )  # also allocates the subordinate ids that podman needs
    home = Path(pwd.getpwnam(TEST_USER).pw_dir)
    with copied_checkout(home) as checkout:
        python = make_environment(session, checkout, f"python{version}")
        (checkout / "run").mkdir(mode=0o700)
        session.run("chown", "-R", f"{TEST_USER}:", str(checkout.parent), external=True)
        session.chdir(checkout)
        environment = [f"HOME={home}", f"TMPDIR={checkout.parent}", f"XDG_RUNTIME_DIR={checkout / 'run'}"]
        command = ["runuser", "-u", TEST_USER, "--", "env", *environment, python, "-m", "pytest", "-q", "-n", "auto"]
        session.run(*command, *FAST, *session.posargs, external=True)
        session.run(*command, "-m", "slow and not attack", "tests/peers", *session.posargs, external=True)


@nox.session(python=False)
def hosts(session: nox.Session) -> None:
    """Run the fast tests with the lowest dependencies on a host with unusual settings.

    It has no HOME, LANG=C, umask 077, a path with a space, and a tmpfs.
    """
    with copied_checkout(Path("/dev/shm")) as checkout:  # noqa: S108 - a tmpfs on every Linux
        python = make_environment(session, checkout, f"python{PYTHONS[0]}", "--resolution", "lowest-direct")
        session.chdir(checkout)
        host = ["env", "-u", "HOME", "LANG=C", "LC_ALL=C", f"TMPDIR={checkout.parent}"]
        host += ["sh", "-c", 'umask 077; exec "$@"', "sh"]
        session.run(*host, python, "-m", "pytest", "-q", "-n", "auto", *FAST, *session.posargs, external=True)


@contextmanager
def copied_checkout(place: Path) -> Iterator[Path]:
    """Copy the checkout to a new folder whose path has a space; delete the folder after the block.

    The path is short, because the tests create sockets in it, and a socket's path has at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="db ", dir=place, ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # some tests switch to another user for a while
        ignored = shutil.ignore_patterns(".venv", ".nox", "*_cache", "__pycache__", ".hypothesis")
        yield Path(shutil.copytree(CHECKOUT, Path(folder) / "checkout", ignore=ignored))


def make_environment(session: nox.Session, checkout: Path, interpreter: str, *options: str) -> str:
    """Create a virtual environment without pip in a checkout, install cachedb, and return its Python."""
    python = str(checkout / ".venv" / "bin" / "python")
    session.run("uv", "venv", "-q", "-p", interpreter, str(checkout / ".venv"), external=True)
    session.run("uv", "pip", "install", "-q", "-p", python, *options, "-e", f"{checkout}[test]", external=True)
    return python
