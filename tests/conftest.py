"""Shared fixtures: the data folder, a tiny model, a tiny corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pygpt import GPT, GPTConfig

TEXT = (
    "The miller's daughter walked to the river every morning. She carried two wooden buckets, and "
    "she counted the stones on the way: one, two, three.\n\nIn winter the river froze, and the "
    "miller's daughter broke the ice with a hammer. Don't fall in, said the old dog; it's cold!\n"
)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real texts, from PYGPT_DATA; tests that need it are skipped without it."""
    default = Path(__file__).resolve().parents[1] / "../shared/data"
    folder = Path(os.environ.get("PYGPT_DATA", default))
    if not folder.is_dir():
        pytest.skip("no data folder: set PYGPT_DATA")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads gain nothing on tiny matrices, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config() -> GPTConfig:
    """Two small layers, no dropout."""
    return GPTConfig(
        vocab_size=61, context_length=24, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0
    )


@pytest.fixture
def tiny_model(tiny_config: GPTConfig) -> GPT:
    """A random model with weights large enough that its logits differ visibly."""
    torch.manual_seed(0)
    model = GPT(tiny_config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """A small text file of real sentences, repeated."""
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return path
