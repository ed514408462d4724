"""Print records, such as images, with the columns and in the format that the user chooses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from cachedb.cli.options import Output
from cachedb.cli.output import fits, format_json, print_json, print_names, print_rows, print_table, to_json
from cachedb.errors import InvalidQuery
from cachedb.text import format_age, format_size, printable, shorten, shorten_digest

if TYPE_CHECKING:
    from cachedb.index.records import ImageInfo

__all__ = ["IMAGE_FIELDS", "Field", "describe_image", "format_state", "print_images", "print_records", "uses_column"]


class Field(NamedTuple):
    """A field of records: a key in JSON and CSV, and a column of a table."""

    key: str
    column: str  # its name in tables, --columns and templates, which take the key too
    show: Callable[[Any], str] = str  # formats a value for people
    right: bool = False  # whether the column is aligned to the right
    place: int = 1  # 0: printed only if chosen; 1: always printed; a narrow terminal leaves out the highest first
    missing: str = "-"  # what people see if there is no value


def format_state(complete: bool) -> str:
    """Return whether an image is complete, as a word."""
    return "complete" if complete else "incomplete"


IMAGE_FIELDS: Final = (
    Field("name", "name"),
    Field("repository", "repository", place=0),
    Field("reference", "tag", place=0),
    Field("digest", "digest", shorten_digest, place=2),
    Field("size", "size", format_size, right=True),
    Field("created", "created", format_age),
    Field("added_at", "added", format_age, place=3),
    Field("last_used_at", "last used", format_age, place=0),
    Field("platform", "platform", place=0),
    Field("platforms", "platforms", ", ".join, place=0),
    Field("os", "os", place=0),
    Field("architecture", "architecture", place=0),
    Field("variant", "variant", place=0),
    Field("author", "author", place=0),
    Field("media_type", "type", place=0),
    Field("complete", "state", format_state),
    Field("pinned", "pinned", lambda pinned: "yes" if pinned else "no", place=0),
    Field("expires_at", "expires", lambda time: f"{time:%Y-%m-%d %H:%M:%S} UTC", place=0),
)
"""The fields of an image."""


def describe_image(image: ImageInfo) -> dict[str, Any]:
    """Return the fields of an image, as its JSON has them; ``created_at`` is the old name of ``added_at``."""
    platform = image.platform if image.os and image.architecture else None  # several platforms may share one part
    return {"name": str(image.name), **image._asdict(), "platform": platform, "created_at": image.added_at}


def _choose_fields(found: Iterable[ImageInfo]) -> list[Field]:
    """Return the fields for a table of images, with pins and lifetimes only if an image has any."""
    used = {key for key in ("pinned", "expires_at") if any(getattr(image, key) for image in found)}
    return [field._replace(place=1) if field.key in used else field for field in IMAGE_FIELDS]


def uses_column(output: Output, name: str) -> bool:
    """Return whether an output has a column because it was chosen."""
    names = [*output.columns, *(match[2] for match in _ACTION.finditer(output.form))]
    return name in map(_normalize, names)


def print_images(
    found: Sequence[ImageInfo],
    output: Output | str,
    *,
    quiet: bool = False,
    platforms: Mapping[str, list[str]] | None = None,
) -> None:
    """Print images.

    Args:
        found: the images.
        output: how to print them; ``table`` and ``json`` are outputs too.
        quiet: print only their names.
        platforms: of each image, by name; None if no column has them.
    """
    output = Output(output, (), has_heading=True) if isinstance(output, str) else output
    if quiet:
        print_names(image.name for image in found)
    elif output.form == "table" and not output.columns:
        # Reading all fields of each image would be slower.
        fields = _choose_fields(found)
        keys = [field.key for field in fields if field.place and field.key != "name"]
        read = attrgetter(*keys)
        rows = [{"name": str(image.name), **dict(zip(keys, read(image), strict=True))} for image in found]
        print_records(rows, fields, output)
    else:
        records = [describe_image(image) for image in found]
        if platforms is not None:
            records = [{**record, "platforms": platforms.get(record["name"], [])} for record in records]
        print_records(records, IMAGE_FIELDS, output)


def print_records(records: Sequence[Mapping[str, Any]], fields: Sequence[Field], output: Output) -> None:
    """Print records that have all keys of the fields.

    JSON has all keys of a record, unless columns are chosen.

    Raises:
        InvalidQuery: if there is no such column, or the template is invalid.
    """
    if "{{" in output.form:
        _print_template(records, fields, output)
        return
    chosen = [_find_field(fields, name) for name in output.columns]
    if output.form in ("json", "ndjson"):
        if chosen:
            records = [{field.key: record[field.key] for field in chosen} for record in records]
        if output.form == "json":
            print_json(records)
        else:
            sys.stdout.writelines(f"{format_json(record)}\n" for record in records)
    elif output.form == "table":
        _print_table(records, chosen or [field for field in fields if field.place], output, is_chosen=bool(chosen))
    else:
        chosen = chosen or [field for field in fields if field.place]
        rows = ([_to_cell(record[field.key]) for field in chosen] for record in records)
        print_rows([field.key for field in chosen], rows, output.form, header=output.has_heading)


def _to_cell(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else to_json(value)


def _print_table(
    records: Sequence[Mapping[str, Any]], fields: Sequence[Field], output: Output, *, is_chosen: bool
) -> None:
    """Print a table; unless its columns were chosen, leave out some that do not fit on the terminal."""
    columns = {field.key: [_show(field, record, field.missing) for record in records] for field in fields}
    if not is_chosen and sys.stdout.isatty():
        # If no choice of columns fits, print all of them: each value then gets its own line.
        places = sorted({field.place for field in fields}, reverse=True)
        choices = [[field for field in fields if field.place <= place] for place in places]
        fields = next((chosen for chosen in choices if _fits(chosen, columns)), fields)
    print_table(
        [field.column.upper() for field in fields],
        zip(*(columns[field.key] for field in fields), strict=True),
        right=[field.column.upper() for field in fields if field.right],
        header=output.has_heading,
    )


def _fits(fields: Sequence[Field], columns: Mapping[str, Sequence[str]]) -> bool:
    return fits([field.column for field in fields], list(zip(*(columns[field.key] for field in fields), strict=True)))


def _show(field: Field, record: Mapping[str, Any], missing: str) -> str:
    value = record[field.key]
    return missing if value is None else printable(field.show(value))


def _find_field(fields: Sequence[Field], name: str) -> Field:
    wanted = _normalize(name)
    for field in fields:
        if wanted in (_normalize(field.column), _normalize(field.key)):
            return field
    raise InvalidQuery(f"{shorten(name)} is not a column: use {', '.join(field.column for field in fields)}")


def _normalize(name: str) -> str:
    return re.sub("[_ -]", "", name).lower()


# Templates

_ACTION: Final = re.compile(r"\{\{\s*(json\s+)?\.(\w*)\s*\}\}")


def _print_template(records: Sequence[Mapping[str, Any]], fields: Sequence[Field], output: Output) -> None:
    """Print a line for each record, as docker does for a Go template.

    ``table TEMPLATE`` prints a table of the columns in the template.

    Raises:
        InvalidQuery: if the template is invalid, or names another column.
    """
    if output.columns:
        raise InvalidQuery("--columns and a template exclude each other: name the columns in the template")
    template = output.form.removeprefix("table ")
    if re.search(r"\{\{|\}\}", _ACTION.sub("", template)):
        raise InvalidQuery(f"{shorten(template)} is not a template: write {{{{.NAME}}}} or {{{{json .NAME}}}}")
    if template != output.form:
        chosen = [_find_field(fields, match[2]) for match in _ACTION.finditer(template)]
        _print_table(records, chosen, output, is_chosen=True)
        return
    texts = [text.replace("\\t", "\t").replace("\\n", "\n") for text in _ACTION.split(template)[::3]]
    actions = [_make_action(fields, match[2], is_json=bool(match[1])) for match in _ACTION.finditer(template)]
    for record in records:
        values = [*(action(record) for action in actions), ""]
        click.echo("".join(text + value for text, value in zip(texts, values, strict=True)))


def _make_action(fields: Sequence[Field], name: str, *, is_json: bool) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that formats a column of a record, as in a table but with whole digests.

    For JSON, it formats the column as JSON, or the whole record if the name is empty.
    """
    if is_json and not name:
        return format_json
    field = _find_field(fields, name)
    if is_json:
        return lambda record: format_json(record[field.key])
    if field.show is shorten_digest:
        field = field._replace(show=str)
    return lambda record: _show(field, record, "")
