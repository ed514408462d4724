"""Several users share one cache: each can use, clean up and replace the files of the others."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.disk import downloads
from cachedb.disk.layout import trash_name
from cachedb.oci.digests import Digest
from tests.conftest import Run, find_peer, run_python, running
from tests.index.sqlite.test_database import content
from tests.support.index_file import change_index
from tests.support.make import digest_of, image, oci_files, save

APP = image(1, 2)
GROUP = 64999
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root to become other users")

BECOME = f"""
import os, sys, tempfile
from pathlib import Path
from cachedb import Cache, CacheError
from tests.support.make import image, save
with tempfile.TemporaryDirectory() as folder:
    with Cache.open(Path(folder) / "c") as cache:
        save(cache, "a:1", image(1))
        Path(folder, "c", "index.db").write_bytes(b"damaged")
    with Cache.open(Path(folder) / "c", damaged=True) as cache:
        cache.verify(repair=True)
def become(user):
    os.setgroups([{GROUP}] if user < 65000 else [])
    os.setgid(user)
    os.setuid(user)
    os.environ["HOME"] = "/"
os.umask(0o077)
"""
"""The beginning of a script that becomes another user. It imports everything while root can read the interpreter."""


@pytest.fixture
def shared() -> Iterator[Path]:
    """Make a cache that user 1001 shares with a group; users 1002 and 1003 are members, 65534 is none."""
    # Only their owner can read pytest's own folders.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "cache"
        run_python(
            BECOME + "become(1001)\nwith Cache.open(sys.argv[1]) as cache:\n"
            f"    save(cache, 'app:1', image(1, 2))\n    cache.share('{GROUP}')",
            path,
        )
        yield path


def read_modes(directory: Path) -> dict[str, tuple[int, int]]:
    """Return the group and the mode of each file and folder except the blobs."""
    paths = [directory, *(path for path in directory.rglob("*") if path.parent.parent.name != "blobs")]
    return {
        str(path.relative_to(directory)): (path.lstat().st_gid, stat.S_IMODE(path.lstat().st_mode)) for path in paths
    }


def assert_open_to_group(directory: Path) -> None:
    wrong = {
        name: (gid, oct(mode))
        for name, (gid, mode) in read_modes(directory).items()
        if gid != GROUP or mode != (0o2770 if (directory / name).is_dir() else 0o660)
    }
    assert wrong == {}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory / "blobs").glob("*/*")} == {0o444}


@pytest.mark.slow
@NEEDS_ROOT
def test_all_members_of_a_group_can_use_a_shared_cache_with_any_umask(shared: Path) -> None:
    assert_open_to_group(shared)
    for user in (1002, 1003):
        run_python(
            BECOME
            + f"""
become({user})
with Cache.open(sys.argv[1]) as cache:
    save(cache, "app:{user}", image({user}))
    with cache.hold("app:1"):
        cache.tag("app:1", "again:{user}")
    assert cache.verify(repair=True).problems == []
    cache.remove_manifest("again:{user}")
    cache.collect_garbage()
""",
            shared,
        )
        assert_open_to_group(shared)
    with Cache.open(shared) as cache:  # root needs no --trust for a shared cache
        save(cache, "app:root", image(9))
        with cache.hold("app:root"):
            assert {path.lstat().st_uid for path in shared.rglob("*")} >= {1001}
            assert 0 not in {path.lstat().st_uid for path in shared.rglob("*")}
    assert_open_to_group(shared)


@pytest.mark.slow
@NEEDS_ROOT
def test_users_outside_the_group_are_refused(shared: Path) -> None:
    before = content(shared)
    run_python(
        BECOME
        + """
become(65534)
try:
    Cache.open(sys.argv[1])
except CacheError as error:
    print(error)
else:
    sys.exit("it was opened")
""",
        shared,
    )
    assert content(shared) == before


@pytest.mark.slow
@NEEDS_ROOT
def test_another_user_cleans_up_after_a_killed_process(shared: Path) -> None:
    script = (
        BECOME
        + """
become(1001)
cache = Cache.open(sys.argv[1])
cache.add_blob(b"left behind")
with cache.hold("app:1"), cache.producing("never:1"):
    (cache._session.folder / "7").write_bytes(b"half")
    print(flush=True)
    sys.stdin.read()
"""
    )
    with running(script, shared) as process:
        process.kill()
        process.wait()
    assert len(list((shared / "ingest").iterdir())) == 2
    run_python(
        BECOME
        + """
