"""Text of a server contains no secret that was sent to it, in whatever encoding it is repeated."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from cachedb import Cache, RegistryError
from cachedb.transports.registry import redaction
from cachedb.transports.registry.answers import to_one_line
from cachedb.transports.registry.redaction import redact, remember, remember_briefly
from tests.support import make
from tests.support.faults import ALWAYS, Answer, Call, redirect
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

IMAGE = make.image(1)
SECRET = "S3cr3t/w0rd+x ü"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())
    redaction._recent.clear()


def encode_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "encode",
    [
        str,
        quote,
        quote_plus,
        lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
        lambda text: "".join(f"%{byte:02X}" for byte in text.encode()),
        encode_base64,
        lambda text: encode_base64(f"user:{text}"),
        lambda text: encode_base64(f"a:{text}:b"),
        lambda text: encode_base64(f"ab:{text}").rstrip("="),
        lambda text: "x" + encode_base64(f"user:{text}"),
        lambda text: quote(encode_base64(f"user:{text}"), safe=""),
        lambda text: base64.urlsafe_b64encode(f"user:{text}".encode()).decode(),
        lambda text: text.encode().hex(),
        lambda text: f"0{text.encode().hex().upper()}",
    ],
)
def test_a_secret_is_hidden_in_every_encoding(encode: Callable[[str], str]) -> None:
    remember(SECRET)
    text = f"bad login: Basic {encode(SECRET)}"
    redacted = redact(text)
    assert encode(SECRET) not in redacted
    assert "***" in redacted
    assert redact(redacted) == redacted


def test_other_text_stays() -> None:
    remember(SECRET)
    remember("ab")
    for text in ("unauthorized: authentication required", "table 100% of aab, ab1", "a1b2c3d4e5f6" * 5, "%zz", ""):
        assert redact(text) == text
    assert redact("password ab is wrong") == "password *** is wrong"


def test_a_part_of_a_token_is_hidden() -> None:
    remember_briefly("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ1c2VyIn0.c2lnbmF0dXJl")
    assert redact("bad token eyJhbGciOiJSUzI1NiJ9...") == "bad token ***..."


def test_recent_secrets_are_forgotten_but_passwords_are_not() -> None:
    remember("my-password")
    for number in range(600):
        remember_briefly(f"token-number-{number}")
    assert redact("token-number-599, token-number-0, my-password") == "***, token-number-0, ***"


def test_a_secret_is_hidden_before_the_text_is_shortened() -> None:
    remember("a-long-password")
    assert to_one_line("x" * 190 + " a-long-password") == "x" * 190 + " ***"
    assert to_one_line("a\x00b a-long-password") == "a?b ***"


# Whole pulls


class Echo(Registry):
    """A registry whose token server and errors repeat the authorization, forms and queries that they get."""

    def repeat(self, call: Call) -> Answer:
        call.serve()
        text = f"bad {call.headers.get('authorization')} {call.query} {call.body.decode()}"
        return Answer(401, {}, json.dumps({"errors": [{"code": "DENIED", "message": text}]}).encode())


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo(auth="bearer") as made:
        made.add(IMAGE, "app", "1")
        yield made


@pytest.mark.parametrize(
    "entry",
    [{"username": "user", "password": "S3cr3t"}, {"identitytoken": "S3cr3t"}, {"registrytoken": "S3cr3t"}],
)
def test_a_server_that_repeats_credentials_does_not_get_them_into_an_error(
    cache: Cache, echo: Echo, tmp_path: Path, entry: dict[str, str]
) -> None:
    authfile = tmp_path / "auth.json"
    authfile.write_text(json.dumps({"auths": {echo.host: entry}}))
    echo.fault(echo.repeat, path="/token", times=ALWAYS, optional=True)
    echo.fault(echo.repeat, method="GET", path="/manifests/", times=ALWAYS, first=True, optional=True)
    echo.tokens["S3cr3t"] = float("inf"), {("app", "pull")}
    with pytest.raises(RegistryError, match=r"DENIED: bad .*\*\*\*") as raised:
        cache.pull(f"{echo.host}/app:1", authfile=authfile)
    for secret in ("S3cr3t", encode_base64("user:S3cr3t")):
        assert secret not in str(raised.value)


def test_a_token_and_a_signed_link_are_not_repeated_either(cache: Cache) -> None:
    with Echo(auth="bearer") as remote, Echo() as store:
        remote.anonymous = True
        name = remote.add(IMAGE, "app", "1")
        remote.fault(remote.repeat, path="/blobs/", times=1)
        with pytest.raises(RegistryError, match=r"DENIED: bad Bearer \*\*\*"):
            cache.pull(name)
        signed = redirect(store.url)

        def sign(call: Call) -> Answer:
            answer = signed(call)
            answer.headers["Location"] += "?X-Amz-Signature=0123456789abcdef0123456789abcdef"
            return answer

        remote.fault(sign, path="/blobs/", times=ALWAYS)
        store.fault(store.repeat, path="/blobs/", times=ALWAYS)
        with pytest.raises(RegistryError, match=r"DENIED: bad None .*X-Amz-Signature.*\*\*\*"):
            cache.pull(name)
