"""Every reader, and every way in which a source can be wrong."""

import gzip
import json
import os
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep import readers, sources
from data_prep.readers import read_part, read_whole
from data_prep.sources import (
    DataError,
    Skips,
    Source,
    list_files,
    plan_units,
)
from pipeline.contents import SourceFiles, look

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

RECORDS = [{"text": "first", "n": 1}, {"text": "zweite Zeile ü"}, {"text": "third\nline"}]


class Whole(NamedTuple):
    id: str
    text: str


def read(source, skips=None):
    return [Whole(*found) for found in read_whole(source, skips or Skips())]


def write_lines(path, records):
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        # two frames, as pzstd and appending writers leave them
        half = raw.index(b"\n") + 4
        raw = b"".join(zstandard.compress(part) for part in (raw[:half], raw[half:]))
    path.write_bytes(raw)
    return path


def test_text_files_are_documents_with_relative_ids(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.txt").write_text("two")
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "image.png").write_text("not asked for")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/hidden.txt").write_text("hidden")
    source = Source("s", tmp_path, glob="**/*.txt")
    assert read(source) == [("b/two.txt", "two"), ("one.txt", "one")]
    assert read(Source("s", tmp_path / "one.txt")) == [("one.txt", "one")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text(tmp_path, suffix):
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"inside"))
    assert [d.text for d in read(Source("s", tmp_path))] == ["inside"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path, name, monkeypatch):
    # chunks smaller than a line: lines must be put together again
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 7)
    write_lines(tmp_path / name, RECORDS)
    documents = read(Source("s", tmp_path, "jsonl"))
    assert [d.text for d in documents] == [r["text"] for r in RECORDS]
    assert [d.id for d in documents] == [f"{name}:1", f"{name}:2", f"{name}:3"]


def test_json_lines_is_lazy(tmp_path):
    write_lines(tmp_path / "a.jsonl", RECORDS * 100_000)
    first = list(islice(read_whole(Source("s", tmp_path, "jsonl"), Skips()), 2))
    assert [text for _, text in first] == [r["text"] for r in RECORDS[:2]]


