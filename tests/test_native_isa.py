"""Every instruction set that this machine runs gives right results, and none leaks into another."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pygpt import _native

ROOT = Path(__file__).resolve().parents[1]
OTHER_ISAS = [isa for isa in _native.available_isas() if isa != _native.isa()]


def run(isa, *arguments):
    environment = {**os.environ, "PYGPT_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


# The tests of each op that hold its native kernels against the twins.
KERNEL_TESTS = {
    "attention": "shapes or blocks or threads",
    "crc32c": "exact",
    "cross_entropy": "as_exact and mean",
    "gelu": "as_exact or extreme",
    "linear": "as_exact or random_shapes",
    "sampling": "same_tokens or (gpt2s and float32)",
}


@pytest.mark.parametrize("isa", OTHER_ISAS)
@pytest.mark.parametrize("op", KERNEL_TESTS)
def test_kernels_on_every_instruction_set(op, isa):
    done = run(isa, "-m", "pytest", "-x", f"tests/test_{op}.py", "-k", KERNEL_TESTS[op])
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_environment_chooses_and_a_wrong_name_is_an_error_at_import():
    for isa in _native.available_isas():
        done = run(isa, "-c", "from pygpt import _native; print(_native.isa())")
        assert done.stdout.strip() == isa, done.stderr
    done = run("mmx", "-c", "import pygpt._native")
    assert done.returncode == 1
    assert "PYGPT_ISA is 'mmx'" in done.stderr and "available: " in done.stderr


def test_objects_share_no_code_between_instruction_sets():
    """A weak symbol outside the namespace could be linked in for every set, wide code included."""
    objects = sorted(ROOT.glob("build/**/cpu_*.dir/**/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no build folder here, or no nm")
    for path in objects:
        isa = re.search(r"cpu_(\w+)\.dir", str(path))[1]
        table = subprocess.run(
            ["nm", "-C", path], capture_output=True, text=True, check=True
        ).stdout
        for line in table.splitlines():
            kind, name = line[17:].split(" ", 1)
            # a pointer to the runtime's exception handler is data, the same in every object
            if kind in "WVu" and not name.startswith("DW.ref."):
                assert f"pygpt::{isa}::" in name, f"{path.name}: {name}"
