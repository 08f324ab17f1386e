"""The same ids in pieces as whole, in two processes as in one; <bos> first, nothing else added."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_prep import tokenizer as module
from data_prep.sources import DataError, Document
from data_prep.tokenizer import Encoder, ModelTokenizer, load_tokenizer, tokenize_documents
from tests.data_prep.helpers import TEXTS, byte_level, metaspace, model_tokenizer, save_model_folder

ENCODERS = {
    "byte_level": Encoder(byte_level().to_str()),
    "digits": Encoder(byte_level(digits=True).to_str()),
    "metaspace": Encoder(metaspace().to_str()),
}
# what could go wrong at a cut: runs of spaces, digits, contractions, specials, odd space characters
FRAGMENTS = st.sampled_from(
    ["The", " quick", " ", "  ", "\n", "\t", "12", "3", "'s", " theirs", "<s>", "\u00a0", "▁", "é"]
    + ["\x1c", "\u2028", "ü ", "中文", "\U0001f600", ",", " hay.", "   and"]
)


@pytest.mark.parametrize("kind", ENCODERS)
@given(parts=st.lists(FRAGMENTS, max_size=40), size=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_ids_in_pieces_equal_ids_of_the_whole(kind, parts, size):
    encoder = ENCODERS[kind]
    text = "".join(parts)
    assert encoder.can_cut
    whole = encoder.tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.encode(text, piece_characters=size).tolist() == whole


def test_pieces_are_bounded_and_join_to_the_text():
    text = " ".join(TEXTS * 5)
    pieces = list(Encoder.pieces(text, 50))
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert max(map(len, pieces)) < 150


def changed(**changes) -> Encoder:
    tokenizer = byte_level()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Encoder(tokenizer.to_str())


def test_no_cut_where_it_is_not_proven():
    assert not Encoder(byte_level(add_prefix_space=True).to_str()).can_cut
    assert not Encoder(byte_level(use_regex=False).to_str()).can_cut
    assert not changed(normalizer=normalizers.NFC()).can_cut
    assert not changed(pre_tokenizer=pre_tokenizers.Whitespace()).can_cut
    with_plain_added = byte_level()
    with_plain_added.add_tokens(["a b"])
    assert not Encoder(with_plain_added.to_str()).can_cut


def crossing_metaspace() -> Encoder:
    """A vocabulary with a token over a space: a cut there would change the ids."""
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "a", "b", "▁b", "a▁b"])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "b"), ("a", "▁b")], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return Encoder(tokenizer.to_str())


def test_no_cut_where_a_token_holds_a_space_after_a_letter():
    encoder = crossing_metaspace()
    assert encoder.encode("a b", piece_characters=1).tolist() == [5]
    assert not encoder.can_cut
    encoder.can_cut = True
    assert encoder.encode("a b", piece_characters=1).tolist() == [2, 4]


def documents(count=30):
    for i in range(count):
        yield Document(f"d{i}", "s", f"{TEXTS[i % 3]} number {i} " * (1 + 7 * i % 11))


def test_one_and_two_workers_give_the_same(monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(module, "ALONE_CHARACTERS", 1500)
    one, two = (list(tokenize_documents(documents(), model_tokenizer(), n)) for n in (1, 2))
    assert [d.id for d in one] == [f"d{i}" for i in range(30)]
    for a, b in zip(one, two, strict=True):
        assert (a.id, a.source, a.digest) == (b.id, b.source, b.digest)
        assert a.tokens.dtype == b.tokens.dtype == np.int32
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_documents_begin_with_bos_and_special_text_stays_text():
    tokenizer = model_tokenizer()
    text = "a<s>b</s>"
    (document,) = tokenize_documents(iter([Document("d", "s", text)]), tokenizer)
    assert document.tokens[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in document.tokens[1:]
    assert byte_level().decode(document.tokens[1:].tolist()) == text


def test_reads_a_bounded_number_of_documents_ahead(monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(module, "ALONE_CHARACTERS", 1)
    taken = []

    def counted():
        for document in documents():
            taken.append(document.id)
            yield document

    stream = tokenize_documents(counted(), model_tokenizer(), workers=2)
    assert [next(stream).id for _ in range(2)] == ["d0", "d1"]
    assert 2 < len(taken) <= 7
    stream.close()


def test_a_model_folder_gives_the_tokenizer_transformers_reads(tmp_path):
    tokenizer = load_tokenizer(save_model_folder(tmp_path / "model"))
    assert tokenizer.bos_id == byte_level().token_to_id("<s>")
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    whole = byte_level().encode(TEXTS[0]).ids
    assert Encoder(tokenizer.serialized).encode(TEXTS[0]).tolist() == whole


def test_no_bos_token_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no bos_token.*set bos_token in its tokenizer_config"):
        load_tokenizer(save_model_folder(tmp_path / "model", bos=None))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer can be loaded from .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_fast_form_is_refused(tmp_path, monkeypatch):
    import transformers

    class Slow:
        is_fast = False

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: Slow())
    with pytest.raises(DataError, match="is a Slow without the form of the tokenizers library"):
        load_tokenizer(tmp_path)


def test_little_text_starts_no_process(monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *a, **k: pytest.fail("started"))
    assert len(list(tokenize_documents(documents(), model_tokenizer(), 2))) == 30


def test_workers_below_one_are_refused():
    with pytest.raises(DataError, match=r"data\.workers=0: must be 1 or more"):
        next(tokenize_documents(documents(), model_tokenizer(), 0))


class Deadly(str):
    """Text that kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_dead_worker_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(module, "ALONE_CHARACTERS", 1)
    deadly = iter([Document("a", "s", "alone"), Document("d", "s", Deadly("x"))])
    with pytest.raises(DataError, match=r"a tokenizer process of 2 died.*data\.workers"):
        list(tokenize_documents(deadly, model_tokenizer(), 2))


def test_vocabulary_size_covers_ids_of_added_tokens(tmp_path):
    assert isinstance(model_tokenizer(), ModelTokenizer)
    folder = save_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<extra>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = load_tokenizer(folder).vocab_size
    assert size == tokenizer.token_to_id("<extra>") + 1
