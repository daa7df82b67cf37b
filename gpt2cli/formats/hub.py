"""HuggingFace's hub: a model's name -> the folder in the hub client's cache that holds its files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2cli import atomic
from gpt2cli.errors import UserError
from gpt2cli.formats.huggingface import TOKENIZER, WEIGHTS, config_from_json, shard_names

Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def find(name: str, progress: Progress | None = None) -> Path:
    """A local folder as it is, or else the folder in HuggingFace's cache with the hub's model of that name, downloaded
    where it is not there yet; a download that broke off goes on where it stopped. Raises UserError for an unknown name, and
    for a network that is not there."""
    path = Path(name)
    if (path / "run.json").is_file():
        raise UserError(f"{name} is a run, not a model: give one of the checkpoints in it, a folder step-...")
    if path.is_dir():
        return path
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        raise UserError(f"{name} is one file of a model: give its folder")
    of_weights = name.endswith((".pt", ".pth", ".bin", ".gguf", ".safetensors"))
    if path.is_file():
        mend = f": make one of it with 'gpt2 convert {name} --out FOLDER'" if of_weights else ""
        raise UserError(f"{name} is a file, not a model folder{mend}")
    if of_weights:
        raise UserError(f"there is no file {name}")
    if path.exists() or not _NAME.fullmatch(name):
        raise UserError(f"{name} is neither a model folder nor the name of a model on the hub, like gpt2 or owner/name")
    config = _download(name, "config.json", progress)
    if config is None:
        raise UserError(f"{name} on the hub has no config.json: it is not a transformers model")
    config_from_json(atomic.read_json(config), f"{name}/config.json")
    folder = config.parent
    revision = folder.name  # the cache names it by the commit: all files are to be of one
    for file in TOKENIZER:
        _download(name, file, progress, revision)
    for file in WEIGHTS:
        found = _download(name, file, progress, revision)
        if found:
            for shard in shard_names(found) if file.endswith(".index.json") else []:
                if not _download(name, shard, progress, revision):
                    raise UserError(f"{name} on the hub lacks {shard}, which its {file} names")
            return folder
    raise UserError(f"{name} on the hub has no weights: expected {' or '.join(WEIGHTS)}")


def _download(name: str, file: str, progress: Progress | None, revision: str | None = None) -> Path | None:
    """One file of a hub model, from HuggingFace's cache where it is there; None where the model has no such file."""
    from huggingface_hub import (
        _CACHED_NO_EXIST,
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from tqdm.auto import tqdm

    cached = try_to_load_from_cache(name, file, revision=revision)
    if cached is not None:  # else nobody has asked for it yet
        return None if cached is _CACHED_NO_EXIST else Path(str(cached))

    class Report(tqdm):
        """Tells `progress` instead of drawing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115 - lives as long as the bar

        def update(self, n: float | None = 1) -> bool | None:
            done = super().update(n)
            if progress:
                progress(file, int(self.n), int(self.total or 0))
            return done

    offline = (
        f"there is no folder {name}, it is not in HuggingFace's cache, and the hub cannot be reached. "
        f"Give the path of a local folder, or run 'gpt2 convert --from-hf {name}' on a machine with a network, and copy what "
        "it makes to this one"
    )
    try:
        if revision is None:  # asked once, without the download's half minute of retries: is there a hub?
            get_hf_file_metadata(hf_hub_url(name, file), timeout=10)
        return _verified(Path(hf_hub_download(name, file, revision=revision, tqdm_class=Report)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"the hub has no model named {name} (or it is private: log in with 'hf auth login'); "
            "expected a local folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or owner/name"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):  # the first is an EntryNotFoundError, too
        raise UserError(offline) from None
    except errors.EntryNotFoundError:
        return None
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refused {name}/{file}: {str(error).splitlines()[0]}") from None
    except (UserError, OSError):
        raise
    except Exception as error:  # of the HTTP library, whichever the hub's client uses
        if revision is None:
            raise UserError(offline) from None
        raise UserError(f"downloading {name}/{file} failed ({error or type(error).__name__}): run it again") from None


def _verified(path: Path) -> Path:
    """The file, after its bytes were compared with the name that the cache gives them: for weights that is their sha256.
    Raises UserError for others, and removes them."""
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name) and atomic.sha256(blob) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(f"{path.name} arrived damaged: its sha256 is not the hub's. It was removed: run it again")
    return path
