"""The registry of the test support follows the specification, and produces the faults that a test asks for."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest

from cachedb.oci.manifests import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from tests.peers.test_archives import Tools
from tests.support import faults, make
from tests.support.make import digest_of
from tests.support.registries import (
    HTPASSWD,
    PASSWORD,
    REFRESH_TOKEN,
    USER,
    Registry,
    basic,
    certificate,
    docker_registry,
)

IMAGE = make.image(1, 2, compression="gzip")
LAYER = IMAGE.layers[0]
BLOB = f"/v2/team/app/blobs/{digest_of(LAYER)}"
MANIFEST = "/v2/team/app/manifests/1"
UPLOADS = "/v2/team/app/blobs/uploads/"
ACCEPT = {"Accept": f"{OCI_MANIFEST}, {OCI_INDEX}"}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["errors"][0]["code"])


def ask(registry: Registry, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    """Send a request over a new connection."""
    connection = http.client.HTTPConnection(registry.host, timeout=10)
    try:
        return ask_on(connection, method, path, body, **headers)
    finally:
        connection.close()


def ask_on(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    with connection.getresponse() as response:
        return Reply(response.status, response.headers, response.read())


@pytest.fixture
def registry() -> Iterator[Registry]:
    """Run a registry with the image team/app:1."""
    with Registry() as running:
        running.add(IMAGE, "team/app", "1")
        yield running


# Correct answers


def test_the_base_url_answers(registry: Registry) -> None:
    assert ask(registry, "GET", "/v2/").status == 200


@pytest.mark.parametrize("reference", ["1", IMAGE.digest])
def test_a_manifest_is_returned_by_tag_and_by_digest(registry: Registry, reference: str) -> None:
    for method, body in (("GET", IMAGE.manifest), ("HEAD", b"")):
        reply = ask(registry, method, f"/v2/team/app/manifests/{reference}", **ACCEPT)
        assert (reply.status, reply.body) == (200, body)
        assert reply.headers["Docker-Content-Digest"] == IMAGE.digest
        assert reply.headers["Content-Type"] == OCI_MANIFEST
        assert reply.headers["Content-Length"] == str(len(IMAGE.manifest))


def test_a_manifest_is_returned_only_if_its_type_is_accepted(registry: Registry) -> None:
    assert ask(registry, "GET", MANIFEST, Accept="*/*").status == 200
    assert ask(registry, "GET", MANIFEST, Accept=OCI_INDEX).status == 404
    assert ask(registry, "GET", MANIFEST).status == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/team/app/manifests/2", 404, "MANIFEST_UNKNOWN"),
        ("GET", BLOB.replace("team/app", "other"), 404, "BLOB_UNKNOWN"),
        ("GET", "/v2/other/tags/list", 404, "NAME_UNKNOWN"),
        ("GET", "/v2/Team/tags/list", 400, "NAME_INVALID"),
        ("GET", UPLOADS + "none", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("DELETE", "/v2/team/app/manifests/2", 404, "MANIFEST_UNKNOWN"),
        ("DELETE", BLOB.replace("team/app", "other"), 404, "BLOB_UNKNOWN"),
        ("DELETE", "/v2/team/app/tags/list", 405, "UNSUPPORTED"),
        ("GET", "/elsewhere", 404, "NOT_FOUND"),
    ],
)
def test_an_error_has_a_code(registry: Registry, method: str, path: str, status: int, code: str) -> None:
    reply = ask(registry, method, path)
    assert (reply.status, reply.code) == (status, code)
    assert reply.headers["Content-Type"] == "application/json"


def test_a_blob_is_returned_completely_or_in_a_range(registry: Registry) -> None:
    assert ask(registry, "GET", BLOB).body == LAYER
    head = ask(registry, "HEAD", BLOB)
    assert (head.status, head.headers["Content-Length"], head.body) == (200, str(len(LAYER)), b"")
    part = ask(registry, "GET", BLOB, Range="bytes=100-")
    assert (part.status, part.body) == (206, LAYER[100:])
    assert part.headers["Content-Range"] == f"bytes 100-{len(LAYER) - 1}/{len(LAYER)}"
    assert ask(registry, "GET", BLOB, Range="bytes=5-9").body == LAYER[5:10]
    beyond = ask(registry, "GET", BLOB, Range=f"bytes={len(LAYER)}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(LAYER)}")


def test_requests_of_one_connection_are_recorded_in_order(registry: Registry) -> None:
    connection = http.client.HTTPConnection(registry.host, timeout=10)
    ask_on(connection, "HEAD", BLOB)
    first = connection.sock
    ask_on(connection, "POST", UPLOADS + "?mount=sha256:0&from=x", b"unread?")
    ask_on(connection, "GET", MANIFEST, **ACCEPT)
    assert connection.sock is first
    connection.close()
    assert [(seen.method, seen.status) for seen in registry.requests] == [("HEAD", 200), ("POST", 202), ("GET", 200)]
    assert registry.requests[1].query == {"mount": "sha256:0", "from": "x"}
    assert registry.requests[1].size == 7
    assert registry.requests[2].headers["accept"] == ACCEPT["Accept"]
    assert registry.count("GET") == registry.count(path="/manifests/") == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_blob_is_uploaded_in_consecutive_chunks(registry: Registry, chunked: bool) -> None:
    start = ask(registry, "POST", UPLOADS)
    assert start.status == 202
    body: Any = iter([b"hello ", b"world"]) if chunked else b"hello world"  # http.client sends an iterator in chunks
    first = ask(registry, "PATCH", start.headers["Location"], body, Content_Range="0-10")
    assert (first.status, first.headers["Range"]) == (202, "0-10")
    place = first.headers["Location"]
    assert ask(registry, "PATCH", place, b"!", Content_Range="10-10").status == 416
    assert ask(registry, "PATCH", start.headers["Location"], b"!").status == 416
    state = ask(registry, "GET", start.headers["Location"])
    assert (state.status, state.headers["Range"], state.headers["Location"]) == (204, "0-10", place)
    wrong = ask(registry, "PUT", f"{place}&digest={digest_of(b'other')}", b"!")
    assert (wrong.status, wrong.code) == (400, "DIGEST_INVALID")
    place = ask(registry, "GET", place).headers["Location"]
    done = ask(registry, "PUT", f"{place}&digest={digest_of(b'hello world!')}")
    assert done.status == 201
    assert ask(registry, "GET", done.headers["Location"]).body == b"hello world!"
    assert ask(registry, "GET", place).status == 404


def test_a_blob_is_uploaded_in_one_request_or_two(registry: Registry) -> None:
    digest = digest_of(b"one", "sha512")
    assert ask(registry, "POST", f"{UPLOADS}?digest={digest}", b"one").status == 201
    assert registry.blobs["team/app", digest] == b"one"
    place = ask(registry, "POST", UPLOADS).headers["Location"]
    assert ask(registry, "PUT", f"{place}&digest={digest_of(b'two')}", b"two").status == 201
    assert registry.blobs["team/app", digest_of(b"two")] == b"two"
    assert ask(registry, "POST", f"{UPLOADS}?digest=md5:0", b"one").code == "DIGEST_INVALID"


@pytest.mark.parametrize(
    ("kind", "part"), [("Content-Length: 10", b"hello"), ("Transfer-Encoding: chunked", b"a\r\nhello")]
)
def test_the_received_part_of_a_chunk_is_kept_when_the_client_disconnects(
    registry: Registry, kind: str, part: bytes
) -> None:
    place = ask(registry, "POST", UPLOADS).headers["Location"]
    with socket.create_connection(("127.0.0.1", registry.port)) as connection:
        connection.sendall(f"PATCH {place} HTTP/1.1\r\n{kind}\r\n\r\n".encode() + part)
        connection.shutdown(socket.SHUT_WR)
        receive_all(connection)
    state = ask(registry, "GET", place)
    assert state.headers["Range"] == "0-4"
    assert ask(registry, "PATCH", state.headers["Location"], b" world").headers["Range"] == "0-10"


def test_an_upload_can_be_cancelled(registry: Registry) -> None:
    place = ask(registry, "POST", UPLOADS).headers["Location"]
    assert ask(registry, "DELETE", place).status == 204
    assert not registry.uploads


def test_a_blob_is_mounted_from_a_repository_that_has_it(registry: Registry) -> None:
    mount = f"/v2/new/blobs/uploads/?mount={digest_of(LAYER)}&from="
    assert ask(registry, "POST", mount + "other").status == 202
    assert ("new", digest_of(LAYER)) not in registry.blobs
    assert ask(registry, "POST", mount + "team/app").status == 201
    assert registry.blobs["new", digest_of(LAYER)] == LAYER


def test_a_manifest_is_accepted_if_all_its_references_exist(registry: Registry) -> None:
    put = {"Content_Type": OCI_MANIFEST}
    missing = ask(registry, "PUT", "/v2/new/manifests/1", IMAGE.manifest, **put)
    assert (missing.status, missing.code) == (400, "MANIFEST_BLOB_UNKNOWN")
    for digest, data in IMAGE.blobs.items():
        registry.blobs["new", digest] = data
    wrong = ask(registry, "PUT", f"/v2/new/manifests/{digest_of(b'')}", IMAGE.manifest, **put)
    assert (wrong.status, wrong.code) == (400, "DIGEST_INVALID")
    assert ask(registry, "PUT", "/v2/new/manifests/1", IMAGE.manifest, Content_Type=OCI_INDEX).status == 400
    assert ask(registry, "PUT", "/v2/new/manifests/1", b"[]", **put).code == "MANIFEST_INVALID"
    assert ask(registry, "PUT", "/v2/new/manifests/1", bytes(2**22 + 1), **put).status == 413
    done = ask(registry, "PUT", "/v2/new/manifests/1", IMAGE.manifest, **put)
    assert (done.status, done.headers["Docker-Content-Digest"]) == (201, IMAGE.digest)
    assert done.headers["OCI-Subject"] is None
    index = make.index(IMAGE)
    assert ask(registry, "PUT", "/v2/new/manifests/all", index, Content_Type=OCI_INDEX).status == 201
    index = make.index(IMAGE, make.image(3))
    assert ask(registry, "PUT", "/v2/new/manifests/all", index, Content_Type=OCI_INDEX).status == 400


def test_add_index_stores_the_index_and_its_images(registry: Registry) -> None:
    index = make.index(IMAGE, make.image(3))
    name = registry.add_index(index, "multi", "1", [IMAGE, make.image(3)])
    assert name == f"{registry.host}/multi:1"
    assert ask(registry, "GET", "/v2/multi/manifests/1", **ACCEPT).body == index
    assert ask(registry, "GET", f"/v2/multi/manifests/{make.image(3).digest}", **ACCEPT).status == 200
    assert json.loads(ask(registry, "GET", "/v2/multi/tags/list").body)["tags"] == ["1"]


def test_deleting_a_tag_keeps_the_manifest_and_deleting_a_manifest_removes_its_tags(registry: Registry) -> None:
    registry.add(IMAGE, "team/app", "2")
    registry.add(IMAGE, "other", "1")
    assert ask(registry, "DELETE", MANIFEST).status == 202
    assert set(registry.manifests) == {
        ("team/app", "2"),
        ("team/app", IMAGE.digest),
        ("other", "1"),
        ("other", IMAGE.digest),
    }
    assert ask(registry, "DELETE", f"/v2/team/app/manifests/{IMAGE.digest}").status == 202
    assert set(registry.manifests) == {("other", "1"), ("other", IMAGE.digest)}
    assert ask(registry, "DELETE", BLOB).status == 202
    assert ask(registry, "HEAD", BLOB).status == 404


@pytest.mark.parametrize("page_size", [None, 2])
def test_tags_are_listed_in_pages(registry: Registry, page_size: int | None) -> None:
    for tag in ("3", "2", "latest", "4"):
        registry.add(IMAGE, "team/app", tag)
    registry.page_size = page_size
    path, pages = "/v2/team/app/tags/list" + ("" if page_size else "?n=2"), []
    while path:
        reply = ask(registry, "GET", path)
        pages.append(json.loads(reply.body)["tags"])
        link = reply.headers["Link"]
        assert link is None or link.endswith('>; rel="next"')
        path = link and link[1 : link.index(">")]
    assert pages == [["1", "2"], ["3", "4"], ["latest"]]
    assert json.loads(ask(registry, "GET", "/v2/team/app/tags/list?n=0").body)["tags"] == []


def test_referrers_are_found_and_filtered(registry: Registry) -> None:
    subject = make.descriptor(IMAGE.manifest, OCI_MANIFEST)
    signatures = [dict(json.loads(IMAGE.manifest), subject=subject, annotations={"by": who}) for who in ("a", "b")]
    signatures[0]["artifactType"] = "application/example"
    for document in signatures:
        data = json.dumps(document).encode()
        reply = ask(registry, "PUT", f"/v2/team/app/manifests/{digest_of(data)}", data, Content_Type=OCI_MANIFEST)
        assert (reply.status, reply.headers["OCI-Subject"]) == (201, IMAGE.digest)
    path = f"/v2/team/app/referrers/{IMAGE.digest}"
    reply = ask(registry, "GET", path)
    assert reply.headers["Content-Type"] == OCI_INDEX
    found = {entry["artifactType"]: entry["annotations"] for entry in json.loads(reply.body)["manifests"]}
    assert found == {"application/example": {"by": "a"}, OCI_CONFIG: {"by": "b"}}
    assert reply.headers["OCI-Filters-Applied"] is None
    filtered = ask(registry, "GET", path + "?artifactType=application/example")
    assert len(json.loads(filtered.body)["manifests"]) == 1
    assert filtered.headers["OCI-Filters-Applied"] == "artifactType"
    assert json.loads(ask(registry, "GET", path.replace(IMAGE.digest, digest_of(b""))).body)["manifests"] == []
    registry.page_size = 1
    assert 'rel="next"' in ask(registry, "GET", path).headers["Link"]
    registry.referrers = False
    assert ask(registry, "GET", path).status == 404


# Authorization


@pytest.fixture
def guarded() -> Iterator[Registry]:
    """Run a registry with an image that requires bearer tokens."""
    with Registry(auth="bearer") as running:
        running.add(IMAGE, "team/app", "1")
        yield running


def token(registry: Registry, scope: str, **headers: str) -> str:
    headers = headers or {"Authorization": basic()}
    reply = ask(registry, "GET", "/token?" + urlencode({"service": "registry.test", "scope": scope}), **headers)
    assert reply.status == 200
    return "Bearer " + str(json.loads(reply.body)["token"])


def test_basic_auth_is_required() -> None:
    with Registry(auth="basic") as registry:
        reply = ask(registry, "GET", "/v2/")
        assert (reply.status, reply.code) == (401, "UNAUTHORIZED")
        assert reply.headers["WWW-Authenticate"] == 'Basic realm="registry.test"'
        assert ask(registry, "GET", "/v2/", Authorization=basic(password="wrong")).status == 401
        assert ask(registry, "GET", "/v2/", Authorization=basic()).status == 200


def test_a_challenge_names_the_needed_scope(guarded: Registry) -> None:
    start = f'Bearer realm="http://{guarded.host}/token",service="registry.test"'
    scopes = {
        ("GET", "/v2/"): "",
        ("GET", MANIFEST): ',scope="repository:team/app:pull"',
        ("POST", UPLOADS): ',scope="repository:team/app:pull,push"',
        ("DELETE", BLOB): ',scope="repository:team/app:delete"',
        ("POST", UPLOADS + "?mount=x&from=b"): ',scope="repository:team/app:pull,push repository:b:pull"',
    }
    for (method, path), scope in scopes.items():
        reply = ask(guarded, method, path)
        assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, start + scope)


def test_a_token_is_valid_for_its_scope_only(guarded: Registry) -> None:
    pull = token(guarded, "repository:team/app:pull")
    assert ask(guarded, "GET", "/v2/", Authorization=pull).status == 200
    assert ask(guarded, "GET", BLOB, Authorization=pull).body == LAYER
    for method, path in (("GET", BLOB.replace("team/app", "other")), ("POST", UPLOADS)):
        reply = ask(guarded, method, path, Authorization=pull)
        assert reply.status == 401
        assert reply.headers["WWW-Authenticate"].endswith('error="insufficient_scope"')
    both = token(guarded, "repository:team/app:pull,push repository:b:pull")
    assert ask(guarded, "POST", UPLOADS + "?mount=x&from=b", Authorization=both).status == 202
    assert (
        ask(guarded, "GET", BLOB, Authorization="Bearer mine")
        .headers["WWW-Authenticate"]
        .endswith('error="invalid_token"')
    )


def test_a_token_expires(guarded: Registry) -> None:
    guarded.expires_in = 0.05
    short = token(guarded, "repository:team/app:pull")
    time.sleep(0.06)
    assert ask(guarded, "GET", BLOB, Authorization=short).status == 401
    guarded.expires_in = 300
    long = token(guarded, "repository:team/app:pull")
    assert ask(guarded, "GET", BLOB, Authorization=long).status == 200
    guarded.tokens.clear()
    assert ask(guarded, "GET", BLOB, Authorization=long).status == 401


def test_a_token_contains_only_granted_actions(guarded: Registry) -> None:
    path = "/token?scope=repository:team/app:pull,push"
    assert ask(guarded, "GET", path).status == 401
    assert ask(guarded, "GET", path, Authorization=basic("other")).status == 401
    guarded.anonymous = True
    assert ask(guarded, "GET", path, Authorization=basic("other")).status == 401
    anyone = token(guarded, "repository:team/app:pull,push", Accept="*/*")
    assert ask(guarded, "GET", BLOB, Authorization=anyone).status == 200
    assert ask(guarded, "POST", UPLOADS, Authorization=anyone).status == 401
    guarded.grants = lambda repository, action: action == "pull"
    mine = token(guarded, "repository:team/app:pull,push")
    assert ask(guarded, "POST", UPLOADS, Authorization=mine).status == 401


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"grant_type": "refresh_token", "refresh_token": REFRESH_TOKEN}, 200),
        ({"grant_type": "refresh_token", "refresh_token": "other"}, 401),
        ({"grant_type": "password", "username": USER, "password": PASSWORD, "access_type": "offline"}, 200),
        ({"grant_type": "password", "username": USER, "password": "other"}, 401),
        ({}, 401),
    ],
)
def test_a_token_is_returned_to_a_post(guarded: Registry, form: dict[str, str], status: int) -> None:
    guarded.token_fields = ["access_token"]
    guarded.expires_in = None
    reply = ask(guarded, "POST", "/token", urlencode({**form, "scope": "repository:team/app:pull"}))
    assert reply.status == status
    if status == 200:
        given = json.loads(reply.body)
        assert set(given) - {"refresh_token"} == {"access_token"}
        assert given.get("refresh_token") == (REFRESH_TOKEN if "access_type" in form else None)
        assert ask(guarded, "GET", BLOB, Authorization=f"Bearer {given['access_token']}").status == 200


# Faults


def test_a_fault_happens_as_often_and_where_it_should(registry: Registry) -> None:
    registry.fault(faults.answer(503, {"X": "y"}, b"busy"), method="GET", path="/blobs/", times=2)
    assert ask(registry, "GET", MANIFEST, **ACCEPT).status == ask(registry, "HEAD", BLOB).status == 200
    reply = ask(registry, "GET", BLOB)
    assert (reply.status, reply.headers["X"], reply.body) == (503, "y", b"busy")
    assert [ask(registry, "GET", BLOB).status for _ in range(2)] == [503, 200]


def test_a_request_that_a_fault_answers_has_no_effect(registry: Registry) -> None:
    registry.fault(faults.answer(500), method="POST", times=faults.ALWAYS)
    assert [ask(registry, "POST", UPLOADS, b"data").status for _ in range(3)] == [500] * 3
    assert not registry.uploads


def test_a_fault_happens_after_authorization_unless_it_is_first(guarded: Registry) -> None:
    guarded.fault(faults.answer(500), path="/blobs/")
    assert ask(guarded, "GET", BLOB).status == 401
    assert ask(guarded, "GET", BLOB, Authorization=token(guarded, "repository:team/app:pull")).status == 500
    guarded.fault(faults.answer_html(), path="/v2/$", first=True)
    reply = ask(guarded, "GET", "/v2/")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html")


def test_the_fault_retry_later_sets_retry_after(registry: Registry) -> None:
    registry.fault(faults.retry_later(3))
    registry.fault(faults.retry_later(30, 503, date=True))
    assert ask(registry, "GET", "/v2/").headers["Retry-After"] == "3"
    before = time.time()
    later = ask(registry, "GET", "/v2/")
    assert later.status == 503
    when = parsedate_to_datetime(later.headers["Retry-After"]).timestamp()  # in whole seconds
    assert before + 29 < when <= time.time() + 30


@pytest.mark.parametrize(("cut", "reset"), [(100, False), (0, False), (100, True)])
def test_a_fault_can_cut_the_connection_within_the_body(registry: Registry, cut: int, reset: bool) -> None:
    registry.fault(faults.change_answer(cut=cut, reset=reset))
    with socket.create_connection(("127.0.0.1", registry.port)) as connection:
        connection.sendall(f"GET {BLOB} HTTP/1.1\r\n\r\n".encode())
        data = receive_all(connection)
    head, _, body = data[0].partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(LAYER) in head
    assert body == LAYER[:cut]
    assert data[1] is reset


def receive_all(connection: socket.socket) -> tuple[bytes, bool]:
    """Return all received bytes, and whether the connection was reset."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        return data, True
    return data, False


