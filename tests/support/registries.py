"""Registries for the tests: one in memory, with faults on request, and real ones.

The one in memory follows the OCI distribution specification v1.1, and Docker's token authentication for bearer tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from cachedb.oci.manifests import OCI_INDEX
from cachedb.transports.registry import client, registries_conf
from tests.conftest import find_peer
from tests.support.faults import Answer, Call, Server, parse_query
from tests.support.make import ImageContent, digest_of

USER, PASSWORD, REFRESH_TOKEN = "user", "secret", "identity-token"
HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n"  # bcrypt of PASSWORD
CRANE_LOG = "crane.log"
BINARY = {"Content-Type": "application/octet-stream"}

_PATH = re.compile(r"/v2/(.+?)/(manifests|blobs/uploads|blobs|tags|referrers)/([^/]*)")
_NAME = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")
_MANIFEST_BYTES = 4 * 1024 * 1024  # of the largest manifest that is accepted


class Refusal(Exception):
    """The registry refuses a request; `answer` says why."""

    def __init__(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(code)
        body = json.dumps({"errors": [{"code": code, "message": code.replace("_", " ").lower(), "detail": None}]})
        self.answer = Answer(status, {"Content-Type": "application/json", **(headers or {})}, body.encode())


def basic(user: str = USER, password: str = PASSWORD) -> str:
    """Return the value of the Authorization header for basic authentication."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


SKIPPED_PAUSE_SECONDS: list[float] = []
"""The lengths, in seconds, of the pauses that `isolate_client` skipped."""


