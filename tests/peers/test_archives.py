"""Archives and other tools: cachedb imports what they write, they read what it exports, and the digests agree."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from cachedb.oci.manifests import OCI_INDEX, OCI_MANIFEST
from cachedb.oci.platforms import host_platform
from cachedb.transports.archive.formats import Format
from tests.conftest import Run, files_of
from tests.support import make
from tests.support.make import digest_of

ARCHIVES = ("docker", "docker-archive", "oci-archive")
TRANSPORTS = [
    ("docker", "oci-archive"),
    ("docker", "docker-archive"),
    ("docker-archive", "docker-archive"),
    ("oci-archive", "oci-archive"),
    ("oci-dir", "oci"),
]
"""An export format, and skopeo's name of the transport that reads it."""

OCI_SOURCES = {"gzip.oci.tar": "gzip", "zstd.oci.tar": "zstd", "plain.oci.tar": "", "layout": "gzip"}
"""The OCI archives and layouts that peers make, and the compression of their layers."""

ORDINARY_USER = 65534

IMAGE = make.image(1, 2, compression="gzip")


class Tools:
    """Runner of peers with a storage of their own, separate from that of the user.

    Args:
        home: the folder that is HOME for the peers.
        find: returns the path of a peer.
        user: the id of the user who runs the peers; the default is the user of the tests.
    """

    def __init__(self, home: Path, find: Callable[[str], str], user: int | None = None) -> None:
        self.home, self._find = home, find
        self._identity: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        settings = home / ".config" / "containers"
        if not settings.exists():
            settings.mkdir(parents=True)
            (home / ".runtime").mkdir(mode=0o700)
            (settings / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
            # Without root, buildah and podman ignore `graphroot`, and skopeo does not.
            (home / "storage.conf").write_text(
                f'[storage]\ndriver = "vfs"\ngraphroot = "{home}/graph"\nrunroot = "{home}/run"\n'
                f'rootless_storage_path = "{home}/graph"\n'
            )

    def __call__(self, *command: object, stdin: bytes | None = None) -> str:
        """Run a peer and return its output; fail the test if the peer fails."""
        program, *arguments = map(str, command)
        environment = {
            "XDG_RUNTIME_DIR": str(self.home / ".runtime"),  # else they look for credentials in root's /run/containers
            **os.environ,
            "HOME": str(self.home),
            "STORAGE_DRIVER": "vfs",
            "CONTAINERS_STORAGE_CONF": str(self.home / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }
        line = [self._find(program), *arguments]
        options: dict[str, Any] = {"input": stdin, "env": environment, "timeout": 300, **self._identity}
        done: subprocess.CompletedProcess[bytes] = subprocess.run(line, capture_output=True, check=False, **options)
        assert done.returncode == 0, f"{line}: {done.stderr.decode()}"
        return done.stdout.decode().strip()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that every user may enter; only the user of the tests may enter pytest's own folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def ordinary_tools(open_folder: Path, peer: Callable[[str], str]) -> Tools:
    """Return a runner of peers as a user without privileges."""
    return Tools(open_folder / "home", peer, ORDINARY_USER if os.geteuid() == 0 else None)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture
def made(shelf: Path, peer: Callable[[str], str]) -> Path:
    """Return a folder with archives of small images, which the peers make once for all tests."""
    if not (shelf / "images").exists():
        work = Path(tempfile.mkdtemp(dir=shelf))
        (work / "images").mkdir()
        _make_images(Tools(work / "home", peer), work / "images")
        (work / "images").rename(shelf / "images")
    return shelf / "images"


def _make_images(tools: Tools, target: Path) -> None:
    def commit(name: str, base: str, file: str, *options: str) -> str:
        (target / file).write_text(f"the content of {file}\n" * 100)
        container = tools("buildah", "from", *options, base)
        tools("buildah", "config", "--cmd", f"/{file}", container)
        tools("buildah", "add", "--quiet", container, target / file, f"/{file}")
        tools("buildah", "commit", "--quiet", container, name)
        tools("buildah", "rm", container)
        return f"containers-storage:localhost/{name}"

    commit("base:1", "scratch", "base")
    one = commit("app:1", "localhost/base:1", "one")
    two = commit("app:2", "localhost/base:1", "two")
    platforms = [commit(f"multi:{arch}", "scratch", arch, "--arch", arch) for arch in ("amd64", "arm64")]

    tools("skopeo", "copy", one, f"docker-archive:{target}/docker.tar:app:1")
    tools("skopeo", "copy", two, f"docker-archive:{target}/docker-2.tar:app:2")
    tools(
        "podman",
        "save",
        "--multi-image-archive",
        "-o",
        target / "both.docker.tar",
        "localhost/app:1",
        "localhost/app:2",
    )
    tools("skopeo", "copy", one, f"oci-archive:{target}/gzip.oci.tar:app:1")
    tools("skopeo", "copy", "--dest-compress-format", "zstd", one, f"oci-archive:{target}/zstd.oci.tar:app:1")
    plain = "--dest-oci-accept-uncompressed-layers"
    tools("skopeo", "copy", plain, one, f"oci-archive:{target}/plain.oci.tar:app:1")
    tools("skopeo", "copy", one, f"oci:{target}/layout:app:1")
    tools("buildah", "manifest", "create", "multi:1")
    for platform in platforms:
        tools("buildah", "manifest", "add", "multi:1", platform)
    tools("buildah", "manifest", "push", "--all", "multi:1", f"oci-archive:{target}/multi.oci.tar:multi:1")


def skopeo_name(path: Path) -> str:
    """Return skopeo's name of an archive or layout that the peers made."""
    if path.is_dir():
        return f"oci:{path}"
    return f"{'oci' if path.name.endswith('.oci.tar') else 'docker'}-archive:{path}"


def inspect_digest(tools: Tools, place: str) -> str:
    """Return the digest of the manifest that skopeo reports."""
    return str(json.loads(tools("skopeo", "inspect", place))["Digest"])


def list_parts(manifest: str | bytes) -> tuple[str, list[str]]:
    """Return the digests of the config and the layers of a manifest."""
    document: dict[str, Any] = json.loads(manifest)
    return document["config"]["digest"], [layer["digest"] for layer in document["layers"]]


def list_plain_parts(tools: Tools, place: str, target: Path) -> tuple[str, list[str]]:
    """Let skopeo copy an image to a folder and decompress it; return the digests of its config and layers."""
    tools("skopeo", "copy", "--dest-decompress", place, f"dir:{target}")
    return list_parts((target / "manifest.json").read_bytes())


def export(cache: Cache, tmp_path: Path, form: Format, name: str = "app:1", **options: Any) -> Path:
    target = tmp_path / f"exported.{form}"
    cache.export(name, target, format=form, **options)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("source", [*OCI_SOURCES, "multi.oci.tar"])
def test_an_import_has_the_digest_and_the_bytes_that_skopeo_reports(
    cache: Cache, tools: Tools, made: Path, source: str
) -> None:
    (image,) = cache.cache_from_tar(made / source)
    assert (
        image.digest == inspect_digest(tools, skopeo_name(made / source)) == digest_of(cache.get_manifest(image.name))
    )
    assert cache.get_manifest(image.name).decode() == tools("skopeo", "inspect", "--raw", skopeo_name(made / source))
    assert image.complete


@pytest.mark.parametrize("source", OCI_SOURCES)
def test_layers_are_not_recompressed(cache: Cache, made: Path, source: str) -> None:
    cache.cache_from_tar(made / source)
    layers = [blob for blob in cache.get_image_blobs("app:1") if blob.role == "layer"]
    magic = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "": b"base\0"}[OCI_SOURCES[source]]
    assert len(layers) == 2
    assert all(blob.media_type.rpartition("tar")[2].removeprefix("+") == OCI_SOURCES[source] for blob in layers)
    assert cache.get_blob(layers[0].digest).startswith(magic)


def test_a_docker_archive_has_the_config_and_the_layers_that_skopeo_reports(
    cache: Cache, tools: Tools, made: Path
) -> None:
    (image,) = cache.cache_from_tar(made / "docker.tar")
    reported = tools("skopeo", "inspect", "--raw", f"docker-archive:{made}/docker.tar")
    assert list_parts(cache.get_manifest(image.name)) == list_parts(reported)


@pytest.mark.parametrize(("form", "transport"), TRANSPORTS)
@pytest.mark.parametrize("source", ["docker.tar", *OCI_SOURCES])
def test_skopeo_reads_the_same_config_and_layers_from_an_export(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, source: str, form: Format, transport: str
) -> None:
    (image,) = cache.cache_from_tar(made / source, "app:1")
    place = f"{transport}:{export(cache, tmp_path, form)}:app:1"
    if transport != "docker-archive":
        assert inspect_digest(tools, place) == image.digest
        assert tools("skopeo", "inspect", "--raw", place).encode() == cache.get_manifest("app:1")
    expected = list_plain_parts(tools, skopeo_name(made / source), tmp_path / "before")
    assert list_plain_parts(tools, place, tmp_path / "after") == expected


@pytest.mark.parametrize(("form", "transport"), TRANSPORTS)
def test_skopeo_reads_an_export_as_an_ordinary_user(
    cache: Cache, ordinary_tools: Tools, open_folder: Path, form: Format, transport: str
) -> None:
    make.save(cache, "app:1", IMAGE)
    exported = export(cache, open_folder, form)
    subprocess.run(["chmod", "-R", "go+rX", exported], check=True)  # whatever the umask
    place = f"{transport}:{exported}:app:1"
    assert list_parts(ordinary_tools("skopeo", "inspect", "--raw", place))[0] == make.digest_of(IMAGE.config)
    if transport != "docker-archive":
        assert inspect_digest(ordinary_tools, place) == IMAGE.digest


@pytest.mark.parametrize("form", ARCHIVES)
@pytest.mark.parametrize("source", ["docker.tar", "gzip.oci.tar", "zstd.oci.tar"])
def test_podman_loads_an_export_under_its_name(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, source: str, form: Format
) -> None:
    cache.cache_from_tar(made / source, "registry.example/team/app:1")
    loaded = tools("podman", "load", "--quiet", "--input", export(cache, tmp_path, form, "registry.example/team/app:1"))
    assert loaded == "Loaded image: registry.example/team/app:1"
    (config,) = (blob.digest for blob in cache.get_image_blobs("registry.example/team/app:1") if blob.is_config)
    names = tools("podman", "images", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}")
    assert names == f"{config} registry.example/team/app:1"


@pytest.mark.parametrize("form", ARCHIVES)
def test_podman_finds_a_short_name_that_it_loaded(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, form: Format
) -> None:
    cache.cache_from_tar(made / "gzip.oci.tar")
    tools("podman", "load", "--quiet", "--input", export(cache, tmp_path, form))
    tools("podman", "image", "exists", "app:1")


@pytest.mark.slow
def test_podman_loads_an_export_from_a_pipe(cachedb: Run, tools: Tools, made: Path) -> None:
    assert cachedb("import", "-", text=False, input=(made / "gzip.oci.tar").read_bytes()).returncode == 0
    piped: Any = cachedb("export", "app:1", "-", text=False)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert tools("podman", "load", "--quiet", stdin=piped.stdout).endswith("/app:1")


@pytest.mark.parametrize("form", ["docker", "oci-archive", "docker-archive", "oci-dir"])
def test_buildah_builds_from_an_export(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format
) -> None:
    cache.cache_from_tar(made / "gzip.oci.tar")
    transport = {"docker": "oci-archive", "oci-dir": "oci"}.get(form, form)
    monkeypatch.chdir(tmp_path)  # buildah turns the path of a layout into a name, which must not contain spaces
    container = tools("buildah", "from", f"{transport}:{export(cache, tmp_path, form).name}:app:1")
    root = copy_rootfs(tools, container, tmp_path / "rootfs")
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == ["base", "one"]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("source", ["docker.tar", "gzip.oci.tar"])
def test_umoci_unpacks_an_exported_layout(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, source: str, link: bool
) -> None:
    cache.cache_from_tar(made / source, "app:1")
    layout = export(cache, tmp_path, "oci-dir", link=link)
    tools("umoci", "unpack", *rootless_options(), "--image", f"{layout}:app:1", tmp_path / "bundle")
    for name in ("base", "one"):
        assert (tmp_path / "bundle" / "rootfs" / name).read_bytes() == (made / name).read_bytes()


def copy_rootfs(tools: Tools, container: str, target: Path) -> Path:
    """Copy the files of a buildah container; without root, buildah mounts it only in its own namespace."""
    unshare = ["buildah", "unshare"] if os.geteuid() else []
    tools(*unshare, "sh", "-c", 'cp -r "$(buildah mount "$1")" "$2"', "sh", container, target)
    return target


def rootless_options() -> list[str]:
    return ["--rootless"] if os.geteuid() else []


def test_umoci_unpacks_an_export_of_its_own_layout(cache: Cache, tools: Tools, made: Path, tmp_path: Path) -> None:
    layout = tmp_path / "umoci"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "greeting").write_text("hello\n")
    tools("umoci", "init", "--layout", layout)
    tools("umoci", "new", "--image", f"{layout}:latest")
    tools("umoci", "insert", *rootless_options(), "--image", f"{layout}:latest", tmp_path / "tree", "/srv")
    (image,) = cache.cache_from_tar(layout, "greeter")
    assert image.digest == inspect_digest(tools, f"oci:{layout}:latest")
    ours = export(cache, tmp_path, "oci-dir", "greeter")
    tools("umoci", "unpack", *rootless_options(), "--image", f"{ours}:greeter:latest", tmp_path / "bundle")
    assert (tmp_path / "bundle" / "rootfs" / "srv" / "greeting").read_text() == "hello\n"


