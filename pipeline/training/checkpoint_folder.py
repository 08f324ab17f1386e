"""The checkpoints in a folder: which there are, which one to take, which ones are kept.

A checkpoint is a folder `step_NNNNNN`, written under another name and renamed when whole; the file
`latest` names the newest one. Where `latest` is lost, the newest whole checkpoint is taken.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from pipeline.manifest import StageError
from pipeline.training.shard_store import faults, on_lead, write_synced

log = logging.getLogger("longgen.training")

LATEST = "latest"
PARTIAL = ".partial"
NAME = re.compile(r"step_(\d{6,})")
# Seconds that a shared file system may take to show one node what another has written.
SEEN_WITHIN = 30.0
SEPARATE = (
    "the outputs folder seems to be a disk of each node by itself; set outputs to a folder that "
    "all nodes share"
)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, whole or damaged, in ascending order of their steps."""
    return sorted(
        (path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), key=step_of
    )


def _named_by_latest(folder: Path) -> tuple[Path | None, str]:
    """(The checkpoint that `latest` names, ""), or (None, what is wrong with `latest`)."""
    try:
        name = (folder / LATEST).read_text().strip()
        if NAME.fullmatch(name) and (folder / name).is_dir():
            return folder / name, ""
    except FileNotFoundError:
        return None, "is missing"
    except (OSError, UnicodeDecodeError) as error:
        return None, f"cannot be read ({error})"
    return None, f"names {name!r}, which is not there" if name else "is empty"


def candidates(folder: Path) -> tuple[list[Path], str]:
    """(Checkpoints in the order to try them, what is wrong with `latest` or "").

    The first is the one that `latest` names; where it names none, the one of the highest step.
    """
    named, wrong = _named_by_latest(folder)
    found = checkpoints(folder)[::-1]
    if named is not None:
        found = [path for path in found if step_of(path) <= step_of(named)]
    return found, wrong


def saved_step(finetune: Path) -> int:
    """The step of the newest checkpoint of a finetune folder; 0 where there is none."""
    found, _ = candidates(finetune / "checkpoints")
    return step_of(found[0]) if found else 0


def newest_whole(folder: Path, group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest checkpoint in `folder` whose checksums match; None where there is none at all.

    Args:
        group: ranks that all call it, and share the reading; None: one process reads.

    Raises:
        StageError: where there are checkpoints, and none is whole.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    known = [candidates(folder)]
    if group is not None:
        dist.broadcast_object_list(known, src=0, group=group)
    found, wrong_latest = known[0]
    for checkpoint in found:
        wrong = [list(faults(checkpoint, rank, size))]
        if group is not None:
            mine, wrong = [f"{fault} on {socket.gethostname()}" for fault in wrong[0]], [[]] * size
            dist.all_gather_object(wrong, mine, group=group)
        wrong = [fault for each in wrong for fault in each]
        if not wrong:
            if wrong_latest:
                taken = f"taking {checkpoint.name}, the newest whole checkpoint"
                log.warning("%s %s; %s", folder / LATEST, wrong_latest, taken)
            return checkpoint
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        log.warning(
            "%s is damaged and left out (%s%s); trying the one before", checkpoint, wrong[0], more
        )
    if found:
        raise StageError(
            f"{folder}: every checkpoint is damaged; restore one from a copy, or start again with "
            "force=true"
        )
    return None


def newest(finetune: Path, group: dist.ProcessGroup | None = None) -> Path:
    """The newest whole checkpoint of a finetune folder, for readers alone.

    Args:
        group: ranks that all call it, and share the reading.

    Raises:
        StageError: where there is none.
    """
    found = newest_whole(finetune / "checkpoints", group)
    if found is None:
        raise StageError(f"{finetune}: holds no checkpoint; run stage=finetune first")
    return found


def unseen(paths: list[Path]) -> list[Path]:
    """Which files are still not there after SEEN_WITHIN seconds."""
    until = time.monotonic() + SEEN_WITHIN
    while (left := [path for path in paths if not path.exists()]) and time.monotonic() < until:
        time.sleep(0.5)
    return left


def check_shared(folder: Path, group: dist.ProcessGroup) -> None:
    """Check that every rank of `group` sees what rank 0 writes into `folder`.

    Raises:
        StageError: on every rank, where one does not.
    """
    mark: list[str] = [""]

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # A name that was never looked for: a network file system remembers what was not there.
        handle, name = tempfile.mkstemp(prefix=".seen_by_all_", dir=folder)
        os.close(handle)
        mark[0] = Path(name).name

    on_lead(group, write)
    dist.broadcast_object_list(mark, src=0, group=group)
    hosts: list[tuple[str, bool]] = [("", True)] * group.size()
    sees = not unseen([folder / mark[0]])
    dist.all_gather_object(hosts, (socket.gethostname(), sees), group=group)
    if group.rank() == 0:
        (folder / mark[0]).unlink()
    blind = sorted({host for host, sees in hosts if not sees})
    if blind:
        raise StageError(
            f"{folder}: {', '.join(blind)} does not see what rank 0 on {hosts[0][0]} writes there: "
            f"{SEPARATE}"
        )


def publish(partial: Path, final: Path, written: list[str]) -> None:
    """Give a checkpoint its name, and `latest` that name.

    Args:
        written: names of the files that all ranks have written into `partial`.

    Raises:
        StageError: where this process does not see one of them.
    """
    missing = unseen([partial / name for name in written])
    if missing:
        raise StageError(
            f"{final}: not saved, for {socket.gethostname()} does not see {len(missing)} of the "
            f"{len(written)} files that the ranks wrote, such as {missing[0].name}: {SEPARATE}"
        )
    if final.exists():
        remove(final)
    partial.rename(final)
    pointer = final.with_name(f"{LATEST}{PARTIAL}")
    write_synced(pointer, final.name + "\n")
    pointer.replace(final.with_name(LATEST))


def prune(saved: Path, keep_last: int, passed_over: list[Path]) -> None:
    """Remove what is not to be kept next to `saved`, which `latest` names and which always stays.

    Args:
        keep_last: how many checkpoints stay.
        passed_over: checkpoints that training did not continue from, mostly damaged ones; they go
            first.
    """
    dropped = [path for path in passed_over if path != saved and path.exists()]
    for path in dropped:
        log.warning("finetune: removed checkpoint=%s, which training did not go on from", path.name)
    up_to_saved = [path for path in checkpoints(saved.parent) if step_of(path) <= step_of(saved)]
    try:
        for path in dropped + [p for p in up_to_saved if p not in dropped][:-keep_last]:
            remove(path)
    except OSError as error:
        log.warning("finetune: an old checkpoint could not be removed: %s", error)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, under another name first: what is half removed is no checkpoint."""
    going = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    # Of a file that a process still has open, NFS keeps a remnant; the next start removes that.
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals have left in `folder`."""
    for left in folder.glob(f"*{PARTIAL}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()
