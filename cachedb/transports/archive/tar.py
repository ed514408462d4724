"""Read the members of a tar in POSIX's pax and ustar formats, with GNU's long names.

This replaces the standard library's `tarfile`. In Python releases that are still in use, some malicious headers cost
`tarfile` time and memory that grow with the square of their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from cachedb.errors import InvalidArchive
from cachedb.text import shorten

__all__ = [
    "BLOCK",
    "FOLDER",
    "HARD_LINK",
    "REGULAR",
    "SAVE_AGAIN",
    "SYMBOLIC_LINK",
    "Member",
    "check_header",
    "has_end",
    "read_members",
]


BLOCK = 512  # bytes
HARD_LINK, SYMBOLIC_LINK, FOLDER = b"1", b"2", b"5"
REGULAR = (b"0", b"\0", b"7")

SAVE_AGAIN: Final = "save or download the archive again"
"""What to do about a damaged archive."""
_HEADER_LIMIT = 1024 * 1024  # bytes of one extended header
_HEADERS_LIMIT = 64 * _HEADER_LIMIT  # bytes of all extended headers
_NOT_A_TAR = "the archive is not a tar: give the output of `docker save`, an OCI archive, or an image layout folder"


class Member(NamedTuple):
    """A file, folder or link in a tar."""

    name: str
    kind: bytes  # the header's type flag
    link: str
    offset: int  # of the content
    size: int  # bytes

    @property
    def end(self) -> int:
        """The offset of the next member."""
        return self.offset + _pad_size(self.size)


def read_members(descriptor: int) -> Iterator[Member]:
    """Yield the members of a tar without reading their content.

    The format is POSIX.1-2017, pax, "ustar Interchange Format".

    Raises:
        InvalidArchive: if the file is not a tar, is damaged, or is cut short.
    """
    total = os.fstat(descriptor).st_size
    offset = extended_length = 0
    extended: dict[bytes, bytes] = {}
    while any(block := os.pread(descriptor, BLOCK, offset)):
        check_header(block, offset)
        kind, size, start = block[156:157], _parse_number(block[124:136], offset), offset + BLOCK
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            extended_length += size + BLOCK
            if size > _HEADER_LIMIT or extended_length > _HEADERS_LIMIT:
                raise InvalidArchive("the archive has extended headers that are too large: it is not an image")
            data = os.pread(descriptor, size, start)
            if len(data) < size:
                raise InvalidArchive(f"the archive is cut short at byte {start + len(data)}: {SAVE_AGAIN}")
            extended.update(_parse_extended(kind, data, offset))
            offset = start + _pad_size(size)
            continue
        member = _parse_member(block, extended, offset)
        if start + member.size > total:
            raise InvalidArchive(f"the archive is cut short in {shorten(member.name)}: {SAVE_AGAIN}")
        yield member
        extended = {}
        offset = member.end
    if not offset:
        raise InvalidArchive(_NOT_A_TAR)
    if extended or any(os.pread(descriptor, 2 * BLOCK, offset)):
        raise InvalidArchive(f"the archive is cut short, or not a tar, at byte {offset}: {SAVE_AGAIN}")


def has_end(descriptor: int, offset: int) -> bool:
    """Return whether two blocks follow the last member; `read_members` has checked that they are zeros.

    They end every tar, but GNU tar and Docker also read a tar without them.
    """
    return len(os.pread(descriptor, 2 * BLOCK, offset)) == 2 * BLOCK


def check_header(block: bytes, offset: int) -> None:
    """Raise `InvalidArchive` unless a block is a header with a valid checksum."""
    if len(block) < BLOCK:
        where = offset + len(block)
        raise InvalidArchive(f"the archive is cut short at byte {where}: {SAVE_AGAIN}" if offset else _NOT_A_TAR)
    others = block[:148] + b" " * 8 + block[156:]
    # Old tools summed the bytes as signed numbers.
    if _parse_octal(block[148:156]) not in (sum(others), sum(others) - 256 * sum(byte > 127 for byte in others)):
        raise _damaged_error(offset) if offset else InvalidArchive(_NOT_A_TAR)


def _parse_member(block: bytes, extended: dict[bytes, bytes], offset: int) -> Member:
    """Return the member that a header and the extended headers before it describe."""
    if any(key.startswith(b"GNU.sparse.") for key in extended):
        raise InvalidArchive(f"the archive has a sparse file at byte {offset}: it is not an image")
    name, link, kind = block[:100], block[157:257], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = _parse_string(block[345:500]) + b"/" + _parse_string(name)
    name = extended.get(b"path") or _parse_string(name)
    link = extended.get(b"linkpath") or _parse_string(link)
    if kind == b"\0" and name.endswith(b"/"):
        kind = FOLDER  # tars older than POSIX mark a folder like this
    size = 0  # the field has a meaning only for regular files
    if kind in REGULAR:
        size = (
            _parse_decimal(extended[b"size"], offset) if b"size" in extended else _parse_number(block[124:136], offset)
        )
    return Member(os.fsdecode(name), kind, os.fsdecode(link), offset + BLOCK, size)


def _parse_extended(kind: bytes, data: bytes, offset: int) -> dict[bytes, bytes]:
    """Return the fields of an extended header, which describe the next member."""
    if kind in (b"L", b"K"):
        return {b"path" if kind == b"L" else b"linkpath": _parse_string(data)}
    found: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):  # records of "length key=value\n"; the length counts the whole record
        space = data.find(b" ", position, position + 20)
        end = position + _parse_decimal(data[position : max(space, position)], offset)
        key, equals, value = data[space + 1 : end].partition(b"=")
        if not equals or end > len(data) or not value.endswith(b"\n"):
            raise _damaged_error(offset)
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            found[key] = value[:-1]
        position = end
    if kind == b"g" and found:
        raise InvalidArchive(f"the archive sets one name or size for all members at byte {offset}: it is not an image")
    return {key: value for key, value in found.items() if value}


def _damaged_error(offset: int) -> InvalidArchive:
    return InvalidArchive(f"the archive is damaged at byte {offset}: {SAVE_AGAIN}")


def _parse_string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _pad_size(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _parse_decimal(digits: bytes, offset: int) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise _damaged_error(offset)
    return int(digits)


def _parse_number(field: bytes, offset: int) -> int:
    """Return a number of a header: octal, or base 256 if the first bit is set."""
    number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _parse_octal(field)
    if number is None:  # not octal, or a negative number in base 256
        raise _damaged_error(offset)
    return number


def _parse_octal(field: bytes) -> int | None:
    digits = field.strip(b" \0") or b"0"
    return None if digits.strip(b"01234567") else int(digits, 8)
