"""A run at work: the live objects behind a plan, and what can be done with them: a step, an evaluation, a save, a way back.

The state of a run is the model, the optimizer, the guard's memory, the step and the position in the data; all of it is in
every checkpoint, so that a run that goes on is the run that would have been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2cli import atomic, checkpoint, device
from gpt2cli.compiled import agree_or_eager
from gpt2cli.data import DataLoaderLite, eval_batches, micro_steps
from gpt2cli.distributed import ALONE, Ranks
from gpt2cli.errors import UserError
from gpt2cli.formats import huggingface
from gpt2cli.guard import Guard
from gpt2cli.keeper import Keeper, Nobody
from gpt2cli.metrics import LOGGED, StepMetrics
from gpt2cli.model import GPT
from gpt2cli.optim import make_optimizers, planned_lr
from gpt2cli.plan import Plan
from gpt2cli.recorded import Recorded, is_short
from gpt2cli.sources import open_train, open_val
from gpt2cli.step import Batch, build, train_step, validate

BAD_IN_A_ROW = 3  # updates refused one after the other: then it is the model that is bad, not the batch
FP16_IN_A_ROW = 20  # fp16's scale finds its size by gradients that overflow, halving each time
LAST_TRIES = 20  # to save the end of a run on a full disk


def is_due(step: int, every: int | None) -> bool:
    return bool(every) and step % (every or 1) == 0


def _can_be_recorded(plan: Plan) -> bool:
    """Whether its updates are short, without anything that the host decides on the way, and there is memory to spare: a record
    keeps what it uses. With `--deterministic` some kernels wait for the host."""
    train = plan.train
    if plan.rows != plan.batch_size or train.dtype == "fp16" or train.deterministic or train.activation_checkpointing:
        return False
    short = is_short(plan.model, plan.device, plan.rows, plan.seq_len)
    return short and plan.memory < device.memory_total(plan.device) / 2


class Run:
    """The live objects behind a plan. Its folder is held by whoever makes one."""

    def __init__(self, plan: Plan, ranks: Ranks = ALONE) -> None:
        self.plan, self.ranks = plan, ranks
        ranks.connect(plan.device, spread=plan.train.parallel == "fsdp")
        train = plan.train
        self.model, self.engine = build(
            plan.model,
            plan.device,
            dtype=train.dtype,
            compile=train.compile == "on",
            parallel=train.parallel,
            activation_checkpointing=train.activation_checkpointing,
            ranks=ranks,
        )
        self.optimizers = make_optimizers(self.model, train.optimizer, train.weight_decay, train.dtype, ranks)
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=train.dtype == "fp16")
        data = open_train(plan.sources, plan.model.vocab_size)
        self.loader = DataLoaderLite(plan.batch_size, plan.seq_len, data, seed=train.seed)
        self.val_tokens = open_val(plan.sources, plan.model.vocab_size)
        # A model may know more ids than its tokenizer; they stand for no text.
        self.byte_lengths = torch.zeros(plan.model.vocab_size, dtype=torch.long)
        known = torch.from_numpy(plan.encoding.byte_lengths())[: plan.model.vocab_size]
        self.byte_lengths[: len(known)] = known
        ranks.fill(self.byte_lengths, self.byte_lengths)  # where tokens are at hand, another rank may lack the tokenizer
        self.bad_at_most = FP16_IN_A_ROW if self.scaler.is_enabled() else BAD_IN_A_ROW
        self.owes_a_save = False  # one was due while updates were refused
        self._go_to(plan.resume_from)
        self.saved_step = self.progress.step
        if ranks.is_first:
            atomic.write_sealed(plan.out / "run.json", plan.to_json())  # the first file: with it a folder is a run
        self.keeper = Keeper(plan.out) if ranks.is_first else Nobody()
        self.keeper.begin_at(self.progress)
        self._believes_compiler = train.compile != "on"  # or has looked whether it may
        self._records = not ranks.is_group and _can_be_recorded(plan)

    def _go_to(self, folder: Path | None) -> None:
        """The state of a checkpoint, or of the very beginning. What rank 0 says counts."""
        plan = self.plan
        self.guard = Guard(plan.device, plan.train.spike)
        self.bad = 0  # updates refused in a row, when it was last looked
        self._window_tokens, self._window_seconds = 0, 0.0  # of the steps since the last measure
        self._measured: StepMetrics | None = None
        self._ahead: tuple[list[Batch], list[float]] | None = None  # micro-batches of the next update
        self._trained = False  # a step since it went here
        self._recorded: Recorded | None = None
        device.set_up(plan.train.seed, plan.train.deterministic)
        if self.ranks.any(folder is not None):
            self.progress = checkpoint.restore(folder or Path(), self.model, self.optimizers, self.guard, self.ranks)
            try:
                self.scaler.load_state_dict(self.progress.scaler)
            except (RuntimeError, KeyError):
                raise UserError(f"{folder} cannot be resumed from: it has no scale of fp16's gradients") from None
        else:
            self.progress = checkpoint.Progress()
            start = plan.init_from
            state = self.ranks.first(
                lambda: huggingface.read(Path(start))[1] if start else GPT(plan.model).state_dict()  # on rank 0 alone
            )
            for name, parameter in self.model.named_parameters():
                self.ranks.fill(parameter, state[name] if state else None)
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self._skipped = int(self.guard.skipped)

    def precision(self) -> AbstractContextManager[object]:
        return device.precision(self.plan.device, self.plan.train.dtype, self.plan.train.attention)

    # ==== a step and what follows it ====

    def step(self) -> None:
        """One update."""
        started = time.perf_counter()
        config, progress = self.plan.train, self.progress
        batches, shares = self._ahead or self._load()
        self._ahead = None
        self._lr = planned_lr(progress.step, config)
        try:
            if not self._believes_compiler:
                self._check_compiled(batches[0])
            device.seed_step(config.seed, progress.step, self.ranks.rank)
            self._loss, self._grad_norm = self._update(batches, shares)
        except (MemoryError, RuntimeError) as error:
            if device.is_out_of_memory(error):
                raise UserError(self.plan.out_of_memory(progress.step + 1)) from None
            raise
        self._trained = True
        progress.step += 1
        progress.position += self.plan.rows
        self._window_tokens += config.tokens_per_step
        if progress.step < self.plan.steps and self.plan.device.type != "cpu":
            self._ahead = self._load()  # while the device is at work, which nobody has waited for yet
        self._add_time(started)

    def _update(self, batches: list[Batch], shares: list[float]) -> tuple[Tensor, Tensor]:
        def update(batches: list[Batch], lr: float | Tensor) -> tuple[Tensor, Tensor]:
            return train_step(
                self.engine,
                self.optimizers,
                batches,
                lr=lr,
                grad_clip=self.plan.train.grad_clip,
                precision=self.precision,
                scaler=self.scaler,
                guard=self.guard,
                shares=shares,
                ranks=self.ranks,
            )

        if not self._records:
            return update(batches, self._lr)
        if self._recorded is None:
            self._recorded = Recorded(lambda batch, lr: update([batch], lr), self.model, batches[0])
        return self._recorded(batches[0], self._lr)

    def _check_compiled(self, batch: Batch) -> None:
        """Once in a session: what it computes is held against eager."""
        exact = self.plan.train.dtype == "fp32"
        if why := agree_or_eager(self.model, batch, self.precision, exact, self.ranks):
            self.keeper.tell(self.progress.step, "eager", f"torch.compile is not used: {why}")
        self._believes_compiler = True

    def _load(self) -> tuple[list[Batch], list[float]]:
        """The micro-batches of the next update that are this rank's, on their way to the device, and which part of all its rows
        each of them is."""
        plan, where = self.plan, self.plan.device
        mine = micro_steps(plan.rows, plan.batch_size, self.ranks.rank, self.ranks.world_size)
        batches = [self.loader.batch(self.progress.position + first, max(1, count)) for first, count in mine]
        pinned = where.type == "cuda"  # from there the copy needs nobody to wait
        if pinned:
            batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches]
        moved = [(x.to(where, non_blocking=pinned), y.to(where, non_blocking=pinned)) for x, y in batches]
        return moved, [count / plan.rows for _, count in mine]

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
            memory=device.memory_peak(self.plan.device),
        )
        self._window_tokens, self._window_seconds = 0, 0.0
        if log:
            self.keeper.add(measured.line())
        if skipped > self._skipped:
            many, self._skipped = skipped - self._skipped, skipped
            updates = "1 update" if many == 1 else f"{many} updates"
            message = f"step {measured.step:,}: {updates} skipped, loss {loss:.4g}, gradient norm {grad_norm:.4g}"
            self.keeper.tell(self.progress.step, "skipped", message, skipped=skipped)
        self._measured = measured
        return measured

    def evaluate(self, log: bool = True) -> tuple[float, float | None, bool]:
        """Validation loss, bits per byte, and whether that loss is the lowest of the run so far."""
        assert self.val_tokens
        started = time.perf_counter()
        batches = eval_batches(self.val_tokens, self.plan.batch_size, self.plan.seq_len, self.plan.train.eval_tokens)
        val_loss, bits = validate(self.model, batches, self.precision, self.byte_lengths, self.ranks)
        if log:
            self.keeper.add({"step": self.progress.step, "val_loss": val_loss, "val_bits_per_byte": bits})
        self.progress.elapsed += time.perf_counter() - started
        improved = math.isfinite(val_loss) and val_loss <= (self.progress.best_loss or math.inf)
        if improved:
            self.progress.best_loss = val_loss
        return val_loss, bits, improved

    def catch_up(self) -> Iterator[StepMetrics]:
        """After a resume: the evaluation that was due at the checkpoint's step, where it was not finished any more."""
        step, config = self.progress.step, self.plan.train
        known, logged = self._log_known_evaluation()
        lines = self.keeper.lines_of(step)
        due = self.val_tokens and step and (step == self.plan.steps or is_due(step, config.eval_every))
        if not self.ranks.any(bool(self.ranks.is_first and due and not known)):
            return
        val_loss, bits, _ = self.evaluate(log=not logged)
        self.keeper.evaluated(step, val_loss, bits)
        for line in lines:
            if set(LOGGED) <= set(line):
                yield StepMetrics(**{key: line[key] for key in LOGGED}, val_loss=val_loss, val_bits_per_byte=bits)

    def _log_known_evaluation(self) -> tuple[dict[str, Any], bool]:
        """What the checkpoint of this step says of its evaluation, which came after it was saved; and whether that had been
        logged. Now it is."""
        folder = checkpoint.folder_of(self.plan.out, self.progress.step)
        known = checkpoint.evaluation(folder) if self.ranks.is_first else {}
        logged = any("val_loss" in line for line in self.keeper.lines_of(self.progress.step))
        if known and not logged:
            self.keeper.add({key: known.get(key) for key in ("step", "val_loss", "val_bits_per_byte")})
        return known, logged

    def tell_if_turned(self) -> None:
        """Why the run ends here, where validation has turned."""
        step, patience = self.progress.step, self.plan.train.patience
        told = any(line.get("event") == "turned" for line in self.keeper.lines_of(step))
        if step < self.plan.steps and self.keeper.has_turned(patience) and not told:
            message = f"validation has turned: no lower loss in {patience} evaluations, so the run ends after step {step:,}"
            self.keeper.tell(step, "turned", message)

    # ==== when something goes wrong ====

    def roll_back(self) -> list[str]:
        """Go back to the newest checkpoint that did not diverge, and on from there with the data that comes next. Raises
        UserError when that has been tried often enough."""
        facts = f"loss {float(self._loss):.4g}, gradient norm {float(self._grad_norm):.4g}, --lr {self._lr:.1e}"
        before = self.progress

        def choose() -> Path | None:
            target, any_whole = self.keeper.target_of_rollback(before)
            if before.rollbacks >= self.plan.train.max_rollbacks or (any_whole and not target):
                again = f", or with --init-from {self.plan.out}" if any_whole else ""
                raise UserError(
                    f"diverged at step {before.step}: {facts}, and after {before.rollbacks} rollbacks of "
                    f"{self.plan.train.max_rollbacks} again; start a new run with a lower --lr{again}"
                )
            return target

        self._go_to(self.ranks.first(choose))
        now = self.progress
        now.suspects = [*before.suspects, now.step]
        self.keeper.drop_after(now.step, before)
        now.position, now.elapsed, now.rollbacks = before.position, before.elapsed, before.rollbacks + 1
        self.saved_step, self.owes_a_save = now.step, False
        self.keeper.begin_at(now)
        self._log_known_evaluation()
        message = f"diverged at step {before.step:,} ({facts}): back to step {now.step:,}, with other data"
        self.keeper.tell(now.step, "rollback", message, rollbacks=now.rollbacks)
        return self.keeper.news(now.step)

    @property
    def wants_a_look(self) -> bool:
        return self.owes_a_save or self.keeper.wants_a_look

    # ==== saving ====

    def save(self) -> Path | None:
        """Copy the state and have it written in the background. None while updates are refused, since such a state may be
        bad itself, and waits for a good one; and where the log already does not fit the disk."""
        started = time.perf_counter()
        self.owes_a_save = self.bad > 0
        if self.owes_a_save:
            return None
        self.ranks.first(self.keeper.wait)  # on a slow disk: two copies of the state at once is more than was planned for
        state = self._snapshot()
        folder = self.ranks.first(lambda: self.keeper.save(state))
        self.saved_step = self.progress.step
        self.progress.elapsed += time.perf_counter() - started
        return folder

    def _snapshot(self, at_the_end: bool = False) -> checkpoint.Snapshot:
        self.progress.scaler = self.scaler.state_dict()
        self.progress.stopped = at_the_end and self.progress.step < self.plan.steps
        return checkpoint.snapshot(self.progress, self.model, self.optimizers, self.guard, self.plan.encoding, self.ranks)

    def finish(self) -> Iterator[StepMetrics]:
        """Save what is not saved yet, and stay until it is on the disk. A full one is waited for, but not for ever."""
        measured, step = self._measured, self.progress.step
        if self._trained and not (measured and measured.step == step):
            measured = self.measure(log=False)
        failed = self.ranks.first(self.keeper.needs_save)
        unsaved = self.ranks.any(self.saved_step != step or bool(failed))
        state = self._snapshot(at_the_end=True) if unsaved else None
        for tries_left in reversed(range(LAST_TRIES)):
            saved = self.keeper.save(state) if state else None
            full = self.keeper.needs_save()
            saved, news = None if full else saved, self.keeper.news(step)
            if full and tries_left == LAST_TRIES - 1:
                news += self.keeper.news_of_waiting(step, tries_left)
            if measured and (saved or news):
                yield replace(measured, saved=saved, events=news)
            if not full:
                return
            self.keeper.wait_for_retry(tries_left)

    def close(self) -> None:
        self._recorded = None  # it refers to what refers to it, and holds memory
        self.keeper.close()

    def _add_time(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self._window_seconds += seconds
        self.progress.elapsed += seconds
