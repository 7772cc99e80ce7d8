"""One thread per test process: the models are too small to share, and on a busy machine threads wait for each other.

Property tests have no deadline for the same reason: how long a first call takes is the machine's affair. Tests marked
`gpu` are skipped where there is no CUDA device.
"""

import gc
import os

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("patient", deadline=None, max_examples=50)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Without `os.fsync`, which no test here can tell from its absence; each record of a run would wait for it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def short_answers():
    """Divergences on answers of at most 12 tokens instead of 128, which is most of the time of a search."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("adaskip.calibration.divergence.ANSWER_TOKENS", 12)
        yield


@pytest.fixture
def away(tmp_path, monkeypatch):
    """The current folder, empty and of no checkout, so that results go there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adaskip.common.paths.checkout", lambda: None)
    return tmp_path


def pytest_collection_finish():
    """Later garbage collections leave out what has been imported: half a second each."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    import torch  # not at the top: the process that only distributes the tests needs none of it

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
