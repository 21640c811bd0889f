"""The tensor door to native code: every check, allocation and native call of an op stands here.

Backends: "native" is pygpt's own kernel, "torch" the same result from torch's ops, "reference" the
slow twin in `pygpt.reference`. "auto" takes native where a kernel for the tensor exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native, reference

Impl = Literal["auto", "native", "torch", "reference"]

_backend: Impl = "auto"  # a plain global, which torch.compile can trace and guard


@contextlib.contextmanager
def backend(impl: Impl) -> Iterator[None]:
    """Within the block every op whose `impl` is "auto" uses `impl`, in every thread.

    >>> with backend("torch"):
    ...     pass
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    global _backend
    outer, _backend = _backend, impl
    try:
        yield
    finally:
        _backend = outer


def _share_torch_threads() -> None:
    """Hand torch's thread pool to the native code, which has none of its own."""
    library = ctypes.CDLL(torch._C.__file__)

    def address(name: str) -> int:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0

    _native.set_torch_threads(address("torch_parallel_for"), address("torch_get_num_threads"))


_share_torch_threads()


def native_info() -> dict[str, Any]:
    """What the native module is: its file, instruction sets (in use, available) and CUDA state."""
    return {
        "file": _native.__file__,
        "isa": _native.isa(),
        "available_isas": _native.available_isas(),
        "cuda": _native.cuda_info(),
    }


_library = torch.library.Library("pygpt", "DEF")  # type: ignore[no-untyped-call]

# The dtypes of csrc/cpu/kernels.h.
_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# Where "auto" takes a CUDA kernel: (op, compute capability) -> the date and device on which it was
# measured right and not slower than what torch chooses there.
_MEASURED: dict[tuple[str, tuple[int, int]], str] = {}


@functools.cache
def _cuda_info() -> dict[str, Any]:
    return _native.cuda_info()


# torch.compile asks these two while it traces and takes the answers as they are.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_problem() -> str:
    """Why this build's CUDA kernels cannot run here, or nothing."""
    return str(_cuda_info()["why_unusable"])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _when_measured(op: str, device: torch.device) -> str:
    """The entry of _MEASURED for a GPU, or nothing."""
    return _MEASURED.get((op, torch.cuda.get_device_capability(device)), "")


def _auto_takes(op: str, device: torch.device) -> bool:
    """Whether "auto" takes the op's native kernel where there is one."""
    return device.type != "cuda" or bool(_when_measured(op, device))


def _why_no_kernel(device: torch.device) -> str:
    """What keeps native kernels from a device's tensors, or nothing."""
    if device.type == "cuda":
        return _cuda_problem() and f"CUDA tensors ({_cuda_problem()})"
    return "" if device.type == "cpu" else f"{device.type} tensors"


def _launch(x: Tensor) -> tuple[int, int]:
    """Device and stream for a CUDA kernel."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def _resolve(
    impl: Impl, *, native: bool, auto: bool = True, tensors: str = "these tensors"
) -> Impl:
    """The backend of a call: `native` says whether a kernel exists for its tensors, `auto` whether
    "auto" takes it."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "auto":
        impl = _backend
    if impl == "auto":
        return "native" if native and auto else "torch"
    if impl == "native" and not native:
        raise ValueError(f"impl='native' has no kernel for {tensors}; use impl='auto'")
    return impl


def chosen_backend(
    op: str, device: torch.device | str, dtype: torch.dtype, head_dim: int | None = None
) -> tuple[str, str]:
    """The backend that `impl="auto"` takes for an op now, and why; for headers and `doctor`.

    `op` is the name of a function here; `head_dim` matters to "causal_attention".

    >>> chosen_backend("causal_attention", "cpu", torch.float64, 64)
    ('torch', 'no native kernel for torch.float64')
    """
    device = torch.device(device)
    if op == "causal_attention":
        why_not = _why_not_native_attention(device, dtype, 64 if head_dim is None else head_dim)
    elif op in ("sample", "cross_entropy", "linear_cross_entropy"):
        why_not = f"{dtype}" if dtype not in _NATIVE_DTYPES else _why_no_kernel(device)
    else:
        raise ValueError(f"op must name an op of pygpt.ops, got {op!r}")
    if _backend != "auto":
        return _backend, "asked for by ops.backend"
    if why_not:
        return "torch", f"no native kernel for {why_not}"
    if not _auto_takes(op, device):
        return "torch", "the CUDA kernel has not been measured on this kind of GPU"
    if device.type == "cuda":
        return "native", f"measured {_when_measured(op, device)}"
    return "native", f"{_native.isa()} kernels"


# --- causal attention ---------------------------------------------------------------


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
    CUDA. It can be differentiated once.

    >>> q = k = v = torch.eye(8).reshape(1, 8, 1, 8)
    >>> causal_attention(q, k, v)[0, 1, 0, :3]
    tensor([0.4126, 0.5874, 0.0000])
    """
    scale = _check_attention(q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    why_not = _why_not_native_attention(q.device, q.dtype, q.shape[-1])
    chosen = _resolve(
        impl,
        native=not why_not,
        auto=_auto_takes("causal_attention", q.device),
        tensors=f"causal attention on {why_not}",
    )
    if dropout_p and seed is None and chosen != "torch":
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if chosen == "native":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out: Tensor = torch.ops.pygpt.causal_attention(
            q, k, v, scale, window or 0, document_ids, kv_lengths, dropout_p, seed
        )[0]
        return out
    if chosen == "torch":
        return _attention_torch(q, k, v, scale, window, document_ids, kv_lengths, dropout_p)
    return reference.causal_attention(
        q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed
    )


def _why_not_native_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What the native kernel does not cover, or nothing."""
    if why_not := _why_no_kernel(device):
        return why_not
    if dtype not in _NATIVE_DTYPES:
        return f"{dtype}"
    most = 128 if device.type == "cuda" else 256
    if head_dim % 8 or not 0 < head_dim <= most:
        return f"head dimension {head_dim}, which is not a multiple of 8 up to {most}"
    return ""