@pytest.fixture(autouse=True)
def isolate_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the user's and the system's configuration of registries, and skip the client's pauses."""
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name.startswith(
            ("CACHEDB_MIRRORS", "REGISTRY_", "XDG_", "DOCKER_", "CONTAINERS_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))  # else root's /run/containers is read
    monkeypatch.setattr(registries_conf, "_SYSTEM_FOLDER", str(tmp_path / "etc"))
    monkeypatch.setattr(client, "_sleep", lambda seconds, stopped: SKIPPED_PAUSE_SECONDS.append(seconds))
    SKIPPED_PAUSE_SECONDS.clear()


class Registry(Server):
    """A registry in memory, at a free port of the loopback interface; tests set its attributes.

    Args:
        auth: "basic", or "bearer" with a token server at /token; USER with PASSWORD may do everything.
        tls: paths of a certificate and its key.
    """

    def __init__(self, *, auth: str | None = None, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(tls=tls)
        self.auth = auth
        self.blobs: dict[tuple[str, str], bytes] = {}  # by repository and digest
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}  # by repository and digest or tag
        self.uploads: dict[str, tuple[str, bytes]] = {}  # repository and bytes so far, by the ID in the location
        self.referrers = True  # whether the referrers API is supported; registries before v1.1 do not
        self.page_size: int | None = None  # the most entries in one page, whatever the client asks for

        # By token: the time at which it expires, and the pairs of repository and action that it allows.
        self.tokens: dict[str, tuple[float, set[tuple[str, str]]]] = {}
        self.grants: Callable[[str, str], bool] = lambda repository, action: True  # whether a token allows an action
        self.anonymous = False  # whether anyone gets a token to pull
        self.expires_in: float | None = 300  # seconds; None: leave it out of the answer, which means 60
        self.token_fields = ["token", "access_token"]

        self.realm = f"{self.url}/token"

    def add(self, image: ImageContent, repository: str, tag: str | None = None) -> str:
        """Store an image, and return its name with the host."""
        for data in (image.config, *image.layers):
            self.blobs[repository, digest_of(data)] = data
        return self.add_manifest(image.manifest, repository, tag)

    def add_index(
        self, index: bytes, repository: str, tag: str | None = None, children: Iterable[ImageContent] = ()
    ) -> str:
        """Store an index and its images, and return its name with the host."""
        for image in children:
            self.add(image, repository)
        return self.add_manifest(index, repository, tag)

    def add_manifest(self, data: bytes, repository: str, tag: str | None = None) -> str:
        for reference in filter(None, (digest_of(data), tag)):
            self.manifests[repository, reference] = json.loads(data)["mediaType"], data
        return f"{self.host}/{repository}" + (f":{tag}" if tag else f"@{digest_of(data)}")

    def refuse(self, call: Call) -> Answer | None:
        try:
            self._authorize(call)
        except Refusal as refused:
            return refused.answer
        return None

    def serve(self, call: Call) -> Answer:
        with self.lock:
            try:
                return self._route(call)
            except Refusal as refused:
                return refused.answer

    def _route(self, call: Call) -> Answer:
        if call.path == "/token" and self.auth == "bearer":
            return self._grant_token(call)
        if call.path == "/v2/":
            return Answer(200, {"Content-Type": "application/json"}, b"{}")
        if not (match := _PATH.fullmatch(call.path)):
            raise Refusal(404, "NOT_FOUND")
        repository, kind, reference = match.groups()
        if not _NAME.fullmatch(repository):
            raise Refusal(400, "NAME_INVALID")
        method = "get" if call.method == "HEAD" else call.method.lower()
        handler: Callable[..., Answer] | None = getattr(self, f"_{method}_{kind.replace('/', '_')}", None)
        if handler is None:
            raise Refusal(405, "UNSUPPORTED")
        return handler(call, repository, reference)

    # Authorization

    def _authorize(self, call: Call) -> None:
        given = call.headers.get("authorization", "")
        if not self.auth or call.path == "/token":
            return
        if self.auth == "basic":
            if given != basic():
                raise Refusal(401, "UNAUTHORIZED", {"WWW-Authenticate": 'Basic realm="registry.test"'})
            return
        needed: dict[str, str] = {}
        if match := _PATH.fullmatch(call.path):
            actions = {"GET": "pull", "HEAD": "pull", "DELETE": "delete"}
            needed[match[1]] = actions.get(call.method, "pull,push")
            if source := call.query.get("from"):
                needed.setdefault(source, "pull")
        expires, granted = self.tokens.get(given.removeprefix("Bearer "), (0.0, set()))
        error = "invalid_token" if given else ""
        if time.monotonic() < expires:
            pairs = {(name, action) for name, actions in needed.items() for action in actions.split(",")}
            if pairs <= granted:
                return
            error = "insufficient_scope"
        fields = {
            "realm": self.realm,
            "service": "registry.test",
            "scope": " ".join(f"repository:{name}:{actions}" for name, actions in needed.items()),
            "error": error,
        }
        challenge = ",".join(f'{key}="{value}"' for key, value in fields.items() if value)
        raise Refusal(401, "UNAUTHORIZED", {"WWW-Authenticate": f"Bearer {challenge}"})

    def _grant_token(self, call: Call) -> Answer:
        form, given = call.query, call.headers.get("authorization")
        if call.method == "POST":
            form = parse_query(call.body.decode())
        if form.get("grant_type") == "refresh_token":
            known = form.get("refresh_token") == REFRESH_TOKEN
        elif form.get("grant_type") == "password":
            known = (form.get("username"), form.get("password")) == (USER, PASSWORD)
        else:
            known = call.method == "GET" and given == basic()
        if not known and (given or call.method != "GET" or not self.anonymous):
            raise Refusal(401, "UNAUTHORIZED")
        granted = set()
        for scope in form.get("scope", "").split():
            repository, _, actions = scope.removeprefix("repository:").rpartition(":")
            for action in actions.split(","):
                if (known or action == "pull") and self.grants(repository, action):
                    granted.add((repository, action))
        token = f"token-{len(self.requests)}-{digest_of(repr((form, time.monotonic())).encode())[-16:]}"
        self.tokens[token] = time.monotonic() + (60 if self.expires_in is None else self.expires_in), granted
        reply: dict[str, Any] = dict.fromkeys(self.token_fields, token)
        if self.expires_in is not None:
            reply["expires_in"] = self.expires_in
        if known and (form.get("offline_token") == "true" or form.get("access_type") == "offline"):
            reply["refresh_token"] = REFRESH_TOKEN
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(reply).encode())

    # Manifests, tags and referrers

    def _get_manifests(self, call: Call, repository: str, reference: str) -> Answer:
        media_type, data = self.manifests.get((repository, reference), ("", b""))
        accepted = [part.split(";")[0].strip() for part in call.headers.get("accept", "").split(",")]
        # Like docker-registry: a client that does not accept the media type gets a 404.
        if not data or not {media_type, "*/*"}.intersection(accepted):
            raise Refusal(404, "MANIFEST_UNKNOWN")
        digest = reference if ":" in reference else digest_of(data)
        return Answer(200, {"Content-Type": media_type, "Docker-Content-Digest": digest}, data)

    def _put_manifests(self, call: Call, repository: str, reference: str) -> Answer:
        if len(call.body) > _MANIFEST_BYTES:
            raise Refusal(413, "SIZE_INVALID")
        media_type = call.headers.get("content-type", "")
        try:
            document = json.loads(call.body)
            parts = [document["config"], *document["layers"]] if "config" in document else document["manifests"]
            digests = [part["digest"] for part in parts if "urls" not in part]
            subject = document["subject"]["digest"] if "subject" in document else None
        except (ValueError, KeyError, TypeError):
            raise Refusal(400, "MANIFEST_INVALID") from None
        if document.get("mediaType", media_type) != media_type:
            raise Refusal(400, "MANIFEST_INVALID")
        digest = _check_digest(reference, call.body) if ":" in reference else digest_of(call.body)
        if any((repository, part) not in {*self.blobs, *self.manifests} for part in digests):
            raise Refusal(400, "MANIFEST_BLOB_UNKNOWN")
        self.manifests[repository, digest] = self.manifests[repository, reference] = media_type, call.body
        headers = {"Location": f"/v2/{repository}/manifests/{digest}", "Docker-Content-Digest": digest}
        if subject and self.referrers:
            headers["OCI-Subject"] = subject
        return Answer(201, headers)

    def _delete_manifests(self, call: Call, repository: str, reference: str) -> Answer:
        found = self.manifests.get((repository, reference))
        if found is None:
            raise Refusal(404, "MANIFEST_UNKNOWN")
        for key, value in list(self.manifests.items()):
            if key == (repository, reference) or (":" in reference and key[0] == repository and value == found):
                del self.manifests[key]
        return Answer(202)

    def _get_tags(self, call: Call, repository: str, reference: str) -> Answer:
        known = {name for name, _ in (*self.manifests, *self.blobs)}
        if reference != "list" or repository not in known:
            raise Refusal(404, "NAME_UNKNOWN")
        tags = [tag for name, tag in self.manifests if name == repository and ":" not in tag]
        page, headers = self._take_page(call, tags)
        body = json.dumps({"name": repository, "tags": page}).encode()
        return Answer(200, {"Content-Type": "application/json", **headers}, body)

    def _get_referrers(self, call: Call, repository: str, reference: str) -> Answer:
        if not self.referrers:
            raise Refusal(404, "NOT_FOUND")
        found = {}
        for (name, digest), (media_type, data) in self.manifests.items():
            document = json.loads(data)
            if name == repository and ":" in digest and document.get("subject", {}).get("digest") == reference:
                kind = document.get("artifactType") or document.get("config", {}).get("mediaType")
                more = {"artifactType": kind, "annotations": document.get("annotations")}
                found[digest] = {"mediaType": media_type, "digest": digest, "size": len(data)}
                found[digest].update({key: value for key, value in more.items() if value})
        wanted = call.query.get("artifactType")
        page, headers = self._take_page(
            call, [key for key in found if wanted in (None, found[key].get("artifactType"))]
        )
        if wanted:
            headers["OCI-Filters-Applied"] = "artifactType"
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [found[digest] for digest in page]}
        return Answer(200, {"Content-Type": OCI_INDEX, **headers}, json.dumps(index).encode())

    def _take_page(self, call: Call, keys: list[str]) -> tuple[list[str], dict[str, str]]:
        """Return the page of a list that the client asks for, and the header with the link to the next page."""
        rest = sorted(key for key in keys if key > call.query.get("last", ""))
        limit = min(int(call.query.get("n", len(rest))), self.page_size or len(rest))
        page = rest[:limit]
        if not page or len(page) == len(rest):
            return page, {}
        query = urlencode({**call.query, "n": limit, "last": page[-1]})
        return page, {"Link": f'<{call.path}?{query}>; rel="next"'}

    # Blobs and uploads

    def _get_blobs(self, call: Call, repository: str, digest: str) -> Answer:
        data = self.blobs.get((repository, digest))
        if data is None:
            raise Refusal(404, "BLOB_UNKNOWN")
        headers = {**BINARY, "Docker-Content-Digest": digest, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        if not match or call.method == "HEAD":
            return Answer(200, headers, data)
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if start > end:
            raise Refusal(416, "RANGE_INVALID", {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return Answer(206, headers, data[start : end + 1])

    def _delete_blobs(self, call: Call, repository: str, digest: str) -> Answer:
        if self.blobs.pop((repository, digest), None) is None:
            raise Refusal(404, "BLOB_UNKNOWN")
        return Answer(202)

    def _post_blobs_uploads(self, call: Call, repository: str, reference: str) -> Answer:
        mount, source = call.query.get("mount", ""), call.query.get("from", "")
        if (source, mount) in self.blobs:
            return self._store(repository, mount, self.blobs[source, mount])
        if digest := call.query.get("digest"):
            return self._store(repository, _check_digest(digest, call.body), call.body)
        upload = f"upload-{len(self.requests)}-{time.monotonic_ns()}"
        self.uploads[upload] = repository, b""
        return self._upload_answer(202, upload)

    def _get_blobs_uploads(self, call: Call, repository: str, upload: str) -> Answer:
        self._find_upload(repository, upload)
        return self._upload_answer(204, upload)

    def _patch_blobs_uploads(self, call: Call, repository: str, upload: str) -> Answer:
        self._append(call, repository, upload)
        return self._upload_answer(202, upload)

    def _put_blobs_uploads(self, call: Call, repository: str, upload: str) -> Answer:
        self._append(call, repository, upload)
        data = self.uploads[upload][1]
        digest = _check_digest(call.query.get("digest", ""), data)
        del self.uploads[upload]
        return self._store(repository, digest, data)

    def _delete_blobs_uploads(self, call: Call, repository: str, upload: str) -> Answer:
        self._find_upload(repository, upload)
        del self.uploads[upload]
        return Answer(204)

    def _find_upload(self, repository: str, upload: str) -> bytes:
        name, data = self.uploads.get(upload, ("", b""))
        if name != repository:
            raise Refusal(404, "BLOB_UPLOAD_UNKNOWN")
        return data

    def _append(self, call: Call, repository: str, upload: str) -> None:
        data = self._find_upload(repository, upload)
        match = re.fullmatch(r"(\d+)-\d+", given := call.headers.get("content-range", ""))
        # The client must use the location of the last answer, which has the current state.
        if call.query.get("state") != str(len(data)) or (given and (not match or int(match[1]) != len(data))):
            refused = Refusal(416, "BLOB_UPLOAD_INVALID")
            refused.answer.headers.update(self._upload_answer(416, upload).headers)
            raise refused
        self.uploads[upload] = repository, data + call.body

    def _upload_answer(self, status: int, upload: str) -> Answer:
        repository, data = self.uploads[upload]
        location = f"/v2/{repository}/blobs/uploads/{upload}?state={len(data)}"
        return Answer(status, {"Location": location, "Range": f"0-{max(len(data) - 1, 0)}"})

    def _store(self, repository: str, digest: str, data: bytes) -> Answer:
        self.blobs[repository, digest] = data
        location = f"/v2/{repository}/blobs/{digest}"
        return Answer(201, {"Location": location, "Docker-Content-Digest": digest})


def _check_digest(digest: str, data: bytes) -> str:
    algorithm = digest.partition(":")[0]
    if algorithm not in ("sha256", "sha512") or digest != f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}":
        raise Refusal(400, "DIGEST_INVALID")
    return digest


def certificate(directory: Path, host: str = "localhost") -> tuple[Path, Path, Path]:
    """Make an authority and a certificate for a host; return their paths and the path of the key.

    The folder fits skopeo's --cert-dir: a file named .crt is an authority, and no other file may be .cert or .key.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "openssl.cnf").write_text(
        f"""
        [req]
        distinguished_name = name
        [name]
        [authority]
        subjectKeyIdentifier = hash
        basicConstraints = critical, CA:true
        keyUsage = critical, keyCertSign, cRLSign
        [server]
        subjectKeyIdentifier = hash
        authorityKeyIdentifier = keyid
        basicConstraints = critical, CA:false
        subjectAltName = {"IP" if host.replace(".", "").isdigit() else "DNS"}:{host}
        """
    )
    common = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-batch"]
    sign = ["-CA", str(directory / "authority.crt"), "-CAkey", str(directory / "authority-key.pem")]
    for name, file, signer in (("authority", "authority.crt", []), ("server", "server.pem", sign)):
        command = [find_peer("openssl"), "req", "-x509", *common, "-subj", f"/CN={name} of the tests", *signer]
        command += ["-config", str(directory / "openssl.cnf"), "-extensions", name]
        command += ["-keyout", str(directory / f"{name}-key.pem"), "-out", str(directory / file)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    return directory / "authority.crt", directory / "server.pem", directory / "server-key.pem"


@contextmanager
def docker_registry(
    tmp_path: Path,
    *,
    program: str = "docker-registry",
    htpasswd: str | None = None,
    delete: bool = True,
    tls: tuple[Path, Path] | None = None,
    proxy: str | None = None,
) -> Iterator[str]:
    """Run the registry of distribution during the block, and yield its host and port.

    Args:
        tmp_path: the folder for its files.
        program: "docker-registry", which is Debian's release 2, or "registry", which is release 3.
        htpasswd: the content of an htpasswd file with bcrypt hashes, such as HTPASSWD.
        delete: whether it allows deletion.
        tls: paths of a certificate and its key.
        proxy: the URL of another registry that it caches.
    """
    folder = tmp_path / "docker-registry"
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}, "delete": {"enabled": delete}},
        "http": {"addr": "127.0.0.1:0", "secret": "not a real secret"},
    }
    if htpasswd is not None:
        (folder / "htpasswd").write_text(htpasswd)
        settings["auth"] = {"htpasswd": {"realm": "registry.test", "path": str(folder / "htpasswd")}}
    if tls is not None:
        settings["http"]["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
    if proxy is not None:
        settings["proxy"] = {"remoteurl": proxy}
    (folder / "config.yml").write_text(json.dumps(settings))  # JSON is YAML too
    command = [find_peer(program), "serve", str(folder / "config.yml")]
    with _serve(command, folder / "log", r'listening on ([\d.:]+)[",]') as host:
        yield host


@contextmanager
def crane_registry(tmp_path: Path) -> Iterator[str]:
    """Run the registry of crane, in memory, during the block, and yield its host and port.

    Args:
        tmp_path: the folder for its log, which has a line for each request.
    """
    command = [find_peer("crane"), "registry", "serve", "--address", "127.0.0.1:0"]
    with _serve(command, tmp_path / CRANE_LOG, r"serving on port (\d+)\n") as port:
        yield f"127.0.0.1:{port}"


@contextmanager
def _serve(command: list[str], path: Path, pattern: str) -> Iterator[str]:
    """Run a server that chooses a port, and logs it once the port is open; yield what the pattern matches."""
    with path.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            end = time.monotonic() + 30
            while not (match := re.search(pattern, text := path.read_text())):
                assert process.poll() is None, text
                assert time.monotonic() < end, text
                time.sleep(0.02)
            yield match[1]
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


REGISTRIES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "docker-registry": docker_registry,
    "distribution-3": partial(docker_registry, program="registry"),
    "crane": crane_registry,
}
"""The real registries, by the name of the test's parameter."""
