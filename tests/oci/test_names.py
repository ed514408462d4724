"""Names and digests: which texts are valid, how they are parsed, and how errors quote them."""

from __future__ import annotations

import os
import string
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachedb.errors import InvalidDigest, InvalidName
from cachedb.oci.digests import parse_digest
from cachedb.oci.names import Name, RemoteName
from cachedb.text import shorten

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "60")) * 10
HEX = "0123456789abcdef"
LOWER = string.ascii_lowercase + string.digits
SHA256, SHA512 = "sha256:" + "a" * 64, "sha512:" + "b" * 128


# An oracle: the same grammar, parsed character by character.


def is_component(text: str) -> bool:
    if not text or text[0] not in LOWER or text[-1] not in LOWER or set(text) - set(LOWER + "._-"):
        return False
    separators = "".join(char if char in "._-" else " " for char in text).split()
    return all(run in (".", "_", "__") or set(run) == {"-"} for run in separators)


def is_host(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host = text
    elif not (1 <= len(port) <= 5 and set(port) <= set(string.digits)):
        return False
    if host.startswith("[") and host.endswith("]"):
        return len(host) > 2 and set(host[1:-1]) <= set(HEX + ":")
    return bool(host) and not set(host) - set(LOWER + ".-") and host[0] in LOWER and host[-1] in LOWER


def is_repository(text: str) -> bool:
    if len(text) > 255:
        return False
    first, *rest = text.split("/")
    return all(map(is_component, rest)) and (is_component(first) or (bool(rest) and is_host(first)))


def is_tag(text: str) -> bool:
    letters = set(string.ascii_letters + string.digits + "_")
    return 1 <= len(text) <= 128 and text[0] in letters and not set(text) - letters - set(".-")


def is_digest(text: str) -> bool:
    algorithm, _, encoded = text.partition(":")
    return len(encoded) == {"sha256": 64, "sha512": 128}.get(algorithm) and not set(encoded) - set(HEX)


def lower_host(text: str) -> str:
    """Return a name with a host in lower case; without a host, the text itself."""
    first, slash, rest = text.partition("/")
    marked = first.lower() == "localhost" or "." in first or ":" in first
    return f"{first.lower()}/{rest}" if slash and marked and first.isascii() and "@" not in first else text


def is_name(text: str) -> bool:
    text = lower_host(text)
    if "@" in text:
        repository, _, digest = text.partition("@")
        return is_repository(repository) and is_digest(digest)
    *path, last = text.split("/")
    if ":" in last:
        last, _, tag = last.rpartition(":")
        return is_repository("/".join([*path, last])) and is_tag(tag)
    return is_repository(text)


_ODD = [*"a0A./:@ []_-", "--", "__", "___", "//", "\n", "é", "\u0660", "\0"]
_WORDS = ["app", "localhost", "LocalHost", "docker.io", "Docker.IO", "::1", ":5000", ":123456", ":latest", "a" * 128]
pieces = st.sampled_from([*_ODD, *_WORDS, "@" + SHA256, "@" + SHA512, "@md5:0"])
texts = st.lists(pieces, max_size=8).map("".join) | st.text(max_size=20) | st.text("aA0._-/:@[]", max_size=12)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts)
@example("a:" + "t" * 128)
@example("a:" + "t" * 129)
@example("a" * 255)
@example("a" * 256)
@example("[::1]:5000/app:1")
@example("[::1]")
@example("LOCALHOST:5000/app:1")
@example("LOCALHOST/app")
@example("[FE80::1]:5000/app:1")
@example("MYHOST/app")
@example("\u212a.io/app")
@example("host:5000/app@" + SHA512)
@example("a:1@" + SHA256)
@example("app:1\n")
@example("app\n")
@example("app@" + SHA256 + "\n")
@example("app@" + "a" * 64)
def test_a_name_is_accepted_if_and_only_if_it_is_in_the_grammar(text: str) -> None:
    try:
        name = Name.parse(text)
    except InvalidName as error:
        assert not is_name(text)
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert is_name(text)
        assert Name.parse(str(name)) == name == Name.parse(name)
        assert str(name) in (lower_host(text), f"{lower_host(text)}:latest")


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(text=st.text(HEX + "AG:/.\n", max_size=70) | st.from_regex(r"sha(256|512|1):[0-9a-f]{63,65}", fullmatch=True))
@example(SHA256)
@example(SHA512)
@example("a" * 64)
@example("sha512:" + "a" * 64)
@example(SHA256 + "\n")
@example("\u0660" * 64)
def test_a_digest_is_accepted_if_and_only_if_it_is_in_the_grammar(text: str) -> None:
    full = text if ":" in text else f"sha256:{text}"
    try:
        assert parse_digest(text) == full
        assert is_digest(full)
    except InvalidDigest as error:
        assert not is_digest(full)
        assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "repository", "reference"),
    [
        ("app", "app", "latest"),
        ("app:1", "app", "1"),
        ("host:5000/app", "host:5000/app", "latest"),
        ("host:5000/app:v1.2", "host:5000/app", "v1.2"),
        ("docker.io/library/app:1", "docker.io/library/app", "1"),
        ("app@" + SHA256, "app", SHA256),
    ],
)
def test_a_name_is_split_and_kept_as_given(text: str, repository: str, reference: str) -> None:
    assert Name.parse(text) == (repository, reference)


