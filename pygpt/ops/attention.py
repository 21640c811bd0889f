"""Causal attention: native on CPU and CUDA, forward and backward, or torch's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native, reference
from pygpt.ops.dispatch import Impl, auto_takes, resolve, takes_native, why_no_kernel
from pygpt.ops.native import DTYPES, address, empty, launch, register, rows, watched
from pygpt.ops.product import autocast_dtype


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    document_ids: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(q k^T * scale) v where query i sees keys j <= i + (S - T).

    q (B, T, H, D); k and v (B, S, H_kv, D) with S >= T and H a multiple of H_kv; returns
    (B, T, H, D). Any strides pass without a copy while the last dimension is contiguous.

    `scale` is 1 / sqrt(D) by default. Of the keys before it a query sees the last `window`, itself
    included, and those of its own document: `document_ids`, (B, S) int32, never decreases along a
    row. With `kv_lengths`, (B,) int32, row b has that many keys and its last query is the last of
    them. A query that sees no key gives zeros.

    `dropout_p` drops weights by Philox words keyed with `seed`, a one-element int64 tensor drawn
    from torch's generator by default; the "torch" backend draws for itself.

    Native for float32, bfloat16 and float16 and D a multiple of 8, up to 256 on the CPU and 128 on
    CUDA; it can be differentiated once.

    >>> q = k = v = torch.eye(8).reshape(1, 8, 1, 8)
    >>> causal_attention(q, k, v)[0, 1, 0, :3]
    tensor([0.4125, 0.5875, 0.0000])
    """
    if (dtype := autocast_dtype(q)) != q.dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if takes_native(impl) and _native.attention_fits(
        q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed
    ):
        if dropout_p and seed is None:
            seed = _draw_seed(q)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        options = (scale, window or 0, document_ids, kv_lengths, dropout_p, seed)
        if learns:
            return _attention.direct(q, k, v, *options)[0]  # type: ignore[no-any-return]
        return _native.attention_forward(q, k, v, *options, None)
    scale = _check(q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed)
    why_not = why_no_kernel(q.device, q.dtype, q.shape[-1])
    chosen = resolve(
        impl,
        native=not why_not,
        auto=auto_takes("causal_attention", q.device, q.dtype),
        tensors=f"causal attention on {why_not}",
    )
    if dropout_p and seed is None and chosen != "torch":
        seed = _draw_seed(q)
    if chosen == "native":
        vectors = (
            None if x is None else x.to(q.device).contiguous()
            for x in (document_ids, kv_lengths, seed)
        )
        document_ids, kv_lengths, seed = vectors
        options = (scale, window or 0, document_ids, kv_lengths, dropout_p, seed)
        return _attention(rows(q), rows(k), rows(v), *options)[0]  # type: ignore[no-any-return]
    if chosen == "torch":
        return _torch(q, k, v, scale, window, document_ids, kv_lengths, dropout_p)
    return reference.causal_attention(
        q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed
    )