@pytest.mark.parametrize("reset", [False, True])
def test_a_fault_can_close_the_connection_before_an_answer(registry: Registry, reset: bool) -> None:
    registry.fault(faults.closed(reset=reset))
    with pytest.raises(ConnectionResetError if reset else http.client.RemoteDisconnected) as caught:
        ask(registry, "POST", UPLOADS)
    assert type(caught.value) is (ConnectionResetError if reset else http.client.RemoteDisconnected)
    assert not registry.uploads
    assert registry.requests[-1].status == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_fault_can_lose_the_answer_to_a_partial_upload(registry: Registry, chunked: bool) -> None:
    place = ask(registry, "POST", UPLOADS).headers["Location"]
    registry.fault(faults.drop_answer(5), method="PATCH")
    with pytest.raises(ConnectionError):
        ask(registry, "PATCH", place, iter([b"hello world"]) if chunked else b"hello world")
    state = ask(registry, "GET", place)
    assert state.headers["Range"] == "0-4"
    assert ask(registry, "PATCH", state.headers["Location"], b" world", Content_Range="5-10").status == 202


def test_a_fault_can_lose_the_answer_to_a_completed_request(registry: Registry) -> None:
    registry.fault(faults.drop_answer(), method="DELETE")
    with pytest.raises(ConnectionError):
        ask(registry, "DELETE", MANIFEST)
    assert ("team/app", "1") not in registry.manifests


