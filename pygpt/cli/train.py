"""Verbs that learn: prepare, pretrain, finetune."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from pygpt import GPT, Tokenizer, data, training
from pygpt.cli.display import TrainingDisplay, header
from pygpt.cli.folders import load_tokenizer
from pygpt.config import GPTConfig, TrainConfig
from pygpt.errors import UsageError
from pygpt.generation import stream

Preset = Literal["none", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

# What a laptop trains in minutes; every field is a flag.
SMALL = GPTConfig(
    vocab_size=4096,
    context_length=256,
    emb_dim=256,
    n_heads=4,
    n_layers=6,
    drop_rate=0.0,
    tie_weights=True,
    init_std=0.06,
)
DEFAULTS = TrainConfig()


def prepare(
    files: Positional[tuple[Path, ...]],
    /,
    *,
    out: Path,
    tokenizer: str = "",
    vocab_size: int = 4096,
    validation: float = 0.1,
    text_key: str = "text",
    json: bool = False,
) -> int:
    """Turn text into token shards that training reads.

    Example: pygpt prepare books/ --tokenizer gpt2 --out data/books

    Args:
        files: Text, jsonl, json, csv or tsv files, or folders of them.
        out: The folder to write.
        tokenizer: A published vocabulary ("gpt2"), a tokenizer file or folder, or "bytes"; if not
            given, one is trained on the files.
        vocab_size: Size of the tokenizer that is trained.
        validation: Share of the text that is held out.
        text_key: Where the text stands in a row of jsonl, json, csv or tsv.
        json: Print one JSON object.
    """
    tok = load_tokenizer(tokenizer) if tokenizer else _train_tokenizer(files, vocab_size, text_key)
    prepared = data.prepare(files, tok, out, validation=validation, text_key=text_key)
    splits = {"train": prepared.train, "validation": prepared.validation}
    sizes = {name: int(split.ids.size) for name, split in splits.items()}
    if json:
        print(json_module.dumps({"out": str(out), "vocab_size": prepared.vocab_size, **sizes}))
    else:
        said = ", ".join(f"{name} {count:,} tokens" for name, count in sizes.items())
        print(f"{out}: vocabulary {prepared.vocab_size:,}, {said}")
        print(f"next: pygpt pretrain {out} --out runs/{out.name}")
    return 0


def pretrain(
    files: Positional[tuple[Path, ...]],
    /,
    *,
    out: Path = Path("runs/pretrain"),
    tokenizer: str = "",
    preset: Preset = "none",
    model: OmitArgPrefixes[GPTConfig] = SMALL,
    train: OmitArgPrefixes[TrainConfig] = DEFAULTS,
    minutes: float | None = None,
    validation: float = 0.1,
    text_key: str = "text",
    prompt: str = "",
    resume: Literal["auto", "never"] = "auto",
    allow: Annotated[tuple[str, ...], arg(metavar="KEY")] = (),
    dry_run: bool = False,
    json: bool = False,
) -> int:
    """Train a GPT from scratch on your own text.

    Example: pygpt pretrain book.txt --out runs/book --minutes 3 --prompt "It was"

    The same command goes on where an earlier one was stopped.

    Args:
        files: Text, jsonl, json, csv or tsv files, folders of them, or one folder made by prepare.
        out: The run's folder: model/, checkpoints/, metrics.jsonl, run.json.
        tokenizer: A published vocabulary ("gpt2"), a tokenizer file or folder, or "bytes"; if not
            given, one of --vocab-size tokens is trained on the files.
        preset: A published shape instead of the flags under "model options".
        model: The network's shape.
        train: How it is trained.
        minutes: Train for about so long: a short probe turns it into a number of steps.
        validation: Share of the text that is held out.
        text_key: Where the text stands in a row of jsonl, json, csv or tsv.
        prompt: Continued by the model at every evaluation.
        resume: Go on with the run in the folder, or insist on a new one.
        allow: Settings that may differ from those that the run began with.
        dry_run: Only say what would be trained and how long it would take here.
        json: Print events as JSON lines.
    """
    if not files:
        raise UsageError("pretrain: give at least one text file or a prepared folder")
    prepared, tok = _data(files, out, tokenizer, model.vocab_size, validation, text_key)
    shape = _shape(preset, model, tok.n_vocab)
    network = GPT(shape)
    config = train
    if prompt and not config.sample_every:
        config = dataclasses.replace(config, sample_every=config.eval_every)
    device = training.choose_device(config.device)
    if minutes is not None:
        config = dataclasses.replace(config, steps=_steps(minutes, network, prepared, config, out))
    if dry_run:
        return _estimate(network, prepared, config, json)
    if not json:
        print(repr(network))
    with TrainingDisplay(as_json=json, head_dim=shape.head_dim) as display:
        training.pretrain(
            network,
            prepared,
            config,
            out=out,
            resume=resume,
            allow=allow,
            sample=_continue(tok, prompt) if prompt else None,
            on_event=display,
        )
    if not json:
        print(f"{out}/model is trained on {device}; next:")
        print(f'  pygpt generate {out} "{prompt or "Once"}"')
    return 0


def _data(
    files: tuple[Path, ...],
    out: Path,
    tokenizer: str,
    vocab_size: int,
    validation: float,
    text_key: str,
) -> tuple[data.Dataset, Tokenizer]:
    """What `files` hold, prepared: opened if it was before, else put beside the run."""
    if len(files) == 1 and (files[0] / "data.json").exists():
        if tokenizer:
            raise UsageError(f"{files[0]} was prepared with its own tokenizer; drop --tokenizer")
        return data.Dataset.open(files[0]), Tokenizer.from_file(files[0] / "tokenizer.json")
    tok = load_tokenizer(tokenizer) if tokenizer else _train_tokenizer(files, vocab_size, text_key)
    folder = out / "data"
    return data.prepare(files, tok, folder, validation=validation, text_key=text_key), tok


def _train_tokenizer(files: tuple[Path, ...], vocab_size: int, text_key: str) -> Tokenizer:
    texts = (
        text for file in data.list_files(files) for text in data.read_documents(file, text_key)
    )
    return Tokenizer.train(texts, vocab_size)


def _shape(preset: Preset, shape: GPTConfig, vocab_size: int) -> GPTConfig:
    if preset == "none":
        return GPTConfig(**{**shape.to_dict(), "vocab_size": vocab_size})
    changed = {k: v for k, v in shape.to_dict().items() if v != getattr(SMALL, k)}
    changed.pop("vocab_size", None)
    return GPTConfig.preset(
        preset, **{"drop_rate": SMALL.drop_rate, **changed, "vocab_size": vocab_size}
    )


def _steps(
    minutes: float, model: GPT, prepared: data.Dataset, config: TrainConfig, out: Path
) -> int:
    """The steps that fit into `minutes`; a run that goes on keeps those it began with."""
    if (out / "run.json").exists():
        return int(training.Run(out).about["train"]["steps"])
    task = training.Pretraining(prepared, model.config.context_length, config)
    steps = training.steps_for(60 * minutes, model, task, config)
    print(f"{minutes:g} minutes here: --steps {steps} --seed {config.seed}")
    return steps


def _estimate(model: GPT, prepared: data.Dataset, config: TrainConfig, json: bool) -> int:
    task = training.Pretraining(prepared, model.config.context_length, config)
    per_minute = training.steps_for(60, model, task, config, evaluations=0)
    tokens = config.batch_size * model.config.context_length
    epoch = prepared.train.ids.size / tokens
    estimate: dict[str, Any] = {
        "parameters": model.num_params,
        "steps": config.steps,
        "tokens_per_step": tokens,
        "epochs": round(config.steps / epoch, 3),
        "training_flops": 3 * model.flops_per_token() * tokens * config.steps,
        "weights_gradients_and_optimizer_megabytes": round(16 * model.num_params / 1e6, 1),
        "minutes_without_evaluation": round(config.steps / per_minute, 2),
    }
    if json:
        print(json_module.dumps(estimate))
    else:
        device = training.choose_device(config.device)
        dtype = training.choose_dtype(config.dtype, device, model)
        print(header(device, dtype, model.config.head_dim))
        for name, value in estimate.items():
            print(f"{name.replace('_', ' '):45} {value:,}")
    return 0


def _continue(tok: Tokenizer, prompt: str) -> Any:
    def sample(model: Any) -> str:
        return prompt + "".join(
            stream(model, tok, prompt, max_new_tokens=40, temperature=0.8, seed=0)
        )

    return sample
