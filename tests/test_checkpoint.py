"""A checkpoint is whole or it is not there, and whatever changes one is noticed."""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from pygpt.checkpoint import (
    commit_folder,
    drop_newer,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from pygpt.errors import DataError, NumericError

STATE = {"step": 5, "seconds": 1.25, "settings": {"lr": 1e-3}}


def save(root: Path, step: int, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(step)
    model = {"a": torch.randn(3, 4, generator=generator), "b": torch.ones(2, dtype=torch.bfloat16)}
    optimizer = {"a.exp_avg": torch.randn(3, 4, generator=generator), "a.step": torch.tensor(5.0)}
    parts = {"model": model, "optimizer": optimizer, "state": {**STATE, "step": step}, **changes}
    return save_checkpoint(root, **parts)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    tied = torch.randn(5, 4)
    model = {"a": tied, "view": tied[1:].T, "count": torch.tensor([1, 2])}
    folder = save(tmp_path, 5, model=model)
    loaded = load_checkpoint(folder)
    assert loaded.state == STATE
    assert loaded.model.keys() == model.keys()
    assert all(torch.equal(loaded.model[name], model[name]) for name in model)
    assert loaded.optimizer["a.step"] == 5.0
    names = sorted(path.name for path in folder.iterdir())
    expected = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert names == expected


def test_the_newest_are_kept_and_the_very_newest_is_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (5, 10, 99, 100):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100", "step-99"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.state["step"] == 100
    drop_newer(tmp_path, 99)
    assert [path.name for path in tmp_path.iterdir()] == ["step-99"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whole"), 5)


@pytest.mark.parametrize("group", range(10))
def test_every_mutation_of_a_checkpoint_is_noticed(group: int, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-5"
    shutil.copytree(whole, folder)
    files = sorted(path.name for path in folder.iterdir())
    for seed in range(30 * group, 30 * group + 30):
        rng = random.Random(seed)
        path = folder / files[seed % len(files)]
        raw = path.read_bytes()
        match seed // len(files) % 3:
            case 0:
                changed = bytearray(raw)
                changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            case 1:
                changed = bytearray(raw[: rng.randrange(len(raw))])
            case _:
                changed = bytearray((folder / files[(seed + 1) % len(files)]).read_bytes())
        path.write_bytes(changed)
        with pytest.raises(DataError, match="step-5"):
            load_checkpoint(folder)
        path.write_bytes(raw)
    load_checkpoint(folder)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "optimizer.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"incomplete: no .*{name}"):
        load_checkpoint(folder)


def test_an_altered_file_is_named_with_both_hashes(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(
        DataError, match=r"model.safetensors has \d+ bytes and sha256 \w{64}, recor"
    ):
        load_checkpoint(folder)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5).rename(tmp_path / "step-6")
    with pytest.raises(DataError, match="step-6 holds step 5"):
        load_checkpoint(tmp_path / "step-6")


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 6)
    (newest / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="step-6 is damaged: state.json"):
        found = latest_checkpoint(tmp_path)
    assert found is not None and found.state["step"] == 5
    (tmp_path / "step-5" / "state.json").write_text("{}")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="is whole"):
        latest_checkpoint(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(NumericError, match="a is not finite"):
        save(tmp_path, 6, model={"a": torch.tensor([1.0, float("nan")])})
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_a_nearly_full_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(OSError, match="MB free"):
        save(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_checkpoint_alone(tmp_path: Path) -> None:
    save(tmp_path, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError):
            save(tmp_path, 6, optimizer={"a.exp_avg": torch.zeros(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]
    load_checkpoint(tmp_path / "step-5")


def test_saving_the_same_step_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "state.json").write_text("{}")
    load_checkpoint(save(tmp_path, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_an_error_of_any_system_call_leaves_the_old_folder(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    with commit_folder(folder) as temporary:
        (temporary / "weights").write_text("old")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError), commit_folder(folder) as temp:
        (temp / "weights").write_text("new")
        patched.setattr(os, call, fail)
    assert (folder / "weights").read_text() == "old"
    with commit_folder(folder) as temporary:
        (temporary / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
