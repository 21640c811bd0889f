"""Every configuration: frozen dataclasses, invariants beside the fields. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args

T = TypeVar("T")
Precision = Literal["auto", "float32", "bfloat16"]

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
    """Number of tokens."""
    context_length: int = 1024
    """The most tokens that the model sees at once."""
    emb_dim: int = 768
    """Width: channels of every hidden state."""
    n_heads: int = 12
    """Attention heads; divides emb_dim."""
    n_layers: int = 12
    """Transformer blocks."""
    drop_rate: float = 0.1
    """Dropout while training; 0 for none."""
    qkv_bias: bool = False
    """Whether query, key and value projections have biases."""
    tie_weights: bool = False
    """Whether the output matrix is the token embedding."""
    exact_gelu: bool = False
    """GELU by erf, as nanoGPT trains, in place of GPT-2's tanh approximation."""
    init_std: float = 0.02
    """Standard deviation of fresh matrices. GPT-2's 0.02 suits a width of 768 and more; narrow
    networks learn sooner from about 1 / sqrt(emb_dim)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("qkv_bias", "tie_weights", "exact_gelu"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}; "
                f"choose n_heads so that every head has emb_dim / n_heads channels"
            )
        if not 0.0 <= self.drop_rate < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1), got {self.drop_rate!r}")
        if not 0.0 < self.init_std < float("inf"):
            raise ValueError(f"init_std must be a finite number above 0, got {self.init_std!r}")

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


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained; the same for pretraining and every kind of fine-tuning.

    The learning rate rises linearly over the warm-up to `lr` and falls along a cosine to `min_lr`
    at the last step.

    >>> TrainConfig(steps=200, lr=1e-3).learning_rate(200)
    0.0
    """

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 32
    """Samples per step."""
    micro_batch_size: int | None = None
    """Samples computed at a time; less memory, the same result. None: all at once."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int | None = None
    """Steps of rising learning rate. None: a twentieth of all."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices (not of biases and norms)."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.99
    """AdamW's second moment."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    eval_every: int = 250
    """Steps between evaluations; 0: only at the end."""
    eval_batches: int = 0
    """Batches of an evaluation; 0: all of the validation data."""
    sample_every: int = 0
    """Steps between samples; 0: none."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    dtype: Precision = "auto"
    """Of the computation; weights and optimiser stay float32. auto: bfloat16 where it is faster."""
    device: str = "auto"
    """auto (cuda, mps or cpu), or one of them."""
    seed: int = 0
    """Of the order of the samples and of dropout."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "micro_batch_size", "keep_checkpoints")
        counts = ("warmup_steps", "eval_every", "eval_batches", "sample_every", "checkpoint_every")
        for name in (*positive, *counts, "seed"):
            value, least = getattr(self, name), int(name in positive)
            if value is None and name in ("micro_batch_size", "warmup_steps"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("lr", "min_lr", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.dtype not in get_args(Precision):
            raise ValueError(f"dtype must be one of {get_args(Precision)}, got {self.dtype!r}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 1."""
        warmup = self.steps // 20 if self.warmup_steps is None else self.warmup_steps
        if step <= warmup:
            return self.lr * step / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from plain values; an unknown key is an error naming the nearest."""
        return _from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers learn a low-rank addition to their weights, scaled by alpha / rank.

    Layers by name: `qkv`, `out`, `up` and `down` are the blocks', `head` a classifier's (which
    learns as a whole where it is not named), `out_head` an untied output matrix.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv", "out", "up", "down")

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        if not 0.0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number above 0, got {self.alpha!r}")
        if not self.targets:
            raise ValueError("targets names no layer, so nothing would learn")


@dataclass(frozen=True)
class DemoConfig:
    """What `pygpt demo` does: how long, on which text, where.

    >>> DemoConfig(minutes=1).seed
    0
    """

    minutes: float = 3.0
    """How long it takes; every act scales with it."""
    text: tuple[str, ...] = ()
    """Text files of your own instead of the standard library's docstrings; no fine-tuning then."""
    out: str = "runs/demo"
    """The folder that everything is kept in."""
    steps: int | None = None
    """Steps of pretraining, instead of a probe that fits them to the time."""
    seed: int = 0
    """With the same steps and seed a run repeats itself."""
    device: str = "auto"
    """auto (cuda, mps or cpu), or one of them."""

    def __post_init__(self) -> None:
        if not 0.0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be a positive number, got {self.minutes!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be a positive integer, got {self.steps!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from plain values; an unknown key is an error naming the nearest."""
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
