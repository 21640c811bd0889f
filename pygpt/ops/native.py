"""What every op needs to reach its kernels: addresses, threads, streams and registration."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pygpt import _native

# The dtypes of csrc/cpu/kernels.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _share_torch_threads() -> None:
    """Hand torch's thread pool to the native code, which has none of its own."""
    library = ctypes.CDLL(torch._C.__file__)

    def place(name: str) -> int:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0

    _native.set_torch_threads(place("torch_parallel_for"), place("torch_get_num_threads"))


_share_torch_threads()
_native.set_tensor_types(Tensor, Parameter)


def native_info() -> dict[str, Any]:
    """What the native module is: its file, instruction sets (in use, available) and CUDA state."""
    return {
        "file": _native.__file__,
        "isa": _native.isa(),
        "available_isas": _native.available_isas(),
        "cuda": _native.cuda_info(),
    }


_library = torch.library.Library("pygpt", "DEF")  # type: ignore[no-untyped-call]


class Op:
    """An op of torch.ops.pygpt, called as it is by whoever looks at every call, and past torch's
    dispatcher otherwise: 30 us sooner with a gradient, 7 without."""

    def __init__(
        self,
        name: str,
        cpu: Callable[..., Any],
        save: Callable[..., None] | None,
        backward: Callable[..., Any] | None,
    ) -> None:
        self._seen = getattr(torch.ops.pygpt, name).default
        self._cpu = cpu
        self._learn = None if backward is None else _function(name, cpu, save, backward)

    def __call__(self, *arguments: Any) -> Any:
        if watched() or not _native.all_plain(*arguments):
            return self._seen(*arguments)
        return self.direct(*arguments)

    def direct(self, *arguments: Any) -> Any:
        """A call that nobody watches, with plain tensors on the CPU."""
        if torch.is_grad_enabled():
            for x in arguments:
                if isinstance(x, Tensor) and x.requires_grad:
                    learn = self._learn or self._seen
                    return learn(*arguments)
        return self._cpu(*arguments)


def _function(
    name: str,
    cpu: Callable[..., Any],
    save: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """What registers in autograd's graph a call that the dispatcher never sees."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = cpu(*arguments)
        if save is not None:
            save(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    shown = f"pygpt::{name}"  # by profilers, as they show the op
    function: Any = type(shown, (torch.autograd.Function,), methods)
    return function.apply  # type: ignore[no-any-return]


def register(
    schema: str,
    fake: Callable[..., Any],
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
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
    return Op(name, cpu, save, backward)


def watched() -> bool:
    """Whether torch must see every call since it traces or transforms them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or transformed()
    )


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which takes torch's own ops alone."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


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


def keep_memory() -> None:
    """From now on large results of ops on the CPU lie in memory that stays with the process.

    A training step asks for the same tensors every time. Memory that goes back to the system in
    between costs its pages anew, and malloc, where it keeps memory, leaves holes between them: a
    third more memory in a step of GPT-2 124M.
    """
    _native.keep_memory()


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype), from kept memory where it is large."""
    dtype = like.dtype if dtype is None else dtype
    if like.is_cpu and dtype in DTYPES and type(like) in (Tensor, Parameter):
        return _native.empty(DTYPES[dtype], shape)
    return like.new_empty(shape, dtype=dtype)


def launch(x: Tensor) -> tuple[int, int]:
    """Device and stream for a CUDA kernel."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream
