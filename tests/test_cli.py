"""The command line: every verb does its job, and every mistake is one line and an exit code."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pygpt
from pygpt.cli import VERBS, main
from pygpt.cli import text as cli_text

WORDS = "stone river cloud green night table seven light under winter paper glass".split()  # noqa: SIM905


def prose(seed: int, n: int = 3000) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n))


SMALL = ["--vocab-size", "300", "--context-length", "32", "--emb-dim", "32", "--n-heads", "2"]
SMALL += ["--n-layers", "1", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, labelled texts, instructions, and a run of each kind made from them."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "book.txt").write_text(prose(1))
    rows = [f"{'day' if i % 2 else 'night'}\t{'sun' if i % 2 else 'moon'} {i}" for i in range(60)]
    (folder / "texts.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
    pairs = [f"{a} {b}" for a in WORDS for b in WORDS]
    tasks = [{"instruction": "Repeat:", "input": pair, "output": pair} for pair in pairs]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    runs = folder / "runs"
    short = ["--device", "cpu", "--steps", "4", "--eval-every", "2"]
    book, texts, chat = (str(runs / name) for name in ("pretrain", "classify", "instruct"))
    assert main(["pretrain", str(folder / "book.txt"), "--out", book, *SMALL, "--steps", "4"]) == 0
    tune = ["finetune", "classify", book, str(folder / "texts.tsv"), "--out", texts, *short]
    assert main(tune) == 0
    tune = ["finetune", "instruct", book, str(folder / "tasks.json"), "--out", chat, *short]
    assert main([*tune, "--template", "short"]) == 0
    return folder


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verbs_help_has_an_example(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example: " in said and f"pygpt {verb}" in said


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == pygpt.__version__


def test_python_dash_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "pygpt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == pygpt.__version__


def test_generate_repeats_with_the_seed(place, capsys):
    said = []
    for seed in (1, 1, 2):
        command = ["generate", str(place / "runs"), "stone", "--seed", str(seed)]
        assert main([*command, "--max-new-tokens", "20", "--device", "cpu"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].startswith("stone")


def test_generate_as_json(place, capsys):
    command = ["generate", str(place / "runs" / "pretrain"), "stone", "--json"]
    assert main([*command, "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "stone"


def test_predict_gives_one_known_label_a_text(place, capsys):
    assert main(["predict", str(place / "runs"), "sun 3", "moon 4", "--device", "cpu"]) == 0
    labels = capsys.readouterr().out.split()
    assert len(labels) == 2 and set(labels) <= {"day", "night"}


def test_predict_reads_lines_and_writes_probabilities(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", iter(["sun 3\n", "moon 4\n"]))
    assert main(["predict", str(place / "runs" / "classify"), "--json", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["sun 3", "moon 4"]
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-5 for row in rows)


def test_chat_answers_each_line(place):
    command = [sys.executable, "-m", "pygpt", "chat", str(place / "runs"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4"],
        input="Repeat: | stone\nRepeat: | " + "river " * 200 + "\nRepeat: | road\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") >= 2  # the line that is too long is refused, the talk goes on
    assert "shorten" in done.stderr


@pytest.mark.parametrize(
    ("kind", "data", "figure"),
    [
        ("text", "book.txt", "perplexity"),
        ("classification", "texts.tsv", "accuracy"),
        ("instruction", "tasks.json", "exact_match"),
    ],
)
def test_eval_prints_figures(place, capsys, kind, data, figure):
    assert main(["eval", str(place / "runs"), kind, str(place / data), "--json"]) == 0
    assert figure in json.loads(capsys.readouterr().out)


def test_prepare_then_pretrain_from_the_shards(place, tmp_path, capsys):
    shards = tmp_path / "shards"
    command = ["prepare", str(place / "book.txt"), "--out", str(shards), "--vocab-size", "280"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 280
    command = ["pretrain", str(shards), "--out", str(tmp_path / "run"), *SMALL, "--steps", "2"]
    assert main([*command, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events if e["event"] in ("start", "end")] == ["start", "end"]


def test_dry_run_estimates_and_writes_no_run(place, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["pretrain", str(place / "book.txt"), "--out", str(out), *SMALL]
    assert main([*command, "--dry-run", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["parameters"] > 0 and estimate["minutes_without_evaluation"] > 0
    assert not (out / "run.json").exists()


def test_minutes_become_steps(place, tmp_path, capsys):
    command = ["pretrain", str(place / "book.txt"), "--out", str(tmp_path / "run"), *SMALL]
    assert main([*command, "--minutes", "0.01"]) == 0
    assert "--steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_tokenizer_verbs_round_trip(place, tmp_path, capsys):
    path = tmp_path / "tok.json"
    command = ["tokenizer", "train", str(place / "book.txt"), "--out", str(path)]
    assert main([*command, "--vocab-size", "290", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_vocab"] == 290
    assert main(["tokenizer", "encode", str(path), str(place / "book.txt")]) == 0
    ids = capsys.readouterr().out.split()
    assert main(["tokenizer", "encode", str(path), str(place / "book.txt"), "--count"]) == 0
    assert int(capsys.readouterr().out) == len(ids)
    assert main(["tokenizer", "decode", str(path), *ids]) == 0
    assert capsys.readouterr().out == (place / "book.txt").read_text()


def test_tokenizers_of_every_format_are_described_and_encode(place, tmp_path, capsys):
    book, names = str(place / "book.txt"), ("tok.json", "folder", "tok.tiktoken")
    for name in names:
        command = ["tokenizer", "train", book, "--vocab-size", "290"]
        assert main([*command, "--out", str(tmp_path / "new" / name)]) == 0
    assert "neither pattern nor special tokens" in capsys.readouterr().err
    (tmp_path / "new" / "folder" / "tokenizer.json").unlink()  # GPT-2's pair of files is left
    counts = set()
    for name in ("tok.json", "folder", "folder/vocab.json", "folder/merges.txt"):
        assert main(["info", str(tmp_path / "new" / name), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["n_vocab"] == 290 and facts["ordinary_tokens"] == 289
        assert facts["special_tokens"] == {"<|endoftext|>": 289} and facts["pattern"] == "gpt2"
        assert main(["tokenizer", "encode", str(tmp_path / "new" / name), book, "--count"]) == 0
        counts.add(capsys.readouterr().out)
    assert len(counts) == 1
    assert main(["info", str(tmp_path / "new" / "tok.tiktoken")]) == 0
    assert "not in this file" in capsys.readouterr().out


def test_training_text_may_come_through_a_pipe_in_parts(tmp_path):
    text = "It's the naïve word, and then 12 words more.\r\n" * 400
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    merges = []
    for size in (1 << 24, 1000):
        with (tmp_path / "text.txt").open("rb") as file:
            texts = list(cli_text._parts(file, "text.txt", size))
        assert "".join(texts) == text.replace("\r\n", "\n") and len(texts) > 1
        merges.append(pygpt.Tokenizer.train(texts, 270)._native.merges())
    assert merges[0] == merges[1]
    for out, given in (("a.json", None), ("b.json", tmp_path / "text.txt")):
        command = [sys.executable, "-m", "pygpt", "tokenizer", "train", "--vocab-size", "270"]
        command += ["--out", str(tmp_path / out), *([str(given)] if given else [])]
        text = b"" if given else (tmp_path / "text.txt").read_bytes()
        subprocess.run(command, input=text, check=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_prefer_continues_an_instructed_model(place, tmp_path):
    pairs = [
        {"instruction": "Repeat:", "input": f"{a} {b}", "chosen": f"{a} {b}", "rejected": b}
        for a in WORDS
        for b in WORDS
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    command = ["finetune", "prefer", str(place / "runs"), str(tmp_path / "pairs.json")]
    command += ["--out", str(tmp_path / "best"), "--steps", "2", "--device", "cpu"]
    assert main([*command, "--lora-rank", "2"]) == 0
    assert (tmp_path / "best" / "model" / "template.json").exists()


def test_convert_and_info(place, tmp_path, capsys):
    assert main(["convert", str(place / "runs" / "pretrain"), str(tmp_path / "copy")]) == 0
    assert main(["convert", str(tmp_path / "copy"), str(tmp_path / "model.gguf")]) == 0
    capsys.readouterr()
    assert main(["info", str(place / "runs" / "pretrain"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_layers"] == 1 and facts["vocab_size"] == 300
    assert main(["info", str(place / "runs" / "pretrain" / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_vocab"] == 300


def test_doctor_finds_every_op_right(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(result.startswith("ok") for result in facts["checks"].values())


@pytest.fixture
def broken(place, tmp_path):
    """Files as people have them: empty, a folder, binary, cut off, of the wrong kind."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "nolabel.csv").write_text("a,b\n1,2\n")
    (tmp_path / "oneclass.csv").write_text("label,text\n" + "x,hello\n" * 20)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "folder").mkdir()
    return tmp_path


