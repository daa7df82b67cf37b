"""What stops a run early: signals, a limit of time, and a launcher that is gone."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from typing import TYPE_CHECKING

from gpt2cli.commands import launch

if TYPE_CHECKING:
    from types import FrameType

SAME = 1.0  # seconds in which a rank counts a signal once: who signals all processes reaches it through its launcher, too


class StopRequest:
    """The first Ctrl-C or SIGTERM (or a terminal that is closed, or the end of `max_minutes`) asks the loop to save and
    stop; a second signal leaves at once, which is safe since checkpoints appear whole or not at all."""

    def __init__(self, max_minutes: float | None) -> None:
        self.number = 0  # of the signal
        self.by = ""  # what else asks, where no signal came first
        self._asked_at = 0.0
        self._began = False
        self._max_minutes = max_minutes
        self._end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        self._before = [(number, signal.signal(number, self._ask)) for number in numbers]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        from gpt2cli.commands import console

        if self.number and "RANK" in os.environ and time.monotonic() < self._asked_at + SAME:
            return
        if self.number:
            console.leave(128 + number)
        self.number, self._asked_at = number, time.monotonic()
        with contextlib.suppress(OSError):
            console.note("finishing this step, then saving; once more to leave at once")

    def asked(self) -> bool:
        """Asked before each step. The first is always done, or a queue whose limit is too short would never get anywhere."""
        if self._began and not self.number and time.monotonic() >= self._end:
            self.by = f" by --max-minutes {self._max_minutes:g}"
        if launch.is_gone():
            self.by = ", since the process that started this one is gone,"
        self._began = True
        return self.was_asked

    @property
    def was_asked(self) -> bool:
        return bool(self.number or self.by)
