"""The training loop: a generator of `StepMetrics`. It prints nothing, and writes only the run folder.

The state of a run is the model, the optimizer, torch's random generators, the guard's memory, the step and the position in
the data; all of it is in every checkpoint, so that a run that goes on is the run that would have been.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt2cli import atomic, checkpoint, device, metrics
from gpt2cli.data import DataLoaderLite, eval_batches
from gpt2cli.errors import UserError
from gpt2cli.formats import huggingface
from gpt2cli.guard import Guard
from gpt2cli.metrics import LOGGED, MetricsLog, StepMetrics
from gpt2cli.model import GPT
from gpt2cli.optim import make_optimizers, planned_lr
from gpt2cli.plan import Plan
from gpt2cli.sources import open_train, open_val
from gpt2cli.step import train_step, validate
from gpt2cli.writer import Writer

LOOK_EVERY = 16  # steps between looks at the guard's verdicts, where nothing else waits for the device
BAD_IN_A_ROW = 3  # updates refused one after the other: then it is the model that is bad, not the batch
FP16_IN_A_ROW = 20  # fp16's scale finds its size by gradients that overflow, halving each time
LAST_TRIES = 20  # to save the end of a run on a full disk


def train(
    plan: Plan,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    sample: Callable[[GPT], Sequence[str]] | None = None,
) -> Iterator[StepMetrics]:
    """Carry out a plan; at the end, or once `should_stop()`, everything is saved. Yields each step that was logged,
    evaluated, saved or sampled from (`sample` turns the model into texts), or at which something happened.

    Checkpoints are written in the background; leaving the generator waits for them. Raises UserError where the updates stay
    bad after all rollbacks, where memory ends, and where another process trains the same run; OSError where the disk stays
    full at the end.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    with atomic.lock(plan.out), contextlib.closing(Run(plan)) as run:
        yield from run.catch_up()
        while run.progress.step < plan.steps and not should_stop():
            run.step()
            step, cadence = run.progress.step, plan.train
            last = step == plan.steps
            log, save, evaluate = (last or is_due(step, n) for n in (cadence.log_every, cadence.save_every, cadence.eval_every))
            show = sample and is_due(step, cadence.sample_every)
            if not (log or save or evaluate or show or run.wants_a_look or is_due(step, LOOK_EVERY)):
                continue
            measured = run.measure(log)
            if run.bad >= run.patience:
                events = run.roll_back()
                yield replace(measured, step=run.progress.step, events=events)
                continue
            saved = run.save() if save or run.owes_a_save or run.writer.retry_is_due() else None
            if evaluate and run.val_tokens:
                val_loss, bits, improved = run.evaluate()
                measured = replace(measured, val_loss=val_loss, val_bits_per_byte=bits)
                saved = saved or (run.save() if improved else None)
                run.writer.evaluated(step, val_loss, bits)
            samples = sample(run.model) if sample and show else ()
            yield replace(measured, saved=saved, samples=samples, events=run.news())
        yield from run.finish()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Run:
    """The live objects behind a plan. Its folder is locked by whoever makes one."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._check_folder()
        atomic.sweep(plan.out)
        with torch.device("meta"):
            self.model = GPT(plan.model)
        self.model.to_empty(device=plan.device)
        self.optimizers = make_optimizers(self.model, plan.train.optimizer, plan.train.weight_decay)
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.train.dtype == "fp16")
        data = open_train(plan.sources, plan.model.vocab_size)
        self.loader = DataLoaderLite(plan.batch_size, plan.seq_len, data, seed=plan.train.seed)
        self.val_tokens = open_val(plan.sources, plan.model.vocab_size)
        # A model may know more ids than its tokenizer; they stand for no text.
        self.byte_lengths = torch.zeros(max(plan.model.vocab_size, plan.encoding.n_vocab), dtype=torch.long)
        self.byte_lengths[: plan.encoding.n_vocab] = torch.from_numpy(plan.encoding.byte_lengths())
        self.patience = FP16_IN_A_ROW if self.scaler.is_enabled() else BAD_IN_A_ROW
        self._events: list[str] = []
        self.owes_a_save = False  # one was due while updates were refused
        self._last_error: OSError | None = None  # of a save that has not been made up for
        self._go_to(plan.resume_from)
        self.saved_step = self.progress.step
        if plan.train.compile == "on":
            self.model.compile()
        atomic.write_sealed(plan.out / "run.json", plan.to_json())  # the first file: with it a folder is a run
        self.log = MetricsLog(plan.out)
        self.log.trim(self.progress.step, self.progress.log)
        self.writer = Writer(plan.out)

    def _check_folder(self) -> None:
        """Raises UserError where another process got to the folder between the plan and the lock."""
        out = self.plan.out
        if self.plan.sessions is None and (out / "run.json").exists():
            raise UserError(f"{out} already holds a run: continue it with 'gpt2 train --resume --out {out}'")
        later = [f for f in checkpoint.checkpoints(out) if checkpoint.step_of(f) > self.plan.first_step]
        if got_to := next((f.name for f in later if checkpoint.is_whole(f)), None):
            raise UserError(f"{out} has got to {got_to} in the meantime: run it again")
        for folder in later:
            folder.rename(checkpoint.aside(folder))

    def _go_to(self, folder: Path | None) -> None:
        """The state of a checkpoint, or of the very beginning."""
        self.guard = Guard(self.plan.device, self.plan.train.spike)
        self.bad = 0  # updates refused in a row, when it was last looked
        self._skipped = 0
        self._window_tokens, self._window_seconds = 0, 0.0  # of the steps since the last measure
        self._measured: StepMetrics | None = None
        self._trained = False  # a step since it went here
        device.set_up(self.plan.train.seed, self.plan.train.deterministic)
        if folder:
            self.progress = checkpoint.restore(folder, self.model, self.optimizers, self.guard)
            try:
                self.scaler.load_state_dict(self.progress.scaler)
            except (RuntimeError, KeyError):
                raise UserError(f"{folder} cannot be resumed from: it has no scale of fp16's gradients") from None
            known = [self.progress.best_loss, checkpoint.evaluation(folder).get("val_loss")]
            self.progress.best_loss = min((loss for loss in known if loss is not None), default=None)
            self.loader.position = self.progress.position
            self._skipped = int(self.guard.skipped)
            return
        self.progress = checkpoint.Progress()
        self.loader.position = 0
        start = self.plan.init_from
        self.model.load_state_dict(huggingface.read(Path(start))[1] if start else GPT(self.plan.model).state_dict())
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def precision(self) -> AbstractContextManager[object]:
        return device.precision(self.plan.device, self.plan.train.dtype, self.plan.train.attention)

    # ==== a step and what follows it ====

    def step(self) -> None:
        """One update."""
        started = time.perf_counter()
        config, where = self.plan.train, self.plan.device
        batches = [self.loader.next_batch() for _ in range(self.plan.accumulation)]
        self._lr = planned_lr(self.progress.step, config)
        try:
            self._loss, self._grad_norm = train_step(
                self.model,
                self.optimizers,
                [(x.to(where), y.to(where)) for x, y in batches],
                lr=self._lr,
                grad_clip=config.grad_clip,
                precision=self.precision,
                scaler=self.scaler,
                guard=self.guard,
            )
        except (MemoryError, RuntimeError) as error:
            if device.is_out_of_memory(error):
                raise UserError(self.plan.out_of_memory(self.progress.step + 1)) from None
            raise
        self._trained = True
        self.progress.step += 1
        self.progress.position = self.loader.position
        self._window_tokens += config.tokens_per_step
        self._add_time(started)

    def measure(self, log: bool) -> StepMetrics:
        """The step just done, with `log` also written to `metrics.jsonl`. Waits for the device."""
        started = time.perf_counter()
        values = torch.stack([self._loss, self._grad_norm, self.guard.skipped, self.guard.in_a_row]).tolist()
        self._add_time(started)
        loss, grad_norm, skipped, self.bad = values[0], values[1], int(values[2]), int(values[3])
        measured = StepMetrics(
            step=self.progress.step,
            loss=loss,
            lr=self._lr,
            grad_norm=grad_norm,
            tokens=self.progress.step * self.plan.train.tokens_per_step,
            tokens_per_second=self._window_tokens / self._window_seconds,
            elapsed=self.progress.elapsed,
        )
        self._window_tokens, self._window_seconds = 0, 0.0
        if log:
            self.log.add(measured.line())
        if skipped > self._skipped:
            many, self._skipped = skipped - self._skipped, skipped
            updates = "1 update" if many == 1 else f"{many} updates"
            message = f"step {measured.step:,}: {updates} skipped, loss {loss:.4g}, gradient norm {grad_norm:.4g}"
            self._tell("skipped", message, skipped=skipped)
        self._measured = measured
        return measured

    def evaluate(self, log: bool = True) -> tuple[float, float | None, bool]:
        """Validation loss, bits per byte, and whether that loss is the lowest of the run so far."""
        assert self.val_tokens
        started = time.perf_counter()
        batches = eval_batches(self.val_tokens, self.plan.batch_size, self.plan.seq_len, self.plan.train.eval_tokens)
        val_loss, bits = validate(self.model, batches, self.precision, self.byte_lengths)
        if log:
            self.log.add({"step": self.progress.step, "val_loss": val_loss, "val_bits_per_byte": bits})
        self.progress.elapsed += time.perf_counter() - started
        improved = math.isfinite(val_loss) and val_loss <= (self.progress.best_loss or math.inf)
        if improved:
            self.progress.best_loss = val_loss
        return val_loss, bits, improved

    def catch_up(self) -> Iterator[StepMetrics]:
        """After a resume: the evaluation that was due at the checkpoint's step, where it was not finished any more."""
        step, config = self.progress.step, self.plan.train
        known = checkpoint.evaluation(checkpoint.folder_of(self.plan.out, step))
        lines = [line for line in metrics.read(self.plan.out) if line["step"] == step]
        logged = any("val_loss" in line for line in lines)
        if known and not logged:
            self.log.add({key: known.get(key) for key in ("step", "val_loss", "val_bits_per_byte")})
        if known or not (self.val_tokens and step and (step == self.plan.steps or is_due(step, config.eval_every))):
            return
        val_loss, bits, _ = self.evaluate(log=not logged)
        self.writer.evaluated(step, val_loss, bits)
        for line in lines:
            if set(LOGGED) <= set(line):
                yield StepMetrics(**{key: line[key] for key in LOGGED}, val_loss=val_loss, val_bits_per_byte=bits)

    # ==== when something goes wrong ====

    def roll_back(self) -> list[str]:
        """Go back to the newest checkpoint that did not diverge, and on from there with the data that comes next. Raises
        UserError when that has been tried often enough."""
        facts = f"loss {float(self._loss):.4g}, gradient norm {float(self._grad_norm):.4g}, --lr {self._lr:.1e}"
        before, config = self.progress, self.plan.train
        self.writer.forget_evaluations()
        done = [f for f in checkpoint.checkpoints(self.plan.out) if checkpoint.step_of(f) <= before.step]
        whole = [f for f in done if checkpoint.is_whole(f) and not checkpoint.was_stopped(f)]
        target = next((f for f in whole if checkpoint.step_of(f) not in before.suspects), None)
        if before.rollbacks >= config.max_rollbacks or (whole and not target):
            again = f", or with --init-from {self.plan.out}" if whole else ""
            raise UserError(
                f"diverged at step {before.step}: {facts}, and after {before.rollbacks} rollbacks of {config.max_rollbacks} "
                f"again; start a new run with a lower --lr{again}"
            )
        self._go_to(target)
        now = self.progress
        now.suspects = [*before.suspects, now.step]
        for folder in done:  # of the way that was given up, so that nobody resumes on it
            if checkpoint.step_of(folder) > now.step:
                atomic.remove_folder(folder)
        self.loader.position = now.position = before.position
        now.elapsed, now.rollbacks = before.elapsed, before.rollbacks + 1
        self.saved_step, self.owes_a_save = now.step, False
        self.log.trim(now.step, now.log)
        message = f"diverged at step {before.step:,} ({facts}): back to step {now.step:,}, with other data"
        self._tell("rollback", message, rollbacks=now.rollbacks)
        return self.news()

    def _tell(self, kind: str, message: str, **facts: Any) -> None:
        self._events.append(message)
        self.log.add({"step": self.progress.step, "event": kind, "message": message, **facts})

    @property
    def wants_a_look(self) -> bool:
        waited = self._last_error is not None and not self.writer.waits
        return waited or self.owes_a_save or self.writer.has_failed or self.writer.retry_is_due()

    def news(self) -> list[str]:
        """What happened since this was asked before. A save that waits is told once, not at each attempt."""
        failure, before = self.writer.failure(), self._last_error
        self._last_error = failure or before
        if failure and not (before and atomic.is_full(before) == atomic.is_full(failure)):
            stands = next((f"{f} stands" for f in checkpoint.checkpoints(self.plan.out)), "there is no checkpoint yet")
            mend = ": free some space" if atomic.is_full(failure) else ""
            self._tell("save failed", f"could not save: {failure}; {stands}, and it will be tried again{mend}")
        if self._last_error and not self.writer.waits:
            self._last_error = None
            self._tell("saved", "saved after all")
        told, self._events = self._events, []
        return told

    # ==== saving ====

    def save(self, at_the_end: bool = False) -> Path | None:
        """Copy the state and have it written in the background. None where the log already does not fit the disk, and,
        but for the end, while updates are refused: such a state may be bad itself, and waits for a good one."""
        started = time.perf_counter()
        self.owes_a_save = self.bad > 0 and not at_the_end
        if self.owes_a_save:
            return None
        try:
            self.log.settle()
        except OSError as error:
            self.writer.fail(error)
            return None
        self.progress.scaler, self.progress.log = self.scaler.state_dict(), self.log.state()
        self.progress.stopped = at_the_end and self.progress.step < self.plan.steps
        state = checkpoint.snapshot(self.progress, self.model, self.optimizers, self.guard, self.plan.encoding)
        folder = self.writer.save(state)
        self.saved_step = self.progress.step
        self.progress.elapsed += time.perf_counter() - started
        return folder

    def finish(self) -> Iterator[StepMetrics]:
        """Save what is not saved yet, and stay until it is on the disk. A full one is waited for, but not for ever."""
        measured = self._measured
        if self._trained and not (measured and measured.step == self.progress.step):
            measured = self.measure(log=False)
        for _ in range(LAST_TRIES):
            unsaved = self.saved_step != self.progress.step or self.writer.needs_retry
            saved = self.save(at_the_end=True) if unsaved else None
            self.writer.wait()
            saved, news = None if self.writer.needs_retry else saved, self.news()
            if measured and (saved or news):
                yield replace(measured, saved=saved, events=news)
            if not self.writer.needs_retry:
                return
            if self._last_error and not atomic.is_full(self._last_error):
                break
            self.writer.wait_for_retry()
        raise self._last_error or OSError(f"step {self.progress.step} could not be saved")

    def close(self) -> None:
        self.writer.close()

    def _add_time(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self._window_seconds += seconds
        self.progress.elapsed += seconds
