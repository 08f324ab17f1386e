"""In the place of VENV/bin/python: does in milliseconds, and without torch, what the scripts start.

What bash and Slurm do is then tested by the second; that the true programs do the same is tested
by test_survival.py. Beside bin/: `recipe.tsv`, what slurm/recipe.py says for variant=VARIANT;
`fails`, `holds`, names of stages, or STAGE/PART, or `recipe`, that fail, or wait; `reads`,
which reading the recipe leaves; `steps`, how many a training takes; `save_every`, of how many.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

VENV = Path(sys.argv[0]).absolute().parent.parent
STEP_SECONDS = 0.05


def recipe(arguments):
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    text = (VENV / "recipe.tsv").read_text().replace("VARIANT", given.get("variant", "main"))
    found = dict(line.split("\t", 1) for line in text.splitlines())
    found |= {key: value for key, value in given.items() if key in found}
    for key, folder in list(found.items()):
        if key.endswith(".folder"):
            manifest = Path(folder) / "manifest.json"
            state = "missing"
            if manifest.exists():
                state = "changed" if "changed" in manifest.read_text() else "done"
            found[key.replace(".folder", ".state")] = state
    for stage, key in (("data_prep", "data"), ("evaluate", "evaluate")):
        count = int(found[f"cluster.{key}_shards"])
        if count > 1 and found[f"{stage}.state"] == "missing":
            left = [n for n in range(1, count + 1) if not part(found, stage, n, count).exists()]
            found |= {f"{stage}.shards": count, f"{stage}.left": " ".join(map(str, left))}
    return found


def part(found, stage, number, count):
    return Path(f"{found[f'{stage}.folder']}_{number}of{count}")


def setting(name):
    path = VENV / name
    return path.read_text().split() if path.exists() else []


def finish(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")


def other_name():
    """Of the file in which the other node of this start leaves its process's id."""
    return os.environ["PET_RDZV_ID"]


def train(folder):
    """As pipeline/training/loop.py writes and stops, under slurm/launch.py."""
    signals = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    if (folder / "manifest.json").exists():
        return
    partial = folder.with_name("finetune.partial")
    saves, metrics = partial / "checkpoints", partial / "metrics.jsonl"
    saves.mkdir(parents=True, exist_ok=True)
    latest = saves / "latest"
    start = int(latest.read_text()[5:]) if latest.exists() else 0
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    metrics.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start))
    (partial / "stopped").unlink(missing_ok=True)
    other = saves / other_name()
    every = [int(number) for number in setting("save_every")]
    for step in range(start + 1, int(setting("steps")[0]) + 1):
        time.sleep(STEP_SECONDS)
        if other.exists():
            # As ranks that lose a connection.
            os.kill(int(other.read_text()), 0)
        with metrics.open("a") as out:
            out.write(json.dumps({"kind": "train", "step": step, "seconds": STEP_SECONDS}) + "\n")
        by_file = (partial / "stop").exists()
        stopping = by_file or signals
        if stopping or any(step % number == 0 for number in every):
            latest.write_text(f"step_{step:06d}")
        if by_file:
            (partial / "stopped").touch()
            (partial / "stop").unlink()
        if stopping:
            other.with_suffix(".over").touch()
            return
    partial.rename(folder)
    finish(folder)


def main():
    words = sys.argv[1:]
    if words[0].endswith("last_step.py"):
        os.execv(sys.executable, [sys.executable, *words])
    found = recipe(words)
    if words[0].endswith("recipe.py"):
        (VENV / "reads").touch()
        while "recipe" in setting("holds"):
            time.sleep(STEP_SECONDS)
        print("\n".join(f"{key}\t{value}" for key, value in found.items()))
        if "recipe" in setting("fails"):
            print("error: recipe fails, as told", file=sys.stderr)
            sys.exit(2)
        return
    stage = next(word[6:] for word in words if word.startswith("stage="))
    shard = next((word.split("=")[1] for word in words if ".shard=" in word), None)
    name = f"{stage}/{shard.split('/')[0]}" if shard else stage
    while name in setting("holds"):
        time.sleep(STEP_SECONDS)
    if name in setting("fails"):
        sys.exit(f"error: {name} fails, as told")
    folder = Path(found[f"{stage}.folder"])
    if shard:
        folder = part(found, stage, *shard.split("/"))
    elif found.get(f"{stage}.left"):
        sys.exit(f"error: {stage}: parts {found[f'{stage}.left']} are missing")
    if stage != "finetune":
        finish(folder)
    elif os.environ["SLURM_NODEID"] == "0":
        train(folder)
    else:
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
        if (folder / "manifest.json").exists():
            return
        saves = folder.with_name("finetune.partial") / "checkpoints"
        over = (saves / other_name()).with_suffix(".over")
        saves.mkdir(parents=True, exist_ok=True)
        (saves / "new").write_text(str(os.getpid()))
        (saves / "new").rename(saves / other_name())
        while not (folder / "manifest.json").exists() and not over.exists():
            # The other node was not at work yet: it saves nothing.
            if told and time.monotonic() > told[0] + 20 * STEP_SECONDS:
                sys.exit(1)
            time.sleep(STEP_SECONDS)


main()
