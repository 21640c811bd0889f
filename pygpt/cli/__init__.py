"""The `pygpt` command: finds the verb, parses its flags, turns errors into one line and a code.

A verb is a typed function with a docstring, in the module that `VERBS` names; tyro makes its flags,
so Python and command line agree. Nothing heavy is imported before a verb is known.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from pygpt.errors import PygptError

# Verb -> module and function, and what it does in a line. Two words where a noun comes first.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("demo:demo", "train, fine-tune and talk to a small GPT, in about 3 minutes"),
    "tokenizer train": ("text:train", "train a byte-level BPE vocabulary on files"),
    "tokenizer encode": ("text:encode", "text to token ids, or how many there are"),
    "tokenizer decode": ("text:decode", "token ids to text"),
    "prepare": ("train:prepare", "text files to token shards"),
    "pretrain": ("train:pretrain", "train a GPT from scratch on text files or shards"),
    "finetune classify": ("tune:classify", "teach a pretrained model to sort texts into classes"),
    "finetune instruct": ("tune:instruct", "teach a pretrained model to follow instructions"),
    "finetune prefer": ("tune:prefer", "teach an instructed model which answers are preferred"),
    "predict": ("use:predict", "sort texts with a model made by finetune classify"),
    "generate": ("use:generate", "continue a prompt"),
    "chat": ("use:chat", "give instructions to a model made by finetune instruct"),
    "eval": ("use:evaluate", "measure a model on text, labelled texts or instructions"),
    "convert": ("move:convert", "a checkpoint of any known format to a model folder or GGUF"),
    "info": ("move:info", "describe a checkpoint or a vocabulary"),
    "doctor": ("machine:doctor", "what runs here and how; tests every native op against its twin"),
}

BAD_USAGE, BAD_FILE, NO_RESOURCE, INTERRUPTED = 2, 3, 5, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns 0, or 2 for usage, 3 a bad file, 4 numeric, 5 a resource."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if debug:
        args.remove("--debug")
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _exit_code(error)
        print(f"pygpt: {_one_line(error, code)}", file=sys.stderr)
        return code


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if args[0] in ("-V", "--version"):
        from pygpt import __version__

        print(__version__)
        return 0
    for words in (2, 1):
        verb = " ".join(args[:words])
        if len(args) >= words and verb in VERBS:
            return _call(verb, args[words:])
    family = [verb for verb in VERBS if verb.startswith(f"{args[0]} ")]
    if family:
        if len(args) == 1 or args[1] in ("-h", "--help"):
            print(_listing(family))
            return 0
        choices = ", ".join(verb.split()[1] for verb in family)
        raise _usage(f"{args[0]} has no verb {args[1]!r}; it has {choices}")
    near = difflib.get_close_matches(args[0], {verb.split()[0] for verb in VERBS}, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "'pygpt --help' lists them"
    raise _usage(f"no verb {args[0]!r}; {hint}")


def _call(verb: str, args: list[str]) -> int:
    room, _, name = VERBS[verb][0].partition(":")
    function: Callable[..., int | None] = getattr(
        importlib.import_module(f"pygpt.cli.{room}"), name
    )
    bound = _parse(verb, function, args)
    return bound if isinstance(bound, int) else bound() or 0


def _parse(
    verb: str, function: Callable[..., int | None], args: list[str]
) -> int | Callable[[], int | None]:
    """The call that the flags ask for, or the exit code where --help or a mistake ends it here."""
    import tyro

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], int | None]:
        return functools.partial(function, *values, **named)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                bind, args=args, prog=f"pygpt {verb}", config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if not stop.code:
            return 0
    # tyro draws a box with a title around its complaint; here an error is one line
    lines = [re.sub("[│╭╮╰╯─]", " ", line).strip() for line in complaint.getvalue().splitlines()]
    _, *words = [line for line in lines if line.strip("-")] or [""]
    said, _, near = " ".join(words).partition("Perhaps you meant:")
    said = said.split("For full helptext")[0].strip().rstrip(".")
    hint = f"did you mean {near.split()[0].rstrip(',')}? " if near.split() else ""
    raise _usage(f"{verb}: {said}; {hint}'pygpt {verb} --help' shows all flags")


def _overview() -> str:
    return "\n".join(
        [
            "usage: pygpt VERB ...",
            "",
            "Build, train, fine-tune and run a GPT on your own machine.",
            "",
            _listing(list(VERBS)),
            "",
            "'pygpt VERB --help' shows a verb's flags and an example; --debug shows tracebacks.",
        ]
    )


def _listing(verbs: list[str]) -> str:
    width = max(map(len, verbs))
    return "\n".join(f"  {verb:{width}}  {VERBS[verb][1]}" for verb in verbs)


def _usage(message: str) -> PygptError:
    from pygpt.errors import UsageError

    return UsageError(message)


def _exit_code(error: Exception) -> int:
    if isinstance(error, PygptError):
        return error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return NO_RESOURCE
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
        return NO_RESOURCE if full else BAD_FILE
    if isinstance(error, UnicodeError):
        return BAD_FILE
    if isinstance(error, ValueError | KeyError | OverflowError):
        return BAD_USAGE
    return 1


def _one_line(error: Exception, code: int) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    if code == 1 and not isinstance(error, PygptError):
        return f"internal error, {type(error).__name__}: {text} (--debug shows where)"
    return text
