"""Records, splits and buckets; classification and instruction tuning on small made-up tasks."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from pygpt.config import GPTConfig, LoRAConfig, TrainConfig
from pygpt.errors import DataError, UsageError
from pygpt.finetune import (
    TEMPLATES,
    Classifier,
    InstructModel,
    Template,
    classify,
    instruct,
    prefer,
)
from pygpt.finetune.classification import GPTClassifier, report
from pygpt.finetune.instruction import _InstructionTuning
from pygpt.finetune.lora import LoRAModel
from pygpt.finetune.preference import _PreferenceTuning
from pygpt.finetune.records import (
    Instruction,
    Labelled,
    Preference,
    balance,
    load_parts,
    read_instructions,
    read_labelled,
    read_preferences,
    split,
    write,
)
from pygpt.finetune.tuning import Order, batches_by_length, pad
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer
from pygpt.training import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def made_up_texts(n: int = 200, seed: int = 0) -> list[Labelled]:
    """One text in four is about cats; the word that tells stands anywhere."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        label = "cat" if i % 4 == 0 else "dog"
        words = [rng.choice(["the", "a", "red", "old", "sat", "ran"]) for _ in range(7)]
        words[rng.randrange(7)] = {"cat": "purrs", "dog": "barks"}[label]
        rows.append(Labelled(f"{' '.join(words)} {i}", label))
    return rows


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'label,text\nham,"one, two"\nspam,three\n'),
        ("a.csv", '\ufefftext,label\r\n"one, two",ham\r\nthree,spam\r\n'),
        ("a.csv", 'id,text,label\n1,"one, two",ham\n\n2,three,spam\n'),
        ("a.tsv", "ham\tone, two\nspam\tthree\nham\tx\n"),
        ("corpus", "ham\tone, two\nspam\tthree\nham\tx\n"),
        ("a.tsv", "one, two\tham\nthree\tspam\nx\tham\n"),
        ("a.jsonl", '{"text": "one, two", "label": "ham"}\n\n{"label": "spam", "text": "three"}\n'),
        ("a.json", '[{"text": "one, two", "label": "ham"}, {"label": "spam", "text": "three"}]'),
    ],
)
def test_labelled_texts_are_read_from_every_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    rows = read_labelled(tmp_path / name)
    assert rows[:2] == [Labelled("one, two", "ham"), Labelled("three", "spam")]


def test_quotation_marks_in_tab_separated_text_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('ham\t"So it goes\nspam\tbuy" now\nham\tok\n')
    assert read_labelled(tmp_path / "a.tsv")[0].text == '"So it goes'


def test_labels_are_folder_names_and_records_may_be_in_memory(tmp_path):
    for label, text in (("pos", "good"), ("neg", "bad")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.txt").write_text(text)
    assert read_labelled(tmp_path) == [Labelled("bad", "neg"), Labelled("good", "pos")]
    assert read_labelled([("bad", "neg"), {"text": "good", "label": 1, "group": "g"}]) == [
        Labelled("bad", "neg"),
        Labelled("good", "1", "g"),
    ]


def test_instructions_are_read_with_or_without_input(tmp_path):
    rows = [{"instruction": "Sort", "input": "b a", "output": "a b"}]
    rows.append({"instruction": "Greet", "output": "hello"})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    expected = [Instruction("Sort", "b a", "a b"), Instruction("Greet", "", "hello")]
    assert read_instructions(tmp_path / "a.json") == expected
    assert read_instructions(rows) == expected
    write(expected, tmp_path / "b.jsonl")
    assert read_instructions(tmp_path / "b.jsonl") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"label,text\n", "a.csv holds no examples"),
        ("a.csv", b"text,category\na,b\n", "line 2 has no 'label'; it has 'text', 'category'"),
        ("a.csv", b"a,b,c\n1,2,3\n", "first line that names its columns"),
        ("a.csv", b"a,b\nc,d\n", "which column is the label"),
        ("a.csv", b"label,text\nham,a\nham\n", "line 3 has 1 columns, expected 2"),
        ("a.csv", b'label,text\nham,"a\n', "line 2: unexpected end of data"),
        ("a.csv", b"label,text\n,a\n", "line 2: the label is empty"),
        ("a.csv", b"label,text\nham,\xff\n", "a.csv is not UTF-8"),
        ("a.csv", b"\x00\x01", "binary"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}', "line 1 has no 'label'; it has 'text'"),
        ("a.jsonl", b'{"text": 3, "label": "b"}', "line 1: 'text' must be a string, got 3"),
        ("a.jsonl", b'{"text": "a", "label": [1]}', "'label' must be a string"),
        ("a.jsonl", b"[1]", "line 1 must be an object"),
        ("a.json", b'{"text": "a", "label": "b"}', "must hold a list of entries, not dict"),
        ("a.json", b"[3]", "entry 1 must be an object, got 3"),
        ("a.txt", b"no tab here", "cannot tell its format"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_labelled(tmp_path / name)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a"}, "record 1 has no 'output'"),
        ({"instruction": "a", "output": " "}, "'output' is empty"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input' must be a string"),
        ("text", "record 1 must be a mapping or a tuple"),
    ],
)
def test_an_instruction_that_cannot_be_used_is_refused(record, message):
    with pytest.raises(DataError, match=message):
        read_instructions([record])


