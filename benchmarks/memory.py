"""Resident memory of this process in bytes, from Linux's /proc; 0 where there is none."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Bytes now."""
    return _line("VmRSS")


def peak(*, reset: bool = False) -> int:
    """Bytes at most so far; with `reset`, counted anew from now on."""
    forget = Path("/proc/self/clear_refs")
    if reset and forget.exists():
        forget.write_text("5")
    return _line("VmHWM")


def _line(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(name)), 0)
