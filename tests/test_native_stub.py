"""pygpt/_native.pyi says what the built module offers, no more and no less."""

import ast
from pathlib import Path

import pygpt
from pygpt import _native

STUB = ast.parse((Path(pygpt.__file__).parent / "_native.pyi").read_text(encoding="utf-8"))


def public(names):
    return {name for name in names if not name.startswith("_")}


def declared(nodes):
    names = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_stub_names_every_function_and_class():
    assert public(declared(STUB.body)) == public(vars(_native))


def test_stub_names_every_method():
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            assert public(declared(node.body)) == public(vars(getattr(_native, node.name)))


def test_stub_has_as_many_parameters_as_the_module():
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            # pybind11 writes the signature into the docstring's first line
            line = getattr(_native, node.name).__doc__.splitlines()[0]
            real = ast.parse(f"def {line.split(' ->')[0]}: ...").body[0].args
            stub = node.args
            assert len(real.args + real.kwonlyargs) == len(stub.args + stub.kwonlyargs), line
