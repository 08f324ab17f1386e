"""A stage that goes on for longer than what lies in its folders was made for.

Its module has lengthens(old, new), whether work that depends on `old` may go on as `new`, and
continue_finished(finished, out), which fills `out` with what finished work goes on from.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.manifest import DamagedRecord, read_manifest, read_record, write_record

log = logging.getLogger("longgen")


def lengthens(
    module: ModuleType, old: dict[str, Any], config: dict[str, Any], inputs: dict[str, str]
) -> bool:
    """Whether the stage may go on with the work of `old`, a manifest or the record of a partial
    folder, under this configuration."""
    own = getattr(module, "lengthens", None)
    return own is not None and old.get("inputs") == inputs and own(old["config"], config)


def begin_longer(
    module: ModuleType, final: Path, out: Path, name: str, record: dict[str, Any]
) -> bool:
    """Make `out` the partial folder of this configuration where it lengthens what is there.

    That is what a shorter run left in `out`, else the finished one in `final`, which stays as it is
    until the longer one takes its place.

    Args:
        name: of the file in `out` that says what the work depends on.
        record: what that file is to hold.

    Returns:
        Whether it did.
    """
    left = out.exists() and any(out.iterdir())
    try:
        old = read_record(out / name) if left else read_manifest(final)
    except DamagedRecord:
        return False
    if not old or not lengthens(module, old, record["config"], record["inputs"]):
        return False
    if left:
        write_record(out / name, record)
        log.info("continuing what a shorter run left")
        return True
    new = out.with_name(f"{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    module.continue_finished(final, new)
    write_record(new / name, record)
    new.rename(out)
    log.info("continuing the finished, shorter run %s, which stays until this one is done", final)
    return True
