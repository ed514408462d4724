"""A statement is compiled once for all databases of a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.sql.compiler import SQLCompiler

from cachedb import Cache
from tests.support import make


def test_a_second_cache_compiles_nothing_that_the_first_has_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(name: str) -> list[str]:
        with Cache.open(tmp_path / name) as cache:
            make.save(cache, "app:1", make.image(1))
            return [str(image.name) for image in cache.list_manifests()]

    first = use("first")
    compiled: list[object] = []
    compile_select: Any = SQLCompiler.visit_select

    def record(self: SQLCompiler, select: object, *arguments: object, **options: object) -> object:
        compiled.append(select)
        return compile_select(self, select, *arguments, **options)

    monkeypatch.setattr(SQLCompiler, "visit_select", record)
    assert use("second") == first == ["app:1"]
    assert not compiled
