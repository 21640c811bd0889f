"""Models by name: downloads from the Hugging Face hub into its own cache."""

from __future__ import annotations

import hashlib
import re
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
    config = _file(name, CONFIG, revision)
    if config is None:
        raise DataError(f"{name} on the hub has no {CONFIG}")
    if _file(name, WEIGHTS, revision) is None:
        index = _file(name, INDEX, revision)
        if index is None:
            raise DataError(f"{name} on the hub has no {WEIGHTS}; pygpt downloads no pickles")
        for shard in sorted(set(shards_of(index).values())):
            _file(name, shard, revision)
    _file(name, "tokenizer.json", revision)
    return config.parent


def _file(name: str, filename: str, revision: str | None) -> Path | None:
    """One file in the cache; None where the repository has no such file."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, filename, revision=revision)
    if cached is not None and not isinstance(cached, str):  # the hub said once that it has none
        return None
    try:
        path = Path(hf_hub_download(name, filename, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise ResourceError(
            f"{name} is neither a local path nor in the cache, and the hub cannot be reached"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a local path nor a public model on the hub"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ResourceError(f"{name}: {filename} could not be downloaded: {error}") from error
    blob = path.resolve()
    if cached is None and re.fullmatch("[0-9a-f]{64}", blob.name):  # named by its sha256
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            blob.unlink()
            raise DataError(
                f"{name}: {filename} has sha256 {found}, the hub says {blob.name}; "
                f"the file was removed, download it again"
            )
    return path
