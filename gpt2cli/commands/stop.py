"""What stops a run early: signals, and a limit of time."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from gpt2cli.commands import launch

if TYPE_CHECKING:
    from types import FrameType


def listen() -> None:
    """From here on these signals raise, so that what was begun is put away; until then they end the program at once. To be
    called when the libraries are loaded: within their initialization what a signal raises may be lost, or leave them
    half there. `train` replaces all to save first."""
    for number in launch.signals():
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _leave)


def listen_no_more() -> None:
    """While the interpreter is taken down, what a signal raises has nobody to catch it."""
    for number in launch.signals():
        signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


class StopRequest:
    """The first Ctrl-C or SIGTERM (or a terminal that is closed, or the end of `max_minutes`) asks the loop to save and
    stop; a second signal leaves at once, which is safe since checkpoints appear whole or not at all."""

    def __init__(self, max_minutes: float | None) -> None:
        self.number = 0  # of the signal
        self.by = ""  # --max-minutes, where no signal came first
        self._asked_at = 0.0
        self._began = False
        self._max_minutes = max_minutes
        self._end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __enter__(self) -> StopRequest:
        self._before = [(number, signal.signal(number, self._ask)) for number in launch.signals()]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        from gpt2cli.commands import console

        if self.number and "RANK" in os.environ and time.monotonic() < self._asked_at + launch.SAME:
            return
        if self.number and number == getattr(signal, "SIGHUP", None):  # see launch.start
            return
        if self.number:
            console.leave(128 + number)
        self.number, self._asked_at = number, time.monotonic()
        console.note("finishing this step, then saving; once more to leave at once")

    def asked(self) -> bool:
        """Asked before each step. The first is always done, or a queue whose limit is too short would never get anywhere."""
        if self._began and not self.number and time.monotonic() >= self._end:
            self.by = f" by --max-minutes {self._max_minutes:g}"
        self._began = True
        return self.was_asked

    @property
    def was_asked(self) -> bool:
        return bool(self.number or self.by)
