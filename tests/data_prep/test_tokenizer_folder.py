"""Every way to load a model folder's tokenizer gives the ids of the folder's own file."""

import json

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer

from data_prep.sources import DataError
from data_prep.tokenizer import Encoder, load_tokenizer
from data_prep.tokenizer_folder import check_saved, file_tokenizer, open_tokenizer, save_tokenizer
from tests.data_prep.helpers import TEXTS, byte_level, metaspace, prefixed, replaced

STARTS = [
    "The quick",
    " The",
    "    return x",
    "\tThe",
    "\n\nThe",
    "▁The",
    "ﬁve ｆｏｘ",
    "\x00\x01 a",
]
PROBES = [*STARTS, "The  ", "The\n", "12 and   3456", "a<s>b </s>", "中文 a😀", "", " ", *TEXTS]


def with_nfkc() -> Tokenizer:
    tokenizer = prefixed()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), tokenizer.normalizer])
    return tokenizer


def with_added_word() -> Tokenizer:
    tokenizer = prefixed()
    tokenizer.add_tokens([AddedToken("fox", normalized=False)])
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "prefixed": prefixed,
    "replaced": replaced,
    "nfkc": with_nfkc,
    "added_word": with_added_word,
}


def save(folder, tokenizer, **config):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def every_way(folder, out):
    """Ids without special tokens of the ways to read a folder: stages, training, the export."""
    opened, trained = open_tokenizer(folder), Encoder(load_tokenizer(folder)[0].serialized)
    out.mkdir()
    save_tokenizer(folder, out)
    check_saved(out)
    exported = AutoTokenizer.from_pretrained(out)
    for text in PROBES:
        for tokenizer in (opened, exported):
            yield text, tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        yield text, trained.encode(text).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast", "GemmaTokenizer"])
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(kind, name, tmp_path):
    folder = save(tmp_path / "model", KINDS[kind](), tokenizer_class=name, legacy=False)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True
    for text, ids in every_way(folder, tmp_path / "out"):
        assert ids == own.encode(text, add_special_tokens=False).ids, text


def test_a_space_at_the_beginning_is_kept_as_the_normalizer_says(tmp_path):
    folder = save(tmp_path / "model", prefixed(), tokenizer_class="LlamaTokenizer")
    tokenizer = open_tokenizer(folder)
    assert tokenizer.tokenize("The") == ["▁The"]
    assert "".join(tokenizer.tokenize(" The")) == "▁▁The"
    # what this guards against
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert "".join(rebuilt.tokenize(" The")) == "▁The"


def train(folder, described=None, **options):
    folder.mkdir()
    options = {
        "vocab_size": 340,
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    } | options
    with (folder / "tokenizer.model").open("wb") as stream:
        SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=stream, **options)
    described = described or {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
    ],
    ids=str,
)
def test_ids_are_those_of_sentencepiece(options, tmp_path):
    folder = train(tmp_path / "model", **options)
    own = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text, ids in every_way(folder, tmp_path / "out"):
        assert ids == own.encode(text), text
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer("The").input_ids == [1, *own.encode("The")]
    assert tokenizer.decode(own.encode("The fox"), skip_special_tokens=True) == "The fox"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"user_defined_symbols": ["<sep>"]}, "gives '.*<sep>.* other ids than SentencePiece"),
        ({"remove_extra_whitespaces": True}, "gives '.* other ids than SentencePiece"),
        ({"normalization_rule_name": "nmt_nfkc"}, "gives '.*İ.* other ids than SentencePiece"),
        ({"model_type": "unigram"}, "is a UNIGRAM model, of which BPE alone can be read"),
    ],
    ids=str,
)
def test_what_tokenizers_cannot_do_as_sentencepiece_does_is_refused(options, reason, tmp_path):
    with pytest.raises(DataError, match=f"{reason}.*; .*tokenizer.json"):
        file_tokenizer(train(tmp_path / "model", **options))


def test_a_token_that_tokenizer_json_lacks_is_refused(tmp_path):
    token = {"content": "fox", "special": False, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    folder = save(tmp_path / "model", prefixed(), added_tokens_decoder={"500": token})
    with pytest.raises(DataError, match=r"gives '.*fox.*must name no token that tokenizer.json"):
        open_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_file_is_refused(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="no tokenizer can be loaded from .*give a model folder"):
        open_tokenizer(tmp_path)


def test_code_of_the_folder_never_runs_and_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    own = {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}
    folder = save(tmp_path / "model", prefixed(), auto_map=own, tokenizer_class="Own")
    (folder / "tokenization_own.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "out").mkdir()
    save_tokenizer(folder, tmp_path / "out")
    for tokenizer in (open_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert tokenizer.bos_token == "<s>"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        open_tokenizer(folder)


def test_bos_and_eos_are_also_read_from_the_models_configuration(tmp_path):
    named = {"bos_token": None, "eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = save(tmp_path / "model", prefixed(), **named)
    assert open_tokenizer(folder).bos_token is None
    (folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 0]}')
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, None)