@pytest.mark.parametrize("form", ARCHIVES)
def test_an_export_that_skopeo_converted_imports_with_its_digests(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, form: Format
) -> None:
    cache.cache_from_tar(made / "docker.tar", "app:1")
    transport = "oci-archive" if form == "oci-archive" else "docker-archive"
    layout = tmp_path / "converted"
    tools("skopeo", "copy", f"{transport}:{export(cache, tmp_path, form)}", f"oci:{layout}:other:2")
    (image,) = cache.cache_from_tar(layout)
    assert str(image.name) == "other:2"
    assert image.digest == inspect_digest(tools, f"oci:{layout}:other:2")
    assert list_parts(cache.get_manifest("other:2"))[0] == list_parts(cache.get_manifest("app:1"))[0]


def test_podman_loads_exports_of_both_images_of_its_archive(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path
) -> None:
    images = cache.cache_from_tar(made / "both.docker.tar")
    assert sorted(str(image.name) for image in images) == ["localhost/app:1", "localhost/app:2"]
    for position, image in enumerate(images):
        reported = tools("skopeo", "inspect", "--raw", f"docker-archive:{made}/both.docker.tar:@{position}")
        assert list_parts(cache.get_manifest(image.name)) == list_parts(reported)
        archive = export(cache, tmp_path, "docker", str(image.name))
        assert tools("podman", "load", "--quiet", "--input", archive) == f"Loaded image: {image.name}"


