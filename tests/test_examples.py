"""Scripts in examples/ run as a user would run them, on something small; so do docstrings."""

from __future__ import annotations

import doctest
import importlib
import json
import random
import runpy
from pathlib import Path

import pytest

import pygpt
from pygpt import GPT, GPTConfig, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, name: str, *arguments: object) -> None:
    """The script as `python examples/NAME ARGUMENTS`."""
    path = EXAMPLES / name
    assert len(path.read_text().splitlines()) < 40
    monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def model_folder(tmp_path):
    """A small fresh model with bytes as tokens."""
    ranks = {bytes([i]): i for i in range(256)}
    tok = Tokenizer(
        "bytes", pat_str="gpt2", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}
    GPT(GPTConfig(vocab_size=257, context_length=256, **shape)).save_pretrained(
        tmp_path / "model", tok
    )
    return tmp_path / "model"


def test_classify(monkeypatch, capsys, tmp_path, model_folder):
    rows = [f"{'spam,win' if i % 2 else 'ham,see you'} {i}\n" for i in range(40)]
    (tmp_path / "a.csv").write_text("label,text\n" + "".join(rows))
    run(monkeypatch, "classify.py", model_folder, tmp_path / "a.csv", tmp_path / "run", 2)
    said = capsys.readouterr().out
    assert "right on validation texts" in said and "majority class 50.0%" in said
    assert (tmp_path / "run" / "report.json").exists()


def test_instruct(monkeypatch, capsys, tmp_path, model_folder):
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    run(monkeypatch, "instruct.py", model_folder, tmp_path / "a.json", tmp_path / "run", 2)
    said = capsys.readouterr().out
    assert "validation loss" in said and "'tasks': 4" in said
    assert (tmp_path / "run" / "model" / "template.json").exists()


def test_pretrain_then_generate(monkeypatch, capsys, tmp_path):
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8000)]
    (tmp_path / "book.txt").write_text(" ".join(words))
    run(monkeypatch, "pretrain.py", tmp_path / "book.txt", tmp_path / "run", "--steps", 2)
    assert "validation loss" in capsys.readouterr().out
    run(monkeypatch, "generate.py", tmp_path / "run", "bada", "--tokens", 5)
    assert capsys.readouterr().out.startswith("bada")


PACKAGE = Path(pygpt.__file__).parent
DOCUMENTED = [path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings_give_what_they_say(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    assert not doctest.testmod(importlib.import_module(name.removesuffix(".__init__"))).failed
