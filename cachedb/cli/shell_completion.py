"""Complete names, digests and reports in a shell, and make the scripts that install completion."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from cachedb.cache import Cache
from cachedb.disk.layout import default_directory
from cachedb.errors import CacheError
from cachedb.reports.named import list_reports, load_report
from cachedb.reports.parameters import Parameter

__all__ = [
    "complete_holds",
    "complete_names",
    "complete_parameter",
    "complete_report",
    "complete_value",
    "complete_view",
    "format_completion_script",
]


_VALUES = {
    "label": "SELECT DISTINCT key FROM labels ORDER BY key",
    "platform": "SELECT DISTINCT os || '/' || architecture || coalesce('/' || variant, '') FROM platforms ORDER BY 1",
}
"""The query for the possible values of a parameter, by its type."""


def complete_names(ctx: click.Context, incomplete: str, *, names: bool, digests: bool) -> list[CompletionItem]:
    """Return the cached names and digests that start with the typed text."""

    def find(cache: Cache) -> list[str]:
        found = [str(name) for name in cache.list_names()] if names else []
        return [*found, *cache.list_blobs(incomplete)] if digests else found

    return _complete(ctx, incomplete, find)


def complete_holds(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Return the hold ids and held names that start with the typed text."""
    return _complete(ctx, incomplete, lambda cache: [text for hold in cache.list_holds() for text in hold[:2]])


def complete_report(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of the reports that start with the typed text."""
    try:
        found = [report for report in list_reports() if report.name.startswith(incomplete)]
    except CacheError:
        return []
    return [CompletionItem(report.name, help=report.description) for report in found]


def complete_parameter(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the completions of ``NAME=VALUE`` for a parameter of the report that the command line names."""
    name, equals, value = incomplete.partition("=")
    parameters = _list_parameters(ctx)
    if not equals:
        return [CompletionItem(f"{one.name}=") for one in parameters if one.name.startswith(name)]
    found = [item for one in parameters if one.name == name for item in _complete_kind(ctx, one, value)]
    return [CompletionItem(f"{name}={item.value}") for item in found]


def complete_value(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the completions of the next value of the report that the command line names."""
    given = ctx.params.get("parameters") or {}
    free = [one for one in _list_parameters(ctx) if one.name not in given]
    place = len(ctx.params.get("values") or ())
    if place >= len(free):
        free, place = [one for one in free[-1:] if one.kind == "images"], 0
    return _complete_kind(ctx, free[place], incomplete) if free else []


def complete_view(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of the views that start with the typed text, after ``--schema``."""
    if not ctx.params.get("schema"):
        return []
    return _complete(ctx, incomplete, lambda cache: [view.name for view in cache.list_views()])


def _list_parameters(ctx: click.Context) -> tuple[Parameter, ...]:
    # If `-p` is the last word, click cannot parse the line, and leaves the arguments in `args`.
    name = ctx.params.get("name") or next(iter(ctx.args), "")
    try:
        return load_report(name).parameters if ctx.info_name == "report" else ()
    except CacheError:
        return ()


def _complete_kind(ctx: click.Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the completions of a value of a parameter; a list of images is completed at its last name."""
    before, space, incomplete = incomplete.rpartition(" ") if parameter.kind == "images" else ("", "", incomplete)
    if parameter.kind in ("image", "images"):
        found = complete_names(ctx, incomplete, names=True, digests=False)
    elif parameter.kind in _VALUES:
        found = _complete(ctx, incomplete, partial(_query_texts, query=_VALUES[parameter.kind]))
    else:
        found = [CompletionItem(text) for text in [parameter.default or ""] if text and text.startswith(incomplete)]
    return [CompletionItem(before + space + item.value) for item in found]


def _query_texts(cache: Cache, query: str) -> list[str]:
    with cache.sql(query) as answer:
        return [text for (text,) in answer.rows]


def _complete(ctx: click.Context, incomplete: str, find: Callable[[Cache], list[str]]) -> list[CompletionItem]:
    """Return the found values that start with the typed text; never fail and never create a cache."""
    directory = ctx.find_root().params.get("directory") or default_directory()
    if not os.path.exists(os.path.join(directory, "index.db")):
        return []
    try:
        with Cache.open(directory) as cache:
            found = find(cache)
    except CacheError:
        return []
    return [CompletionItem(value) for value in dict.fromkeys(found) if value.startswith(incomplete)]


def format_completion_script(command: click.Command, shell: str, variable: str) -> str:
    """Return the completion script of a command for ``bash``, ``zsh`` or ``fish``.

    The script sets ``variable`` to ask the command for completions.
    """
    found = get_completion_class(shell)
    assert found is not None
    return found(command, {}, "cachedb", variable).source()


class _Bash(BashComplete):
    """Completion for bash, which splits words at the colons of names and digests."""

    source_template = """\
%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}" breaks="${COMP_WORDBREAKS//[^=:]/}" word kept type value
    word="${line##* }"
    # bash keeps the text up to the last equals sign or colon, so completions must leave it out.
    [[ "$breaks" ]] && kept="${word%%"${word##*["$breaks"]}"}"
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
        """Skip the version check: it starts a process, and any bash from 4.4 on works."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor and the word at the cursor."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        return (words[1:], "") if line.endswith((" ", "\t")) else (words[1:-1], words[-1])


class _Zsh(ZshComplete):
    """Completion for zsh, which works before and without `compinit`."""

    source_template = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a completions described response
    local type key help word=$((CURRENT - 1))
    (( ! $+commands[%(prog_name)s] )) && return 1
    response=("${(@f)$(COMP_WORDS="${words[*]}" COMP_CWORD=$word %(complete_var)s=zsh_complete %(prog_name)s)}")
    for type key help in ${response}; do
        case "$type" in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            plain) [[ "$help" == _ ]] && completions+=("$key") || described+=("$key:$help") ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#completions )) && compadd -U -V unsorted -a completions
}

# Without `compinit`, `compdef` does not exist. A later `compinit` in ~/.zshrc would drop what is registered before it,
# so register the function at the first prompt.
%(complete_func)s_register() {
    precmd_functions=(${precmd_functions:#%(complete_func)s_register})
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
    compdef %(complete_func)s %(prog_name)s
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
elif (( $+functions[compdef] )); then
    compdef %(complete_func)s %(prog_name)s
else
    precmd_functions+=(%(complete_func)s_register)
fi
"""


add_completion_class(_Bash, "bash")
add_completion_class(_Zsh, "zsh")
