"""Which model a name or a folder on the command line means."""

from __future__ import annotations

from pathlib import Path

from pygpt import GPT, Tokenizer
from pygpt.errors import UsageError
from pygpt.tokenizer.formats import holds_vocabulary

PUBLISHED = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")


def load_tokenizer(name: str) -> Tokenizer:
    """A published vocabulary, "bytes", or what a file or a model, data or run folder holds."""
    if name in PUBLISHED:
        return Tokenizer.from_pretrained(name)
    if name == "bytes":
        return Tokenizer.train(["a"], 257)
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"{name} is neither a file or folder nor a published vocabulary "
            f"({', '.join(PUBLISHED)}) nor 'bytes'"
        )
    if path.is_dir() and not holds_vocabulary(path):
        path = model_folder(path)
    return Tokenizer.from_file(path)


def model_folder(path: Path, kind: str = "") -> Path:
    """The folder with a model's files: `path`, its model/, or of several runs that of `kind`.

    A folder of runs (runs/demo holds pretrain, classify and instruct) without the run `kind` is a
    UsageError that lists them.
    """
    for candidate in (path, path / "model", path / kind / "model"):
        if any((candidate / name).exists() for name in ("config.json", "tokenizer.json")):
            return candidate
    runs = sorted(child.name for child in path.glob("*") if (child / "model").is_dir())
    if runs:
        raise UsageError(f"{path} holds several runs; choose one: {', '.join(runs)}")
    raise FileNotFoundError(f"{path} holds no model: no config.json in it or in {path / 'model'}")


def load_model(name: str, kind: str = "pretrain", device: str = "auto") -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a folder (of several runs, that of `kind`) or of a hub name."""
    from pygpt.training import choose_device

    place = choose_device(device)
    if not Path(name).exists():
        return GPT.from_pretrained(name, device=place), Tokenizer.from_pretrained("gpt2")
    folder = model_folder(Path(name), kind)
    return GPT.from_pretrained(folder, device=place), Tokenizer.from_file(folder)
