"""The package: its exports, and that every kind of installation includes all files that it needs."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import cachedb
from cachedb.index.tables import REVISION

ROOT = Path(__file__).parent.parent


def test_all_lists_exactly_the_public_names() -> None:
    assert sorted(set(cachedb.__all__)) == sorted(cachedb.__all__)
    for name in cachedb.__all__:
        assert getattr(cachedb, name) is not None
    with pytest.raises(AttributeError):
        cachedb.nope  # type: ignore[attr-defined]  # noqa: B018
    assert dir(cachedb) == sorted(cachedb.__all__)


def test_every_error_is_a_cache_error_and_in_the_tree_of_the_docstring() -> None:
    from cachedb import errors

    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), cachedb.CacheError)
        assert name in errors.__doc__
        assert name in cachedb.__all__


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout's source files, to build from."""
    path = tmp_path_factory.mktemp("checkout") / "cachedb"
    kept = shutil.ignore_patterns(".git", ".venv", ".nox", "__pycache__", ".*_cache", ".hypothesis", "dist", "build")
    shutil.copytree(ROOT, path, ignore=kept)
    return path


@pytest.fixture(scope="module")
def distributions(checkout: Path) -> dict[str, Path]:
    """Return the paths of the sdist and of the wheel built from it."""
    out = checkout.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    subprocess.run(command, check=True, capture_output=True)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


MIGRATE = """
import json
from click.testing import CliRunner
from cachedb.cli.main import cli

printed = []
for line in ("history", "downgrade 0001", "current", "backup old.db", "upgrade", "check", "restore old.db", "current"):
    done = CliRunner().invoke(cli, ["--dir", "cache", "db", *line.split(), "--format", "json"])
    assert (done.exit_code, done.stderr) == (0, ""), (line, done.output)
    printed.append(json.loads(done.stdout))
print(json.dumps(printed))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_installed_package_creates_a_cache_and_migrates_its_schema(
    kind: str, checkout: Path, distributions: dict[str, Path], tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    # Use the dependencies of the tests' own environment.
    purelib = sysconfig.get_path("purelib", vars={"base": str(environment)})
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    source = ["-e", str(checkout)] if kind == "editable" else [str(distributions[kind])]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--force-reinstall", *source], check=True, capture_output=True)

    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    where = "import cachedb, cachedb.index.schema as s; print(cachedb.__file__); print(s.migrations_directory())"
    result = subprocess.run([python, "-c", where], cwd=tmp_path, env=clean, check=True, capture_output=True, text=True)
    package, migrations = map(Path, result.stdout.splitlines())
    expected = checkout if kind == "editable" else environment
    assert package.is_relative_to(expected)
    assert migrations.is_relative_to(expected)
    assert (package.parent / "py.typed").is_file()
    for name in ("page.html.j2", "page.css", "page.js"):
        assert (package.parent / "reports" / name).is_file()
    for name in ("cachedb-prune.service", "cachedb-prune.timer"):
        assert (package.parent / "cli" / "units" / name).is_file()
    program, archive = environment / "bin" / "cachedb", ROOT / "examples" / "hello.oci.tar"
    command = [str(program), "--dir", "cache", "import", "-q", str(archive)]
    result = subprocess.run(command, cwd=tmp_path, env=clean, check=True, capture_output=True, text=True)
    assert result.stdout == "hello:1\n"

    result = subprocess.run(
        [python, "-c", MIGRATE], cwd=tmp_path, env=clean, check=True, capture_output=True, text=True
    )
    history, down, current, _, up, drift, restored, last = json.loads(result.stdout)
    assert history[0]["revision"] == REVISION
    assert (down["after"], current["revision"], up["after"], drift) == ("0001", "0001", REVISION, [])
    assert restored["images"] == 1
    assert last == {"revision": REVISION, "newest": REVISION, "usable": True, "pending": 0}


def names_used_of_other_modules() -> Iterator[tuple[str, str, str]]:
    """Yield each module of the package, another one that it uses, and the name that it uses of it."""
    package = Path(cachedb.__file__).parent
    modules = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in package.rglob("*.py")}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        bound: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cachedb"):
                for alias in node.names:
                    if (whole := f"{node.module}.{alias.name}") in modules:
                        bound[alias.asname or alias.name] = whole
                    elif node.module in modules:
                        yield module, node.module, alias.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                yield module, bound[node.value.id], node.attr


@pytest.mark.slow
def test_a_module_uses_only_names_that_another_one_offers() -> None:
    used = list(names_used_of_other_modules())
    assert ("cachedb.cache", "cachedb.errors", "CacheError") in used
    missing = [
        f"{module} uses {name} of {other}"
        for module, other, name in used
        # `errors.__all__` lists the public errors: not the functions beside them, which are for the package alone.
        if other != "cachedb.errors"
        and name not in ("*", "__all__")
        and name not in getattr(importlib.import_module(other), "__all__", [name])
    ]
    assert missing == []


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the place and the first line of each docstring of the package, of constants too."""
    package = Path(cachedb.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                first = str(node.value.value).partition("\n")[0]
                yield f"{path.relative_to(package)}:{node.lineno}", first


@pytest.mark.slow
def test_the_first_line_of_a_docstring_is_short() -> None:
    found = dict(docstrings())
    assert "A local cache of container images that many processes share, with an index in SQL." in found.values()
    assert [f"{place}: {line}" for place, line in found.items() if len(line) > 100] == []
