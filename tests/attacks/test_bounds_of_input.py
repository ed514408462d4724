"""Limits on input from files and archives, and on output: values at a limit and just beyond it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachedb import Cache, CacheError, InvalidArchive, InvalidManifest, RegistryError, StorageError, oci
from cachedb import text as plain_text
from cachedb.cli import output
from cachedb.content import last_used
from cachedb.disk import downloads
from cachedb.disk.folders import Folders
from cachedb.index.tables import TEXT_LIMIT
from cachedb.oci.manifests import DOCUMENT_LIMIT, OCI_MANIFEST
from cachedb.oci.names import Name
from cachedb.reports.parameters import parse_number
from cachedb.transports.archive import files, model, tar
from cachedb.transports.archive.files import Section
from cachedb.transports.registry import credentials
from tests.conftest import Run
from tests.support import make
from tests.support.index_file import change_index
from tests.support.make import save
from tests.support.promises import check

IMAGE = make.image(1, 2)


# Documents


@pytest.mark.slow
def test_a_manifest_and_a_config_of_the_largest_size_are_saved_exported_imported_and_adopted(
    cache: Cache, directory: Path, tmp_path: Path
) -> None:
    config = IMAGE.config.ljust(DOCUMENT_LIMIT)
    document = json.loads(IMAGE.manifest)
    document["config"] |= {"digest": make.digest_of(config), "size": len(config)}
    largest = IMAGE._replace(config=config, manifest=json.dumps(document).encode().ljust(DOCUMENT_LIMIT))
    save(cache, "app:1", largest)
    assert cache.get_image("app:1").architecture == "amd64"
    cache.export("app:1", tmp_path / "app.tar")
    cache.remove_manifest("app:1")
    cache.cache_from_tar(tmp_path / "app.tar")
    assert cache.get_manifest("app:1") == largest.manifest
    assert cache.is_image_complete("app:1")
    assert cache.get_image("app:1").architecture == "amd64"
    assert cache.verify().problems == []
    make.json_cache(tmp_path / "old", {"old/1": largest})
    assert cache.adopt(tmp_path / "old").left_out == []
    with pytest.raises(InvalidManifest, match=f"is {DOCUMENT_LIMIT + 1} bytes: more than {DOCUMENT_LIMIT} are refused"):
        cache.save_manifest("app:2", largest.manifest + b" ")
    cache.close()
    check(directory)


def test_a_small_file_of_an_archive_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(bytes(DOCUMENT_LIMIT + 1))
    assert len(model.read_small(Section(path, 0, DOCUMENT_LIMIT), "it", InvalidArchive)) == DOCUMENT_LIMIT
    with pytest.raises(InvalidArchive, match=f"it is {DOCUMENT_LIMIT + 1} bytes"):
        model.read_small(Section(path, 0, DOCUMENT_LIMIT + 1), "it", InvalidArchive)


@pytest.mark.parametrize(("length", "kept"), [(TEXT_LIMIT, True), (TEXT_LIMIT + 1, False)])
def test_an_author_of_the_longest_text_is_kept(length: int, kept: bool) -> None:
    found = oci.parse_config(json.dumps({"author": "a" * length}).encode(), TEXT_LIMIT)
    assert (found.author is not None) == kept


@pytest.mark.slow
def test_show_names_the_author_of_an_image_that_has_one(cachedb: Run, cache: Cache) -> None:
    config = json.dumps({**json.loads(IMAGE.config), "author": "A. Author <a@example.org>"}).encode()
    document = json.loads(IMAGE.manifest)
    document["config"] |= {"digest": make.digest_of(config), "size": len(config)}
    save(cache, "app:1", IMAGE._replace(config=config, manifest=json.dumps(document).encode()))
    save(cache, "app:2", IMAGE)
    lines = [line.split(maxsplit=1) for line in cachedb("show", "app:1").stdout.splitlines()]
    assert ["author", "A. Author <a@example.org>"] in lines
    assert "author" not in cachedb("show", "app:2").stdout
    assert json.loads(cachedb("show", "app:1", "--format", "json").stdout)["author"] == "A. Author <a@example.org>"


# Archives


def open_tar(tmp_path: Path, data: bytes) -> files.Tar:
    path = tmp_path / "it.tar"
    path.write_bytes(data)
    with path.open("rb") as file:
        return files.Tar(file.fileno())


def test_an_archive_is_read_up_to_the_limit_of_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MEMBERS_LIMIT", 10)
    assert open_tar(tmp_path, make.tar_of({f"f{n}": b"" for n in range(10)})).find("f9")
    with pytest.raises(InvalidArchive, match="more than 10 members"):
        open_tar(tmp_path, make.tar_of({f"f{n}": b"" for n in range(11)}))


@pytest.mark.parametrize(("limit", "is_read"), [(5, True), (4, False)])
def test_the_names_of_an_archive_are_read_up_to_the_limit_of_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, is_read: bool
) -> None:
    monkeypatch.setattr(files, "_NAMES_LIMIT", limit)
    data = make.tar_of({"abc": b"", "de": b""})
    if is_read:
        assert open_tar(tmp_path, data).find("de")
    else:
        with pytest.raises(InvalidArchive, match="names of more than 4 characters"):
            open_tar(tmp_path, data)


@pytest.mark.parametrize(("written", "fits"), [(3 * 10 * 4096, True), (3 * 10 * 4096 + 1, False)])
def test_an_archive_unpacks_to_three_bytes_for_each_free_byte(
    monkeypatch: pytest.MonkeyPatch, written: int, fits: bool
) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda _file: SimpleNamespace(f_bavail=10, f_frsize=4096))
    if fits:
        files._check_space(0, written)
    else:
        with pytest.raises(StorageError, match="has only 41 kB left"):
            files._check_space(0, written)


def tar_with_links(count: int) -> bytes:
    """Return a tar with a file and a chain of links, each to the one before."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        made.addfile(tarfile.TarInfo("l0"))
        for place in range(count):
            link = tarfile.TarInfo(f"l{place + 1}")
            link.type, link.linkname = tarfile.SYMTYPE, f"l{place}"
            made.addfile(link)
    return buffer.getvalue()


