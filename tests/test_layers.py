"""The stair of rooms: imports go down only, and only two doors lead to native code."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pygpt

PACKAGE = Path(pygpt.__file__).parent

# From the ground up. A room may import from floors below its own, or from a neighbour that does not
# import it back.
FLOORS = [
    {"errors", "_native"},
    {"config"},
    {"ops", "reference", "tokenizer"},
    {"weights", "kv_cache"},
    {"model"},
    {"training", "generation", "checkpoint", "data"},
    {"finetune", "evaluation"},
    {"demo", "serve"},
    {"cli"},
]
FLOOR = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module of pygpt that a file imports anywhere, as dotted names below `pygpt.`."""
    found = set()
    package = list(path.relative_to(PACKAGE.parent).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("pygpt.") for name in names if name.startswith("pygpt.")}
    return found


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
ROOMS = {room_of(path) for path in SOURCES} - {"__main__"}
ARROWS = {
    (room_of(path), name.split(".")[0])
    for path in SOURCES
    for name in imports(path)
    if name.split(".")[0] in FLOOR and name.split(".")[0] != room_of(path)
}


def test_every_room_stands_on_a_floor():
    assert set(FLOOR) >= ROOMS


def test_imports_go_down_only():
    upward = {(a, b) for a, b in ARROWS if a in FLOOR and FLOOR[b] > FLOOR[a]}
    assert not upward


def test_rooms_do_not_import_each_other_in_a_circle():
    reached = {room: {b for a, b in ARROWS if a == room} for room in FLOOR}
    for _ in FLOOR:
        reached = {a: bs | {c for b in bs for c in reached[b]} for a, bs in reached.items()}
    assert not {room for room in FLOOR if room in reached[room]}


def test_only_the_two_doors_import_native_code():
    assert {a for a, b in ARROWS if b == "_native"} <= {"ops", "tokenizer"}


@pytest.mark.parametrize("room", ["tokenizer", "config", "errors"])
def test_rooms_without_torch(room):
    code = f"import sys, pygpt.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_and_its_help_stay_light():
    code = (
        "import sys, contextlib, io, pygpt, pygpt.cli\n"
        "with contextlib.redirect_stdout(io.StringIO()): status = pygpt.cli.main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} {status}' if heavy or status else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_submodule_hides_a_public_name():
    for module in pkgutil.walk_packages(pygpt.__path__, "pygpt."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in pygpt.__all__:
        value = getattr(pygpt, name)
        if name in pygpt._PUBLIC:
            assert callable(value), f"{name} is hidden by the module {value!r}"
        elif name in pygpt._ROOMS:
            assert value is sys.modules[f"pygpt.{name}"]


def test_csrc_includes_neither_torch_nor_python_outside_the_bindings():
    csrc = PACKAGE.parent / "csrc"
    if not csrc.exists():
        pytest.skip("an installed package has no csrc/")
    for path in csrc.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert "#include <torch" not in text and "#include <ATen" not in text, path
        if not path.name.startswith("bindings"):
            assert "#include <pybind11" not in text and "#include <Python.h" not in text, path
