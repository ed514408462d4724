"""Crane, regctl, oras and skopeo at real registries: the same digests on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachedb import Cache
from tests.operations.test_pull import write_partial
from tests.peers.test_archives import Tools
from tests.peers.test_registries import (
    ARM,
    FIRST,
    MULTI,
    assert_is_stored,
    closure,
    every_registry,
    inspect,
    list_digests,
    put_image,
)
from tests.support import make
from tests.support.make import digest_of
from tests.support.registries import CRANE_LOG, crane_registry, isolate_client  # noqa: F401 - isolate_client is a fixture

REGCTL = "regctl --host reg={host},tls=disabled"
DIGEST = {
    "crane": "crane digest {name}",
    "regctl": f"{REGCTL} image digest {{name}}",
    "oras": "oras resolve --plain-http {name}",
}
"""The command that prints the digest of an image at a registry."""

DOWNLOAD = {
    "crane": "crane pull --format oci {name} {layout}",
    "regctl": f"{REGCTL} image copy {{name}} ocidir://{{layout}}:1",
    "oras": "oras cp --from-plain-http {name} --to-oci-layout {layout}:1",
    "skopeo": "skopeo copy --all --src-tls-verify=false docker://{name} oci:{layout}:1",
}
"""The command that copies an image from a registry to a layout."""

UPLOAD = {
    "crane": "crane push {layout} {name}",
    "regctl": f"{REGCTL} image copy ocidir://{{layout}}:1 {{name}}",
    "oras": "oras cp --from-oci-layout {layout}:1 --to-plain-http {name}",
    "skopeo": "skopeo copy --all --preserve-digests --dest-tls-verify=false oci:{layout}:1 docker://{name}",
}
"""The command that copies an image from a layout to a registry."""

ATTACH = {
    "regctl": f"{REGCTL} artifact put --artifact-type text/sbom --subject {{name}} --file {{file}}",
    "oras": "oras attach --plain-http --artifact-type text/sbom {name} {file}",
}
"""The command that attaches a file to an image at a registry."""

pytestmark = pytest.mark.usefixtures("in_folder")


def run(tools: Tools, command: str, **values: str) -> str:
    """Run a command whose words have placeholders."""
    return tools(*(word.format(**values) for word in command.split()))


def read_digest(tools: Tools, tool: str, name: str, host: str) -> str:
    """Return the digest that a tool reports of an image at a registry."""
    return run(tools, DIGEST[tool], name=name, host=host) if tool in DIGEST else inspect(tools, name)


def list_referrers(tools: Tools, tool: str, name: str, host: str) -> set[str]:
    """Return the digests of the referrers that a tool lists."""
    if tool == "oras":
        listed = json.loads(tools("oras", "discover", "--plain-http", "--format", "json", name))["referrers"]
        return {entry["digest"] for entry in listed}
    template = "{{range .Descriptors}}{{println .Digest}}{{end}}"
    listed = tools("regctl", "--host", f"reg={host},tls=disabled", "artifact", "list", "--format", template, name)
    return set(listed.split())


@every_registry
@pytest.mark.parametrize("tool", DOWNLOAD)
def test_a_tool_reads_a_pushed_index_with_its_digests(
    cache: Cache, tools: Tools, host: str, tmp_path: Path, tool: str
) -> None:
    make.save_index(cache, "multi:1", FIRST, ARM)
    cache.push("multi:1", name := f"{host}/team/multi:1")
    assert read_digest(tools, tool, name, host) == digest_of(MULTI)
    run(tools, DOWNLOAD[tool], name=name, host=host, layout="layout")
    copied = {f"sha256:{path.name}" for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir()}
    assert copied == closure(FIRST, ARM) | {digest_of(MULTI)}


@every_registry
@pytest.mark.parametrize("tool", UPLOAD)
def test_an_index_that_a_tool_pushed_is_pulled_with_its_digests(
    cache: Cache, tools: Tools, host: str, tmp_path: Path, tool: str
) -> None:
    make.write(tmp_path / "layout", make.oci_files({"amd64": FIRST, "arm64": ARM}, {"1": MULTI}))
    run(tools, UPLOAD[tool], name=(name := f"{host}/team/multi:1"), host=host, layout="layout")
    cache.pull(name, all_platforms=True)
    assert_is_stored(cache, name, read_digest(tools, tool, name, host))
    assert list_digests(cache, name) == closure(FIRST, ARM) | {digest_of(MULTI)}


@every_registry
@pytest.mark.parametrize("tool", ATTACH)
def test_referrers_that_a_tool_attached_are_pulled_and_pushed(
    cache: Cache, tools: Tools, host: str, tmp_path: Path, tool: str
) -> None:
    put_image(host, "app", FIRST, "1")
    for content in ("an SBOM", "another SBOM"):
        (tmp_path / "sbom").write_text(content)
        run(tools, ATTACH[tool], name=f"{host}/app:1", host=host, file="sbom")
    attached = list_referrers(tools, tool, f"{host}/app:1", host)
    cache.pull(f"{host}/app:1", referrers=True)
    assert len(attached) == 2
    assert attached < list_digests(cache, f"{host}/app:1")
    assert cache.get_blob(digest_of(b"another SBOM")) == b"another SBOM"
    cache.push(f"{host}/app:1", f"{host}/copy:1")
    for reader in ATTACH:
        assert list_referrers(tools, reader, f"{host}/copy:1", host) == attached


def test_a_partial_download_begins_again_at_a_registry_that_refuses_ranges(cache: Cache, tmp_path: Path) -> None:
    large = make.image(1, size=3_000_000)
    with crane_registry(tmp_path) as host:
        put_image(host, "app", large, "1")
        write_partial(cache, large.layers[0], large.layers[0][:1_000_000])
        cache.pull(f"{host}/app:1")
        assert_is_stored(cache, f"{host}/app:1", large.digest)
        assert " 416 " in (tmp_path / CRANE_LOG).read_text()
