"""The places of archives, in the words of skopeo and podman."""

from __future__ import annotations

import pytest

from cachedb import CacheError
from cachedb.transports.archive.locations import Location, parse_location


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("docker-archive:app.tar", ("docker-archive", "app.tar", None)),
        ("docker-archive:app.tar:team/app:1", ("docker-archive", "app.tar", "team/app:1")),
        ("oci-archive:app.tar", ("oci-archive", "app.tar", None)),
        ("oci-archive:/srv/app.tar:1", ("oci-archive", "/srv/app.tar", "1")),
        ("oci-archive:app.tar:", ("oci-archive", "app.tar", None)),
        ("oci:layout", ("oci-dir", "layout", None)),
        ("oci:./layout/:registry.example:5000/app:1", ("oci-dir", "./layout/", "registry.example:5000/app:1")),
        ("oci:-:1", ("oci-dir", "-", "1")),
        ("dir:folder", ("dir", "folder", None)),
        ("dir:a:b", ("dir", "a:b", None)),
    ],
)
def test_a_transport_sets_the_format(text: str, expected: tuple[str, str, str | None]) -> None:
    assert parse_location(text) == expected


@pytest.mark.parametrize(
    "text",
    ["app.tar", "-", "./a:b.tar", "a:b.tar", "./oci:layout", "oci", "C:\\app.tar", "docker://app", "OCI:x", ":x", ""],
)
def test_any_other_text_is_a_path(text: str) -> None:
    assert parse_location(text) == Location(None, text, None)


@pytest.mark.parametrize("text", ["oci:", "dir:", "docker-archive:", "oci-archive::1"])
def test_a_transport_without_a_path_is_refused(text: str) -> None:
    with pytest.raises(CacheError, match=f"'{text}' has no path: write {text.partition(':')[0]}:PATH"):
        parse_location(text)