MISTAKES = [
    (["nonsense"], 2, "no verb"),
    (["pretrian"], 2, "did you mean 'pretrain'"),
    (["tokenizer", "trian"], 2, "train, encode, decode"),
    (["generate"], 2, "--help"),
    (["generate", "{place}/runs", "--temprature", "1"], 2, "--temperature"),
    (["generate", "{place}/runs", "--temperature", "-1"], 2, "temperature"),
    (["generate", "{place}/runs", "--temperature", "hot"], 2, "hot"),
    (["generate", "{place}/runs", "--device", "gpu9"], 2, "gpu9"),
    (["generate", "{broken}/folder", "x"], 3, "no model"),
    (["chat", "{place}/runs/pretrain"], 3, "template.json"),
    (["predict", "{place}/runs/pretrain", "x"], 3, "labels.json"),
    (["pretrain"], 2, "at least one"),
    (["pretrain", "{broken}/absent.txt"], 3, "absent.txt"),
    (["pretrain", "{broken}/empty.txt", "--out", "{broken}/r"], 3, "empty.txt"),
    (["pretrain", "{broken}/binary.txt", "--out", "{broken}/r"], 3, "binary.txt"),
    (["pretrain", "{broken}/bad.jsonl", "--out", "{broken}/r"], 3, "2"),
    (["pretrain", "{broken}/folder", "--out", "{broken}/r"], 3, "folder"),
    (["pretrain", "{place}/book.txt", "--n-heads", "3", "--out", "{broken}/r"], 2, "n_heads"),
    (["pretrain", "{place}/book.txt", "--lr", "nan", "--out", "{broken}/r"], 2, "lr"),
    (["pretrain", "{place}/book.txt", "--context-length", "0", "--out", "{broken}/r"], 2, "cont"),
    (["pretrain", "{place}/book.txt", "--vocab-size", "20", "--out", "{broken}/r"], 2, "vocab"),
    (["pretrain", "{place}/book.txt", "--tokenizer", "gtp2", "--out", "{broken}/r"], 3, "gpt2"),
    (["finetune", "classify", "{place}/runs", "{broken}/nolabel.csv"], 3, "label"),
    (["finetune", "classify", "{place}/runs", "{broken}/oneclass.csv"], 3, "class"),
    (["finetune", "classify", "{place}/runs", "{place}/texts.tsv", "--epochs", "0"], 2, "epochs"),
    (["finetune", "instruct", "{place}/runs", "{place}/texts.tsv"], 3, "instruction"),
    (["eval", "{place}/runs", "poetry", "{place}/book.txt"], 2, "poetry"),
    (["tokenizer", "encode", "{broken}/tokenizer.json"], 3, "tokenizer.json"),
    (["tokenizer", "encode", "{place}/book.txt"], 3, "not JSON"),
    (["tokenizer", "encode", "{place}/runs/pretrain", "{broken}/absent.txt"], 3, "absent.txt"),
    (["tokenizer", "encode", "{place}/runs/pretrain", "{broken}/folder"], 3, "folder"),
    (["tokenizer", "encode", "{place}/runs/pretrain", "{broken}/latin.txt"], 3, "at byte 3"),
    (["tokenizer", "decode", "{place}/runs/pretrain", "999999"], 2, "999999 is no token id"),
    (["tokenizer", "decode", "{place}/runs/pretrain", "--", "-1"], 2, "-1 is no token id"),
    (["tokenizer", "train", "{broken}/empty.txt"], 3, "empty.txt is empty"),
    (["tokenizer", "train", "{broken}/binary.txt"], 3, "binary.txt"),
    (["tokenizer", "train", "{broken}/latin.txt"], 3, "latin.txt is not UTF-8"),
    (["tokenizer", "train", "{broken}/absent.txt"], 3, "absent.txt"),
    (["tokenizer", "train", "{place}/book.txt", "--out", "{broken}/a.bin"], 2, "a .json or"),
    (["tokenizer", "train", "{place}/book.txt", "--vocab-size", "20"], 2, "vocab_size"),
    (["tokenizer", "train", "{place}/book.txt", "--pattern", "("], 2, "regular expression"),
    (["prepare", "{place}/book.txt"], 2, "--out"),
    (["info", "{place}/runs"], 2, "choose one"),
    (["info", "{broken}/binary.txt"], 3, "binary.txt"),
    (["convert", "{broken}/empty.txt", "{broken}/out"], 3, "empty.txt"),
    (["finetune", "prefer", "{place}/runs", "{place}/tasks.json"], 3, "chosen"),
]