def _check_attention(
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
    if k.shape[0] != b or k.shape[3] != d or h_kv == 0 or h % h_kv or s < t:
        raise ValueError(
            "q (B, T, H, D) and k (B, S, H_kv, D) must agree in B and D, with S >= T and H a "
            f"multiple of H_kv, got {tuple(q.shape)} and {tuple(k.shape)}"
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


def _attention_torch(
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
    if s != t or window is not None or document_ids is not None or kv_lengths is not None:
        seen = reference.visible_keys(t, s, window, document_ids, kv_lengths, q.device)[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        dropout_p=dropout_p,
        is_causal=seen is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if seen is not None and kv_lengths is not None:
        out = out.masked_fill(~seen.any(-1).transpose(1, 2)[..., None], 0.0)
    return out


_library.define(  # type: ignore[no-untyped-call]
    "causal_attention(Tensor q, Tensor k, Tensor v, float scale, int window, "
    "Tensor? document_ids, Tensor? kv_lengths, float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "causal_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, int window, Tensor? document_ids, Tensor? kv_lengths, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor, Tensor)"
)


def _place(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _attention_arguments(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[int, tuple[int, int, int, int, int, int], float, int, int, int, float, int]:
    """What forward and backward have in common."""
    (b, t, h, d), (_, s, h_kv, _) = q.shape, k.shape
    return (
        _NATIVE_DTYPES[q.dtype],
        (b, t, s, h, h_kv, d),
        scale,
        window,
        0 if document_ids is None else document_ids.data_ptr(),
        0 if kv_lengths is None else kv_lengths.data_ptr(),
        dropout_p,
        0 if seed is None else seed.data_ptr(),
    )


@torch.library.impl(_library, "causal_attention", "CPU")
def _attention_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed)
    document_ids = None if document_ids is None else document_ids.contiguous()
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    common = _attention_arguments(q, k, scale, window, document_ids, kv_lengths, dropout_p, seed)
    if out.numel():
        _native.attention_forward(
            *common, _place(q), _place(k), _place(v), _place(out), lse.data_ptr()
        )
    return out, lse


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "pygpt::causal_attention", lib=_library
)
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, t, h, d = q.shape
    return q.new_empty((b, t, h, d)), q.new_empty((b, h, t), dtype=torch.float32)


@torch.library.impl(_library, "causal_attention_backward", "CPU")
def _attention_backward_native(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    dout, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, out))
    document_ids = None if document_ids is None else document_ids.contiguous()
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    common = _attention_arguments(q, k, scale, window, document_ids, kv_lengths, dropout_p, seed)
    tensors = (q, k, v, out, dout, dq, dk, dv)
    _native.attention_backward(*common, [_place(x) for x in tensors], lse.contiguous().data_ptr())
    return dq, dk, dv


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "pygpt::causal_attention_backward", lib=_library
)
def _attention_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.window, document_ids, kv_lengths, ctx.dropout_p, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, document_ids, kv_lengths, seed)


def _attention_backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 9
    q, k, v, out, lse, document_ids, kv_lengths, seed = ctx.saved_tensors
    gradients = torch.ops.pygpt.causal_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        ctx.scale,
        ctx.window,
        document_ids,
        kv_lengths,
        ctx.dropout_p,
        seed,
    )
    return (*gradients, None, None, None, None, None, None)


def _attention_twice(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "causal_attention can be differentiated once; for second derivatives use impl='reference'"
    )


def _in_chunks(x: Tensor) -> Tensor:
    """x, or a copy, such that every row of channels starts at a multiple of 16 bytes."""
    strides = (stride * x.element_size() for stride in x.stride()[:3])
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    return x if aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def _cuda_attention_arguments(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """What forward and backward have in common, and the tensors it points to."""
    if document_ids is not None:  # as the position where each position's document starts
        ids = document_ids.contiguous()
        document_ids = torch.searchsorted(ids, ids, out_int32=True)
    kept = [
        None if x is None else x.to(q.device).contiguous() for x in (document_ids, kv_lengths, seed)
    ]
    return _attention_arguments(q, k, scale, window, kept[0], kept[1], dropout_p, kept[2]), kept


@torch.library.impl(_library, "causal_attention", "CUDA")
def _attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, k, v, scale, window, *rest)
    if not out.numel():
        return out, lse
    q, k, v = (_in_chunks(x) for x in (q, k, v))
    common, _kept = _cuda_attention_arguments(q, k, scale, window, *rest)
    launch, tensors = _launch(q), [_place(x) for x in (q, k, v, out)]
    if splits := _native.cuda_attention_splits(launch, common):
        workspace = lse.new_empty(splits * lse.numel() * (q.shape[3] + 2))
        _native.cuda_attention_decode(
            launch, common, tensors, lse.data_ptr(), splits, workspace.data_ptr()
        )
    else:
        _native.cuda_attention_forward(launch, common, tensors, lse.data_ptr())
    return out, lse


