"""tools/install_torch.py: which torch it takes, and from where, against an index on loopback."""

from __future__ import annotations

import importlib.util
import os
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "install_torch.py"
PINNED = next(
    line.partition("==")[2]
    for line in (TOOL.parent.parent / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """A package index with one wheel: torch, of the pinned version's CPU build, and empty."""
    wheel = tmp_path / f"index/torch/torch-{PINNED}+cpu-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    info = f"torch-{PINNED}+cpu.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch/__init__.py", "")
        archive.writestr("torch/padding.txt", os.urandom(3 * 2**20).hex())
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {PINNED}+cpu\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    handler = partial(Quiet, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as on a fresh Linux machine without a GPU; what it installs goes to a folder."""
    spec = importlib.util.spec_from_file_location("install_torch", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in [name for name in os.environ if name.startswith("PIP_") or name == "TORCH"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    monkeypatch.setattr(module, "installed", lambda: None)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    return module


def test_the_cpu_build_is_taken_where_its_index_answers(
    tool: ModuleType, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(tool, "CPU_INDEX", index)
    assert tool.main() == 0
    assert f"installing torch=={PINNED} (no NVIDIA GPU: the CPU build), about 6 MB" in (
        capfd.readouterr().out
    )
    assert (tmp_path / f"site/torch-{PINNED}+cpu.dist-info/METADATA").exists()


def test_an_index_that_cannot_be_reached_leaves_the_tested_version(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(tool, "CPU_INDEX", "http://127.0.0.1:9")
    asked: list[list[str]] = []
    monkeypatch.setattr(tool, "megabytes", lambda requirement, index: asked.append(index))
    monkeypatch.setattr(tool, "pip", lambda *arguments: ["echo", *arguments])
    assert tool.main() == 0
    said = capfd.readouterr().out
    assert f"installing torch=={PINNED} (the tested version), size unknown" in said
    assert f"install --quiet torch=={PINNED}\n" in said and asked == [[]]


def test_a_torch_of_ones_own_choice_is_taken_as_it_is(
    tool: ModuleType, index: str, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("TORCH", f"torch=={PINNED}+cpu")
    monkeypatch.setenv("PIP_INDEX_URL", index)
    assert tool.main() == 0
    assert f"installing torch=={PINNED}+cpu (TORCH is set)" in capfd.readouterr().out