def test_a_missing_file_and_a_folder_in_place_of_a_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_labelled(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="holds no examples"):
        read_labelled(tmp_path)
    with pytest.raises(DataError, match="is a folder"):
        read_instructions(tmp_path)


# --- splits and buckets ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_exact_stratified_and_repeatable(seed):
    rows = made_up_texts()
    parts = split(rows, (0.7, 0.1, 0.2), seed)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 140,
        "validation": 20,
        "test": 40,
    }
    assert sorted(row for part in parts.values() for row in part) == sorted(rows)
    for part in parts.values():
        assert abs(Counter(row.label for row in part)["cat"] - len(part) / 4) <= 2
    assert parts == split(rows, (0.7, 0.1, 0.2), seed)
    assert parts != split(rows, (0.7, 0.1, 0.2), seed + 1)


@pytest.mark.parametrize("seed", range(5))
def test_no_group_and_no_repeated_text_crosses_a_split(seed):
    rng = random.Random(seed)
    rows = [row._replace(group=f"module {rng.randrange(30)}") for row in made_up_texts()]
    rows += [Labelled(f"text {i % 20}", "cat") for i in range(60)]
    parts = split(rows, (0.6, 0.2, 0.2), seed)
    for key in ("group", "text"):
        seen = [{getattr(row, key) for row in part} - {""} for part in parts.values()]
        assert sum(map(len, seen)) == len(set().union(*seen))
    assert all(abs(len(parts[n]) - 260 * f) < 20 for n, f in [("train", 0.6), ("test", 0.2)])


def test_balancing_keeps_the_rarest_class_whole():
    rows = made_up_texts()
    kept = balance(rows, 1)
    assert Counter(row.label for row in kept) == {"cat": 50, "dog": 50}
    assert kept == [row for row in rows if row in set(kept)]


def test_given_splits_are_used_and_empty_ones_refused():
    rows = made_up_texts(8)
    parts = load_parts({"train": rows[:6], "validation": rows[6:]}, read_labelled, (1, 0, 0), 0)
    assert parts == {"train": rows[:6], "validation": rows[6:], "test": []}
    with pytest.raises(ValueError, match="train, validation and perhaps test"):
        load_parts({"train": rows, "valid": rows}, read_labelled, (1, 0, 0), 0)
    with pytest.raises(DataError, match="the validation split is empty"):
        load_parts(rows[:3], read_labelled, (0.7, 0.1, 0.2), 0)
    with pytest.raises(ValueError, match="sum to 1"):
        split(rows, (0.7, 0.1, 0.1))


def test_batches_by_length_hold_every_index_once_in_order_of_length():
    rng = random.Random(3)
    lengths = [rng.randrange(1, 9) for _ in range(50)]
    batches = batches_by_length(lengths, 8)
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (5, 8), (1000, 8), (1045, 8)])
def test_the_training_order_visits_every_example_once_an_epoch(n, batch_size, seed):
    lengths = [random.Random(seed).randrange(1, 99) for _ in range(n)]
    order = Order(lengths, batch_size, seed)
    stretch = order._size
    visits = Counter(order[range(3 * stretch)])
    assert max(visits.values()) - min(visits.get(i, 0) for i in range(n)) <= 1
    fresh = Order(lengths, batch_size, seed)  # a pure function of position: no memory of the past
    for start in (2 * stretch + 3, 5, stretch):
        assert fresh[range(start, start + batch_size)] == order[range(start, start + batch_size)]


