"""Read from and write to a repository at a registry.

This follows the OCI distribution specification v1.1 and the Docker registry API v2.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import urllib3
from urllib3.exceptions import HTTPError

from cachedb.disk.reader import damaged_error
from cachedb.disk.writer import CHUNK_BYTES
from cachedb.errors import InvalidDigest, RegistryError, RegistryUnavailable, StorageError, os_errors
from cachedb.oci.digests import Digest, digest_of, parse_digest, split_digest
from cachedb.oci.manifests import (
    DOCUMENT_LIMIT,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_INDEX,
    Descriptor,
    artifact_type,
    descriptors,
    load_json,
    subject_of,
)
from cachedb.oci.names import Name
from cachedb.progress import Advance
from cachedb.transports.registry.access import DEFAULT_ACCESS, Access
from cachedb.transports.registry.answers import drain_after, read_body, to_one_line
from cachedb.transports.registry.client import TRIES, Client
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.urls import with_query

__all__ = ["Blob", "Fetched", "Repository"]


_MIN_BYTES_PER_SECOND = 1024  # over a minute; a slower download has stalled
_MINUTE = 60.0  # seconds
_LOOK_SECONDS = 5.0  # between two calls of a download's `look`
_CHUNK_BYTES = 16 * 1024 * 1024  # the size of a chunk of an upload
_WRITE_BYTES = 256 * 1024  # written at once, small enough for the timeout of a slow network
_MAX_REFERRERS = 1000  # of one manifest
_NEXT = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')  # RFC 8288
_TYPES = MANIFEST_TYPES | INDEX_TYPES
_ACCEPTED = {"Accept": ", ".join(sorted(_TYPES))}


class Fetched(NamedTuple):
    """A manifest or index from a registry, not yet verified."""

    digest: Digest | None  # declared by the registry
    media_type: str | None  # declared by the registry
    data: bytes


class Repository:
    """A repository at a registry; safe to use from several threads."""

    def __init__(self, place: Place, access: Access = DEFAULT_ACCESS, *, push: bool = False) -> None:
        """Create a repository without sending anything.

        Args:
            place: the place of the repository.
            access: how to reach the registry.
            push: whether the repository will be written to.
        """
        self.place = place
        self._client = Client(place, access, push=push)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def stop(self) -> None:
        """Cancel running requests and refuse new ones."""
        self._client.stop()

    def pause(self, tries: int) -> None:
        """Wait before a retry."""
        self._client.pause(tries, None)

    def digest(self, reference: str) -> Digest | None:
        """Return the digest of a manifest with one request; None if the registry does not send it.

        Raises:
            RegistryError: if there is no such manifest, or the request fails.
        """
        url = self._build_url(f"manifests/{reference}")
        with drain_after(
            self._client.request("HEAD", url, self._format_name(reference), _ACCEPTED, good=(200, 405))
        ) as response:
            return _read_digest(response.headers) if response.status == 200 else None

    def manifest(self, reference: str) -> Fetched:
        """Download a manifest or index.

        Raises:
            RegistryError: if there is no such manifest, or the request fails.
        """
        with drain_after(
            self._client.request(
                "GET", self._build_url(f"manifests/{reference}"), self._format_name(reference), _ACCEPTED
            )
        ) as response:
            data = read_body(response, DOCUMENT_LIMIT, f"manifest {reference} at {self.place.registry}")
            media_type = _read_media_type(response.headers)
            return Fetched(_read_digest(response.headers), media_type if media_type in _TYPES else None, data)

    def blob(self, digest: Digest, size: int, offset: int = 0, look: Callable[[bool], object] = lambda _: None) -> Blob:
        """Return a blob's content as a stream that resumes after an interruption.

        Args:
            digest: the blob's digest.
            size: the blob's size in bytes.
            offset: where to start, in bytes.
            look: called every few seconds with whether the download is fast enough; it may raise to end the download.
        """
        return Blob(self, digest, size, offset, look)

    def open_blob(self, digest: Digest, offset: int) -> tuple[urllib3.BaseHTTPResponse, int]:
        """Request a blob's content from an offset; return the answer and the offset where it really starts.

        Raises:
            RegistryError: if there is no such blob, or the request fails.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._client.request(
            "GET", self._build_url(f"blobs/{digest}"), f"blob {digest}", headers, good=(200, 206)
        )
        if response.status == 200:
            return response, 0
        begins = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
        if begins is None or int(begins[1]) != offset:
            response.close()
            raise RegistryError(f"{self.place.registry} sent another range of {digest} than requested")
        return response, offset

    def referrers(self, digest: Digest) -> list[Descriptor]:
        """Return the referrers of a manifest: signatures, SBOMs, attestations.

        This uses the API of v1.1 ("Listing Referrers"), or the referrers tag if the registry lacks the API.

        Raises:
            RegistryError: if the request fails.
            InvalidManifest: if the answer is not an index.
        """
        what, found, pages = f"referrers of {digest} at {self.place.registry}", list[Descriptor](), 0
        url: str | None = self._build_url(f"referrers/{digest}")
        while url:
            pages += 1
            # Registries without this API answer in various ways.
            with drain_after(
                self._client.request("GET", url, what, {"Accept": OCI_INDEX}, good=(200, 400, 404, 405))
            ) as response:
                if response.status != 200 or _read_media_type(response.headers) != OCI_INDEX:
                    return descriptors(self._read_referrers_index(digest), OCI_INDEX, what)
                found += descriptors(read_body(response, DOCUMENT_LIMIT, what), OCI_INDEX, what)
                following = _NEXT.search(response.headers.get("Link", ""))
                url = self._client.follow(url, following[1]) if following else None
            if max(len(found), pages) > _MAX_REFERRERS:
                raise RegistryError(
                    f"{self.place.registry} lists more than {_MAX_REFERRERS} referrers, or pages of them, for {digest}"
                )
        return found

    def _read_referrers_index(self, digest: Digest) -> bytes:
        """Return the index under the referrers tag, for a registry without the API ("Referrers Tag Schema")."""
        url, what = self._build_url(f"manifests/{_build_referrers_tag(digest)}"), f"referrers of {digest}"
        with drain_after(self._client.request("GET", url, what, {"Accept": OCI_INDEX}, good=(200, 404))) as response:
            if response.status == 404:
                return b'{"schemaVersion":2,"mediaType":"%s","manifests":[]}' % OCI_INDEX.encode()
            return read_body(response, DOCUMENT_LIMIT, what)

    def has(self, kind: str, digest: Digest) -> bool:
        """Return whether the repository has a digest among its ``blobs`` or ``manifests``.

        Raises:
            RegistryError: if the request fails.
        """
        headers = _ACCEPTED if kind == "manifests" else {}
        what = f"{kind} of {self.place.repository}"
        with drain_after(
            self._client.request("HEAD", self._build_url(f"{kind}/{digest}"), what, headers, good=(200, 404))
        ) as response:
            return response.status == 200

    def mount(self, digest: Digest, source: str) -> bool:
        """Mount a blob from another repository of the registry ("Mounting a blob"); return whether it worked."""
        url = with_query(self._build_url("blobs/uploads/"), {"mount": digest, "from": source})
        with suppress(RegistryError):  # if mounting or cancelling fails, the caller uploads the blob
            with drain_after(
                self._client.request("POST", url, f"blob {digest} of {source}", {}, good=(201, 202))
            ) as response:
                if response.status == 201:
                    return True
                upload = self._client.follow(url, response.headers.get("Location", ""))
            with drain_after(self._client.request("DELETE", upload, "an upload", {}, good=(204,))):
                pass
        return False

    def put_blob(self, digest: Digest, size: int, file: BinaryIO, advance: Advance) -> None:
        """Upload a blob ("Pushing Blobs") in one request, or in chunks after an interruption or a refusal.

        Args:
            digest: the blob's digest.
            size: the blob's size in bytes.
            file: a file with the content.
            advance: called with the bytes sent, and with a negative number for bytes that must be sent again.

        Raises:
            DigestMismatch: if the file has other content; its last bytes are then not sent.
            RegistryError: if the registry does not accept the blob.
        """
        what = f"upload of blob {digest}"
        checked = _VerifiedFile(file, digest, size)
        location, sent, furthest, failed, is_whole, chunk = None, 0, 0, 0, True, _CHUNK_BYTES
        while True:
            if location is None:
                advance(-sent)
                (location, min_chunk), sent = self._begin_upload(), 0
                chunk = max(chunk, min_chunk)
            body = _Part(checked, sent, size - sent if is_whole else min(chunk, size - sent), advance)
            is_last = is_whole or not body.size
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(body.size)}
            if not is_last:
                headers["Content-Range"] = f"{sent}-{sent + body.size - 1}"
            method, url = ("PUT", with_query(location, {"digest": digest})) if is_last else ("PATCH", location)
            good = (201 if is_last else 202, 400, 404, 413, 416)
            try:
                response = self._client.request(method, url, what, headers, good=good, body=body, failed=failed)
            except RegistryUnavailable:
                body.take_back()
                failed, is_whole = failed + 1, False
                if failed == TRIES:
                    raise
                before, (location, sent) = sent, self._find_upload_state(location, size)
                advance(sent - before)
                continue
            with drain_after(response):
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
                if response.status == 413 and not is_whole:
                    chunk //= 4
                failed, is_whole, location = failed + 1, False, None  # the upload is lost, or its body was too large
                if failed == TRIES:
                    raise self._client.refusal(what, response)

    def _begin_upload(self) -> tuple[str, int]:
        """Start an upload; return its URL and the minimum size of a chunk in bytes."""
        url = self._build_url("blobs/uploads/")
        with drain_after(
            self._client.request("POST", url, f"repository {self.place.repository}", {}, good=(202,))
        ) as response:
            least = response.headers.get("OCI-Chunk-Min-Length", "")
            location = self._client.follow(url, response.headers.get("Location", ""))
            return location, int(least[:12]) if least.isdecimal() else 0

    def _find_upload_state(self, location: str, size: int) -> tuple[str | None, int]:
        """Return the URL of an interrupted upload and the bytes it has; None if it must restart."""
        with (
            suppress(RegistryError),
            drain_after(self._client.request("GET", location, "an upload", {}, good=(204,))) as response,
        ):
            range_ = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", response.headers.get("Range", ""))
            if range_ and 0 < int(range_[1]) < size:  # "0-0" may mean one byte or none
                return self._client.follow(location, response.headers.get("Location", location)), int(range_[1]) + 1
        return None, 0

    def put_manifest(self, reference: str, media_type: str, data: bytes) -> None:
        """Upload a manifest or index, and list it as a referrer of its subject if it has one.

        Args:
            reference: the tag or digest to store it under.
            media_type: its media type.
            data: its exact bytes.

        Raises:
            RegistryError: if the registry does not accept it, or stores something else.
        """
        if not self._put(reference, media_type, data) and (subject := subject_of(data)):
            self._add_referrer(
                subject, Name(self.place.repository, reference).digest or digest_of(data), media_type, data
            )

    def _put(self, reference: str, media_type: str, data: bytes) -> bool:
        """Upload a manifest or index; return whether the registry lists it as a referrer of its subject."""
        url, headers = self._build_url(f"manifests/{reference}"), {"Content-Type": media_type}
        what = self._format_name(reference)
        with drain_after(self._client.request("PUT", url, what, headers, good=(200, 201, 202), body=data)) as response:
            stored, is_listed = _read_digest(response.headers), "OCI-Subject" in response.headers
            if response.status == 200 and stored is None:
                raise self._client.refusal(what, response)  # the login page of a network gives such an answer
        if stored is not None and stored != digest_of(data, stored):
            raise RegistryError(f"{self.place.registry} stored {what} as {stored}, which is not its digest")
        return is_listed

    def _add_referrer(self, subject: Digest, digest: Digest, media_type: str, data: bytes) -> None:
        """Add a manifest to the index under its subject's referrers tag, for a registry without the API."""
        listed, document = self._read_referrers_index(subject), load_json(data, "the manifest")
        if any(other.digest == digest for other in descriptors(listed, OCI_INDEX, f"referrers of {subject}")):
            return
        entry = {"mediaType": media_type, "digest": digest, "size": len(data)}
        optional = {"artifactType": artifact_type(document), "annotations": document.get("annotations")}
        index = load_json(listed, "the index")
        entry |= {key: value for key, value in optional.items() if value}
        others = index["manifests"]
        try:
            self._put_referrers_index(subject, index | {"manifests": [*others, entry]})
        except RegistryError:  # the registry may refuse an index with deleted referrers: leave them out
            existing = [other for other in others if self.has("manifests", other["digest"])]
            if existing == others:
                raise
            self._put_referrers_index(subject, index | {"manifests": [*existing, entry]})

    def _put_referrers_index(self, subject: Digest, index: dict[str, Any]) -> None:
        # `put_manifest` would recurse if the index itself had a subject.
        self._put(_build_referrers_tag(subject), OCI_INDEX, json.dumps(index).encode())

    def _build_url(self, path: str) -> str:
        return f"{self._client.find_url()}/v2/{self.place.repository}/{path}"

    def _format_name(self, reference: str) -> str:
        return str(Name(self.place.repository, reference))


