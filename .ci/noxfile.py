"""Run the tests on every Python and every kind of host that cachedb claims.

`nox -f .ci/noxfile.py --list` shows the sessions.
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
nox.options.default_venv_backend = "uv"  # its environments have no pip, which is one of the hosts
nox.options.sessions = ["tests"]

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHONS = nox.project.python_versions(nox.project.load_toml(CHECKOUT / "pyproject.toml"))
"""Those that the classifiers name. One that is missing fails the run on CI, and is skipped elsewhere."""
NEXT = ["3.14"]  # not claimed yet, as CI has none; tested where it is installed
FAST = ("-m", "not slow and not attack")
CORE = (
    "tests/index/sqlite",
    "tests/disk/test_folders.py",
    "tests/disk/test_forks.py",
    "tests/disk/test_locks.py",
    "tests/content/test_publish.py",
    "tests/operations/test_share.py",
    "tests/test_closing.py",
    "tests/test_exit.py",
)
"""What differs from one Python or user to another: connections, threads, forks, signals, owners."""
TEST_USER = "cachedb-ci"
SYSTEM_PYTHON = "/usr/bin/python3"  # the others may be below a home directory that only its owner may enter


def run_pytest(session: nox.Session, *arguments: str) -> None:
    """Install cachedb with its newest dependencies and run the tests."""
    session.chdir(CHECKOUT)
    session.install("-e", ".[test]")
    session.run("pytest", "-q", "-n", "auto", *arguments, *session.posargs)


@nox.session(python=[*PYTHONS, *(version for version in NEXT if shutil.which(f"python{version}"))])
def tests(session: nox.Session) -> None:
    """Run the tests that take little time."""
    run_pytest(session, *FAST)


@nox.session(python=PYTHONS)
def core(session: nox.Session) -> None:
    """Run the fast tests of what differs from one Python to another."""
    run_pytest(session, *FAST, *CORE)


@nox.session(python=PYTHONS)
def full(session: nox.Session) -> None:
    """Run all tests."""
    run_pytest(session)


@nox.session(python=False)
def user(session: nox.Session) -> None:
    """Run the fast tests as a user without privileges, who is created if need be; needs root."""
    if os.geteuid():
        session.skip("run `nox -s tests` instead: only root can become another user")
    if TEST_USER not in {entry.pw_name for entry in pwd.getpwall()}:
        session.run("useradd", "--create-home", TEST_USER, external=True)  # gives it the ids that podman needs too
    home = Path(pwd.getpwnam(TEST_USER).pw_dir)
    with copied_checkout(home) as checkout:
        python = make_environment(session, checkout, SYSTEM_PYTHON)
        (checkout / "run").mkdir(mode=0o700)
        session.run("chown", "-R", f"{TEST_USER}:", str(checkout.parent), external=True)
        session.chdir(checkout)
        environment = [f"HOME={home}", f"TMPDIR={checkout.parent}", f"XDG_RUNTIME_DIR={checkout / 'run'}"]
        become = ["runuser", "-u", TEST_USER, "--", "env", *environment]
        session.run(*become, python, "-m", "pytest", "-q", "-n", "auto", *FAST, *session.posargs, external=True)


@nox.session(python=False)
def hosts(session: nox.Session) -> None:
    """Run the fast tests with the lowest dependencies, no HOME, LANG=C, umask 077, a path with a space, on tmpfs."""
    with copied_checkout(Path("/dev/shm")) as checkout:  # noqa: S108 - it is a tmpfs everywhere
        python = make_environment(session, checkout, f"python{PYTHONS[0]}", "--resolution", "lowest-direct")
        session.chdir(checkout)
        host = ["env", "-u", "HOME", "LANG=C", "LC_ALL=C", f"TMPDIR={checkout.parent}"]
        host += ["sh", "-c", 'umask 077; exec "$@"', "sh"]
        session.run(*host, python, "-m", "pytest", "-q", "-n", "auto", *FAST, *session.posargs, external=True)


@contextmanager
def copied_checkout(place: Path) -> Iterator[Path]:
    """Copy the checkout to a path with a space, in a folder of its own that goes at the end.

    The path is short, for the tests make sockets in it, whose path may have 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="db ", dir=place, ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # some tests are another user for a while
        ignored = shutil.ignore_patterns(".venv", ".nox", "*_cache", "__pycache__", ".hypothesis")
        yield Path(shutil.copytree(CHECKOUT, Path(folder) / "checkout", ignore=ignored))


def make_environment(session: nox.Session, checkout: Path, interpreter: str, *options: str) -> str:
    """Make a virtual environment in a checkout, without pip, and return its Python."""
    python = str(checkout / ".venv" / "bin" / "python")
    session.run("uv", "venv", "-q", "-p", interpreter, str(checkout / ".venv"), external=True)
    session.run("uv", "pip", "install", "-q", "-p", python, *options, "-e", f"{checkout}[test]", external=True)
    return python
