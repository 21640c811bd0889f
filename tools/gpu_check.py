"""Build, test and measure pygpt on this machine's GPU, with the Python and torch that stand here.

`make gpu-check` needs no network and no virtual environment: the package goes into build/gpu-check,
missing Python packages are named instead of failing, every step is a process of its own and runs
even when one before it failed, and a table comes last, with the lines that pygpt/ops/dispatch.py
may take up. The benchmarks' tables and the whole output go to --out, benchmarks/results by default.
`python3 tools/gpu_check.py --device cpu` rehearses the steps without a GPU.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
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

# The tests by what they tell about; a fault of the GPU spoils only the process that it happens in.
KINDS = {
    "sampling": "sampl or choice",
    "losses": "cross_entropy",
    "models": "model or auto or opcheck or every_gpu",
    "sanitizer": "sanitizer",
}
KINDS = {"attention": "not (" + " or ".join(KINDS.values()) + ")"} | KINDS
PROVED_BY = {
    "causal_attention": "attention",
    "sample": "sampling",
    "cross_entropy": "losses",
    "linear_cross_entropy": "losses",
}
NOISE = 1.02  # times torch's time that still count as not slower

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
with pygpt.ops.backend("native"):
    run = pygpt.pretrain(model, data, config, out=folder / "run")
seconds = time.perf_counter() - began
losses = [m["loss"] for m in run.metrics if "loss" in m]
assert losses[-1] < losses[0] / 2, losses
model = pygpt.GPT.from_pretrained(folder / "run" / "model", device=device)
prompt = tokenizer.encode("one two")
began = time.perf_counter()
with pygpt.ops.backend("native"):
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


def verdict(
    measured: list[tuple[str, str, str, float]],
    proved: set[str],
    capability: tuple[int, int],
    where: str,
) -> list[str]:
    """Lines for MEASURED, then why the other ops and dtypes get none.

    `measured` is what the benchmarks say: op, dtype, shape, and its time over torch's choice's.
    """
    good, bad = [], []
    for op, dtype in sorted({(op, dtype) for op, dtype, *_ in measured if op in PROVED_BY}):
        ratios = {shape: x for o, d, shape, x in measured if (o, d) == (op, dtype)}
        slow = {shape: ratio for shape, ratio in ratios.items() if ratio > NOISE}
        if PROVED_BY[op] not in proved:
            bad.append(f"not {op} {dtype}: its tests failed")
        elif slow:
            worst = max(slow, key=lambda shape: slow[shape])
            bad.append(
                f"not {op} {dtype}: slower at {len(slow)} of {len(ratios)} shapes, "
                f"{slow[worst]:.2f} times torch's time at {worst}"
            )
        else:
            good.append(f'    ("{op}", {dtype}, {capability}): "{where}",')
    failed = [section for section, _, said, _ in measured if said == "FAILED"]
    return good + bad + [f"the benchmark {section!r} failed" for section in failed]


class Check:
    """Runs the steps, remembers one row of the table for each."""

    def __init__(self, device: str, seconds: float, out: Path) -> None:
        self.device, self.out = device, out
        self.began = time.time()
        self.deadline = time.perf_counter() + seconds
        self.rows: list[tuple[str, str, str]] = []
        self.proved: set[str] = set()
        self.env = {**os.environ, "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}
        usual = Path("/usr/local/cuda/bin")
        if shutil.which("nvcc") is None and usual.is_dir():
            self.env["PATH"] += os.pathsep + str(usual)
        out.mkdir(parents=True, exist_ok=True)
        self.log = open(out / "gpu-check.log", "w", encoding="utf-8")  # noqa: SIM115

    def say(self, text: str, most: int = 6000) -> None:
        """Everything to the log, the end of it to the screen."""
        self.log.write(text + "\n")
        self.log.flush()
        print(text[-most:], flush=True)

    def row(self, step: str, state: str, said: str) -> None:
        self.rows.append((step, state, said))

    def run(self, step: str, command: list[str], limit: int, cwd: Path = ROOT) -> str | None:
        """The output of a command, or None where it failed: then the row says how."""
        self.say(f"\n== {step}: {' '.join(command)[:160]}")
        began = time.perf_counter()
        limit = min(limit, int(self.deadline - began))
        if limit < 5:
            self.row(step, "FAILED", "not begun: no time is left")
            return None
        try:
            done = subprocess.Popen(
                command,
                cwd=cwd,
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own, so that none of its children stays
            )
        except OSError as error:
            self.row(step, "FAILED", str(error))
            return None
        try:
            output, _ = done.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(done.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            self.say(done.communicate()[0])
            self.row(step, "FAILED", f"more than {limit} s")
            return None
        self.say(output + f"   {time.perf_counter() - began:.1f} s")
        if done.returncode:
            failed = re.findall(r"^(?:FAILED|ERROR) \S*?(\w+(?:\[.*\])?)(?: - .*)?$", output, re.M)
            last = (output.strip().splitlines() or [""])[-1]
            named = f"{len(failed)} failed: {', '.join(failed[:4])}" if failed else last[:120]
            self.row(step, "FAILED", f"exit {done.returncode}: {named}")
            return None
        return output

    def packages(self) -> None:
        found = versions(NEEDED + BUILD + TESTS)
        absent = [name for name, version in found.items() if version is None]
        said = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        self.say(f"Python {platform.python_version()}, {os.cpu_count()} cores, {said}")
        for command in (["nvidia-smi"], ["nvcc", "--version"]):
            if shutil.which(command[0], path=self.env["PATH"]):
                self.run(command[0], command, 20)
        missing = "missing: " + ", ".join(absent) if absent else "nothing is missing"
        self.row("packages", "some" if absent else "ok", missing)

    def build(self) -> bool:
        shutil.rmtree(SITE, ignore_errors=True)
        cuda = "ON" if self.device == "cuda" else "OFF"
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        pip += ["--disable-pip-version-check", "--target", str(SITE)]
        pip += ["-C", f"cmake.define.PYGPT_CUDA={cuda}", "-C", "build-dir=build/gpu-build", "."]
        began = time.perf_counter()
        if self.run("build with pip", pip, 200) is None:  # CMake alone needs less
            shutil.copytree(
                ROOT / "pygpt", SITE / "pygpt", ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
            folder = str(ROOT / "build" / "gpu-cmake")
            configure = ["cmake", "-S", ".", "-B", folder, f"-DPYGPT_CUDA={cuda}"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
            configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={SITE / 'pygpt'}"]
            if self.run("cmake", configure, 60) is None:
                return False
            if self.run("build", ["cmake", "--build", folder, "--parallel"], 200) is None:
                return False
        self.row("build", "ok", f"{time.perf_counter() - began:.0f} s, PYGPT_CUDA={cuda}")
        return True

    def tests(self, kind: str, limit: int) -> None:
        command = [sys.executable, "-m", "pytest", "-o", "pythonpath=", "-p", "no:cacheprovider"]
        command += ["--import-mode=importlib", "-W", "default", "--tb=short", "-rs", "--maxfail=8"]
        if self.device == "cuda":
            command += ["tests/test_cuda.py", "-k", KINDS[kind]]
        else:
            command += ["tests/test_norm.py"]
        output = self.run(f"tests, {kind}", command, limit)
        if output is None:
            return
        found = re.findall(r"\d+ passed.*", output)
        if found:
            self.proved.add(kind)
            self.row(f"tests, {kind}", "ok", found[-1].rstrip(" ="))
        else:
            why = re.findall(r"^SKIPPED.*?: (.*)$", output, re.M)
            state = "some" if kind == "sanitizer" else "FAILED"
            self.row(f"tests, {kind}", state, "; ".join(["nothing ran", *why[:1]]))

    def training(self) -> None:
        command = [sys.executable, "-c", TRAIN, self.device]
        output = self.run("train, generate", command, 90, ROOT / "build")
        if output is not None:
            said = json.loads(next(x for x in output.splitlines() if x.startswith("{")))
            text = ", ".join(f"{name} {value:,.3g}" for name, value in said.items())
            self.row("train, generate", "ok", text)

    def benchmark(self, sections: list[str], limit: int) -> None:
        bench = str(ROOT / "benchmarks" / "bench_cuda.py")
        command = [sys.executable, bench, *sections, "--device", self.device]
        command += ["--seconds", str(limit // 2), "--out", str(self.out)]
        if (output := self.run("bench " + " ".join(sections), command, limit)) is not None:
            failed = re.findall(r"^(\w+): FAILED", output, re.M)
            state = "some" if failed else "ok"
            said = f"{', '.join(dict.fromkeys(failed))} failed; " if failed else ""
            self.row("bench " + " ".join(sections), state, said + "table above and in --out")

    def measured(self) -> list[tuple[str, str, str, float]]:
        """What this run's benchmarks wrote."""
        files = [p for p in self.out.glob("cuda-*.json") if p.stat().st_mtime >= self.began]
        return [tuple(x) for p in sorted(files) for x in json.loads(p.read_text("utf-8"))]

    def table(self) -> int:
        import torch

        cuda = self.device == "cuda"
        name = torch.cuda.get_device_name() if cuda else "a CPU, in a rehearsal"
        today = datetime.date.today()
        lines = [
            "=" * 100,
            f"pygpt gpu-check, {today}: {name}",
            f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        ]
        for step, state, said in self.rows:
            first, *others = textwrap.wrap(said, 66) or [""]
            lines += [f"{step:24} {state:7} {first}", *(f"{'':32} {line}" for line in others)]
        capability = torch.cuda.get_device_capability() if cuda else (0, 0)
        where = f"{today}, {name}, torch {torch.__version__.partition('+')[0]}"
        unless = "" if cuda else " (from a GPU; not these)"
        lines.append(f"For MEASURED in pygpt/ops/dispatch.py{unless}:")
        lines += verdict(self.measured(), self.proved, capability, where) or [
            "nothing was measured"
        ]
        self.say("\n" + "\n".join(lines), 20000)
        return int(any(state == "FAILED" for _, state, _ in self.rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=520, help="for all steps together")
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder for tables and the log")
    arguments = parser.parse_args()
    device = arguments.device
    if versions(["torch"])["torch"] is None:
        print("gpu-check: this python3 has no torch; install a CUDA build of torch 2.10 or later")
        return 2
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here (torch.cuda.is_available() is False)")
        return 2
    check = Check(device, arguments.seconds, arguments.out.resolve())
    check.packages()
    if check.build():  # the most telling steps first: the last ones may find no time left
        for kind in ("attention", "sampling", "losses"):
            check.tests(kind, 100)
        check.benchmark(["attention", "small", "decode"], 120)
        check.benchmark(["sampling", "loss", "float"], 80)
        check.tests("models", 80)
        check.training()
        check.benchmark(["generate"], 80)
        check.benchmark(["step"], 200)
        check.tests("sanitizer", 190)
    return check.table()


if __name__ == "__main__":
    sys.exit(main())
