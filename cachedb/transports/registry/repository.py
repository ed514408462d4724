"""What a registry has and takes, after the OCI distribution specification v1.1 and the Docker registry API v2."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import urllib3
from urllib3.exceptions import HTTPError

from cachedb.disk.reader import damaged
from cachedb.disk.writer import CHUNK
from cachedb.errors import InvalidDigest, RegistryError, RegistryUnavailable, StorageError, os_errors
from cachedb.oci.digests import Digest, digest_of, parse_digest, split_digest
from cachedb.oci.manifests import (
    DOCUMENT_LIMIT,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_INDEX,
    Descriptor,
    descriptors,
    load_json,
    subject_of,
)
from cachedb.oci.names import Name
from cachedb.progress import Advance
from cachedb.transports.registry.client import TRIES, Client, finished, plain, read, with_query
from cachedb.transports.registry.places import Place

__all__ = ["Blob", "Fetched", "Repository"]


_SLOWEST = 1024  # bytes a second, in each minute: who sends less has stalled
_MINUTE = 60.0  # seconds
_LOOK_SECONDS = 5.0  # between two looks at how fast a blob comes
_PART = 16 * 1024 * 1024  # bytes of a chunk of an upload
_SENT = 256 * 1024  # bytes written at once: a slow network has a minute for them
_REFERRERS = 1000  # that a registry may list for one manifest
_NEXT = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')  # RFC 8288
_TYPES = MANIFEST_TYPES | INDEX_TYPES
_ACCEPTED = {"Accept": ", ".join(sorted(_TYPES))}


class Fetched(NamedTuple):
    """A manifest or index, as a registry has it."""

    digest: Digest | None  # as the registry says
    media_type: str | None  # as the registry says
    data: bytes


class Repository:
    """A repository at a registry. Usable from several threads."""

    def __init__(self, where: Place, *, authfile: str | os.PathLike[str] | None = None, push: bool = False) -> None:
        """Nothing is sent yet.

        Args:
            where: it is.
            authfile: to take credentials from, instead of the usual files.
            push: it is to be written to.
        """
        self.place = where
        self._client = Client(where, authfile, push=push)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def stop(self) -> None:
        """End what other threads ask for, and let them ask no more."""
        self._client.stop()

    def pause(self, tries: int) -> None:
        """Wait before something is tried again."""
        self._client.pause(tries, None)

    def digest(self, reference: str) -> Digest | None:
        """Return the digest of a manifest, by one request; None if the registry does not say.

        Raises:
            RegistryError: if there is none, or it cannot be had.
        """
        url = self._url(f"manifests/{reference}")
        with finished(
            self._client.request("HEAD", url, self._named(reference), _ACCEPTED, good=(200, 405))
        ) as response:
            return _said_digest(response.headers) if response.status == 200 else None

    def manifest(self, reference: str) -> Fetched:
        """Return a manifest or index.

        Raises:
            RegistryError: if there is none, or it cannot be had.
        """
        with finished(
            self._client.request("GET", self._url(f"manifests/{reference}"), self._named(reference), _ACCEPTED)
        ) as response:
            data = read(response, DOCUMENT_LIMIT, f"manifest {reference} at {self.place.registry}")
            media_type = _said_media_type(response.headers)
            return Fetched(_said_digest(response.headers), media_type if media_type in _TYPES else None, data)

    def blob(self, digest: Digest, size: int, offset: int = 0, look: Callable[[bool], object] = lambda _: None) -> Blob:
        """Return a blob's content from an offset on, as a stream that goes on by itself where it is cut off.

        Args:
            digest: of the blob.
            size: of the blob, in bytes.
            offset: to begin at.
            look: is called every few seconds, with whether the blob comes fast enough; it may raise, to end that.
        """
        return Blob(self, digest, size, offset, look)

    def open_blob(self, digest: Digest, offset: int) -> tuple[urllib3.BaseHTTPResponse, int]:
        """Ask for a blob's content; return the response, and where in the blob it begins.

        Raises:
            RegistryError: if there is none, or it cannot be had.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._client.request("GET", self._url(f"blobs/{digest}"), f"blob {digest}", headers, good=(200, 206))
        if response.status == 200:
            return response, 0
        begins = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
        if begins is None or int(begins[1]) != offset:
            response.close()
            raise RegistryError(
                f"{self.place.registry} was asked for the rest of {digest}, and sends another part of it"
            )
        return response, offset

    def referrers(self, digest: Digest) -> list[Descriptor]:
        """Return the manifests that refer to one as their subject: signatures, SBOMs, attestations.

        Asked as v1.1 has it ("Listing Referrers"), or where that is not known, by the tag that stands for it.

        Raises:
            RegistryError: if that cannot be had.
            InvalidManifest: if it is no index.
        """
        what, found, pages = f"referrers of {digest} at {self.place.registry}", list[Descriptor](), 0
        url: str | None = self._url(f"referrers/{digest}")
        while url:
            pages += 1
            # What a registry says that knows nothing of it varies.
            with finished(
                self._client.request("GET", url, what, {"Accept": OCI_INDEX}, good=(200, 400, 404, 405))
            ) as response:
                if response.status != 200 or _said_media_type(response.headers) != OCI_INDEX:
                    return descriptors(self._listed(digest), OCI_INDEX, what)
                found += descriptors(read(response, DOCUMENT_LIMIT, what), OCI_INDEX, what)
                following = _NEXT.search(response.headers.get("Link", ""))
                url = self._client.follow(url, following[1]) if following else None
            if max(len(found), pages) > _REFERRERS:
                raise RegistryError(f"{self.place.registry} lists more than {_REFERRERS} referrers of {digest}")
        return found

    def _listed(self, digest: Digest) -> bytes:
        """Return the index that a tag points to, where a registry knows no referrers ("Referrers Tag Schema")."""
        url, what = self._url(f"manifests/{_tag_of(digest)}"), f"referrers of {digest}"
        with finished(self._client.request("GET", url, what, {"Accept": OCI_INDEX}, good=(200, 404))) as response:
            if response.status == 404:
                return b'{"schemaVersion":2,"mediaType":"%s","manifests":[]}' % OCI_INDEX.encode()
            return read(response, DOCUMENT_LIMIT, what)

    def has(self, kind: str, digest: Digest) -> bool:
        """Say whether there is a thing of a kind: ``blobs`` or ``manifests``.

        Raises:
            RegistryError: if that cannot be had.
        """
        headers = _ACCEPTED if kind == "manifests" else {}
        what = f"{kind} of {self.place.repository}"
        with finished(
            self._client.request("HEAD", self._url(f"{kind}/{digest}"), what, headers, good=(200, 404))
        ) as response:
            return response.status == 200

    def mount(self, digest: Digest, source: str) -> bool:
        """Have the registry take a blob from another of its repositories ("Mounting a blob"); say whether it did."""
        url = with_query(self._url("blobs/uploads/"), {"mount": digest, "from": source})
        with suppress(RegistryError):  # it may not be ours to read, nor an upload ours to end: then it is sent
            with finished(
                self._client.request("POST", url, f"blob {digest} of {source}", {}, good=(201, 202))
            ) as response:
                if response.status == 201:
                    return True
                upload = self._client.follow(url, response.headers.get("Location", ""))
            with finished(self._client.request("DELETE", upload, "an upload", {}, good=(204,))):
                pass
        return False

    def put_blob(self, digest: Digest, size: int, file: BinaryIO, advance: Advance) -> None:
        """Send a blob ("Pushing Blobs"): whole at first, and in chunks once that was cut off, or was too large.

        Args:
            digest: of the blob.
            size: of the blob, in bytes.
            file: that has it.
            advance: is told of the bytes sent, and with a number below zero of those that are sent again.

        Raises:
            DigestMismatch: if the file has another content; the last of it is not sent then.
            RegistryError: if the registry does not take it.
        """
        what = f"upload of blob {digest}"
        checked = _Checked(file, digest, size)
        location, sent, furthest, failed, whole, chunk = None, 0, 0, 0, True, _PART
        while True:
            if location is None:
                advance(-sent)
                (location, least), sent = self._begin_upload(), 0
                chunk = max(chunk, least)
            body = _Part(checked, sent, size - sent if whole else min(chunk, size - sent), advance)
            last = whole or not body.size
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(body.size)}
            if not last:
                headers["Content-Range"] = f"{sent}-{sent + body.size - 1}"
            method, url = ("PUT", with_query(location, {"digest": digest})) if last else ("PATCH", location)
            good = (201 if last else 202, 400, 404, 413, 416)
            try:
                response = self._client.request(method, url, what, headers, good=good, body=body, failed=failed)
            except RegistryUnavailable:
                body.take_back()
                failed, whole = failed + 1, False
                if failed == TRIES:
                    raise
                before, (location, sent) = sent, self._upload_so_far(location, size)
                advance(sent - before)
                continue
            with finished(response):
                if response.status == 201:
                    return
                if response.status == 202:
                    location = self._client.follow(url, response.headers.get("Location", location))
                    sent += body.size
                    if sent > furthest:
                        furthest, failed = sent, 0
                    continue
                if response.status == 400:
                    raise self._client.refusal(what, response)
                body.take_back()
                if response.status == 413 and not whole:
                    chunk //= 4
                failed, whole, location = failed + 1, False, None  # the upload is lost, or it was too much at once
                if failed == TRIES:
                    raise self._client.refusal(what, response)

    def _begin_upload(self) -> tuple[str, int]:
        """Return where a blob is to be sent, and the bytes that a chunk of it must have."""
        url = self._url("blobs/uploads/")
        with finished(
            self._client.request("POST", url, f"repository {self.place.repository}", {}, good=(202,))
        ) as response:
            least = response.headers.get("OCI-Chunk-Min-Length", "")
            location = self._client.follow(url, response.headers.get("Location", ""))
            return location, int(least[:12]) if least.isdecimal() else 0

    def _upload_so_far(self, location: str, size: int) -> tuple[str | None, int]:
        """Return where an upload that was cut off goes on, and the bytes that are there; None if it must begin anew."""
        with (
            suppress(RegistryError),
            finished(self._client.request("GET", location, "an upload", {}, good=(204,))) as response,
        ):
            there = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", response.headers.get("Range", ""))
            if there and 0 < int(there[1]) < size:  # of one byte it says what it says of none
                return self._client.follow(location, response.headers.get("Location", location)), int(there[1]) + 1
        return None, 0

    def put_manifest(self, reference: str, media_type: str, data: bytes) -> None:
        """Store a manifest or index, and have it listed as a referrer of its subject, if it has one.

        Args:
            reference: the tag, or the digest, to store it under.
            media_type: of it.
            data: its exact bytes.

        Raises:
            RegistryError: if the registry does not take it, or stores something else.
        """
        if not self._put(reference, media_type, data) and (subject := subject_of(data)):
            self._list(subject, Name(self.place.repository, reference).digest or digest_of(data), media_type, data)

    def _put(self, reference: str, media_type: str, data: bytes) -> bool:
        """Store a manifest or index; say whether the registry lists it as a referrer of its subject."""
        url, headers = self._url(f"manifests/{reference}"), {"Content-Type": media_type}
        what = self._named(reference)
        with finished(self._client.request("PUT", url, what, headers, good=(200, 201, 202), body=data)) as response:
            said, listed = _said_digest(response.headers), "OCI-Subject" in response.headers
            if response.status == 200 and said is None:
                raise self._client.refusal(what, response)  # so does a network that wants us to log in answer
        if said is not None and said != digest_of(data, said):
            raise RegistryError(f"{self.place.registry} has stored {what} as {said}, which is not its digest")
        return listed

    def _list(self, subject: Digest, digest: Digest, media_type: str, data: bytes) -> None:
        """Add a manifest to the index of its subject's referrers, where the registry keeps none of its own."""
        listed, document = self._listed(subject), load_json(data, "the manifest")
        if any(other.digest == digest for other in descriptors(listed, OCI_INDEX, f"referrers of {subject}")):
            return
        config = document.get("config")
        kind = document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else None)
        entry = {"mediaType": media_type, "digest": digest, "size": len(data)}
        more = {"artifactType": kind, "annotations": document.get("annotations")}
        index = load_json(listed, "the index")
        entry |= {key: value for key, value in more.items() if value}
        others = index["manifests"]
        try:
            self._put_list(subject, index | {"manifests": [*others, entry]})
        except RegistryError:  # it may not take a list that names what was deleted
            there = [other for other in others if self.has("manifests", other["digest"])]
            if there == others:
                raise
            self._put_list(subject, index | {"manifests": [*there, entry]})

    def _put_list(self, subject: Digest, index: dict[str, Any]) -> None:
        # Not by put_manifest: a subject that somebody gave the index would have no end.
        self._put(_tag_of(subject), OCI_INDEX, json.dumps(index).encode())

    def _url(self, path: str) -> str:
        return f"{self.place.url}/v2/{self.place.repository}/{path}"

    def _named(self, reference: str) -> str:
        return str(Name(self.place.repository, reference))


