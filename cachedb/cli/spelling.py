"""Define a group of commands that suggests the close spellings of a mistyped command."""

from __future__ import annotations

import click

__all__ = ["SpellingGroup"]

# More edits often lead to an unrelated word: from `start` to `stats`, or from `as` to `ls`.
_EDITS_BY_LENGTH = {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
_EDITS_OF_LONG_WORDS = 2


class SpellingGroup(click.Group):
    """A group that suggests only commands that differ from the typed word by a typing error."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the name and the command of the first word, and the other words."""
        word = args[0]
        if not word.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, word) is None:
            found = " or ".join(f"`{ctx.command_path} {name}`" for name in self.find_close(ctx, word))
            raise click.UsageError(f"no such command {word!r}" + (f" (did you mean {found}?)" if found else ""), ctx)
        return super().resolve_command(ctx, args)

    def find_close(self, ctx: click.Context, word: str) -> list[str]:
        """Return the listed commands with the closest spelling, if it differs by a typing error."""
        edits = {name: _count_edits(word, name) for name in self.list_commands(ctx)}
        least = min(edits.values(), default=0)
        if least > _EDITS_BY_LENGTH.get(len(word), _EDITS_OF_LONG_WORDS):
            return []
        return [name for name, count in edits.items() if count == least]


def _count_edits(first: str, second: str) -> int:
    """Return how many characters must be inserted, deleted, replaced or swapped with the next one."""
    rows = [list(range(len(second) + 1))]
    for i, a in enumerate(first, 1):
        row = [i]
        for j, b in enumerate(second, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
