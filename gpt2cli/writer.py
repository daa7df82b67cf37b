"""Writes the checkpoints of a run in the background, behind the training that goes on."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gpt2cli import atomic, checkpoint, metrics

RETRY_SECONDS = 30.0  # after a save that failed


def _step_back() -> None:
    """Let the calling thread have little more than training leaves of the processor: on two cores a save of 124M then costs
    a second of training, spread over half a minute, instead of four at once. Other systems than Linux have no such dial."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # one who is further back already may not come forward
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Writer:
    """Writes the checkpoints of a run in a thread, one after the other. A disk that is full stops nothing: `failure` tells
    of it, and a time is set for the next attempt."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._pool = ThreadPoolExecutor(1, "checkpoint", _step_back)
        self._jobs: list[Future[None]] = []
        self._failures: list[OSError] = []
        self._evaluations: dict[int, tuple[float, float | None]] = {}  # of steps, not written yet
        self._retry_at = math.inf
        self.waits = False  # a save failed, and none has succeeded since

    def save(self, state: checkpoint.Snapshot) -> Path:
        """Returns at once, with the folder it will be. Comes after `wait`, so that one state is held at a time."""
        self._retry_at = math.inf
        self._jobs.append(self._pool.submit(self._save, [state]))
        return checkpoint.folder_of(self.run, state.progress.step)

    def evaluated(self, step: int, val_loss: float, val_bits_per_byte: float | None) -> None:
        """Goes with the checkpoint of this step, if there is one or will be."""
        self._evaluations[step] = val_loss, val_bits_per_byte
        self._jobs.append(self._pool.submit(self._write_evaluations))

    def forget_evaluations(self) -> None:
        """After a rollback: of steps that were not saved, and will be done again."""
        self.wait()
        self._evaluations.clear()

    def wait(self) -> None:
        """Until everything is on the disk, or has failed. Raises what is a bug rather than a bad disk."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def fail(self, error: OSError) -> None:
        self._failures.append(error.with_traceback(None))  # which would hold the state that was not written
        self.waits = True
        self._retry_at = time.monotonic() + RETRY_SECONDS

    @property
    def has_failed(self) -> bool:
        return bool(self._failures)

    def failure(self) -> OSError | None:
        """The last one since this was asked before."""
        failures, self._failures = self._failures, []
        return failures[-1] if failures else None

    @property
    def needs_retry(self) -> bool:
        return self._retry_at < math.inf

    def retry_is_due(self) -> bool:
        return time.monotonic() >= self._retry_at

    def wait_for_retry(self) -> None:
        while not self.retry_is_due():
            time.sleep(0.1)

    def close(self) -> None:
        self._pool.shutdown()
        self.wait()

    def _save(self, held: list[checkpoint.Snapshot]) -> None:
        state = held.pop()  # the pool lets go of what it was given only after it has told that it is done
        try:
            atomic.flush(self.run / metrics.NAME)  # its lines are to be there when the checkpoint is
            checkpoint.write(self.run, state)
        except OSError as error:
            self.fail(error)
            return
        self.waits = False
        self._write_evaluations()
        with contextlib.suppress(OSError):  # then there is one too many
            checkpoint.prune(self.run, state.progress.step)

    def _write_evaluations(self) -> None:
        for step, values in list(self._evaluations.items()):
            folder = checkpoint.folder_of(self.run, step)
            try:
                if folder.is_dir():
                    checkpoint.write_evaluation(folder, *values)
                    self._evaluations.pop(step, None)
            except OSError as error:
                self.fail(error)