become(1002)
with Cache.open(sys.argv[1]) as cache:
    assert cache.get_leftovers() == []
    assert cache.collect_garbage().blobs == 1
    assert cache.verify().problems == []
""",
        shared,
    )
    assert [path.name for path in (shared / "ingest").iterdir()] == ["partial"]
    assert sorted(path.name for path in (shared / "locks").iterdir() if "write" not in path.name) == []


@pytest.mark.slow
@NEEDS_ROOT
def test_a_cache_that_is_shared_while_it_is_open_is_shared_by_that_process_too() -> None:
    script = (
        BECOME
        + """
become(1001)
with Cache.open(sys.argv[1]) as cache:
    save(cache, "app:1", image(1))
with Cache.open(sys.argv[1]) as cache:
    print(flush=True)
    sys.stdin.readline()
    with cache.hold("app:1"):
        print(cache._session.id, flush=True)
        sys.stdin.read()
"""
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "cache"
        with running(script, path) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            run_python(BECOME + f"become(1001)\nCache.open(sys.argv[1]).share('{GROUP}')", path)
            process.stdin.write("\n")
            process.stdin.flush()
            session = path / "ingest" / process.stdout.readline().strip()
            assert (stat.S_IMODE(session.stat().st_mode), session.stat().st_gid) == (0o2770, GROUP)
            process.kill()
            process.wait()
        run_python(BECOME + "become(1002)\nassert Cache.open(sys.argv[1]).get_leftovers() == []", path)
        assert not session.exists()


@pytest.mark.slow
@NEEDS_ROOT
def test_a_cache_with_a_file_of_a_member_is_given_to_another_group_as_a_whole_or_not_at_all(shared: Path) -> None:
    change_index(shared, "DROP VIEW image_usage")  # the index that a member rebuilds belongs to that member
    repair = "with Cache.open(sys.argv[1], damaged=True) as cache:\n    cache.verify(repair=True)"
    run_python(BECOME + "become(1002)\n" + repair, shared)
    before = read_modes(shared)
    share = f"with Cache.open(sys.argv[1]) as cache: cache.share('{GROUP + 1}')"
    script = f"os.setgroups([{GROUP}, {GROUP + 1}])\nos.setgid(1001)\nos.setuid(1001)\ntry:\n    {share}\n"
    found = run_python(BECOME + script + "except CacheError as error:\n    print(error)", shared)
    assert "index.db' belongs to user 1002, so nothing was shared: run the command as root" in found
    assert read_modes(shared) == before
    run_python(BECOME + "become(1002)\nCache.open(sys.argv[1]).tag('app:1', 'app:2')", shared)
    run_python(BECOME + share, shared)
    member = f"os.setgroups([{GROUP + 1}])\nos.setgid(1003)\nos.setuid(1003)\n"
    run_python(BECOME + member + "Cache.open(sys.argv[1]).tag('app:1', 'app:3')", shared)


@pytest.mark.slow
@NEEDS_ROOT
def test_a_rebuilt_index_belongs_to_the_group(shared: Path) -> None:
    (shared / "index.db").write_bytes(b"damaged")
    run_python(
        BECOME
        + """
become(1002)
with Cache.open(sys.argv[1], damaged=True) as cache:
    cache.verify(repair=True)
""",
        shared,
    )
    assert read_modes(shared)["index.db"] == (GROUP, 0o660)
    run_python(
        BECOME + "become(1003)\nwith Cache.open(sys.argv[1]) as cache:\n    save(cache, 'app:3', image(3))", shared
    )


@pytest.mark.slow
@NEEDS_ROOT
def test_the_replaced_index_in_quarantine_belongs_to_the_group(shared: Path) -> None:
    run_python(
        BECOME
        + """
from cachedb.operations import restore, upgrade
become(1002)
restore.restore(Path(sys.argv[1]), upgrade.back_up(Path(sys.argv[1])))
""",
        shared,
    )
    assert read_modes(shared)["quarantine/index.db"] == (GROUP, 0o660)


@pytest.mark.slow
@NEEDS_ROOT
def test_a_damaged_blob_of_another_user_is_moved_to_quarantine(shared: Path) -> None:
    path = shared / "blobs" / digest_of(APP.config).replace(":", "/")
    path.chmod(0o644)
    path.write_bytes(b"x" * len(APP.config))
    path.chmod(0o444)
    run_python(
        BECOME
        + """
