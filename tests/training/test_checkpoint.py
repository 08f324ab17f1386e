"""What is kept, what a damaged or half-written checkpoint does, and what is read without a run."""

import hashlib
import json
import pickle
import shutil

import pytest
import torch

from pipeline.manifest import StageError
from pipeline.training import checkpoint, checkpoint_folder, shard_store
from pipeline.training.checkpoint import Progress, fill_masters, read_weights, weights_reader
from tests.training.small_training import (
    parallel_section,
    small_config,
    small_engine,
    small_train,
    small_trainer,
    whole_weights,
)

CONFIG = small_config("sink", 2)


def trainer_in(folder, **changes):
    train = small_train(**{"save_every": 2, "validate_every": 100} | changes)
    return small_trainer(CONFIG, parallel_section(), train, folder)


@pytest.fixture(scope="module")
def whole(layout, tmp_path_factory):
    """A run of six steps with checkpoints of 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, _ = trainer_in(folder, keep_last=3)
    trainer.run(Progress(0, 0))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_only_the_newest_are_kept(layout, tmp_path):
    trainer, _ = trainer_in(tmp_path, keep_last=2)
    trainer.run(Progress(0, 0))
    assert names(tmp_path) == ["latest", "step_000004", "step_000006"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000006\n"


def data_file(folder):
    return next(folder.glob("__0_*"))


def flip(folder):
    content = bytearray(data_file(folder).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(folder).write_bytes(content)


def cut(folder):
    content = data_file(folder).read_bytes()
    data_file(folder).write_bytes(content[: len(content) // 2])


DAMAGES = {
    "a flipped bit": flip,
    "half a file": cut,
    "a file that is gone": lambda folder: data_file(folder).unlink(),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "an altered progress": lambda folder: (folder / "progress.json").write_text("{}"),
}


LOST = {
    "missing": lambda latest: latest.unlink(),
    "empty": lambda latest: latest.write_text(""),
    "full of zeros": lambda latest: latest.write_bytes(bytes(12)),
    "no text": lambda latest: latest.write_bytes(b"\xff"),
    "dangling": lambda latest: latest.write_text("step_000008\n"),
    "a folder": lambda latest: (latest.unlink(), latest.mkdir()),
}


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
@pytest.mark.parametrize("lost", LOST)
def test_without_latest_the_newest_whole_checkpoint_is_taken(run, lost, damaged, caplog):
    folder = run / "checkpoints"
    LOST[lost](folder / "latest")
    if damaged:
        flip(folder / "step_000006")
    step = 4 if damaged else 6
    _, start = trainer_in(run)
    assert start.step == step
    assert f"taking step_{step:06d}, the newest whole checkpoint" in caplog.text
    assert checkpoint_folder.saved_step(run) == 6
    assert checkpoint_folder.newest(run).name == f"step_{step:06d}"


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_one_of_a_higher_step_goes_before_what_was_just_saved(run, keep_last):
    """Continued from 4, for 6 is damaged, and saved at 5: then 5 stays."""
    flip(run / "checkpoints" / "step_000006")
    trainer, start = trainer_in(run, keep_last=keep_last, steps=5)
    trainer.run(start)
    kept = ["step_000004", "step_000005"][-keep_last:]
    assert names(run) == ["latest", *kept]
    assert checkpoint_folder.newest(run).name == "step_000005"


def test_a_damaged_one_is_not_among_those_that_are_kept(run):
    """Continued from 4 and saved at 7: the damaged 6 does not take the place of 4."""
    flip(run / "checkpoints" / "step_000006")
    trainer, start = trainer_in(run, keep_last=2, steps=7, save_every=7)
    trainer.run(start)
    assert names(run) == ["latest", "step_000004", "step_000007"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before(run, damage, caplog):
    DAMAGES[damage](run / "checkpoints" / "step_000006")
    _, start = trainer_in(run)
    assert (start.step, start.rows_consumed) == (4, 16)
    assert "step_000006 is damaged and left out" in caplog.text
    assert checkpoint_folder.newest(run).name == "step_000004"


def test_all_damaged_is_no_fresh_start(run):
    for folder in (run / "checkpoints").glob("step_*"):
        cut(folder)
    with pytest.raises(StageError, match="every checkpoint is damaged; restore one .*force=true"):
        trainer_in(run)
    with pytest.raises(StageError, match="every checkpoint is damaged"):
        checkpoint_folder.newest(run)


def test_what_a_kill_leaves_of_a_save_is_no_checkpoint(run):
    folder = run / "checkpoints"
    (folder / "step_000006").rename(folder / "step_000006.partial")
    shutil.copytree(folder / "step_000002", folder / "step_000002.old.partial")
    _, start = trainer_in(run)
    assert start.step == 4
    assert names(run) == ["latest", "step_000002", "step_000004"]


def test_a_pointer_behind_the_newest_is_the_truth(run):
    """Killed between rename and pointer: the step is done again, not twice."""
    (run / "checkpoints" / "latest").write_text("step_000004\n")
    _, start = trainer_in(run)
    assert start.step == 4


def test_a_checkpoint_that_was_left_out_is_written_anew(run):
    flip(run / "checkpoints" / "step_000006")
    before = dict(read_weights(run))
    trainer, start = trainer_in(run, keep_last=3)
    trainer.run(start)
    assert checkpoint_folder.newest(run).name == "step_000006"
    after = dict(read_weights(run))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [(KeyboardInterrupt(), KeyboardInterrupt, ""), (MemoryError(), StageError, "MemoryError()")],
)
def test_what_ends_the_reading_of_a_checkpoint_is_told(run, monkeypatch, raised, kind, words):
    """torch.distributed.checkpoint catches everything, Ctrl-C too."""

    def end(*args):
        raise raised

    monkeypatch.setattr(shard_store._Reader, "read_data", end)
    with pytest.raises(kind) as error:
        dict(read_weights(run))
    assert str(error.value).endswith(words)


@pytest.mark.parametrize("thread", range(shard_store.FILES_A_RANK))
def test_a_full_disk_leaves_the_checkpoint_before(run, thread, monkeypatch, capfd):
    """Whichever of the threads it stops, also where the others have had room."""
    trainer, _ = trainer_in(run)
    begin = checkpoint._begin

    def begin_on_full_disk(folder, progress):
        begin(folder, progress)
        (folder / f"__0_{thread}.distcp").symlink_to("/dev/full")

    monkeypatch.setattr(checkpoint, "_begin", begin_on_full_disk)
    size = sum(piece.tensor.nbytes for piece in trainer.checkpointer._to_write())
    trainer.checkpointer.save(Progress(8, 32))
    with pytest.raises(StageError) as error:
        trainer.checkpointer.wait()
    told = str(error.value)
    assert "step_000008: no space for the checkpoint (rank 0: No space left on device)" in told
    assert f"it takes {size / 1e9:.3f} GB" in told
    assert "step_000002, step_000004, step_000006 kept" in told
    assert names(run) == ["latest", "step_000002", "step_000004", "step_000006"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_failed_save_in_the_background_ends_the_run(layout, tmp_path, monkeypatch):
    """After the step during which it failed, not at the next save."""
    trainer, _ = trainer_in(tmp_path, steps=20, save_every=10)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.training.checkpoint.write_pieces", fail)
    with pytest.raises(StageError, match="step_000010: no space for the checkpoint"):
        trainer.run(Progress(0, 0))
    assert trainer.current < 15


def test_training_goes_on_while_it_writes_and_does_not_change_what_is_written(
    layout, tmp_path, monkeypatch
):
    """The writer starts only when two more steps are done."""
    import threading

    trainer, _ = trainer_in(tmp_path, steps=9)
    trainer.step(0, 0)
    pieces = [
        shard_store.Piece(p.name, p.whole, p.offsets, p.tensor.clone())
        for p in trainer.checkpointer._to_write()
    ]
    go = threading.Event()
    honest = shard_store.write_pieces

    def later(*arguments):
        assert go.wait(60)
        return honest(*arguments)

    monkeypatch.setattr("pipeline.training.checkpoint.write_pieces", later)
    trainer.checkpointer.save(Progress(1, 4))
    for step in (1, 2):
        trainer.step(step, 4 * step)
    go.set()
    assert trainer.checkpointer.wait() > 0
    read = [
        shard_store.Piece(p.name, p.whole, p.offsets, torch.empty_like(p.tensor)) for p in pieces
    ]
    shard_store.read_pieces(tmp_path / "checkpoints" / "step_000001", read)
    for piece, expected in zip(read, pieces, strict=True):
        assert torch.equal(piece.tensor, expected.tensor), piece.key


def test_weights_of_one_run_begin_another(whole, layout):
    engine, groups = small_engine(CONFIG, parallel_section(), small_train())
    fill_masters(engine, CONFIG, groups, weights_reader(whole, CONFIG))
    expected = dict(read_weights(whole))
    assert expected.keys() == whole_weights(CONFIG).keys()
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, expected[name])
    assert not torch.equal(
        expected["output_layer.weight"], whole_weights(CONFIG)["output_layer.weight"]
    )


def test_weights_of_another_model_are_refused(whole, layout, tmp_path):
    other = small_config("sink", 4)
    with pytest.raises(StageError, match="another model's"):
        weights_reader(whole, other)
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(StageError, match="linear_qkv.*must be of shape.*variant=NAME"):
        small_trainer(other, parallel_section(), small_train(), tmp_path / "run")


def plant(folder, name, content):
    """Put a foreign file into a checkpoint, with the checksum that it has."""
    (folder / name).write_bytes(content)
    sums = json.loads((folder / "checksums.json").read_text())
    sums[name] = hashlib.sha256(content).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))


def test_an_index_that_wants_code_run_is_refused(run, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    plant(run / "checkpoints" / "step_000006", ".metadata", pickle.dumps(Evil()))
    for read in (lambda: dict(read_weights(run)), lambda: trainer_in(run)):
        with pytest.raises(StageError, match=r"\.metadata: is not the index .*builtins.print has"):
            read()
    assert not capsys.readouterr().out.startswith("run")


def test_an_index_names_files_of_its_own_folder(run):
    folder = run / "checkpoints" / "step_000006"
    index = shard_store._Reader(folder).read_metadata()
    for stored in index.storage_data.values():
        stored.relative_path = f"../step_000004/{stored.relative_path}"
    plant(folder, ".metadata", pickle.dumps(index))
    with pytest.raises(StageError, match=r"names a file outside the checkpoint, '\.\./step_000004"):
        dict(read_weights(run))


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b"[]", pickle.dumps([1])], ids=["empty", "zeros", "text", "list"]
)
@pytest.mark.parametrize("name", [".metadata", "progress.json"])
def test_foreign_files_end_in_one_error(run, name, content):
    plant(run / "checkpoints" / "step_000006", name, content)
    with pytest.raises(StageError, match=f"{name}: is not"):
        trainer_in(run)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(StageError, match="holds no checkpoint; run stage=finetune"):
        next(read_weights(tmp_path))


def test_it_says_where_the_run_stood(whole):
    stored = json.loads((whole / "checkpoints/step_000004/progress.json").read_text())
    assert (stored["step"], stored["rows_consumed"], stored["adam_step"]) == (4, 16, 4.0)