def test_the_training_order_keeps_like_lengths_together():
    rng = random.Random(7)
    lengths = [rng.randrange(1, 100) for _ in range(500)]
    order = Order(lengths, 10, 0)
    padded = sum(10 * max(lengths[i] for i in order[range(p, p + 10)]) for p in range(0, 5000, 10))
    assert padded <= 1.1 * sum(lengths[i] for i in order[range(5000)])
    firsts = [order[range(p, p + 1)][0] for p in range(0, 500, 10)]
    assert [lengths[i] for i in firsts] != sorted(lengths[i] for i in firsts)


def test_the_book_s_sms_spam_split(data_folder):
    rows = read_labelled(data_folder / "sms_spam/SMSSpamCollection")
    assert Counter(row.label for row in rows) == {"ham": 4827, "spam": 747}
    parts = split(balance(rows), (0.7, 0.1, 0.2))
    sizes = [len(part) for part in parts.values()]
    assert sizes == [1045, 149, 300]
    assert [sizes[0] // 8, -(-sizes[1] // 8), -(-sizes[2] // 8)] == [130, 19, 38]


def test_the_book_s_instruction_split(data_folder):
    rows = read_instructions(data_folder / "instruction/instruction-data.json")
    parts = split(rows, (0.85, 0.05, 0.10))
    assert {n: len(p) for n, p in parts.items()} == {"train": 935, "validation": 55, "test": 110}


# --- classification -------------------------------------------------------------------------------


def tokenizer(*, end_of_text: bool = True) -> Tokenizer:
    """Bytes as tokens."""
    return Tokenizer(
        "bytes",
        pat_str="gpt2",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256} if end_of_text else {},
    )


