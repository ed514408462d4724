"""Read from and write to a repository at a registry.

This follows the OCI distribution specification v1.1 and the Docker registry API v2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import urllib3

from cachedb.disk.waiting import LOG
from cachedb.errors import InvalidDigest, RegistryError, RegistryUnavailable
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
    manifest_media_type,
    subject_of,
)
from cachedb.oci.names import Name, is_tag
from cachedb.progress import Advance
from cachedb.transports.registry.access import DEFAULT_ACCESS, Access
from cachedb.transports.registry.answers import drain_after, is_encoded, read_body
from cachedb.transports.registry.client import TRIES, Client
from cachedb.transports.registry.download import Download
from cachedb.transports.registry.explain import RETRY_STATUSES
from cachedb.transports.registry.places import Place
from cachedb.transports.registry.upload import Part, VerifiedFile
from cachedb.transports.registry.urls import origin, with_query

__all__ = ["Fetched", "Repository"]


_CHUNK_BYTES = 16 * 1024 * 1024  # the size of a chunk of an upload
_MAX_REFERRERS = 1000  # of one manifest
_MAX_TAG_PAGES = 10_000
_NEXT = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')  # RFC 8288
_ANSWERS = tuple(status for status in range(200, 600) if status != 401)  # all but the request for credentials
_NO_REFERRERS = b'{"schemaVersion":2,"mediaType":"%s","manifests":[]}' % OCI_INDEX.encode()
_TYPES = MANIFEST_TYPES | INDEX_TYPES
_ACCEPTED = {"Accept": ", ".join(sorted(_TYPES))}


class Fetched(NamedTuple):
    """A manifest or index from a registry, not yet verified."""

    digest: Digest | None  # declared by the registry
    media_type: str | None  # declared by the registry
    data: bytes


class Repository:
    """A repository at a registry; safe to use from several threads."""

    def __init__(
        self, place: Place, access: Access = DEFAULT_ACCESS, *, push: bool = False, tries: int = TRIES
    ) -> None:
        """Create a repository without sending anything.

        Args:
            place: the place of the repository.
            access: how to reach the registry.
            push: whether the repository will be written to.
            tries: how many times a request is sent in total, if its failures may be temporary.
        """
        self.place = place
        self._client = Client(place, access, push=push, tries=tries)
        self._fetched: dict[str, Fetched] = {}  # manifests that `digest` has downloaded, by digest
        # What the registry can do, until a refusal shows otherwise.
        self._accepts_whole_blobs = self._deletes_uploads = self._has_referrers_api = True

    @property
    def tries(self) -> int:
        """How many times a request is sent in total, if its failures may be temporary."""
        return self._client.tries

    @tries.setter
    def tries(self, tries: int) -> None:
        self._client.tries = tries

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def stop(self) -> None:
        """Cancel running requests and refuse new ones."""
        self._client.stop()

    def pause(self, tries: int) -> None:
        """Wait before a retry."""
        self._client.pause(tries, None)

    def digest(self, reference: str) -> Digest:
        """Return the digest of a manifest, with one request for headers if the registry answers it.

        Some registries refuse HEAD for manifests that they have. Then the manifest is downloaded; the next call of
        `manifest` with its digest returns it.

        Raises:
            RegistryError: if there is no such manifest, or the request fails.
            InvalidManifest: if the answer is not a manifest.
        """
        url, what = self._build_url(f"manifests/{reference}"), self._format_name(reference)
        with drain_after(self._client.request("HEAD", url, what, _ACCEPTED, good=_ANSWERS)) as response:
            digest = _read_digest(response.headers) if response.status == 200 else None
        if digest is None:
            fetched = self.manifest(reference)
            manifest_media_type(fetched.data, fetched.media_type)  # raises for the login page of a network
            digest = fetched.digest or digest_of(fetched.data)
            self._fetched[digest] = fetched
        return digest

    def manifest(self, reference: str) -> Fetched:
        """Download a manifest or index.

        Raises:
            RegistryError: if there is no such manifest, or the request fails.
        """
        if fetched := self._fetched.pop(reference, None):
            return fetched
        url, what = self._build_url(f"manifests/{reference}"), self._format_name(reference)
        with drain_after(self._client.request("GET", url, what, _ACCEPTED)) as response:
            data = read_body(response, DOCUMENT_LIMIT, f"manifest {reference} at {self.place.registry}")
            media_type = _read_media_type(response.headers)
            return Fetched(_read_digest(response.headers), media_type if media_type in _TYPES else None, data)

    def blob(
        self,
        digest: Digest,
        size: int,
        offset: int = 0,
        look: Callable[[bool], object] = lambda _: None,
        url: str | None = None,
    ) -> Download:
        """Return a blob's content as a stream that resumes after an interruption.

        Args:
            digest: the blob's digest.
            size: the blob's size in bytes.
            offset: where to start, in bytes.
            look: called every few seconds with whether the download is fast enough; it may raise to end the download.
            url: where the blob is; None for the repository.
        """
        return Download(self, digest, size, offset, look, url)

    def open_blob(
        self, digest: Digest, size: int, offset: int, url: str | None = None
    ) -> tuple[urllib3.BaseHTTPResponse, int]:
        """Request a blob's content from an offset; return the answer and the offset where it really starts.

        It starts at 0 if the registry does not send the range.

        Args:
            digest: the blob's digest.
            size: the blob's size in bytes.
            offset: where to start, in bytes.
            url: where the blob is; None for the repository.

        Raises:
            RegistryError: if there is no such blob, or the request fails.
        """
        url, what = url or self._build_url(f"blobs/{digest}"), f"blob {digest}"
        tries = None
        if offset:
            try:
                response = self._client.request("GET", url, what, {"Range": f"bytes={offset}-"}, good=(200, 206))
            except RegistryUnavailable:
                tries = 1  # perhaps it fails only for ranges
            except RegistryError:
                pass  # some registries refuse ranges
            else:
                if response.status == 200:
                    return response, 0
                if _is_range(response, offset, size):
                    return response, offset
                response.close()
        response = self._client.request("GET", url, what, {}, good=(200, 206), max_tries=tries)
        if response.status == 206 and not _is_range(response, 0, size):
            response.close()
            raise RegistryError(f"{self.place.registry} sent another range of {digest} than requested: try again later")
        return response, 0

    def referrers(self, digest: Digest) -> list[Descriptor]:
        """Return the referrers of a manifest: signatures, SBOMs, attestations.

        This uses the API of v1.1 ("Listing Referrers"), or the referrers tag if the registry lacks the API.

        Raises:
            RegistryError: if the request fails.
            InvalidManifest: if the answer is not an index.
        """
        what, found, pages = f"referrers of {digest} at {self.place.registry}", list[Descriptor](), 0
        failure: RegistryError | None = None
        url: str | None = self._build_url(f"referrers/{digest}") if self._has_referrers_api else None
        while url:
            try:
                response = self._request_referrers(url, what)
            except RegistryError as error:
                if pages:
                    raise
                self._has_referrers_api, failure = False, error  # registries without this API answer in various ways
                break
            with drain_after(response):
                found += descriptors(read_body(response, DOCUMENT_LIMIT, what), OCI_INDEX, what)
                following = _NEXT.search(response.headers.get("Link", ""))
                url = self._client.follow(url, following[1]) if following else None
            pages += 1
            if max(len(found), pages) > _MAX_REFERRERS:
                raise RegistryError(
                    f"{self.place.registry} lists more than {_MAX_REFERRERS} referrers, or pages of them, for "
                    f"{digest}: pull without --referrers"
                )
        if pages:
            return found
        found = descriptors(self._read_referrers_index(digest), OCI_INDEX, what)
        if not found and isinstance(failure, RegistryUnavailable):
            LOG.warning("%s may have referrers that it does not list: %s", self.place.registry, failure)
        return found

    def _request_referrers(self, url: str, what: str) -> urllib3.BaseHTTPResponse:
        """Request a page of referrers; raise `RegistryError` if the answer is no index.

        A registry without the API may redirect to a host that always answers 429. So a retry asks only the registry
        itself.
        """
        headers = {"Accept": OCI_INDEX}
        response = self._client.request("GET", url, what, headers, good=_ANSWERS)
        is_ours = origin(response.url or url) == origin(url)
        if response.status in RETRY_STATUSES and is_ours and self.tries > 1 and self._client.pause(1, response):
            response.close()
            response = self._client.request("GET", url, what, headers, max_tries=self.tries - 1)
        if response.status != 200 or _read_media_type(response.headers) != OCI_INDEX:
            with response:
                raise self._client.refusal(what, response)
        return response

    def _read_referrers_index(self, digest: Digest) -> bytes:
        """Return the index under the referrers tag, for a registry without the API ("Referrers Tag Schema")."""
        url, what = self._build_url(f"manifests/{_build_referrers_tag(digest)}"), f"referrers of {digest}"
        with drain_after(self._client.request("GET", url, what, {"Accept": OCI_INDEX}, good=(200, 404))) as response:
            data = read_body(response, DOCUMENT_LIMIT, what) if response.status == 200 else b""
        # Some registries take the tag for the digest, and answer with the manifest itself.
        return data if data and digest_of(data, digest) != digest else _NO_REFERRERS

    def tags(self) -> list[str]:
        """Return the tags of the repository ("Listing Tags"), in the registry's order.

        Raises:
            RegistryError: if there is no such repository, or the request fails.
        """
        what, found = f"tags of {self.place.repository}", dict[str, None]()
        url = self._build_url("tags/list")
        for _ in range(_MAX_TAG_PAGES):
            with drain_after(self._client.request("GET", url, what, {})) as response:
                document = load_json(read_body(response, DOCUMENT_LIMIT, what), what, RegistryError)
                following = _NEXT.search(response.headers.get("Link", ""))
                listed = document.get("tags") if isinstance(document, dict) else ""
                if not isinstance(listed, list | None):
                    raise RegistryError(f"{self.place.registry} sent no list of {what}: check that it is a registry")
                found |= dict.fromkeys(tag for tag in listed or [] if isinstance(tag, str) and is_tag(tag))
                if not following:
                    return list(found)
                url = self._client.follow(url, following[1])
        raise RegistryError(
            f"{self.place.registry} lists more than {_MAX_TAG_PAGES} pages of {what}: check that it is a registry"
        )

    def has(self, kind: str, digest: Digest) -> bool:
        """Return whether the repository has a digest among its ``blobs`` or ``manifests``.

        Raises:
            RegistryError: if the request fails.
        """
        headers = _ACCEPTED if kind == "manifests" else {}
        url, what = self._build_url(f"{kind}/{digest}"), f"{kind} of {self.place.repository}"
        with drain_after(self._client.request("HEAD", url, what, headers, good=_ANSWERS)) as response:
            if response.status in (200, 404):
                return response.status == 200
        # The registry, or the storage that it redirects to, refuses HEAD.
        with drain_after(self._client.request("GET", url, what, headers, good=(200, 404))) as response:
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
            self._delete_upload(upload)
        return False

    def _delete_upload(self, upload: str) -> None:
        """Cancel an upload, if the registry can; otherwise the registry deletes it after some time by itself."""
        if self._deletes_uploads:
            self._deletes_uploads = False
            with drain_after(self._client.request("DELETE", upload, "an upload", {}, good=(204,), max_tries=1)):
                self._deletes_uploads = True

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
        checked = VerifiedFile(file, digest, size)
        location, sent, furthest, failed, is_whole, chunk = None, 0, 0, 0, self._accepts_whole_blobs, _CHUNK_BYTES
        while True:
            if location is None:
                advance(-sent)
                (location, min_chunk), sent = self._begin_upload(), 0
                chunk = max(chunk, min_chunk)
            body = Part(checked, sent, size - sent if is_whole else min(chunk, size - sent), advance)
            is_last = is_whole or not body.size
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(body.size)}
            if not is_last:
                headers["Content-Range"] = f"{sent}-{sent + body.size - 1}"
            method, url = ("PUT", with_query(location, {"digest": digest})) if is_last else ("PATCH", location)
            good = (201 if is_last else 202, 404, 413, 416)
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
            except RegistryError:
                if not is_whole:
                    raise
                body.take_back()
                self._accepts_whole_blobs = is_whole = False  # some registries accept content only by PATCH
                location = None
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
            if range_ and 0 < int(range_[1]) < size:  # "0-0" is ambiguous: one byte or none
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
                raise self._client.refusal(what, response)  # such as the login page of a network
        if stored is not None and stored != digest_of(data, stored):
            raise RegistryError(
                f"{self.place.registry} stored {what} as {stored}, which is not its digest: check that it is a registry"
            )
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
        others = index["manifests"] or []
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


def _build_referrers_tag(digest: Digest) -> str:
    """Return the referrers tag of a manifest (distribution specification, "Referrers Tag Schema")."""
    algorithm, encoded = split_digest(digest)
    return f"{algorithm}-{encoded[:64]}"


def _is_range(response: urllib3.BaseHTTPResponse, offset: int, size: int) -> bool:
    """Return whether an answer contains a part of a blob that begins at an offset."""
    sent = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", response.headers.get("Content-Range", "").strip())
    if sent is None or int(sent[1]) != offset:
        return False
    # A range of an encoded body is useless. But if the total is the blob's size, the body is not really encoded.
    return sent[2] == str(size) or (sent[2] == "*" and not is_encoded(response))


def _read_media_type(headers: Mapping[str, str]) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip()


def _read_digest(headers: Mapping[str, str]) -> Digest | None:
    try:
        return parse_digest(headers.get("Docker-Content-Digest", ""))
    except InvalidDigest:
        return None
