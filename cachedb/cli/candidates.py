"""Completion of names and digests in a shell, and the scripts that bring it there."""

from __future__ import annotations

import os
from collections.abc import Callable

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from cachedb.cache import Cache
from cachedb.disk.layout import default_directory
from cachedb.errors import CacheError

__all__ = ["candidates", "held", "script"]


def candidates(ctx: click.Context, incomplete: str, *, names: bool, digests: bool) -> list[CompletionItem]:
    """Return the names and digests in the cache that begin as typed."""

    def find(cache: Cache) -> list[str]:
        found = [str(name) for name in cache.list_names()] if names else []
        return [*found, *cache.list_blobs(incomplete)] if digests else found

    return _completed(ctx, incomplete, find)


def held(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Return the holds, and what they hold, that begin as typed."""
    return _completed(ctx, incomplete, lambda cache: [text for hold in cache.list_holds() for text in hold[:2]])


def _completed(ctx: click.Context, incomplete: str, find: Callable[[Cache], list[str]]) -> list[CompletionItem]:
    """Never fails, and never makes a cache."""
    directory = ctx.find_root().params.get("directory") or default_directory()
    if not os.path.exists(os.path.join(directory, "index.db")):
        return []
    try:
        with Cache.open(directory) as cache:
            found = find(cache)
    except CacheError:
        return []
    return [CompletionItem(value) for value in dict.fromkeys(found) if value.startswith(incomplete)]


def script(command: click.Command, shell: str, variable: str) -> str:
    """Return the script that makes ``bash``, ``zsh`` or ``fish`` ask a command for completion by a variable."""
    found = get_completion_class(shell)
    assert found is not None
    return found(command, {}, "cachedb", variable).source()


class _Bash(BashComplete):
    """Completion for bash, which takes words apart at colons; names and digests have them."""

    source_template = """\
%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}" word kept item type value
    word="${line##* }"
    # What bash takes for finished already, and will not replace.
    [[ "$COMP_WORDBREAKS" == *:* && "$word" == *:* ]] && kept="${word%%:*}:"
    while IFS=, read -r type value; do
        case "$type" in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$kept"}") ;;
        esac
    done < <(COMP_WORDS="$line" COMP_CWORD=0 %(complete_var)s=bash_complete $1)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    @staticmethod
    def _check_version() -> None:
        """Any bash from 4.4 on will do, and asking costs a process."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor, and the one at it."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        return (words[1:], "") if line.endswith((" ", "\t")) else (words[1:-1], words[-1])


add_completion_class(_Bash, "bash")