def test_parquet(tmp_path):
    table = pyarrow.table({"content": ["one", None, "drei ü"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    skips = Skips()
    documents = read(Source("s", tmp_path, "parquet", field="content"), skips=skips)
    assert [(d.id, d.text) for d in documents] == [
        ("a.parquet:1", "one"),
        ("a.parquet:3", "drei ü"),
    ]
    assert skips.counts == {"missing fields": 1}


def test_parquet_undecodable_row_is_counted(tmp_path):
    raw = pyarrow.array([b"good", b"b\xffd"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    skips = Skips()
    source = Source("s", tmp_path, "parquet")
    assert [d.text for d in read(source, skips=skips)] == ["good"]
    assert skips.counts == {"undecodable texts": 1}
    with pytest.raises(DataError, match=r"a\.parquet:2.*0xff at offset 1"):
        read(source, skips=Skips(strict=True))


def test_directory_joins_the_files_of_one_folder(tmp_path):
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/b.c").write_text("int b;\n")
    (tmp_path / "x/a.c").write_text("int a;")
    (tmp_path / "x/y/c.c").write_text("int c;")
    (tmp_path / "top.c").write_text("int t;")
    documents = read(Source("s", tmp_path, "directory"))
    assert [d.id for d in documents] == [".", "x", "x/y"]
    assert documents[1].text == "==> x/a.c <==\nint a;\n\n==> x/b.c <==\nint b;\n"


def test_stdlib_is_python_text_without_tests():
    names = list_files(Source("s", Path("stdlib")))
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not {"test", "site-packages", "lib2to3"} & {p for n in names for p in n.split("/")}


def test_seed_orders_files_and_keeps_them_all(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    plain, one, two, again = (
        [part.key for unit in plan_units(Source("s", tmp_path), seed) for part in unit.parts]
        for seed in (None, 1, 2, 1)
    )
    assert plain == sorted(one) == sorted(two)
    assert plain != one != two
    assert one == again


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_broken_lines_are_named_and_counted_or_refused(tmp_path, suffix):
    path = write_lines(tmp_path / f"a.jsonl{suffix}", RECORDS)
    raw = b'{"text": "good"}\n{"text": "torn\n\n[1]\n{"other": 1}\n{"text": 5}\n'
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path.write_bytes(compress(raw))
    source = Source("s", tmp_path, "jsonl")
    skips = Skips()
    assert [d.text for d in read(source, skips=skips)] == ["good"]
    assert skips.counts == {"broken lines": 1, "missing fields": 3}
    assert f"{path}:2" in skips.describe()
    assert f"{path}:4" in skips.describe()
    with pytest.raises(DataError, match=r"a\.jsonl.*:2: not JSON.*data\.strict=false"):
        read(source, skips=Skips(strict=True))


def test_missing_field_refused_when_strict_names_what_is_there(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"content": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: no text in field 'text'.*'content'"):
        read(Source("s", tmp_path, "jsonl"), skips=Skips(strict=True))


def test_undecodable_bytes_are_counted_or_refused_with_their_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xffdef")
    (tmp_path / "good.txt").write_text("good")
    source = Source("s", tmp_path)
    skips = Skips()
    assert [d.text for d in read(source, skips=skips)] == ["good"]
    assert skips.counts == {"undecodable texts": 1}
    with pytest.raises(DataError, match=r"bad\.txt: byte 0xff at offset 3"):
        read(source, skips=Skips(strict=True))


def test_undecodable_json_line_offset_counts_from_the_file_start(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xfe"}\n')
    skips = Skips()
    read(Source("s", tmp_path, "jsonl"), skips=skips)
    assert f"{tmp_path / 'a.jsonl'}:2: byte 0xfe at offset 24" in skips.describe()


def test_half_a_surrogate_pair_is_undecodable(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800x"}\n{"text": "\\ud83d\\ude00"}\n')
    skips = Skips()
    documents = read(Source("s", tmp_path, "jsonl"), skips=skips)
    assert [d.text for d in documents] == ["\U0001f600"]
    assert skips.counts == {"undecodable texts": 1}


def test_undecodable_file_in_a_directory_leaves_the_others(tmp_path):
    (tmp_path / "a.c").write_text("int a;")
    (tmp_path / "b.bin").write_bytes(b"\x80\x81")
    skips = Skips()
    (document,) = read(Source("s", tmp_path, "directory"), skips=skips)
    assert document.text == "==> a.c <==\nint a;\n"
    assert skips.counts == {"undecodable texts": 1}


def test_empty_documents_are_counted_even_when_strict(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("b")
    skips = Skips(strict=True)
    assert [d.id for d in read(Source("s", tmp_path), skips=skips)] == ["b.txt"]
    assert skips.counts == {"empty documents": 1}


def test_files_of_no_bytes_are_counted_and_the_others_read(data_set):
    for name in ("0.jsonl", "0.parquet", "0.arrow", "0.jsonl.gz", "0.jsonl.zst"):
        (data_set / name).touch()
    skips = Skips(strict=True)
    assert len(read(Source("s", data_set, "dataset"), skips)) == 6
    assert skips.counts == {"empty files": 5}
    (data_set / "d").mkdir()
    (data_set / "d/0.c").touch()
    (data_set / "d/a.c").write_text("int a;")
    for source, counted in (
        (Source("s", data_set / "d"), {"empty documents": 1}),
        (Source("s", data_set / "d", "directory"), {"empty files": 1}),
    ):
        skips = Skips(strict=True)
        assert ["int a;" in text for _, text in read(source, skips)] == [True]
        assert skips.counts == counted


def test_a_source_without_documents_is_refused_and_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="source wiki: no document in .*1 broken lines"):
        read(Source("wiki", tmp_path, "jsonl"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="source wiki: no document in .*left out: 1 empty files"):
        read(Source("wiki", tmp_path, "jsonl"))


def test_missing_path_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist; set the source's path"):
        read(Source("s", tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no file in .* matches '\*\*/\*'"):
        read(Source("s", tmp_path))
    with pytest.raises(DataError, match="glob='/etc/"):
        read(Source("s", tmp_path, glob="/etc/*"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_archives_are_refused(tmp_path, name):
    path = write_lines(tmp_path / name, [{"text": f"line {i}"} for i in range(2000)])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"cannot read .*{name}: .*check the file"):
        read(Source("s", tmp_path, "jsonl"))


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
def test_archives_of_another_format_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text, whatever its name says")
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        read(Source("s", tmp_path, "jsonl"))


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def denied(self, *arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"a\.txt: .*Permission denied; check the file and its"):
        read(Source("s", tmp_path))


def test_broken_parquet_and_wrong_column_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet.*whole parquet or arrow file"):
        read(Source("s", tmp_path, "parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no text column 'text'; it has \{'text': 'int64'\}"):
        read(Source("s", tmp_path, "parquet"))
    with pytest.raises(DataError, match="no text column 'body'; it has"):
        read(Source("s", tmp_path, "parquet", field="body"))


def test_unknown_format_and_weight_are_refused(tmp_path):
    with pytest.raises(DataError, match="format='csv': must be one of text, jsonl, parquet"):
        Source("s", tmp_path, "csv")
    with pytest.raises(DataError, match="weight=0.*above 0"):
        Source("s", tmp_path, weight=0.0)
    with pytest.raises(DataError, match="a text source has no fields; take `where` out"):
        Source("s", tmp_path, where={"a": "b"})


def in_units(source, **options):
    """Documents as workers read them, unit by unit."""
    skips = Skips()
    return [
        (document.id, "".join(document.texts))
        for unit in plan_units(source, None, **options)
        for part in unit.parts
        for document in read_part(source, part, skips)
    ]


def test_a_large_file_of_lines_is_read_in_ranges_and_each_line_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"{i} " * (i % 40)} for i in range(300)])
    source = Source("s", tmp_path, "jsonl")
    whole = in_units(source)
    monkeypatch.setattr(sources, "SPLIT_BYTES", 1000)
    for unit_bytes in (97, 1000, 10**6):
        assert len(plan_units(source, None, unit_bytes)) == -(-path.stat().st_size // unit_bytes)
        parts = in_units(source, unit_bytes=unit_bytes)
        assert [text for _, text in parts] == [text for _, text in whole]
    raw = path.read_bytes()
    for name, text in parts:
        offset = int(name.removeprefix("a.jsonl@"))
        assert json.loads(raw[offset:].split(b"\n")[0])["text"] == text


def test_a_range_inside_one_line_is_read_no_further(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 5000}, {"text": "y"}])
    monkeypatch.setattr(sources, "SPLIT_BYTES", 1000)
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 100)
    read_bytes = []
    chunks = readers._chunks

    def counted(*arguments):
        for chunk in chunks(*arguments):
            read_bytes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(readers, "_chunks", counted)
    assert [text for _, text in in_units(Source("s", tmp_path, "jsonl"), unit_bytes=500)] == [
        "x" * 5000,
        "y",
    ]
    assert sum(read_bytes) < 2.5 * path.stat().st_size


def test_a_large_parquet_file_is_read_by_row_groups(tmp_path, monkeypatch):
    table = pyarrow.table({"text": [f"row {i}" for i in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    source = Source("s", tmp_path, "parquet")
    whole = in_units(source)
    monkeypatch.setattr(sources, "SPLIT_BYTES", 1)
    assert len(plan_units(source, None)) == 4
    assert in_units(source) == whole
    assert whole[99] == ("a.parquet:100", "row 99")


def test_small_files_share_a_unit(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("x" * 100)
    units = plan_units(Source("s", tmp_path), None, unit_bytes=1000)
    assert [len(unit.parts) for unit in units] == [10, 10]
    assert [unit.size for unit in units] == [1000, 1000]


@pytest.fixture
def data_set(tmp_path):
    """What save_to_disk and the hub leave: rows in three formats, and notes beside them."""
    table = pyarrow.table({"text": ["one", "two"], "meta": [{"set": "books"}, {"set": "web"}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    write_lines(tmp_path / "c.jsonl.zst", table.to_pylist())
    for name in ("dataset_info.json", "state.json", "README.md"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_a_data_sets_folder_gives_the_rows_of_its_files(data_set):
    found = read(Source("s", data_set, "dataset"))
    assert [document.text for document in found] == ["one", "two"] * 3
    assert [document.id for document in found][2:5] == ["b.arrow:1", "b.arrow:2", "c.jsonl.zst:1"]


def test_where_takes_rows_by_a_field(data_set):
    found = read(Source("s", data_set, "dataset", where={"meta.set": "books"}))
    assert [document.text for document in found] == ["one"] * 3
    skips = Skips()
    with pytest.raises(DataError, match="no document in .*left out: nothing.*where"):
        read(Source("s", data_set, "dataset", where={"meta.set": "none"}), skips=skips)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 100)
    path = write_lines(tmp_path / "a.jsonl", RECORDS * 100)
    found = read_whole(Source("s", tmp_path, "jsonl"), Skips())
    next(found)
    size = path.stat().st_size
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=rf"changed while it was read, from {size} to 1000 bytes"):
        list(found)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_table_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "_TABLE_ROWS", 10)
    path = tmp_path / f"a.{kind}"
    table = pyarrow.table({"text": [str(n) * 1000 for n in range(3000)]})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=10)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    found = read_whole(Source("s", tmp_path, "dataset"), Skips())
    next(found)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=rf"a\.{kind}: (changed while|.*; check )"):
        list(found)


def test_text_in_pieces_keeps_characters_and_finds_broken_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 5)
    (tmp_path / "a.txt").write_bytes("\ufeffé中😀 abc ü".encode())
    (document,) = read(Source("s", tmp_path))
    assert document.text == "é中😀 abc ü"
    raw = "é中😀".encode()
    for broken, at in ((raw + b"\xff abcdefg", 9), (raw[:-1], 5)):
        (tmp_path / "a.txt").write_bytes(broken)
        with pytest.raises(DataError, match=rf"byte 0x.. at offset {at} is not UTF-8"):
            read(Source("s", tmp_path), skips=Skips(strict=True))
    (tmp_path / "a.txt").write_bytes("abc".encode("utf-16"))
    with pytest.raises(DataError, match="at offset 0 is not UTF-8, but begins as UTF-16 does"):
        read(Source("s", tmp_path), skips=Skips(strict=True))


TEXT = pyarrow.array(["eins", "zwei ü"])


@pytest.mark.parametrize(
    "column",
    [
        TEXT,
        TEXT.cast(pyarrow.large_string()),
        TEXT.cast(pyarrow.string_view()),
        TEXT.cast(pyarrow.binary()),
        TEXT.cast(pyarrow.large_binary()),
        TEXT.dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_text_columns_of_every_type(column, tmp_path):
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    for source in (
        Source("s", tmp_path / "a.parquet", "parquet"),
        Source("s", tmp_path, "dataset"),
    ):
        found = [d.text for d in read(source)]
        assert found == ["eins", "zwei ü"] * (1 if source.format == "parquet" else 2)


def test_columns_that_hold_no_one_text_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table([TEXT, TEXT], ["text", "text"]), tmp_path / "a")
    with pytest.raises(DataError, match=r"'text' must be there once; write the file with unique"):
        read(Source("s", tmp_path, "parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a")
    with pytest.raises(DataError, match=r"no text column 'text'.*int64.*of type string, large_st"):
        read(Source("s", tmp_path, "parquet"))


def test_a_byte_order_mark_before_a_long_line_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONG_LINE_BYTES", 40)
    lines = [{"text": "long words " * 9}, {"text": "short"}]
    raw = "".join(json.dumps(line) + "\r\n" for line in lines).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + raw)
    skips = Skips(strict=True)
    found = read(Source("s", tmp_path, "jsonl"), skips)
    assert [d.text for d in found] == [line["text"] for line in lines]


def test_a_frame_with_a_long_window_is_read(tmp_path):
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
    # streamed, so that no content size makes the window smaller
    raw = stream.compress(b"inside") + stream.flush()
    assert zstandard.get_frame_parameters(raw).window_size == 1 << 28
    (tmp_path / "a.txt.zst").write_bytes(raw)
    assert [d.text for d in read(Source("s", tmp_path))] == ["inside"]


def test_names_that_are_not_utf8_are_names(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("inside")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXT}), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / name / "a.parquet")
    texts = Source("s", tmp_path, glob="**/*.txt")
    assert look(SourceFiles({}, tmp_path, lambda: list_files(texts)))["content"]
    assert [part.key for unit in plan_units(texts, 1) for part in unit.parts] == [f"{name}/a.txt"]
    assert [d.text for d in read(texts)] == ["inside"]
    (joined,) = read(Source("s", tmp_path, "directory", glob="**/*.txt"))
    assert joined.text == "==> caf\ufffd/a.txt <==\ninside\n"
    assert len(read(Source("s", tmp_path, "parquet", glob="**/*.parquet"))) == 2