class Blob:
    """A stream of a blob's content; after an interruption it resumes with another request."""

    def __init__(
        self,
        repository: Repository,
        digest: Digest,
        size: int,
        offset: int,
        look: Callable[[bool], object] = lambda _: None,
    ) -> None:
        self._repository, self._digest, self._size, self._at = repository, digest, size, offset
        self._look, self._looked, self._since_look = look, time.monotonic(), 0  # the last call, and the bytes since
        self._response: urllib3.BaseHTTPResponse | None = None
        self._failed, self._since, self._received = 0, time.monotonic(), 0  # bytes since then

    def close(self) -> None:
        """Release the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def readinto(self, buffer: memoryview, /) -> int:
        """Read into the start of the buffer and return the number of bytes; 0 is the end.

        Raises:
            RegistryError: if the download fails or is too slow.
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
                    raise HTTPError("the response ended too early")
                self._check_speed(len(data))
            except HTTPError as error:
                self.close()
                self._failed += 1
                if self._failed == TRIES:
                    raise RegistryUnavailable(
                        f"{self._repository.place.registry} keeps interrupting the download of {self._digest}: "
                        f"{to_one_line(error)}; try again"
                    ) from None
                self._repository.pause(self._failed)
                continue
            buffer[: len(data)] = data
            self._at += len(data)
            return len(data)

    def _open(self) -> None:
        self._response, begins = self._repository.open_blob(self._digest, self._at)
        while begins < self._at:  # the registry ignores ranges: skip the bytes that we have
            data = self._response.read1(min(CHUNK_BYTES, self._at - begins), decode_content=False)
            if not data:
                raise HTTPError("the response ended too early")
            begins += len(data)
            self._since = time.monotonic()  # skipping is not a stall

    def _check_speed(self, count: int) -> None:
        """Count received bytes; raise if a minute brings too few, and reset the failures if enough came."""
        self._received += count
        self._since_look += count
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            is_fast = self._since_look >= _MIN_BYTES_PER_SECOND * (now - self._looked)
            self._looked, self._since_look = now, 0
            self._look(is_fast)
        if self._received > _MIN_BYTES_PER_SECOND * _MINUTE:
            self._failed, self._since, self._received = 0, now, 0
        elif now - self._since > _MINUTE:
            self._since, self._received = now, 0
            raise HTTPError(f"it is slower than {_MIN_BYTES_PER_SECOND} bytes per second")


