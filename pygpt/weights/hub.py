"""Models by name: downloads from the Hugging Face hub into its own cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from pygpt.config import GPT2_SIZES
from pygpt.errors import DataError, ResourceError
from pygpt.weights.huggingface import CONFIG, INDEX, WEIGHTS, shards_of


def download(name: str, revision: str | None = None) -> Path:
    """The folder of the model `name` ("gpt2", "owner/name"), downloaded when not in the cache.

    A download is resumed where it stopped, and checked against the hub's own sha256. Raises
    FileNotFoundError for a name that is neither a path nor on the hub, ResourceError when the hub
    cannot be reached.
    """
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).parent.is_dir()
    if not named and name not in (*GPT2_SIZES, "distilgpt2"):
        raise FileNotFoundError(f"{name} does not exist; models on the hub are owner/name or gpt2")
    fetch = functools.partial(_fetch, name, revision, not _hub_resolves())
    config = fetch(CONFIG)
    if config is None:
        raise DataError(f"{name} on the hub has no {CONFIG}")
    if fetch(WEIGHTS) is None:
        index = fetch(INDEX)
        if index is None:
            raise DataError(f"{name} on the hub has no {WEIGHTS}; pygpt downloads no pickles")
        for shard in shards_of(index):
            fetch(shard)
    with contextlib.suppress(ResourceError):  # a model can do without, and so can an old cache
        fetch("tokenizer.json")
    return config.parent


def _hub_resolves() -> bool:
    """Whether the hub's name has an address; without, every file would be tried for half a minute.

    Behind a proxy only that knows.
    """
    from huggingface_hub import constants

    try:
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
        return bool(urllib.request.getproxies() or socket.getaddrinfo(host, None))
    except socket.gaierror:
        return False


def _fetch(name: str, revision: str | None, offline: bool, filename: str) -> Path | None:
    """One file in the cache; None where the repository has no such file."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, filename, revision=revision)
    if cached is not None and not isinstance(cached, str):  # the hub said once that it has none
        return None
    try:
        path = Path(hf_hub_download(name, filename, revision=revision, local_files_only=offline))
    except errors.LocalEntryNotFoundError as error:
        raise ResourceError(
            f"{name} is no local path, its {filename} is not in the cache, and the hub cannot be "
            f"reached; connect to the network once, or give a folder"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no local path and no public model on the hub"
        ) from error
    except Exception as error:  # of whatever transport huggingface_hub uses
        raise ResourceError(f"{name}: {filename} could not be downloaded: {error}") from error
    blob = path.resolve()
    if cached is None and re.fullmatch("[0-9a-f]{64}", blob.name):  # named by its sha256
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            blob.unlink()
            raise DataError(
                f"{name}: {filename} has sha256 {found}, the hub says {blob.name}; try again"
            )
    return path
