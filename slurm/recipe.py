"""Tells the shell scripts what a recipe says: `python slurm/recipe.py experiment=NAME [key=value]`.

Prints one `key<TAB>value` a line: the world, conf/cluster's values, and of every stage whether its
folder is done (its manifest matches), changed (made with another configuration) or missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import HydraException  # noqa: E402

from model.cost import parameters  # noqa: E402
from pipeline.manifest import read_manifest, stage_id  # noqa: E402
from pipeline.runner import USER_ERRORS, Runner  # noqa: E402
from pipeline.schema import Config, register_defaults, section_shape  # noqa: E402
from pipeline.stage_folders import stage_inputs, stages_of  # noqa: E402
from pipeline.stages.finetune import hybrid_config  # noqa: E402
from pipeline.validation import parse  # noqa: E402

USER_ERROR = 2
# Bytes that a checkpoint holds of each parameter: an fp32 master and Adam's two moments.
CHECKPOINT_BYTES = 12


def checkpoint_room(config: Config) -> int:
    """Bytes of the checkpoints that a run keeps, and of the one that it writes meanwhile."""
    shape = hybrid_config(section_shape(config.model), config)
    return (config.train.keep_last + 1) * CHECKPOINT_BYTES * parameters(shape)


def missing_parts(runner: Runner, stage: str, count: int) -> tuple[list[int], Path | None]:
    """Numbers of the parts of a stage that are not there, and a folder in the way of one.

    A part is what the stage makes with data.shard or eval.shard "i/count".
    """
    depends_on, inputs, _ = runner.wanted(stage)
    missing, changed = [], None
    for number in range(1, count + 1):
        shard = f"{number}/{count}"
        if stage == "evaluate":
            of_part = {"eval": {**depends_on["eval"], "shard": shard}}
        else:
            of_part = {**depends_on, "shard": shard}
        wanted = stage_id(stage, of_part, inputs)
        folder = runner.folder(stage)
        if stage == "evaluate":
            folder = folder.with_name(f"{folder.name}_{number}of{count}")
        else:
            folder = folder.with_name(wanted)
        manifest = read_manifest(folder)
        if manifest is None or runner.config.force:
            missing.append(number)
        elif manifest["id"] != wanted:
            changed = folder
    return missing, changed


def facts(overrides: list[str]) -> Iterator[tuple[str, object]]:
    """What the scripts ask for, of the configuration that these overrides give.

    What an error leaves can be used: the cluster's values come before those that need the data.
    """
    register_defaults()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", overrides=overrides)
    yield from ((f"cluster.{key}", value) for key, value in composed.cluster.items())
    # Before "auto" becomes what this machine has: a login node has no GPU, its cluster has.
    yield "device", composed.device
    config = parse(composed)
    runner = Runner(config)
    yield from {
        "name": config.name,
        "variant": config.variant,
        "outputs": runner.root,
        "run": runner.root / config.name / config.variant,
        "nodes": config.parallel.nodes,
        "gpus_per_node": config.parallel.gpus_per_node,
        "steps": config.train.steps,
        "checkpoint_room": checkpoint_room(config),
        "data_workers": config.data.workers,
    }.items()
    shards = {"data_prep": config.cluster.data_shards, "evaluate": config.cluster.evaluate_shards}
    stages = stages_of(config)
    yield "stages", " ".join(stages)
    for stage in stages:
        manifest = read_manifest(runner.folder(stage))
        same = manifest is not None and manifest["id"] == runner.wanted(stage)[2]
        state = "missing" if manifest is None or config.force else "done" if same else "changed"
        yield f"{stage}.state", state
        yield f"{stage}.folder", runner.folder(stage)
        yield f"{stage}.inputs", " ".join(stage_inputs(stage, config))
        if shards.get(stage, 1) > 1 and state == "missing":
            left, changed = missing_parts(runner, stage, shards[stage])
            yield f"{stage}.shards", shards[stage]
            yield f"{stage}.left", " ".join(map(str, left))
            if changed:
                yield f"{stage}.state", "changed"
                yield f"{stage}.folder", changed


def main() -> int:
    try:
        for key, value in facts(sys.argv[1:]):
            print(key, "" if value is None else value, sep="\t")
    except (*USER_ERRORS, HydraException) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