def test_a_fault_can_answer_before_the_body_is_read(registry: Registry) -> None:
    registry.fault(faults.answer(413, early=True), method="POST")
    reply = ask(registry, "POST", UPLOADS, bytes(8 * 1024 * 1024))
    assert reply.status == 413
    assert registry.requests[-1].size == 0


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"delay": 0.1}, {"drip": 0.1 / len(LAYER)}])
def test_a_fault_can_delay_or_slow_down_an_answer(registry: Registry, fields: dict[str, float]) -> None:
    registry.fault(faults.change_answer(**fields))
    begin = time.monotonic()
    assert ask(registry, "GET", BLOB).body == LAYER
    assert time.monotonic() - begin >= 0.1


def test_a_registry_with_a_delayed_answer_stops_at_once() -> None:
    begin = time.monotonic()
    with Registry() as registry, socket.create_connection(("127.0.0.1", registry.port)) as connection:
        registry.fault(faults.change_answer(delay=60))
        connection.sendall(b"GET /v2/ HTTP/1.1\r\n\r\n")
        while not registry.requests:
            time.sleep(0.01)
    assert time.monotonic() - begin < 30


def test_a_fault_can_change_bodies_and_headers(registry: Registry) -> None:
    def fault(do: faults.Do) -> Reply:
        registry.fault(do)
        return ask(registry, "GET", BLOB)

    corrupt = fault(faults.corrupt_body(7)).body
    assert [at for at in range(len(LAYER)) if corrupt[at] != LAYER[at]] == [7]
    assert len(corrupt) == len(LAYER)
    assert fault(faults.rewrite_body(lambda data: b"another")).body == b"another"
    assert fault(faults.append_bytes(b"x")).body == LAYER  # http.client reads only to Content-Length
    assert fault(faults.change_headers({"Content-Length": "5"})).body == LAYER[:5]
    assert (
        fault(faults.change_headers({"Docker-Content-Digest": "sha256:0"})).headers["Docker-Content-Digest"]
        == "sha256:0"
    )
    assert fault(faults.change_headers({"Docker-Content-Digest": None})).headers["Docker-Content-Digest"] is None
    chunked = fault(faults.change_headers({"Content-Length": None, "Transfer-Encoding": "chunked"}))
    assert (chunked.body, chunked.headers["Content-Length"]) == (LAYER, None)
    with pytest.raises(http.client.IncompleteRead):
        fault(faults.change_headers({"Content-Length": str(len(LAYER) + 1)}, cut=len(LAYER)))


