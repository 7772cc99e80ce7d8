"""A fingerprint names the weights: nothing else changes it, and every real difference does."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from adaskip.core.fingerprint import weights_fingerprint
from tests.families import random_model


class Weights(nn.Module):
    def __init__(self, *sizes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(torch.Size(sizes).numel(), dtype=torch.float32).view(sizes))


def test_same_weights_have_the_same_fingerprint():
    first, second = random_model("llama"), random_model("llama")
    assert weights_fingerprint(first) == weights_fingerprint(second)
    assert len(weights_fingerprint(first)) == 64


def test_it_is_stable_across_processes_and_versions():
    expected = "ebfb371515120259"
    assert weights_fingerprint(Weights(3, 4)).startswith(expected), "another way of sampling needs another ALGORITHM"


def test_mode_compilation_and_offloading_do_not_matter():
    model = random_model("llama", num_layers=1)
    fingerprint = weights_fingerprint(model)
    assert weights_fingerprint(torch.compile(model.train())) == fingerprint
    assert weights_fingerprint(cpu_offload(model, torch.device("cpu"))) == fingerprint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_matter():
    model = random_model("llama").bfloat16()
    assert weights_fingerprint(model) == weights_fingerprint(model.to("cuda"))


def test_the_dtype_matters_even_there_and_back():
    model = random_model("llama")
    fingerprints = {
        weights_fingerprint(model),
        weights_fingerprint(model.bfloat16()),
        weights_fingerprint(model.float()),
    }
    assert len(fingerprints) == 3


@pytest.mark.parametrize("position", [0, 511, 1023])
def test_every_element_of_a_small_tensor_counts(position):
    model = Weights(1024)
    before = weights_fingerprint(model)
    model.weight.data[position] += 1e-3
    assert weights_fingerprint(model) != before


def test_a_sampled_element_of_a_large_tensor_counts_and_one_between_does_not():
    model = Weights(512, 512)  # every 257th element is sampled
    before = weights_fingerprint(model)
    model.weight.data.view(-1)[1] += 1.0
    assert weights_fingerprint(model) == before
    model.weight.data.view(-1)[257] += 1.0
    assert weights_fingerprint(model) != before


def test_samples_reach_every_column():
    before = weights_fingerprint(Weights(512, 512))
    for column in range(0, 512, 37):
        model = Weights(512, 512)
        model.weight.data[:, column] = 0.0
        assert weights_fingerprint(model) != before


def test_shape_and_name_matter():
    renamed = nn.ModuleDict({"other": Weights(4, 3)})
    assert len({weights_fingerprint(model) for model in (Weights(3, 4), Weights(4, 3), renamed)}) == 3


def test_buffers_count_only_if_they_are_saved():
    model = Weights(3)
    before = weights_fingerprint(model)
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    assert weights_fingerprint(model) == before
    model.register_buffer("statistics", torch.zeros(2))
    assert weights_fingerprint(model) != before


def test_empty_scalar_and_strided_tensors_are_read():
    model = nn.Module()
    model.empty, model.scalar = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(1.0))
    model.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    assert weights_fingerprint(model) == weights_fingerprint(model)


def test_weights_without_data_are_refused():
    with pytest.raises(ValueError, match="has no data"):
        weights_fingerprint(nn.Linear(2, 2, device="meta"))