def test_up_to_40_links_are_followed_as_on_linux(tmp_path: Path) -> None:
    assert open_tar(tmp_path, tar_with_links(40)).find("l40")
    with pytest.raises(InvalidArchive, match="form a loop"):
        open_tar(tmp_path, tar_with_links(41))


def test_a_member_name_of_4096_characters_is_accepted() -> None:
    assert files._normalize_name("x" * 4096)
    with pytest.raises(InvalidArchive, match="has an invalid file name"):
        files._normalize_name("x" * 4097)


def extended_header(size: int) -> bytes:
    """Return an extended header whose data, a comment, has this many bytes."""
    digits = len(str(size))
    data = b"%d comment=" % size + b"x" * (size - digits - len(" comment=\n")) + b"\n"
    assert len(data) == size
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, size
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-size % 512)


def test_an_extended_header_of_a_mebibyte_is_read(tmp_path: Path) -> None:
    small = make.tar_of({"f": b"x"})
    assert open_tar(tmp_path, extended_header(1024 * 1024) + small).find("f")
    with pytest.raises(InvalidArchive, match="extended headers that are too large"):
        open_tar(tmp_path, extended_header(1024 * 1024 + 1) + small)


def test_extended_headers_have_a_common_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make.tar_of({"f": b"x"})
    monkeypatch.setattr(tar, "_HEADERS_LIMIT", 3 * (1000 + tar.BLOCK))
    assert open_tar(tmp_path, extended_header(1000) * 3 + small).find("f")
    monkeypatch.setattr(tar, "_HEADERS_LIMIT", 3 * (1000 + tar.BLOCK) - 1)
    with pytest.raises(InvalidArchive, match="extended headers that are too large"):
        open_tar(tmp_path, extended_header(1000) * 3 + small)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1023, 1024])
def test_members_of_any_length_are_read_whole(tmp_path: Path, length: int) -> None:
    path = tmp_path / "it.tar"
    path.write_bytes(make.tar_of({"a": b"a" * length, "b": b"after"}))
    with path.open("rb") as file:
        found = files.Tar(file.fileno())
        for name, content in (("a", b"a" * length), ("b", b"after")):
            section = found.find(name)
            assert section is not None
            assert section.head(10_000) == content


def test_a_tar_that_ends_early_is_refused_and_the_error_says_where(tmp_path: Path) -> None:
    data = make.tar_of({"a": b"a" * 512})[: 512 + 512]
    with pytest.raises(InvalidArchive, match="is cut short in 'a'"):
        open_tar(tmp_path, data[:-1])
    with pytest.raises(InvalidArchive, match="at byte 1024"):
        open_tar(tmp_path, data + bytes(1023) + b"x")