def _draw_seed(q: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> float:
    """Raise ValueError where the arguments do not fit together; returns the scale."""
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
        raise ValueError(
            "q must be (B, T, H, D), k and v (B, S, H_kv, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    (b, t, h, d), (_, s, h_kv, _) = q.shape, k.shape
    if k.shape[0] != b or k.shape[3] != d or d == 0 or h_kv == 0 or h % h_kv or s < t:
        raise ValueError(
            "q (B, T, H, D) and k (B, S, H_kv, D) must agree in B and D > 0, with S >= T and H "
            f"a multiple of H_kv, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        raise ValueError(
            f"q, k and v must have one dtype and device, got {q.dtype} {k.dtype} {v.dtype} on "
            f"{q.device} {k.device} {v.device}"
        )
    scale = d**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if document_ids is None and kv_lengths is None and seed is None:
        return scale
    for name, x, shape, dtype in (
        ("document_ids", document_ids, (b, s), torch.int32),
        ("kv_lengths", kv_lengths, (b,), torch.int32),
        ("seed", seed, (1,), torch.int64),
    ):
        if x is not None and (x.shape != shape or x.dtype != dtype):
            raise ValueError(
                f"{name} must be {dtype} of shape {shape}, got {x.dtype} {tuple(x.shape)}"
            )
    return scale


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """The same from torch's scaled_dot_product_attention."""
    t, s = q.shape[1], k.shape[1]
    seen = None
    masked = window is not None or document_ids is not None or kv_lengths is not None
    if masked or t not in (1, s):
        seen = reference.visible_keys(t, s, window, document_ids, kv_lengths, q.device)[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        dropout_p=dropout_p,
        is_causal=seen is None and t > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if seen is not None and kv_lengths is not None:
        out = out.masked_fill(~seen.any(-1).transpose(1, 2)[..., None], 0.0)
    return out


# Below, `options` are scale, window, document_ids, kv_lengths, dropout_p and seed.
_OPTIONS = (
    "float scale, int window, Tensor? document_ids, Tensor? kv_lengths, float dropout_p, "
    "Tensor? seed"
)


def _place(x: Tensor) -> tuple[int, int, int, int]:
    batch, row, head, _ = x.stride()
    return x.data_ptr(), batch, row, head


def _arguments(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[
    tuple[int, tuple[int, int, int, int, int, int], float, int, int, int, float, int],
    Tensor | None,
]:
    """What CUDA's forward and backward have in common, and the tensor made for it."""
    (b, t, h, d), (_, s, h_kv, _) = q.shape, k.shape
    starts = document_ids
    if document_ids is not None:  # as the position where each one's document starts
        starts = torch.searchsorted(document_ids, document_ids, out_int32=True)
    documents, lengths, seed_place = (address(x) for x in (starts, kv_lengths, seed))
    sizes = (b, t, s, h, h_kv, d)
    common = (DTYPES[q.dtype], sizes, scale, window, documents, lengths, dropout_p, seed_place)
    return common, starts


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return empty(q, q.shape), empty(q, (b, h, t), torch.float32)


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    lse = empty(q, (b, h, t), torch.float32)
    return _native.attention_forward(q, k, v, *(*options, lse)), lse


def _forward_cuda(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q)
    if not out.numel():
        return out, lse
    q, k, v = (_in_chunks(x) for x in (q, k, v))
    common, _kept = _arguments(q, k, *options)
    where, tensors = launch(q), [_place(x) for x in (q, k, v, out)]
    if splits := _native.cuda_attention_splits(where, common):
        workspace = lse.new_empty(splits * lse.numel() * (q.shape[3] + 2))
        _native.cuda_attention_decode(
            where, common, tensors, lse.data_ptr(), splits, workspace.data_ptr()
        )
    else:
        _native.cuda_attention_forward(where, common, tensors, lse.data_ptr())
    return out, lse


def _in_chunks(x: Tensor) -> Tensor:
    """x, or a copy, such that every row of channels starts at a multiple of 16 bytes."""
    strides = (stride * x.element_size() for stride in x.stride()[:3])
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    return x if aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(q, q.shape), empty(k, k.shape), empty(v, v.shape)


def _backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return _native.attention_backward(rows(dout), q, k, v, out, lse, *options)


def _backward_cuda(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward_fake(dout, q, k, v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    dout, q, k, v, out = (_in_chunks(x) for x in (dout, q, k, v, out))
    common, _kept = _arguments(q, k, *options)
    delta = torch.empty_like(lse)
    _native.cuda_attention_backward(
        launch(q),
        common,
        [_place(x) for x in (q, k, v, out)],
        lse.data_ptr(),
        [_place(x) for x in (dout, dq, dk, dv)],
        delta.data_ptr(),
    )
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.window, document_ids, kv_lengths, ctx.dropout_p, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, document_ids, kv_lengths, seed)


def _backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 9
    q, k, v, out, lse, document_ids, kv_lengths, seed = ctx.saved_tensors
    options = (ctx.scale, ctx.window, document_ids, kv_lengths, ctx.dropout_p, seed)
    seen = torch.is_grad_enabled() or watched() or not _native.all_plain(dout, q, k, v)
    backward = _attention_backward if seen else _backward_cpu  # a twentieth sooner
    dq, dk, dv = backward(dout, q, k, v, out, lse, *options)
    return dq, dk, dv, None, None, None, None, None, None


def _twice(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "causal_attention can be differentiated once; for second derivatives use impl='reference'"
    )


_attention = register(
    f"causal_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward_fake,
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    save=_save,
    backward=_backward,
)
_attention_backward = register(
    "causal_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    backward=_twice,
)
