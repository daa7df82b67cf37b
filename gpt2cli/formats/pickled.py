"""PyTorch's `.pt` and `.bin`: a pickle, of which only tensors and plain values are ever made, never code run.

torch's weights-only reader does the work. Before it, the zip around the pickle is looked at: `torch.save` compresses
nothing, so an archive that does would only serve to fill somebody's memory.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2cli.errors import UserError


class Settings:
    """Stands in for the `GPTConfig` that build-nanogpt pickles: its values become `__dict__`, none of its code is run."""


def load(path: Path) -> Any:
    """What `torch.save` wrote to `path`, its tensors mapped from the file. Raises UserError for anything that is damaged, or
    holds more than tensors, plain values and a `GPTConfig`."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # as torch decides it
        names = _settings_classes(path) if zipped else []
        with torch.serialization.safe_globals([(Settings, name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles: that they are refused is told by the error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds for damaged or hostile files
        raise UserError(f"{path} {_reason(error)}") from None


def check_size(path: Path, tensors: Mapping[str, Tensor], tied: str) -> None:
    """Raises UserError where the tensors of `path` claim more bytes than it has, that named `tied`, which may share another
    one's, for itself: a hostile file can give one storage to many, or describe terabytes that are one number."""
    size = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
    claimed = max(size.pop(tied, 0), sum(size.values()))
    if claimed > path.stat().st_size:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, but its tensors claim {claimed:,}")


def is_pickle(path: Path) -> bool:
    """Whether it looks like `torch.save`'s: a zip, or the older bare pickle."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" or path.suffix in (".pt", ".pth", ".ckpt")


def _settings_classes(path: Path) -> list[str]:
    """The full names under which a zipped checkpoint asks for a class `GPTConfig`."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise UserError(f"{path} is no checkpoint: {entry.filename!r} in it is compressed, which torch.save never does")
        pickle = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if pickle is None:
            raise UserError(f"{path} is a zip, but not one that torch.save wrote")
        names = set()
        for operation, argument, _ in pickletools.genops(archive.read(pickle)):
            if operation.name == "GLOBAL" and str(argument).endswith(" GPTConfig"):
                names.add(str(argument).replace(" ", "."))
    return sorted(names)


def _reason(error: Exception) -> str:
    """In one line, without torch's advice to trust the file."""
    text = str(error)
    found = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", text, re.IGNORECASE)
    if found:
        return f"asks for {found[1]} to be run, so it is not read: expected tensors and plain values alone"
    told = text.split("WeightsUnpickler error:")[-1].strip() or type(error).__name__.replace("EOFError", "it ends too early")
    return f"is damaged or not a weight file: {told.splitlines()[0]}"
