"""The six acts of `pygpt demo`: read, tokenize, pretrain, classify, instruct, report."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pygpt import ops, reference
from pygpt.config import DemoConfig, GPTConfig, TrainConfig
from pygpt.data import Dataset, prepare_texts, read_documents, split_documents
from pygpt.demo import corpus, report, tasks
from pygpt.demo.display import Display, table
from pygpt.errors import DataError, UsageError
from pygpt.finetune.classification import Classifier, classify
from pygpt.finetune.instruction import TEMPLATES, InstructModel, instruct
from pygpt.generation import generate
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer
from pygpt.training import Pretraining, Run, choose_device, choose_dtype, pretrain, steps_for

VOCAB_SIZE = 1024
SHAPE = GPTConfig(
    VOCAB_SIZE,
    context_length=128,
    emb_dim=128,
    n_heads=4,
    n_layers=4,
    drop_rate=0.0,
    tie_weights=True,
    init_std=0.08,
)
PRETRAIN_SECONDS = 80.0  # of the three minutes
MOMENTS = 4  # samples at the start and after each of so many parts of pretraining
# Steps of the other acts for each of pretraining's, by what a step of each costs.
CLASSIFY_SHARE, INSTRUCT_SHARE = 0.1, 0.25
N_CLASSES, CLASS_TOKENS, TEST_PER_CLASS = 6, 64, 60
N_QUESTIONS, N_SHOWN = 350, 8
PROMPT = "Return a list of"
# What a demo leaves in its folder, the first to go first.
KEPT = ("demo.json", "report.html", "data", "pretrain", "classify", "instruct", "scratch")
SENTENCE = "Parse the given arguments and return a new dictionary."


@dataclass
class DemoResult:
    """What the demo found, act by act, and where it is kept."""

    folder: Path
    acts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long all acts took together."""
        return float(sum(act["seconds"] for act in self.acts.values()))


def run_demo(config: DemoConfig | None = None, console: Console | None = None) -> DemoResult:
    """Run the demo into `config.out`, telling the story on `console`.

    An act that is finished is not repeated when an interrupted demo is started again; a finished
    demo starts anew. Raises Stopped on Ctrl-C, after a checkpoint; UsageError where the folder
    holds something else or an unfinished demo with other settings.
    """
    demo = _Demo(config or DemoConfig(), console or Console(highlight=False))
    demo.act(1, "read", demo.read)
    demo.act(2, "tokenize", demo.tokenize)
    demo.act(3, "pretrain", demo.pretrain)
    if not demo.config.text:
        demo.act(4, "classify", demo.classify)
        demo.act(5, "instruct", demo.instruct)
    demo.act(6, "report", demo.report)
    demo.summary()
    return demo.result


