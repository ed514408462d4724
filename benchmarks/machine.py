"""Print the machine and the installed peers, at the head of the output."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

from benchmarks.measure import CORES

COMMANDS = {  # arguments that print the version, and the command that installs it
    "skopeo": (["--version"], "apt-get install skopeo"),
    "podman": (["--version"], "apt-get install podman"),
    "umoci": (["--version"], "apt-get install umoci"),
    "docker-registry": (["--version"], "apt-get install docker-registry"),
    "crane": (["version"], "go install github.com/google/go-containerregistry/cmd/crane@latest"),
    "regctl": (["version"], "go install github.com/regclient/regclient/cmd/regctl@latest"),
    "oras": (["version"], "go install oras.land/oras/cmd/oras@latest"),
}
PACKAGES = {"disk-objectstore": "pip install disk-objectstore", "diskcache": "pip install diskcache"}


def find_go_commands() -> None:
    """Add the folder of `go install` to the PATH."""
    if shutil.which("go"):
        found = subprocess.run(["go", "env", "GOPATH"], capture_output=True, text=True, check=True).stdout.strip()
        os.environ["PATH"] += f":{found}/bin"


def are_installed(*commands: str) -> bool:
    """Return whether all of the commands are installed."""
    return all(shutil.which(command) for command in commands)


def print_machine(place: Path) -> None:
    """Print the date, the machine, and the installed and the missing peers."""
    find_go_commands()
    processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [platform.machine()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(place)], capture_output=True, text=True, check=False)
    print(f"On {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}: {processor[0]}, {CORES} cores, {memory:.0f} GiB;")
    print(f"Linux {platform.release()}, {kind.stdout.strip()};", end=" ")
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version};")
    print(f"load before the run {os.getloadavg()[0]:.1f}.\n")
    missing = []
    for command, (words, install) in COMMANDS.items():
        if not shutil.which(command):
            missing.append((command, install))
            continue
        output = subprocess.run([command, *words], capture_output=True, text=True, check=False).stdout
        version = re.search(r"\d+\.\d+\.\d+\S*", output)
        print(f"- {command} {version[0] if version else 'of an unknown version'}")
    for package, install in PACKAGES.items():
        try:
            print(f"- {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append((package, install))
    for name, install in missing:
        print(f"- {name} is missing: `{install}`")
    print(flush=True)