def test_a_tar_without_two_blocks_of_zeros_at_its_end_has_no_end(tmp_path: Path) -> None:
    data = make.tar_of({"a": b"a" * 512})[: 512 + 512]
    assert not open_tar(tmp_path, data).has_end
    assert not open_tar(tmp_path, data + bytes(1023)).has_end
    assert open_tar(tmp_path, data + bytes(1024)).has_end


def test_an_archive_may_have_100000_blobs_and_1000_images() -> None:
    model.check_blob_count(model._BLOBS_LIMIT)
    model.check_image_count([None] * model._IMAGES_LIMIT)
    with pytest.raises(InvalidArchive, match="more than 100000 blobs"):
        model.check_blob_count(model._BLOBS_LIMIT + 1)
    with pytest.raises(InvalidArchive, match="1001 images: more than 1000"):
        model.check_image_count([None] * (model._IMAGES_LIMIT + 1))


# Credentials


def test_a_credentials_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "auth.json"
    content = json.dumps({"auths": {"r.test": {"username": "me", "password": "p"}}}).encode()
    path.write_bytes(content.ljust(1024 * 1024))
    found = credentials.find("r.test", "app", path)
    assert found is not None
    assert found.username == "me"
    path.write_bytes(content.ljust(1024 * 1024 + 1))
    with pytest.raises(RegistryError, match="not a JSON object of at most 1048576 bytes"):
        credentials.find("r.test", "app", path)


@pytest.mark.parametrize(("size", "taken"), [(64 * 1024, True), (64 * 1024 + 1, False)])
def test_the_answer_of_a_credential_helper_is_read_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, taken: bool
) -> None:
    answer = json.dumps({"Username": "me", "Secret": "p"}).ljust(size)
    (tmp_path / "answer").write_text(answer)
    helper = tmp_path / "docker-credential-x"
    helper.write_text(f"#!/bin/sh\ncat '{tmp_path}/answer'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "auth.json"
    path.write_text('{"credsStore": "x"}')
    if taken:
        assert credentials.find("r.test", "app", path) == credentials.Credentials("me", "p", "")
    else:
        with pytest.raises(RegistryError, match="wrote over 65536 bytes"):
            credentials.find("r.test", "app", path)


# Limits of time


@pytest.mark.parametrize(("seconds", "gone"), [(24 * 60 * 60 - 1, False), (24 * 60 * 60, True)])
def test_a_partial_download_is_kept_for_a_day(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, seconds: int, gone: bool
) -> None:
    path = cache.directory / "ingest" / "partial" / make.digest_of(b"x").replace(":", "-")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    begun = path.stat().st_mtime
    monkeypatch.setattr(downloads, "time", SimpleNamespace(time=lambda: begun + seconds))
    assert downloads.remove_stale_downloads(Folders(cache.directory)) == gone
    assert path.exists() != gone


@pytest.mark.parametrize(("size", "resumed_at"), [(9, 9), (10, 10), (11, 0)])
def test_a_download_resumes_unless_its_file_is_larger_than_the_blob(tmp_path: Path, size: int, resumed_at: int) -> None:
    path = tmp_path / "partial"
    path.write_bytes(bytes(size))
    folder = os.open(tmp_path, os.O_RDONLY)
    assert downloads.find_resumable_bytes(folder, path.name, 10) == resumed_at
    os.close(folder)
    assert path.exists() == bool(resumed_at)


@pytest.mark.parametrize(("seconds", "possible"), [(36_525 * 86_400, True), (36_525 * 86_400 + 1, False)])
def test_a_hold_lasts_a_hundred_years_at_most(cache: Cache, seconds: float, possible: bool) -> None:
    save(cache, "app:1", IMAGE)
    if possible:
        assert cache.add_hold("app:1", seconds=seconds)
    else:
        with pytest.raises(CacheError, match="cannot hold for"):
            cache.add_hold("app:1", seconds=seconds)


@pytest.mark.parametrize(
    ("seconds", "written"), [(last_used.RESOLUTION_SECONDS, False), (last_used.RESOLUTION_SECONDS + 0.001, True)]
)
def test_uses_are_written_at_most_every_five_minutes(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, seconds: float, written: bool
) -> None:
    uses = last_used.Uses(cache._database)
    uses._written = 1000.0
    calls: list[object] = []
    monkeypatch.setattr(uses, "write", lambda: calls.append(1))
    monkeypatch.setattr(last_used, "time", SimpleNamespace(monotonic=lambda: uses._written + seconds))
    uses.note(Name("app", "1"))
    assert bool(calls) == written


@pytest.mark.parametrize(("seconds", "written"), [(200, False), (400, True)])
def test_a_last_use_is_updated_if_it_is_older_than_five_minutes(
    cache: Cache, directory: Path, seconds: int, written: bool
) -> None:
    save(cache, "app:1", IMAGE)
    then = datetime.now(UTC) - timedelta(seconds=seconds)
    change_index(directory, f"UPDATE images SET last_used_at = '{then:%Y-%m-%dT%H:%M:%S.%fZ}'")
    uses = last_used.Uses(cache._database)
    uses.note(Name("app", "1"))
    uses.write()
    assert (cache.get_image("app:1").last_used_at > then) == written


# Output


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (999_499_999, "999 MB"),
        (999_500_000, "1 GB"), (999_499_999_999, "999 GB"), (999_500_000_000, "1 TB"), (-1000, "-1 kB"),
    ],
)  # fmt: skip
def test_a_size_is_printed_in_the_unit_that_gives_at_most_three_digits(size: int, text: str) -> None:
    assert plain_text.format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"), (59, "just now"), (60, "1 minute ago"), (119, "1 minute ago"), (120, "2 minutes ago"),
        (3_599, "59 minutes ago"), (3_600, "1 hour ago"), (86_399, "23 hours ago"), (86_400, "1 day ago"),
        (2_629_799, "30 days ago"), (2_629_800, "1 month ago"), (31_557_599, "11 months ago"),
        (31_557_600, "1 year ago"), (63_115_200, "2 years ago"),
    ],
)  # fmt: skip
def test_a_time_is_printed_as_its_age(monkeypatch: pytest.MonkeyPatch, seconds: int, text: str) -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    monkeypatch.setattr(plain_text, "datetime", SimpleNamespace(now=lambda _: now))
    assert plain_text.format_age(now - timedelta(seconds=seconds)) == text