@pytest.mark.parametrize(("form", "transport"), [(form, kind) for form, kind in TRANSPORTS if kind != "docker-archive"])
def test_skopeo_copies_all_platforms_of_an_exported_index(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, form: Format, transport: str
) -> None:
    (image,) = cache.cache_from_tar(made / "multi.oci.tar")
    place = f"{transport}:{export(cache, tmp_path, form, 'multi:1')}:multi:1"
    assert digest_of(tools("skopeo", "inspect", "--raw", place).encode()) == image.digest
    tools("skopeo", "copy", "--all", place, f"dir:{tmp_path}/all")
    assert (tmp_path / "all" / "manifest.json").read_bytes() == cache.get_manifest("multi:1")
    copied = {path.name for path in (tmp_path / "all").iterdir()}
    blobs = [blob for blob in cache.get_image_blobs("multi:1") if blob.role in ("config", "layer")]
    assert len(blobs) == 4
    assert {blob.digest.partition(":")[2] for blob in blobs} <= copied


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
@pytest.mark.parametrize(("form", "transport"), TRANSPORTS)
def test_one_platform_of_an_index_is_the_image_that_skopeo_chooses(
    cache: Cache, tools: Tools, made: Path, tmp_path: Path, form: Format, transport: str, arch: str
) -> None:
    cache.cache_from_tar(made / "multi.oci.tar")
    place = f"{transport}:{export(cache, tmp_path, form, 'multi:1', platform=f'linux/{arch}')}:multi:1"
    config = tools("skopeo", "inspect", "--config", place)
    assert config == tools(
        "skopeo", "--override-arch", arch, "inspect", "--config", skopeo_name(made / "multi.oci.tar")
    )
    assert json.loads(config)["architecture"] == arch