@torch.library.impl(_library, "causal_attention_backward", "CUDA")
def _attention_backward_cuda(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    dout, q, k, v, out = (_in_chunks(x) for x in (dout, q, k, v, out))
    common, _kept = _cuda_attention_arguments(q, k, scale, window, *rest)
    delta = torch.empty_like(lse)
    _native.cuda_attention_backward(
        _launch(q),
        common,
        [_place(x) for x in (q, k, v, out)],
        lse.data_ptr(),
        [_place(x) for x in (dout, dq, dk, dv)],
        delta.data_ptr(),
    )
    return dq, dk, dv


torch.library.register_autograd(
    "pygpt::causal_attention", _attention_backward, setup_context=_attention_setup, lib=_library
)
torch.library.register_autograd("pygpt::causal_attention_backward", _attention_twice, lib=_library)


# --- sampling -----------------------------------------------------------------------


class Sampled(NamedTuple):
    """Tokens with what the model alone (before bias, penalties and temperature) thought of them."""

    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) float32, of the tokens
    top_tokens: Tensor  # (B, n_logprobs) int64, most likely first
    top_logprobs: Tensor  # (B, n_logprobs) float32


# In the order of csrc/cpu/kernels.h's SampleParameters.
_SAMPLE_RANGES = {
    "temperature": (0.0, 3e38),
    "top_k": (0, 2**31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-30, 1e30),
    "presence_penalty": (-1e30, 1e30),
    "frequency_penalty": (-1e30, 1e30),
}


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    logit_bias: Tensor | None = None,
    history: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    n_logprobs: int = 0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    impl: Impl = "auto",
) -> Any:
    """Draw one token per row of logits (B, V), float32, bfloat16 or float16; returns (B,) int64.

    Each parameter is a number or a (B,) tensor. In order: `logit_bias`, (V,) or (B, V), is added;
    tokens in `history`, (B, L) int64 where negative entries are padding, have positive logits
    divided and others multiplied by `repetition_penalty`, then lose `presence_penalty` plus
    `frequency_penalty` times their count; division by `temperature` (0 takes the greatest logit);
    the `top_k` greatest stay (0: all); of these the fewest whose probability reaches `top_p`; of
    these all at least `min_p` times as likely as the likeliest. Ties go to the lowest index.

    `uniforms`, (B,) in [0, 1), by default drawn from `generator`, decides by inverse transform in
    index order. With `n_logprobs` the result is a `Sampled`. A row with NaN, +inf or no finite
    logit is a ValueError on the CPU and token -1 on a GPU.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0.0)
    tensor([1])
    """
    if logits.dim() != 2 or not 0 < logits.shape[1] <= 2**22:
        raise ValueError(
            f"logits must be (B, V) with 1 <= V <= {2**22}, got shape {tuple(logits.shape)}"
        )
    if logits.dtype not in _NATIVE_DTYPES:
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    rows, vocab = logits.shape
    on_cpu = logits.device.type == "cpu"
    parameters = _sample_parameters(
        logits,
        (
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
        ),
    )
    if uniforms is None:
        uniforms = torch.rand(rows, dtype=torch.float64, device=logits.device, generator=generator)
    elif uniforms.shape != (rows,):
        raise ValueError(f"uniforms must be of shape ({rows},), got {tuple(uniforms.shape)}")
    uniforms = uniforms.to(torch.float64)
    if logit_bias is not None:
        if logit_bias.shape not in ((vocab,), (rows, vocab)):
            raise ValueError(
                f"logit_bias must be of shape ({vocab},) or ({rows}, {vocab}), "
                f"got {tuple(logit_bias.shape)}"
            )
        logit_bias = logit_bias.to(logits.device, torch.float32).expand(rows, vocab)
    if history is not None:
        if history.dim() != 2 or history.shape[0] != rows or history.is_floating_point():
            raise ValueError(
                f"history must be integers of shape ({rows}, L), got {history.dtype} "
                f"{tuple(history.shape)}"
            )
        history = history.to(logits.device, torch.int64)
        looked_at = on_cpu and history.numel() > 0 and not torch.compiler.is_compiling()
        if looked_at and int(history.max()) >= vocab:
            raise ValueError(
                f"history holds token {int(history.max())}, outside a vocabulary of {vocab}"
            )
    inputs = (logits.detach(), uniforms, parameters, logit_bias, history)
    native = not _why_no_kernel(logits.device)
    match _resolve(impl, native=native, auto=_auto_takes("sample", logits.device)):
        case "native":
            tokens = torch.ops.pygpt.sample(*inputs)
        case "torch":
            tokens = _sample_torch(*inputs)
            if on_cpu and bool((tokens < 0).any()):
                raise ValueError(
                    f"row {int((tokens < 0).long().argmax())} of logits has NaN, +inf or no "
                    f"finite value; look at the model that made it"
                )
        case _:
            tokens = reference.sample(*inputs)
    if not n_logprobs:
        return tokens
    logprobs = logits.detach().float().log_softmax(1)
    top = logprobs.topk(min(n_logprobs, vocab))
    chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    return Sampled(tokens, chosen, top.indices, top.values)


def _sample_parameters(logits: Tensor, values: tuple[float | Tensor, ...]) -> Tensor:
    """The parameters as float64: (1, 7), or (B, 7) where any of them is a tensor."""
    rows = logits.shape[0]
    for (name, (low, high)), value in zip(_SAMPLE_RANGES.items(), values, strict=True):
        if isinstance(value, Tensor):
            if value.shape not in ((), (rows,)):
                raise ValueError(
                    f"{name} must be a number or of shape ({rows},), got {tuple(value.shape)}"
                )
            looked_at = value.device.type == "cpu" and not torch.compiler.is_compiling()
            fine = not looked_at or bool(((value >= low) & (value <= high)).all())
        else:
            fine = low <= value <= high
        if not fine:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor([values], dtype=torch.float64, device=logits.device)
    columns = [
        torch.as_tensor(value, dtype=torch.float64, device=logits.device).expand(rows)
        for value in values
    ]
    return torch.stack(columns, 1)


