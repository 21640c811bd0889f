"""What every benchmark shares: the machine's name, interleaved timing, a table."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def after_reading(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each call, in turns, with 64 MB read before every one: its operands are in
    memory alone."""
    other = torch.ones(1 << 24)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, record in zip(calls, times, strict=True):
            other.sum()
            begin = time.perf_counter()
            call()
            record.append(time.perf_counter() - begin)
    return [statistics.median(record) for record in times]


def in_processes(
    worker: Callable[..., None], sides: Sequence[str], arguments: tuple[object, ...], seconds: float
) -> tuple[list[float], list[Any]]:
    """Median seconds of a step of each side, in turns for about `seconds` each, and what each sends
    at its end. worker(side, *arguments, pipe) has a process of its own and calls `serve`."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for side in sides:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(side, *arguments, theirs)))
        processes[-1].start()
        pipes.append(ours)
        assert ours.recv() == "ready"
    times: list[list[float]] = [[] for _ in sides]
    start = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - start < seconds * len(sides):
        for pipe, record in zip(pipes, times, strict=True):
            pipe.send(True)
            record.append(pipe.recv())
    last = []
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        last.append(pipe.recv())
        process.join()
    return [statistics.median(record) for record in times], last


def serve(pipe: Any, step: Callable[[], object], last: Callable[[], object] = lambda: None) -> None:
    """A worker's part of `in_processes`: for every message the mean time of steps that take a fifth
    of a second together, or of one, and last() at the end. The other side's threads still spin for
    some milliseconds after its own steps."""
    step()
    step()
    pipe.send("ready")
    while pipe.recv():
        begin, steps, taken = time.perf_counter(), 0, 0.0
        while taken < 0.2:
            step()
            steps += 1
            taken = time.perf_counter() - begin
        pipe.send(taken / steps)
    pipe.send(last())


def row(cells: Sequence[object], widths: Sequence[int]) -> None:
    """One line of a table: the first cell to the left, the others to the right."""
    texts = [str(cell) for cell in cells]
    print(
        texts[0].ljust(widths[0]),
        *(t.rjust(w) for t, w in zip(texts[1:], widths[1:], strict=True)),
        flush=True,
    )
