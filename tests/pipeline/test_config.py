"""Every recipe composes; every refusal names the value, what is legal and the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from model.config import describe_schedule, resolve_schedule
from pipeline.advice import advice
from pipeline.schema import CHAIN, register_defaults
from pipeline.validation import ConfigError, parse

ROOT = Path(__file__).resolve().parents[2]
# own, which recipes start from, needs a model and texts.
RECIPES = sorted(
    path.stem for path in (ROOT / "conf/experiment").glob("*.yaml") if path.stem != "own"
)


register_defaults()


def config(*overrides):
    """Of experiment=tiny, unless another one is named."""
    if not any(override.startswith("experiment=") for override in overrides):
        overrides = ("experiment=tiny", *overrides)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("config", overrides=list(overrides)))


def schedule_of(recipe, *overrides):
    c = config(f"experiment={recipe}", *overrides)
    return describe_schedule(
        resolve_schedule(c.schedule.full, c.schedule.count, c.model.num_layers)
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_needs_no_advice(recipe):
    found = config(f"experiment={recipe}")
    assert found.name == recipe
    assert list(advice(found, CHAIN)) == []


@pytest.mark.parametrize(
    ("recipe", "schedule", "layers"),
    [
        ("demo", "S3 F2 S1", 6),
        ("smollm2_smoke", "S9 F12 S9", 30),
        ("smollm2_32k", "S9 F12 S9", 30),
        ("llama2_7b_128k", "S10 F12 S10", 32),
        ("llama2_70b_128k", "S25 F30 S25", 80),
    ],
)
def test_recipes_and_their_controls_have_their_schedules(recipe, schedule, layers):
    assert schedule_of(recipe) == schedule
    assert schedule_of(f"{recipe}_full") == f"F{layers}"
    assert schedule_of(f"{recipe}_window") == f"S{layers}"


@pytest.mark.parametrize(
    ("override", "schedule"),
    [
        ("schedule.full=top", "S20 F12"),
        ("schedule.full=bottom", "F12 S20"),
        ("schedule.full=interleaved schedule.count=2", "S8 F1 S15 F1 S7"),
        ("schedule.full=[0,31] schedule.count=null", "F1 S30 F1"),
        ("schedule.count=6", "S13 F6 S13"),
    ],
)
def test_schedules_are_one_override_each(override, schedule):
    assert schedule_of("llama2_7b_128k", *override.split()) == schedule


def test_every_key_can_be_overridden_whatever_the_recipe_sets():
    assert config("data.workers=3", "train.deterministic=true").data.workers == 3


def test_both_published_mixtures_of_slimpajama_are_one_override_each():
    shares = {}
    for mixture in ("code", "text"):
        sources = config("data=slimpajama", f"data.mixture={mixture}").data.sources
        shares[mixture] = {source.name: source.weight for source in sources}
        assert sum(shares[mixture].values()) == pytest.approx(1)
        assert len({source.where["meta.redpajama_set_name"] for source in sources}) == 7
    assert (shares["code"]["commoncrawl"], shares["text"]["commoncrawl"]) == (0.534, 0.67)
    long = [s.weight for s in config("data=slimpajama_long_short").data.sources if s.min_tokens > 1]
    assert sum(long) == pytest.approx(0.6)


def test_patterns_are_one_override_each():
    assert config("experiment=smollm2_32k", "pattern=strided").pattern.stride == 64
    assert config("pattern=strided_per_head").pattern.phase == "per_head"
    assert config("experiment=demo").pattern.window == 128
    assert config("experiment=demo", "pattern.window=64").pattern.window == 64


NODE8 = "parallel.gpus_per_node=8"
REFUSALS = {
    "+train.learning_rate=1": r"train.learning_rate: no such configuration key; --help lists",
    "train.steps=many": r"train.steps: .*'many'.*set it to a value of that type",
    "variant=a:b": r"variant='a:b': must be letters",
    "stage=training": r"stage='training': must be one of chain, fetch",
    "device=cuda:1": r"device='cuda:1': must be one of auto, cpu, cuda",
    "name=artifacts": r"name='artifacts': is where shared results lie",
    "schedule.full=5": r"schedule.full=5: must be one of middle",
    "schedule.full=[a]": r"schedule.full=\['a'\]: must be one of middle",
    "model.head_dim=31": r"model.head_dim=31: must be even",
    "model.norm_eps=0": r"model.norm_eps=0.0: must be above 0",
    "data.held_out_tokens=0": r"data.held_out_tokens=0: must be at least 1",
    "data.upsample={threshold:0}": r"data.upsample.threshold=0: must be at least 1",
    "data.seed=-1": r"data.seed=-1: must be at least 0",
    "train.seed=-1": r"train.seed=-1: must be at least 0",
    "train.min_lr_ratio=5": r"train.min_lr_ratio=5.0: must be at most 1",
    "train.lr=inf": r"train.lr=inf: must be finite",
    "eval.niah.lengths=[]": r"eval.niah.lengths=\[\]: must name at least one length",
    "eval.niah.lengths=[-5]": r"eval.niah.lengths=\[-5\]: must name at least one length",
    "generate.model=x": r"generate.model='x': must be one of base, final",
    "model.num_layers=0": r"model.num_layers=0: must be at least 1; set",
    "model.num_kv_heads=3": r"model.num_kv_heads=3: must divide model.num_heads=4",
    "rope.base=1": r"rope.base=1.0: must be above 1; set",
    "pattern.window=0": r"pattern.window=0: must be a whole number of at least 1",
    "pattern.sink_tokens=-1": r"pattern.sink_tokens=-1: must be",
    "pattern.phase=both": r"pattern.phase='both': must be one of shared, per_head",
    "schedule.full=centre": r"schedule.full='centre': must be one of middle, top",
    "schedule.count=9": r"schedule.count=9: must be from 0 to the model's 8 layers",
    "schedule.full=[3,8]": r"schedule.full=\[3, 8\]: \[8\]; must be distinct indices from 0 to 7",
    "schedule.full=[3,3]": r"schedule.full=\[3, 3\]: repeated layers",
    "schedule.full=[1] schedule.count=2": r"schedule.count=2: schedule.full lists 1 layers",
    "data.seq_length=1": r"data.seq_length=1: must be at least 2",
    "data.packing=first_fit": r"data.packing='first_fit': must be one of concat, best_fit",
    "data.sources=[]": r"data.sources=\[\]: must name at least one source",
    "data.held_out=0": r"data.held_out=0.0: must be between 0 and 1",
    "data.sources=[{name:a,path:x,format:csv}]": r"sources\[0\].format='csv': must be one of text",
    "data.sources=[{name:a,path:x,weight:0}]": r"sources\[0\].weight=0.0: must be above 0",
    "data.sources=[{name:a,path:x,min_tokens:0}]": r"sources\[0\].min_tokens=0: must be 1 or more",
    "data.sources=[{name:a,path:x,min_tokens:9,max_tokens:5}]": r"at most max_tokens=5; set both",
    "data.engine=fast": r"data.engine='fast': must be one of auto, tiktoken, tokenizers",
    "data.shard=1/2": r"data.shard='1/2': goes with stage=data_prep, and stage is chain",
    "data.workers=0": r"data.workers=0: must be at least 1",
    "data.decontaminate={sources:[],tokens:20}": r"decontaminate.sources=\[\]: must name the texts",
    "data.decontaminate={sources:[{name:a,path:x}],tokens:1}": r"decontaminate.tokens=1: must be",
    "inspect.rows=-1": r"inspect.rows=-1: must be at least 0",
    "data.sources=[{name:a}]": r"path.* has no value; set it",
    "data.sources=[{name:a,path:x},{name:a,path:y}]": r"names must differ",
    "data.sources=[{name:a,path:x,needles:{characters:[9,5]}}]": r"characters=\[9, 5\]: must be "
    r"two numbers from 1, the first at most the second; set it",
    "data.sources=[{name:a,path:x,needles:{pairs:[0,2]}}]": r"needles.pairs=\[0, 2\]: must be two",
    "data.sources=[{name:a,path:x,needles:{copies:0}}]": r"needles.copies=0: must be at least 1",
    "data.upsample={threshold:9,keep_short:2}": r"keep_short=2.0: must be from 0 to 1",
    "parallel.tensor=0": r"parallel.tensor=0: must be at least 1",
    "cluster.data_shards=0": r"cluster.data_shards=0: must be at least 1",
    "cluster.at_once=0": r"cluster.at_once=0: must be at least 1",
    "parallel.zero_stage=0": r"parallel.zero_stage=0: must be one of 1, 2, 3",
    "model.ffn_hidden_size=345 parallel.gpus_per_node=2 parallel.tensor=2": r"parallel.tensor=2: "
    r"must divide model.ffn_hidden_size=345",
    "parallel.restarts=-1": r"parallel.restarts=-1: must be at least 0",
    "model.num_heads=12 model.num_kv_heads=6 parallel.gpus_per_node=4 parallel.ulysses=4 "
    "train.rows_per_step=4": r"parallel.ulysses=4: must divide, or be a multiple of, the 6 KV",
    f"{NODE8} parallel.tensor=3": r"world size=8: must be a multiple of .* = 3",
    f"{NODE8} parallel.ulysses=8": r"parallel.tensor \* parallel.ulysses=8: must divide "
    r"model.num_heads=4",
    "model.num_kv_heads=1 parallel.gpus_per_node=2 parallel.tensor=2": r"parallel.tensor=2: must "
    r"divide model.num_kv_heads=1",
    "parallel.gpus_per_node=4 parallel.ulysses=4 data.seq_length=1022": r"data.seq_length=1022: "
    r"must be a multiple of the 4 shards",
    "parallel.sequence_parallel=true": r"sequence_parallel=True: needs parallel.tensor above 1",
    "train.rows_per_step=6": r"train.rows_per_step=6: must be a multiple of 1 data-parallel "
    r"groups \* train.micro_batch_rows=4",
    "train.lr=0": r"train.lr=0.0: must be above 0",
    "train.lr_schedule=linear": r"train.lr_schedule='linear': must be one of constant, cosine",
    "train.precision=fp16": r"train.precision='fp16': must be one of bf16, fp32",
    "train.non_finite=ignore": r"train.non_finite='ignore': must be one of stop, skip",
    "train.spike_sigmas=0": r"train.spike_sigmas=0.0: must be above 0",
    "train.spike_window=0": r"train.spike_window=0: must be at least 1",
    "train.hang_seconds=-1": r"train.hang_seconds=-1.0: must be at least 0",
    "benchmark.name=all": r"benchmark.name='all': must be one of checkpoint",
    "benchmark.repeats=1": r"benchmark.repeats=1: must be at least 2",
    "train.recompute=some": r"train.recompute='some': must be one of none, attention, full",
    "train.mlp_tile=64": r"train.mlp_tile=64: goes with train.recompute=attention or full; set",
    "train.offload_activations=true": r"offload_activations=True: goes with train.recompute=",
    "train.recompute=full train.mlp_tile=0": r"train.mlp_tile=0: must be at least 1",
    "train.profile_step=0": r"train.profile_step=0: must be at least 1",
    "train.betas=[0.9]": r"train.betas=\[0.9\]: must be two numbers",
    "wandb.mode=on": r"wandb.mode='on'|wandb.mode: ",
    "export.source=base": r"export.source='base': must be one of finetune, convert",
    "export.dtype=fp8": r"export.dtype='fp8': must be one of bf16, fp32",
    "eval.tasks=[ruller]": r"eval.tasks='ruller': nearest: ruler; must be of perplexity, niah, rul",
    "eval.models=[stock]": r"eval.models='stock': must be of base, final.*folder in eval.folders",
    "eval.models=[bse]": r"eval.models='bse': nearest: base, base_reduced; must be of",
    "+eval.folders.base=/x": r"eval.folders='base': must be letters.* and none of base, final",
    "eval.ruler.tasks=[niah_multikey]": r"nearest: niah_multikey_3, niah_multikey_2, niah_multi",
    "eval.babilong.tasks=[qa6]": r"eval.babilong.tasks='qa6': nearest: .*must be of qa1, qa2",
    "eval.babilong.lengths=[]": r"eval.babilong.lengths=\[\]: must name at least one length",
    "eval.ruler.samples=0": r"eval.ruler.samples=0: must be at least 1",
    "eval.perplexity.contexts=[0]": r"eval.perplexity.contexts=\[0\]: must be numbers of tokens",
    "eval.niah.needles=[17]": r"eval.niah.needles=\[17\]: must be from 1 to 16 each",
    "stage=evaluate eval.shard=5/4": r"eval.shard='5/4': must be like 1/4",
    "eval.shard=1/4": r"eval.shard='1/4': is a part of stage=evaluate, not of stage=chain",
    "eval.name=a/b": r"eval.name='a/b': must be letters",
    "eval.batch_tokens=0": r"eval.batch_tokens=0: must be at least 1",
    "eval.niah.depths=[101]": r"eval.niah.depths=\[101\]: must be percentages",
    "eval.perplexity.min_length=9999": r"min_length=9999: must be at most",
}


@pytest.mark.parametrize("overrides", REFUSALS)
def test_refusals(overrides):
    with pytest.raises(ConfigError, match=REFUSALS[overrides]):
        config(*overrides.split())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device='cuda': this machine shows no CUDA GPU"):
        config("device=cuda")


def test_refused_before_any_work_from_another_folder(tmp_path):
    """The entry point runs from anywhere and a refusal is one line and a non-zero exit.

    A model without an experiment is no run of the demo, which would give seq_length a value.
    """
    run = [sys.executable, str(ROOT / "pipeline/run.py"), "model=tiny"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: data.seq_length: has no value" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_home_is_expanded_in_every_path_and_in_no_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    made = config(
        "outputs='~/runs'",
        "model.source='~/llama'",
        "data.data_root='~'",
        "data.sources=[{name: a, path: '${data.data_root}/a'}]",
        "train.weights_from='~/runs/finetune'",
        "+eval.folders.other='~/other'",
        "eval.prose='~/prose'",
        "generate.prompt='~/is home'",
        "generate.prompt_file='~/prompt.txt'",
        "benchmark.tokenizers=[{name: a, path: '~/a'}]",
    )
    assert (made.outputs, made.model.source) == ("/home/me/runs", "/home/me/llama")
    assert made.data.sources[0].path == "/home/me/a"
    assert made.train.weights_from == "/home/me/runs/finetune"
    assert (made.eval.folders["other"], made.eval.prose) == ("/home/me/other", "/home/me/prose")
    assert made.generate.prompt_file == "/home/me/prompt.txt"
    assert made.generate.prompt == "~/is home"
    assert made.benchmark.tokenizers[0].path == "/home/me/a"
    with pytest.raises(ConfigError, match="outputs='~no-such-user/x': .*; set it to an absolute"):
        config("outputs='~no-such-user/x'")
