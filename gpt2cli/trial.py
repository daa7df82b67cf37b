"""Kernels of our own are tried before they are believed: their compiler may fail on a GPU that nobody has tried, or err."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch

verdicts: dict[Hashable, bool] = {}  # once in a process is enough


def passed(kind: Hashable, fault: Callable[[], str | None], what: str) -> bool:
    """Whether kernels of this kind have none. Otherwise it is told, once, that `what` is slower, and why."""
    if kind not in verdicts:
        try:
            reason = fault()
        except torch.OutOfMemoryError:
            raise  # which says nothing about the kernels
        except Exception as error:  # a compiler raises what it likes
            if "out of memory" in str(error):  # as Triton has it
                raise torch.OutOfMemoryError(str(error)) from error
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0][:200]}"
        verdicts[kind] = reason is None
        if reason is not None:
            warnings.warn(f"the fused kernels do not work here, so {what} is slower: {reason}", stacklevel=3)
    return verdicts[kind]
