"""Texts sorted into classes: a linear head reads the hidden state of each text's last token."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pygpt import ops
from pygpt.config import GPTConfig, LoRAConfig, TrainConfig
from pygpt.errors import DataError
from pygpt.finetune.lora import LoRAModel
from pygpt.finetune.records import Labelled, Source, balance, load_parts, read_labelled, write
from pygpt.finetune.tuning import (
    Order,
    batches_by_length,
    book_config,
    check_vocabulary,
    end_of_text,
    evaluating,
    fingerprint,
    model_folder,
    pad,
    tune,
)
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer
from pygpt.training import Batch, Event

Trains = Literal["all", "last_block", "head"]

_BINS = 15


def classify(
    model: GPT,
    tok: Tokenizer,
    data: Source | Mapping[str, Source],
    config: TrainConfig | None = None,
    *,
    out: str | Path,
    trains: Trains = "all",
    lora: LoRAConfig | None = None,
    balanced: bool = False,
    split: tuple[float, float, float] = (0.7, 0.1, 0.2),
    resume: str | Path = "auto",
    on_event: Callable[[Event], None] | None = None,
) -> Classifier:
    """Teach a copy of `model` to sort texts into classes; `model` itself stays as it is.

    `data` is whatever `read_labelled` takes, split by `split` and the configuration's seed into
    train, validation and test with equal texts and groups kept together, or a mapping with sources
    for "train", "validation" and perhaps "test". `balanced` first reduces every class to the size
    of the rarest. `trains` says what learns: "all", the "last_block" with final norm and head (the
    book's choice), or the "head"; with `lora`, low-rank additions to the weights, and the head.
    Without a `config`: five epochs with the book's settings, which suit a pretrained GPT-2; a small
    or fresh model wants a higher learning rate.

    The run's folder `out` also receives `test.jsonl` and the classifier's `report.json` on it.
    Texts longer than the context are cut, with a warning that counts them.

    >>> clf = classify(model, tok, "spam.csv", out="runs/spam")  # doctest: +SKIP
    """
    check_vocabulary(model, tok)
    if lora is not None and trains != "all":
        raise ValueError(f"lora says what learns; leave trains at 'all', got {trains!r}")
    seed = 0 if config is None else config.seed

    def prepare(rows: list[Labelled]) -> list[Labelled]:
        labels = sorted({row.label for row in rows})
        if len(labels) < 2:
            raise DataError(f"there is only one class, {labels[0]!r}; nothing can be learned")
        return balance(rows, seed) if balanced else rows

    parts = load_parts(data, read_labelled, split, seed, prepare)
    labels = tuple(sorted({row.label for row in parts["train"]}))
    config = config or book_config(len(parts["train"]), epochs=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = GPTClassifier(copy.deepcopy(model), labels)
    classifier.choose(trains)
    task = _Classification(parts, classifier, tok, config, [trains, lora and asdict(lora)])
    tuned: nn.Module = classifier
    if lora is not None:
        tuned = LoRAModel(classifier, lora)
        if "head" not in lora.targets:
            classifier.head.requires_grad_(True)
    tune(tuned, task, config, out=out, resume=resume, tokenizer=tok, on_event=on_event)
    result = Classifier(classifier, tok)
    if parts["test"]:
        write(parts["test"], Path(out) / "test.jsonl")
        figures = result.report(parts["test"]).to_dict()
        (Path(out) / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    return result


class GPTClassifier(nn.Module):
    """A GPT whose hidden state at the last token of a text goes through a linear head.

    Texts stand in a right-padded batch: causal attention keeps every real token from seeing the
    padding, and the head reads a real token, so a text's logits do not depend on its neighbours.
    """

    def __init__(self, gpt: GPT, labels: Sequence[str]) -> None:
        super().__init__()
        self.gpt, self.labels = gpt, tuple(labels)
        self.head = nn.Linear(gpt.config.emb_dim, len(self.labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:  # (B, T), (B,) -> (B, labels)
        hidden = self.gpt.hidden(ids)
        rows = torch.arange(len(lengths), device=ids.device)
        return self.head(hidden[rows, lengths - 1])  # type: ignore[no-any-return]

    @property
    def config(self) -> GPTConfig:
        """The shape of the GPT."""
        return self.gpt.config

    def choose(self, trains: Trains) -> None:
        """Let only the named part learn."""
        learning: dict[str, list[nn.Module]] = {
            "all": [self],
            "last_block": [self.gpt.blocks[-1], self.gpt.final_norm, self.head],
            "head": [self.head],
        }
        if trains not in learning:
            raise ValueError(f"trains must be one of {', '.join(learning)}, got {trains!r}")
        self.requires_grad_(False)
        for module in learning[trains]:
            module.requires_grad_(True)
        if self.gpt.out_head is not None:
            self.gpt.out_head.requires_grad_(False)  # no next token is asked for

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """The GPT in Hugging Face layout, with `head.safetensors` and `labels.json` beside it."""
        folder = Path(folder)
        self.gpt.save_pretrained(folder, tokenizer)
        save_file(self.head.state_dict(), folder / "head.safetensors")
        (folder / "labels.json").write_text(json.dumps(self.labels) + "\n")


class Classifier:
    """A fine-tuned model and its tokenizer; made by `classify` or `Classifier.load`."""

    def __init__(self, model: GPTClassifier, tok: Tokenizer) -> None:
        self.model, self.tok, self.labels = model, tok, model.labels

    def predict(self, texts: Sequence[str], *, batch_size: int = 32) -> list[str]:
        """The most probable label of each text.

        >>> clf.predict(["You won a prize, call now"])  # doctest: +SKIP
        ['spam']
        """
        best = self.probabilities(texts, batch_size=batch_size).argmax(-1)
        return [self.labels[i] for i in best.tolist()]

    def probabilities(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """The probability of each label: (len(texts), len(labels)), float32 on the CPU.

        Texts longer than the context are judged by their beginning, with a warning.
        """
        return self._log_probabilities(texts, batch_size).exp()

    def report(self, dataset: Source, *, batch_size: int = 32) -> Report:
        """Accuracy, precision, recall, F1, confusion and calibration on labelled texts.

        `dataset` is whatever `read_labelled` takes. Raises DataError where it is empty or has a
        label that the classifier does not know.
        """
        rows = read_labelled(dataset)
        truth = torch.tensor(_label_ids(rows, self.labels))
        texts = [row.text for row in rows]
        return report(self._log_probabilities(texts, batch_size), truth, self.labels)

    def _log_probabilities(self, texts: Sequence[str], batch_size: int) -> Tensor:
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got a string; put it into a list")
        rows = _encode(self.tok, texts, self.model)
        return _log_probabilities(self.model, rows, len(self.labels), batch_size)

    def save(self, folder: str | Path) -> None:
        """Write model, head, labels and tokenizer to `folder`, for `Classifier.load`."""
        self.model.save_pretrained(folder, self.tok)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> Self:
        """The classifier in a run's folder or in a folder that `save` wrote."""
        folder = model_folder(folder, "labels.json", "finetune classify")
        gpt = GPT.from_pretrained(folder, device=device)
        model = GPTClassifier(gpt, json.loads((folder / "labels.json").read_text()))
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        return cls(model.to(gpt.head_weight.device).eval(), Tokenizer.from_file(folder))


@dataclass(frozen=True)
class Report:
    """How a classifier does on labelled texts.

    `confusion[i][j]` counts texts of class i that were taken for class j; `majority` is the
    accuracy of always naming the most frequent class; `calibration_error` is the expected
    calibration error over 15 bins (Guo et al., "On Calibration of Modern Neural Networks", 2017);
    `loss` is in nats a text.
    """

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    loss: float
    calibration_error: float

    @property
    def support(self) -> tuple[int, ...]:
        """Texts of each class."""
        return tuple(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """The share of texts that were given their own class."""
        return sum(row[i] for i, row in enumerate(self.confusion)) / sum(self.support)

    @property
    def majority(self) -> float:
        """The accuracy of naming the most frequent class every time."""
        return max(self.support) / sum(self.support)

    @property
    def precision(self) -> tuple[float, ...]:
        """Of the texts that were given each class, the share that is of it; 0 where none was."""
        given = [sum(column) for column in zip(*self.confusion, strict=True)]
        return tuple(row[i] / max(given[i], 1) for i, row in enumerate(self.confusion))

    @property
    def recall(self) -> tuple[float, ...]:
        """Of the texts of each class, the share that was given it; 0 where there is none."""
        return tuple(row[i] / max(sum(row), 1) for i, row in enumerate(self.confusion))

    @property
    def f1(self) -> tuple[float, ...]:
        """The harmonic mean of precision and recall, per class."""
        pairs = zip(self.precision, self.recall, strict=True)
        return tuple(2 * p * r / (p + r) if p + r else 0.0 for p, r in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values, ready for JSON."""
        derived = ("accuracy", "majority", "support", "precision", "recall", "f1")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        width = max(map(len, self.labels))
        lines = [f"{'':{width}}  precision  recall     f1  texts"]
        columns = (self.labels, self.precision, self.recall, self.f1, self.support)
        for label, p, r, f1, texts in zip(*columns, strict=True):
            lines.append(f"{label:{width}}  {p:9.3f}  {r:6.3f}  {f1:5.3f}  {texts:5}")
        lines.append(
            f"accuracy {self.accuracy:.1%} (majority class {self.majority:.1%}), "
            f"loss {self.loss:.3f}, calibration error {self.calibration_error:.3f}"
        )
        return "\n".join(lines)


def report(log_probabilities: Tensor, truth: Tensor, labels: Sequence[str]) -> Report:
    """The figures for (texts, labels) `log_probabilities` where `truth`, (texts,), is the class."""
    n = len(labels)
    best = log_probabilities.argmax(-1)
    confidence = log_probabilities.double().exp().amax(-1)
    confusion = torch.bincount(truth * n + best, minlength=n * n).view(n, n)
    bins = (confidence * _BINS).ceil().long()
    gaps = torch.bincount(bins, weights=(best == truth).double() - confidence).abs()
    return Report(
        tuple(labels),
        tuple(map(tuple, confusion.tolist())),
        loss=float(F.nll_loss(log_probabilities, truth)),
        calibration_error=float(gaps.sum()) / len(truth),
    )


class _Classification:
    """The task for `training.fit`."""

    name = "classify"

    def __init__(
        self,
        parts: Mapping[str, list[Labelled]],
        model: GPTClassifier,
        tok: Tokenizer,
        config: TrainConfig,
        method: Any,
    ) -> None:
        rows, held_out = parts["train"], parts["validation"]
        self.labels = model.labels
        self.texts = _encode(tok, [row.text for row in rows], model)
        self.classes = _label_ids(rows, model.labels)
        self.batch_size = config.micro_batch_size or config.batch_size
        limit = config.eval_batches * self.batch_size or len(held_out)
        self.held_out = _encode(tok, [row.text for row in held_out[:limit]], model)
        self.truth = torch.tensor(_label_ids(held_out[:limit], model.labels))
        _label_ids(parts["test"], model.labels)  # an unknown label is an error before step 0
        self.order = Order([len(ids) for ids in self.texts], config.batch_size, config.seed)
        self.fingerprint = fingerprint(self.texts, self.classes, model.labels, method)

    def batch(self, positions: range) -> Batch:
        chosen = self.order[positions]
        texts = [self.texts[i] for i in chosen]
        return {
            "ids": pad(texts),
            "lengths": torch.tensor([len(ids) for ids in texts]),
            "classes": torch.tensor([self.classes[i] for i in chosen]),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        logits = model(batch["ids"], batch["lengths"])
        return ops.cross_entropy(logits, batch["classes"], reduction="sum"), len(batch["classes"])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        found = _log_probabilities(model, self.held_out, len(self.labels), self.batch_size)
        figures = report(found, self.truth, self.labels)
        return {"val_loss": figures.loss, "val_accuracy": figures.accuracy}


def _log_probabilities(
    model: nn.Module, texts: Sequence[Sequence[int]], n_labels: int, batch_size: int
) -> Tensor:
    """(texts, labels) float32 on the CPU."""
    result = torch.empty(len(texts), n_labels)
    with evaluating(model) as device:
        for batch in batches_by_length([len(ids) for ids in texts], batch_size):
            rows = [texts[i] for i in batch]
            lengths = torch.tensor([len(ids) for ids in rows])
            logits = model(pad(rows).to(device), lengths.to(device))
            result[batch] = logits.float().log_softmax(-1).cpu()
    return result


def _encode(tok: Tokenizer, texts: Sequence[str], model: GPTClassifier) -> list[list[int]]:
    """The ids of each text, cut to the context, closed by end-of-text where there is such."""
    end = end_of_text(tok)
    limit = model.config.context_length - len(end)
    rows = tok.encode_ordinary_batch(list(texts))
    if not end and not all(rows):
        raise DataError(
            f"text {1 + rows.index([])} is empty, and the tokenizer has no end-of-text token"
        )
    if cut := sum(len(ids) > limit for ids in rows):
        warnings.warn(
            f"{cut} of {len(rows)} texts are longer than the context of "
            f"{model.config.context_length} tokens; only their beginnings are read",
            stacklevel=2,
        )
    return [ids[:limit] + end for ids in rows]


def _label_ids(rows: Sequence[Labelled], labels: Sequence[str]) -> list[int]:
    index = {label: i for i, label in enumerate(labels)}
    for number, row in enumerate(rows, 1):
        if row.label not in index:
            known = ", ".join(labels)
            raise DataError(f"text {number} has the unknown label {row.label!r}; known: {known}")
    return [index[row.label] for row in rows]
