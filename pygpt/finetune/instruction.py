"""A GPT that follows instructions: tuned on tasks and their answers, asked for replies."""

from __future__ import annotations

import copy
import json
import string
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from pygpt.config import LoRAConfig, TrainConfig
from pygpt.errors import DataError
from pygpt.finetune.lora import LoRAModel
from pygpt.finetune.records import Instruction, Source, load_parts, read_instructions, write
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
from pygpt.generation import generate, stream
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer
from pygpt.training import Batch, Event

_IGNORED = -100


@dataclass(frozen=True)
class Template:
    """How a task becomes a prompt: two texts, filled in at {instruction} and {input}.

    >>> TEMPLATES["short"].prompt("Sort the words:", "pear apple")
    'Sort the words: pear apple\\n'
    """

    with_input: str
    without_input: str

    def __post_init__(self) -> None:
        wanted = {"with_input": {"instruction", "input"}, "without_input": {"instruction"}}
        for name, fields in wanted.items():
            text = getattr(self, name)
            if {field for _, field, _, _ in string.Formatter().parse(text) if field} != fields:
                names = " and ".join(f"{{{field}}}" for field in sorted(fields, reverse=True))
                raise ValueError(f"{name} must hold {names}, got {text!r}")

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text that the answer follows."""
        text = self.with_input if input else self.without_input
        return text.format(instruction=instruction, input=input)


_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}"
)
# "alpaca" and "phi" are the book's; "short" leaves a small context to the task itself.
TEMPLATES = {
    "alpaca": Template(
        with_input=_ALPACA + "\n\n### Input:\n{input}\n\n### Response:\n",
        without_input=_ALPACA + "\n\n### Response:\n",
    ),
    "phi": Template(
        with_input="<|user|>\n{instruction}:{input}\n\n<|assistant|>:\n",
        without_input="<|user|>\n{instruction}\n\n<|assistant|>:\n",
    ),
    "short": Template(with_input="{instruction} {input}\n", without_input="{instruction}\n"),
}


def instruct(
    model: GPT,
    tok: Tokenizer,
    data: Source | Mapping[str, Source],
    config: TrainConfig | None = None,
    *,
    out: str | Path,
    template: str | Template = "alpaca",
    mask_prompt: bool = True,
    lora: LoRAConfig | None = None,
    split: tuple[float, float, float] = (0.85, 0.05, 0.10),
    resume: str | Path = "auto",
    on_event: Callable[[Event], None] | None = None,
) -> InstructModel:
    """Teach a copy of `model` to answer instructions; `model` itself stays as it is.

    `data` is whatever `read_instructions` takes, split by `split` and the configuration's seed into
    train, validation and test with equal tasks and groups kept together, or a mapping with sources
    for "train", "validation" and perhaps "test". What is learnt is the answer and the end-of-text
    after it; with `mask_prompt=False` the prompt too, which is what the book does. With `lora`,
    only low-rank additions to the weights learn. Without a `config`: two epochs with the book's
    settings, which suit a pretrained GPT-2; a small or fresh model wants a higher learning rate.
    Every `config.sample_every` steps the shortest validation task is answered.

    The run's folder `out` also receives the test part, `test.jsonl`. An example that does not fit
    the context is cut, or left out where none of its answer fits, with a warning that counts both.

    >>> chat = instruct(model, tok, "data.json", out="runs/chat")  # doctest: +SKIP
    """
    check_vocabulary(model, tok)
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ValueError(f"no template {template!r}; there are {', '.join(TEMPLATES)}")
        template = TEMPLATES[template]
    seed = 0 if config is None else config.seed
    parts = load_parts(data, read_instructions, split, seed)
    config = config or book_config(len(parts["train"]), epochs=2)
    result = InstructModel(copy.deepcopy(model), tok, template)
    task = _InstructionTuning(parts, result, config, mask_prompt, lora and asdict(lora))
    asked = min(
        ((row.instruction, row.input) for row in parts["validation"]),
        key=lambda it: len(tok.encode_ordinary(template.prompt(*it))),
    )

    def sample(_: nn.Module) -> str:
        return template.prompt(*asked) + result.reply(*asked, max_new_tokens=64)

    tune(
        result.model if lora is None else LoRAModel(result.model, lora),
        task,
        config,
        out=out,
        resume=resume,
        tokenizer=tok,
        sample=sample,
        on_event=on_event,
    )
    result.save_template(Path(out) / "model")
    if parts["test"]:
        write(parts["test"], Path(out) / "test.jsonl")
    return result


class InstructModel:
    """A model that answers instructions; made by `instruct` or `InstructModel.load`."""

    def __init__(self, model: GPT, tok: Tokenizer, template: Template) -> None:
        self.model, self.tok, self.template = model, tok, template

    def reply(self, instruction: str, input: str = "", **settings: Any) -> str:
        """The answer to one task; settings and errors as for `replies`.

        >>> chat.reply("Sort the words:", "pear apple")  # doctest: +SKIP
        'apple pear'
        """
        return self.replies([(instruction, input)], **settings)[0]

    def replies(
        self,
        tasks: Sequence[tuple[str, str]],
        *,
        max_new_tokens: int = 256,
        batch_size: int = 32,
        **sampling: Any,
    ) -> list[str]:
        """The answers to (instruction, input) pairs, generated together.

        Greedy, unless `sampling` (as for `pygpt.generate`) says otherwise. An answer ends at
        end-of-text, after `max_new_tokens`, or where the context is full. Raises ValueError on a
        task that is longer than the context.
        """
        prompts = [self.prompt_ids(*task) for task in tasks]
        room = self.model.config.context_length + 1  # the last token is not read
        answers = [""] * len(prompts)
        for batch in batches_by_length([len(ids) for ids in prompts], batch_size):
            found = generate(
                self.model,
                [prompts[i] for i in batch],
                min(max_new_tokens, room - len(prompts[batch[0]])),  # the shortest comes first
                stop=end_of_text(self.tok),
                **{"temperature": 0.0, **sampling},
            )
            for i, ids in zip(batch, found, strict=True):
                answers[i] = self.tok.decode(ids[len(prompts[i]) : room]).strip()
        return answers

    def stream(
        self, instruction: str, input: str = "", *, max_new_tokens: int = 256, **sampling: Any
    ) -> Iterator[str]:
        """The answer to one task, piece by piece; arguments and errors as for `replies`."""
        ids = self.prompt_ids(instruction, input)
        room = self.model.config.context_length + 1 - len(ids)
        sampling = {"temperature": 0.0, **sampling}
        return stream(self.model, self.tok, ids, min(max_new_tokens, room), **sampling)

    def prompt_ids(self, instruction: str, input: str = "") -> list[int]:
        """The ids that an answer continues; ValueError where the context cannot hold them."""
        ids = self.tok.encode_ordinary(self.template.prompt(instruction, input))
        if len(ids) > self.model.config.context_length:
            raise ValueError(
                f"the task has {len(ids)} tokens with its template, more than the context of "
                f"{self.model.config.context_length}; shorten it"
            )
        return ids

    def report(self, dataset: Source, **settings: Any) -> dict[str, float]:
        """How many replies equal the wanted output, and the loss, in nats a target token.

        Spaces at both ends do not count. `settings` as for `replies`.
        """
        rows = read_instructions(dataset)
        replies = self.replies([(row.instruction, row.input) for row in rows], **settings)
        right = sum(a.strip() == row.output.strip() for a, row in zip(replies, rows, strict=True))
        examples = encode(self, rows, mask_prompt=True)
        loss = _mean_loss(self.model, examples, settings.get("batch_size", 32))
        return {"tasks": len(rows), "exact_match": right / len(rows), "loss": loss}

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer and template to `folder`, for `InstructModel.load`."""
        self.model.save_pretrained(folder, self.tok)
        self.save_template(Path(folder))

    def save_template(self, folder: Path) -> None:
        """Write template.json beside a model, which `load` then takes."""
        text = json.dumps(asdict(self.template), indent=1)
        (folder / "template.json").write_text(text + "\n")

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> Self:
        """The model in a run's folder or in a folder that `save` wrote."""
        folder = model_folder(folder, "template.json", "finetune instruct")
        template = Template(**json.loads((folder / "template.json").read_text()))
        model = GPT.from_pretrained(folder, device=device).eval()
        return cls(model, Tokenizer.from_file(folder), template)


