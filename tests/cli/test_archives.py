"""Test the commands for archives: import, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support import make

ONE, TWO = make.image(1), make.image(2)


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["1.0", "team/app:2"])
def test_a_tag_in_the_source_selects_an_image(cachedb: Run, tmp_path: Path, tag: str) -> None:
    make.write(tmp_path / "layout", make.oci_files({"1.0": ONE, "team/app:2": TWO}))
    name = tag if "/" in tag else f"{tag}:latest"
    assert cachedb("import", "-q", f"oci:{tmp_path}/layout:{tag}").stdout == f"{name}\n"
    assert cachedb("import", "-q", f"oci:{tmp_path}/layout:{tag}", "other:1").stdout == "other:1\n"
    assert cachedb("import", f"oci:{tmp_path}/layout:{tag}", "--select", tag).returncode == 2
    assert "has no image '3'" in cachedb("import", f"oci:{tmp_path}/layout:3").stderr


@pytest.mark.parametrize("source", ["missing.tar", "oci:missing:1"])
def test_an_import_of_a_missing_file_creates_no_cache(cachedb: Run, directory: Path, source: str) -> None:
    done = cachedb("import", source)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cachedb: cannot read the archive: No such file or directory: 'missing")
    assert not directory.exists()


@pytest.mark.slow
def test_the_source_may_be_an_option_as_in_docker_load(cachedb: Run, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "app.tar", make.oci_files({"app:1": ONE}))
    assert cachedb("import", "-q", "-i", archive).stdout == "app:1\n"
    assert cachedb("import", "-q", "-i", f"oci-archive:{archive}", "other:1").stdout == "other:1\n"
    for arguments in ([], ["-i", archive, "app:1", "app:2"]):
        assert cachedb("import", *arguments).returncode == 2


def test_an_import_from_a_registry_names_the_command_for_it(cachedb: Run) -> None:
    refused = cachedb("import", "docker://registry.example.org/app:1")
    assert refused.returncode == 2
    assert "use `cachedb pull registry.example.org/app:1`" in refused.stderr


@pytest.mark.parametrize("arguments", [["team/app:"], ["--repository", "team/app"]])
def test_a_name_with_a_colon_at_its_end_is_a_repository(cachedb: Run, tmp_path: Path, arguments: list[str]) -> None:
    layout = make.write(tmp_path / "layout", make.oci_files({"1.0": ONE, "1.1": TWO}))
    assert cachedb("import", "-q", layout, *arguments).stdout == "team/app:1.0\nteam/app:1.1\n"


def test_a_repository_is_given_only_once(cachedb: Run, tmp_path: Path) -> None:
    layout = make.write(tmp_path / "layout", make.oci_files({"1.0": ONE}))
    refused = cachedb("import", layout, "team/app:", "--repository", "team/app")
    assert refused.returncode == 2
    assert "NAME is a repository, and --repository was given too" in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_an_import_tells_which_names_it_replaced(cachedb: Run, tmp_path: Path) -> None:
    for number, made in enumerate((ONE, TWO)):
        make.write(tmp_path / f"{number}.tar", make.oci_files({"app:1": made}))
    assert cachedb("import", tmp_path / "0.tar").stderr == ""
    refused = cachedb("import", tmp_path / "1.tar", "--no-replace")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "app:1 names another image in the cache" in refused.stderr
    replaced = cachedb("import", tmp_path / "1.tar", "--format", "json")
    assert replaced.stderr == f"cachedb: replaced app:1, which was {ONE.digest}\n"
    assert json.loads(replaced.stdout)[0]["replaced"] == ONE.digest


def test_one_image_or_platform_is_imported(cachedb: Run, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "two.tar", make.oci_files({"app:1": ONE, "app:2": TWO}))
    assert cachedb("import", "-q", archive, "--select", TWO.digest[7:19]).stdout == "app:2\n"
    assert cachedb("import", archive, "--platform", "linux/arm64").returncode == 1
