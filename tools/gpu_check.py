"""Build, test and measure pygpt on this machine's GPU, with the Python and torch that stand here.

`make gpu-check` needs no network and no virtual environment: the package goes into build/gpu-check,
missing Python packages and data are named instead of failing, every step runs even when one before
it failed, and a table comes last. `python3 tools/gpu_check.py --device cpu` rehearses the steps
without a GPU.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-check"
NEEDED = ["torch", "numpy", "safetensors", "tiktoken", "huggingface_hub", "rich", "tyro"]
BUILD = ["scikit_build_core", "pybind11", "cmake", "ninja"]
TESTS = ["pytest", "hypothesis"]

# A short training and generation on the device, in a process of its own; prints one JSON line.
TRAIN = """
import json, sys, tempfile, time
import torch, pygpt
from pathlib import Path

device, folder = sys.argv[1], Path(tempfile.mkdtemp())
words = "one two three four five six seven eight nine ten".split()
text = " ".join(words[(i * i + 3 * i) % 10] for i in range(40000))
(folder / "counting.txt").write_text(text)
tokenizer = pygpt.Tokenizer.train([text], 300)
data = pygpt.data.prepare([folder / "counting.txt"], tokenizer, folder / "data")
context, width, batch = (256, 384, 64) if device == "cuda" else (64, 96, 8)
model = pygpt.GPT(pygpt.GPTConfig(vocab_size=tokenizer.n_vocab, context_length=context,
                                  emb_dim=width, n_heads=6, n_layers=6, drop_rate=0.0))
config = pygpt.TrainConfig(steps=200, batch_size=batch, device=device, seed=1)
began = time.perf_counter()
run = pygpt.pretrain(model, data, config, out=folder / "run")
seconds = time.perf_counter() - began
losses = [m["loss"] for m in run.metrics if "loss" in m]
assert losses[-1] < losses[0] / 2, losses
model = pygpt.GPT.from_pretrained(folder / "run" / "model", device=device)
prompt = tokenizer.encode("one two")
began = time.perf_counter()
out = pygpt.generate(model, prompt, max_new_tokens=32, temperature=0.0)
print(json.dumps({"loss": losses[-1], "train_tokens_per_second": 200 * batch * context / seconds,
                  "generate_tokens_per_second": 32 / (time.perf_counter() - began)}))
"""


def versions(names: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


class Check:
    """Runs the steps, remembers one row of the table for each."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self.deadline = time.perf_counter() + seconds
        self.rows: list[tuple[str, str, str]] = []
        self.env = {**os.environ, "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}

    def row(self, step: str, state: str, said: str) -> None:
        self.rows.append((step, state, said))

    def run(self, step: str, command: list[str], limit: int, cwd: Path = ROOT) -> str | None:
        """The output of a command, or None where it failed; the row is left to the caller then."""
        print(f"\n== {step}: {' '.join(command)[:100]}", flush=True)
        began = time.perf_counter()
        limit = min(limit, int(self.deadline - began))
        if limit < 5:
            self.row(step, "FAILED", "not begun: no time is left")
            return None
        try:
            done = subprocess.run(
                command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired as late:
            print((late.stdout or b"").decode(errors="replace")[-6000:], flush=True)
            self.row(step, "FAILED", f"more than {limit} s")
            return None
        output = done.stdout + done.stderr
        print(output[-6000:], flush=True)
        if done.returncode:
            last = (output.strip().splitlines() or [""])[-1]
            self.row(step, "FAILED", f"exit {done.returncode}: {last[:90]}")
            return None
        print(f"   {time.perf_counter() - began:.1f} s", flush=True)
        return output

    def packages(self) -> None:
        found = versions(NEEDED + BUILD + TESTS)
        absent = [name for name, version in found.items() if version is None]
        self.row(
            "packages", "ok" if not absent else "some", "missing: " + (", ".join(absent) or "-")
        )

    def build(self) -> bool:
        shutil.rmtree(SITE, ignore_errors=True)
        cuda = "ON" if self.device == "cuda" else "OFF"
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(SITE)]
        command += ["-C", f"cmake.define.PYGPT_CUDA={cuda}", "-C", "build-dir=build/gpu-build", "."]
        began = time.perf_counter()
        if self.run("build", command, 300) is None:
            return False
        self.row("build", "ok", f"{time.perf_counter() - began:.0f} s, PYGPT_CUDA={cuda}")
        return True

    def tests(self) -> None:
        select = ["-m", "cuda"] if self.device == "cuda" else ["tests/test_model.py"]
        command = [sys.executable, "-m", "pytest", "-o", "pythonpath=", "-p", "no:cacheprovider"]
        command += ["--import-mode=importlib", *select]
        output = self.run("tests", command, 240)
        if output is not None:
            found = re.findall(r"\d+ passed.*", output)
            self.row("tests", "ok", found[-1].rstrip(" =") if found else "?")

    def training(self) -> None:
        output = self.run(
            "training", [sys.executable, "-c", TRAIN, self.device], 120, ROOT / "build"
        )
        if output is not None:
            said = json.loads(next(x for x in output.splitlines() if x.startswith("{")))
            text = ", ".join(f"{name} {value:,.3g}" for name, value in said.items())
            self.row("train, generate", "ok", text)

    def benchmarks(self) -> None:
        bench = ROOT / "benchmarks" / "bench_cuda.py"
        if self.device == "cuda" and bench.exists():
            left = max(20, self.deadline - time.perf_counter() - 40)  # the last section ends later
            command = [sys.executable, str(bench), "--seconds", str(int(min(left, 200)))]
            output = self.run("benchmarks", command, 300)
            if output is not None:
                self.row("benchmarks", "ok", "table above")

    def table(self) -> int:
        import torch

        print("\n" + "=" * 100)
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu (a rehearsal)"
        print(f"pygpt gpu-check on {name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        for step, state, said in self.rows:
            lines = textwrap.wrap(said, 74) or [""]
            print(f"{step:16} {state:7} {lines[0]}")
            for line in lines[1:]:
                print(f"{'':24} {line}")
        return int(any(state == "FAILED" for _, state, _ in self.rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=540, help="for all steps together")
    arguments = parser.parse_args()
    device = arguments.device
    if versions(["torch"])["torch"] is None:
        print("gpu-check: this python3 has no torch; install a CUDA build of torch 2.10 or later")
        return 2
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here (torch.cuda.is_available() is False)")
        return 2
    check = Check(device, arguments.seconds)
    check.packages()
    if check.build():
        check.tests()
        check.training()
        check.benchmarks()
    return check.table()


if __name__ == "__main__":
    sys.exit(main())
