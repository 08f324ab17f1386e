"""A trace of one training step, to be looked at in chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("longgen.training")


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Writes what the CPU and the GPU did meanwhile to `path`, a .json.gz.

    Collecting it costs some of the time that it shows.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as found:
        yield
    partial = path.with_name(f"partial_{path.name}")
    found.export_chrome_trace(str(partial))
    partial.replace(path)
    log.info("trace of the step: %s", path)