@pytest.mark.parametrize("form", ["docker", "oci-archive"])
def test_podman_loads_an_exported_index(cache: Cache, tools: Tools, made: Path, tmp_path: Path, form: Format) -> None:
    cache.cache_from_tar(made / "multi.oci.tar")
    assert tools("podman", "load", "--quiet", "--input", export(cache, tmp_path, form, "multi:1")).endswith("/multi:1")


def test_a_reader_of_docker_archives_gets_the_hosts_platform_of_an_exported_index(
    cache: Cache, tools: Tools, tmp_path: Path
) -> None:
    make.save_index(cache, "app:1", make.image(1, architecture="amd64"), make.image(2, architecture="arm64"))
    place = f"docker-archive:{export(cache, tmp_path, 'docker')}:app:1"
    architecture = host_platform().split("/")[1]
    assert json.loads(tools("skopeo", "inspect", "--config", place))["architecture"] == architecture


@pytest.mark.parametrize(("form", "transport"), [(form, kind) for form, kind in TRANSPORTS if kind != "docker-archive"])
@pytest.mark.usefixtures("in_folder")
def test_peers_read_the_image_of_an_export_with_referrers(
    cache: Cache, tools: Tools, tmp_path: Path, form: Format, transport: str
) -> None:
    signature = make.artifact("application/vnd.example.signature", subject=IMAGE.manifest)
    make.save(cache, "app:1", IMAGE)
    make.attach(cache, "app:1", signature)
    exported = export(cache, tmp_path, form, referrers=True)
    assert inspect_digest(tools, f"{transport}:{exported}:app:1") == IMAGE.digest
    if form == "docker":
        assert tools("podman", "load", "--quiet", "--input", exported).endswith("/app:1")
    else:  # `podman load` cannot be told which image of several to load
        assert tools("podman", "pull", "--quiet", f"{transport}:{exported.name}:app:1")
    if form == "oci-dir":
        assert tools("umoci", "ls", "--layout", exported) == "app:1"


