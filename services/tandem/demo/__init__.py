"""The model that comes with Tandem: a small language model of Python code.

It needs no download and no accelerator, so that a first try, a test or a demonstration on a laptop can serve
something real. `python -m tandem.demo.train` makes it again from the standard library of the interpreter.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["MODEL_NAME", "examples_path", "model_path"]

MODEL_NAME = "tandem-demo"


def model_path() -> Path:
    """The folder of the built-in checkpoint, laid out as Hugging Face publishes them.

    The package is always installed as plain files (a wheel or an editable checkout), never run from a zip archive:
    the weights are memory-mapped.
    """
    return _packaged("model")


def examples_path() -> Path:
    """A JSON file of prompts with the token ids that greedy decoding of the built-in model must give."""
    return _packaged("examples.json")


def _packaged(name: str) -> Path:
    return Path(str(resources.files(__name__).joinpath(name)))
