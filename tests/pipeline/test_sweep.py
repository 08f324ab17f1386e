"""A sweep does each arm once, whatever is killed when, and leaves records alone behind."""

import json
import lzma
from pathlib import Path

import pytest

from pipeline.sweep import Arm, Sweep, main, read_arms, step_runner
from tests.pipeline.test_config import config

ROOT = Path(__file__).resolve().parents[2]
PROOF = ROOT / "conf/sweep/proof.yaml"
METRICS = [
    {
        "kind": "train",
        "step": step,
        "tokens_per_second": speed,
        "memory_bytes": 10 * step,
        "seconds": 2.0,
    }
    for step, speed in enumerate((1, 1, 1, 1, 1, 50, 60, 70), 1)
] + [{"kind": "validation", "step": 8, "loss": 1.25}]
ANSWER = {"task": "niah", "score": 100.0, "prompt_sha256": "0123456789abcdef" * 4}


class Machine:
    """Runs steps by writing what the stages leave; `fails` names an (arm, step) that does not."""

    def __init__(self, root: Path, fails: tuple[str, str] | None = None) -> None:
        self.root, self.fails, self.ran = root, fails, []

    def __call__(self, arm: Arm, step: str, overrides: list[str]) -> int:
        self.ran.append((arm.name, step, overrides))
        if (arm.name, step) == self.fails:
            return 1
        folder = self.root / "outputs/small" / arm.name / step
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "weights.bin").write_bytes(b"heavy")
        if step == "finetune":
            (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METRICS))
        if step == "evaluate":
            (folder / "records.jsonl").write_text(json.dumps(ANSWER) + "\n")
            (folder / "scores.csv").write_text("model\n")
        return 0


STEPS = {"finetune": ["stage=finetune"], "evaluate": ["eval.folders={final: {export}}"]}


def sweep(root, machine, *names):
    arms = [Arm(name, minutes, STEPS) for name, minutes in names]
    return Sweep("small", arms, root / "outputs", root / "records", machine)


def test_an_arm_leaves_its_records_and_nothing_else(tmp_path):
    machine = Machine(tmp_path)
    assert sweep(tmp_path, machine, ("a", 1)).run(60, {"gpu": "one"}) == []
    own = ["name=small", "variant=a", f"outputs={tmp_path / 'outputs'}"]
    assert machine.ran[1] == (
        *("a", "evaluate"),
        [*own, f"eval.folders={{final: {tmp_path / 'outputs/small/a/export'}}}"],
    )
    kept = tmp_path / "records/a"
    assert sorted(str(p.relative_to(kept)) for p in kept.rglob("*.*")) == [
        "evaluate/manifest.json",
        "evaluate/records.jsonl.xz",
        "evaluate/scores.csv",
        "finetune/manifest.json",
        "finetune/metrics.jsonl",
        "run.json",
    ]
    record = json.loads(lzma.decompress((kept / "evaluate/records.jsonl.xz").read_bytes()))
    assert record == ANSWER | {"prompt_sha256": "0123456789abcdef"}
    summary = json.loads((kept / "run.json").read_text())
    assert summary["gpu"] == "one" and set(summary["seconds"]) == {"finetune", "evaluate"}
    assert summary["tokens_per_second_median"] == 60 and summary["peak_memory_bytes"] == 80
    assert summary["held_out_loss"] == {"step_8": 1.25}
    assert not (tmp_path / "outputs/small/a").exists()
    assert [p.name for p in (tmp_path / "records").iterdir()] == ["a"]


def test_what_has_its_records_is_skipped_and_what_failed_is_done_again(tmp_path):
    machine = Machine(tmp_path, fails=("b", "evaluate"))
    arms = (("a", 1), ("b", 1), ("c", 1))
    assert sweep(tmp_path, machine, *arms).run(60, {}) == ["b"]
    assert sorted(p.name for p in (tmp_path / "records").iterdir()) == ["a", "c"]
    # The weights of what failed stay, for it to go on from.
    assert (tmp_path / "outputs/small/b/finetune/weights.bin").exists()
    again = Machine(tmp_path)
    assert sweep(tmp_path, again, *arms).run(60, {}) == []
    assert [arm for arm, _, _ in again.ran] == ["b", "b"]


def test_an_arm_is_begun_only_where_its_minutes_are_left(tmp_path):
    machine = Machine(tmp_path)
    assert sweep(tmp_path, machine, ("long", 30), ("brief", 5)).run(10, {}) == []
    assert {arm for arm, _, _ in machine.ran} == {"brief"}


def test_two_sweeps_do_not_take_one_arm(tmp_path):
    class Nested(Machine):
        def __call__(self, arm, step, overrides):
            if step == "finetune" and arm.name == "a":
                # Another sweep begins while this one is at work.
                other = Machine(tmp_path)
                assert sweep(tmp_path, other, ("a", 1), ("b", 1)).run(60, {}) == []
                assert {name for name, _, _ in other.ran} == {"b"}
            return super().__call__(arm, step, overrides)

    machine = Nested(tmp_path)
    assert sweep(tmp_path, machine, ("a", 1), ("b", 1)).run(60, {}) == []
    assert {name for name, _, _ in machine.ran} == {"a"}


def test_a_step_is_one_run_with_its_output_in_a_file(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, os; print(sys.argv[1:], repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    )
    run_step = step_runner(None, tmp_path / "logs", ["more=1"], script)
    assert run_step(Arm("a", 1, {}), "finetune", ["stage=finetune"]) == 0
    told = (tmp_path / "logs/a.finetune.log").read_text()
    assert told == "['stage=finetune', 'device=cpu', 'more=1'] ''\n"
    script.write_text("raise SystemExit(3)")
    assert run_step(Arm("a", 1, {}), "finetune", []) == 3


@pytest.mark.parametrize(
    ("arms", "message"),
    [("{a: {steps: [fly]}}", "arm a has the step 'fly'; must be one of finetune")],
)
def test_a_wrong_file_is_refused(tmp_path, capsys, arms, message):
    path = tmp_path / "s.yaml"
    path.write_text(
        "overrides: []\nsteps: {finetune: []}\nsteps_of_an_arm: []\nminutes: 1\n" + f"arms: {arms}"
    )
    with pytest.raises(SystemExit):
        main([str(path), "--records", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_the_arms_of_the_proof_compose():
    arms = {arm.name: arm for arm in read_arms(PROOF)}

    def composed(arm, step):
        return config(*(text.replace("{export}", "/e") for text in arms[arm].steps[step]))

    trained = composed("none_s2", "finetune")
    assert (trained.schedule.full, trained.train.seed) == ("none", 2)
    assert trained.train.steps * trained.train.rows_per_step * trained.data.seq_length > 50e6
    asked = composed("none_s2", "proof").eval
    assert (asked.niah.seed, asked.ruler.lengths, asked.name) == (2, [32768], "proof")
    # The last of two choices of data is the one.
    unseen = composed("full_64k", "unseen")
    assert (unseen.data.name, unseen.eval.folders) == ("proof_unseen", {"trained": "/e"})
