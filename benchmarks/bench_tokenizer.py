"""Encoding and decoding beside tiktoken and the fastest peers from PyPI: equal first, then timed.

    python benchmarks/bench_tokenizer.py [--full] [--corpus english ...] [--vocabulary gpt2 ...]

Every figure comes from a fresh process: "cold" is its first call after loading the vocabulary,
"warm" the median of the next ones; sides take turns. MB are of UTF-8, one thread. 2 MB of each
corpus and one round; --full takes all of it and three.
Corpora are looked for in PYGPT_DATA (default ../shared/data), vocabularies in its tiktoken cache;
without them the standard library's sources and a vocabulary trained on them do.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
from memory import resident

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PYGPT_DATA", ROOT / "../shared/data"))
CACHE = DATA / "tokenizers" / "tiktoken_cache"
LIMIT = 13_000_000  # bytes of each corpus
GROUPS = {
    "english": ["books/*/*.txt"],
    "multilingual": ["multilingual/*.txt", "multilingual/*.jsonl"],
    "cjk": ["multilingual/ud_zh.txt", "multilingual/ud_ja.txt", "multilingual/ud_ko.txt"],
}
FILES = {  # gigatoken takes a path whose name says the pattern
    "gpt2": ("r50k_base", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"),
    "cl100k_base": ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    "o200k_base": ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
}
PEERS = ["tiktoken", "gigatoken", "quicktok", "rs_bpe", "tokenizers"]


def corpus(name: str) -> str:
    if name == "python":
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        paths = [p for p in paths if "site-packages" not in p.parts]
    else:
        paths = sorted(p for pattern in GROUPS[name] for p in DATA.glob(pattern))
    data = b""
    for path in paths:
        if len(data) < LIMIT:
            data += path.read_bytes()
    data *= max(1, 2_500_000 // len(data))  # some sentences of each language are few
    return data[:LIMIT].decode("utf-8", "ignore").replace("<|endoftext|>", "")


def load(side: str, vocabulary: str):
    """One library: encode to an array or list, encode to a list, decode, count or None."""
    if CACHE.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(CACHE.resolve())
    if side == "pygpt":
        from pygpt.tokenizer import Tokenizer

        t = Tokenizer.from_pretrained(vocabulary)
        return (
            lambda s: t.encode_to_numpy(s, disallowed_special=()),
            t.encode_ordinary,
            t.decode_bytes,
            t.count,
        )
    if side == "tiktoken":
        import tiktoken

        t = tiktoken.get_encoding(vocabulary)
        return (
            lambda s: t.encode_to_numpy(s, disallowed_special=()),
            t.encode_ordinary,
            t.decode_bytes,
            None,
        )
    if side == "gigatoken":
        import gigatoken

        name, digest = FILES[vocabulary]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.tiktoken"
            path.write_bytes((CACHE / digest).read_bytes())
            t = gigatoken.Tokenizer.from_tiktoken(path)
        return t.encode, lambda s: t.encode(s).tolist(), t.decode, None
    if side == "rs_bpe":
        from rs_bpe.bpe import openai

        t = {"cl100k_base": openai.cl100k_base, "o200k_base": openai.o200k_base}[vocabulary]()
        return t.encode, t.encode, lambda ids: t.decode(ids.tolist()).encode(), t.count
    if side == "tokenizers":
        import tokenizers

        from pygpt.tokenizer import Tokenizer

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            Tokenizer.from_pretrained(vocabulary).save(path)
            t = tokenizers.Tokenizer.from_file(str(path))

        def ids_of(s):
            return t.encode(s, add_special_tokens=False).ids

        return ids_of, ids_of, lambda ids: t.decode(ids.tolist()).encode(), None
    if side == "quicktok":
        import quicktok

        t = quicktok.get_encoding(vocabulary)
        return t.encode_ordinary, t.encode_ordinary, t.decode_bytes, t.count
    raise ValueError(side)


def timed(call, argument):
    start = time.perf_counter()
    result = call(argument)
    return time.perf_counter() - start, result


def measure(side: str, vocabulary: str, name: str, limit: int) -> dict:
    text = corpus(name)[:limit]
    text.encode()
    importlib.import_module("pygpt.tokenizer" if side == "pygpt" else side)
    start, before = time.perf_counter(), resident()
    encode, encode_list, decode, count = load(side, vocabulary)
    seconds = {"load": time.perf_counter() - start}
    memory = (resident() - before) / 1e6
    seconds["cold"], ids = timed(encode, text)
    ids = np.asarray(ids, np.uint32)
    seconds["warm"] = statistics.median(timed(encode, text)[0] for _ in range(3))
    seconds["list"] = statistics.median(timed(encode_list, text)[0] for _ in range(3))
    if count:
        seconds["count"] = statistics.median(timed(count, text)[0] for _ in range(3))
    seconds["decode"], again = timed(decode, ids)
    seconds["decode"] = min(seconds["decode"], timed(decode, ids)[0])
    assert bytes(again) == text.encode(), f"{side} does not give the text back"
    shorts = [text[i : i + 20 + i % 181] for i in range(0, len(text), max(len(text) // 5000, 1))]
    for short in shorts:
        encode_list(short)
    start = time.perf_counter()
    for short in shorts:
        encode_list(short)
    seconds["short"] = (time.perf_counter() - start) / len(shorts)
    return {
        "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
        "bytes": len(text.encode()),
        "memory": memory,
        "seconds": seconds,
    }


def in_fresh_process(side: str, vocabulary: str, name: str, limit: int) -> dict:
    command = [sys.executable, __file__, "--measure", side, vocabulary, name, str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{side} {vocabulary} {name}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def compare_with_the_twin() -> None:
    """Native against pure Python at a small size."""
    from pygpt.tokenizer import PATTERNS, Tokenizer

    try:
        import regex

        from pygpt import reference
    except ImportError as absent:
        print(f"pure Python twin: absent ({absent.name})")
        return
    text = corpus("python")[:200_000]
    tok = Tokenizer.train([text], 1024)
    ranks = {token: i for i, token in enumerate(tok.decode_tokens_bytes(range(1023)))}
    pieces = [piece.encode() for piece in regex.findall(PATTERNS["gpt2"], text)]
    native, ids = timed(tok.encode_ordinary, text)
    python, twin = timed(lambda p: [i for x in p for i in reference.bpe_encode(ranks, x)], pieces)
    assert ids == twin
    print(
        f"native {native * 1e3:.1f} ms, pure Python {python * 1e3:.0f} ms: {python / native:.0f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", nargs="+", default=["english", "python", "multilingual", "cjk"])
    parser.add_argument("--vocabulary", nargs="+", default=list(FILES))
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument(
        "--full", action="store_true", help="13 MB each, three rounds: minutes a row"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        *names, size = arguments.measure
        print(json.dumps(measure(*names, int(size))))
        return
    limit, rounds = (LIMIT, 3) if arguments.full else (2_000_000, 1)

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread each")
    compare_with_the_twin()
    if not CACHE.is_dir():
        print(f"no published vocabularies in {CACHE}: peers are not compared")
        return
    peers = arguments.peers
    absent = [peer for peer in peers if importlib.util.find_spec(peer) is None]
    if absent:
        print(f"absent: {', '.join(absent)}")
    sides = ["pygpt", *(peer for peer in peers if peer not in absent)]
    columns = ["cold", "warm", "list", "count", "decode"]
    print(f"{'MB/s':<36}" + "".join(f"{c:>8}" for c in columns) + "  short us  load ms      MB")
    for name in arguments.corpus:
        for vocabulary in arguments.vocabulary:
            able = [s for s in sides if vocabulary != "gpt2" or s not in ("quicktok", "rs_bpe")]
            runs: dict[str, list[dict]] = {side: [] for side in able}
            for _ in range(rounds):
                for side in able:
                    runs[side].append(in_fresh_process(side, vocabulary, name, limit))
            first = runs["pygpt"][0]
            for side in able:
                first_of_side = runs[side][0]
                equal = first_of_side["ids"] == first["ids"]
                middle = {
                    key: statistics.median(r["seconds"][key] for r in runs[side])
                    for key in first_of_side["seconds"]
                }
                rates = "".join(
                    f"{first['bytes'] / middle[c] / 1e6:8.0f}" if c in middle else f"{'-':>8}"
                    for c in columns
                )
                print(
                    f"{name:<13}{vocabulary:<13}{side:<11}{rates}{middle['short'] * 1e6:9.2f}"
                    f"{middle['load'] * 1e3:9.0f}{first_of_side['memory']:8.0f}",
                    "" if equal else " OTHER IDS",
                    flush=True,
                )


if __name__ == "__main__":
    main()