def small_gpt(context_length: int = 64, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    shape = {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
    return GPT(GPTConfig(vocab_size=257, context_length=context_length, **shape)).eval()


def config(steps: int = 60, **changes) -> TrainConfig:
    settings = {"batch_size": 16, "lr": 5e-3, "eval_every": 0, "device": "cpu", "seed": 1}
    return TrainConfig(steps=steps, **{**settings, **changes})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    out = tmp_path_factory.mktemp("classify")
    model = small_gpt()
    before = weights(model)
    clf = classify(model, tokenizer(), made_up_texts(400), config(), out=out)
    return clf, out, model, before


def test_a_fresh_model_learns_to_classify_texts_it_has_not_seen(classified):
    clf, out, _, _ = classified
    figures = clf.report(out / "test.jsonl")
    assert figures.labels == ("cat", "dog") and sum(figures.support) == 80
    assert figures.majority == pytest.approx(0.75, abs=0.02)
    assert figures.accuracy >= 0.95
    assert clf.predict(["the old purrs ran 3", "a barks red the 17"]) == ["cat", "dog"]


def test_classify_leaves_the_given_model_as_it_was(classified):
    clf, _, model, before = classified
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.equal(clf.model.gpt.tok_emb.weight, model.tok_emb.weight)


def test_a_classifier_loads_from_its_run_and_from_where_it_was_saved(classified, tmp_path):
    clf, out, _, _ = classified
    texts = ["the old purrs ran 3", "", "x" * 30]
    expected = clf.probabilities(texts)
    clf.save(tmp_path / "copy")
    for folder in (out, out / "model", tmp_path / "copy"):
        loaded = Classifier.load(folder)
        assert loaded.labels == ("cat", "dog")
        assert torch.equal(loaded.probabilities(texts), expected)
    recorded = json.loads((out / "report.json").read_text())
    assert recorded == json.loads(json.dumps(clf.report(out / "test.jsonl").to_dict()))
    with pytest.raises(FileNotFoundError, match=r"has no labels\.json"):
        Classifier.load(tmp_path)


def test_a_finished_run_is_taken_up_without_training_again(classified):
    clf, out, model, _ = classified
    steps = []
    again = classify(
        model,
        tokenizer(),
        made_up_texts(400),
        config(),
        out=out,
        on_event=lambda event: steps.append(event.kind),
    )
    assert "step" not in steps
    assert torch.equal(again.probabilities(["barks"]), clf.probabilities(["barks"]))


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_a_run_that_broke_off_ends_as_one_that_did_not(tmp_path, lora):
    def learn(out, on_event=None):
        settings = config(8, checkpoint_every=3, batch_size=4)
        return classify(
            small_gpt(),
            tokenizer(),
            made_up_texts(),
            settings,
            out=out,
            lora=lora,
            on_event=on_event,
        )

    def break_off(event):
        if event.kind == "step" and event.step == 5:
            raise RuntimeError("the power failed")

    with pytest.raises(RuntimeError, match="the power failed"):
        learn(tmp_path / "broken", break_off)
    resumed, whole = learn(tmp_path / "broken"), learn(tmp_path / "whole")
    expected = weights(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())


def test_a_run_goes_on_only_with_the_same_data_and_method(classified):
    _, out, model, _ = classified
    with pytest.raises(UsageError, match="begun with other settings"):
        classify(model, tokenizer(), made_up_texts(300), config(), out=out)
    with pytest.raises(UsageError, match="begun with other settings"):
        classify(model, tokenizer(), made_up_texts(400), config(), out=out, trains="head")


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_neighbours_and_padding_do_not_change_a_text_s_logits(impl):
    from pygpt import ops

    model = GPTClassifier(small_gpt().double(), ["a", "b", "c"]).double().eval()
    rows = [[1, 2, 3], [4] * 40, [5], [6, 7] * 9]
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad(), ops.backend(impl):
        together = model(pad(rows), lengths)
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row]), lengths[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-12)
        changed = pad(rows, value=99)
        torch.testing.assert_close(model(changed, lengths), together, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("trains", "learning"),
    [
        (
            "all",
            {"gpt.tok_emb", "gpt.pos_emb", "gpt.blocks.0", "gpt.blocks.1", "gpt.final", "head"},
        ),
        ("last_block", {"gpt.blocks.1", "gpt.final", "head"}),
        ("head", {"head"}),
    ],
)
def test_only_the_chosen_part_learns(tmp_path, trains, learning):
    model = small_gpt()
    clf = classify(model, tokenizer(), made_up_texts(), config(3), out=tmp_path, trains=trains)
    before, after = weights(model), weights(clf.model.gpt)
    changed = {f"gpt.{name}" for name in before if not torch.equal(before[name], after[name])}
    for name, p in clf.model.named_parameters():
        assert p.requires_grad == any(name.startswith(part) for part in learning)
    parts = {part for part in learning for name in changed if name.startswith(part)}
    assert parts == learning - {"head"}
    assert changed <= {n for n, p in clf.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
def test_the_book_s_classifier_has_its_number_of_parameters(tied):
    with torch.device("meta"):
        model = GPTClassifier(GPT(GPTConfig.preset("gpt2", tie_weights=tied)), ["ham", "spam"])
    learning = {}
    for trains in ("all", "last_block", "head"):
        model.choose(trains)
        learning[trains] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learning == {"all": 124_441_346, "last_block": 7_090_946, "head": 1_538}


def test_texts_beyond_the_context_are_cut_and_counted(tmp_path):
    texts = [Labelled("purrs" + " x" * (i % 40), "cat") for i in range(20)]
    texts += [Labelled("barks" + " y" * (i % 40), "dog") for i in range(20)]
    with pytest.warns(UserWarning, match=r"of 14 texts are longer than the context of 16 tokens"):
        clf = classify(
            small_gpt(16),
            tokenizer(),
            {"train": texts[:7] + texts[20:27], "validation": texts[:2] + texts[20:22]},
            config(2, batch_size=4),
            out=tmp_path,
        )
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        clf.predict(["purrs", "purrs" * 9])
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        cut = clf.probabilities(["purrs" * 9])
    assert torch.equal(cut, clf.probabilities([("purrs" * 9)[:15]]))


def test_what_cannot_be_learned_is_refused(tmp_path):
    rows, tok, model = made_up_texts(), tokenizer(), small_gpt()
    with pytest.raises(DataError, match="only one class, 'cat'"):
        cats = [row for row in rows if row.label == "cat"]
        classify(model, tok, cats, config(), out=tmp_path / "a")
    with pytest.raises(ValueError, match="trains must be one of all, last_block, head"):
        classify(model, tok, rows, config(), out=tmp_path / "a", trains="none")
    with pytest.raises(DataError, match="unknown label 'bird'; known: cat, dog"):
        strange = {"train": rows, "validation": rows, "test": [("tweets", "bird")]}
        classify(model, tok, strange, config(), out=tmp_path / "a")
    with pytest.raises(UsageError, match="no parameter changed in 2 steps; raise lr"):
        classify(model, tok, rows, config(2, lr=0.0), out=tmp_path / "b")
    with pytest.raises(UsageError, match="257 tokens and the model 100"):
        smaller = GPT(GPTConfig(vocab_size=100, context_length=8, emb_dim=8, n_heads=1, n_layers=1))
        classify(smaller, tok, rows, config(), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_predicting_wants_a_list_and_a_token_of_each_text():
    clf = Classifier(GPTClassifier(small_gpt(), ["a", "b"]), tokenizer(end_of_text=False))
    with pytest.raises(TypeError, match="put it into a list"):
        clf.predict("text")
    with pytest.raises(DataError, match="text 2 is empty"):
        clf.predict(["text", ""])
    assert clf.predict([]) == []


def test_balanced_training_sees_as_many_of_each_class(tmp_path):
    seen = tmp_path / "run"
    classify(small_gpt(), tokenizer(), made_up_texts(), config(2), out=seen, balanced=True)
    assert sum(json.loads((seen / "report.json").read_text())["support"]) == 20


def test_the_report_s_figures_are_those_worked_out_by_hand():
    chances = torch.tensor(
        [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1]]
    )
    figures = report(chances.log(), torch.tensor([0, 0, 0, 1, 2]), ["a", "b", "c"])
    assert figures.confusion == ((2, 1, 0), (0, 1, 0), (0, 1, 0))
    assert figures.support == (3, 1, 1)
    assert figures.accuracy == pytest.approx(3 / 5) and figures.majority == pytest.approx(3 / 5)
    assert figures.precision == pytest.approx((1, 1 / 3, 0))
    assert figures.recall == pytest.approx((2 / 3, 1, 0))
    assert figures.f1 == pytest.approx((0.8, 0.5, 0))
    # one bin holds 0.8 twice (one right), the others 0.5 (right), 0.7 (right), 0.6 (wrong)
    assert figures.calibration_error == pytest.approx((0.6 + 0.5 + 0.3 + 0.6) / 5)
    expected = -chances[range(5), [0, 0, 0, 1, 2]].log().mean()
    assert figures.loss == pytest.approx(float(expected))
    assert "60.0%" in str(figures) and figures.to_dict()["recall"] == figures.recall


# --- instructions ---------------------------------------------------------------------------------


TASKS = [
    Instruction(task, given, answer)
    for task, given, answer in [
        ("Name a colour", "", "red"),
        ("Name a number", "", "seven"),
        ("First letter", "pear", "p"),
        ("First letter", "apple", "a"),
        ("Shout", "hey", "HEY!"),
        ("Shout", "no", "NO!"),
    ]
]


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    out = tmp_path_factory.mktemp("instruct")
    model = small_gpt()
    before = weights(model)
    data = {"train": TASKS, "validation": TASKS[:2], "test": TASKS}
    events = []
    chat = instruct(
        model,
        tokenizer(),
        data,
        config(120, batch_size=6, sample_every=60),
        out=out,
        template="short",
        on_event=events.append,
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return chat, out, events


def test_a_model_learns_its_tasks_and_where_an_answer_ends(instructed):
    chat, out, events = instructed
    figures = chat.report(out / "test.jsonl")
    assert figures["exact_match"] == 1.0 and figures["loss"] < 0.1 and figures["tasks"] == 6
    assert chat.reply("Shout", "hey") == "HEY!"
    samples = [event.values["sample"] for event in events if event.kind == "sample"]
    assert len(samples) >= 2 and samples[-1] == "Name a colour\nred"


def test_replies_in_a_batch_and_streamed_equal_each_alone(instructed):
    chat, _, _ = instructed
    tasks = [(row.instruction, row.input) for row in TASKS] + [("Something else", "x y z")]
    alone = [chat.reply(*task) for task in tasks]
    assert chat.replies(tasks, batch_size=4) == alone
    assert ["".join(chat.stream(*task)).strip() for task in tasks] == alone
    sampled = chat.replies(tasks, temperature=2.0, seed=5, max_new_tokens=4)
    assert sampled == chat.replies(tasks, temperature=2.0, seed=5, max_new_tokens=4) != alone
    assert all(len(reply) <= 4 for reply in sampled)


def test_an_instructed_model_loads_from_its_run_and_from_where_it_was_saved(instructed, tmp_path):
    chat, out, _ = instructed
    chat.save(tmp_path / "copy")
    for folder in (out, tmp_path / "copy"):
        loaded = InstructModel.load(folder)
        assert loaded.template == chat.template
        assert loaded.report(TASKS)["exact_match"] == 1.0
    with pytest.raises(FileNotFoundError, match=r"has no template\.json"):
        InstructModel.load(tmp_path)


def test_an_answer_ends_where_the_context_is_full():
    chat = InstructModel(small_gpt(16), tokenizer(end_of_text=False), TEMPLATES["short"])
    tasks = [("abc", ""), ("abcdef", "gh")]
    prompts = [len(chat.prompt_ids(*task)) for task in tasks]
    together = chat.replies(tasks)
    assert together == [chat.reply(*task) for task in tasks]
    assert all(len(a) <= 17 - n for a, n in zip(together, prompts, strict=True))
    assert len(chat.reply("a" * 15)) <= 1
    with pytest.raises(
        ValueError, match="17 tokens with its template, more than the context of 16"
    ):
        chat.reply("a" * 16)


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_what_is_learned_is_the_answer_and_one_end_of_text_by_length_not_by_id(mask_prompt):
    chat = InstructModel(small_gpt(), tokenizer(), TEMPLATES["short"])
    parts = {"train": TASKS, "validation": TASKS, "test": []}
    task = _InstructionTuning(parts, chat, config(batch_size=6), mask_prompt)
    batch = task.batch(range(6))
    rows = {}
    for ids, targets in zip(batch["ids"].tolist(), batch["targets"].tolist(), strict=True):
        learned = [target for target in targets if target != -100]
        assert learned.count(256) == 1 and learned[-1] == 256
        last = max(i for i, target in enumerate(targets) if target != -100)
        assert all(a == b for a, b in zip(ids[1 : last + 1], targets, strict=False) if b != -100)
        rows[chat.tok.decode(ids[: last + 1])] = chat.tok.decode(learned[:-1])
    wanted = {}
    for row in TASKS:
        prompt = chat.template.prompt(row.instruction, row.input)
        wanted[prompt + row.output] = row.output if mask_prompt else (prompt + row.output)[1:]
    assert rows == wanted
    _, count = task.loss(chat.model, batch)
    assert count == sum(len(text) + 1 for text in wanted.values())


def test_examples_that_do_not_fit_and_a_missing_end_of_text_are_warned_about():
    parts = {"train": [*TASKS, Instruction("a" * 20, "", "b")], "validation": TASKS[:1], "test": []}
    chat = InstructModel(small_gpt(17), tokenizer(), TEMPLATES["short"])
    with pytest.warns(UserWarning, match=r"of 7 examples, 1 are cut .* 17 tokens and 3 left out"):
        task = _InstructionTuning(parts, chat, config(), True)
    assert max(len(example.ids) for example in task.examples) == 18
    chat = InstructModel(small_gpt(), tokenizer(end_of_text=False), TEMPLATES["short"])
    with pytest.warns(UserWarning, match="no training example ends with end-of-text"):
        _InstructionTuning(parts, chat, config(), True)
    chat = InstructModel(small_gpt(4), tokenizer(), TEMPLATES["short"])
    with (
        pytest.raises(DataError, match="no example fits"),
        pytest.warns(UserWarning, match="7 left"),
    ):
        _InstructionTuning(parts, chat, config(), True)


def test_the_alpaca_template_is_the_book_s():
    prompt = TEMPLATES["alpaca"].prompt("Spell it.", "Ocassion {x}")
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSpell it.\n\n### Input:\nOcassion {x}"
        "\n\n### Response:\n"
    )
    assert "### Input" not in TEMPLATES["alpaca"].prompt("Spell it.")


@pytest.mark.parametrize("fields", [("{input}", "{instruction}"), ("{instruction}{input}", "{x}")])
def test_a_template_without_its_fields_is_refused(fields):
    with pytest.raises(ValueError, match=r"must hold \{instruction\}"):
        Template(*fields)


def test_instruct_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="no template 'x'; there are alpaca, phi, short"):
        instruct(small_gpt(), tokenizer(), TASKS, out=tmp_path, template="x")
    with pytest.raises(DataError, match="the validation split is empty"):
        instruct(small_gpt(), tokenizer(), TASKS, out=tmp_path)


