"""Which backend a call takes: asked for, or chosen by what exists and what was measured."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch

from pygpt import _native
from pygpt.ops.native import DTYPES, transformed, watched

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


# Where "auto" takes a CUDA kernel: (op, dtype, compute capability) -> the date and device on which
# it was measured right and not slower than what torch chooses there. `make gpu-check` prints lines
# for it.
MEASURED: dict[tuple[str, torch.dtype, tuple[int, int]], str] = {}


@functools.cache
def _cuda_info() -> dict[str, Any]:
    return _native.cuda_info()


@functools.cache
def _device_problem(device: torch.device) -> str:
    index = torch.cuda.current_device() if device.index is None else device.index
    return _native.cuda_problem(index)


# torch.compile asks these two while it traces and takes the answers as they are.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_problem(device: torch.device) -> str:
    """Why this build's CUDA kernels cannot run on a GPU, or nothing."""
    if problem := str(_cuda_info()["why_unusable"]):
        return problem
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"sm_{major}{minor}; the kernels need sm_80 or later"
    return _device_problem(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _when_measured(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The entry of MEASURED for a GPU, or nothing."""
    return MEASURED.get((op, dtype, torch.cuda.get_device_capability(device)), "")


def auto_takes(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether "auto" takes the op's native kernel where there is one."""
    return device.type != "cuda" or bool(_when_measured(op, device, dtype))


def why_no_kernel(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """What keeps native kernels from tensors of a kind, or nothing; heads are attention's."""
    if device.type == "cuda" and (problem := _cuda_problem(device)):
        return f"CUDA tensors ({problem})"
    if device.type not in ("cpu", "cuda"):
        return f"{device.type} tensors"
    if dtype not in DTYPES:
        return f"{dtype}"
    most = 128 if device.type == "cuda" else 256
    if head_dim is not None and (head_dim % 8 or not 0 < head_dim <= most):
        return f"head dimension {head_dim}, which is not a multiple of 8 up to {most}"
    return ""


def resolve(impl: Impl, *, native: bool, auto: bool = True, tensors: str = "these tensors") -> Impl:
    """The backend of a call: `native` says whether a kernel exists for its tensors, `auto` whether
    "auto" takes it."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "auto":
        impl = _backend
    if impl == "auto":
        return "native" if native and auto and not transformed() else "torch"
    if impl == "native" and not native:
        raise ValueError(f"impl='native' has no kernel for {tensors}; use impl='auto'")
    return impl


def takes_native(impl: Impl) -> bool:
    """Whether a call on the CPU, where a kernel fits, may go to it past torch's dispatcher."""
    return (_backend if impl == "auto" else impl) in ("auto", "native") and not watched()


def chosen_backend(
    op: str, device: torch.device | str, dtype: torch.dtype, head_dim: int | None = None
) -> tuple[str, str]:
    """The backend that `impl="auto"` takes for an op now, and why; for headers and `doctor`.

    `op` is the name of a function here; `head_dim` matters to "causal_attention".

    >>> chosen_backend("causal_attention", "cpu", torch.float64, 64)
    ('torch', 'no native kernel for torch.float64')
    """
    device = torch.device(device)
    if op not in ("causal_attention", "sample", "cross_entropy", "linear_cross_entropy"):
        raise ValueError(f"op must name an op of pygpt.ops, got {op!r}")
    if op != "causal_attention":
        head_dim = None
    why_not = why_no_kernel(device, dtype, head_dim)
    if _backend != "auto":
        return _backend, "asked for by ops.backend"
    if why_not:
        return "torch", f"no native kernel for {why_not}"
    if not auto_takes(op, device, dtype):
        return "torch", "the CUDA kernel has not been measured on this kind of GPU"
    if device.type == "cuda":
        return "native", f"measured {_when_measured(op, device, dtype)}"
    return "native", f"{_native.isa()} kernels"
