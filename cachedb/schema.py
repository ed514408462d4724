"""Inspect and migrate the schema of a cache's index; back up, compare and restore the index."""

from cachedb.index.drift import Drift, check
from cachedb.index.schema import Revision, State, current, history
from cachedb.operations.preview import Plan, Step, plan_change, render_sql
from cachedb.operations.restore import Restored, restore
from cachedb.operations.upgrade import Change, Unread, back_up, downgrade, upgrade

__all__ = [
    "Change",
    "Drift",
    "Plan",
    "Restored",
    "Revision",
    "State",
    "Step",
    "Unread",
    "back_up",
    "check",
    "current",
    "downgrade",
    "history",
    "plan_change",
    "render_sql",
    "restore",
    "upgrade",
]
