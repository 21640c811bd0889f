"""Tiny Shakespeare by characters: validation loss over seconds, plain PyTorch beside pygpt.

The first curve is nanoGPT's CPU recipe (4 layers, 4 heads, width 128, context 64, batch 12, no
dropout, lr 1e-3 to 1e-4 over 2000 steps, then 1e-4) as a plain PyTorch loop, written afresh. The
second is the command `pygpt pretrain` with a recipe of its own. Both see the first 90 % of the
text, are evaluated on all of the last 10 %, in windows of their own context, and their clocks stand
still meanwhile. One runs after the other: use a quiet machine.

    python benchmarks/bench_shakespeare.py tinyshakespeare.txt --seconds 180
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_train_step import PlainGPT
from torch import Tensor, nn

TARGET = 1.88
RECIPE = (
    "--tokenizer bytes --context-length 128 --emb-dim 128 --n-heads 4 --n-layers 4 --init-std 0.08 "
    "--batch-size 8 --lr 2.5e-3 --warmup-steps 100 --eval-every 500 --checkpoint-every 0"
)
TOKENS_PER_STEP = 8 * 128

Curve = list[tuple[float, int, float]]  # seconds, tokens, validation loss


def train_plain(train: Tensor, validation: Tensor, seconds: float) -> Curve:
    """The recipe of nanoGPT's train.py with the CPU arguments of its README."""
    context, batch, steps, warmup, lr, min_lr = 64, 12, 2000, 100, 1e-3, 1e-4
    torch.manual_seed(1337)
    layers = 4
    model = PlainGPT(int(train.max()) + 1, context, 128, 4, layers, bias=False, gelu="none")
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = "out" in name or "down" in name
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.99),
    )
    window = torch.arange(context + 1)
    starts = torch.arange(0, len(validation) - context, context)
    curve: Curve = []
    step, clock = 0, 0.0
    while clock < seconds:
        begin = time.perf_counter()
        for _ in range(250 if step < steps else 1000):
            rate = lr * (step + 1) / (warmup + 1)
            if step >= warmup:
                progress = min(1.0, (step - warmup) / (steps - warmup))
                rate = min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            text = train[torch.randint(len(train) - context, (batch, 1)) + window]
            loss = model(text[:, :-1], text[:, 1:])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        clock += time.perf_counter() - begin
        total = 0.0
        with torch.no_grad():
            for part in starts.split(128):
                text = validation[part[:, None] + window]
                total += float(model(text[:, :-1], text[:, 1:], "sum"))
        curve.append((clock, step * batch * context, total / (len(starts) * context)))
        print(f"  plain  {clock:6.1f} s  {step:6d} steps  {curve[-1][2]:.4f}", flush=True)
    return curve


def train_pygpt(path: Path, folder: Path, seconds: float, steps: int | None) -> Curve:
    """What the command line makes of the same text: its events, read as they come."""
    length = ("--steps", str(steps)) if steps else ("--minutes", f"{seconds / 60:g}")
    command = ["pygpt", "pretrain", str(path), "--out", str(folder / "run")]
    command += [*RECIPE.split(), *length]
    print("  " + " ".join(command))
    curve: Curve = []
    begin, evaluating = 0.0, 0.0
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--json"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line) if line.startswith("{") else {"event": line.strip()}
            if event["event"] == "start":
                begin = time.perf_counter()
            elif event["event"] == "eval":
                evaluating += event["eval_seconds"]
                clock = time.perf_counter() - begin - evaluating
                curve.append((clock, event["step"] * TOKENS_PER_STEP, event["val_loss"]))
                print(f"  pygpt  {clock:6.1f} s  {event['step']:6d} steps  {curve[-1][2]:.4f}")
            elif event["event"] not in ("step", "end"):
                print(f"  {event['event']}")
    if process.returncode:
        raise SystemExit(f"pygpt pretrain failed with {process.returncode}")
    return curve


def crossing(curve: Curve, target: float) -> float:
    """When the curve first came down to the target, on straight lines between evaluations."""
    for (t0, _, loss0), (t1, _, loss1) in itertools.pairwise(curve):
        if loss1 <= target < loss0:
            return t0 + (t1 - t0) * (loss0 - target) / (loss0 - loss1)
    return math.inf


def loss_at(curve: Curve, seconds: float) -> float:
    """The last evaluation that was over by then."""
    return next((loss for clock, _, loss in reversed(curve) if clock <= seconds), math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--steps", type=int, help="of pygpt; by default what a probe says fits")
    parser.add_argument("--only", choices=("plain", "pygpt"))
    arguments = parser.parse_args()
    raw = arguments.text.read_bytes()
    characters = {c: i for i, c in enumerate(sorted(set(raw)))}
    ids = torch.tensor([characters[c] for c in raw])
    cut = int(len(ids) * 0.9)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    curves: dict[str, Curve] = {}
    if arguments.only != "pygpt":
        curves["plain PyTorch"] = train_plain(ids[:cut], ids[cut:], arguments.seconds)
    if arguments.only != "plain":
        with tempfile.TemporaryDirectory() as folder:
            curves["pygpt"] = train_pygpt(
                arguments.text, Path(folder), arguments.seconds, arguments.steps
            )
    heads = ("", f"s to {TARGET} nats", f"nats at {arguments.seconds:.0f} s", "lowest", "tokens/s")
    print("\n" + "".join(f"{head:>16}" for head in heads))
    for name, curve in curves.items():
        when, then = crossing(curve, TARGET), loss_at(curve, arguments.seconds)
        lowest, speed = min(loss for _, _, loss in curve), curve[-1][1] / curve[-1][0]
        print(f"{name:>16}{when:16.1f}{then:16.4f}{lowest:16.4f}{speed:16,.0f}")


if __name__ == "__main__":
    main()