class Blob:
    """A blob's content at a registry, as it comes; where it is cut off, it goes on from there by another request."""

    def __init__(
        self,
        repository: Repository,
        digest: Digest,
        size: int,
        offset: int,
        look: Callable[[bool], object] = lambda _: None,
    ) -> None:
        self._repository, self._digest, self._size, self._at = repository, digest, size, offset
        self._look, self._looked, self._came = look, time.monotonic(), 0  # the bytes since the last look
        self._response: urllib3.BaseHTTPResponse | None = None
        self._failed, self._since, self._had = 0, time.monotonic(), 0

    def close(self) -> None:
        """Let go of the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the front of the buffer and return how many bytes there were; 0 is the end.

        Raises:
            RegistryError: if it cannot be had, or comes too slowly.
        """
        while True:
            if self._response is None and self._at >= self._size:
                return 0
            try:
                if self._response is None:
                    self._open()
                assert self._response is not None
                data = self._response.read1(len(buffer), decode_content=False)
                if not data and self._at < self._size:
                    raise HTTPError("it ended too early")
                self._look_at_the_clock(len(data))
            except HTTPError as error:
                self.close()
                self._failed += 1
                if self._failed == TRIES:
                    raise RegistryUnavailable(
                        f"{self._repository.place.registry} sends {self._digest} in pieces: {plain(error)}; try again"
                    ) from None
                self._repository.pause(self._failed)
                continue
            buffer[: len(data)] = data
            self._at += len(data)
            return len(data)

    def _open(self) -> None:
        self._response, begins = self._repository.open_blob(self._digest, self._at)
        while begins < self._at:  # it knows no ranges: what we have comes again
            data = self._response.read1(min(CHUNK, self._at - begins), decode_content=False)
            if not data:
                raise HTTPError("it ended too early")
            begins += len(data)
            self._since = time.monotonic()  # the time that this takes is no stall

    def _look_at_the_clock(self, count: int) -> None:
        """Count what came in the last minute: a failure after that much is another failure."""
        self._had += count
        self._came += count
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            is_fast = self._came >= _SLOWEST * (now - self._looked)
            self._looked, self._came = now, 0
            self._look(is_fast)
        if self._had > _SLOWEST * _MINUTE:
            self._failed, self._since, self._had = 0, now, 0
        elif now - self._since > _MINUTE:
            self._since, self._had = now, 0
            raise HTTPError(f"less than {_SLOWEST} bytes a second came")


