"""Call random methods of `Cache` and of a model made of a few dicts: the two never differ.

The model knows what needs a blob: the images whose closure contains it, and the leases of each session. All answers of
the cache follow from that.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cachedb import Cache, CacheError, DigestMismatch, IncompleteImage, InvalidManifest, NotInCache
from tests.conftest import files_of
from tests.support import make
from tests.support.promises import check

pytestmark = pytest.mark.attack

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "60"))
STEPS = 25

IMAGES = [
    make.image(1), make.image(1, 2), make.image(2, 1), make.image(2, 3), make.image(1, 2, 3), make.image(4),
    make.image(4, 4), make.image(3, compression="gzip"), make.image(3, 5, compression="gzip"),
    make.image(1, 5, architecture="arm64"), make.image(1, 2, architecture="arm64"), make.image(6, architecture="s390x"),
]  # fmt: skip
"""Images that share layers with one another, but no configs."""
CHILDREN = [[IMAGES[0], IMAGES[9]], [IMAGES[1], IMAGES[10], IMAGES[11]]]
INDEXES = [make.index(*children) for children in CHILDREN]
LOOSE = [b"", b"attached", make.random_bytes(2000, 9)]
PARTS = {digest: data for image in IMAGES for digest, data in image.blobs.items()}
BLOBS = [*PARTS.values(), *INDEXES, *LOOSE]
MANIFESTS = [image.manifest for image in IMAGES] + INDEXES
NAMES = ["a:1", "a:2", "b:1", "c:1"]

slots = st.integers(0, 1)
names = st.sampled_from(NAMES)
# Indexes into the lists, because a failure prints them.
images = st.integers(0, len(IMAGES) - 1)
indexes = st.integers(0, len(INDEXES) - 1)
contents = st.integers(0, len(BLOBS) - 1)
digests = st.sampled_from([make.digest_of(data) for data in BLOBS])


def named_by(document: bytes) -> list[tuple[str, int]]:
    """Return the digests and sizes in a manifest or index; an empty list for other content."""
    try:
        parsed = json.loads(document)
    except ValueError:
        return []
    if not isinstance(parsed, dict):
        return []
    found = parsed.get("manifests") or [parsed["config"], *parsed["layers"]] if "schemaVersion" in parsed else []
    return [(entry["digest"], entry["size"]) for entry in found]


@dataclass
class Image:
    """The image of a name: its root manifest or index, and the attached blobs."""

    root: str
    attached: list[str] = field(default_factory=list)


@dataclass
class Session:
    """An open cache, and its leases."""

    cache: Cache
    unsaved: Counter[str] = field(default_factory=Counter)  # leased: stored, but no image was saved with them since
    expected: set[str] = field(default_factory=set)  # blobs that were missing when this session saved their image
    holds: list[tuple[AbstractContextManager[None], set[str]]] = field(default_factory=list)


class Caches(RuleBasedStateMachine):
    """Two sessions of one cache, and its model."""

    empty: ClassVar[Path]
    place: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}  # also of blobs that are not stored, from their manifests
        self.images: dict[str, Image] = {}
        self.turn = 0  # the session that answers the next comparison

    @initialize()
    def open(self) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=self.place)) / "cache"
        shutil.copytree(self.empty, self.directory)
        self.sessions = [Session(Cache.open(self.directory)) for _ in range(2)]

    def teardown(self) -> None:
        for session in self.sessions:
            self._close(session)
        check(self.directory)
        shutil.rmtree(self.directory.parent)

    # The model.

    def _closure(self, name: str) -> list[str]:
        """Return an image's blobs in the order of positions: each document, then the blobs it names."""
        image = self.images[name]
        found: list[str] = []
        stack, expanded = [image.root], set[str]()
        while stack:
            digest = stack.pop()
            found.append(digest)
            if digest not in expanded:
                expanded.add(digest)
                named = named_by(self.stored.get(digest, b""))
                self.sizes.update(named)
                stack.extend(child for child, _ in reversed(named))
        return found + [digest for digest in image.attached if digest not in found]

    def _used(self) -> set[str]:
        return {digest for name in self.images for digest in self._closure(name)}

    def _leased(self) -> set[str]:
        leases = [hold for session in self.sessions for _, hold in session.holds]
        return set().union(*leases, *(+session.unsaved for session in self.sessions))

    def _complete(self, name: str) -> bool:
        return all(digest in self.stored for digest in self._closure(name))

    def _store(self, blobs: Iterable[bytes]) -> None:
        for data in blobs:
            self.stored[make.digest_of(data)] = data
            self.sizes[make.digest_of(data)] = len(data)

    def _point(self, name: str, root: str) -> None:
        if name not in self.images or self.images[name].root != root:
            self.images[name] = Image(root)

    def _free(self, candidates: Iterable[str]) -> tuple[int, int]:
        """Delete the candidates that nothing needs; return their number and their bytes."""
        freed = (set(candidates) & self.stored.keys()) - self._used() - self._leased()
        size = sum(len(self.stored.pop(digest)) for digest in freed)
        return len(freed), size

    def _close(self, session: Session) -> None:
        for hold, _ in session.holds:
            hold.__exit__(None, None, None)
        session.cache.close()

    # Storing.

    @rule(slot=slots, blob=contents, known=st.booleans())
    def save_a_blob(self, slot: int, blob: int, known: bool) -> None:
        self._save_blob(slot, BLOBS[blob], known)

    @rule(slot=slots, name=names, image=images)
    def save_an_image(self, slot: int, name: str, image: int) -> None:
        """Save the layers and the config, and then the manifest, as build systems do."""
        for data in (*IMAGES[image].layers, IMAGES[image].config):
            self._save_blob(slot, data, True)
        self._save_manifest(slot, name, IMAGES[image].manifest)

    def _save_blob(self, slot: int, data: bytes, known: bool) -> None:
        session, digest = self.sessions[slot], make.digest_of(data)
        expected = digest in session.expected and digest in self._used()
        stored = session.cache.save_blob(digest, data) if known else session.cache.add_blob(io.BytesIO(data))
        assert stored == digest
        self._store([data])
        session.unsaved[digest] += not expected

    @rule(slot=slots, name=names, which=st.integers(0, len(MANIFESTS) - 1))
    def save_a_manifest(self, slot: int, name: str, which: int) -> None:
        self._save_manifest(slot, name, MANIFESTS[which])

    def _save_manifest(self, slot: int, name: str, manifest: bytes) -> None:
        session = self.sessions[slot]
        saved = session.cache.save_manifest(name, manifest)
        self._store([manifest])
        self._point(name, make.digest_of(manifest))
        closure = self._closure(name)
        session.unsaved -= Counter(set(closure))
        session.expected.update(set(closure) - self.stored.keys())
        assert (saved.digest, saved.complete) == (make.digest_of(manifest), self._complete(name))

    @rule(slot=slots, chosen=st.dictionaries(names, images, min_size=1, max_size=2), folder=st.booleans())
    def import_images(self, slot: int, chosen: dict[str, int], folder: bool) -> None:
        files = make.oci_files({name: IMAGES[image] for name, image in chosen.items()})
        source = make.write(self.directory.parent / ("layout" if folder else "oci.tar"), files)
        self.sessions[slot].cache.cache_from_tar(source)
        if folder:
            shutil.rmtree(source)
        for name, image in chosen.items():
            self._store(IMAGES[image].blobs.values())
            self._point(name, IMAGES[image].digest)

    @rule(slot=slots, name=names, which=indexes)
    def import_an_index(self, slot: int, name: str, which: int) -> None:
        children, index = CHILDREN[which], INDEXES[which]
        files = make.oci_files({str(place): child for place, child in enumerate(children)}, {name: index})
        self.sessions[slot].cache.cache_from_tar(io.BytesIO(make.tar_of(files)))
        self._store([data for child in children for data in child.blobs.values()] + [index])
        self._point(name, make.digest_of(index))

    @rule(slot=slots, name=names, which=images)
    def import_from_docker(self, slot: int, name: str, which: int) -> None:
        cache, image = self.sessions[slot].cache, IMAGES[which]
        (saved,) = cache.cache_from_tar(io.BytesIO(make.tar_of(make.docker_files({name: image}))))
        manifest = cache.get_manifest(name)  # which the cache has made
        assert [digest for digest, _ in named_by(manifest)] == [
            make.digest_of(x) for x in (image.config, *image.layers)
        ]
        self._store([manifest, image.config, *image.layers])
        self._point(name, make.digest_of(manifest))
        assert saved.digest == make.digest_of(manifest)

    # Names.

    @rule(slot=slots, source=names, second=names)
    def tag(self, slot: int, source: str, second: str) -> None:
        if source not in self.images:
            with pytest.raises(NotInCache):
                self.sessions[slot].cache.tag(source, second)
            return
        self.sessions[slot].cache.tag(source, second)
        self.images[second] = Image(self.images[source].root, list(self.images[source].attached))

    @rule(slot=slots, name=names, digest=digests)
    def attach(self, slot: int, name: str, digest: str) -> None:
        session = self.sessions[slot]
        if name not in self.images or digest not in self.stored:
            with pytest.raises(NotInCache):
                session.cache.associate_blob_with_image(name, digest)
        elif digest not in self._closure(name):
            session.cache.associate_blob_with_image(name, digest)
            self.images[name].attached.append(digest)
            session.unsaved -= Counter([digest])

    # Removing and holding.

    @rule(slot=slots, chosen=st.sets(names, min_size=1, max_size=3), dry_run=st.booleans())
    def remove(self, slot: int, chosen: set[str], dry_run: bool) -> None:
        cache = self.sessions[slot].cache
        if chosen - self.images.keys():
            with pytest.raises(NotInCache):
                cache.remove_manifest(*chosen, dry_run=dry_run)
            return
        freed = cache.remove_manifest(*chosen, dry_run=dry_run)
        stored, kept = dict(self.stored), dict(self.images)
        touched = {digest for name in chosen for digest in self._closure(name)}
        for name in chosen:
            del self.images[name]
        assert freed == self._free(touched)
        if dry_run:
            self.stored, self.images = stored, kept

    @rule(slot=slots)
    def collect(self, slot: int) -> None:
        cache = self.sessions[slot].cache
        planned = cache.collect_garbage(dry_run=True)
        assert planned == cache.collect_garbage() == self._free(self.stored)

    @rule(slot=slots, wanted=names | digests)
    def begin_to_hold(self, slot: int, wanted: str) -> None:
        session = self.sessions[slot]
        hold = session.cache.hold(wanted)
        if wanted not in self.images and wanted not in self.stored:
            with pytest.raises(NotInCache):
                hold.__enter__()
            return
        hold.__enter__()
        session.holds.append((hold, set(self._closure(wanted)) if wanted in self.images else {wanted}))

    @precondition(lambda self: any(session.holds for session in self.sessions))
    @rule(data=st.data())
    def end_a_hold(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from([session for session in self.sessions if session.holds]))
        hold, _ = session.holds.pop(data.draw(st.integers(0, len(session.holds) - 1)))
        hold.__exit__(None, None, None)

    @rule(slot=slots)
    def close_and_open_again(self, slot: int) -> None:
        self._close(self.sessions[slot])
        self.sessions[slot] = Session(Cache.open(self.directory))

    # Reading.

    @rule(slot=slots, name=names)
    def export(self, slot: int, name: str) -> None:
        cache, exported = self.sessions[slot].cache, io.BytesIO()
        if name not in self.images or not self._complete(name):
            with pytest.raises(IncompleteImage if name in self.images else NotInCache):
                cache.export(name, exported)
            return
        cache.export(name, exported)
        exported.seek(0)
        second = self.directory.parent / "second"
        shutil.copytree(self.empty, second)
        with Cache.open(second) as other:
            (image,) = other.cache_from_tar(exported)
            attached = self.images[name].attached
            closure = [digest for digest in self._closure(name) if digest not in attached]
            assert (str(image.name), image.digest) == (name, self.images[name].root)
            assert [blob.digest for blob in other.get_image_blobs(name)] == closure
        shutil.rmtree(second)

    @rule(slot=slots, digest=digests)
    def look_for_a_blob(self, slot: int, digest: str) -> None:
        cache = self.sessions[slot].cache
        assert cache.has_blob(digest) == (digest in self.stored)
        if digest in self.stored:
            assert cache.get_blob(digest) == self.stored[digest]
            assert cache.get_blob_size(digest) == len(self.stored[digest])
        else:
            for read in (cache.get_blob, cache.get_blob_size):
                with pytest.raises(NotInCache):
                    read(digest)

    @rule(slot=slots, blob=contents, name=names)
    def refuse_wrong_input(self, slot: int, blob: int, name: str) -> None:
        cache, data = self.sessions[slot].cache, BLOBS[blob]
        archive = make.tar_of(make.oci_files({name: IMAGES[3]}))
        wrong: list[tuple[type[CacheError], Callable[[], object]]] = [
            (DigestMismatch, lambda: cache.save_blob(make.digest_of(data), data + b"more")),
            (InvalidManifest, lambda: cache.save_manifest(name, b'{"schemaVersion": 2}')),
            (CacheError, lambda: cache.cache_from_tar(io.BytesIO(archive[: len(archive) // 2]))),
            (NotInCache, lambda: cache.tag("unknown:1", name)),
            (NotInCache, lambda: cache.remove_manifest(name, "unknown:1")),
        ]
        for error, call in wrong:
            with pytest.raises(error):
                call()

    @invariant()
    def the_cache_equals_the_model(self) -> None:
        cache = self.sessions[self.turn].cache
        self.turn = 1 - self.turn  # the sessions take turns
        closures = {name: self._closure(name) for name in self.images}
        found = {str(image.name): (image.digest, image.size, image.complete) for image in cache.list_manifests()}
        assert found == {
            name: (self.images[name].root, sum(self.sizes[x] for x in set(closure)), self._complete(name))
            for name, closure in closures.items()
        }
        for name, closure in closures.items():
            blobs = [(blob.digest, blob.stored, blob.size) for blob in cache.get_image_blobs(name)]
            assert blobs == [(digest, digest in self.stored, self.sizes[digest]) for digest in closure]
        assert all(cache.is_image_complete(name) == (name in closures and found[name][2]) for name in NAMES)
        assert cache.list_blobs() == sorted(self.stored)
        assert cache.get_stats() == self._stats()
        assert files_of(self.directory) == {digest: len(data) for digest, data in self.stored.items()}

    def _stats(self) -> tuple[int, ...]:
        garbage = [len(self.stored[digest]) for digest in self.stored.keys() - self._used() - self._leased()]
        return (
            len(self.images),
            len(self.stored),
            sum(map(len, self.stored.values())),
            sum(not self._complete(name) for name in self.images),
            len(garbage),
            sum(garbage),
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the state machine, whose caches lie in memory if possible."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # there are no power cuts here
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        Caches.place, Caches.empty = Path(place), Path(place) / "empty"
        Cache.open(Caches.empty).close()
        yield Caches


def test_a_cache_answers_like_its_model_after_any_sequence_of_calls(machine: Any) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=EXAMPLES // 3, stateful_step_count=STEPS, deadline=None)
    )
