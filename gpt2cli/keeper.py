"""What a run writes into its folder while it goes, the log and the checkpoints, and what there is to tell a person of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gpt2cli import atomic, checkpoint, metrics, writer
from gpt2cli.metrics import MetricsLog
from gpt2cli.writer import Writer


class Keeper:
    """Keeps the folder of a run. In a run of several processes the first one does; the others have `Nobody`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.log = MetricsLog(run)
        self.writer = Writer(run)
        self._events: list[str] = []
        self._val_losses: list[float] = []  # of all evaluations
        self._last_error: OSError | None = None  # of a save that has not been made up for

    def begin_at(self, progress: checkpoint.Progress) -> None:
        """Forget what was logged after this, and will come again."""
        self.log.trim(progress.step, progress.log)
        self._val_losses.clear()
        for line in metrics.read(self.run):
            self._evaluated(line)

    def lines_of(self, step: int) -> list[dict[str, Any]]:
        """What was logged of it."""
        return [line for line in metrics.read(self.run) if line["step"] == step]

    def add(self, line: dict[str, Any]) -> None:
        self.log.add(line)
        self._evaluated(line)

    def _evaluated(self, line: dict[str, Any]) -> None:
        if "val_loss" in line:
            loss = line["val_loss"]  # null where it was not finite
            self._val_losses.append(loss if isinstance(loss, float) and math.isfinite(loss) else math.inf)

    def has_turned(self, patience: int) -> bool:
        """Whether none of the last `patience` evaluations, if that is not 0, was below the lowest before them."""
        before, last = self._val_losses[:-patience], self._val_losses[-patience:]
        return bool(patience and before) and min(last) >= min(before)

    def tell(self, step: int, kind: str, message: str, **facts: Any) -> None:
        self._events.append(message)
        self.log.add({"step": step, "event": kind, "message": message, **facts})

    @property
    def wants_a_look(self) -> bool:
        waited = self._last_error is not None and not self.writer.waits
        return waited or self.writer.has_failed or self.writer.retry_is_due()

    @property
    def retry_is_due(self) -> bool:  # of a save that failed
        return self.writer.retry_is_due()

    def news(self, step: int) -> list[str]:
        """What happened since this was asked before. A save that waits is told once, not at each attempt."""
        failure, before = self.writer.failure(), self._last_error
        self._last_error = failure or before
        if failure and not (before and atomic.is_full(before) == atomic.is_full(failure)):
            stands = next((f"{f} stands" for f in checkpoint.checkpoints(self.run)), "there is no checkpoint yet")
            mend = ": free some space" if atomic.is_full(failure) else ""
            self.tell(step, "save failed", f"could not save: {failure}; {stands}, and it will be tried again{mend}")
        if self._last_error and not self.writer.waits:
            self._last_error = None
            self.tell(step, "saved", "saved after all")
        told, self._events = self._events, []
        return told

    def save(self, state: checkpoint.Snapshot) -> Path | None:
        """Have it written in the background. None where the log already does not fit the disk."""
        try:
            checkpoint.check_there(self.run)
            self.log.settle()
        except OSError as error:
            self.writer.fail(error)
            return None
        state.progress.log = self.log.state()
        return self.writer.save(state)

    def evaluated(self, step: int, val_loss: float, bits: float | None) -> None:
        self.writer.evaluated(step, val_loss, bits)

    def target_of_rollback(self, before: checkpoint.Progress) -> tuple[Path | None, bool]:
        """The newest checkpoint that did not diverge, None for the very beginning; and whether there is any at all."""
        self.writer.forget_evaluations()
        whole = [f for f in self._done(before) if checkpoint.is_whole(f) and not checkpoint.was_stopped(f)]
        return next((f for f in whole if checkpoint.step_of(f) not in before.suspects), None), bool(whole)

    def drop_after(self, step: int, before: checkpoint.Progress) -> None:
        """Remove the checkpoints of the way that was given up, so that nobody resumes on it."""
        for folder in self._done(before):
            if checkpoint.step_of(folder) > step:
                atomic.remove_folder(folder)

    def _done(self, progress: checkpoint.Progress) -> list[Path]:
        return [folder for folder in checkpoint.checkpoints(self.run) if checkpoint.step_of(folder) <= progress.step]

    def wait(self) -> None:
        """Until nothing is being written any more, and the copy of the state that was written is gone."""
        self.writer.wait()

    def needs_save(self) -> bool:
        """Whether a save failed and was not made up for, once nothing is being written any more."""
        self.wait()
        return self.writer.needs_retry

    def news_of_waiting(self, step: int, tries: int) -> list[str]:
        """At the end of a run, on a full disk, that so many more attempts will be made."""
        if self._last_error and atomic.is_full(self._last_error):
            minutes = math.ceil(tries * writer.RETRY_SECONDS / 60)
            waits = f"the run is over, but step {step:,} is not saved: it will be tried for {minutes} minutes more"
            self.tell(step, "waits", f"{waits}; free some space, or press Ctrl-C twice to leave without it")
        return self.news(step)

    def wait_for_retry(self, tries_left: int) -> None:
        """Until it is time for the next attempt. Raises the OSError where the disk stays bad."""
        if not tries_left or (self._last_error and not atomic.is_full(self._last_error)):
            raise self._last_error or OSError(f"{self.run} could not be saved")
        self.writer.wait_for_retry()

    def close(self) -> None:
        self.writer.close()


class Nobody(Keeper):
    """Of a rank that keeps nothing."""

    def __init__(self) -> None: ...

    def begin_at(self, progress: checkpoint.Progress) -> None: ...

    def lines_of(self, step: int) -> list[dict[str, Any]]:
        return []

    def add(self, line: dict[str, Any]) -> None: ...

    def tell(self, step: int, kind: str, message: str, **facts: Any) -> None: ...

    def has_turned(self, patience: int) -> bool:
        return False

    wants_a_look = retry_is_due = False

    def news(self, step: int) -> list[str]:
        return []

    def save(self, state: checkpoint.Snapshot) -> Path | None:
        return None

    def evaluated(self, step: int, val_loss: float, bits: float | None) -> None: ...

    def drop_after(self, step: int, before: checkpoint.Progress) -> None: ...

    def wait(self) -> None: ...

    def needs_save(self) -> bool:
        return False

    def news_of_waiting(self, step: int, tries: int) -> list[str]:
        return []

    def close(self) -> None: ...
