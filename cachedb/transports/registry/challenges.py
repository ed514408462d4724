"""Parse the challenges of a server (RFC 9110, section 11.6.1: WWW-Authenticate)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

__all__ = ["Challenge", "parse_challenges"]


_WORD: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # the grammar's "token"
# A parameter, a scheme, or a character that separates them. Possessive, so that no input takes quadratic time.
_PART: Final = re.compile(rf'({_WORD})[ \t]*+=[ \t]*+(?:"((?:[^"\\]|\\.)*+)"?|([^\s,]*+))|({_WORD})|.', re.DOTALL)


class Challenge(NamedTuple):
    """A way in which a server asks for authorization (RFC 9110, section 11.3)."""

    scheme: str  # in lower case
    parameters: Mapping[str, str]  # the keys are in lower case


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Return the challenges of all WWW-Authenticate headers; a header may have several.

    Text that does not fit the grammar is skipped.
    """
    found = list[Challenge]()
    for header in headers:
        parameters: dict[str, str] | None = None  # of the last scheme
        for name, quoted, bare, scheme in _PART.findall(header):
            if scheme:
                parameters = {}
                found.append(Challenge(scheme.lower(), parameters))
            elif name and parameters is not None:
                parameters.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) or bare)
    return found