class _VerifiedFile:
    """File of a blob, read in parts; its last bytes are returned only if the whole digest matches."""

    def __init__(self, file: BinaryIO, digest: Digest, size: int) -> None:
        self._file, self._digest, self._size = file, digest, size
        self._hasher, self._hashed = hashlib.new(split_digest(digest)[0]), 0
        self._verify()

    def read(self, start: int, count: int) -> bytes:
        """Return bytes of the file from an offset.

        Raises:
            DigestMismatch: if these are the last bytes and the content does not match the digest.
            StorageError: if the file cannot be read or is too short.
        """
        while self._hashed < start:  # a registry may claim to have more than we sent
            self._hash(self._hashed, self._read(self._hashed, min(CHUNK_BYTES, start - self._hashed)))
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
        """Hash those bytes that were not hashed before; bytes that are sent again were."""
        new = memoryview(data)[max(self._hashed - start, 0) :]
        self._hasher.update(new)
        self._hashed += len(new)
        self._verify()

    def _verify(self) -> None:
        if self._hashed == self._size and f"{self._hasher.name}:{self._hasher.hexdigest()}" != self._digest:
            raise damaged_error(self._digest)


class _Part:
    """Part of a file as a request body; each iteration starts at its beginning."""

    def __init__(self, file: _VerifiedFile, start: int, size: int, advance: Advance) -> None:
        self.size = size
        self._file, self._start, self._advance, self._sent = file, start, advance, 0

    def take_back(self) -> None:
        """Subtract the bytes sent so far from the progress."""
        self._advance(-self._sent)
        self._sent = 0

    def __iter__(self) -> Iterator[bytes]:
        self.take_back()
        while self._sent < self.size:
            data = self._file.read(self._start + self._sent, min(_WRITE_BYTES, self.size - self._sent))
            yield data
            self._sent += len(data)
            self._advance(len(data))


def _build_referrers_tag(digest: Digest) -> str:
    """Return the referrers tag of a manifest (distribution specification, "Referrers Tag Schema")."""
    algorithm, encoded = split_digest(digest)
    return f"{algorithm}-{encoded[:64]}"


def _read_media_type(headers: Mapping[str, str]) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip()


def _read_digest(headers: Mapping[str, str]) -> Digest | None:
    try:
        return parse_digest(headers.get("Docker-Content-Digest", ""))
    except InvalidDigest:
        return None
