"""Turn the rules of a policy into conditions on the index.

The query of a rule runs before, in a transaction of its own. The conditions contain the names that it found.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from sqlalchemy import ColumnElement, Connection, and_, or_, select

from cachedb.content.session import lock_path
from cachedb.disk import locks
from cachedb.errors import InvalidPolicy
from cachedb.index import eviction, holds, images
from cachedb.index.eviction import Rules
from cachedb.index.filters import Filters, build_conditions, subtract_seconds
from cachedb.index.patterns import is_like, is_pattern, is_repository_like
from cachedb.index.sqlite.batches import are_among
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.query import run_query
from cachedb.index.tables import IMAGES
from cachedb.oci.names import Name
from cachedb.operations.policy import EXPRESSION, QUERY_SECONDS, Keep, Policy, Remove

__all__ = ["RECENT_SECONDS", "build_rules", "run_queries"]


RECENT_SECONDS = 600.0
"""An image whose last use is more recent is kept, unless a rule of the policy says ``used-within``."""


def _list_rules(policy: Policy) -> list[Keep | Remove]:
    return [*policy.keep, *policy.remove]


def run_queries(database: Database, policy: Policy) -> dict[str, list[str]]:
    """Return the names in the first column of the result of each query of a policy."""
    found: dict[str, list[str]] = {}
    for rule in _list_rules(policy):
        if rule.sql is not None and rule.sql not in found:
            with run_query(database, rule.sql, timeout=QUERY_SECONDS) as answer:
                found[rule.sql] = [row[0] for row in answer.rows if isinstance(row[0], str)]
    return found


def build_rules(
    connection: Connection,
    database: Database,
    policy: Policy,
    answers: Mapping[str, list[str]],
    spared: Collection[Name] = (),
) -> Rules:
    """Return the conditions of a policy.

    Args:
        connection: to the index.
        database: of the cache.
        policy: the rules.
        answers: of `run_queries`.
        spared: images that stay, because the caller works with them.
    """
    known = {str(Name(*row[1:])): row[0] for row in _read_names(connection, policy)}

    def build(rule: Keep | Remove) -> ColumnElement[bool]:
        return _build_rule(connection, rule, known, answers)

    is_recent = None
    if policy.keeps_recent:
        is_recent = IMAGES.c.last_used_at > subtract_seconds(RECENT_SECONDS)
    # The leases of a dead process or an expired hold keep nothing: the next collection deletes them.
    dead = {
        session
        for session in holds.read_lapsed(connection)
        if not locks.is_held(lock_path(database.directory, session))
    }
    spared_ids = [row.id for row in images.look_up_all(connection, spared).values()]
    return Rules(list(map(build, policy.keep)), list(map(build, policy.remove)), is_recent, spared_ids, dead)


def _read_names(connection: Connection, policy: Policy) -> Iterable[tuple[int, str, str]]:
    """Return the ids and names of all images, if a rule needs them."""
    rules = _list_rules(policy)
    if any(rule.sql is not None or any(text.startswith(EXPRESSION) for text in rule.names) for rule in rules):
        for row in connection.execute(select(IMAGES.c.id, IMAGES.c.repository, IMAGES.c.reference)):
            yield row.id, row.repository, row.reference


def _build_rule(
    connection: Connection, rule: Keep | Remove, known: Mapping[str, int], answers: Mapping[str, list[str]]
) -> ColumnElement[bool]:
    """Return the SQL condition for the images that a rule selects.

    Raises:
        InvalidPolicy: if the rule has no condition.
    """
    if rule == type(rule)():
        raise InvalidPolicy("a rule of the policy has no condition: give one, or remove the rule")
    filters = Filters(labels=rule.labels, platforms=() if rule.platform is None else (rule.platform,))
    if isinstance(rule, Remove):
        filters = filters._replace(unused_for=rule.unused_for, incomplete=rule.incomplete)
    conditions = build_conditions(connection, filters)
    if rule.names:
        conditions.append(or_(*(_build_name_condition(text, known) for text in rule.names)))
    if rule.repository is not None:
        conditions.append(is_repository_like(rule.repository))
    if rule.sql is not None:
        ids = [known[name] for name in answers[rule.sql] if name in known]
        conditions.append(are_among(IMAGES.c.id, ids))
    if isinstance(rule, Remove):
        if rule.added_before is not None:
            conditions.append(IMAGES.c.added_at <= subtract_seconds(rule.added_before))
        if rule.keep_newest is not None:
            conditions.append(~eviction.is_among_newest(rule.keep_newest, conditions))
    else:
        if rule.used_within is not None:
            conditions.append(IMAGES.c.last_used_at > subtract_seconds(rule.used_within))
        if rule.added_within is not None:
            conditions.append(IMAGES.c.added_at > subtract_seconds(rule.added_within))
        if rule.newest is not None:
            conditions.append(eviction.is_among_newest(rule.newest, conditions))
    return and_(*conditions)


def _build_name_condition(text: str, known: Mapping[str, int]) -> ColumnElement[bool]:
    if text.startswith(EXPRESSION):
        expression = re.compile(text.removeprefix(EXPRESSION))
        return are_among(IMAGES.c.id, [row_id for name, row_id in known.items() if expression.search(name)])
    if is_pattern(text):
        return is_like(text)
    name = Name.parse(text)
    return (IMAGES.c.repository == name.repository) & (IMAGES.c.reference == name.reference)
