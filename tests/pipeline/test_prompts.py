"""A prompt and its end tokens are the same for every way to generate."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.evaluated_model import load_model
from pipeline.manifest import StageError
from pipeline.prompts import encode_prompt, end_tokens
from pipeline.stages import generate
from tests.data_prep.helpers import save_model_folder
from tests.pipeline.evaluation_helpers import context, small_config, write_inputs

BOS, EOS = 0, 1


def append_eos(folder):
    """Make a folder's tokenizer end every text with </s>, as add_eos_token does."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    pieces = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    pieces.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    specials = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<s>", BOS), ("</s>", EOS))}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": specials,
    }
    path.write_text(json.dumps(values))


def test_a_prompt_is_one_bos_and_the_text(tmp_path):
    folder = save_model_folder(tmp_path / "model")
    plain = AutoTokenizer.from_pretrained(folder)
    append_eos(folder)
    ending = AutoTokenizer.from_pretrained(folder)
    text = plain("The quick")["input_ids"]
    assert (plain.bos_token_id, plain.eos_token_id) == (BOS, EOS)
    assert ending("The quick")["input_ids"] == [BOS, *text, EOS]
    for tokenizer in (plain, ending):
        assert encode_prompt(tokenizer, "The quick").tolist() == [BOS, *text]
        assert encode_prompt(tokenizer, "<s>The quick").tolist() == [BOS, *text]
    plain.bos_token = None
    assert encode_prompt(plain, "The quick").tolist() == text


@pytest.mark.parametrize(
    ("file", "of_config", "of_tokenizer", "expected"),
    [
        ('{"eos_token_id": [7, 8]}', 7, 2, {2, 7, 8}),
        ('{"eos_token_id": 9}', [3, 4], None, {3, 4, 9}),
        ('{"temperature": 1.0}', None, 2, {2}),
        (None, None, None, set()),
    ],
)
def test_an_answer_ends_at_what_any_of_three_places_says(
    tmp_path, file, of_config, of_tokenizer, expected
):
    if file is not None:
        (tmp_path / "generation_config.json").write_text(file)
    config, tokenizer = (SimpleNamespace(eos_token_id=x) for x in (of_config, of_tokenizer))
    assert end_tokens(tokenizer, config, tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_an_unreadable_generation_config_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    told = SimpleNamespace(eos_token_id=2)
    with pytest.raises(StageError, match=r"generation_config\.json: cannot be read as JSON"):
        end_tokens(told, told, tmp_path)


def test_generate_stops_where_generation_config_says_and_continues_no_eos(tmp_path):
    write_inputs(tmp_path)
    config = small_config()
    config.generate.prompt, config.generate.max_new_tokens = "The quick brown fox", 7
    run = context(tmp_path, config, "generate")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fetch" / "model")
    ids = encode_prompt(tokenizer, config.generate.prompt)
    model = load_model("final", run)
    told = model.generate(torch.from_numpy(ids)[None], max_new_tokens=7, do_sample=False)
    told = told[0, len(ids) :].tolist()
    assert len(told) == 7 and EOS not in told
    append_eos(tmp_path / "fetch" / "model")
    for ends, expected in (([], 7), ([EOS, told[2]], told.index(told[2]) + 1)):
        values = json.dumps({"eos_token_id": ends})
        (tmp_path / "export" / "generation_config.json").write_text(values)
        generate.run(run)
        record = json.loads((run.out / "generate.json").read_text())
        assert (record["prompt_tokens"], record["new_tokens"]) == (len(ids), expected)
