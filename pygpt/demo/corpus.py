"""About 2 MB of English that every CPython ships: the docstrings of its standard library.

Files are parsed with `ast`; nothing is imported or executed. Whole modules are held out, and a
paragraph that a training module holds is dropped from the held-out ones.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
HELD_OUT_SHARE = 0.15
_LONG = 60  # characters from which a repeated paragraph is a copy, not a coincidence
_ENGLISH = re.compile(r"[A-Za-z ,.']")
_ITEM = re.compile(r"[-*+•]\s|\d+[.)]\s|:\w+")


@dataclass(frozen=True)
class Document:
    """One docstring (or topic): its text, its dotted module, and the kind of thing it describes."""

    module: str
    kind: str  # "module" | "class" | "function" | "method" | "topic"
    text: str

    @property
    def package(self) -> str:
        """The first part of the module's name."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Corpus:
    """Documents of the training modules and of the held-out ones; no module is in both."""

    train: list[Document]
    held_out: list[Document]

    @property
    def characters(self) -> int:
        """Characters of both parts together."""
        return sum(len(document.text) for document in (*self.train, *self.held_out))


def read_standard_library(root: str | Path | None = None) -> Corpus:
    """The docstrings of the standard library at `root` (default: the running Python's).

    Raises FileNotFoundError where there are no sources (a zipped or stripped Python).
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    modules: dict[str, list[Document]] = {}
    for path in _sources(root):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found = list(_documents(path, name))
        if found:
            modules[name] = found
    if not modules:
        raise FileNotFoundError(
            f"no Python sources with docstrings in {root}; give the demo text with --text FILE"
        )
    held_out = held_out_modules(modules)
    # Training modules come first, so that a copied paragraph stays there.
    seen: set[str] = set()
    ordered = sorted(modules, key=lambda name: (name in held_out, name))
    kept = {name: list(_without_copies(modules[name], seen)) for name in ordered}
    return Corpus(
        train=[d for name in ordered if name not in held_out for d in kept[name]],
        held_out=[d for name in ordered if name in held_out for d in kept[name]],
    )


def held_out_modules(names: Iterable[str]) -> set[str]:
    """About `HELD_OUT_SHARE` of the modules of every package, chosen by a hash of the name."""
    packages: dict[str, list[str]] = {}
    for name in names:
        package, dot, _ = name.partition(".")
        packages.setdefault(package if dot else "", []).append(name)
    packages.get("", []).sort()
    held_out: set[str] = set()
    for members in packages.values():
        # The language reference is one module and a third of the text: it is always trained on.
        ranked = sorted((m for m in members if m != "pydoc_data.topics"), key=_digest)
        held_out.update(ranked[: round(HELD_OUT_SHARE * len(ranked))])
    return held_out


def clean(text: str) -> str:
    """`text` as flowing paragraphs of prose: code, tables and rulers dropped, lines joined.

    >>> clean("Return it.\\n\\n    >>> f(1)\\n    2\\n\\nThe result\\nis a list.")
    'Return it.\\n\\nThe result is a list.'
    """
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.expandtabs().strip()):
        lines: list[str] = []
        for line in map(str.strip, block.splitlines()):
            if lines and not _ITEM.match(line):
                lines[-1] += " " + line
            else:
                lines.append(line)
        paragraph = "\n".join(lines)
        letters = len(_ENGLISH.findall(paragraph))
        if paragraph and letters >= 0.86 * len(paragraph) and ">>>" not in paragraph:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def words(documents: Iterable[Document], *, at_least: int = 2) -> list[str]:
    """The plain lower-case words of 3 to 10 letters that occur `at_least` times, sorted."""
    counts: dict[str, int] = {}
    for document in documents:
        for word in re.findall(r"(?<![\w'])[a-z]{3,10}(?![\w'])", document.text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, count in counts.items() if count >= at_least)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name not in SKIPPED_FOLDERS:
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _documents(path: Path, module: str) -> Iterator[Document]:
    source = path.read_text(encoding="utf-8", errors="replace")
    if '"""' not in source and "'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # templates and samples with the suffix of a module
    if module == "pydoc_data.topics":
        found = _topics(tree)
    else:
        found = _docstrings(tree, "module")
    for kind, text in found:
        prose = clean(text)
        if len(prose) >= 20:
            yield Document(module, kind, prose)


def _docstrings(node: ast.AST, kind: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield kind, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(
                child, "method" if isinstance(node, ast.ClassDef) else "function"
            )
        elif isinstance(child, ast.stmt):
            yield from _docstrings(child, kind)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
            yield "topic", node.value


def _without_copies(documents: list[Document], seen: set[str]) -> Iterator[Document]:
    for document in documents:
        fresh = []
        whole = len(document.text) < _LONG
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.lower().split())
            if key in seen and (whole or len(key) >= _LONG):
                continue
            seen.add(key)
            fresh.append(paragraph)
        if fresh:
            yield Document(document.module, document.kind, "\n\n".join(fresh))