class _Demo:
    """What the acts share: the settings, the story so far, and what later acts need."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self.config, self.console, self.folder = config, console, Path(config.out)
        self.state_file = self.folder / "demo.json"
        settings = {**config.to_dict(), "out": None, "text": list(config.text)}
        self.state: dict[str, Any] = {"settings": settings, "acts": {}}
        self._open()
        self.result = DemoResult(self.folder, self.state["acts"])
        device = choose_device(config.device)
        self.device = str(device)
        self.say(
            f"[bold]pygpt demo[/]  one GPT, from text to answers, in about {config.minutes:g} min\n"
            f"[dim]{_machine(device)}; seed {config.seed}; "
            f"everything is kept in {self.folder}[/]"
        )

    def _open(self) -> None:
        """Begin in an empty folder, go on from an unfinished demo, or replace a finished one."""
        if self.state_file.exists():
            found = json.loads(self.state_file.read_text())
            if "report" in found["acts"]:
                for path in map(self.folder.joinpath, KEPT):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            elif found["settings"] == self.state["settings"]:
                self.state = found
            else:
                raise UsageError(
                    f"{self.folder} holds an unfinished demo with other settings; "
                    f"repeat those, remove the folder, or give another one with --out"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UsageError(f"{self.folder} holds something else; give an empty folder with --out")
        self.folder.mkdir(parents=True, exist_ok=True)

    def act(self, number: int, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """One act; what it found is kept, so that an interrupted demo goes on after it."""
        self.say("")
        self.console.rule(f"[bold]{number}  {name.capitalize()}", align="left", style="dim")
        begin = time.perf_counter()
        before = self.state["acts"].get(name, {}).get("seconds", 0.0)
        found = work()
        seconds = before or time.perf_counter() - begin
        self.state["acts"][name] = {**found, "seconds": seconds}
        self.save()

    def save(self) -> None:
        """Write the story so far, whole or not at all."""
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1, default=str) + "\n")
        temporary.replace(self.state_file)

    def say(self, text: Any) -> None:
        """A line or a table of the story."""
        self.console.print(text, soft_wrap=not isinstance(text, Table))

    def fresh_model(self, vocab_size: int) -> GPT:
        """The demo's network before it has learned anything; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return GPT(replace(SHAPE, vocab_size=vocab_size))

    # --- 1 ---

    def read(self) -> dict[str, Any]:
        """Find the text: the standard library's, or the user's."""
        if self.config.text:
            texts = [text for path in self.config.text for text in read_documents(Path(path))]
            self.train, self.held_out = split_documents(texts, 0.1, self.config.seed)
            self.say(
                f"{len(texts):,} documents, {sum(map(len, texts)):,} characters of your own text; "
                f"{sum(map(len, self.held_out)):,} of them held out"
            )
            self.prompt = " ".join(re.findall(r"\w+", self.held_out[0])[1:5]) or PROMPT
            return {"characters": sum(map(len, texts)), "documents": len(texts)}
        self.prompt = PROMPT
        self.corpus = corpus.read_standard_library()
        self.train = [document.text for document in self.corpus.train]
        self.held_out = [document.text for document in self.corpus.held_out]
        modules = [{d.module for d in part} for part in (self.corpus.train, self.corpus.held_out)]
        characters = sum(map(len, self.train)), sum(map(len, self.held_out))
        self.say(
            f"[bold]{sum(characters):,} characters[/] of English: the docstrings of Python's "
            f"standard library,\nparsed, never run, in {len(self.train) + len(self.held_out):,} "
            f"texts without copies. Held out for everything that follows:\n{len(modules[1])} of "
            f"the {len(modules[0]) + len(modules[1])} modules, with {characters[1]:,} characters."
        )
        return {
            "characters": sum(characters),
            "documents": len(self.train) + len(self.held_out),
            "held_out_modules": sorted(modules[1]),
        }

    # --- 2 ---

    def tokenize(self) -> dict[str, Any]:
        """Train the vocabulary, show what it does, and race it against its Python twin."""
        begin = time.perf_counter()
        self.tok = Tokenizer.train(self.train, VOCAB_SIZE)
        trained = time.perf_counter() - begin
        begin = time.perf_counter()
        ids = self.tok.encode_ordinary_batch(self.train)
        encoded = time.perf_counter() - begin
        size, tokens = sum(len(t.encode()) for t in self.train), sum(map(len, ids))
        twin_speed = _twin_speed(self.tok, self.train)
        pieces = [_piece(self.tok, i) for i in self.tok.encode_ordinary(SENTENCE)]
        shown = Text("  ")
        for i, piece in enumerate(pieces):
            shown.append("│" if i else "", style="dim")
            shown.append(piece, style=("bold cyan", "bold yellow")[i % 2])
        self.say(
            f"A byte-level BPE of [bold]{self.tok.n_vocab:,} tokens[/], trained in {trained:.2f} s."
            f" A sentence in its {len(pieces)} pieces:"
        )
        self.say(shown)
        self.say(
            f"Encoding {size / 1e6:.1f} MB takes {encoded:.3f} s, "
            f"{size / tokens:.2f} bytes a token.\n"
            f"The same in pure Python: {size / twin_speed:.1f} s, "
            f"[bold]{size / twin_speed / encoded:,.0f} times[/] as long."
        )
        return {
            "vocab_size": self.tok.n_vocab,
            "train_seconds": trained,
            "encode_seconds": encoded,
            "twin_seconds": size / twin_speed,
            "bytes_per_token": size / tokens,
            "pieces": pieces,
        }

    # --- 3 ---

    def pretrain(self) -> dict[str, Any]:
        """Teach the network to predict the next token."""
        done = self.state["acts"].get("pretrain")
        if done:
            self.model = GPT.from_pretrained(self.folder / "pretrain", device=self.device)
            self.say(f"Done before: {done['bits_per_character']:.3f} bits per character.")
            return dict(done)
        data = prepare_texts(self.train, self.held_out, self.tok, self.folder / "data")
        model = self.model = self.fresh_model(self.tok.n_vocab).to(self.device)
        config = self._pretraining_config(model, data)
        characters = data.validation.characters
        text = "\n\n".join(self.held_out).encode()
        zipped = {
            "gzip": 8 * len(gzip.compress(text, 9)) / characters,
            "bz2": 8 * len(bz2.compress(text, 9)) / characters,
        }
        per_token = data.train.characters / len(data.train.ids)
        blind = math.log2(self.tok.n_vocab) / per_token
        self.say(
            f"[bold]{model.num_params:,} parameters[/], {config.steps:,} steps of "
            f"{config.batch_size} x {SHAPE.context_length} tokens, {self._whence()}.\n"
            f"Bits per character of held-out text: gzip needs {zipped['gzip']:.2f}, "
            f"bz2 {zipped['bz2']:.2f}, blind guessing {blind:.2f}."
        )

        def sample(gpt: Any) -> str:
            ids = self.tok.encode_ordinary(self.prompt)
            longer = generate(
                gpt, ids, 28, temperature=0.6, seed=self.config.seed, eos_id=self.tok.eot_token
            )
            return " ".join(self.tok.decode(longer[len(ids) :]).split())

        with Display(self.console, "learning", self.prompt) as display:
            run = pretrain(
                model, data, config, out=self.folder / "pretrain", sample=sample, on_event=display
            )
        whole = Pretraining(data, SHAPE.context_length, replace(config, eval_batches=0))
        with torch.inference_mode():
            bits = whole.evaluate(model)["val_bits_per_character"]
        verdict = ", ".join(
            f"{'better than' if bits < value else 'not yet'} {name}"
            for name, value in zipped.items()
        )
        self.say(f"All held-out text: [bold]{bits:.3f} bits per character[/], {verdict}.")
        return {
            "steps": config.steps,
            "parameters": model.num_params,
            "bits_per_character": bits,
            **zipped,
            "characters_per_token": per_token,
            "tokens_per_second": _median_speed(run),
            "prompt": self.prompt,
            "samples": run.samples,
        }

    def _pretraining_config(self, model: GPT, data: Dataset) -> TrainConfig:
        config = TrainConfig(
            steps=1,
            batch_size=16,
            lr=3e-3,
            min_lr=2e-4,
            beta2=0.98,
            eval_batches=8,
            device=self.config.device,
            seed=self.config.seed,
        )
        steps = self.state.get("steps") or self.config.steps
        if not steps:
            task = Pretraining(data, SHAPE.context_length, config)
            seconds = PRETRAIN_SECONDS * self.config.minutes / 3
            probe = min(3.0, seconds / 4)
            steps = steps_for(seconds, model, task, config, evaluations=8, probe_seconds=probe)
            steps = max(8, steps // 8 * 8)
        self.state["steps"] = steps
        self.save()
        part = max(1, steps // MOMENTS)
        return replace(
            config,
            steps=steps,
            eval_every=max(1, steps // 8),
            sample_every=part,
            checkpoint_every=part,
        )

    def _whence(self) -> str:
        if self.config.steps:
            return "as asked"
        return (
            f"by a short probe (--steps {self.state['steps']} --seed {self.config.seed} repeats it)"
        )

    # --- 4 ---

    def classify(self) -> dict[str, Any]:
        """Teach copies of the pretrained and of a fresh network to name a docstring's package."""
        train, test, labels = _labelled(self.corpus, self.tok, self.config.seed)
        steps = max(2, round(CLASSIFY_SHARE * self.state["steps"]))
        self.say(
            f"Which package is a docstring from: {', '.join(labels)}?\n"
            f"{len(train):,} texts to learn from, {len(test)} of held-out modules to test; "
            f"{steps} steps for either network."
        )
        config = TrainConfig(
            steps=steps,
            batch_size=16,
            lr=1e-3,
            eval_every=0,
            checkpoint_every=0,
            device=self.config.device,
            seed=self.config.seed,
        )
        parts = {"train": train[:-16], "validation": train[-16:], "test": test}
        figures: dict[str, Any] = {"majority class": 1 / len(labels)}
        with Display(self.console) as display:
            for name, model, out in self._pair("classify"):
                display.title = name
                tuned: Classifier = classify(
                    model, self.tok, parts, config, out=out, on_event=display
                )
                found = tuned.report(test)
                figures[name] = found.accuracy
        linear = _tfidf(train, test)
        if linear is None:
            self.say("[yellow]scikit-learn is not installed (extra: demo); no TF-IDF row.[/]")
        else:
            figures["TF-IDF + logistic regression"] = linear
        self.say(table(("", "held-out accuracy"), _percentages(figures), best="fine-tuned"))
        return {
            "steps": steps,
            "labels": list(found.labels),
            "confusion": found.confusion,
            "test": len(test),
            "accuracy": figures,
        }

    def _pair(self, task: str) -> list[tuple[str, GPT, Path]]:
        """The two networks that get equal tuning, with the folders that their runs are kept in."""
        return [
            ("from scratch", self.fresh_model(self.tok.n_vocab), self.folder / "scratch" / task),
            ("fine-tuned", self.model, self.folder / task),
        ]

    # --- 5 ---

    def instruct(self) -> dict[str, Any]:
        """Teach copies of both to follow instructions, and test them on words never instructed."""
        words = tasks.choose_words(corpus.words(self.corpus.train), self.tok)
        steps = max(2, round(INSTRUCT_SHARE * self.state["steps"]))
        config = TrainConfig(
            steps=steps,
            batch_size=32,
            lr=2e-3,
            eval_every=0,
            checkpoint_every=max(1, steps // 2),
            device=self.config.device,
            seed=self.config.seed,
        )
        rows = tasks.training_examples(words, steps * config.batch_size, self.config.seed)
        test = tasks.test_examples(words, N_QUESTIONS, self.config.seed + 1)
        questions = [(row["instruction"], row["input"]) for row in test]
        wanted = [row["output"].strip() for row in test]
        parts = {"train": rows, "validation": test[:32], "test": test}
        self.say(
            f"{len(tasks.TASKS)} instructions whose answers Python computes. Training takes "
            f"{len(words.known):,} words of the corpus and invented ones;\nthe test takes "
            f"{len(words.held_out)} other words, which no training instruction holds. "
            f"{steps} steps for either network."
        )
        answers = {
            "before": InstructModel(self.model, self.tok, TEMPLATES["short"]).replies(
                questions, max_new_tokens=24
            )
        }
        with Display(self.console) as display:
            for name, model, out in self._pair("instruct"):
                display.title = name
                chat = instruct(
                    model, self.tok, parts, config, out=out, template="short", on_event=display
                )
                answers[name] = chat.replies(questions, max_new_tokens=24)
        right = {
            name: [a == b for a, b in zip(given, wanted, strict=True)]
            for name, given in answers.items()
        }
        share = {name: sum(marks) / len(marks) for name, marks in right.items()}
        by_task = {
            task.instruction: {n: _mean(marks[i :: len(tasks.TASKS)]) for n, marks in right.items()}
            for i, task in enumerate(tasks.TASKS)
        }
        rows_shown = [
            [name, *(f"{x:.0%}" for x in values.values())]
            for name, values in {**by_task, "all": share}.items()
        ]
        self.say(table(("exact match on held-out words", *share), rows_shown, best="all"))
        marked = [
            {"question": " ".join(q), "answer": a, "wanted": w}
            for q, a, w in zip(questions, answers["fine-tuned"], wanted, strict=True)
        ]
        self.say("The first eight answers, as they came:")
        for one in marked[:N_SHOWN]:
            good = one["answer"] == one["wanted"]
            mark = ("right", "green") if good else ("wrong", "red")
            hint = "" if good else f"  (wanted: {one['wanted']})"
            self.say(
                Text.assemble(
                    "  ",
                    mark,
                    "  ",
                    one["question"],
                    "  ",
                    (one["answer"], "bold"),
                    (hint, "dim"),
                )
            )
        (self.folder / "instruct" / "instructions.json").write_text(
            json.dumps([{"instruction": q, "input": w} for q, w in questions[: len(tasks.TASKS)]])
        )
        return {"steps": steps, "exact_match": share, "by_task": by_task, "answers": marked}

    # --- 6 ---

    def report(self) -> dict[str, Any]:
        """Write the whole story to one file that needs nothing else."""
        losses = _token_losses(self.model, self.tok, max(self.held_out, key=_readable)[:700])
        run = Run.load(self.folder / "pretrain")
        path = report.write(self.folder / "report.html", self.state["acts"], run.metrics, losses)
        if not report.can_draw():
            self.say(
                "[yellow]matplotlib is not installed (extra: demo); the report has no pictures.[/]"
            )
        self.say(f"Written: {path}")
        return {"path": str(path)}

    def summary(self) -> None:
        """What came out, how long it took, and what to type next."""
        acts = self.state["acts"]
        read, cut, learnt = acts["read"], acts["tokenize"], acts["pretrain"]
        lines = {
            "read": f"{read['characters']:,} characters, {read['documents']:,} texts",
            "tokenize": f"{cut['vocab_size']:,} tokens, {cut['bytes_per_token']:.2f} bytes each",
            "pretrain": f"{learnt['bits_per_character']:.3f} bits per character "
            f"(gzip {learnt['gzip']:.2f}, bz2 {learnt['bz2']:.2f})",
        }
        for name, key in (("classify", "accuracy"), ("instruct", "exact_match")):
            if name in acts:
                found = acts[name][key]
                tuned, scratch = found["fine-tuned"], found["from scratch"]
                lines[name] = f"{tuned:.0%} right on held-out ones ({scratch:.0%} from scratch)"
        lines["report"] = acts["report"]["path"]
        rows = [[name, text, f"{acts[name]['seconds']:.1f} s"] for name, text in lines.items()]
        rows.append(["all", "", f"{self.result.seconds:.0f} s"])
        self.say("")
        self.say(table(("act", "result", "time"), rows, best="all"))
        self.say("\nNow type")
        self.say(f'  pygpt generate {self.folder} "{self.prompt}"')
        if "instruct" in acts:
            self.say(f"  pygpt chat {self.folder}")
            self.say(f'  pygpt predict {self.folder} "Parse an RFC 2822 message header."')


def _machine(device: torch.device) -> str:
    """Device, dtype and threads, and what computes attention and samples tokens."""
    dtype = choose_dtype("auto", device, GPT(SHAPE))
    facts = [str(device), str(dtype).removeprefix("torch.")]
    if device.type == "cpu":
        facts.append(f"{torch.get_num_threads()} threads")
    for op in ("causal_attention", "sample"):
        backend, why = ops.chosen_backend(op, device, dtype, SHAPE.head_dim)
        facts.append(f"{op} {backend} ({why})")
    return ", ".join(facts)


def _labelled(
    found: corpus.Corpus, tok: Tokenizer, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[str]]:
    """Docstrings with their package, equally many of each: from training and held-out modules."""
    parts: list[dict[str, list[corpus.Document]]] = []
    for documents in (found.train, found.held_out):
        by_package: dict[str, list[corpus.Document]] = {}
        for document in documents:
            if document.kind != "topic" and len(document.text) >= 40:
                by_package.setdefault(document.package, []).append(document)
        parts.append(by_package)
    train, test = parts

    def room(package: str) -> int:
        return min(len(train[package]), 5 * len(test[package]))

    labels = sorted(sorted(train.keys() & test.keys(), key=room)[-N_CLASSES:])
    if len(labels) < 2:
        raise DataError("this Python's standard library has too few packages with docstrings")
    rng = random.Random(seed)

    def rows(part: dict[str, list[corpus.Document]], most: int) -> list[dict[str, str]]:
        each = min(most, *(len(part[label]) for label in labels))
        chosen = [
            {"text": tok.truncate(d.text, CLASS_TOKENS - 1), "label": label, "group": d.module}
            for label in labels
            for d in rng.sample(part[label], each)
        ]
        rng.shuffle(chosen)
        return chosen

    return rows(train, 10**6), rows(test, TEST_PER_CLASS), labels


def _tfidf(train: Sequence[dict[str, str]], test: Sequence[dict[str, str]]) -> float | None:
    """The accuracy of logistic regression on TF-IDF of words and word pairs."""
    if importlib.util.find_spec("sklearn") is None:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(vectorizer.fit_transform([r["text"] for r in train]), [r["label"] for r in train])
    texts = vectorizer.transform([r["text"] for r in test])
    return float(model.score(texts, [r["label"] for r in test]))


def _twin_speed(tok: Tokenizer, texts: Sequence[str], sample: int = 20_000) -> float:
    """Bytes a second that the pure Python twin encodes; its ids are checked against ours."""
    size, pieces, longest = 0, [], []
    ranks = {
        tok.decode_single_token_bytes(i): i
        for i in range(tok.n_vocab)
        if not tok.is_special_token(i)
    }
    for text in texts:
        # The words of a text, each with the space before it, are whole pieces of the splitter.
        for word in text.split(" "):
            if word.isalpha() and word.isascii():
                pieces.append(" " + word)
                size += len(word) + 1
        if size >= sample:
            break
    begin = time.perf_counter()
    for piece in pieces:
        longest.append(reference.bpe_encode(ranks, piece.encode()))
    seconds = time.perf_counter() - begin
    if longest != [tok.encode_ordinary(piece) for piece in pieces]:
        raise AssertionError("the tokenizer and its Python twin disagree")
    return size / seconds


def _piece(tok: Tokenizer, token: int) -> str:
    return tok.decode_single_token_bytes(token).decode(errors="replace")


@torch.inference_mode()
def _token_losses(model: GPT, tok: Tokenizer, text: str) -> list[tuple[str, float]]:
    """Each piece of `text` with the nats it cost the model, given what stands before it."""
    ids = [tok.eot_token, *tok.encode_ordinary(text)][: model.config.context_length]
    device = model.tok_emb.weight.device
    logits = model(torch.tensor([ids[:-1]], device=device))[0].float()
    targets = torch.tensor(ids[1:], device=device)
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    pieces = [_piece(tok, i) for i in ids[1:]]
    return list(zip(pieces, nats, strict=True))


def _readable(text: str) -> tuple[bool, float]:
    """Orders texts by how well a page shows them: some sentences of ordinary words."""
    words = text.split()
    return 40 <= len(words) <= 80, sum(word.isalpha() for word in words) / max(1, len(words))


def _median_speed(run: Run) -> float:
    speeds = sorted(m["tokens_per_second"] for m in run.metrics if "tokens_per_second" in m)
    return float(speeds[len(speeds) // 2])


def _mean(marks: Sequence[bool]) -> float:
    return sum(marks) / max(1, len(marks))


def _percentages(figures: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:.1%}"] for name, value in figures.items()]
