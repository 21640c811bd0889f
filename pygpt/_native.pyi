"""What csrc/bindings.cpp offers; tests/test_native_stub.py holds it against the built module."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_torch_threads(arg0: int, arg1: int) -> None: ...
def num_threads() -> int: ...
def set_tensor_types(arg0: type[Tensor], arg1: type[Tensor]) -> None: ...
def all_plain(*args: object) -> bool: ...
def keep_memory() -> None: ...
def empty(arg0: int, arg1: Sequence[int]) -> Tensor: ...
def cuda_info() -> dict[str, Any]: ...
def cuda_problem(arg0: int) -> str: ...

_Launch = tuple[int, int]
_Place = tuple[int, int, int, int]
_Attention = tuple[int, tuple[int, ...], float, int, int, int, float, int]

def cuda_attention_splits(arg0: _Launch, arg1: _Attention) -> int: ...
def cuda_attention_forward(
    arg0: _Launch, arg1: _Attention, arg2: Sequence[_Place], arg3: int
) -> None: ...
def cuda_attention_decode(
    arg0: _Launch, arg1: _Attention, arg2: Sequence[_Place], arg3: int, arg4: int, arg5: int
) -> None: ...
def cuda_attention_backward(
    arg0: _Launch,
    arg1: _Attention,
    arg2: Sequence[_Place],
    arg3: int,
    arg4: Sequence[_Place],
    arg5: int,
) -> None: ...
def cuda_sample(
    arg0: _Launch,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: bool,
) -> None: ...
def cuda_cross_entropy(
    arg0: _Launch,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
) -> None: ...
def attention_fits(
    arg0: Tensor,
    arg1: Tensor,
    arg2: Tensor,
    arg3: float | None,
    arg4: int | None,
    arg5: Tensor | None,
    arg6: Tensor | None,
    arg7: float,
    arg8: Tensor | None,
) -> bool: ...
def attention_forward(
    arg0: Tensor,
    arg1: Tensor,
    arg2: Tensor,
    arg3: float,
    arg4: int,
    arg5: Tensor | None,
    arg6: Tensor | None,
    arg7: float,
    arg8: Tensor | None,
    arg9: Tensor | None,
) -> Tensor: ...
def attention_backward(
    arg0: Tensor,
    arg1: Tensor,
    arg2: Tensor,
    arg3: Tensor,
    arg4: Tensor,
    arg5: Tensor,
    arg6: float,
    arg7: int,
    arg8: Tensor | None,
    arg9: Tensor | None,
    arg10: float,
    arg11: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def sample(
    arg0: Tensor, arg1: Tensor, arg2: Tensor, arg3: Tensor | None, arg4: Tensor | None
) -> Tensor: ...
def gemm(arg0: Tensor, arg1: Tensor, arg2: Tensor, arg3: Tensor | None, arg4: bool) -> None: ...
def linear_of_few_rows(arg0: Tensor, arg1: Tensor, arg2: Tensor | None) -> Tensor | None: ...
def gelu(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int) -> None: ...
def add_norm(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: float,
    arg8: int,
    arg9: int,
    arg10: int,
) -> None: ...
def add_norm_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
) -> None: ...
def crc32c(arg0: int, arg1: int) -> int: ...
def count_targets(arg0: int, arg1: int, arg2: int, arg3: int) -> int: ...
def cross_entropy(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: float,
    arg11: int,
) -> float: ...

_SpecialChoice = Literal[True] | list[tuple[str, int]] | None

class Trainer:
    empty: bool
    def __init__(self, threads: int, budget: int, memory: int) -> None: ...
    def add_texts(self, pattern: str, texts: Sequence[str]) -> None: ...
    def add_files(self, pattern: str, paths: Sequence[str]) -> None: ...
    def add_pieces(self, pieces: Sequence[tuple[bytes, int]]) -> None: ...
    def train(
        self, merges: int, min_frequency: int, progress: Callable[[int], object] | None
    ) -> list[tuple[int, int]]: ...

class Bpe:
    def __init__(
        self,
        tokens: list[tuple[bytes, int]],
        merges: list[tuple[int, int]] | None,
        whole_pieces: bool,
        pattern: str,
        specials: list[tuple[str, int]],
    ) -> None: ...
    @staticmethod
    def from_tiktoken(file: bytes, pattern: str, specials: list[tuple[str, int]]) -> Bpe: ...
    @staticmethod
    def from_gpt2_merges(file: bytes, pattern: str, specials: list[tuple[str, int]]) -> Bpe: ...
    def encode_ordinary(self, text: str) -> list[int]: ...
    def encode(
        self, text: str, allowed: _SpecialChoice, disallowed: _SpecialChoice
    ) -> list[int]: ...
    def encode_to_numpy(
        self, text: str, allowed: _SpecialChoice, disallowed: _SpecialChoice
    ) -> NDArray[np.uint32]: ...
    def count(self, text: str, allowed: _SpecialChoice) -> int: ...
    def encode_batch(
        self,
        texts: Iterable[str],
        allowed: _SpecialChoice,
        disallowed: _SpecialChoice,
        threads: int,
    ) -> list[list[int]]: ...
    def encode_batch_to_numpy(
        self,
        texts: Iterable[str],
        allowed: _SpecialChoice,
        disallowed: _SpecialChoice,
        threads: int,
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...
    def encode_files(
        self, paths: list[str], threads: int, separator: int | None
    ) -> NDArray[np.uint32]: ...
    def encode_pieces(self, pieces: list[bytes]) -> list[int]: ...
    def piece_ends(self, text: bytes) -> list[int]: ...
    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes: ...
    def decode_bytes_batch(
        self, batch: Iterable[Sequence[int] | NDArray[Any]], threads: int
    ) -> list[bytes]: ...
    def token_bytes(self, id: int) -> bytes: ...
    def whole(self, piece: bytes) -> int | None: ...
    def merges(self) -> list[tuple[int, int]]: ...
    def all_reachable(self) -> bool: ...
    def size(self) -> int: ...
    def has(self, id: int) -> bool: ...
