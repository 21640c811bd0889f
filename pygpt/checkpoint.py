"""Checkpoints: folders without pickle that are either whole or not there.

A checkpoint holds `model.safetensors`, `optimizer.safetensors`, `state.json` and, written last,
`manifest.json` with the size and sha256 of each. It is built in a temporary folder on the same file
system, forced to disk and renamed, so a crash at any instant leaves the old one or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pygpt.errors import DataError, NumericError

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_HEADROOM = 1.2  # free space asked for, as a multiple of what will be written


@dataclass(frozen=True)
class Checkpoint:
    """What a verified checkpoint folder holds; `state["step"]` updates were made."""

    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `root/step-N` with N = state["step"], then delete all but the newest `keep`.

    OSError if the disk is full or fails: then the older checkpoints are as they were.
    """
    for name, tensor in model.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericError(f"{name} is not finite, so no checkpoint was written")
    root.mkdir(parents=True, exist_ok=True)
    size = sum(t.nbytes for t in model.values()) + sum(t.nbytes for t in optimizer.values())
    check_space(root, size)
    folder = root / f"step-{state['step']}"
    with commit_folder(folder) as temporary:
        for file, tensors in (("model", model), ("optimizer", optimizer)):
            cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(cpu, temporary / f"{file}.safetensors")
        (temporary / "state.json").write_text(json.dumps(dict(state), indent=1))
        (temporary / "manifest.json").write_bytes(_manifest(temporary))
    for old in _folders(root)[keep:]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; DataError names the file that is missing or altered."""
    verify_checkpoint(folder)
    state = json.loads((folder / "state.json").read_text())
    if folder.name != f"step-{state['step']}":
        raise DataError(f"checkpoint {folder} holds step {state['step']}: the folder was renamed")
    model, optimizer = (load_file(folder / file) for file in _FILES[:2])
    return Checkpoint(folder, model, optimizer, state)


def verify_checkpoint(folder: Path) -> None:
    """Every byte against the manifest; DataError names the first file that differs."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {folder}")
    try:
        recorded = (folder / "manifest.json").read_bytes()
        actual = _manifest(folder)
    except FileNotFoundError as error:
        raise DataError(f"checkpoint {folder} is incomplete: no {error.filename}") from None
    if recorded == actual:
        return
    try:
        was = json.loads(recorded)
        for file, now in json.loads(actual).items():
            if was[file] != now:
                raise DataError(
                    f"checkpoint {folder} is damaged: {file} has {now['bytes']} bytes and "
                    f"sha256 {now['sha256']}, recorded {was[file]['bytes']} and "
                    f"{was[file]['sha256']}"
                )
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"checkpoint {folder} is damaged: manifest.json is not as it was written")


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `root`, or None where there is none.

    Each damaged one that is passed over is warned about; DataError if none is whole.
    """
    folders = _folders(root)
    for folder in folders:
        try:
            return load_checkpoint(folder)
        except DataError as error:
            warnings.warn(f"{error}; looking for the one before", stacklevel=2)
    if folders:
        raise DataError(f"no checkpoint in {root} is whole; to begin again, choose another folder")
    return None


def drop_newer(root: Path, step: int) -> None:
    """Delete the checkpoints after `step`: whoever goes back to it leaves that course."""
    for folder in _folders(root):
        if _step(folder) > step:
            shutil.rmtree(folder)


def check_space(folder: Path, size: int) -> None:
    """OSError unless the file system of `folder` has room for `size` bytes and some more."""
    free = shutil.disk_usage(folder).free
    if free < size * _HEADROOM:
        raise OSError(
            f"{folder} has {free / 1e6:.0f} MB free; {size * _HEADROOM / 1e6:.0f} are needed"
        )


@contextlib.contextmanager
def commit_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it durably becomes `folder` if the block ends without error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    temporary.mkdir()
    try:
        yield temporary
        for path in [p for p in temporary.rglob("*") if p.is_file()] + [temporary]:
            _sync(path)
        if folder.exists():
            replaced = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
            temporary.rename(folder)
            shutil.rmtree(replaced)
        else:
            temporary.rename(folder)
        _sync(folder.parent)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _manifest(folder: Path) -> bytes:
    entries = {}
    for name in _FILES:
        with open(folder / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = {"bytes": file.tell(), "sha256": sha256}
    return json.dumps(entries, indent=1).encode()


def _folders(root: Path) -> list[Path]:
    """The checkpoint folders below `root`, newest first."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
