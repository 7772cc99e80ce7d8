"""GGUF files: read without their weights, written one tensor at a time, and compared with what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.gguf_writer import GGUFValue

from adaskip.engines.errors import ExportError
from adaskip.engines.gguf_blocks import Kind, converted, relative_error, values
from adaskip.engines.gguf_layers import GGUFModel, Weight

DROPPED = ("GGUF.", "general.architecture", "general.alignment", "general.size_label", "split.")
"""Beginnings of fields that are not copied: the writer makes them, or they do not hold of the smaller model."""
MOST_ERROR = {Kind.F32: 1e-6, Kind.F16: 1e-3, Kind.BF16: 4e-3}
"""Largest error of a written tensor, as a fraction of its size (root of the mean square), by type."""
MOST_BLOCK_ERROR = 1e-2
"""The same for quantised types: 8 bits err by 0.006, their scales in half precision by less than 0.001, unless these
are so small that they lose digits."""


def read_file(path: Path) -> GGUFModel:
    """A GGUF file of any architecture; weights are read from it when they are asked for.

    Raises:
        ExportError: it is damaged, big-endian, or part of a split file.
    """
    reader = _reader(path)
    with _in_one_line(path):
        fields = {
            key: _value(field) for key, field in reader.fields.items() if not key.startswith(DROPPED) and field.data
        }
        architecture = str(reader.fields["general.architecture"].contents())
        weights = {tensor.name: _weight(tensor) for tensor in reader.tensors}
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
    if parts > 1:
        raise ExportError(f"{path} is one of {parts} parts of a GGUF file: merge them first (llama-gguf-split --merge)")
    return GGUFModel(architecture, fields, weights)


def write_file(model: GGUFModel, path: Path) -> None:
    """Write a model's file, with one tensor in memory at a time.

    The writer's own `write_tensor_data` uses numpy's `tofile`, which may write less than all on a full disk and not say
    so.

    Raises:
        ExportError: a weight cannot be divided (see `gguf_blocks.divided`).
        OSError: the file cannot be written, as on a full disk.
    """
    writer = GGUFWriter(path, model.architecture)
    try:
        for key, field in model.fields.items():
            writer.add_key_value(key, field.value, field.type, field.sub_type)
        for name, weight in model.weights.items():
            shape = weight.byte_shape
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=weight.target)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None, "the header opens the file"
        (file,) = writer.fout
        for name, weight in model.weights.items():
            data = np.ascontiguousarray(_stored(name, weight))
            assert data.shape == weight.byte_shape
            writer.write_padding(file, file.tell())
            file.write(data.data)
            writer.write_padding(file, data.nbytes)
        writer.close()
    except OSError as error:
        raise OSError(f"{path.name} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # after an error; without one it is closed
            writer.close()


def compare_file(model: GGUFModel, path: Path) -> float:
    """Read a written file again and compare it with the model; the largest relative error of a tensor.

    Raises:
        ExportError: a field or tensor is not as it was meant, or a tensor errs by more than its type's rounding.
    """
    found = read_file(path)
    if found.architecture != model.architecture or _plain(found.fields) != _plain(model.fields):
        raise ExportError(f"{path} was not written right: its fields are not those of the model")
    if list(found.weights) != list(model.weights):
        raise ExportError(f"{path} was not written right: its tensors are not those of the model")
    return max(_compare(name, weight, found.weights[name]) for name, weight in model.weights.items())


def _plain(fields: Mapping[str, GGUFValue]) -> dict[str, tuple[GGUFValueType, Any]]:
    """Type and value of fields, numbers as a file holds them: half of a float's digits, and no enumerations."""

    def stored(value: Any) -> Any:
        return float(np.float32(value)) if isinstance(value, float) else value

    return {
        key: (
            field.type,
            [stored(value) for value in field.value] if isinstance(field.value, list) else stored(field.value),
        )
        for key, field in fields.items()
    }


def _compare(name: str, meant: Weight, found: Weight) -> float:
    if (found.kind, found.shape) != (meant.target, meant.shape):
        raise ExportError(f"tensor {name} was not written right: it is {found.kind.name} {list(found.shape)}")
    right, stored = meant.load(), found.load()
    if meant.kind == meant.target and meant.divisor == 1.0:
        error = 0.0 if np.array_equal(right, stored) else np.inf
    else:
        error = relative_error(stored, found.kind, values(right, meant.kind, meant.divisor))
    if not error <= MOST_ERROR.get(found.kind, MOST_BLOCK_ERROR):
        raise ExportError(
            f"tensor {name} of type {found.kind.name}, divided by {meant.divisor:g}, errs by {error:.1e} of its size: "
            "its scales are too small for half precision; allowed: an export from the unquantised checkpoint, or a "
            "plan with other scales"
        )
    return error


def _stored(name: str, weight: Weight) -> np.ndarray:
    try:
        return converted(weight.load(), weight.kind, weight.target, weight.divisor)
    except ExportError as error:
        raise ExportError(f"tensor {name}: {error}") from None


def _reader(path: Path) -> GGUFReader:
    with _in_one_line(path):
        reader = GGUFReader(path)
    if reader.endianess != GGUFEndian.LITTLE:
        raise ExportError(f"{path} is a big-endian GGUF file; allowed: little-endian")
    return reader


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """What the package gguf raises for a damaged file, as one line."""
    try:
        yield
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ExportError(f"{path} is damaged or no GGUF file ({str(error).splitlines()[0]}): get it again") from None


def _value(field: ReaderField) -> GGUFValue:
    of_array = field.types[0] == GGUFValueType.ARRAY
    return GGUFValue(field.contents(), field.types[0], field.types[-1] if of_array else None)


def _weight(tensor: ReaderTensor) -> Weight:
    kind = Kind(tensor.tensor_type)
    return Weight(kind, kind, tuple(reversed(tensor.shape.tolist())), lambda: tensor.data.view(np.uint8))