class _Checked:
    """The file of a blob, read in parts; the last bytes are given when the digest of all of it is verified."""

    def __init__(self, file: BinaryIO, digest: Digest, size: int) -> None:
        self._file, self._digest, self._size = file, digest, size
        self._hasher, self._hashed = hashlib.new(split_digest(digest)[0]), 0
        self._verify()

    def read(self, start: int, count: int) -> bytes:
        """Return bytes of the file, from an offset on.

        Raises:
            DigestMismatch: if they are the last, and the file has another content.
            StorageError: if it cannot be read, or was cut short.
        """
        while self._hashed < start:  # a registry may say that it has more than we sent
            self._hash(self._hashed, self._read(self._hashed, min(CHUNK, start - self._hashed)))
        data = self._read(start, count)
        self._hash(start, data)
        return data

    def _read(self, start: int, count: int) -> bytes:
        with os_errors("read a blob"):
            self._file.seek(start)
            data = self._file.read(count)
        if not data:
            raise StorageError("the file of a blob was cut short: run `cachedb verify`")
        return data

    def _hash(self, start: int, data: bytes) -> None:
        """Hash what was not hashed before: what is sent again is not."""
        new = memoryview(data)[max(self._hashed - start, 0) :]
        self._hasher.update(new)
        self._hashed += len(new)
        self._verify()

    def _verify(self) -> None:
        if self._hashed == self._size and f"{self._hasher.name}:{self._hasher.hexdigest()}" != self._digest:
            raise damaged(self._digest)


class _Part:
    """A part of a file that is sent: from its beginning each time it is iterated over."""

    def __init__(self, file: _Checked, start: int, size: int, advance: Advance) -> None:
        self.size = size
        self._file, self._start, self._advance, self._sent = file, start, advance, 0

    def take_back(self) -> None:
        """Tell that what was sent was for nothing."""
        self._advance(-self._sent)
        self._sent = 0

    def __iter__(self) -> Iterator[bytes]:
        self.take_back()
        while self._sent < self.size:
            data = self._file.read(self._start + self._sent, min(_SENT, self.size - self._sent))
            yield data
            self._sent += len(data)
            self._advance(len(data))


def _tag_of(digest: Digest) -> str:
    """Return the tag of the index that lists a manifest's referrers (distribution specification, same name)."""
    algorithm, encoded = split_digest(digest)
    return f"{algorithm}-{encoded[:64]}"


def _said_media_type(headers: Mapping[str, str]) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip()


def _said_digest(headers: Mapping[str, str]) -> Digest | None:
    try:
        return parse_digest(headers.get("Docker-Content-Digest", ""))
    except InvalidDigest:
        return None
