"""Snapshots of the three families to load and to break, without network, and the message of a refusal.

A test file takes a fixture over by an assignment, `snapshots = family_snapshots.snapshots`: ruff takes an imported name
that is then an argument's for a mistake.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from adaskip.models.errors import ModelError
from adaskip.models.loading import load_model
from tests.checkpoints import write_family

FAMILIES = ("llama", "internlm", "vicuna")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("snapshots")
    return {family: write_family(family, root / family) for family in FAMILIES}


@pytest.fixture
def damaged(snapshots, tmp_path) -> Path:
    """A copy of the LLaMA snapshot to break."""
    return Path(shutil.copytree(snapshots["llama"], tmp_path / "copy"))


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(*arguments, **options) -> str:
    """The message of the one-line ModelError that loading ends in."""
    with pytest.raises(ModelError) as caught:
        load_model(*arguments, **{"device": "cpu", **options})
    message = str(caught.value)
    assert "\n" not in message
    return message