# --- low-rank adaptation --------------------------------------------------------------------------


def learning(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_book_s_low_rank_models_have_their_numbers_of_parameters():
    everywhere = ("qkv", "out", "up", "down")
    with torch.device("meta"):
        classifier = GPTClassifier(GPT(GPTConfig.preset("gpt2")), ["ham", "spam"])
        medium = GPT(GPTConfig.preset("gpt2-medium", tie_weights=False))
        assert sum(p.numel() for p in medium.parameters()) == 406_286_336
        classifier = LoRAModel(classifier, LoRAConfig(targets=(*everywhere, "head")))
        assert learning(classifier) == 2_666_528
        assert (
            learning(LoRAModel(medium, LoRAConfig(targets=(*everywhere, "out_head")))) == 7_898_384
        )


def test_low_rank_additions_begin_at_nothing_and_merge_into_the_weights():
    plain = small_gpt().double()
    model = copy.deepcopy(plain)
    adapted = LoRAModel(model, LoRAConfig(4, 8.0, ("qkv", "out", "up", "down", "out_head")))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids), plain(ids), rtol=0, atol=0)
        for name, p in adapted.named_parameters():
            assert p.requires_grad == name.endswith((".a", ".b"))
            if p.requires_grad:
                p.normal_()
        expected = adapted(ids)
        assert not torch.allclose(expected, plain(ids))
        adapted.merge()
        torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("head", [False, True])
