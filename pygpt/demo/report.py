"""The demo's story as one HTML file that needs nothing else: pictures are inline SVG."""

from __future__ import annotations

import html
import importlib.util
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fcfcfa; margin: 0 auto;
       max-width: 54rem; padding: 2rem 1.2rem 4rem }
h1 { font-size: 1.9rem; margin-bottom: 0 } h2 { margin-top: 2.6rem; font-size: 1.25rem }
p.note { color: #666; margin-top: .2rem } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: .8rem 0 } td, th { padding: .25rem .9rem .25rem 0;
       text-align: left; vertical-align: top } th { color: #666; font-weight: 500 }
td.figure { text-align: right; font-variant-numeric: tabular-nums } tr.best td { font-weight: 700 }
.pieces span { padding: .12rem 0; border-radius: 3px; white-space: pre-wrap }
.pieces { font: 15px/2 ui-monospace, monospace } .right { color: #18794e } .wrong { color: #c02a2a }
code { background: #efefe9; padding: .1rem .35rem; border-radius: 4px }
"""
_COLOURS = ("#fbe7a1", "#bfe3ee")


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def write(
    path: Path,
    acts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    losses: Sequence[tuple[str, float]],
) -> Path:
    """Write the report of the `acts`; `metrics` of pretraining, `losses` of a text's pieces."""
    pretrain = acts["pretrain"]
    parts = [
        "<h1>A GPT, from text to answers</h1>",
        f'<p class="note">{acts["read"]["characters"]:,} characters of text, '
        f"{pretrain['parameters']:,} parameters, {pretrain['steps']:,} steps of pretraining.</p>",
        _summary(acts),
        "<h2>Tokenize</h2><p>A sentence in its pieces:</p>",
        _spans((piece, _COLOURS[i % 2]) for i, piece in enumerate(acts["tokenize"]["pieces"])),
        "<h2>Pretrain</h2><p>Bits per character, lower is better. The lines are what general "
        "compressors need for the same held-out text.</p>",
        _curve(metrics, pretrain) if can_draw() else "",
        f"<p>What the network makes of <b>{html.escape(pretrain['prompt'])}</b> as it learns:</p>",
        _rows(
            ("step", "continuation"),
            [(f"{s['step']:,}", s["sample"]) for s in pretrain["samples"]],
        ),
        "<h2>What surprises it</h2><p>A held-out text; the redder a piece, the more bits it cost. "
        "Point at one to read how many.</p>",
        _spans(
            (piece, f"rgba(214,60,40,{min(1.0, nats / 9):.2f})", f"{nats / math.log(2):.1f} bits")
            for piece, nats in losses
        ),
    ]
    if "classify" in acts:
        found = acts["classify"]
        parts += [
            "<h2>Classify</h2><p>Which package is a docstring from? "
            f"{found['test']} texts of held-out modules.</p>",
            _shares(found["accuracy"], "accuracy"),
            _confusion(found["confusion"], found["labels"]) if can_draw() else "",
        ]
    if "instruct" in acts:
        parts += ["<h2>Instruct</h2>", *_instruct(acts["instruct"])]
    body = "\n".join(parts)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pygpt demo</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )
    return path


def _summary(acts: Mapping[str, Any]) -> str:
    pretrain = acts["pretrain"]
    rows = [
        (
            "held-out text, bits per character",
            f"{pretrain['bits_per_character']:.3f}",
            f"gzip {pretrain['gzip']:.2f}, bz2 {pretrain['bz2']:.2f}",
        )
    ]
    for name, key, what in (
        ("classify", "accuracy", "package of a held-out docstring"),
        ("instruct", "exact_match", "instructions over held-out words"),
    ):
        if name in acts:
            found = acts[name][key]
            scratch = f"{found['from scratch']:.0%} for the same network without pretraining"
            rows.append((what, f"{found['fine-tuned']:.0%}", scratch))
    return _rows(("", "fine-tuned", "beside"), rows)


def _instruct(found: Mapping[str, Any]) -> list[str]:
    names = list(found["exact_match"])
    rows = [
        (task, *(f"{shares[name]:.0%}" for name in names))
        for task, shares in {**found["by_task"], "all": found["exact_match"]}.items()
    ]
    answers = []
    for one in found["answers"][:40]:
        good = one["answer"] == one["wanted"]
        mark = '<b class="right">right</b>' if good else '<b class="wrong">wrong</b>'
        wanted = "" if good else html.escape(one["wanted"])
        question, answer = html.escape(one["question"]), html.escape(one["answer"])
        answers.append(f"<tr><td>{mark}<td>{question}<td><b>{answer}</b><td>{wanted}</tr>")
    return [
        "<p>Exact match on words that no training instruction held.</p>",
        _rows(("instruction", *names), rows, best="all"),
        "<p>The first forty answers, not selected; what was wanted stands beside a wrong one.</p>",
        f"<table><tr><th><th>asked<th>answered<th>wanted</tr>{''.join(answers)}</table>",
    ]


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]], best: str = "") -> str:
    head = "".join(f"<th>{html.escape(cell)}" for cell in heads)
    lines = []
    for row in rows:
        mark = ' class="best"' if row[0] == best else ""
        cells = "".join(f"<td>{html.escape(str(cell))}" for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _shares(shares: Mapping[str, float], what: str) -> str:
    rows = [(name, f"{share:.1%}") for name, share in shares.items()]
    return _rows(("", what), rows, best="fine-tuned")


def _spans(pieces: Any) -> str:
    """Pieces of text on coloured ground: (piece, colour) or (piece, colour, hint)."""
    spans = []
    for piece, colour, *hint in pieces:
        title = f' title="{html.escape(hint[0])}"' if hint else ""
        shown = html.escape(piece).replace("\n", "⏎\n")
        spans.append(f'<span style="background:{colour}"{title}>{shown}</span>')
    return f'<p class="pieces">{"".join(spans)}</p>'


def _curve(metrics: Sequence[Mapping[str, Any]], pretrain: Mapping[str, Any]) -> str:
    from matplotlib.figure import Figure

    scale = 1 / math.log(2) / pretrain["characters_per_token"]
    training = [(m["step"], m["loss"] * scale) for m in metrics if "loss" in m]
    held_out = [
        (m["step"], m["val_bits_per_character"]) for m in metrics if "val_bits_per_character" in m
    ]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*_smooth(training), strict=True), color="#b9c4cc", lw=1, label="training")
    axes.plot(
        *zip(*held_out[1:], strict=True), color="#1f6feb", lw=2, marker="o", ms=4, label="held out"
    )
    for name, colour in (("gzip", "#c02a2a"), ("bz2", "#b7791f")):
        axes.axhline(pretrain[name], color=colour, lw=1, ls="--")
        axes.annotate(
            name,
            (1, pretrain[name]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set(xlabel="step", ylabel="bits per character")
    low = min(pretrain["bz2"], *(value for _, value in (*held_out[1:], *training)))
    axes.set_ylim(max(0.0, low - 0.2), max(pretrain["gzip"] + 0.8, held_out[-1][1] + 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _svg(figure)


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of at most 150 stretches."""
    size = max(1, len(points) // 150)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(value for _, value in g) / len(g)) for g in groups]


def _confusion(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    most = max(map(max, counts))
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            colour = "white" if count > most / 2 else "#222"
            axes.text(j, i, str(count), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="answered", ylabel="true package")
    return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure as an SVG element, without the file's header and metadata."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
