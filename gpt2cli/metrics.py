"""What is measured at a step, and its log: `metrics.jsonl`, one object a line, appended to and never torn."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2cli import atomic

NAME = "metrics.jsonl"
LOGGED = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed")  # of a step


@dataclass(frozen=True)
class StepMetrics:
    """What happened at a step; the fields of LOGGED, and the evaluation's, go to `metrics.jsonl`."""

    step: int  # updates done, from 1
    loss: float  # nats a token, mean over the step's micro-batches
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # trained on so far
    tokens_per_second: float  # of the training steps since the last look at the device
    elapsed: float  # seconds of the run, earlier sessions included
    memory: int = 0  # bytes at the peak so far, of the process or its part of the device
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    saved: Path | None = None  # being written; there when the run ends
    samples: Sequence[str] = ()
    events: Sequence[str] = ()  # what a person should know: updates skipped, a full disk, ...

    def line(self) -> dict[str, Any]:
        """What is logged of the step itself."""
        return {key: getattr(self, key) for key in LOGGED}


class MetricsLog:
    """The log of one run. A line that does not fit the disk waits in memory for the next attempt."""

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self._waiting: list[bytes] = []

    def trim(self, step: int, state: dict[str, Any]) -> None:
        """Forget what came after it had this state, at this step, and will come again."""
        self._waiting.clear()
        if state and unchanged(self.path.parent, state):
            os.truncate(self.path, state["bytes"])
        else:  # somebody changed it: what can be read of the steps done
            kept = [text for text, line in _read_lines(self.path) if line["step"] <= step and step]
            atomic.write_text(self.path, "".join(f"{text}\n" for text in kept))
        self._size = self.path.stat().st_size
        self._digest = hashlib.sha256(self.path.read_bytes())

    def add(self, line: dict[str, Any]) -> None:
        """Append a line. What is not finite becomes null, since JSON has no such number."""
        known = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}
        self._waiting.append(json.dumps(known).encode() + b"\n")
        with contextlib.suppress(OSError):
            self.settle()

    def settle(self) -> None:
        """Write what waits. Raises OSError where that fails; the file is then as it was."""
        data = b"".join(self._waiting)
        if not data:
            return
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise
        self._size += len(data)
        self._digest.update(data)
        self._waiting.clear()

    def state(self) -> dict[str, Any]:
        """Length and sha256 of the log, for `unchanged`."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def unchanged(run: Path, state: dict[str, Any]) -> bool:
    """Whether the log still begins as it did when it had this state."""
    path, length = run / NAME, state.get("bytes")
    if not path.is_file() or not isinstance(length, int):
        return False
    return hashlib.sha256(path.read_bytes()[:length]).hexdigest() == state.get("sha256")


def read(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; one that a crash cut short is left out."""
    return [line for _, line in _read_lines(run / NAME)]


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = []
    for text in texts:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append((text, value))
    return lines