def test_a_classifier_learns_by_low_rank_additions_alone(tmp_path, head):
    model = small_gpt()
    targets = ("qkv", "out", "up", "down", *(["head"] if head else []))
    lora = LoRAConfig(rank=4, alpha=8.0, targets=targets)
    learned = set()

    def watch(event):
        if event.kind == "checkpoint":
            learned.update(load_file(f"{event.values['folder']}/optimizer.safetensors"))

    clf = classify(
        model, tokenizer(), made_up_texts(400), config(), out=tmp_path, lora=lora, on_event=watch
    )
    assert head or clf.report(tmp_path / "test.jsonl").accuracy >= 0.9
    before, after = weights(model), weights(clf.model.gpt)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        n for n in before if n.endswith("weight") and n.split(".")[-2] in lora.targets
    }
    states = {name.rpartition(".")[0] for name in learned}
    assert all(name.endswith((".a", ".b")) or ".head." in name for name in states)
    assert any(name.endswith(".head.a" if head else ".head.weight") for name in states)
    # Files keep matrices the other way round, whose products are summed in another order.
    loaded = Classifier.load(tmp_path)
    torch.testing.assert_close(loaded.probabilities(["barks"]), clf.probabilities(["barks"]))


def test_instructions_are_learned_by_low_rank_additions(tmp_path):
    chat = instruct(
        small_gpt(),
        tokenizer(),
        {"train": TASKS, "validation": TASKS},
        config(30, batch_size=6, lr=1e-2, eval_every=30),
        out=tmp_path,
        template="short",
        lora=LoRAConfig(rank=8, targets=("qkv", "up", "down", "out_head")),
    )
    figures = [entry["val_loss"] for entry in Run(tmp_path).metrics if "val_loss" in entry]
    assert figures[-1] < figures[0] / 2
    assert InstructModel.load(tmp_path).reply("Shout", "no") == chat.reply("Shout", "no")


