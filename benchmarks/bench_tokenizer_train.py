"""Training beside tokenizers, rustbpe, gigatoken and bpeasy: equal first, then timed.

    python benchmarks/bench_tokenizer_train.py [--full] [--vocab-size 8192 ...] [--megabytes 26]

Sides run in fresh processes and take turns; MB of memory are what training adds. The corpus is the
standard library's sources and, where PYGPT_DATA has them, books. Merges are compared with Hugging
Face's one by one. --full takes both sizes and three rounds, and then up to 200 MB of the corpus,
repeated, for pygpt alone.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

from bench_tokenizer import DATA, corpus
from memory import peak

PEERS = ["tokenizers", "rustbpe", "gigatoken", "bpeasy"]
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def documents(megabytes: float) -> list[str]:
    text = corpus("english") if (DATA / "books").is_dir() else ""
    text += corpus("python")
    size = int(megabytes * 1e6)
    while len(text) < size:
        text += text
    text = text[:size]
    return [text[i : i + 100_000] for i in range(0, len(text), 100_000)]


def show_growth(vocab_size: int, threads: int) -> None:
    print(f"more text, to {vocab_size}, {threads} threads")
    for megabytes in (25, 50, 100, 200):
        run = turn("pygpt", vocab_size, megabytes, threads)
        per = run["seconds"] / megabytes * 1000
        print(f"  {megabytes:>4} MB {run['seconds']:8.2f} s {per:6.1f} ms/MB", end="")
        print(f"{run['megabytes']:8.0f} MB of memory")


def turn(side: str, vocab_size: int, megabytes: float, threads: int) -> dict:
    """One training in a fresh process."""
    run = subprocess.run(
        [sys.executable, __file__, "--measure", side, *map(str, (vocab_size, megabytes, threads))],
        capture_output=True,
        text=True,
        env=os.environ | {"RAYON_NUM_THREADS": str(threads)},
        check=False,
    )
    if run.returncode:
        raise SystemExit(f"{side}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def train(side: str, texts: list[str], size: int, threads: int) -> list | None:
    """Trains; returns the merges where the side can say them."""
    if side == "pygpt":
        from pygpt.tokenizer import Tokenizer

        tok = Tokenizer.train(texts, size, num_threads=threads)
        return [[tok.decode_bytes([i]).hex() for i in pair] for pair in tok._native.merges()]
    if side == "tokenizers":
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tok.train_from_iterator(texts, trainer)
        from pygpt.tokenizer.formats import bytes_of

        merges = json.loads(tok.to_str())["model"]["merges"]
        return [[bytes_of(part).hex() for part in pair] for pair in merges]
    if side == "rustbpe":
        import rustbpe

        rustbpe.Tokenizer().train_from_iterator(iter(texts), size - 1, pattern=GPT2)
    elif side == "gigatoken":
        import gigatoken

        # Separated by something that the texts do not hold, so that documents stay apart.
        data = "\x00\x01".join(texts).encode()
        gigatoken.train_bpe(data, size, ["<|endoftext|>"], separator=b"\x00\x01")
    elif side == "bpeasy":
        import bpeasy

        bpeasy.train_bpe(iter(texts), GPT2, 128, size - 1)
    return None


def measure(side: str, size: int, megabytes: float, threads: int) -> dict:
    texts = documents(megabytes)
    before = peak(reset=True) / 1e6
    start = time.perf_counter()
    merges = train(side, texts, size, threads)
    seconds = time.perf_counter() - start
    after = peak() / 1e6
    digest = hashlib.sha256(json.dumps(merges).encode()).hexdigest() if merges else None
    return {"seconds": seconds, "megabytes": after - before, "merges": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--vocab-size", nargs="+", type=int)
    parser.add_argument("--megabytes", type=float, default=26)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peers", nargs="*", default=PEERS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, size, megabytes, threads = arguments.measure
        print(json.dumps(measure(side, int(size), float(megabytes), int(threads))))
        return
    sizes = arguments.vocab_size or ([8192, 50257] if arguments.full else [8192])
    rounds = arguments.rounds or (3 if arguments.full else 1)
    absent = [peer for peer in arguments.peers if importlib.util.find_spec(peer) is None]
    if absent:
        print(f"absent: {', '.join(absent)}")
    sides = ["pygpt", *(peer for peer in arguments.peers if peer not in absent)]
    for size in sizes:
        for threads in arguments.threads:
            runs: dict[str, list[dict]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side in sides:
                    runs[side].append(turn(side, size, arguments.megabytes, threads))
            print(f"{arguments.megabytes:g} MB to {size}, {threads} threads")
            for side in sides:
                seconds = statistics.median(r["seconds"] for r in runs[side])
                memory = statistics.median(r["megabytes"] for r in runs[side])
                merges = runs[side][0]["merges"]
                note = ""
                if side != "pygpt" and merges:
                    note = "equal" if merges == runs["pygpt"][0]["merges"] else "OTHER MERGES"
                print(f"  {side:<12}{seconds:8.2f} s {memory:8.0f} MB  {note}")
    if arguments.full:
        for threads in arguments.threads:
            show_growth(sizes[0], threads)


if __name__ == "__main__":
    main()
