"""Runs the arms of a sweep one after another, and keeps of each the records alone.

    python -m pipeline.sweep conf/sweep/proof.yaml --records docs/results/proof --gpu 0 --minutes 25

An arm is a list of steps, each of which is one pipeline/run.py. One whose records are there is
skipped. The same command continues after a kill: an arm that was cut goes on from its checkpoint.
Several may run at once, one per GPU, over the same folders. What follows `--` goes to every step.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from pipeline.locks import Locked, lock
from pipeline.manifest import versions
from pipeline.records import by_step, read_records

ROOT = Path(__file__).resolve().parent.parent
# What of a stage's folder is kept; anything else there is weights, or can be made from these.
KEPT = ("manifest.json", "metrics.jsonl", "scores.csv", "model_*.json", "serving.*", "train_step.*")
RECORDS = "records.jsonl"
# Written last: its presence is what makes an arm count as done.
SUMMARY = "run.json"
# Of a prompt's SHA-256: enough to pair prompts by.
HASH_DIGITS = 16
# Steps that compile and warm up, and are no measure of speed.
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Arm:
    """One run of the sweep: its steps in order, each with the overrides it is given."""

    name: str
    minutes: float
    steps: dict[str, list[str]]


# (arm, step, overrides) -> exit code of the step
RunStep = Callable[[Arm, str, list[str]], int]


def read_arms(path: Path) -> list[Arm]:
    """The arms of a sweep's file.

    Raises:
        ValueError: where an arm names a step that the file does not define.
    """
    sweep = yaml.safe_load(path.read_text())
    arms = []
    for name, arm in sweep["arms"].items():
        wanted = arm.get("steps", sweep["steps_of_an_arm"])
        unknown = [step for step in wanted if step not in sweep["steps"]]
        if unknown:
            raise ValueError(
                f"{path}: arm {name} has the step {unknown[0]!r}; must be one of "
                f"{', '.join(sweep['steps'])}; correct its steps"
            )
        own = [*sweep["overrides"], *arm.get("overrides", [])]
        steps = {step: [*own, *sweep["steps"][step]] for step in wanted}
        arms.append(Arm(name, arm.get("minutes", sweep["minutes"]), steps))
    return arms


class Sweep:
    """The arms, where they work (`outputs`/NAME/ARM) and where their records go."""

    def __init__(
        self, name: str, arms: Sequence[Arm], outputs: Path, records: Path, run_step: RunStep
    ) -> None:
        self.name, self.arms, self.run_step = name, arms, run_step
        self.outputs, self.records = outputs.absolute(), records.absolute()

    def run(self, minutes: float, facts: dict[str, Any]) -> list[str]:
        """Run what is not done yet and fits into `minutes`; the names of the arms that failed.

        Args:
            facts: of the machine, which each arm's summary repeats.
        """
        deadline = time.monotonic() + 60 * minutes
        failed = []
        for arm in self.arms:
            with self._claim(arm) as claimed:
                if not claimed:
                    print(f"{arm.name}: another sweep is at work on it", flush=True)
                elif (self.records / arm.name / SUMMARY).exists():
                    print(f"{arm.name}: its records are there", flush=True)
                elif time.monotonic() + 60 * arm.minutes > deadline:
                    left = (deadline - time.monotonic()) / 60
                    print(f"{arm.name}: {arm.minutes} minutes, {left:.1f} are left", flush=True)
                elif not self._run_arm(arm, facts):
                    failed.append(arm.name)
        return failed

    @contextmanager
    def _claim(self, arm: Arm) -> Iterator[bool]:
        """Whether this process alone is at work on the arm; a process that dies gives it back."""
        path = self.outputs / ".locks" / f"sweep--{self.name}--{arm.name}"
        with ExitStack() as held:
            try:
                held.enter_context(lock(path))
            except Locked:
                yield False
            else:
                yield True

    def _run_arm(self, arm: Arm, facts: dict[str, Any]) -> bool:
        started, seconds = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), {}
        folder = self.outputs / self.name / arm.name
        for step, overrides in arm.steps.items():
            before = time.monotonic()
            print(f"{arm.name}: {step} starts", flush=True)
            export = str(folder / "export")
            own = [f"name={self.name}", f"variant={arm.name}", f"outputs={self.outputs}"]
            code = self.run_step(
                arm, step, [*own, *(o.replace("{export}", export) for o in overrides)]
            )
            seconds[step] = round(time.monotonic() - before, 1)
            print(f"{arm.name}: {step} ended with {code} in {seconds[step]} s", flush=True)
            if code:
                return False
        summary = {
            "arm": arm.name,
            "steps": arm.steps,
            "seconds": seconds,
            "started": started,
            **facts,
            **training_summary(read_records(folder / "finetune" / "metrics.jsonl")),
        }
        keep_records(folder, self.records / arm.name, summary)
        # Steps that only make what all share have left none.
        shutil.rmtree(folder, ignore_errors=True)
        return True


def training_summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed, memory and held-out loss of a run's metrics; nothing of none."""
    steps, validations = by_step(metrics, "train"), by_step(metrics, "validation")
    if not steps:
        return {}
    warm = steps[WARM_UP_STEPS:] or steps
    return {
        "tokens_per_second_median": round(median(s["tokens_per_second"] for s in warm)),
        "peak_memory_bytes": max(s["memory_bytes"] for s in steps),
        "training_seconds": round(sum(s["seconds"] for s in steps), 1),
        "held_out_loss": {f"step_{v['step']}": round(v["loss"], 5) for v in validations},
    }


