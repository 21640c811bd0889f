"""One loop: exact under accumulation, resuming, signals and kills; loud about everything else."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pygpt import GPT, GPTConfig, Tokenizer, TrainConfig, ops, pretrain
from pygpt.data import Dataset, prepare
from pygpt.errors import DataError, NumericError, ResourceError, Stopped, UsageError
from pygpt.training import Batch, Event, Pretraining, Run, fit, steps_for

VOCAB, WIDTH = 23, 8
CONFIG = TrainConfig(steps=12, batch_size=4, lr=5e-2, eval_every=5, checkpoint_every=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Embedding, dropout, matrix and bias: the least that has all that the loop must get right."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(ids)))

    def save_pretrained(self, folder: Path, tokenizer: Any = None) -> None:
        save_file(dict(self.named_parameters()), folder / "model.safetensors")


class Successor:
    """Each id is followed by id + 1; samples have different numbers of targets."""

    name = "successor"
    fingerprint = "of the numbers"

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay

    def batch(self, positions: range) -> Batch:
        ids = torch.tensor([[(p + t) % (VOCAB - 1) for t in range(6)] for p in positions])
        targets = ids + 1
        for row, p in enumerate(positions):
            targets[row, 1 + p % 5 :] = -100
        return {"ids": ids, "targets": targets}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        time.sleep(self.delay)
        logits, targets = model(batch["ids"]), batch["targets"]
        summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return summed, int((targets >= 0).sum())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        summed, count = self.loss(model, self.batch(range(8)))
        return {"val_loss": float(summed) / count}


def changed(**changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**CONFIG.to_dict(), **changes})


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_training_lowers_the_loss_and_leaves_a_whole_folder(tmp_path: Path) -> None:
    run = fit(Small(), Successor(), changed(steps=60), out=tmp_path / "run")
    losses = [entry["loss"] for entry in run.metrics if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert [e["step"] for e in run.metrics if "loss" in e] == list(range(1, 61))
    assert [e["step"] for e in run.metrics if "val_loss" in e] == list(range(0, 61, 5))
    assert run.about["data"] == Successor.fingerprint
    assert run.about["machine"]["threads"] == torch.get_num_threads()
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["step-56", "step-60"]


def stop_at(step: int, number: int = signal.SIGINT) -> Any:
    def on_event(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), number)

    return on_event


@pytest.mark.parametrize("step", [1, 3, 4, 5, 11])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    whole = fit(Small(), Successor(), CONFIG, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(Small(), Successor(), CONFIG, out=tmp_path / "cut", on_event=stop_at(step))
    cut = fit(Small(seed=9), Successor(), CONFIG, out=tmp_path / "cut")
    assert digest(cut.folder) == digest(whole.folder)
    timeless = ("step", "loss", "lr", "grad_norm", "val_loss")
    for a, b in zip(whole.metrics, cut.metrics, strict=True):
        assert {k: a[k] for k in timeless if k in a} == {k: b[k] for k in timeless if k in b}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_so(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name} after step 7 of 12") as caught:
        fit(Small(), Successor(), CONFIG, out=tmp_path / "run", on_event=stop_at(7, number))
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert (tmp_path / "run" / "checkpoints" / "step-7" / "manifest.json").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_signal_during_evaluation_stops_it_at_once(tmp_path: Path) -> None:
    class Endless(Successor):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            if next(model.parameters()).grad is None and self.patience:
                self.patience -= 1
                return super().evaluate(model)
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.01)

    task = Endless()
    task.patience = 1
    with pytest.raises(Stopped, match="after step 5 of 12"):
        fit(Small(), task, CONFIG, out=tmp_path / "cut")
    cut = fit(Small(), Successor(), CONFIG, out=tmp_path / "cut")
    whole = fit(Small(), Successor(), CONFIG, out=tmp_path / "whole")
    assert digest(cut.folder) == digest(whole.folder)


def test_a_run_outside_the_main_thread_works(tmp_path: Path) -> None:
    done = []
    thread = threading.Thread(
        target=lambda: done.append(fit(Small(), Successor(), CONFIG, out=tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert done[0].metrics[-1]["step"] == 12


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = digest(fit(Small(), Successor(), CONFIG, out=tmp_path / "run").folder)
    model, events = Small(seed=4), []
    run = fit(model, Successor(), CONFIG, out=tmp_path / "run", on_event=events.append)
    assert digest(run.folder) == first
    assert "step" not in {event.kind for event in events}


# --- kills ---


def victim(out: Path, begun: Any) -> None:
    torch.set_num_threads(1)
    fit(Small(), Successor(), KILLED, out=out, on_event=lambda event: begun.set())


KILLED = changed(steps=30, checkpoint_every=1, eval_every=10)


@pytest.fixture(scope="module")
def forkserver() -> Any:
    """Processes forked from one that has imported torch and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", __name__])
    return context


