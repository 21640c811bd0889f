"""The tensor door to native code: every check, allocation and native call of an op stands here.

Backends: "native" is pygpt's own kernel, "torch" the same result from torch's ops, "reference" the
slow twin in `pygpt.reference`. "auto" takes native where a kernel for the tensor exists.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native

Impl = Literal["auto", "native", "torch", "reference"]

_backend: contextvars.ContextVar[Impl] = contextvars.ContextVar("pygpt_backend", default="auto")


@contextlib.contextmanager
def backend(impl: Impl) -> Iterator[None]:
    """Within the block every op whose `impl` is "auto" uses `impl`.

    >>> with backend("torch"):
    ...     pass
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    token = _backend.set(impl)
    try:
        yield
    finally:
        _backend.reset(token)


def _share_torch_threads() -> None:
    """Hand torch's thread pool to the native code, which has none of its own."""
    library = ctypes.CDLL(torch._C.__file__)

    def address(name: str) -> int:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0

    _native.set_torch_threads(address("torch_parallel_for"), address("torch_get_num_threads"))


_share_torch_threads()


# --- causal attention ---------------------------------------------------------------


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(q k^T * scale) v where query i sees keys j <= i + (S - T).

    q (B, T, H, D); k and v (B, S, H_kv, D) with H a multiple of H_kv; returns (B, T, H, D).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    t, s = q.shape[2], k.shape[2]
    mask = None
    if kv_lengths is not None:
        last = kv_lengths[:, None] - t + torch.arange(t, device=q.device)
        mask = (torch.arange(s, device=q.device) <= last[..., None])[:, None]
    elif s != t or document_ids is not None:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    if document_ids is not None and mask is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)
