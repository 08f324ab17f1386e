"""Long lines give the same text as json, in pieces, and are refused where json refuses them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import long_json, readers
from data_prep.long_json import Unusable, text_pieces
from data_prep.readers import read_whole
from data_prep.sources import DataError, Skips, Source

TEXTS = st.text(st.sampled_from('abc "\\/\n\t\u0001éü中\u2028😀{}[]:,'), max_size=60)
OTHERS = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(
    text=TEXTS,
    others=st.dictionaries(TEXTS.filter(lambda key: key != "text"), OTHERS, max_size=4),
    escape=st.booleans(),
    spaces=st.booleans(),
    piece=st.integers(1, 30),
    first=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_long_line_is_what_json_reads(text, others, escape, spaces, piece, first):
    record = {"text": text, **others} if first else {**others, "text": text}
    line = json.dumps(record, ensure_ascii=escape, indent=1 if spaces else None)
    whole, long_json._PIECE_BYTES = long_json._PIECE_BYTES, piece
    try:
        found, pieces = text_pieces(bytearray(line.encode()), "text", "here")
        assert "".join(pieces) == text
    finally:
        long_json._PIECE_BYTES = whole
    assert found == others


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        "{}",
        '{"text": "torn',
        '{"text": "a"',
        '{"text": "a"} x',
        '{"text" "a"}',
        '{"text": "a",}',
        '{"other": [1, "text": "a"}',
        '{"other": {"a": [}, "text": "a"}',
        '{"other": , "text": "a"}',
        '{"other": nul, "text": "a"}',
        '{"text": "line\nend"}',
        '{"text": "bad \\x escape"}',
        '{"text": "cut \\u12"}',
    ],
)
def test_what_json_refuses_is_refused(line):
    if line != "{}" and line != "[1]":
        with pytest.raises(ValueError):
            json.loads(line)
    with pytest.raises(Unusable) as error:
        "".join(text_pieces(bytearray(line.encode()), "text", "a.jsonl:1")[1])
    assert error.value.reason in ("broken lines", "missing fields")
    assert error.value.detail.startswith("a.jsonl:1: ")


def test_the_last_of_members_with_one_name_counts_and_no_text_is_named():
    line = '{"text": "one", "text": "two", "n": 1}'
    found, pieces = text_pieces(bytearray(line.encode()), "text", "here")
    assert ("".join(pieces), found) == ("two", {"n": 1})
    for line in ('{"text": "one", "text": 5}', '{"text": 5, "b": 1}', '{"b": 1, "c": "x"}'):
        with pytest.raises(Unusable, match="no text in field 'text'; it has \\['"):
            text_pieces(bytearray(line.encode()), "text", "here")


def test_half_a_surrogate_pair_in_a_long_line_is_undecodable():
    with pytest.raises(Unusable) as error:
        list(text_pieces(bytearray(b'{"text": "\\ud800x"}'), "text", "here")[1])
    assert error.value.reason == "undecodable texts"


def test_readers_take_long_lines_this_way(tmp_path, monkeypatch):
    records = [{"text": f"{'word ' * 50}{i}", "kind": "a" if i % 2 else "b"} for i in range(4)]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, lines[0][:-9], '{"a": 1}' + " " * 99]))
    short = list(read_whole(Source("s", tmp_path, "jsonl"), short_skips := Skips()))
    monkeypatch.setattr(readers, "LONG_LINE_BYTES", 50)
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 64)
    long = list(read_whole(Source("s", tmp_path, "jsonl"), long_skips := Skips()))
    assert short == long
    assert short_skips.counts == long_skips.counts == {"broken lines": 1, "missing fields": 1}
    source = Source("s", tmp_path, "jsonl", where={"kind": "b"})
    assert [text for _, text in read_whole(source, Skips())] == [r["text"] for r in records[::2]]
    with pytest.raises(DataError, match=r"a\.jsonl:5: not JSON: the string that begins at byte"):
        list(read_whole(Source("s", tmp_path, "jsonl"), Skips(strict=True)))
