"""The error class of models and checkpoints, and the conversion of library exceptions to it."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

LONGEST = 300


class ModelError(ValueError):
    """A model or checkpoint cannot be used; the message is one line."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line, truncated to `LONGEST` characters; its class name if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@contextmanager
def said_in_one_line(what: str) -> Iterator[None]:
    """Turn exceptions raised for a damaged or unknown checkpoint into a ModelError that begins with `what`."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, EOFError),
        *(IndexError, SafetensorError, StrictDataclassError, pickle.UnpicklingError, struct.error),
    ) as error:
        raise ModelError(f"{what}: {one_line(error)}") from error
