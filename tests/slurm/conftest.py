"""One Slurm cluster for the tests of a file."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of 16 cores and 8 GPUs, all pretended."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # pytest's own folders can be too long for a socket's name.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    # Slurm's daemons ask that others can look into their folders.
    folder.chmod(0o755)
    started = Cluster(folder)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder)