become(1002)
with Cache.open(sys.argv[1]) as cache:
    (problem,) = cache.verify(repair=True).problems
    assert "moved to quarantine" in problem.repair, problem
""",
        shared,
    )
    assert not path.exists()


@pytest.mark.slow
@NEEDS_ROOT
def test_files_that_root_makes_in_a_users_cache_belong_to_the_user() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "cache"
        run_python(
            BECOME + "become(1001)\nwith Cache.open(sys.argv[1]) as cache: save(cache, 'app:1', image(1, 2))", path
        )
        with Cache.open(path, trust=True) as cache, cache.hold("app:1"):
            cache.add_blob(b"of root")
            run_python(
                BECOME
                + """
become(1001)
with Cache.open(sys.argv[1]) as cache:
    assert cache.get_leftovers() == []
    cache.tag("app:1", "app:2")
    cache.collect_garbage()
""",
                path,
            )
        assert {path.lstat().st_uid for path in path.rglob("*")} == {1001}


def test_only_the_owner_can_access_a_cache_that_is_not_shared(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
        found = {mode for _, mode in read_modes(directory).values()}
    assert found == {0o700, 0o600}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(cachedb: Run, directory: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run_python(
            "import sys; from cachedb import Cache; from tests.support.make import image, save\n"
            "with Cache.open(sys.argv[1]) as cache: save(cache, 'app:1', image(1, 2))",
            directory,
        )
    finally:
        os.umask(before)
    assert {mode for _, mode in read_modes(directory).values()} == {0o700, 0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory / "blobs").glob("*/*")} == {0o444}


@pytest.mark.slow
def test_init_creates_and_shares_a_cache(cachedb: Run, directory: Path) -> None:
    done = cachedb("init")
    assert (done.returncode, done.stdout) == (0, f"{directory} is a cache\n")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    done = cachedb("init", "--shared")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{directory} is shared with group ")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o2770
    assert cachedb("import", "examples/hello.oci.tar").returncode == 0
    found = read_modes(directory)
    assert {mode for _, mode in found.values()} == {0o2770, 0o660}
    assert {gid for gid, _ in found.values()} == {os.getegid()}


def test_init_refuses_an_unknown_group(cachedb: Run, directory: Path) -> None:
    done = cachedb("init", "--shared=no-such-group")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "cachedb: there is no group 'no-such-group': name one that `getent group` lists\n"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_sharing_does_not_change_the_targets_of_links(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "precious").chmod(0o600)
    (cache.directory / "locks" / "link").symlink_to(tmp_path / "precious")
    os.link(tmp_path / "precious", cache.directory / "locks" / "hard")
    cache.share()
    assert stat.S_IMODE((tmp_path / "precious").stat().st_mode) == 0o600


@pytest.mark.parametrize("how", ["group", "acl"])
def test_a_file_that_the_group_can_write_to_is_copied_and_not_linked(cache: Cache, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "layout"
    for name, data in oci_files({"app:1": APP}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o644)
        if how == "group":
            path.chmod(0o664)
        else:
            subprocess.run([find_peer("setfacl", "apt-get install acl"), "-m", "u:65534:rw", path], check=True)
    cache.cache_from_tar(folder, "app:1", link=True)
    assert {path.stat().st_nlink for path in (cache.directory / "blobs").glob("*/*")} == {1}


@pytest.mark.parametrize(("mode", "links"), [(0o600, 1), (0o400, 1), (0o644, 1), (0o444, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_in_a_shared_cache_only_files_that_all_can_read_and_none_write_are_linked(
    cache: Cache, tmp_path: Path, mode: int, links: int, shared: bool
) -> None:
    folder = tmp_path / "layout"
    for name, data in oci_files({"app:1": APP}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        (folder / name).chmod(mode)
    if shared:
        cache.share()
    cache.cache_from_tar(folder, "app:1", link=True)
    found = [path.stat() for path in (cache.directory / "blobs").glob("*/*")]
    assert {status.st_nlink for status in found} == {links if shared else 2}
    assert {stat.S_IMODE(status.st_mode) for status in found} == {0o444 if shared else mode}


@NEEDS_ROOT
@pytest.mark.slow
def test_nothing_that_a_member_plants_blocks_the_others(shared: Path) -> None:
    """All names that a member can guess are taken by folders, links and pipes."""
    plant = """
