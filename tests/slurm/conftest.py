"""One Slurm cluster for the tests of a file."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not


@contextmanager
def running(**shape: int) -> Iterator[Cluster]:
    """A cluster of that shape, or the test is skipped with the reason."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # pytest's own folders can be too long for a socket's name.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    # Slurm's daemons ask that others can look into their folders.
    folder.chmod(0o755)
    cluster = Cluster(folder, **shape)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of 16 cores and 8 GPUs, all pretended."""
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def large():
    """64 nodes of 8 GPUs, all pretended."""
    with running(nodes=64, cpus=96) as started:
        yield started
