"""Builds the fuzz targets under ASan and UBSan and runs them.

    python fuzz/run.py [--runs 20000] [--seed 0] [--isa scalar avx2] [target ...]

With clang the targets are libFuzzer programs; under gcc driver.cpp replays the seeds and mutates
them. A failing run is repeated with the seed that the driver prints.
"""

import argparse
import base64
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FUZZ = Path(__file__).resolve().parent
CSRC = FUZZ.parent / "csrc"
ISA = {
    "scalar": [],
    "avx2": ["-mavx2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
SEEDS = [
    "",
    "It's the theory that the abc's of <|x|> aren't 1234567 words.\n\n\tx = y  # no\r\n",
    "A漢B 日本のNHK नमस्ते \u0301ABC don'ſ 'LL ½Ⅻ² \u3000 \u2028\u00a0 🙂!\n//a   ",
    "YQ== 97\nYWI= 256\r\n\n",
    "#version: 0.2\nĠ t\nĠt he\na b\n",
    "aaaaaaaaaaaaaaaaaaaa                 ^^^^^^^^^^^^\n\n\n\n\n    \n  \n" * 20,
    "Words, and more words than one chunk of the splitter holds: día 日本語 1234.\n" * 64,
]


def build(target: str, isa: str, folder: Path) -> Path:
    clang = shutil.which("clang++")
    sanitizers = "address,undefined" + (",fuzzer" if clang else "")
    binary = folder / f"{target}-{isa}"
    sources = [FUZZ / f"{target}.cpp", FUZZ / "kernels.cpp", CSRC / "cpu" / "byte_classes.cpp"]
    sources += sorted((CSRC / "bpe").glob("*.cpp")) + ([] if clang else [FUZZ / "driver.cpp"])
    command = [clang or "g++", "-std=c++20", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}"]
    command += ["-fno-sanitize-recover=all", f"-I{CSRC}", f"-DPYGPT_ISA_NAMESPACE={isa}"]
    subprocess.run([*command, *ISA[isa], *map(str, sources), "-o", str(binary)], check=True)
    return binary


def main() -> None:
    targets = sorted(path.stem for path in FUZZ.glob("fuzz_*.cpp"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", nargs="+", choices=list(ISA), default=["scalar"])
    parser.add_argument("targets", nargs="*", default=targets)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = folder / "seeds"
        seeds.mkdir()
        for i, seed in enumerate(SEEDS):
            (seeds / str(i)).write_bytes(seed.encode())
        lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
        (seeds / "vocabulary").write_bytes(b"\n".join([*lines, b"YWI= 300", b"YWJj 301"]))
        jobs = [(target, isa) for target in arguments.targets for isa in arguments.isa]
        with ThreadPoolExecutor(2) as pool:
            binaries = list(pool.map(lambda job: build(*job, folder), jobs))
        for binary in binaries:
            print(binary.name, flush=True)
            options = [f"-runs={arguments.runs}", f"-seed={arguments.seed}"]
            if subprocess.run([binary, *options, seeds], check=False).returncode:
                sys.exit(f"{binary.name} failed")


if __name__ == "__main__":
    main()