def test_killed_at_25_random_moments_the_run_ends_with_the_same_bits(
    tmp_path: Path, forkserver: Any
) -> None:
    rng, killed, out, runs = random.Random(25), 0, tmp_path / "cut-0", 1
    while killed < 25:
        begun = forkserver.Event()
        process = forkserver.Process(target=victim, args=(out, begun))
        process.start()
        assert begun.wait(60)
        process.join(rng.uniform(0, 0.3))
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        if process.exitcode == 0:
            out, runs = tmp_path / f"cut-{runs}", runs + 1
    whole = digest(fit(Small(), Successor(), KILLED, out=tmp_path / "whole").folder)
    for number in range(runs):
        out = tmp_path / f"cut-{number}"
        # Other weights, which a checkpoint must replace; killed before its first, it begins anew.
        model = Small(seed=9 if any(out.glob("checkpoints/step-*")) else 0)
        run = fit(model, Successor(), KILLED, out=out)
        assert digest(run.folder) == whole
        steps = [entry["step"] for entry in run.metrics if "loss" in entry]
        assert steps == list(range(1, 31))


def impatient(out: Path) -> None:
    def on_event(event: Event) -> None:
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    fit(Small(), Successor(), CONFIG, out=out, on_event=on_event)


def test_a_second_signal_exits_at_once(tmp_path: Path, forkserver: Any) -> None:
    process = forkserver.Process(target=impatient, args=(tmp_path / "run",))
    process.start()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_resumed_run_keeps_the_product_it_began_with(tmp_path: Path, monkeypatch: Any) -> None:
    # Measured in each process, the faster of two could be another one the next time.
    for wins in (False, True):
        out = tmp_path / str(wins)
        monkeypatch.setattr("pygpt.ops.product._own_wins", {"float32": wins})
        fit(Small(), Successor(), changed(steps=2), out=out)
        monkeypatch.setattr("pygpt.ops.product._own_wins", {"float32": not wins})
        fit(Small(), Successor(), changed(steps=4), out=out, allow={"steps"})
        assert ops.own_products()["float32"] is wins