@dataclass(frozen=True)
class Example:
    """A prompt with its answer and end-of-text; the first `given` targets are not to be learned."""

    ids: list[int]
    given: int

    @property
    def targets(self) -> list[int]:
        """What follows each id but the last, or -100."""
        return [_IGNORED] * self.given + self.ids[self.given + 1 :]


class _InstructionTuning:
    """The task for `training.fit`."""

    name = "instruct"

    def __init__(
        self,
        parts: Mapping[str, list[Instruction]],
        chat: InstructModel,
        config: TrainConfig,
        mask_prompt: bool,
        method: Any = None,
    ) -> None:
        self.examples = encode(chat, parts["train"], mask_prompt)
        if not any(example.ids[-1:] == end_of_text(chat.tok) for example in self.examples):
            warnings.warn(
                "no training example ends with end-of-text, so replies will not end by themselves: "
                "the tokenizer has no such token, or no example fits the context",
                stacklevel=2,
            )
        self.batch_size = config.micro_batch_size or config.batch_size
        limit = config.eval_batches * self.batch_size or len(parts["validation"])
        self.held_out = encode(chat, parts["validation"][:limit], mask_prompt)
        lengths = [len(example.ids) for example in self.examples]
        self.order = Order(lengths, config.batch_size, config.seed)
        self.fingerprint = fingerprint([asdict(example) for example in self.examples], method)

    def batch(self, positions: range) -> Batch:
        return example_batch([self.examples[i] for i in self.order[positions]])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return _loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": _mean_loss(model, self.held_out, self.batch_size)}


