"""JSON records and their text; of a long line the text comes in pieces, never parsed as a whole."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any

_PIECE_BYTES = 1 << 20
# No escape is longer: the two halves of a surrogate pair, \ud83d\ude00.
_LONGEST_ESCAPE = 12
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^,\]}\s]++")
_BRACKET = re.compile(rb'["\[\]{}]')
MISSING = object()


class Unusable(Exception):
    """A document that is left out: reason ("broken lines", ...) and detail, where and why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def value_at(record: Any, path: str) -> Any:
    """The value of field "a.b" of a parsed record; MISSING where there is none."""
    for name in path.split("."):
        if not isinstance(record, dict) or name not in record:
            return MISSING
        record = record[name]
    return record


def text_of(record: Any, field: str, where: str) -> str:
    """The text in a parsed record's field.

    Raises:
        Unusable: when there is none, or it holds half of a surrogate pair.
    """
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise Unusable("missing fields", f"{where}: no text in field {field!r}; it has {keys}")
    return _whole_characters(text, where)


def text_pieces(line: bytearray, field: str, where: str) -> tuple[dict[str, Any], Iterator[str]]:
    """What a long line holds beside its text, and the text in pieces of some MiB.

    Args:
        line: one JSON object, UTF-8.
        where: the line's name, for messages.

    Raises:
        Unusable: when the line is no JSON object or has no text in `field`; taking the pieces, when
            one is broken.
    """
    try:
        record, text = _members(line, field)
    except (ValueError, RecursionError) as error:
        raise Unusable("broken lines", f"{where}: not JSON: {error}") from error
    if text is None:
        keys = sorted({*record, *([field] if field in record else [])})
        raise Unusable("missing fields", f"{where}: no text in field {field!r}; it has {keys}")
    return record, _decoded(line, *text, where)


def _whole_characters(text: str, where: str) -> str:
    # json accepts "\ud800" alone, which no encoder and no tokenizer does
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            detail = f"{where}: half of a surrogate pair is not UTF-8"
            raise Unusable("undecodable texts", detail) from error
    return text


def _members(line: bytearray, field: str) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """The other members, parsed, and where the text stands between its quotes."""
    at = _expect(line, len(BOM_UTF8) if line.startswith(BOM_UTF8) else 0, b"{")
    record: dict[str, Any] = {}
    text = None
    while True:
        key_start = _expect(line, at, b'"')
        key_stop = _string_stop(line, key_start)
        key = json.loads(bytes(line[key_start - 1 : key_stop + 1]))
        start = _SPACE.match(line, _expect(line, key_stop + 1, b":")).end()
        stop = _value_stop(line, start)
        # As json does, the last of members with one name counts.
        if key == field:
            text = (start + 1, stop - 1) if line[start : start + 1] == b'"' else None
        if key != field or text is None:
            record[key] = json.loads(bytes(line[start:stop]))
        at = _SPACE.match(line, stop).end()
        if line[at : at + 1] != b",":
            break
        at += 1
    end = _SPACE.match(line, _expect(line, at, b"}")).end()
    if end != len(line):
        raise ValueError(f"extra data at byte {end}")
    return record, text


def _expect(line: bytearray, at: int, mark: bytes) -> int:
    at = _SPACE.match(line, at).end()
    if line[at : at + 1] != mark:
        raise ValueError(f"no {mark.decode()} at byte {at}")
    return at + 1


def _string_stop(line: bytearray, start: int) -> int:
    """Where the quote stands that ends the string whose text begins at `start`."""
    at = start
    while True:
        at = line.find(b'"', at)
        if at < 0:
            raise ValueError(f"the string that begins at byte {start - 1} has no end")
        before = at
        while line[before - 1] == 0x5C and before > start:
            before -= 1
        if (at - before) % 2 == 0:
            return at
        at += 1


def _value_stop(line: bytearray, start: int) -> int:
    first = line[start : start + 1]
    if first == b'"':
        return _string_stop(line, start + 1) + 1
    if first not in (b"{", b"["):
        scalar = _SCALAR.match(line, start)
        if not scalar:
            raise ValueError(f"no value at byte {start}")
        return scalar.end()
    depth, at = 0, start
    while True:
        bracket = _BRACKET.search(line, at)
        if not bracket:
            raise ValueError(f"the value that begins at byte {start} has no end")
        at = bracket.end()
        if bracket[0] == b'"':
            at = _string_stop(line, at) + 1
            continue
        depth += 1 if bracket[0] in b"{[" else -1
        if not depth:
            return at


def _decoded(line: bytearray, start: int, stop: int, where: str) -> Iterator[str]:
    while start < stop:
        cut = _cut(line, start, stop)
        try:
            text = json.loads(b'"' + line[start:cut] + b'"')
        except ValueError as error:
            raise Unusable("broken lines", f"{where}: not JSON: {error}") from error
        yield _whole_characters(text, where)
        start = cut


def _cut(line: bytearray, start: int, stop: int) -> int:
    """A place after `start` where neither an escape nor a character is cut."""
    cut = start + _PIECE_BYTES
    while cut < stop:
        escape = line.rfind(b"\\", max(start, cut - _LONGEST_ESCAPE), cut)
        if escape < 0 and line[cut] & 0xC0 != 0x80:
            return cut
        cut += 1
    return stop