def test_low_rank_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no linear layer is named middle"):
        LoRAModel(small_gpt(), LoRAConfig(targets=("up", "middle")))
    for wrong in ({"rank": 0}, {"alpha": math.nan}, {"targets": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRAConfig(**wrong)
    with pytest.raises(ValueError, match="leave trains at 'all', got 'head'"):
        classify(small_gpt(), tokenizer(), [], out=tmp_path, trains="head", lora=LoRAConfig())


# --- preferences ----------------------------------------------------------------------------------


def test_preferences_are_read_and_equal_answers_left_out():
    row = {"instruction": "Greet", "chosen": "hello", "rejected": "what"}
    assert read_preferences([row]) == [Preference("Greet", "", "hello", "what")]
    equal = {**row, "rejected": "hello"}
    with pytest.warns(UserWarning, match=r"in 2 of 3 rows \(the first is number 2\)"):
        assert len(read_preferences([row, equal, equal])) == 1
    with (
        pytest.raises(DataError, match="holds no examples"),
        pytest.warns(UserWarning, match="1 of 1"),
    ):
        read_preferences([equal])
    with pytest.raises(DataError, match="record 1 has no 'rejected'"):
        read_preferences([{"instruction": "a", "chosen": "b"}])


def test_the_preferred_answers_gain_from_an_even_start(tmp_path, instructed):
    chat, _, _ = instructed
    rows = [(f"Greet {i}", "", "hello!", "go away") for i in range(24)]
    before, evaluations = weights(chat.model), []
    best = prefer(
        chat,
        chat.tok,
        rows,
        config(20, batch_size=4, lr=1e-3, eval_every=20),
        out=tmp_path,
        on_event=lambda event: evaluations.append(event.values) if event.kind == "eval" else None,
    )
    first, last = evaluations
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["val_margin"] == pytest.approx(0, abs=1e-5)
    assert last["val_loss"] < 0.5 and last["val_accuracy"] == 1.0 and last["val_margin"] > 0.5
    assert all(torch.equal(p, before[name]) for name, p in chat.model.named_parameters())
    assert InstructModel.load(tmp_path).reply("Greet 3") == best.reply("Greet 3")
    assert len(read_preferences(tmp_path / "test.jsonl")) == 3


def test_without_a_configuration_the_book_s_settings_are_used(tmp_path, instructed):
    chat, _, _ = instructed
    tasks = [(f"Say {i}", "", f"{i}") for i in range(40)]
    pairs = [(f"Say {i}", "", f"{i}", "no") for i in range(40)]
    instruct(small_gpt(), tokenizer(), tasks, out=tmp_path / "i", template="short")
    prefer(chat, chat.tok, pairs, out=tmp_path / "p")
    classify(small_gpt(), tokenizer(), made_up_texts(40), out=tmp_path / "c")
    for name, steps, lr in (("i", 2 * 4, 5e-5), ("p", 4, 5e-6), ("c", 5 * 3, 5e-5)):
        used = Run(tmp_path / name).about["train"]
        assert (used["steps"], used["batch_size"], used["lr"]) == (steps, 8, lr)


def test_the_preference_loss_is_that_worked_out_from_whole_logits(instructed):
    chat, _, _ = instructed
    rows = [Preference("Shout", "hey", "HEY!", "hey"), Preference("Say", "", "a", "bcd")]
    parts = {"train": rows, "validation": rows, "test": []}
    task = _PreferenceTuning(parts, chat, config(batch_size=2), 0.3, None)
    other = small_gpt(seed=5)

    def log_probability(model, row, answer):
        prompt = chat.prompt_ids(row.instruction, row.input)
        ids = torch.tensor([[*prompt, *answer.encode(), 256]])
        with torch.no_grad():
            logs = model(ids[:, :-1]).log_softmax(-1)[0, len(prompt) - 1 :]
        return logs.gather(-1, ids[0, len(prompt) :, None]).sum()

    margins = torch.stack(
        [
            0.3
            * (log_probability(other, row, row.chosen) - log_probability(other, row, row.rejected))
            - 0.3
            * (
                log_probability(chat.model, row, row.chosen)
                - log_probability(chat.model, row, row.rejected)
            )
            for row in rows
        ]
    )
    expected = -torch.nn.functional.logsigmoid(margins)
    loss, count = task.loss(other, task.pairs.batch([0, 1]))
    assert count == 2 and float(loss.detach()) == pytest.approx(float(expected.sum()), rel=1e-4)
    assert task.evaluate(other)["val_loss"] == pytest.approx(float(expected.mean()), rel=1e-4)
    with pytest.raises(ValueError, match="beta must be"):
        prefer(chat, chat.tok, rows, out="nowhere", beta=0.0)


def test_the_book_s_preferences_are_read(data_folder):
    with pytest.warns(UserWarning, match="in 6 of 1100 rows"):
        rows = read_preferences(data_folder / "instruction/instruction-data-with-preference.json")
    assert len(rows) == 1094
