"""What csrc/bindings.cpp offers; tests/test_native_stub.py holds it against the built module."""

from typing import Any

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_torch_threads(arg0: int, arg1: int) -> None: ...
def num_threads() -> int: ...
def cuda_info() -> dict[str, Any]: ...
def sample(
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
    arg12: int,
    /,
) -> None: ...