_library.define(  # type: ignore[no-untyped-call]
    "sample(Tensor logits, Tensor uniforms, Tensor parameters, Tensor? logit_bias, "
    "Tensor? history) -> Tensor"
)


@torch.library.impl(_library, "sample", "CPU")
@torch.library.impl(_library, "sample", "CUDA")
def _sample_native(
    logits: Tensor,
    uniforms: Tensor,
    parameters: Tensor,
    logit_bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if logit_bias is not None and logit_bias.stride(1) != 1:
        logit_bias = logit_bias.contiguous()
    uniforms, parameters = uniforms.contiguous(), parameters.contiguous()
    history = None if history is None else history.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    arguments = (
        logits.data_ptr(),
        _NATIVE_DTYPES[logits.dtype],
        rows,
        vocab,
        logits.stride(0),
        parameters.data_ptr(),
        int(parameters.shape[0] > 1),
        uniforms.data_ptr(),
        0 if logit_bias is None else logit_bias.data_ptr(),
        0 if logit_bias is None else logit_bias.stride(0),
        0 if history is None else history.data_ptr(),
        0 if history is None else history.shape[1],
        tokens.data_ptr(),
    )
    if not logits.is_cuda:
        _native.sample(*arguments)
    elif rows:
        keys = torch.empty((rows, vocab), dtype=torch.int32, device=logits.device)
        _native.cuda_sample(_launch(logits), *arguments, keys.data_ptr())
    return tokens


@torch.library.register_fake("pygpt::sample", lib=_library)  # type: ignore[untyped-decorator]
def _sample_fake(
    logits: Tensor,
    uniforms: Tensor,
    parameters: Tensor,
    logit_bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _sample_torch(
    logits: Tensor,
    uniforms: Tensor,
    parameters: Tensor,
    logit_bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    """The same tokens from torch's ops, by sorting; never waits for the device."""
    rows, vocab = logits.shape
    temperature, top_k, top_p, min_p, *penalties = parameters.expand(rows, -1)[..., None].unbind(1)
    z = logits.float()
    if logit_bias is not None:
        z = z + logit_bias
    if history is not None:
        repetition, presence, frequency = (x.float() for x in penalties)
        counts = z.new_zeros(rows, vocab + 1)
        counts.scatter_add_(1, history.where(history >= 0, vocab), z.new_ones(history.shape))
        counts = counts[:, :vocab]
        penalised = torch.where(z > 0, z / repetition, z * repetition)
        z = torch.where(counts > 0, penalised - (presence + frequency * counts), z)
    ranked, order = torch.sort(z + 0.0, dim=1, descending=True, stable=True)
    greatest = ranked[:, :1]
    bad = ~(z.amax(1).isfinite())  # amax gives NaN where there is one
    # The integer weights, operation by operation those of csrc/cpu/sample.cpp.
    scale = torch.full_like(greatest, reference.LOG2_E) / temperature.float()
    u = (greatest - ranked) * scale.clamp(max=torch.finfo(torch.float32).max)
    u = torch.where(u < 48.0, u, 48.0)
    whole = u.to(torch.int64)
    f = u - whole.float()
    p = torch.full_like(f, reference.EXP2_COEFFICIENTS[0])
    for coefficient in reference.EXP2_COEFFICIENTS[1:]:
        p = p * f
        p = p + coefficient
    weights = ((p * 2.0**24).to(torch.int64) << 16) >> whole
    rank = torch.arange(vocab, device=z.device)
    weights = torch.where((top_k < 1) | (rank < top_k.floor()), weights, 0)
    running = weights.cumsum(1)
    need = (top_p * running[:, -1:].double()).ceil().to(torch.int64).clamp(min=1)
    survives = (running - weights < need) & (weights >= (min_p * 2.0**40).ceil().to(torch.int64))
    weights = torch.where(survives, weights, 0)
    running = torch.zeros_like(weights).scatter_(1, order, weights).cumsum(1)
    total = running[:, -1:]
    rest = (uniforms[:, None] * total.double()).to(torch.int64).clamp(min=0)
    tokens = (running <= torch.minimum(rest, total - 1)).sum(1)
    tokens = torch.where(temperature[:, 0] == 0, order[:, 0], tokens)
    return torch.where(bad, -1, tokens)


# --- linear -------------------------------------------------------------------------

# Below this many rows reading the weights dominates, and torch's product is as good.
_SGEMM_ROWS = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """x weight^T + bias: F.linear, through an own float32 product where that beats torch's.

    x (..., C), weight (V, C), bias (V,); returns (..., V). "auto" takes the native kernel on
    machines where a measurement of a few milliseconds, made once, says that it wins.

    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]))
    tensor([[3.]])
    """
    native = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.dim() > 0
        and x.shape[-1] == weight.shape[-1] > 0
    )
    if impl == "auto" and x.device.type != "cpu":
        return F.linear(x, weight, bias)  # in `backend("native")` too: there is no other
    wins = native and x.numel() >= _SGEMM_ROWS * x.shape[-1] and _sgemm_wins()
    match _resolve(impl, native=native, auto=wins):
        case "native":
            return torch.ops.pygpt.linear(x, weight, bias)  # type: ignore[no-any-return]
        case _:
            return F.linear(x, weight, bias)


def _sgemm(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """out = a b + bias, or out += a b, in float32."""
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    bias = None if bias is None else bias.contiguous()
    _native.sgemm(
        a.shape[0],
        b.shape[1],
        a.shape[1],
        a.data_ptr(),
        a.stride(0),
        a.stride(1),
        b.data_ptr(),
        b.stride(0),
        b.stride(1),
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
        accumulate,
    )
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _sgemm_wins() -> bool:
    """Whether the native product beats torch's on this machine."""
    return _measure_sgemm()


@functools.cache
def _measure_sgemm() -> bool:
    with torch.no_grad():
        a, b, out = torch.ones(384, 512), torch.ones(512, 512), torch.empty(384, 512)
        times: list[list[float]] = [[], []]
        for _ in range(7):
            for product, record in zip((_sgemm, _torch_product), times, strict=True):
                start = time.perf_counter()
                product(a, b.t(), out)
                record.append(time.perf_counter() - start)
    return min(times[0]) < 0.9 * min(times[1])


def _torch_product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    if bias is not None:
        return torch.addmm(bias, a, b, out=out)
    return out.addmm_(a, b, beta=float(accumulate))


def _product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """out = a b + bias, or out += a b without a bias, by whichever is faster."""
    faster = out.dtype == torch.float32 and not out.is_cuda and _sgemm_wins()
    return (_sgemm if faster else _torch_product)(a, b, out, bias, accumulate)


_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "linear", "CPU")
def _linear_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _sgemm(x.reshape(-1, x.shape[-1]), weight.t(), out.view(-1, weight.shape[0]), bias)
    return out


@torch.library.register_fake("pygpt::linear", lib=_library)  # type: ignore[untyped-decorator]
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.impl(_library, "linear_backward", "CPU")
def _linear_backward_native(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed ones among the gradients of x, weight and bias (else empty tensors)."""
    return _linear_gradients(_sgemm, grad, x, weight, needed)


def _linear_gradients(
    product: Callable[..., Tensor], grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dx, dweight, dbias = _linear_backward_fake(grad, x, weight, needed)
    # forward: out = x weight^T + bias
    if needed[0]:
        product(grads, weight, dx.view(rows.shape))
    if needed[1]:
        product(grads.t(), rows, dweight) if len(rows) else dweight.zero_()
    if needed[2]:
        torch.sum(grads, 0, out=dbias)
    return dx, dweight, dbias


@torch.library.register_fake("pygpt::linear_backward", lib=_library)  # type: ignore[untyped-decorator]
def _linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needed[0] else 0),
        weight.new_empty(weight.shape if needed[1] else 0),
        weight.new_empty(weight.shape[0] if needed[2] else 0),
    )


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _linear_grad(
    ctx: Any, grad: Tensor, backward: Callable[..., Any] = torch.ops.pygpt.linear_backward
) -> tuple[Tensor | None, ...]:
    needed = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
    gradients = backward(grad, *ctx.saved_tensors, needed)
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))


torch.library.register_autograd(
    "pygpt::linear", _linear_grad, setup_context=_linear_save, lib=_library
)


# --- GELU ---------------------------------------------------------------------------


def gelu(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """GPT-2's GELU: F.gelu(x, approximate="tanh"), at several times the speed on a CPU.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", section 2.

    >>> gelu(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8412])
    """
    if _resolve(impl, native=x.device.type == "cpu" and x.dtype in _NATIVE_DTYPES) == "native":
        return torch.ops.pygpt.gelu(x)  # type: ignore[no-any-return]
    return F.gelu(x, approximate="tanh")


_library.define("gelu(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("gelu_backward(Tensor grad, Tensor x) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "gelu", "CPU")
def _gelu_native(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.gelu(x.data_ptr(), _NATIVE_DTYPES[x.dtype], x.numel(), 0, out.data_ptr())
    return out


@torch.library.register_fake("pygpt::gelu", lib=_library)  # type: ignore[untyped-decorator]
def _gelu_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl(_library, "gelu_backward", "CPU")
def _gelu_backward_native(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    _native.gelu(x.data_ptr(), _NATIVE_DTYPES[x.dtype], x.numel(), grad.data_ptr(), out.data_ptr())
    return out


@torch.library.register_fake("pygpt::gelu_backward", lib=_library)  # type: ignore[untyped-decorator]
def _gelu_backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_grad(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.pygpt.gelu_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


torch.library.register_autograd("pygpt::gelu", _gelu_grad, setup_context=_gelu_save, lib=_library)


def gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """linear(gelu(x), weight, bias), which keeps x alone for its gradients.

    x (..., C), weight (V, C), bias (V,); returns (..., V). The backward pass computes gelu(x) once
    more: under a hundredth of a GPT's step, for a quarter less memory of its activations.

    >>> gelu_linear(torch.zeros(1, 2), torch.ones(3, 2))
    tensor([[0., 0., 0.]])
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    native = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in _NATIVE_DTYPES
    learns = torch.is_grad_enabled() and x.numel() >= _SGEMM_ROWS * x.shape[-1]
    if _resolve(impl, native=native, auto=learns) == "native":
        return torch.ops.pygpt.gelu_linear(x, weight, bias)  # type: ignore[no-any-return]
    return linear(gelu(x, impl=impl), weight, bias, impl=impl)


_library.define("gelu_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "gelu_linear_backward(Tensor grad, Tensor x, Tensor weight, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "gelu_linear", "CPU")
def _gelu_linear_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = _gelu_native(x).view(-1, x.shape[-1])
    _product(rows, weight.t(), out.view(-1, weight.shape[0]), bias)
    return out


torch.library.register_fake("pygpt::gelu_linear", _linear_fake, lib=_library)


@torch.library.impl(_library, "gelu_linear_backward", "CPU")
def _gelu_linear_backward_native(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed ones among the gradients of x, weight and bias (else empty tensors)."""
    hidden = _gelu_native(x)
    dhidden, dweight, dbias = _linear_gradients(_product, grad, hidden, weight, needed)
    # forward: hidden = gelu(x)
    return _gelu_backward_native(dhidden, x) if needed[0] else dhidden, dweight, dbias


torch.library.register_fake("pygpt::gelu_linear_backward", _linear_backward_fake, lib=_library)


def _gelu_linear_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _linear_grad(ctx, grad, torch.ops.pygpt.gelu_linear_backward)


torch.library.register_autograd(
    "pygpt::gelu_linear", _gelu_linear_grad, setup_context=_linear_save, lib=_library
)


# --- cross-entropy ------------------------------------------------------------------

Reduction = Literal["mean", "sum", "none"]

# Below this many logits there is nothing to save, and torch's calls cost less than ours.
_FEW_LOGITS = 1 << 18
# Bytes of logits that linear_cross_entropy holds at a time.
_LOGITS_BYTES, _CUDA_LOGITS_BYTES = 1 << 26, 1 << 29


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    inplace: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy in nats of logits (N, V) at targets (N,) int64, as a float32 scalar or (N,).

    Rows whose target is `ignore_index` count for nothing; any other target outside [0, V) is a
    ValueError. The mean is over the rows that count. With `inplace` the gradient is written over
    the logits, which saves their size in memory and leaves nothing readable in them.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor(1.3863)
    """
    _check_targets("logits", logits, targets, reduction)
    native = not _why_no_kernel(logits.device) and logits.dtype in _NATIVE_DTYPES
    match _resolve(impl, native=native, auto=_auto_takes("cross_entropy", logits.device)):
        case "native":
            needed = logits.requires_grad and torch.is_grad_enabled()
            if inplace and needed and reduction != "none" and not torch.compiler.is_compiling():
                return _InplaceCrossEntropy.apply(logits, targets, ignore_index, reduction)  # type: ignore[no-any-return,no-untyped-call]
            loss, _ = torch.ops.pygpt.cross_entropy(
                logits, targets, ignore_index, reduction, needed and reduction != "none"
            )
            return loss  # type: ignore[no-any-return]
        case "torch":
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
        case _:
            return reference.cross_entropy(logits, targets, ignore_index, reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """cross_entropy(x weight^T + bias, targets) without ever holding the (N, V) logits.

    x (N, C), weight (V, C), bias (V,), targets (N,) int64; returns a float32 scalar or (N,). Under
    autocast the products are made in its dtype, as in F.linear; softmax and loss stay float32, and
    the weight's gradient is added up in its own dtype. Where gradients are needed, "mean" and "sum"
    compute them together with the loss; "none" makes the logits a second time.

    >>> linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, 3]))
    tensor(1.3863)
    """
    _check_targets("x", x, targets, reduction)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be (V, C) with C = {x.shape[1]}, got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got shape {tuple(bias.shape)}")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype == x.dtype and not weight.dtype == x.dtype:
        raise ValueError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    native = not _why_no_kernel(x.device) and dtype in _NATIVE_DTYPES
    auto = _auto_takes("linear_cross_entropy", x.device)
    few = x.shape[0] * weight.shape[0] < _FEW_LOGITS
    if few and x.is_cpu and not torch.compiler.is_compiling():
        auto, targets = False, targets.contiguous()
        _native.count_targets(targets.data_ptr(), len(targets), len(weight), ignore_index)
    match _resolve(impl, native=native, auto=auto):
        case "native":
            needed = [
                torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
                for tensor in (x, weight, bias)
            ]
            return torch.ops.pygpt.linear_cross_entropy(  # type: ignore[no-any-return]
                x, weight, bias, targets, ignore_index, reduction, dtype, needed
            )[0]
        case "torch":
            return cross_entropy(
                F.linear(x, weight, bias),
                targets,
                ignore_index=ignore_index,
                reduction=reduction,
                impl="torch",
            )
        case _:
            logits = x.double() @ weight.double().t()
            logits = logits if bias is None else logits + bias.double()
            return reference.cross_entropy(logits, targets, ignore_index, reduction)


def _check_targets(name: str, x: Tensor, targets: Tensor, reduction: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(x.shape)}")
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape ({x.shape[0]},), got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")


def _rows_pass(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    losses: Tensor,
    gradient: Tensor | None = None,
    scale: float = 1.0,
    scales: Tensor | None = None,
) -> float:
    """The loss of each row, its gradient times `scale` and `scales`; returns the losses' sum."""
    return _native.cross_entropy(
        logits.data_ptr(),
        _NATIVE_DTYPES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        targets.data_ptr(),
        ignore_index,
        losses.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        0 if gradient is None else gradient.stride(0),
        scale,
        0 if scales is None else scales.data_ptr(),
    )


def _cross_entropy_pass(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, gradient: Tensor | None
) -> Tensor:
    """The reduced loss; its gradient goes to `gradient`, which may be the logits themselves."""
    if logits.is_cuda:
        return _cuda_cross_entropy_pass(logits, targets, ignore_index, reduction, gradient)
    targets, losses = targets.contiguous(), torch.empty(logits.shape[0])
    count = _native.count_targets(targets.data_ptr(), len(targets), logits.shape[1], ignore_index)
    divisor = count if reduction == "mean" else 1
    scale = 1.0 / max(divisor, 1)
    total = _rows_pass(logits, targets, ignore_index, losses, gradient, scale)
    return losses if reduction == "none" else _quotient(total, divisor)


def _cuda_cross_entropy_pass(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, gradient: Tensor | None
) -> Tensor:
    count, scale = _cuda_count(targets, ignore_index), None
    if gradient is not None:
        logits = gradient.copy_(logits)
        scale = 1.0 / count.clamp(min=1) if reduction == "mean" else torch.ones_like(count)
    losses = _cuda_rows_pass(logits, targets, ignore_index, scale)
    return losses if reduction == "none" else _cuda_reduce(losses, count, reduction)


def _cuda_count(targets: Tensor, ignore_index: int) -> Tensor:
    return (targets != ignore_index).sum(dtype=torch.float32)


def _cuda_rows_pass(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None
) -> Tensor:
    """The loss of each row; with `scale`, one or one per row, the logits become its gradient."""
    losses = torch.empty(logits.shape[0], device=logits.device)
    targets = targets.contiguous()
    scale = None if scale is None else scale.contiguous()
    if losses.numel():
        _native.cuda_cross_entropy(
            _launch(logits),
            logits.data_ptr(),
            _NATIVE_DTYPES[logits.dtype],
            logits.shape[0],
            logits.shape[1],
            logits.stride(0),
            targets.data_ptr(),
            ignore_index,
            losses.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if scale is None else scale.dim(),
        )
    return losses


def _cuda_reduce(losses: Tensor, count: Tensor, reduction: str) -> Tensor:
    return losses.sum() / count if reduction == "mean" else losses.sum()


def _quotient(total: float, divisor: int) -> Tensor:
    return torch.tensor(total / divisor if divisor else math.nan)


class _InplaceCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore: int, reduction: str) -> Tensor:
        gradient = logits.detach()
        gradient = gradient if gradient.stride(1) == 1 else gradient.contiguous()
        loss = _cross_entropy_pass(gradient, targets, ignore, reduction, gradient)
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return _times(gradient, grad), None, None, None


def _times(gradient: Tensor, grad: Tensor) -> Tensor:
    """gradient * grad, without a pass over it in the common case of a loss that is the root."""
    traced = type(grad) is not Tensor
    if not traced and grad.device.type == "cpu" and float(grad) == 1.0:
        return gradient
    return gradient * grad


_library.define(  # type: ignore[no-untyped-call]
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index, str reduction, "
    "bool with_gradient) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, int ignore_index) -> Tensor"
)


@torch.library.impl(_library, "cross_entropy", "CPU")
@torch.library.impl(_library, "cross_entropy", "CUDA")
def _cross_entropy_native(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss and, if wanted, its gradient (else an empty tensor)."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    gradient = logits.new_empty(logits.shape if with_gradient else (0, 0))
    wanted = gradient if with_gradient else None
    return _cross_entropy_pass(logits, targets, ignore_index, reduction, wanted), gradient


@torch.library.register_fake("pygpt::cross_entropy", lib=_library)  # type: ignore[untyped-decorator]
def _cross_entropy_fake(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, logits.new_empty(logits.shape if with_gradient else (0, 0))


@torch.library.impl(_library, "cross_entropy_backward", "CPU")
@torch.library.impl(_library, "cross_entropy_backward", "CUDA")
def _cross_entropy_backward_native(
    grad: Tensor, logits: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """The logits' gradient, for `grad` of each row's loss."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if logits.is_cuda:
        gradient = logits.clone()
        _cuda_rows_pass(gradient, targets, ignore_index, grad)
        return gradient
    gradient = logits.new_empty(logits.shape)
    losses = torch.empty(logits.shape[0])
    _rows_pass(logits, targets.contiguous(), ignore_index, losses, gradient, 1.0, grad.contiguous())
    return gradient


@torch.library.register_fake("pygpt::cross_entropy_backward", lib=_library)  # type: ignore[untyped-decorator]
def _cross_entropy_backward_fake(
    grad: Tensor, logits: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    return logits.new_empty(logits.shape)


def _cross_entropy_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index, ctx.reduction, _ = inputs
    ctx.set_materialize_grads(False)
    if ctx.reduction == "none":
        ctx.save_for_backward(logits, targets)
    else:
        ctx.save_for_backward(output[1])


def _cross_entropy_grad(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.reduction == "none":
        gradient = torch.ops.pygpt.cross_entropy_backward(
            grad, *ctx.saved_tensors, ctx.ignore_index
        )
    else:
        gradient = _times(ctx.saved_tensors[0], grad)
    return gradient, None, None, None, None


torch.library.register_autograd(
    "pygpt::cross_entropy", _cross_entropy_grad, setup_context=_cross_entropy_save, lib=_library
)

_library.define(  # type: ignore[no-untyped-call]
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, "
    "str reduction, ScalarType dtype, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor targets, int ignore_index, ScalarType dtype, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)"
)


def _linear_cross_entropy_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    wanted: list[bool],
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the wanted ones among the gradients of x, weight and bias."""
    (rows, width), vocab = x.shape, weight.shape[0]
    targets = targets.contiguous()
    if x.is_cuda:
        count = _cuda_count(targets, ignore_index)
        scale = x.new_ones(rows, dtype=torch.float32) if scales is None else scales
        scale = scale / count.clamp(min=1) if reduction == "mean" else scale
    else:
        divisor = _native.count_targets(targets.data_ptr(), rows, vocab, ignore_index)
        divisor = divisor if reduction == "mean" else 1
    dx = x.new_empty(x.shape if wanted[0] else (0,))
    dweight = weight.new_empty(weight.shape if wanted[1] else (0,))
    if not rows:
        dweight.zero_()
    dbias = weight.new_zeros(vocab if wanted[2] else 0)
    losses, total = torch.empty(rows, device=x.device), 0.0
    half_x, half_weight = x.to(dtype), weight.to(dtype)
    half_bias = None if bias is None else bias.to(dtype)
    most = _CUDA_LOGITS_BYTES if x.is_cuda else _LOGITS_BYTES
    chunks = -(-rows * vocab * half_x.element_size() // most) or 1
    chunk = max(1, -(-rows // chunks))
    buffer = half_x.new_empty(chunk, vocab)
    # 16-bit gradients of a float32 weight are added up in float32, in slices that a CPU can cache.
    slice_rows = vocab if x.is_cuda else max(1, (1 << 21) // width)
    part = half_x.new_empty(0 if dtype == weight.dtype else min(slice_rows, vocab), width)
    for start in range(0, rows, chunk):
        piece = slice(start, min(start + chunk, rows))
        logits, x_piece = buffer[: piece.stop - start], half_x[piece]
        _product(x_piece, half_weight.t(), logits, half_bias)
        if x.is_cuda:
            losses[piece] = _cuda_rows_pass(
                logits, targets[piece], ignore_index, scale[piece] if any(wanted) else None
            )
        else:
            total += _rows_pass(
                logits,
                targets[piece],
                ignore_index,
                losses[piece],
                logits if any(wanted) else None,
                1.0 / max(divisor, 1),
                None if scales is None else scales[piece],
            )
        if wanted[0] and dtype == x.dtype:
            _product(logits, half_weight, dx[piece])
        elif wanted[0]:
            dx[piece] = torch.mm(logits, half_weight)
        if wanted[1] and dtype == weight.dtype:
            _product(logits.t(), x_piece, dweight, accumulate=start > 0)
        elif wanted[1]:
            for low in range(0, vocab, slice_rows):
                words = slice(low, min(low + slice_rows, vocab))
                product = torch.mm(logits[:, words].t(), x_piece, out=part[: words.stop - low])
                dweight[words].add_(product) if start else dweight[words].copy_(product)
        if wanted[2]:
            dbias += logits.sum(0, dtype=dbias.dtype)
    if reduction == "none":
        loss = losses
    elif x.is_cuda:
        loss = _cuda_reduce(losses, count, reduction)
    else:
        loss = _quotient(total, divisor)
    return loss, dx, dweight, dbias


@torch.library.impl(_library, "linear_cross_entropy", "CPU")
@torch.library.impl(_library, "linear_cross_entropy", "CUDA")
def _linear_cross_entropy_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and, unless reduction is "none", its gradients where needed (else empty tensors)."""
    wanted = [reduction != "none" and need for need in needed]
    return _linear_cross_entropy_pass(
        x, weight, bias, targets, ignore_index, reduction, dtype, wanted
    )


@torch.library.register_fake("pygpt::linear_cross_entropy", lib=_library)  # type: ignore[untyped-decorator]
def _linear_cross_entropy_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = [reduction != "none" and need for need in needed]
    return (
        x.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32),
        x.new_empty(x.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


@torch.library.impl(_library, "linear_cross_entropy_backward", "CPU")
@torch.library.impl(_library, "linear_cross_entropy_backward", "CUDA")
def _linear_cross_entropy_backward_native(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, for `grad` of each row's loss."""
    return _linear_cross_entropy_pass(
        x, weight, bias, targets, ignore_index, "none", dtype, needed, grad.contiguous()
    )[1:]


@torch.library.register_fake("pygpt::linear_cross_entropy_backward", lib=_library)  # type: ignore[untyped-decorator]
def _linear_cross_entropy_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _linear_cross_entropy_fake(  # type: ignore[no-any-return]
        x, weight, bias, targets, ignore_index, "sum", dtype, needed
    )[1:]


def _linear_cross_entropy_save(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    x, weight, bias, targets, ctx.ignore_index, ctx.reduction, ctx.dtype, ctx.needed = inputs
    ctx.set_materialize_grads(False)
    if ctx.reduction == "none":
        ctx.save_for_backward(x, weight, bias, targets)
    else:
        ctx.save_for_backward(*output[1:])


def _linear_cross_entropy_grad(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    if ctx.reduction == "none":
        gradients = torch.ops.pygpt.linear_cross_entropy_backward(
            grad, *ctx.saved_tensors, ctx.ignore_index, ctx.dtype, ctx.needed
        )
    else:
        gradients = [
            _times(gradient, grad) if need else gradient
            for gradient, need in zip(ctx.saved_tensors, ctx.needed, strict=True)
        ]
    dx, dweight, dbias = (
        gradient if need else None for gradient, need in zip(gradients, ctx.needed, strict=True)
    )
    return dx, dweight, dbias, None, None, None, None, None


torch.library.register_autograd(
    "pygpt::linear_cross_entropy",
    _linear_cross_entropy_grad,
    setup_context=_linear_cross_entropy_save,
    lib=_library,
)