@pytest.mark.parametrize("value", [None, 1, b"app:1", ["app"], ("app", "1"), {}])
def test_a_value_that_is_no_string_is_no_name_and_no_digest(value: object) -> None:
    with pytest.raises(InvalidName):
        Name.parse(value)  # type: ignore[arg-type]
    with pytest.raises(InvalidDigest):
        parse_digest(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parts", [("A", "1"), ("a", "1\n"), ("a", ""), ("", "1"), ("a@b", "1"), ("a", "b:c"), ("a/", "1")]
)
def test_a_name_with_invalid_parts_is_refused(parts: tuple[str, str]) -> None:
    with pytest.raises(InvalidName):
        Name.parse(Name(*parts))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("App", "lower case"),
        ("app:-1", "a tag has up to 128"),
        ("app:1@" + SHA256, "either a tag or a digest"),
        ("a" * 256, "longer than 255"),
        ("app@latest", "has no algorithm"),
        ("a b", "expected app or registry:5000/team/app"),
    ],
)
def test_the_error_of_an_invalid_name_explains_the_mistake(text: str, hint: str) -> None:
    with pytest.raises(InvalidName, match=hint):
        Name.parse(text)


@pytest.mark.parametrize("part", ["a", "-", "a-", "a.", "a/", "a_", "__", ":", "a:", "@", "[", "[:", "A", "\n", "0.-"])
def test_a_name_of_megabytes_is_refused_at_once(part: str) -> None:
    for text in (part * 1_000_000, part * (254 // len(part)) + "!", "a/" + part * (250 // len(part)) + "!"):
        begin = time.process_time()
        with pytest.raises(InvalidName) as caught:
            Name.parse(text)
        assert time.process_time() - begin < 1
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["x" * 10_000, "a\nb\x1b[31m\u202e", [[1] * 1000], {"a": 1}, 10**1000, None])
def test_any_value_is_quoted_on_one_short_line(value: object) -> None:
    assert shorten(value).isprintable()
    assert len(shorten(value)) < 150


@pytest.mark.slow
def test_a_deeply_nested_value_is_quoted() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    assert shorten(value) == "[...]"


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("app:1", "docker.io/library/app:1"),
        ("team/app:1", "docker.io/team/app:1"),
        ("localhost/app:1", "localhost/app:1"),
        ("host:5000/app:1", "host:5000/app:1"),
        ("ghcr.io/a/b@" + SHA256, "ghcr.io/a/b@" + SHA256),
        ("docker.io/app:1", "docker.io/library/app:1"),
        ("index.docker.io/app:1", "docker.io/library/app:1"),
        ("registry-1.docker.io/team/app:1", "docker.io/team/app:1"),
        ("LOCALHOST:5000/app:1", "localhost:5000/app:1"),
    ],
)
def test_a_qualified_name_has_its_registry(text: str, full: str) -> None:
    assert Name.parse(text).qualified() == full


@pytest.mark.parametrize(
    ("text", "name", "digest"),
    [
        ("app:1", "app:1", None),
        ("docker://app", "app:latest", None),
        (f"docker://host:5000/app:1@{SHA256}", "host:5000/app:1", SHA256),
        (f"app:1@{SHA512}", "app:1", SHA512),
        (f"host:5000/app@{SHA256}", f"host:5000/app@{SHA256}", SHA256),
    ],
)
def test_a_name_at_a_registry_may_have_a_transport_and_both_a_tag_and_a_digest(
    text: str, name: str, digest: str | None
) -> None:
    assert RemoteName.parse(text) == (Name.parse(name), digest)
    assert RemoteName.parse(Name.parse(name)).name == name


@pytest.mark.parametrize(
    "text", ["app:1@latest", f"app:@{SHA256}", f"app:-1@{SHA256}", f"App:1@{SHA256}", "docker://", f"a:1@{SHA256}@b"]
)
def test_a_name_at_a_registry_is_refused_if_a_part_is_invalid(text: str) -> None:
    with pytest.raises(InvalidName):
        RemoteName.parse(text)


def test_a_name_is_equal_to_its_text() -> None:
    name = Name.parse("hello:1")
    assert name == "hello:1"
    assert "hello:1" == name  # noqa: SIM300
    assert name != "hello:2"
    assert name == Name("hello", "1")
    assert name in {"hello:1"}
    assert {name: 1}["hello:1"] == 1  # type: ignore[index]
    assert repr(name) == "Name('hello:1')"
