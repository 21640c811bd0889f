"""pygpt: build, train, fine-tune and run a GPT on your own machine, on native kernels."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> its room, imported when first asked for, so that `import pygpt` stays light.
_PUBLIC = {
    "GPT": "model",
    "GPTConfig": "config",
    "PygptError": "errors",
    "Run": "training",
    "Tokenizer": "tokenizer",
    "TrainConfig": "config",
    "evaluate": "evaluation",
    "pretrain": "training",
    "generate": "generation",
    "stream": "generation",
}
_ROOMS = ("data", "finetune", "ops", "reference")

__all__ = ["__version__", *_PUBLIC, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"pygpt.{_PUBLIC[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"pygpt.{name}")
    else:
        raise AttributeError(f"module 'pygpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