def test_a_fault_can_send_more_bytes_than_content_length(registry: Registry) -> None:
    registry.fault(faults.append_bytes(b"extra"))
    with socket.create_connection(("127.0.0.1", registry.port)) as connection:
        connection.sendall(f"GET {BLOB} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        data, _ = receive_all(connection)
    assert data.endswith(LAYER + b"extra")
    assert b"Content-Length: %d" % len(LAYER) in data


@pytest.mark.parametrize("chunked", [False, True])
def test_a_fault_can_send_an_endless_body(registry: Registry, chunked: bool) -> None:
    registry.fault(faults.answer_endlessly(chunked=chunked))
    connection = http.client.HTTPConnection(registry.host, timeout=10)
    connection.request("GET", BLOB)
    with connection.getresponse() as response:
        assert response.length is None
        assert len(response.read(5_000_000)) == 5_000_000
    connection.close()


def test_a_fault_can_ignore_a_range_or_answer_it_wrongly(registry: Registry) -> None:
    registry.fault(faults.ignore_part(header="range"))
    reply = ask(registry, "GET", BLOB, Range="bytes=5-")
    assert (reply.status, reply.body) == (200, LAYER)
    assert registry.requests[-1].headers["range"] == "bytes=5-"
    registry.fault(faults.change_headers({"Content-Range": "bytes 0-9/10"}))
    reply = ask(registry, "GET", BLOB, Range="bytes=5-")
    assert (reply.status, reply.headers["Content-Range"]) == (206, "bytes 0-9/10")


def test_a_fault_can_disable_mounts(registry: Registry) -> None:
    registry.fault(faults.ignore_part(query="mount"))
    assert ask(registry, "POST", f"/v2/new/blobs/uploads/?mount={digest_of(LAYER)}&from=team/app").status == 202


def test_a_fault_can_redirect_to_another_server(registry: Registry) -> None:
    with Registry() as storage:
        storage.blobs = registry.blobs
        registry.fault(faults.redirect(storage.url))
        reply = ask(registry, "GET", BLOB + "?a=b")
        assert (reply.status, reply.headers["Location"]) == (307, f"http://{storage.host}{BLOB}?a=b")
        assert ask(storage, "GET", BLOB, Authorization="Bearer x").body == LAYER
        assert storage.requests[0].headers["authorization"] == "Bearer x"
    registry.fault(faults.redirect(registry.url), times=faults.ALWAYS)
    assert [ask(registry, "GET", BLOB).headers["Location"] for _ in range(2)] == [registry.url + BLOB] * 2


def test_an_error_in_the_registry_itself_fails_the_test() -> None:
    def raise_error(call: faults.Call) -> faults.Answer:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Registry() as registry:  # noqa: PT012
        registry.fault(raise_error)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(registry, "GET", "/v2/")


# TLS, and peers


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return certificate(tmp_path_factory.mktemp("certificates"))


def test_a_certificate_is_valid_for_its_host_only(certificates: tuple[Path, Path, Path]) -> None:
    authority, *pair = certificates
    context = ssl.create_default_context(cafile=str(authority))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of Python 3.13
    with Registry(tls=(pair[0], pair[1])) as registry:
        registry.fault(faults.change_answer(cut=0, reset=True), path="/elsewhere")
        connection = http.client.HTTPSConnection("localhost", registry.port, context=context, timeout=10)
        assert ask_on(connection, "GET", "/v2/").status == 200
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            ask_on(connection, "GET", "/elsewhere")
        connection.close()
        for host, trust in (("127.0.0.1", context), ("localhost", ssl.create_default_context())):
            connection = http.client.HTTPSConnection(host, registry.port, context=trust, timeout=10)
            with pytest.raises(ssl.SSLCertVerificationError):
                connection.request("GET", "/v2/")
            connection.close()


@pytest.fixture
def tools(tmp_path: Path, peer: Callable[[str], str]) -> Tools:
    return Tools(tmp_path / "home", peer)


def round_trip(tools: Tools, tmp_path: Path, host: str, *, creds: str = "", cert_dir: Path | None = None) -> None:
    """Push an image with skopeo and pull it again; check that the blobs are the same."""
    layout = make.write(tmp_path / "layout", make.oci_files({"app:1": IMAGE}))

    def options(side: str) -> list[str]:
        found = [f"--{side}-tls-verify=false"] if cert_dir is None else [f"--{side}-cert-dir={cert_dir}"]
        return found + ([f"--{side}-creds={creds}"] if creds else [])

    tools("skopeo", "copy", *options("dest"), f"oci:{layout}:app:1", f"docker://{host}/team/app:1")
    tools("skopeo", "copy", *options("src"), f"docker://{host}/team/app:1", f"oci:{tmp_path}/back:app:1")
    back = {path.name for path in (tmp_path / "back" / "blobs" / "sha256").iterdir()}
    assert {f"sha256:{name}" for name in back} == set(IMAGE.blobs)


@pytest.mark.parametrize("auth", [None, "basic", "bearer"])
def test_skopeo_pushes_and_pulls(tools: Tools, tmp_path: Path, auth: str | None) -> None:
    with Registry(auth=auth) as registry:
        round_trip(tools, tmp_path, registry.host, creds=f"{USER}:{PASSWORD}" if auth else "")
        assert registry.manifests["team/app", "1"] == (OCI_MANIFEST, IMAGE.manifest)
        if auth:
            with pytest.raises(AssertionError, match=r"unauthorized|authentication required"):
                round_trip(tools, tmp_path, registry.host, creds=f"{USER}:wrong")


def test_skopeo_pushes_and_pulls_over_tls(tools: Tools, tmp_path: Path, certificates: tuple[Path, Path, Path]) -> None:
    authority, *pair = certificates
    with Registry(tls=(pair[0], pair[1])) as registry:
        round_trip(tools, tmp_path, f"localhost:{registry.port}", cert_dir=authority.parent)


def test_skopeo_lists_all_pages_of_tags(tools: Tools, registry: Registry) -> None:
    registry.add(IMAGE, "team/app", "2")
    registry.page_size = 1
    listed = tools("skopeo", "list-tags", "--tls-verify=false", f"docker://{registry.host}/team/app")
    assert json.loads(listed)["Tags"] == ["1", "2"]


def test_skopeo_copies_an_index(tools: Tools, tmp_path: Path, registry: Registry) -> None:
    children = [IMAGE, make.image(3, compression="gzip")]
    name = registry.add_index(make.index(*children), "multi", "1", children)
    target = f"docker://{registry.host}/copy:1"
    verify = ["--src-tls-verify=false", "--dest-tls-verify=false"]
    tools("skopeo", "copy", "--all", "--preserve-digests", *verify, f"docker://{name}", target)
    assert registry.manifests["copy", "1"] == (OCI_INDEX, make.index(*children))
    assert all(("copy", child.digest) in registry.manifests for child in children)


@pytest.mark.parametrize("htpasswd", [None, HTPASSWD], ids=["open", "htpasswd"])
def test_docker_registry_works_with_skopeo(tools: Tools, tmp_path: Path, htpasswd: str | None) -> None:
    with docker_registry(tmp_path, htpasswd=htpasswd) as host:
        round_trip(tools, tmp_path, host, creds=f"{USER}:{PASSWORD}" if htpasswd else "")
        if htpasswd:
            with pytest.raises(AssertionError, match=r"unauthorized|authentication required"):
                round_trip(tools, tmp_path, host, creds=f"{USER}:wrong")


def test_docker_registry_works_with_skopeo_over_tls(
    tools: Tools, tmp_path: Path, certificates: tuple[Path, Path, Path]
) -> None:
    authority, *pair = certificates
    with docker_registry(tmp_path, tls=(pair[0], pair[1])) as host:
        round_trip(tools, tmp_path, host.replace("127.0.0.1", "localhost"), cert_dir=authority.parent)


@pytest.mark.parametrize("delete", [True, False])
def test_docker_registry_deletes_only_if_deletion_is_enabled(tools: Tools, tmp_path: Path, delete: bool) -> None:
    with docker_registry(tmp_path, delete=delete) as host:
        round_trip(tools, tmp_path, host)
        connection = http.client.HTTPConnection(host, timeout=10)
        assert ask_on(connection, "DELETE", BLOB).status == (202 if delete else 405)
        connection.close()


def test_a_fault_that_no_request_meets_fails_the_test() -> None:
    def never_met(**options: bool) -> None:
        with Registry() as registry:
            registry.fault(faults.answer(500), path="/nowhere", **options)  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match=r"no request met the fault for .*nowhere"):
        never_met()
    never_met(optional=True)


def test_an_error_in_the_block_is_raised_instead_of_an_unmet_fault() -> None:
    def fail() -> None:
        with Registry() as registry:
            registry.fault(faults.answer(500), path="/nowhere")
            raise ValueError("in the block")

    with pytest.raises(ValueError, match="in the block"):
        fail()
