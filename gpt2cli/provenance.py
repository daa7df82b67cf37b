"""The programs and the machine that decide a run's bits."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpt2cli import __version__, device


def provenance(where: torch.device) -> dict[str, Any]:
    """Versions, the commit, the platform and the device; kept in `run.json`."""
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken", "safetensors")}
    return {
        "gpt2cli": __version__,
        "commit": _commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(),
        "device": device.describe(where),
    }


def _commit(checkout: Path) -> str | None:
    """The git commit this program runs from, with -dirty where files differ; None for an installed package."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
