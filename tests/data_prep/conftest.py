"""The sources that tests of the whole stage read."""

import pytest

from tests.data_prep.stage_runs import make_sources


@pytest.fixture(scope="package")
def fetched(tmp_path_factory):
    """fetch's folder, with a package, and a local folder of JSON lines beside it."""
    root = tmp_path_factory.mktemp("data")
    make_sources(root)
    return root
