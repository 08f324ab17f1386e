"""The tokenizer of a model folder, with the ids of its own file, for every stage and the export.

The file is tokenizer.json or, without one, SentencePiece's tokenizer.model. AutoTokenizer rebuilds
a tokenizer by the class that tokenizer_config.json names, and drops tokenizer.json's normalizer and
SentencePiece's scores. In the folder that save_tokenizer writes it reads the file instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from data_prep.merges import SPACE
from data_prep.parity import edge_texts, parity_sample
from data_prep.sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
_JSON, _SENTENCEPIECE, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# In transformers 4 and 5 the class that takes tokenizer.json as it is.
_CLASS = "PreTrainedTokenizerFast"
_REMEDY = "give a model folder with tokenizer.json or tokenizer.model (stage=fetch)"
_Encode = Callable[[str], list[int]]


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder, which gives texts the ids of the folder's file.

    The folder's own code never runs. A folder of other files (vocab.json, merges.txt) is read by
    transformers' AutoTokenizer.

    Raises:
        DataError: when there is none, or transformers gives other ids than the file's engine.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        if not any((folder / name).is_file() for name in (_JSON, _SENTENCEPIECE)):
            return AutoTokenizer.from_pretrained(folder, **options)
        with TemporaryDirectory() as saved:
            own = save_tokenizer(folder, Path(saved))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(saved, local_files_only=True)
    except DataError:
        raise
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, ... by kind of file that is missing
        raise _unreadable(folder, error) from error
    _check_same(folder, tokenizer.backend_tokenizer, own)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def file_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """tokenizers' own reading of a folder's file.

    Raises:
        DataError: when there is no such file, it is damaged, or tokenizers cannot do what a
            tokenizer.model does.
    """
    try:
        if (folder / _JSON).is_file():
            return tokenizers.Tokenizer.from_file(str(folder / _JSON))
        return _from_sentencepiece(folder)
    except DataError:
        raise
    except Exception as error:
        # tokenizers and sentencepiece raise Exception and RuntimeError themselves
        raise _unreadable(folder, error) from error


def save_tokenizer(folder: Path, out: Path) -> tokenizers.Tokenizer:
    """Copy a folder's tokenizer so that AutoTokenizer reads its file; what the file says.

    Raises:
        DataError: see file_tokenizer.
    """
    own = file_tokenizer(folder)
    for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    if not (out / _JSON).exists():
        own.save(str(out / _JSON))
    config = _read(folder / _CONFIG)
    config |= _special_tokens(folder, config, own)
    config["tokenizer_class"] = _CLASS
    # A class of the folder's own is never run, and must not be asked for.
    config.pop("auto_map", None)
    (out / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return own


def check_saved(out: Path) -> None:
    """Hold what AutoTokenizer makes of a folder, without its code, against the folder's file.

    Raises:
        DataError: where the ids differ.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(out, trust_remote_code=False, local_files_only=True)
    _check_same(out, loaded.backend_tokenizer, file_tokenizer(out))


def _unreadable(folder: Path, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0].strip()}"
    return DataError(f"no tokenizer can be loaded from {folder}: {reason}; {_REMEDY}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _special_tokens(
    folder: Path, config: dict[str, Any], own: tokenizers.Tokenizer
) -> dict[str, str]:
    """<bos> and <eos> where the tokenizer's own files name none.

    Those of config.json's ids; else, for Llama's class, which need not name them, its defaults.
    """
    named = _read(folder / "special_tokens_map.json")
    named |= {key: value for key, value in config.items() if value is not None}
    ids = _read(folder / "config.json")
    of_llama = "LlamaTokenizer" in config.get("tokenizer_class", "LlamaTokenizer")
    found = {}
    for name, default in (("bos_token", "<s>"), ("eos_token", "</s>")):
        token_id = ids.get(f"{name}_id", own.token_to_id(default) if of_llama else None)
        if not named.get(name) and isinstance(token_id, int):
            found[name] = own.id_to_token(token_id)
    return {name: token for name, token in found.items() if token is not None}


def _check_same(folder: Path, loaded: tokenizers.Tokenizer, own: tokenizers.Tokenizer) -> None:
    config = json.loads(own.to_str())
    added = [*loaded.get_added_tokens_decoder().values()]
    text = _difference(_plain(loaded), _plain(own), edge_texts(config, [t.content for t in added]))
    if text is not None:
        raise DataError(
            f"{folder}: transformers gives {text[:40]!r} other ids than {_JSON}, with which the "
            f"model was trained; {_CONFIG} and added_tokens.json must name no token that {_JSON} "
            "lacks: save the tokenizer again with save_pretrained"
        )


def _plain(tokenizer: tokenizers.Tokenizer) -> _Encode:
    """Ids of a text that holds no special token."""

    def encode(text: str) -> list[int]:
        before = tokenizer.encode_special_tokens
        tokenizer.encode_special_tokens = True
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            tokenizer.encode_special_tokens = before

    return encode


def _difference(one: _Encode, other: _Encode, texts: list[str]) -> str | None:
    return next((text for text in texts if one(text) != other(text)), None)


def _from_sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    """What a tokenizer.model says, for tokenizers.

    Raises:
        DataError: when the ids are not SentencePiece's own.
    """
    from sentencepiece import SentencePieceProcessor

    path = folder / _SENTENCEPIECE
    if not path.is_file():
        raise FileNotFoundError(f"neither {_JSON} nor {_SENTENCEPIECE}")
    processor = SentencePieceProcessor(model_file=str(path))
    made = _converted(processor.serialized_model_proto(), _read(folder / _CONFIG))
    text = _difference(_plain(made), processor.encode, parity_sample(json.loads(made.to_str())))
    if text is not None:
        raise DataError(
            f"{path}: tokenizers gives {text[:40]!r} other ids than SentencePiece, with which "
            f"the model was trained; put the model's {_JSON} beside it"
        )
    return made


def _converted(serialized: bytes, described: dict[str, Any]) -> tokenizers.Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    kinds, trained, normal = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    if trained.model_type != trained.BPE:
        kind = trained.ModelType.Name(trained.model_type)
        raise ValueError(f"{_SENTENCEPIECE} is a {kind} model, of which BPE alone can be read")
    model = models.BPE(
        {piece.piece: number for number, piece in enumerate(proto.pieces)},
        _merges({p.piece: p.score for p in proto.pieces if p.type == kinds.NORMAL}),
        unk_token=trained.unk_piece,
        fuse_unk=True,
        byte_fallback=trained.byte_fallback,
    )
    tokenizer = tokenizers.Tokenizer(model)
    steps = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    own = (kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != kinds.USER_DEFINED)
            for piece in proto.pieces
            if piece.type in own
        ]
    )
    with_bos = trained.bos_id >= 0 and described.get("add_bos_token", True)
    with_eos = trained.eos_id >= 0 and described.get("add_eos_token", False)
    bos = trained.bos_piece if with_bos else None
    eos = trained.eos_piece if with_eos else None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token for token in (bos, "$A", eos) if token],
        pair=[token for token in (bos, "$A", eos, bos, "$B", eos) if token],
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (bos, eos) if t],
    )
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece's BPE joins: that of the highest score first."""
    pairs = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs += [(left, right) for left, right in cuts if left in scores and right in scores]
    return pairs