@pytest.mark.parametrize("several", [False, True], ids=["manifest", "list"])
@pytest.mark.parametrize(("form", "transport"), [(form, kind) for form, kind in TRANSPORTS if kind != "docker-archive"])
def test_skopeo_finds_a_converted_image_by_name(
    cache: Cache, ordinary_tools: Tools, open_folder: Path, form: Format, transport: str, several: bool
) -> None:
    image = make.with_docker_types(IMAGE)
    make.save(cache, "app:1", image)
    if several:
        cache.save_manifest("app:1", make.docker_list(make.index(image)))
    exported = export(cache, open_folder, form, convert="oci")
    subprocess.run(["chmod", "-R", "go+rX", exported], check=True)  # whatever the umask
    place = f"{transport}:{exported}:app:1"
    assert json.loads(ordinary_tools("skopeo", "inspect", "--raw", place))["mediaType"] in (OCI_MANIFEST, OCI_INDEX)
    config = ordinary_tools("skopeo", "--override-arch", "amd64", "inspect", "--config", place)
    assert json.loads(config)["rootfs"] == json.loads(IMAGE.config)["rootfs"]


def test_skopeo_reads_and_writes_the_same_dir(cache: Cache, tools: Tools, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    ours = export(cache, tmp_path, "dir")
    assert inspect_digest(tools, f"dir:{ours}") == IMAGE.digest
    tools("skopeo", "copy", f"dir:{ours}", f"dir:{tmp_path}/theirs")
    assert read_files(tmp_path / "theirs") == read_files(ours)
    make.save(cache, "app:1", make.image(3))
    cache.export("app:1", tmp_path / "theirs", format="dir")
    assert inspect_digest(tools, f"dir:{tmp_path}/theirs") == make.image(3).digest


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["oci-archive", "oci-dir"])
def test_skopeo_finds_an_image_by_its_tag_in_a_layout(cache: Cache, tools: Tools, tmp_path: Path, form: Format) -> None:
    make.save(cache, "app:1", IMAGE)
    exported = export(cache, tmp_path, form, tag="stable")
    transport = "oci" if form == "oci-dir" else form
    assert inspect_digest(tools, f"{transport}:{exported}:stable") == IMAGE.digest
    if form == "oci-dir":
        assert tools("umoci", "ls", "--layout", exported) == "stable"


