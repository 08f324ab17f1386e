"""What is kept, what a damaged or half-written checkpoint does, and what is read without a run."""

import json
import pickle
import shutil

import pytest
import torch

from pipeline.manifest import StageError
from pipeline.training import checkpoint, shard_store
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
    train = small_train(save_every=2, validate_every=100, **changes)
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


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before(run, damage, caplog):
    DAMAGES[damage](run / "checkpoints" / "step_000006")
    _, start = trainer_in(run)
    assert (start.step, start.rows_consumed) == (4, 16)
    assert "step_000006 is damaged and left out" in caplog.text
    assert checkpoint.newest(run).name == "step_000004"


def test_all_damaged_is_no_fresh_start(run):
    for folder in (run / "checkpoints").glob("step_*"):
        cut(folder)
    with pytest.raises(StageError, match="every checkpoint is damaged; restore one .*force=true"):
        trainer_in(run)
    with pytest.raises(StageError, match="every checkpoint is damaged"):
        checkpoint.newest(run)


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
    assert checkpoint.newest(run).name == "step_000006"
    after = dict(read_weights(run))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [(KeyboardInterrupt(), KeyboardInterrupt, ""), (MemoryError(), ValueError, "MemoryError()")],
)
def test_what_ends_the_reading_of_a_checkpoint_is_told(run, monkeypatch, raised, kind, words):
    """torch.distributed.checkpoint catches everything, Ctrl-C too."""

    def end(*args):
        raise raised

    monkeypatch.setattr(shard_store._Reader, "read_data", end)
    with pytest.raises(kind) as error:
        dict(read_weights(run))
    assert str(error.value) == words


def test_a_full_disk_leaves_the_checkpoint_before(run, monkeypatch):
    trainer, _ = trainer_in(run)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.training.checkpoint.write_pieces", full)
    trainer.checkpointer.save(Progress(8, 32))
    with pytest.raises(StageError, match="step_000008.*No space left on device.*free space"):
        trainer.checkpointer.wait()
    assert names(run) == ["latest", "step_000002", "step_000004", "step_000006"]


def test_a_failed_save_in_the_background_ends_the_run(layout, tmp_path, monkeypatch):
    trainer, _ = trainer_in(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.training.checkpoint.write_pieces", fail)
    with pytest.raises(StageError, match="step_000002.*could not be written"):
        trainer.run(Progress(0, 0))


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
        honest(*arguments)

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


def test_an_index_that_wants_code_run_is_refused(run):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    folder = run / "checkpoints" / "step_000006"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="builtins.print has no place"):
        shard_store.stored_shapes(folder)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(StageError, match="holds no checkpoint; run stage=finetune"):
        next(read_weights(tmp_path))


def test_it_says_where_the_run_stood(whole):
    stored = json.loads((whole / "checkpoints/step_000004/progress.json").read_text())
    assert (stored["step"], stored["rows_consumed"], stored["adam_step"]) == (4, 16, 4.0)