def test_long_texts_and_digests_are_cut() -> None:
    assert plain_text.truncate("x" * 60) == "x" * 60
    assert plain_text.truncate("x" * 61) == "x" * 59 + "…"
    assert plain_text.shorten_digest("sha256:0123456789abcdef") == "sha256:0123456789ab"


@pytest.mark.parametrize(("room", "fits"), [(10 + 100 + 26 + 4, True), (10 + 100 + 26 + 3, False)])
def test_a_table_fits_if_no_word_and_no_short_cell_is_folded(
    monkeypatch: pytest.MonkeyPatch, room: int, fits: bool
) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((room, 99)))
    rows = [["a bc def g", "b" * 100, f"{'c' * 26} d"]]
    assert output.fits(["name", "digest", "x"], rows) == fits


def test_json_written_in_any_number_of_parts_is_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for parts in (1, 2, 3, 1000):
        monkeypatch.setattr(output, "_PARTS_PER_WRITE", parts)
        output.print_json({"a": [1, 2, 3], "b": None})
        assert json.loads(capsys.readouterr().out) == {"a": [1, 2, 3], "b": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (str(2**63 - 1), 2**63 - 1), (str(2**63), str(2**63)), (str(-(2**63) + 1), -(2**63) + 1),
        ("1.5", 1.5), ("1.50", "1.50"), ("007", "007"),
    ],
)  # fmt: skip
def test_a_text_becomes_a_number_if_sql_can_store_it_unchanged(text: str, value: object) -> None:
    found: Any = parse_number(text)
    assert (found, type(found)) == (value, type(value))


# Names


def test_a_repository_of_255_and_a_tag_of_128_characters_are_accepted() -> None:
    make_name: Callable[[int], Name] = lambda length: Name.parse("a" * length + ":1")  # noqa: E731
    assert make_name(255).repository == "a" * 255
    with pytest.raises(CacheError, match="longer than 255 characters"):
        make_name(256)
    assert Name.parse("app:" + "t" * 128)
    with pytest.raises(CacheError, match="up to 128"):
        Name.parse("app:" + "t" * 129)


def test_a_descriptor_of_16_tebibytes_is_accepted() -> None:
    def parse_size(size: int) -> oci.Descriptor:
        return oci.parse_entry({"mediaType": OCI_MANIFEST, "digest": IMAGE.digest, "size": size}, "it")

    assert parse_size(16 * 1024**4).size == 16 * 1024**4
    with pytest.raises(InvalidManifest):
        parse_size(16 * 1024**4 + 1)