def keep_records(folder: Path, target: Path, summary: dict[str, Any]) -> None:
    """Copy what is KEPT of each stage's folder into `target`, which appears when it is whole."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(folder.glob("*/*")):
        kept = partial / path.parent.name
        if any(path.match(pattern) for pattern in KEPT):
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept / path.name)
        elif path.name == RECORDS:
            kept.mkdir(parents=True, exist_ok=True)
            (kept / f"{RECORDS}.xz").write_bytes(lzma.compress(_slim(read_records(path)), preset=9))
    partial.mkdir(parents=True, exist_ok=True)
    (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _slim(records: list[dict[str, Any]]) -> bytes:
    lines = []
    for record in records:
        if "prompt_sha256" in record:
            record = record | {"prompt_sha256": record["prompt_sha256"][:HASH_DIGITS]}
        lines.append(json.dumps(record) + "\n")
    return "".join(lines).encode()


def machine(gpu: int | None, commit: str | None) -> dict[str, Any]:
    """What the arms run on."""
    name = "CPU"
    if gpu is not None:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        query += ["-i", str(gpu)]
        name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    if commit is None:
        described = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"gpu": name, "commit": commit, "versions": versions()}


def step_runner(
    gpu: int | None, logs: Path, more: Sequence[str], script: Path = ROOT / "pipeline/run.py"
) -> RunStep:
    """Runs a step by `script` on one GPU (None: the CPU), its output in a file of `logs`."""
    device = "cpu" if gpu is None else "cuda"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "" if gpu is None else str(gpu)}
    logs.mkdir(parents=True, exist_ok=True)

    def run_step(arm: Arm, step: str, overrides: list[str]) -> int:
        command = [sys.executable, str(script), *overrides, f"device={device}"]
        with (logs / f"{arm.name}.{step}.log").open("a") as log:
            process = subprocess.Popen(
                [*command, *more], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            try:
                return process.wait()
            finally:
                # Reached early by a signal: the stage saves what it has.
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    return run_step


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Run the sweep of the command line; 1 where an arm failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="a file of conf/sweep")
    parser.add_argument("--records", type=Path, required=True, help="a folder for each arm's")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--logs", type=Path, default=Path("outputs/sweep_logs"))
    parser.add_argument("--arms", help="of the file, these alone, in its order: full_s1,hybrid_s1")
    parser.add_argument("--gpu", type=int, help="its number; without it, the CPU")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin nothing that takes longer"
    )
    parser.add_argument("--commit", help="where the code runs without its history, what it is")
    own, more = list(arguments), []
    if "--" in own:
        more = own[own.index("--") + 1 :]
        own = own[: own.index("--")]
    options = parser.parse_args(own)
    try:
        arms = read_arms(options.sweep)
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        parser.error(f"{options.sweep}: {error}")
    if options.arms:
        wanted = options.arms.split(",")
        unknown = [name for name in wanted if name not in [arm.name for arm in arms]]
        if unknown:
            parser.error(f"--arms: {unknown[0]!r} is none of {', '.join(a.name for a in arms)}")
        arms = [arm for arm in arms if arm.name in wanted]
    signal.signal(signal.SIGTERM, _stop)
    run_step = step_runner(options.gpu, options.logs, more)
    sweep = Sweep(options.sweep.stem, arms, options.outputs, options.records, run_step)
    failed = sweep.run(options.minutes, machine(options.gpu, options.commit))
    if failed:
        print(f"failed: {', '.join(failed)}; see {options.logs}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