from cachedb.disk import downloads
from cachedb.disk.layout import trash_name
from cachedb.disk.single_flight import _claim_path
become(1002)
root = Path(sys.argv[1])
digests = sorted(image(1, 2, 3).blobs)
for number, digest in enumerate(digests):
    blob = root / "blobs" / digest.replace(":", "/")
    if not blob.exists():
        (blob / "deep").mkdir(parents=True)
    (root / "trash" / trash_name(digest) / "deep").mkdir(parents=True)
    (root / "ingest" / "partial" / trash_name(digest) / "deep").mkdir(parents=True)
    claim = _claim_path(root, downloads.claim_key(digest))
    if number % 2:
        os.mkfifo(claim)
    else:
        claim.symlink_to("/etc/passwd")
os.mkfifo(_claim_path(root, "app:3"))
_claim_path(root, "app:4").touch(0o600)
for name in ("reserve.inodes", "policy.toml", f"backups/.backup-{'0' * 32}", f"backups/{'9' * 240}-0006.db"):
    (root / name / "deep").mkdir(parents=True, exist_ok=True)
for name in ("ingest/7-000000000000", "locks/8-000000000000.session"):
    (root / name).symlink_to("/etc")
(root / "locks" / "9-000000000000.session").mkdir()
"""
    run_python(BECOME + plant, shared)
    run_python(
        BECOME
        + """
from cachedb.disk import downloads
from cachedb.disk.single_flight import try_claim
from cachedb.operations import policy, upgrade  # the user cannot read the modules of root's Python
become(1003)
with Cache.open(sys.argv[1]) as cache:
    with cache.producing("app:3") as found:
        assert found is None
        save(cache, "app:3", image(1, 2, 3))
    with cache.producing("app:4") as found:
        assert found is None
    cache.remove_manifest("app:3")
    cache.collect_garbage()
    for digest in image(1, 2, 3).blobs:
        with try_claim(cache.directory, downloads.claim_key(digest)) as has_claim:
            assert has_claim
        folder = os.open(cache.directory / "ingest" / "partial", os.O_RDONLY)
        assert downloads.find_resumable_bytes(folder, digest.replace(":", "-"), 10) == 0
        os.close(folder)
    upgrade.back_up(cache.directory)
    assert {problem.kind for problem in cache.verify(repair=True).problems} == {"orphan"}
    assert cache.is_image_complete("app:1")
    cache.collect_garbage()
""",
        shared,
    )


@NEEDS_ROOT
def test_a_download_of_another_user_begins_again(tmp_path: Path) -> None:
    """That user could still write to the file when it is a blob."""
    path = tmp_path / "download"
    path.write_bytes(b"half")
    folder = os.open(tmp_path, os.O_RDONLY)
    assert downloads.find_resumable_bytes(folder, path.name, 10) == 4
    os.chown(path, 65534, 65534)
    assert downloads.find_resumable_bytes(folder, path.name, 10) == 0
    os.close(folder)
    assert not path.exists()


@NEEDS_ROOT
@pytest.mark.slow
def test_files_that_only_their_owner_can_remove_block_no_member(shared: Path) -> None:
    """In sticky folders, members cannot remove each other's files."""
    partial = shared / "ingest" / "partial" / trash_name(Digest(digest_of(b"half")))
    partial.touch()
    os.chown(partial, 1001, GROUP)
    for folder in (shared, *(path for path in shared.rglob("*") if path.is_dir())):
        folder.chmod(0o3770)
    run_python(
        BECOME
        + """
from cachedb import StorageError
from cachedb.disk import downloads
become(1002)
with Cache.open(sys.argv[1]) as cache:
    cache.tag("app:1", "app:2")
    cache.remove_manifest("app:1", "app:2")
    try:
        cache.collect_garbage()
    except StorageError as error:
        assert "collected all garbage" in str(error), error
    else:
        sys.exit("it removed another user's file")
    assert not downloads.remove_stale_downloads(cache._database.folders, age=0)
    save(cache, "app:3", image(3))
with Cache.open(sys.argv[1]) as cache:
    assert len(cache.get_leftovers()) == len(image(1, 2).blobs)
    assert [str(name) for name in cache.list_names()] == ["app:3"]
""",
        shared,
    )
    run_python(
        BECOME
        + """
become(1001)
with Cache.open(sys.argv[1]) as cache:
    assert cache.verify().problems == []
""",
        shared,
    )
