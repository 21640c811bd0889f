"""From files to windows: nothing is lost or repeated, and what cannot be used is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from pygpt import Tokenizer
from pygpt.data import Dataset, Split, mix, prepare, shuffled, split_documents
from pygpt.data.readers import list_files, read_documents
from pygpt.data.shards import HEADER, open_shard, write_shard
from pygpt.errors import DataError


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    """The 256 bytes and end-of-text."""
    return Tokenizer.train(["bytes"], 257)


# --- the order ---


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_every_epoch_visits_every_sample_once(n: int) -> None:
    for epoch in range(3):
        order = shuffled(range(epoch * n, (epoch + 1) * n), n, seed=7)
        assert sorted(order.tolist()) == list(range(n))


def test_the_order_depends_on_seed_and_epoch_but_not_on_how_it_is_asked_for() -> None:
    n = 1000
    first = shuffled(range(2 * n), n, seed=1)
    assert not np.array_equal(first[:n], first[n:])
    assert not np.array_equal(first, shuffled(range(2 * n), n, seed=2))
    one_by_one = [int(shuffled([i], n, seed=1)[0]) for i in range(990, 1010)]
    assert one_by_one == first[990:1010].tolist()


def test_the_order_looks_random() -> None:
    n = 4096
    order = shuffled(range(n), n, seed=3)
    # Spearman's correlation with the identity has standard deviation 1 / sqrt(n - 1).
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / np.sqrt(n - 1)
    neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(n - 1)


def test_mix_tells_its_arguments_apart() -> None:
    values = {mix(a, b) for a in range(50) for b in range(50)}
    assert len(values) == 2500
    assert all(0 <= value < 2**63 for value in values)


# --- windows ---


def counting(n: int) -> Dataset:
    """The ids 0, 1, 2, ...: a window tells where it begins."""
    split = Split(np.arange(n, dtype=np.uint16), documents=1, characters=n)
    return Dataset(Path("counting"), 1 << 16, split, split, "counting")


@pytest.mark.parametrize(("n", "context"), [(1000, 16), (100, 7), (50, 24), (33, 16)])
def test_an_epoch_of_windows_covers_the_text_without_overlap(n: int, context: int) -> None:
    dataset, offsets = counting(n), set()
    count = (n - 1) // context - 1
    for epoch in range(20):
        windows = dataset.batch(range(epoch * count, (epoch + 1) * count), context, seed=5)
        assert (np.diff(windows) == 1).all()
        starts = np.sort(windows[:, 0])
        assert (np.diff(starts) == context).all()
        offsets.add(int(starts[0]))
    assert len(offsets) > 3  # epochs differ in more than their order


def test_the_shortest_text_is_one_window_and_a_shorter_one_is_refused() -> None:
    assert counting(17).batch(range(3), 16, seed=0).tolist() == [list(range(17))] * 3
    with pytest.raises(DataError, match="16 training tokens, fewer than one window"):
        counting(16).batch(range(3), 16, seed=0)


def test_validation_windows_cover_all_targets_once() -> None:
    split = counting(100).validation
    windows = split.window(split.starts(11), 11)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 100))


# --- preparing ---


def test_a_single_text_is_cut_near_its_end(tok: Tokenizer, tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    dataset = prepare(tmp_path / "a.txt", tok, tmp_path / "data", validation=0.1)
    assert tok.decode(dataset.train.ids.tolist()) == text[:900]
    assert tok.decode(dataset.validation.ids.tolist()) == text[900:]
    assert (dataset.train.characters, dataset.validation.characters) == (900, 100)
    assert dataset.train.ids.dtype == np.uint16


def test_many_documents_are_split_whole_and_separated(tok: Tokenizer, tmp_path: Path) -> None:
    rows = [f"document {i}" for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    dataset = prepare(path, tok, tmp_path / "data", validation=0.1)
    parts = []
    for split in (dataset.train, dataset.validation):
        parts.append(tok.decode(split.ids.tolist()).split("<|endoftext|>"))
        assert len(parts[-1]) == split.documents
    assert sorted(parts[0] + parts[1]) == sorted(rows)
    assert len(parts[1]) == 4


def test_validation_can_be_files_of_its_own(tok: Tokenizer, tmp_path: Path) -> None:
    for name in ("train", "held-out"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    dataset = prepare(
        tmp_path / "train.txt", tok, tmp_path / "data", validation=tmp_path / "held-out.txt"
    )
    assert tok.decode(dataset.validation.ids.tolist()) == "this is held-out"


def test_preparing_twice_gives_the_same_data_and_the_tokenizer_stands_beside_it(
    tok: Tokenizer, tiny_corpus: Path, tmp_path: Path
) -> None:
    first = prepare(tiny_corpus, tok, tmp_path / "data")
    again = prepare(tiny_corpus, tok, tmp_path / "data")
    assert first.fingerprint == again.fingerprint
    text = "one, two, three"
    beside = Tokenizer.from_file(again.folder / "tokenizer.json")
    assert beside.encode(text) == tok.encode(text)
    other = prepare(tiny_corpus, tok, tmp_path / "other", validation=0.2)
    assert other.fingerprint != first.fingerprint


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    ids = np.array([0, 70_000, 99_999], np.uint32)
    write_shard(tmp_path / "a.ids", [ids], 100_000)
    read = open_shard(tmp_path / "a.ids")
    assert read.dtype == np.uint32
    assert read.tolist() == ids.tolist()
    with pytest.raises(ValueError, match="id 99999 is not below the vocabulary size 9000"):
        write_shard(tmp_path / "b.ids", [ids], 9000)


def test_a_folder_in_other_use_is_not_overwritten(
    tok: Tokenizer, tiny_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="choose another folder"):
        prepare(tiny_corpus, tok, tiny_corpus.parent)
    assert tiny_corpus.exists()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_documents(["text"], fraction)


# --- bad files ---

BAD = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\n", "is empty"),
    "binary.txt": (b"text\x00\x01", "zero byte at offset 4"),
    "latin.txt": ("café".encode("latin-1"), "not UTF-8: byte 0xe9 at offset 3"),
    "wide.txt": ("text".encode("utf-16"), "UTF-16; convert it"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "key.jsonl": (
        b'{"text": "a"}\n\n{"body": "b"}\n',
        "line 3: no text under 'text'; there is 'body'",
    ),
    "type.jsonl": (b'{"text": 5}\n', "line 1: the text must be a string, not int"),
    "null.jsonl": (b"null\n", "line 1: no text"),
    "object.json": (b'{"text": "a"}', "must hold a list"),
    "broken.json": (b"[", "not JSON"),
    "key.csv": (b"label,body\n1,two\n", "line 2: no text under 'text'; there is 'label', 'body'"),
    "quote.csv": (b'text\n"never closed\n', "after line 1: unexpected end"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_place(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no file of type"):
        list_files(tmp_path)
    with pytest.raises(ValueError, match="no files"):
        list_files([])


def test_byte_order_marks_go_and_line_ends_become_newlines(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert list(read_documents(path)) == ["one\ntwo\nthree\n"]


def test_rows_of_every_format_are_documents(tmp_path: Path) -> None:
    files = {
        "a.csv": 'label,text\n1,"first, with\ncomma"\n0,second\n',
        "b.tsv": "text\tlabel\nthird\t1\n",
        "c.json": '["fourth", {"text": "fifth"}]',
        "d.jsonl": '{"text": "sixth"}\n{"text": "  "}\n',
        "e.md": "seventh",
        "ignored.png": "not text",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = [text for file in list_files(tmp_path) for text in read_documents(file)]
    ordinals = ["second", "third", "fourth", "fifth", "sixth", "seventh"]
    assert found == ["first, with\ncomma", *ordinals]


# --- damaged shards ---


@pytest.mark.parametrize("seed", range(100))
def test_every_flip_and_every_cut_of_a_shard_is_noticed(seed: int, tmp_path: Path) -> None:
    path, rng = tmp_path / "a.ids", random.Random(seed)
    write_shard(path, [np.arange(200, dtype=np.uint32)], 257)
    raw = bytearray(path.read_bytes())
    if seed % 3 == 0:
        del raw[rng.randrange(len(raw)) :]
    elif seed % 3 == 1:
        raw[rng.randrange(HEADER)] ^= 1 << rng.randrange(8)
    else:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.ids"):
        open_shard(path)


def test_a_data_folder_that_is_not_whole_is_refused(
    tok: Tokenizer, tiny_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="run prepare"):
        Dataset.open(tmp_path)
    dataset = prepare(tiny_corpus, tok, tmp_path / "data")
    (dataset.folder / "data.json").write_text("{}")
    with pytest.raises(DataError, match="run prepare again"):
        Dataset.open(dataset.folder)
