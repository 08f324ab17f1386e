"""The same ids in pieces as whole, by tiktoken's engine as by tokenizers; nothing else added."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_prep.cuts import pieces
from data_prep.merges import MergeEngine, Unsupported
from data_prep.parity import parity_sample
from data_prep.sources import DataError
from data_prep.tokenizer import Encoder, choose_engine, load_tokenizer
from tests.data_prep.helpers import (
    TEXTS,
    byte_level,
    llama3,
    metaspace,
    prefixed,
    replaced,
    save_model_folder,
)

SERIALIZED = {
    "byte_level": byte_level().to_str(),
    "digits": byte_level(digits=True).to_str(),
    "metaspace": metaspace().to_str(),
    "prefixed": prefixed().to_str(),
    "llama3": llama3().to_str(),
    "replaced": replaced().to_str(),
}
ENCODERS = {
    (kind, engine): Encoder(serialized, engine)
    for kind, serialized in SERIALIZED.items()
    for engine in ("tokenizers", "tiktoken")
}
# what could go wrong at a cut: runs of spaces, digits, contractions, specials, odd space characters
FRAGMENTS = st.sampled_from(
    ["The", " quick", " ", "  ", "\n", "\t", "12", "3", "'s", " theirs", "<s>", "\u00a0", "▁", "é"]
    + ["\x1c", "\u2028", "ü ", "中文", "\U0001f600", ",", " hay.", "   and"]
    + ["。", "，「", "字符", "ab1c2", "+/=", "'", "’s", "ไทย", "12345", "s't", "\r\n", "。\n"]
    + ["\x00", "\n\n", "\u3000", "\x85 ", "½"]
)


def in_pieces(encoder, texts, size):
    return np.concatenate([[], *encoder.encode_stream(texts, size)]).astype(int).tolist()


@pytest.mark.parametrize("kind", ENCODERS)
@given(parts=st.lists(FRAGMENTS, max_size=40), size=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_ids_in_pieces_equal_ids_of_the_whole(kind, parts, size):
    encoder = ENCODERS[kind]
    text = "".join(parts)
    assert encoder.cut or kind == ("prefixed", "tokenizers")
    whole = encoder.tokenizer.encode(text, add_special_tokens=False).ids
    assert in_pieces(encoder, [text], size) == whole
    assert in_pieces(encoder, parts, size) == whole
    assert encoder.encode(text).tolist() == whole


def test_pieces_are_bounded_and_join_to_the_text():
    text = " ".join(TEXTS * 5)
    cut = ENCODERS["byte_level", "tokenizers"].cut
    for texts in ([text], [text[i : i + 7] for i in range(0, len(text), 7)]):
        found = list(pieces(iter(texts), cut, 50))
        assert "".join(found) == text
        assert len(found) > 20
        assert max(map(len, found)) < 150
    assert list(pieces(iter(["a b", " c"]), None, 1)) == ["a b c"]
    assert list(pieces(iter(["", ""]), cut, 1)) == []


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != ("prefixed", "tokenizers")])
@pytest.mark.parametrize(
    "text",
    ["这里没有空格，" * 300, "เที่ยว ไทย," * 300, "QmFzZTY0/+" * 300, "aB1" * 900, "a,b" * 900],
    ids=["cjk", "thai", "base64", "digits", "marks"],
)
def test_texts_without_spaces_are_cut_too(kind, text):
    encoder = ENCODERS[kind]
    if kind[0] == "metaspace" and kind[1] == "tokenizers" and " " not in text:
        # a piece that begins with a space gets none before it, any other would
        assert encoder.cut(text, 50) is None
        return
    found = list(pieces([text], encoder.cut, 50))
    assert max(map(len, found)) < 80
    assert in_pieces(encoder, [text], 50) == encoder.reference(text).tolist()


@pytest.mark.parametrize("kind", SERIALIZED)
def test_tiktokens_engine_is_chosen_where_its_ids_are_the_same(kind):
    engine, why = choose_engine(SERIALIZED[kind])
    assert (engine, "every text of the check" in why) == ("tiktoken", True)
    assert choose_engine(SERIALIZED[kind], "tokenizers")[0] == "tokenizers"


def with_model(kind, **changes):
    described = json.loads(SERIALIZED[kind])
    described["model"] |= changes
    return json.dumps(described)


def test_other_ids_are_found_and_the_engine_is_not_used(monkeypatch):
    monkeypatch.setattr(MergeEngine, "_encode_whole", lambda *_: np.array([1]))
    engine, why = choose_engine(SERIALIZED["metaspace"])
    assert engine == "tokenizers" and "it gives other ids for" in why
    with pytest.raises(DataError, match="data.engine=tiktoken: cannot be used .*data.engine=auto"):
        choose_engine(SERIALIZED["metaspace"], "tiktoken")
    with pytest.raises(DataError, match="data.engine='fast': must be one of auto, tiktoken"):
        choose_engine(SERIALIZED["metaspace"], "fast")


@pytest.mark.parametrize(
    ("serialized", "reason"),
    [
        (with_model("metaspace", byte_fallback=False), "no byte_fallback"),
        (with_model("metaspace", ignore_merges=True), "or ignore_merges"),
        (with_model("digits", dropout=0.1), "no plain BPE"),
        (byte_level(use_regex=False).to_str(), "neither byte-level nor BPE over the whole text"),
    ],
)
def test_what_the_engine_does_not_do_goes_to_tokenizers(serialized, reason):
    with pytest.raises(Unsupported, match=reason):
        Encoder(serialized, "tiktoken")
    engine, why = choose_engine(serialized)
    assert engine == "tokenizers" and reason in why


def test_a_merge_out_of_rank_is_not_taken_for_one():
    described = json.loads(SERIALIZED["metaspace"])
    merges = described["model"]["merges"]
    # a token by two merges, with others between them
    described["model"]["merges"] = [*merges, merges[0]]
    with pytest.raises(Unsupported, match="have others between them"):
        Encoder(json.dumps(described), "tiktoken")


def test_bytes_outside_the_vocabulary_go_to_tokenizers():
    described = json.loads(SERIALIZED["digits"])
    vocab = described["model"]["vocab"]
    for missing in ("\u0104", "\u0106"):
        # the characters for the control bytes 4 and 6
        vocab[f"<gone {missing}>"] = vocab.pop(missing)
    serialized = json.dumps(described)
    assert choose_engine(serialized)[0] == "tiktoken"
    encoder = Encoder(serialized, "tiktoken")
    assert encoder.merges.encode("plain") is not None
    assert encoder.merges.encode("a\x04b") is None
    assert encoder.encode("a\x04b").tolist() == encoder.reference("a\x04b").tolist()


def test_a_check_on_the_way_refuses_other_ids(monkeypatch):
    encoder = Encoder(SERIALIZED["digits"], "tiktoken")
    encoder.check("some text")
    monkeypatch.setattr(MergeEngine, "encode", lambda *_: np.array([1, 2], np.int32))
    with pytest.raises(DataError, match="gives other ids than tokenizers; set data.engine="):
        encoder.check("some text")


def test_the_sample_holds_what_its_check_is_for():
    sample = "".join(parity_sample(json.loads(SERIALIZED["digits"])))
    for kind in ("12345", "\x00", "\x07", "😀", "中", " " * 100, "\u3000", "theirs"):
        assert kind in sample


def changed(**changes) -> Encoder:
    tokenizer = byte_level()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Encoder(tokenizer.to_str())


def test_no_cut_where_it_is_not_proven():
    assert not Encoder(byte_level(add_prefix_space=True).to_str()).cut
    assert not Encoder(byte_level(use_regex=False).to_str()).cut
    assert not changed(normalizer=normalizers.NFC()).cut
    assert not changed(pre_tokenizer=pre_tokenizers.Whitespace()).cut
    with_plain_added = byte_level()
    with_plain_added.add_tokens(["a b"])
    assert not Encoder(with_plain_added.to_str()).cut


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
    assert in_pieces(encoder, ["a b"], 1) == [5]
    assert encoder.cut("a b", 1) is None
    encoder.cut = ENCODERS["metaspace", "tokenizers"].cut
    assert in_pieces(encoder, ["a b"], 1) == [2, 4]


def test_text_of_special_tokens_stays_text():
    for (kind, _), encoder in ENCODERS.items():
        ids = encoder.encode("a<s>b</s>")
        assert len(ids) >= 9 - 2 and encoder.tokenizer.token_to_id("<s>") not in ids
        if kind == "byte_level":
            assert encoder.tokenizer.decode(ids.tolist()) == "a<s>b</s>"


def test_a_model_folder_gives_the_tokenizer_transformers_reads(tmp_path):
    tokenizer, _ = load_tokenizer(save_model_folder(tmp_path / "model"))
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


def test_vocabulary_size_covers_ids_of_added_tokens(tmp_path):
    folder = save_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<extra>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = load_tokenizer(folder)[0].vocab_size
    assert size == tokenizer.token_to_id("<extra>") + 1
