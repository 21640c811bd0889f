"""The GPT: embeddings, pre-norm blocks, a final norm and a head; ids in, logits or a loss out.

Letters in comments: B sequences, T tokens, H heads, D channels per head, C = H D, V words.
"""

from __future__ import annotations

import math
import os
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygpt import ops, weights
from pygpt.config import GPTConfig
from pygpt.kv_cache import KVCache
from pygpt.tokenizer import Tokenizer


class Linear(nn.Linear):
    """nn.Linear through the faster of torch's and pygpt's products."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class MultiHeadAttention(nn.Module):
    """Causal self-attention; one projection gives q, k and v, stored as rows q | k | v."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.drop_rate = layer, config.n_heads, config.drop_rate
        self.qkv = Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out = Linear(config.emb_dim, config.emb_dim)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = ops.unbind_heads(self.qkv(x), self.n_heads)  # (B, T, H, D) each
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = ops.causal_attention(
            q,
            k,
            v,
            document_ids=document_ids,
            kv_lengths=None if cache is None else cache.kv_lengths,
            dropout_p=self.drop_rate if self.training else 0.0,
        )
        return self.out(out.flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between; the GELU of GPT-2 and the book is tanh's."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.emb_dim, 4 * config.emb_dim)
        self.down = Linear(4 * config.emb_dim, config.emb_dim)
        self.gelu = F.gelu if config.exact_gelu else ops.gelu

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        if self.gelu is ops.gelu and type(self.down) is Linear:  # LoRA's wants gelu's result
            return ops.gelu_linear(self.up(x), self.down.weight, self.down.bias)
        return self.down(self.gelu(self.up(x)))  # type: ignore[no-any-return]


class AddNorm(nn.LayerNorm):
    """The stream with a branch's result added, and the normed copy that the next branch reads."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if branch is None:
            return x, super().forward(x)
        return ops.add_norm(x, branch, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = AddNorm(config.emb_dim)
        self.att = MultiHeadAttention(config, layer)
        self.norm2 = AddNorm(config.emb_dim)
        self.ff = FeedForward(config)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream and what is still to be added to it, (B, T, C) each, before and after."""
        x, normed = self.norm1(x, branch)
        x, normed = self.norm2(x, self.drop(self.att(normed, cache, document_ids)))
        return x, self.drop(self.ff(normed))


class GPT(nn.Module):
    """A decoder-only transformer as in GPT-2 and the book.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", section 2.3.

    >>> model = GPT(GPTConfig(vocab_size=50, context_length=8, emb_dim=16, n_heads=2, n_layers=1))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 50])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = AddNorm(config.emb_dim)
        self.out_head: nn.Linear | None = None
        if not config.tie_weights:
            self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if not self.tok_emb.weight.is_meta:
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's: normal, smaller where 2 n_layers branches add up in the residual stream."""
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("att.out", "ff.down"))
                module.weight.normal_(std=residual_std if residual else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; weights mapped as (in, out) become rows, as fused AdamW needs."""
        for p in self.parameters() if mode else ():
            p.data = p.data.contiguous()
        return super().train(mode)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (V, C): the token embedding's where the weights are tied."""
        return self.tok_emb.weight if self.out_head is None else self.out_head.weight

    def hidden(
        self, ids: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """The final-normed hidden states of `ids`: (B, T) int32 or int64 -> (B, T, C).

        With a `cache` the ids continue what it holds, and it is extended in place. With
        `document_ids`, (B, T) int32 and non-decreasing along T, tokens see their own document only
        and positions restart with each, so that packed documents give what each gives alone.
        Raises ValueError on an id outside the vocabulary (on a CUDA device the embedding's own
        assertion fires instead, since looking would wait for the device), or more than
        `context_length` tokens.
        """
        self._check(ids, cache, document_ids)
        return self._hidden(F.embedding(ids, self.tok_emb.weight), cache, document_ids)

    def _hidden(self, x: Tensor, cache: KVCache | None, document_ids: Tensor | None) -> Tensor:
        if cache is not None:
            positions = cache.advance(x.shape[1], x.device)
        else:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            if document_ids is not None:
                begins = document_ids.diff(prepend=document_ids[:, :1]) != 0
                positions = positions - (begins * positions).cummax(1).values
        x, branch = self.drop_emb(x + self.pos_emb(positions)), None
        for block in self.blocks:
            x, branch = block(x, branch, cache, document_ids)
        return self.final_norm(x, branch)[1]  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Next-token logits of every position: (B, T) -> (B, T, V). Arguments as in `hidden`."""
        return ops.linear(self.hidden(ids, cache), self.head_weight)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of `targets`, (B, T), where -100 is left out."""
        if targets.shape != ids.shape:
            raise ValueError(
                f"ids and targets must have equal shapes, "
                f"got {tuple(ids.shape)} and {tuple(targets.shape)}"
            )
        self._check(ids, None, document_ids)
        x, head = F.embedding(ids, self.tok_emb.weight), self.head_weight
        if self.config.tie_weights:
            x, head = ops.tied_embedding(ids, head)
        x = self._hidden(x, None, document_ids).flatten(0, 1)
        loss = ops.linear_cross_entropy(x, head, targets.flatten(), reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def _check(self, ids: Tensor, cache: KVCache | None, document_ids: Tensor | None) -> None:
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be (B, T) with at least one token, got {tuple(ids.shape)}")
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
        seen = 0 if cache is None else max(cache.lengths)
        if seen + ids.shape[1] > self.config.context_length:
            raise ValueError(
                f"{seen + ids.shape[1]} tokens exceed the context_length "
                f"{self.config.context_length}; give fewer tokens"
            )
        if cache is not None and len(cache.lengths) != ids.shape[0]:
            raise ValueError(f"ids have {ids.shape[0]} rows, the cache {len(cache.lengths)}")
        if document_ids is not None:
            if cache is not None:
                raise ValueError("document_ids and a cache cannot be used together")
            if document_ids.shape != ids.shape or document_ids.dtype != torch.int32:
                raise ValueError(
                    f"document_ids must be int32 of shape {tuple(ids.shape)}, "
                    f"got {document_ids.dtype} {tuple(document_ids.shape)}"
                )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"id {low if low < 0 else high} is outside the vocabulary of "
                    f"{self.config.vocab_size}; was the text encoded with this model's tokenizer?"
                )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> Self:
        """The model in a folder or safetensors file, or of a name on the Hugging Face hub.

        It comes in eval mode; `dtype` None keeps what the file holds. On the CPU the weights stay
        mapped from the file, which may be replaced or deleted, but not written into. Raises
        FileNotFoundError, or DataError that names the file and each tensor that is missing, left
        over, misshaped or not what was saved.
        """
        checkpoint = weights.load(source, revision=revision)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        model.load_state_dict(checkpoint.load(dtype, device), assign=True)
        return model.eval()

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None
    ) -> None:
        """Write a folder that `from_pretrained` and transformers' AutoModelForCausalLM open.

        With a tokenizer the folder holds tokenizer.json too, for AutoTokenizer.
        """
        weights.save(folder, self.config, self.state_dict(), tokenizer)

    @property
    def num_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context: int | None = None) -> int:
        """Forward FLOPs of one token, averaged over `context` positions (by default the longest).

        Two for each weight of a matrix, and causal attention's own; a training step costs three
        times as much.
        """
        context = self.config.context_length if context is None else context
        c, layers = self.config.emb_dim, self.config.n_layers
        matrices = layers * 12 * c * c + self.config.vocab_size * c
        attention = 2 * layers * c * (context + 1)  # q k^T and p v, over (context + 1) / 2 keys
        return 2 * matrices + attention

    def __repr__(self) -> str:
        c, weight = self.config, self.tok_emb.weight
        size = sum(p.numel() * p.element_size() for p in self.parameters())
        return (
            f"GPT({self.num_params:,} parameters: {c.n_layers} layers, {c.n_heads} heads, "
            f"width {c.emb_dim}, vocabulary {c.vocab_size:,}, context {c.context_length:,}; "
            f"{size / 1e6:,.1f} MB of {str(weight.dtype).removeprefix('torch.')} "
            f"on {weight.device}; {self.flops_per_token() / 1e6:,.1f} MFLOPs a token)"
        )