@pytest.mark.parametrize(("command", "code", "said"), MISTAKES, ids=lambda x: str(x)[:60])
def test_a_mistake_is_one_line_and_its_code(place, broken, capsys, command, code, said):
    command = [word.format(place=place, broken=broken) for word in command]
    assert main(command) == code
    error = capsys.readouterr().err
    assert error.startswith("pygpt: ") and error.count("\n") == 1
    assert said in error


def test_debug_shows_the_traceback(broken, capsys):
    assert main(["pretrain", str(broken / "empty.txt"), "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_saves_and_the_same_command_goes_on(place, tmp_path):
    command = [sys.executable, "-m", "pygpt", "pretrain", str(place / "book.txt"), *SMALL]
    command += ["--out", str(tmp_path / "run"), "--steps", "100000", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.count("\n") == 1 and "goes on" in error
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = json.loads(again.stdout.readline())
    again.kill()
    again.communicate()
    assert first["event"] == "start" and first["resumed"] is True and first["step"] > 0


def test_a_closed_pipe_is_no_error(place):
    command = f"{sys.executable} -m pygpt tokenizer encode {place}/runs/pretrain {place}/book.txt"
    done = subprocess.run(
        f"set -o pipefail; {command} | head -c 10",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_help_is_quick_because_it_imports_little():
    code = "import sys, pygpt.cli; pygpt.cli.main(['--help']); sys.exit('tyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_text_of_ours_names_the_other_projects_package():
    root = Path(pygpt.__file__).parent.parent
    for path in [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("pygpt/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pip install " + "pygpt" not in text, path
