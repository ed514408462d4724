"""Challenges are parsed as RFC 9110 says, and what does not fit is skipped."""

from __future__ import annotations

import pytest

from cachedb.transports.registry.challenges import parse_challenges

BEARER = ("bearer", {"realm": "https://t.test/token", "service": "s"})
BASIC = ("basic", {"realm": "x"})


@pytest.mark.parametrize(
    ("headers", "challenges"),
    [
        ([], []),
        (['Bearer realm="https://t.test/token",service="s"'], [BEARER]),
        (['Bearer\trealm="https://t.test/token"\t,\tservice = "s"'], [BEARER]),
        (["bearer REALM=https://t.test/token, SERVICE=s"], [BEARER]),
        (['Bearer realm="https://t.test/token",service="s", Basic realm="x"'], [BEARER, BASIC]),
        (['Basic realm="x", Bearer realm="https://t.test/token",service="s"'], [BASIC, BEARER]),
        (['Basic realm="x"', 'Bearer realm="https://t.test/token",service="s"'], [BASIC, BEARER]),
        (["Negotiate, Basic realm=x"], [("negotiate", {}), BASIC]),
        (
            ['Basic realm="Bearer realm=evil, Bearer realm=\\"evil\\""'],
            [("basic", {"realm": 'Bearer realm=evil, Bearer realm="evil"'})],
        ),
        (['Bearer realm="first",realm="second"'], [("bearer", {"realm": "first"})]),
        (
            ['Bearer scope="repository:a:pull,push repository:b:pull"'],
            [("bearer", {"scope": "repository:a:pull,push repository:b:pull"})],
        ),
        (['Basic realm="x'], [BASIC]),
        ([', ,= ;"', 'realm="nobody\'s"'], []),
    ],
)
def test_challenges_are_parsed(headers: list[str], challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(headers) == challenges
