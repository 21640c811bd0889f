"""What every op needs to reach its kernels: addresses, threads, streams and registration."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.dlpack import from_dlpack

from pygpt import _native

# The dtypes of csrc/cpu/kernels.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LARGE = 1 << 18  # bytes from which a tensor is worth a block of its own


def _share_torch_threads() -> None:
    """Hand torch's thread pool to the native code, which has none of its own."""
    library = ctypes.CDLL(torch._C.__file__)

    def place(name: str) -> int:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0

    _native.set_torch_threads(place("torch_parallel_for"), place("torch_get_num_threads"))


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


def register(
    schema: str,
    fake: Callable[..., Any],
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Make an op of torch.ops.pygpt: `fake` gives its results' shapes to whoever traces it, `save`
    keeps what `backward` needs."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    if cuda is not None:
        _library.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"pygpt::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"pygpt::{name}", backward, setup_context=save, lib=_library
        )


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether torch must see a call since it differentiates, traces or transforms it.

    Where it need not, the kernel can be called straight away: 7 us sooner.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    learns = torch.is_grad_enabled()
    return any(type(x) is not Tensor or (learns and x.requires_grad) for x in tensors)


def address(x: Tensor | None) -> int:
    """Where a tensor's data lies; 0 for none."""
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> Tensor:
    """x, or a copy, such that its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def crc32c(x: Tensor) -> int:
    """The CRC-32C (RFC 3720, appendix B.4) of the bytes of a contiguous CPU tensor.

    >>> hex(crc32c(torch.tensor(list(b"123456789"), dtype=torch.uint8)))
    '0xe3069283'
    """
    return _native.crc32c(x.data_ptr(), x.nbytes)


_keeps_memory = False  # changed by keep_memory alone


def keep_memory() -> None:
    """From now on large results of ops on the CPU lie in memory that stays with the process.

    A training step asks for the same tensors every time. Memory that goes back to the system in
    between costs its pages anew, and malloc, where it keeps memory, leaves holes between them: a
    third more memory in a step of GPT-2 124M.
    """
    global _keeps_memory
    _keeps_memory = True


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype), from kept memory where it is large."""
    dtype = like.dtype if dtype is None else dtype
    large = math.prod(shape) * dtype.itemsize >= _LARGE and dtype in DTYPES
    if _keeps_memory and large and like.is_cpu and type(like) in (Tensor, Parameter):
        block = _native.empty_block(DTYPES[dtype], shape)
        if block is not None:
            return from_dlpack(block)
    return like.new_empty(shape, dtype=dtype)


def launch(x: Tensor) -> tuple[int, int]:
    """Device and stream for a CUDA kernel."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream
