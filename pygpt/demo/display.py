"""How the demo looks in a terminal: a live line while a network learns, and plain tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pygpt.training import Event


class Display:
    """Progress of a training run: a live line in a terminal, and a line for each evaluation."""

    def __init__(self, console: Console, title: str = "", prompt: str = "") -> None:
        self.console, self.title, self.prompt = console, title, prompt
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[figures]}  left"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self.bar = self.progress.add_task("", total=None, figures="")
        self.seconds = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        values = event.values
        if event.kind == "start":
            self.progress.reset(self.bar, total=event.steps, description=self.title)
        elif event.kind == "step":
            self.seconds = values["seconds"]
            self.progress.update(
                self.bar,
                completed=event.step,
                figures=f"loss {values['loss']:.2f}  {values['tokens_per_second']:,.0f} tokens/s",
            )
        elif event.kind == "eval" and "val_bits_per_character" in values:
            bits = values["val_bits_per_character"]
            self.console.print(
                f"  step {event.step:>5}  {self.seconds:5.1f} s  {bits:.3f} bits per character"
            )
        elif event.kind == "sample":
            said = Text.assemble("              ", self.prompt, " ", (values["sample"], "cyan"))
            self.console.print(said, soft_wrap=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, best: str) -> Table:
    """A plain table; the row that is named `best` stands out."""
    table = Table(box=None, pad_edge=True, header_style="dim", padding=(0, 2))
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 or head == "result" else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == best else "")
    return table
