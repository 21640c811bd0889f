"""How a run looks in a terminal: what computes it, a live line, its evaluations."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pygpt import ops
from pygpt.training import Event

console = Console(highlight=False)


def header(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """One line: device, dtype, threads, and which backend runs each op, with the reason."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = [name, str(dtype).removeprefix("torch.")]
    if device.type == "cpu":
        facts += [f"{torch.get_num_threads()} threads", str(ops.native_info()["isa"])]
    chosen: dict[str, list[str]] = {}
    for op in ("causal_attention", "linear_cross_entropy", "sample"):
        backend, why = ops.chosen_backend(op, device, dtype, head_dim)
        chosen.setdefault(backend if backend == "native" else f"{backend} ({why})", []).append(op)
    return "; ".join([", ".join(facts), *(f"{', '.join(o)}: {b}" for b, o in chosen.items())])


class TrainingDisplay:
    """Shows the events of `training.fit`: live in a terminal, else lines, or JSON if asked."""

    def __init__(self, *, as_json: bool = False, head_dim: int = 64) -> None:
        self.as_json, self.head_dim = as_json, head_dim
        self.progress: Progress | None = None
        self.loss = float("nan")
        self.unit = "tokens"

    def __enter__(self) -> TrainingDisplay:
        if console.is_terminal and not self.as_json:
            self.progress = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
            )
            self.bar = self.progress.add_task("", total=None)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, event: Event) -> None:
        if self.as_json:
            line = {"event": event.kind, "step": event.step, "steps": event.steps, **event.values}
            print(json.dumps(line, default=str), flush=True)
            return
        if event.kind == "start":
            self._start(event)
        elif event.kind == "step":
            self._step(event)
        elif event.kind == "eval":
            figures = "  ".join(
                f"{name} {value:.4f}"
                for name, value in event.values.items()
                if isinstance(value, float) and name != "eval_seconds"
            )
            self._say(f"step {event.step:>6}  {figures}")
        elif event.kind == "sample":
            self._say(f"step {event.step:>6}  sample: {event.values['sample']!r}")

    def _start(self, event: Event) -> None:
        machine: dict[str, Any] = event.values["machine"]
        dtype = getattr(torch, machine["dtype"])
        device = torch.device(
            "cuda"
            if torch.cuda.is_available() and machine["device"] not in ("cpu", "mps")
            else machine["device"]
        )
        self._say(header(device, dtype, self.head_dim))
        self.unit = "tokens" if event.values["task"] == "pretrain" else "targets"
        if event.values["resumed"]:
            self._say(f"going on from step {event.step} of {event.steps}")

    def _step(self, event: Event) -> None:
        loss, rate = event.values["loss"], event.values["tokens_per_second"]
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        if self.progress:
            said = f"loss {self.loss:.3f}  {rate:,.0f} {self.unit}/s"
            self.progress.update(
                self.bar, completed=event.step, total=event.steps, description=said
            )
        elif event.step % max(1, event.steps // 20) == 0:
            self._say(
                f"step {event.step:>6}/{event.steps}  loss {loss:.4f}  {rate:,.0f} {self.unit}/s"
            )

    def _say(self, text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)
        sys.stdout.flush()
