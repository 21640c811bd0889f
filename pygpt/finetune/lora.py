"""Low-rank adaptation: the weights stay, and a product of two thin matrices is learned beside each.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pygpt.config import LoRAConfig
from pygpt.tokenizer import Tokenizer


class LoRALinear(nn.Module):
    """x W^T + b + alpha / rank * (x A^T) B^T where only A and B learn; B begins with zeros.

    A weight that is several matrices in one (q | k | v) has an A and a B for each.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig, parts: int = 1) -> None:
        super().__init__()
        self.linear, self.scale = linear, config.alpha / config.rank
        n_in, n_out = linear.in_features, linear.out_features // parts
        self.a = nn.Parameter(linear.weight.new_empty(parts, config.rank, n_in))
        self.b = nn.Parameter(linear.weight.new_zeros(parts, n_out, config.rank))
        nn.init.uniform_(self.a, -(n_in**-0.5), n_in**-0.5)  # as nn.Linear begins

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., out)
        thin = torch.einsum("...c,prc->...pr", x, self.a)
        added = torch.einsum("...pr,por->...po", thin, self.b).flatten(-2)
        return self.linear(x) + self.scale * added  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The matrix that W has become."""
        return self.linear.weight + self.scale * (self.b @ self.a).flatten(0, 1)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The linear layer with what was learned added to its weight."""
        self.linear.weight.copy_(self.weight)
        return self.linear


class LoRAModel(nn.Module):
    """`model`, changed in place: frozen, and with a `LoRALinear` for each layer that is targeted.

    Raises ValueError where a target names no linear layer.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.model = model
        model.requires_grad_(False)
        found = set()
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if name in config.targets and isinstance(layer, nn.Linear):
                    setattr(
                        parent, name, LoRALinear(layer, config, parts=3 if name == "qkv" else 1)
                    )
                    found.add(name)
        if missing := set(config.targets) - found:
            raise ValueError(f"no linear layer is named {', '.join(sorted(missing))}")

    @property
    def config(self) -> Any:
        """The shape of the model."""
        return self.model.config

    def forward(self, *args: Any) -> Tensor:
        return self.model(*args)  # type: ignore[no-any-return]

    def loss(self, *args: Any, **settings: Any) -> Tensor:
        """The model's own."""
        return self.model.loss(*args, **settings)  # type: ignore[operator, no-any-return]

    def merge(self) -> None:
        """Make the model an ordinary one again, with what was learned in its weights."""
        for parent in list(self.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, LoRALinear):
                    setattr(parent, name, layer.merge())

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Merge for good, then save the model; `training.fit` calls this at its end."""
        self.merge()
        self.model.save_pretrained(folder, tokenizer)  # type: ignore[operator]
