"""Hide secrets that were sent to a server in the text that it answers."""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections import deque
from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote_plus

__all__ = ["format_basic", "redact", "remember", "remember_briefly"]


_HIDDEN: Final = "***"
_SHORT: Final = 4  # characters; a shorter secret is hidden only where it is a whole word
_MIN_PART: Final = 12  # characters; a part of a secret that is at least so long is hidden too
_RUN: Final = re.compile(r"[A-Za-z0-9+/_-]{6,}")  # text that may be base64 or hexadecimal

_guard = threading.Lock()
_secrets = set[str]()
_recent = deque[str](maxlen=500)  # a long process gets many tokens and links, which expire


def remember(secret: str) -> None:
    """Hide a password, or a token of the user, from now on."""
    with _guard:
        _secrets.update([secret] if secret else [])


def remember_briefly(secret: str) -> None:
    """Hide a secret that expires, such as a token or a part of a link, until many newer ones exist."""
    with _guard:
        if secret and secret not in _recent:
            _recent.append(secret)


def format_basic(username: str, password: str) -> str:
    """Return the header value for basic authentication (RFC 7617), and remember its secrets."""
    encoded = base64.b64encode(f"{username}:{password}".encode()).decode()
    for secret in (password, encoded):
        remember(secret)
    return f"Basic {encoded}"


def redact(text: str) -> str:
    """Return a text without the remembered secrets, as they are or encoded: percent, base64, hexadecimal."""
    with _guard:
        secrets = sorted({*_secrets, *_recent}, key=len, reverse=True)
    for secret in secrets:
        edge = r"\b" if len(secret) < _SHORT else ""
        text = re.sub(f"{edge}{re.escape(secret)}{edge}", _HIDDEN, text)
    long = [secret for secret in secrets if len(secret) >= _SHORT]
    decoded = unquote_plus(text)
    if any(secret in decoded for secret in long):
        text = " ".join(
            _HIDDEN if any(secret in unquote_plus(word) for secret in long) else word for word in text.split(" ")
        )
        if any(secret in unquote_plus(text) for secret in long):  # a secret with spaces
            return _HIDDEN
    encoded = [secret.encode() for secret in long]
    return _RUN.sub(lambda run: _HIDDEN if _has_secret(run[0], long, encoded) else run[0], text)


def _has_secret(run: str, secrets: list[str], encoded: list[bytes]) -> bool:
    """Return whether a run of characters is a part of a secret, or contains an encoded one."""
    if len(run) >= _MIN_PART and any(run in secret for secret in secrets):
        return True
    return any(secret in data for data in _decode(run) for secret in encoded)


def _decode(run: str) -> Iterator[bytes]:
    """Yield the decodings of a run of characters as base64 and as hexadecimal, from each possible start."""
    standard = run.replace("-", "+").replace("_", "/")
    for start in range(4):
        part = standard[start:]
        yield base64.b64decode(part[: len(part) // 4 * 4])
        if len(part) % 4 > 1:
            yield base64.b64decode(part + "=" * (-len(part) % 4))
    for start in range(2):
        part = run[start:]
        try:
            yield binascii.unhexlify(part[: len(part) // 2 * 2])
        except ValueError:
            continue