def example_batch(examples: Sequence[Example]) -> Batch:
    """`ids` and `targets`, (B, T) each."""
    return {
        "ids": pad([example.ids[:-1] for example in examples]),
        "targets": pad([example.targets for example in examples], _IGNORED),
    }


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    targets = batch["targets"]
    loss: Tensor = model.loss(batch["ids"], targets, reduction="sum")  # type: ignore[operator]
    return loss, int((targets != _IGNORED).sum())


def _mean_loss(model: nn.Module, examples: Sequence[Example], batch_size: int) -> float:
    total, count = 0.0, 0
    with evaluating(model) as device:
        for chosen in batches_by_length([len(example.ids) for example in examples], batch_size):
            batch = example_batch([examples[i] for i in chosen])
            loss, targets = _loss(model, {name: x.to(device) for name, x in batch.items()})
            total += float(loss)
            count += targets
    return total / count


def encode(chat: InstructModel, rows: Sequence[Instruction], mask_prompt: bool) -> list[Example]:
    """The rows that fit the context, at least with the first token of the answer."""
    prompts = chat.tok.encode_ordinary_batch(
        [chat.template.prompt(row.instruction, row.input) for row in rows]
    )
    answers = chat.tok.encode_ordinary_batch([row.output for row in rows])
    end = end_of_text(chat.tok)
    room = chat.model.config.context_length + 1  # the last id is a target only
    examples, cut, left_out = [], 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt + answer + end
        if len(prompt) < room:
            examples.append(Example(ids[:room], len(prompt) - 1 if mask_prompt else 0))
            cut += len(ids) > room
        else:
            left_out += 1
    if cut or left_out:
        warnings.warn(
            f"of {len(rows)} examples, {cut} are cut to the context of {room - 1} tokens and "
            f"{left_out} left out, because their prompts fill it",
            stacklevel=2,
        )
    if not examples:
        raise DataError(f"no example fits the context of {room - 1} tokens; shorten the template")
    return examples
