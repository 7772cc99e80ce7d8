"""The error of models and checkpoints, and one line for what libraries raise over damaged ones."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


class ModelError(ValueError):
    """A model or checkpoint cannot be used; the message is one line that says what to do."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's text on one line, cut after `limit` characters; its class where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextmanager
def said_in_one_line(what: str) -> Iterator[None]:
    """Turn what loading a damaged or unknown checkpoint may raise into a ModelError that begins with `what`."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, EOFError),
        *(IndexError, SafetensorError, StrictDataclassError, pickle.UnpicklingError, struct.error),
    ) as error:
        raise ModelError(f"{what}: {one_line(error)}") from error
