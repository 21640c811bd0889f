"""Every configuration: frozen dataclasses, invariants beside the fields. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

T = TypeVar("T")

# The four GPT-2 sizes, by their published names.
GPT2_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "gpt2-medium": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT, under the book's seven keys.

    The defaults are the book's ``GPT_CONFIG_124M`` (163,009,536 parameters with its untied head);
    `GPTConfig.preset` gives the published GPT-2 models, which tie the head and use qkv biases.

    >>> GPTConfig(vocab_size=1024, context_length=128, emb_dim=128, n_heads=4, n_layers=4).head_dim
    32
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}; "
                f"choose n_heads so that every head has emb_dim / n_heads channels"
            )
        if not 0.0 <= self.drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {self.drop_rate!r}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.emb_dim // self.n_heads

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The shape of a published GPT-2 model, with `changes` made to it.

        >>> GPTConfig.preset("gpt2-medium").n_layers
        24
        """
        if name not in GPT2_SIZES:
            raise ValueError(f"no preset {name!r}; there are {', '.join(GPT2_SIZES)}")
        return cls(**{**GPT2_SIZES[name], "qkv_bias": True, "tie_weights": True, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from plain values; an unknown key is an error naming the nearest one."""
        return _from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def _from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise ValueError(f"{cls.__name__} has no key {key!r}{hint}")
    return cls(**values)