# --- arithmetic ---


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_gives_the_whole_batchs_gradient(tmp_path: Path, micro: int) -> None:
    models = [Small(), Small()]
    for model, size, name in zip(models, (4, micro), "ab", strict=True):
        model.dropout.p = 0.0
        fit(model, Successor(), changed(micro_batch_size=size), out=tmp_path / name)
    for whole, parts in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_step_is_adamw_on_the_mean_over_targets(tmp_path: Path) -> None:
    ours, plain = Small(), Small()
    ours.dropout.p = plain.dropout.p = 0.0
    config = changed(steps=3, warmup_steps=0, lr=0.01, min_lr=0.01, grad_clip=0.5)
    run = fit(ours, Successor(), config, out=tmp_path / "run")
    matrices = [plain.embedding.weight, plain.head.weight]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [plain.head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for step in range(3):
        batch = Successor().batch(range(4 * step, 4 * step + 4))
        logits = plain(batch["ids"]).flatten(0, 1)
        loss = F.cross_entropy(logits, batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        logged = next(e for e in run.metrics if e["step"] == step + 1 and "loss" in e)
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    config = changed(steps=100, lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [config.learning_rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_the_seed_decides_the_dropout(tmp_path: Path) -> None:
    runs = [
        fit(Small(), Successor(), changed(seed=seed), out=tmp_path / name)
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    first, same, other = (digest(run.folder) for run in runs)
    assert first == same != other


def test_training_leaves_the_random_state_of_the_program_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    model = Small()
    torch.manual_seed(3)
    fit(model, Successor(), CONFIG, out=tmp_path / "run")
    assert torch.equal(torch.rand(2), expected)


def test_a_probe_counts_steps_and_leaves_the_model_alone() -> None:
    model = Small()
    before = [p.clone() for p in model.parameters()]
    task = Successor(delay=0.01)
    steps = steps_for(2.0, model, task, CONFIG, evaluations=5, probe_seconds=0.1)
    assert 1 <= steps <= 200
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- refusals and faults ---


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    class Poisoned(Successor):
        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            summed, count = super().loss(model, batch)
            return summed * (float("inf") if 26 in batch["first"] else 1.0), count

        def batch(self, positions: range) -> Batch:
            return {**super().batch(positions), "first": torch.tensor(positions)}

    model = Small()
    with pytest.raises(NumericError, match=r"at step 7; the weights were left as .* step 6"):
        fit(model, Poisoned(), CONFIG, out=tmp_path / "run")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    report = json.loads((tmp_path / "run" / "not-finite.json").read_text())
    assert report["step"] == 7
    assert report["batch"]["first"] == [24, 25, 26, 27]
    assert not (tmp_path / "run" / "model").exists()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    def second(event: Event) -> None:
        if event.kind == "start":
            with pytest.raises(ResourceError, match="another run is using"):
                fit(Small(), Successor(), CONFIG, out=tmp_path / "run")

    fit(Small(), Successor(), CONFIG, out=tmp_path / "run", on_event=second)


def test_other_settings_are_refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(Small(), Successor(), CONFIG, out=tmp_path / "run", on_event=stop_at(6))
    with pytest.raises(UsageError, match=r"lr 0.05 -> 0.01, beta2 0.99 -> 0.9\)"):
        fit(Small(), Successor(), changed(lr=0.01, beta2=0.9), out=tmp_path / "run")
    task = Successor()
    task.fingerprint = "of other numbers"
    with pytest.raises(UsageError, match="data 'of the numbers' -> 'of other numbers'"):
        fit(Small(), task, CONFIG, out=tmp_path / "run")
    longer = changed(steps=14, eval_every=7, micro_batch_size=2)
    run = fit(Small(), Successor(), longer, out=tmp_path / "run", allow=("steps",))
    assert run.metrics[-1]["step"] == 14


def test_a_run_is_begun_again_only_in_another_folder(tmp_path: Path) -> None:
    fit(Small(), Successor(), CONFIG, out=tmp_path / "run", resume="never")
    with pytest.raises(UsageError, match="already holds a run"):
        fit(Small(), Successor(), CONFIG, out=tmp_path / "run", resume="never")


def test_a_named_checkpoint_is_gone_back_to_and_a_damaged_one_fails(tmp_path: Path) -> None:
    run = fit(Small(), Successor(), CONFIG, out=tmp_path / "run")
    first = digest(run.folder)
    older = run.folder / "checkpoints" / "step-8"
    again = fit(Small(seed=3), Successor(), CONFIG, out=tmp_path / "run", resume=older)
    assert digest(again.folder) == first
    assert [e["step"] for e in again.metrics if "loss" in e] == list(range(1, 13))
    with open(older / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"step-8 is damaged: model.safetensors"):
        fit(Small(), Successor(), CONFIG, out=tmp_path / "run", resume=older)


def test_a_disk_that_fails_costs_a_warning_but_at_the_end_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("pygpt.checkpoint.check_space", full)
    with (
        pytest.warns(UserWarning, match="no checkpoint at step 6: no space"),
        pytest.raises(ResourceError, match="last checkpoint could not be saved: no space"),
    ):
        fit(Small(), Successor(), changed(checkpoint_every=6), out=tmp_path / "run")
    assert [e["step"] for e in Run(tmp_path / "run").metrics if "loss" in e] == list(range(1, 13))


def test_a_model_that_cannot_learn_is_refused(tmp_path: Path) -> None:
    class Detached(Successor):
        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            summed, count = super().loss(model, batch)
            return summed * 0.0, count

    with pytest.raises(UsageError, match="no gradient reaches"):
        fit(Small(), Detached(), CONFIG, out=tmp_path / "run")
    frozen = Small().requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameters"):
        fit(frozen, Successor(), CONFIG, out=tmp_path / "run")


def test_frozen_parameters_stay_and_are_in_the_checkpoint(tmp_path: Path) -> None:
    model = Small()
    model.embedding.requires_grad_(False)
    before = model.embedding.weight.clone()
    with pytest.raises(Stopped):
        fit(model, Successor(), CONFIG, out=tmp_path / "run", on_event=stop_at(6))
    other = Small(seed=8)
    other.embedding.requires_grad_(False)
    fit(other, Successor(), CONFIG, out=tmp_path / "run")
    assert torch.equal(other.embedding.weight, before)


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device 'abacus' cannot be used"):
        fit(Small(), Successor(), changed(device="abacus"), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": -1.0}, "lr must be a finite number"),
        ({"min_lr": 1.0}, "min_lr 1.0 is above lr 0.05"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"batchsize": 1}, "did you mean 'batch_size'"),
    ],
)
def test_a_bad_configuration_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**changes)


# --- pretraining ---


@pytest.fixture
def prepared(tiny_corpus: Path, tmp_path: Path) -> Dataset:
    return prepare(tiny_corpus, Tokenizer.train([tiny_corpus], 300), tmp_path / "data")


def small_gpt(seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    shape = {"vocab_size": 300, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    return GPT(GPTConfig(**{**shape, **changes}))


def test_pretraining_learns_and_leaves_a_model_that_can_be_opened(
    prepared: Dataset, tmp_path: Path
) -> None:
    config = TrainConfig(steps=40, batch_size=8, lr=1e-2, eval_every=20)
    model = small_gpt()
    run = pretrain(model, prepared.folder, config, out=tmp_path / "run")
    values = [entry["val_loss"] for entry in run.metrics if "val_loss" in entry]
    assert values[-1] < values[0] - 1
    bits = values[-1] / math.log(2) * prepared.validation.ids.size / prepared.validation.characters
    assert run.metrics[-1]["val_bits_per_character"] == pytest.approx(bits)
    opened = GPT.from_pretrained(run.folder / "model").eval()
    ids = torch.arange(10)[None]
    torch.testing.assert_close(opened(ids), model(ids))
    tok = Tokenizer.from_file(run.folder / "model" / "tokenizer.json")
    assert tok.encode("the river") == Tokenizer.from_file(prepared.folder).encode("the river")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpt_with_dropout_resumes_to_the_same_bits(
    prepared: Dataset, tmp_path: Path, dtype: Any
) -> None:
    config = TrainConfig(steps=8, batch_size=4, micro_batch_size=2, lr=1e-2, dtype=dtype)
    whole = pretrain(small_gpt(), prepared, config, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        pretrain(small_gpt(), prepared, config, out=tmp_path / "cut", on_event=stop_at(5))
    cut = pretrain(small_gpt(seed=1), prepared, config, out=tmp_path / "cut")
    assert digest(cut.folder) == digest(whole.folder)
    assert whole.about["machine"]["dtype"] == dtype


def test_two_hundred_steps_of_native_ops_lie_on_torchs(prepared: Dataset, tmp_path: Path) -> None:
    losses = {}
    config = changed(steps=200, batch_size=8, lr=1e-3, dtype="float32", eval_every=0)
    for impl in ("native", "torch"):
        with ops.backend(impl):
            run = pretrain(small_gpt(drop_rate=0.0), prepared, config, out=tmp_path / impl)
        losses[impl] = torch.tensor([m["loss"] for m in run.metrics if "loss" in m])
    assert len(losses["torch"]) == 200
    assert losses["torch"][-1] < losses["torch"][0] - 1
    torch.testing.assert_close(losses["native"], losses["torch"], rtol=1e-4, atol=0)


def test_evaluation_can_be_limited_to_some_batches(prepared: Dataset) -> None:
    model, seen = small_gpt().eval(), []
    loss = model.loss
    model.loss = lambda ids, *args, **kwargs: seen.append(len(ids)) or loss(ids, *args, **kwargs)
    config = TrainConfig(batch_size=4, eval_batches=2)
    with torch.no_grad():
        figures = Pretraining(prepared, 16, config).evaluate(model)
    assert seen == [4, 4]
    assert figures["val_loss"] == pytest.approx(math.log(300), abs=0.1)


def test_data_that_does_not_fit_the_model_is_refused(prepared: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ids up to 299, but the model's vocab_size is 299"):
        pretrain(small_gpt(vocab_size=299), prepared, CONFIG, out=tmp_path / "run")
    with pytest.raises(DataError, match="fewer than one window of context_length"):
        pretrain(small_gpt(context_length=10**5), prepared, CONFIG, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the run's folder ---


def test_samples_are_kept_apart_from_figures(tmp_path: Path) -> None:
    config = changed(sample_every=6)
    run = fit(
        Small(),
        Successor(),
        config,
        out=tmp_path / "run",
        sample=lambda model: "training" * model.training + "x",
    )
    assert [(s["step"], s["sample"]) for s in run.samples] == [(0, "x"), (6, "x"), (12, "x")]
    assert not any("sample" in entry for entry in run.metrics)
    assert Run.load(run.folder).samples == run.samples
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        Run.load(tmp_path)


def test_events_tell_the_story(tmp_path: Path) -> None:
    events: list[Event] = []
    fit(Small(), Successor(), CONFIG, out=tmp_path / "run", on_event=events.append)
    kinds = [event.kind for event in events]
    assert kinds[:3] == ["start", "eval", "step"]
    assert kinds[-3:] == ["eval", "checkpoint", "end"]
    assert kinds.count("step") == 12
    step = next(event for event in events if event.kind == "step")
    assert step.values.keys() == {"loss", "lr", "grad_norm", "tokens_per_second", "seconds"}


def test_the_curve_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = fit(Small(), Successor(), CONFIG, out=tmp_path / "run")
    assert run.plot(tmp_path / "curve.svg").read_text().startswith("<?xml")
