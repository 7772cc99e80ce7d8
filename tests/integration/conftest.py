"""Fixtures of the tests that run cells."""

import pytest

from tests.tiny_runs import make_checkpoint, make_data


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def options(checkpoint, data_dir, tmp_path):
    """What every command of these tests is given."""
    return [
        *("--checkpoint", str(checkpoint), "--data-dir", str(data_dir), "--output-dir", str(tmp_path / "runs")),
        *("--device", "cpu", "--dtype", "float32", "--threads", "1", "--max-new-tokens", "8"),
    ]
