"""IndexedDataset files: what is written is read, by megatron-core too; broken files are refused."""

import errno
import pickle
import warnings

import numpy as np
import pytest

from data_prep.shards import (
    HeldOutDocuments,
    IndexedReader,
    IndexedWriter,
    PackedRows,
    token_dtype,
    write_whole,
)
from data_prep.sources import DataError

ITEMS = [np.arange(5), np.array([], np.int64), np.array([7, 65_000, 3])]


def write_items(prefix, dtype="uint16", items=ITEMS):
    with IndexedWriter(prefix, dtype) as writer:
        for item in items:
            writer.add(item)
    return prefix


def write_rows(prefix):
    rows, lengths = [[1, 2, 3, 1, 4, 5], [1, 6, 9, 9, 9, 9]], [[3, 3], [2]]
    write_items(prefix, "uint16", [np.array(row) for row in rows])
    lengths = [np.array(row) for row in lengths]
    write_items(prefix.with_name(prefix.name + "_lengths"), "int32", lengths)
    return prefix


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_items_come_back_in_their_type(tmp_path, dtype):
    reader = IndexedReader(write_items(tmp_path / "x", dtype))
    assert len(reader) == 3
    assert reader.dtype == dtype
    for item, read in zip(ITEMS, reader, strict=True):
        np.testing.assert_array_equal(item, read)


def test_megatron_reads_our_files_and_we_read_megatrons(tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    ours = indexed.IndexedDataset(str(write_items(tmp_path / "ours")))
    assert len(ours) == 3
    for item, read in zip(ITEMS, (ours[i] for i in range(3)), strict=True):
        np.testing.assert_array_equal(item, read)
    assert ours.document_indices.tolist() == [0, 1, 2, 3]

    rows = indexed.IndexedDataset(str(write_rows(tmp_path / "rows")))
    assert [rows[i].tolist() for i in range(2)] == [[1, 2, 3, 1, 4, 5], [1, 6, 9, 9, 9, 9]]
    lengths = indexed.IndexedDataset(str(tmp_path / "rows_lengths"))
    assert [lengths[i].tolist() for i in range(2)] == [[3, 3], [2]]

    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for item in ITEMS:
        builder.add_item(torch.from_numpy(item))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        theirs = (tmp_path / f"theirs{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == theirs


def test_rows_carry_lengths_and_padding(tmp_path):
    rows = PackedRows(write_rows(tmp_path / "train"))
    assert len(rows) == 2
    for row in rows:
        assert row.tokens.dtype == row.document_lengths.dtype == np.int64
        assert row.document_lengths.sum() + row.padding == len(row.tokens) == 6
    assert rows[0].padding == 0
    assert rows[1].tokens.tolist() == [1, 6, 9, 9, 9, 9]
    assert rows[1].document_lengths.tolist() == [2]


def test_readers_pickle_as_their_path(tmp_path):
    rows = PackedRows(write_rows(tmp_path / "train"))
    pickled = pickle.dumps(rows)
    assert len(pickled) < 500
    np.testing.assert_array_equal(pickle.loads(pickled)[0].tokens, rows[0].tokens)


def test_held_out_documents_are_whole_and_named(tmp_path):
    prefix = write_items(tmp_path / "held_out_documents")
    names = [{"id": str(i), "source": "s", "tokens": len(item)} for i, item in enumerate(ITEMS)]
    write_whole(tmp_path / "held_out_documents.json", str(names).replace("'", '"').encode())
    held_out = HeldOutDocuments(prefix)
    assert [len(document) for document in held_out] == [n["tokens"] for n in held_out.names]
    assert pickle.loads(pickle.dumps(held_out))[2].tolist() == [7, 65_000, 3]


def test_token_dtype_is_megatrons():
    assert [token_dtype(n) for n in (32_000, 65_499, 65_500, 128_256)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]


@pytest.mark.parametrize("value", [65_536, -1])
def test_values_that_do_not_fit_are_refused(tmp_path, value):
    with (
        pytest.raises(DataError, match="uint16 holds 0 to 65535"),
        IndexedWriter(tmp_path / "x", "uint16") as writer,
    ):
        writer.add(np.array([value]))
    assert not (tmp_path / "x.idx").exists()


def test_truncated_missing_and_foreign_files_are_refused(tmp_path):
    prefix = write_items(tmp_path / "x")
    bin_path, idx_path = tmp_path / "x.bin", tmp_path / "x.idx"
    tokens, index = bin_path.read_bytes(), idx_path.read_bytes()
    bin_path.write_bytes(tokens[:-2])
    with pytest.raises(DataError, match=r"x\.bin: 14 bytes: its index says 16.*force=true"):
        IndexedReader(prefix)
    bin_path.write_bytes(tokens)
    for broken in (index[:-1], index[:20]):
        idx_path.write_bytes(broken)
        with pytest.raises(DataError, match=r"x\.idx.*force=true"):
            IndexedReader(prefix)
    idx_path.write_bytes(b"GGUF" + index[4:])
    with pytest.raises(DataError, match="do not start as an IndexedDataset's index"):
        IndexedReader(prefix)
    idx_path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*x\.idx: No such file"):
        IndexedReader(prefix)


def test_rows_and_lengths_of_two_runs_are_refused(tmp_path):
    prefix = write_rows(tmp_path / "train")
    write_items(tmp_path / "train_lengths", "int32")
    with pytest.raises(DataError, match="2 rows, but lengths of 3: files of two runs"):
        PackedRows(prefix)


class FullDisk:
    """A file on a disk that is full from the `after`th write or, with 0, from the flush."""

    def __init__(self, stream, after, code):
        self.stream, self.after, self.code, self.writes = stream, after, code, 0

    def write(self, data):
        self.writes += 1
        if self.writes == self.after:
            raise OSError(self.code, "full")
        return self.stream.write(data)

    def flush(self):
        if not self.after:
            raise OSError(self.code, "full")
        self.stream.flush()

    def close(self):
        self.stream.close()

    def fileno(self):
        return self.stream.fileno()


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_file_and_remedy_and_leaves_no_index(tmp_path, after, code):
    writer = IndexedWriter(tmp_path / "x", "uint16")
    writer._stream = FullDisk(writer._stream, after, code)
    with pytest.raises(DataError, match=r"x\.bin: .*free space there or set `outputs`"), writer:
        for item in ITEMS:
            writer.add(item)
    assert not (tmp_path / "x.idx").exists()
    with pytest.raises(DataError, match="cannot read"):
        IndexedReader(tmp_path / "x")


def test_other_errors_of_a_disk_stay_what_they_are(tmp_path):
    writer = IndexedWriter(tmp_path / "x", "uint16")
    writer._stream = FullDisk(writer._stream, 1, errno.EIO)
    with pytest.raises(OSError, match="full"), writer:
        writer.add(ITEMS[0])
