"""The one training loop: pretraining and every kind of fine-tuning are tasks that it runs.

A task turns positions of an endless, computed sample order into batches, and batches into a summed
loss and the number of targets in it. Nothing random depends on the past: a run that is stopped or
killed and resumed ends with the same weights, bit for bit, as one that was not (same machine, same
number of threads). The loop prints nothing; whoever shows progress passes `on_event`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import fcntl
import json
import math
import os
import platform
import signal
import threading
import time
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pygpt import __version__, ops
from pygpt.checkpoint import (
    Checkpoint,
    commit_folder,
    drop_newer,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from pygpt.config import TrainConfig
from pygpt.data import Dataset, mix
from pygpt.errors import DataError, NumericError, ResourceError, Stopped, UsageError
from pygpt.tokenizer import Tokenizer

Batch = dict[str, Tensor]

# Settings that change what a run shows, keeps or holds in memory, but not (beyond rounding, in the
# case of the micro-batch) the weights it ends with.
_FREE = {
    "eval_every",
    "eval_batches",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "micro_batch_size",
}


class Task(Protocol):
    """What to learn. `batch` and `loss` are pure functions of position, batch and weights."""

    name: str
    fingerprint: str  # of the data: a run is resumed only on the same

    def batch(self, positions: range) -> Batch:
        """The samples at `positions` of the endless training order, as tensors on the CPU."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The loss summed over the batch's targets, and how many there are."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on held-out data, `val_loss` among them; the model is in evaluation mode."""


@dataclass(frozen=True)
class Event:
    """A moment of a run, for a progress display; `values` is what was written or found then."""

    kind: Literal["start", "step", "eval", "sample", "checkpoint", "end"]
    step: int
    steps: int
    values: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """A run's folder: what was measured, said and kept.

    `model/` is in Hugging Face layout; `checkpoints/step-N/` allow going on; `metrics.jsonl` has a
    line for each step, evaluation and sample; `run.json` says how the run was made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "run.json").exists():
            raise FileNotFoundError(f"{folder} is not the folder of a run: it has no run.json")

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """The run in `folder`."""
        return cls(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def about(self) -> dict[str, Any]:
        """Configuration, data fingerprint, machine and versions."""
        about: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return about

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry a step (loss, lr, grad_norm, ...) and one an evaluation (val_loss, ...)."""
        return [entry for entry in _read_log(self.folder) if "sample" not in entry]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What the model said during training: step and sample."""
        return [entry for entry in _read_log(self.folder) if "sample" in entry]

    def plot(self, path: str | Path) -> Path:
        """Draw training and validation loss over steps into a picture file; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, label in (("loss", "training"), ("val_loss", "validation")):
            points = [(m["step"], m[key]) for m in self.metrics if key in m]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        axes.set(xlabel="step", ylabel="loss (nats per target)")
        axes.legend()
        figure.savefig(path)
        return Path(path)


def fit(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    out: str | Path,
    resume: str | Path = "auto",
    allow: Collection[str] = (),
    tokenizer: Any = None,
    sample: Callable[[nn.Module], str] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Run:
    """Train `model` on `task`, in place, and keep everything in the folder `out`.

    `resume` is "auto" (go on from the newest whole checkpoint in `out`, else begin), "never"
    (begin; refused where `out` holds a run), or a checkpoint's folder. Other data or settings than
    the run began with are refused, but for the settings named in `allow`. `sample` is called every
    `sample_every` steps. At the end `model.save_pretrained(out/model, tokenizer)` is called.

    Raises Stopped after SIGINT or SIGTERM (a checkpoint is saved; a second signal exits at once),
    NumericError before a loss or gradient that is not finite can touch the weights, ResourceError
    where memory, disk or the folder cannot be had.
    """
    out = Path(out)
    device = choose_device(config.device)
    with _locked(out), _Signals() as signals, _isolated_rng(device):
        loop = _Loop(model, task, config, device, out, signals, on_event)
        settings = _settings(model, task, config)
        loop.begin(settings, _find_checkpoint(out, resume), set(allow))
        try:
            loop.run(sample)
        except _StopNow as stop:
            loop.save(final=False)
            raise Stopped(
                f"stopped by {stop.signal.name} after step {loop.step} of {config.steps}; "
                f"the same command goes on from there",
                stop.signal,
            ) from None
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory with {config.micro_batch_size or config.batch_size} samples at a "
                f"time; set micro_batch_size lower (the result stays the same): {error}"
            ) from None
        finally:
            model.eval()
        try:
            with commit_folder(out / "model") as folder:
                model.save_pretrained(folder, tokenizer)  # type: ignore[operator]
        except OSError as error:
            raise ResourceError(f"the model could not be saved: {error}") from error
        loop.emit("end", seconds=loop.seconds)
        if signals.received:  # too late to stop this run, not what would follow it
            raise Stopped(f"{signals.received.name} came as {out} was finished", signals.received)
    return Run(out)


def steps_for(
    seconds: float,
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    evaluations: int = 1,
    probe_seconds: float = 3.0,
) -> int:
    """How many steps, with that many evaluations between them, take about `seconds` here.

    Measured on a copy of the model for `probe_seconds`. The same number of steps with the same seed
    gives the same weights on this machine, however busy it was during the probe.
    """
    device = choose_device(config.device)
    with _isolated_rng(device):
        loop = _Loop(copy.deepcopy(model), task, config, device, Path(), _Signals(), None)
        loop.update()  # the first one allocates
        begin, steps = time.perf_counter(), 0
        while steps < 3 or time.perf_counter() - begin < probe_seconds:
            loop.update()
            steps += 1
        per_step = (time.perf_counter() - begin) / steps
        begin = time.perf_counter()
        if evaluations:
            loop.evaluate()
        evaluating = evaluations * (time.perf_counter() - begin)
    return max(1, int((seconds - evaluating) / per_step))


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, in place of giving it back.

    The gradients and activations of a step are the same blocks every time, and fresh pages cost
    more than what is computed in them: a tenth of a bfloat16 step of GPT-2 124M, for 5 % more
    memory. Holds for the rest of the process; `fit` calls it on a CPU.
    """
    ops.keep_memory()
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def choose_device(name: str) -> torch.device:
    """The device that `name` means; "auto" is cuda, mps or cpu, whichever is there first."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"device {name!r} cannot be used: {str(error).splitlines()[0]}"
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device, model: nn.Module) -> torch.dtype:
    """The dtype of autocast; "auto" is bfloat16 where the device has it and it pays."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        large = sum(p.numel() for p in model.parameters()) >= _BF16_PAYS_FROM
        fast = device.type == "cpu" and large and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


# Parameters. With fewer, casts cost a CPU more than its faster products save. Zen 5, 2 threads, 4
# layers, 768 tokens a step: width 64 (0.2 M) takes 14 ms in float32 and no less in bfloat16, width
# 128 (0.9 M) 35 and 18, width 192 (1.9 M) 65 and 27.
_BF16_PAYS_FROM = 500_000


class _Loop:
    """The state of a run while it runs: weights, optimiser, and the number of updates made."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        out: Path,
        signals: _Signals,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.model, self.task, self.config, self.device = model.to(device), task, config, device
        self.out, self.signals, self.on_event = out, signals, on_event
        self.dtype = choose_dtype(config.dtype, device, model)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise UsageError(
                "the model has no trainable parameters: requires_grad is False for all"
            )
        matrices = [p for p in self.trainable.values() if p.ndim >= 2]
        others = [p for p in self.trainable.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=device.type in ("cpu", "cuda"),
        )
        self.step = 0
        self.seconds = 0.0
        self.saved: int | None = None

    # --- beginning and going on ---

    def begin(
        self, settings: dict[str, Any], checkpoint: Checkpoint | None, allow: set[str]
    ) -> None:
        self.settings = settings
        if checkpoint is not None:
            _refuse_changes(checkpoint.state["settings"], settings, allow, self.out)
            self.restore(checkpoint)
        _trim_log(self.out, self.step)
        about = {**settings, "machine": _machine(self.device, self.dtype)}
        _write_json(self.out / "run.json", about)
        self.emit("start", resumed=checkpoint is not None, **about)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        optimizer = {
            f"{name}.{key}": value
            for name, p in self.trainable.items()
            for key, value in self.optimizer.state[p].items()
        }
        return _tensors(self.model), optimizer

    def restore(self, checkpoint: Checkpoint) -> None:
        weights = _tensors(self.model)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in checkpoint.model.items()}:
            raise DataError(f"checkpoint {checkpoint.folder} is of a model of another shape")
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(checkpoint.model[name])
        for name, tensor in checkpoint.optimizer.items():
            parameter, _, key = name.rpartition(".")
            p = self.trainable[parameter]
            self.optimizer.state[p][key] = tensor.to(p.device)
        self.step = self.saved = checkpoint.state["step"]
        self.seconds = checkpoint.state["seconds"]
        ops.assume_own_products(checkpoint.state.get("own_products", {}))

    # --- the loop ---

    def run(self, sample: Callable[[nn.Module], str] | None) -> None:
        config = self.config
        with open(self.out / "metrics.jsonl", "a", buffering=1) as self.log:
            started, before = time.perf_counter(), self.seconds
            while True:
                last = self.step == config.steps
                if last or _due(self.step, config.eval_every):
                    begin = time.perf_counter()
                    with self.signals.immediate():
                        figures = self.evaluate()
                    self.record("eval", **figures, eval_seconds=time.perf_counter() - begin)
                if (
                    sample
                    and config.sample_every
                    and (last or _due(self.step, config.sample_every))
                ):
                    with self.signals.immediate(), self.evaluating():
                        said = sample(self.model)
                    self.record("sample", sample=said)
                if self.step and (last or _due(self.step, config.checkpoint_every)):
                    self.save(final=last)
                if last:
                    return
                begin = time.perf_counter()
                figures, count = self.update()
                now = time.perf_counter()
                self.seconds = before + now - started
                self.record(
                    "step", **figures, tokens_per_second=count / (now - begin), seconds=self.seconds
                )

    def update(self) -> tuple[dict[str, float], int]:
        """One step: the gradient of the loss summed over micro-batches, over all their targets."""
        config, step = self.config, self.step + 1
        positions = range(self.step * config.batch_size, step * config.batch_size)
        self.model.train()
        loss, count = torch.zeros((), device=self.device), 0
        for start in range(0, config.batch_size, config.micro_batch_size or config.batch_size):
            self.signals.check()
            micro = positions[start : start + (config.micro_batch_size or config.batch_size)]
            self.seed(mix(config.seed, micro.start))  # dropout depends on position only
            batch = {
                k: v.to(self.device, non_blocking=True) for k, v in self.task.batch(micro).items()
            }
            with self.autocast():
                summed, targets = self.task.loss(self.model, batch)
            summed.backward()  # type: ignore[no-untyped-call]
            loss += summed.detach()
            count += targets
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        loss_value, norm_value = (float(x) / max(1, count) for x in (loss, norm))
        lr = config.learning_rate(step)
        figures = {"loss": loss_value, "lr": lr, "grad_norm": norm_value}
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.report_not_finite(step, positions, figures)
        if self.step == 0 and norm_value == 0.0:
            raise UsageError(
                "no gradient reaches the trainable parameters, so nothing would be learned"
            )
        clip = config.grad_clip / norm_value if config.grad_clip else math.inf
        torch._foreach_mul_(gradients, min(1.0, clip) / max(1, count))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step
        return figures, count

    def evaluate(self) -> dict[str, float]:
        with self.evaluating():
            return self.task.evaluate(self.model)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, without gradients."""
        self.model.eval()
        self.seed(self.config.seed)
        with torch.no_grad(), self.autocast():
            yield

    def seed(self, seed: int) -> None:
        # Not torch.manual_seed: without a GPU it remembers the call, with its stack, for each step.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def autocast(self) -> torch.autocast:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    # --- what is written ---

    def record(self, kind: Literal["step", "eval", "sample"], **values: Any) -> None:
        self.log.write(json.dumps({"step": self.step, **values}) + "\n")
        self.emit(kind, **values)

    def emit(
        self, kind: Literal["start", "step", "eval", "sample", "checkpoint", "end"], **values: Any
    ) -> None:
        if self.on_event:
            self.on_event(Event(kind, self.step, self.config.steps, values))

    def save(self, *, final: bool) -> None:
        """Save a checkpoint; a failing disk ends the run only at its end."""
        if self.saved == self.step:
            return
        model, optimizer = self.state()
        state = {"step": self.step, "seconds": self.seconds, "settings": self.settings}
        if self.device.type == "cpu":
            state["own_products"] = ops.own_products()
        try:
            folder = save_checkpoint(
                self.out / "checkpoints",
                model=model,
                optimizer=optimizer,
                state=state,
                keep=self.config.keep_checkpoints,
            )
        except OSError as error:
            if final:
                raise ResourceError(f"the last checkpoint could not be saved: {error}") from error
            warnings.warn(f"no checkpoint at step {self.step}: {error}", stacklevel=2)
            return
        self.saved = self.step
        self.emit("checkpoint", folder=str(folder))

    def report_not_finite(self, step: int, positions: range, figures: dict[str, float]) -> None:
        path = self.out / "not-finite.json"
        batch = {name: tensor.tolist() for name, tensor in self.task.batch(positions).items()}
        where = {"first": positions.start, "stop": positions.stop, "seed": self.config.seed}
        figures = {name: repr(value) for name, value in figures.items()}  # type: ignore[misc]
        _write_json(path, {"step": step, **figures, "positions": where, "batch": batch})
        raise NumericError(
            f"the loss is {figures['loss']} and the gradient norm {figures['grad_norm']} at step "
            f"{step}; the weights were left as they were after step {self.step}, the batch is in "
            f"{path}; try a lower lr or a longer warm-up"
        )


class _StopNow(BaseException):
    """Raised where a signal may end the work; not an Exception, so that no task swallows it."""

    def __init__(self, received: signal.Signals) -> None:
        self.signal = received


class _Signals:
    """SIGINT and SIGTERM during a run: acted on between micro-batches; a second one exits.

    Handlers can only be set in the main thread; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._immediate = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if self._immediate:
            raise _StopNow(self.received)

    def check(self) -> None:
        if self.received:
            raise _StopNow(self.received)

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Within the block, which must not change the run's state, a signal stops at once."""
        self._immediate = True
        try:
            self.check()
            yield
        finally:
            self._immediate = False


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(f"another run is using {out}; choose another folder") from None
        yield


def _isolated_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _find_checkpoint(out: Path, resume: str | Path) -> Checkpoint | None:
    if resume == "auto":
        return latest_checkpoint(out / "checkpoints")
    if resume == "never":
        if (out / "run.json").exists():
            raise UsageError(f"{out} already holds a run; resume it or choose another folder")
        return None
    checkpoint = load_checkpoint(Path(resume))
    drop_newer(out / "checkpoints", checkpoint.state["step"])
    return checkpoint


def _settings(model: nn.Module, task: Task, config: TrainConfig) -> dict[str, Any]:
    shape = getattr(model, "config", None)
    return {
        "task": task.name,
        "data": task.fingerprint,
        "model": shape.to_dict() if shape is not None else None,
        "train": config.to_dict(),
    }


def _refuse_changes(
    was: dict[str, Any], now: dict[str, Any], allow: Collection[str], out: Path
) -> None:
    changes = []
    for section, value in now.items():
        pairs = value.items() if isinstance(value, dict) else [(section, value)]
        before = was[section] if isinstance(was[section], dict) else {section: was[section]}
        for key, new in pairs:
            if before.get(key) != new and key not in _FREE and key not in allow:
                changes.append(f"{key} {before.get(key)!r} -> {new!r}")
    if changes:
        raise UsageError(
            f"{out} was begun with other settings ({', '.join(changes)}); use the old ones, allow "
            f"these changes by name, or choose another folder"
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (shared ones once) and the buffers that belong to the model's state."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pygpt": __version__,
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)


def _read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl up to the first line that a crash left unfinished."""
    entries = []
    with contextlib.suppress(json.JSONDecodeError, FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            entries.append(json.loads(line))
    return entries


def _trim_log(out: Path, step: int) -> None:
    """Keep the log up to the update that made `step`; what came after will be done again."""
    kept = [e for e in _read_log(out) if e["step"] < step or (e["step"] == step and "loss" in e)]
    temporary = out / "metrics.tmp"
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    temporary.replace(out / "metrics.jsonl")


# --- pretraining ----------------------------------------------------------------------------------


class Pretraining:
    """Predict the next token of every window of a data set."""

    name = "pretrain"

    def __init__(self, data: Dataset, context_length: int, config: TrainConfig) -> None:
        self.data, self.context_length, self.config = data, context_length, config
        self.fingerprint = data.fingerprint
        data.batch(
            range(1), context_length, config.seed
        )  # too little text is an error before step 0
        self._validation = data.validation.starts(context_length)
        per_token = data.validation.ids.size / max(1, data.validation.characters)
        self._tokens_per_character = per_token

    def batch(self, positions: range) -> Batch:
        windows = self.data.batch(positions, self.context_length, self.config.seed)
        return _shifted(torch.from_numpy(windows))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        total: Tensor = model.loss(batch["ids"], batch["targets"], reduction="sum")  # type: ignore[operator]
        return total, batch["targets"].numel()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss a token over the validation windows, or over an even selection of them."""
        starts, size = self._validation, self.config.micro_batch_size or self.config.batch_size
        if self.config.eval_batches and self.config.eval_batches * size < len(starts):
            chosen = torch.linspace(0, len(starts) - 1, self.config.eval_batches * size)
            starts = starts[chosen.round().long().numpy()]
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for first in range(0, len(starts), size):
            windows = self.data.validation.window(starts[first : first + size], self.context_length)
            batch = {k: v.to(device) for k, v in _shifted(torch.from_numpy(windows)).items()}
            summed, targets = self.loss(model, batch)
            total += float(summed)
            count += targets
        loss = total / count
        bits = loss / math.log(2) * self._tokens_per_character
        return {"val_loss": loss, "val_bits_per_character": bits}


def pretrain(
    model: nn.Module,
    data: Dataset | str | Path,
    config: TrainConfig,
    *,
    out: str | Path,
    resume: str | Path = "auto",
    allow: Collection[str] = (),
    sample: Callable[[nn.Module], str] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Run:
    """Train `model` to predict the next token of prepared `data`; see `fit` for the rest.

    The context length is the model's. The data's tokenizer is saved with the model.
    """
    if not isinstance(data, Dataset):
        data = Dataset.open(data)
    shape: Any = model.config
    if data.vocab_size > shape.vocab_size:
        raise UsageError(
            f"the data has ids up to {data.vocab_size - 1}, but the model's vocab_size is "
            f"{shape.vocab_size}; give the model the tokenizer's n_vocab"
        )
    return fit(
        model,
        Pretraining(data, shape.context_length, config),
        config,
        out=out,
        resume=resume,
        allow=allow,
        tokenizer=Tokenizer.from_file(data.folder / "tokenizer.json"),
        sample=sample,
        on_event=on_event,
    )


def _shifted(windows: Tensor) -> Batch:
    return {"ids": windows[:, :-1].contiguous(), "targets": windows[:, 1:].contiguous()}
