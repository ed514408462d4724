"""A missing file is not confused with one that cannot be looked at."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cachedb
from cachedb.disk.existence import exists


def test_a_file_a_folder_and_the_target_of_a_link_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    assert all(map(exists, (tmp_path, tmp_path / "file", tmp_path / "link")))
    for name in ("missing", "dangling", "loop", "file/below", "missing/below"):
        assert not exists(tmp_path / name)


def test_a_path_that_cannot_be_looked_at_is_an_error() -> None:
    with pytest.raises(OSError, match="too long"):
        exists("a" * 5000)


def test_no_module_asks_a_path_whether_it_exists() -> None:
    package = Path(cachedb.__file__).parent
    found = [
        f"{path.relative_to(package)}: {ast.unparse(node)}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "exists"
    ]
    others = (
        "select(",
        "others.exists",
        "os.path.exists",
    )  # SQL, and a function that always returned False for an error
    assert [line for line in found if not any(other in line for other in others)] == []
