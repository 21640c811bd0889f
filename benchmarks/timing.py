"""What every benchmark shares: the machine's name, interleaved timing, a table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pygpt import _native


def machine() -> str:
    """Processor, threads, instruction set and torch, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, {_native.isa()}, torch {torch.__version__}"


def interleaved(functions: Sequence[Callable[[], object]], seconds: float = 1.0) -> list[float]:
    """Median seconds of each function, called in turns for about `seconds` each."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - start < seconds * len(functions):
        for function, record in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            record.append(time.perf_counter() - begin)
    return [statistics.median(record) for record in times]


def row(cells: Sequence[object], widths: Sequence[int]) -> None:
    """One line of a table: the first cell to the left, the others to the right."""
    texts = [str(cell) for cell in cells]
    print(
        texts[0].ljust(widths[0]),
        *(t.rjust(w) for t, w in zip(texts[1:], widths[1:], strict=True)),
        flush=True,
    )
