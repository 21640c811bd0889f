"""The demo: its text, its tasks, its acts and its report."""

import io
import json
import random
import re

import pytest
from rich.console import Console

from pygpt.config import DemoConfig
from pygpt.demo import corpus, run, tasks
from pygpt.demo.run import run_demo
from pygpt.errors import UsageError
from pygpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def standard_library():
    return corpus.read_standard_library()


def paragraphs(documents):
    return {
        " ".join(paragraph.lower().split())
        for document in documents
        for paragraph in document.text.split("\n\n")
    }


# --- the text ---


def test_standard_library_gives_over_a_million_characters_of_english(standard_library):
    assert standard_library.characters > 1_000_000
    text = " ".join(document.text for document in standard_library.train)
    assert text.count(" the ") > 5_000
    assert ">>>" not in text


def test_no_module_and_no_copied_paragraph_is_on_both_sides(standard_library):
    train, held_out = standard_library.train, standard_library.held_out
    assert not {d.module for d in train} & {d.module for d in held_out}
    assert 0.08 < sum(len(d.text) for d in held_out) / standard_library.characters < 0.3
    shared = paragraphs(train) & paragraphs(held_out)
    assert not [paragraph for paragraph in shared if len(paragraph) >= 60]


def test_modules_are_parsed_and_never_run(tmp_path):
    source = '"""{0} module that must not be imported by anybody."""\nraise SystemExit\n'
    for name in ("one", "two", "three", "four", "five", "six", "seven"):
        (tmp_path / f"{name}.py").write_text(source.format(name))
    (tmp_path / "broken.py").write_text('"""Not Python at all."""\n%%%')
    found = corpus.read_standard_library(tmp_path)
    assert len(found.train) == 6
    assert len(found.held_out) == 1
    assert {d.kind for d in found.train} == {"module"}


def test_a_docstring_knows_what_it_describes(tmp_path):
    (tmp_path / "shapes.py").write_text(
        '"""Shapes of every kind and size."""\n'
        'class Circle:\n    """A round shape without corners."""\n'
        '    def area(self):\n        """Return the area of the circle."""\n'
        'def draw(shape):\n    """Draw a shape on the current screen."""\n'
    )
    kinds = {d.kind: d.text for d in corpus.read_standard_library(tmp_path).train}
    assert kinds == {
        "module": "Shapes of every kind and size.",
        "class": "A round shape without corners.",
        "method": "Return the area of the circle.",
        "function": "Draw a shape on the current screen.",
    }


def test_a_folder_without_docstrings_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="--text"):
        corpus.read_standard_library(tmp_path)


# --- the tasks ---


def test_answers_are_what_python_computes():
    answers = {task.instruction: task.answer(["sort", "get", "map"]) for task in tasks.TASKS}
    assert len(answers) >= 5
    assert answers["Count the words:"] == "3"
    assert answers["Take the last word:"] == "map"
    assert answers["Reverse the words:"] == "map get sort"
    assert answers["Make a function name:"] == "sort_get_map"


@pytest.fixture(scope="module")
def words(standard_library):
    tok = Tokenizer.train([document.text for document in standard_library.train], 1024)
    return tasks.choose_words(corpus.words(standard_library.train), tok)


def test_a_held_out_word_is_in_no_training_instruction(words):
    assert len(words.known) > 200
    assert len(words.held_out) > 30
    assert not set(words.known) & set(words.held_out)
    for row in tasks.training_examples(words, 3_000, seed=0):
        assert not set(row["input"].split()) & set(words.held_out)
    for row in tasks.test_examples(words, 100, seed=0):
        assert set(row["input"].split()) <= set(words.held_out)


def test_an_invented_word_is_never_a_held_out_one():
    words = tasks.Words(["sort", "map", "get", "pop", "cut"], ["list"], ["li", "ma"], ["st", "ke"])
    rows = tasks.training_examples(words, 500, seed=5)
    used = {word for row in rows for word in row["input"].split()}
    assert used == {"sort", "map", "get", "pop", "cut", "like", "mast", "make"}


def test_examples_depend_on_seed_and_number_only(words):
    assert tasks.training_examples(words, 20, 1)[:5] == tasks.training_examples(words, 5, 1)
    assert tasks.training_examples(words, 20, 1) != tasks.training_examples(words, 20, 2)


# --- the acts ---


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(autouse=True)
def fewer_questions(monkeypatch):
    monkeypatch.setattr(run, "N_QUESTIONS", 2 * len(tasks.TASKS))
    monkeypatch.setattr(run, "TEST_PER_CLASS", 5)


def test_the_whole_demo_leaves_models_and_a_report_that_needs_nothing_else(tmp_path, console):
    out = tmp_path / "demo"
    result = run_demo(DemoConfig(steps=2, out=str(out)), console)
    assert list(result.acts) == ["read", "tokenize", "pretrain", "classify", "instruct", "report"]
    for name in ("pretrain", "classify", "instruct"):
        assert (out / name / "model" / "model.safetensors").exists()
    said = console.file.getvalue()
    for word in (
        "Read",
        "Tokenize",
        "Pretrain",
        "Classify",
        "Instruct",
        "Report",
        "gzip",
        "Now type",
    ):
        assert word in said
    known = json.loads((out / "instruct" / "instructions.json").read_text())
    assert {row["instruction"] for row in known} == {task.instruction for task in tasks.TASKS}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"<script|<link|@import|(src|href)\s*=\s*[\"']?(https?:)?//", page)


def test_the_same_steps_and_seed_repeat_the_run_on_the_users_own_text(tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    text = tmp_path / "text.txt"
    letters = random.Random(0).choices("etaoin shrdlu cmfwyp", k=40_000)
    text.write_text("".join(letters))
    bits = []
    for name in ("a", "b", "b"):  # the last time in place of a finished demo
        config = DemoConfig(steps=2, seed=3, text=(str(text),), out=str(tmp_path / name))
        result = run_demo(config, console)
        assert "classify" not in result.acts
        bits.append(result.acts["pretrain"]["bits_per_character"])
        (tmp_path / name / "notes.txt").write_text("the user's own")
    assert bits[0] == bits[1] == bits[2]
    assert (tmp_path / "b" / "notes.txt").exists()


def test_an_interrupted_demo_goes_on_and_repeats_no_finished_act(tmp_path, console, monkeypatch):
    config = DemoConfig(steps=2, out=str(tmp_path / "demo"))
    with monkeypatch.context() as broken:
        broken.setattr(run, "classify", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_demo(config, console)
    with pytest.raises(UsageError, match="other settings"):
        run_demo(DemoConfig(steps=3, out=config.out), console)
    monkeypatch.setattr(run, "pretrain", None)  # would fail if it were called again
    assert "report" in run_demo(config, console).acts


def test_a_folder_with_something_else_is_left_alone(tmp_path, console):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="something else"):
        run_demo(DemoConfig(steps=2, out=str(tmp_path)), console)
    assert (tmp_path / "thesis.txt").exists()