def test_skopeo_reads_an_export_under_a_name_by_digest(cache: Cache, tools: Tools, made: Path, tmp_path: Path) -> None:
    (image,) = cache.cache_from_tar(made / "gzip.oci.tar")
    name = f"app@{image.digest}"
    cache.tag("app:1", name)
    for form in ARCHIVES:
        archive = export(cache, tmp_path, form, name)  # type: ignore[arg-type]
        assert tools("podman", "load", "--quiet", "--input", archive)
        if form != "docker-archive":
            assert inspect_digest(tools, f"oci-archive:{archive}:{name}") == image.digest


@pytest.mark.slow
def test_a_shared_base_is_stored_once_and_deleted_with_its_last_image(
    cachedb: Run, directory: Path, tools: Tools, made: Path
) -> None:
    expected: list[dict[str, int]] = []
    for archive, name in (("docker.tar", "app:1"), ("docker-2.tar", "app:2")):
        assert cachedb("import", made / archive, name).returncode == 0
        reported = json.loads(tools("skopeo", "inspect", "--raw", f"docker-archive:{made / archive}"))
        expected.append({blob["digest"]: blob["size"] for blob in (reported["config"], *reported["layers"])})
    base = expected[0].keys() & expected[1].keys()
    assert len(base) == 1
    manifests = {image["digest"] for image in json.loads(cachedb("ls", "--format", "json").stdout)}
    both = files_of(directory)
    assert both.keys() == expected[0].keys() | expected[1].keys() | manifests
    assert all(both[digest] == size for blobs in expected for digest, size in blobs.items())

    first = json.loads(cachedb("rm", "--format", "json", "app:1").stdout)
    left = files_of(directory)
    assert base <= left.keys()
    assert left.keys() - manifests == expected[1].keys()
    assert (first["blobs"], first["size"]) == (3, sum(both.values()) - sum(left.values()))

    second = json.loads(cachedb("rm", "--format", "json", "app:2").stdout)
    assert files_of(directory) == {}
    assert (second["blobs"], second["size"]) == (4, sum(left.values()))
