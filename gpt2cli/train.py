"""The training loop: a generator of `StepMetrics`. It prints nothing, and writes only the run folder.

In a run of several processes each executes this loop, and they decide alike: by what all know, or by asking each other
(`ranks`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from gpt2cli import atomic, checkpoint
from gpt2cli.distributed import ALONE, Ranks
from gpt2cli.errors import UserError
from gpt2cli.metrics import StepMetrics
from gpt2cli.model import GPT
from gpt2cli.plan import Plan
from gpt2cli.run import Run, is_due

LOOK_EVERY = 16  # steps between looks at the guard's verdicts, where nothing else waits for the device


def train(
    plan: Plan,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    sample: Callable[[GPT], Sequence[str]] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[StepMetrics]:
    """Carry out a plan; at the end, or once `should_stop()` on any of the ranks, everything is saved. Yields each step that
    was logged, evaluated, saved or sampled from (`sample` turns the model into texts), or at which something happened.

    Checkpoints are written in the background; leaving the generator waits for them. Raises UserError where the updates stay
    bad after all rollbacks, where memory ends, and where another process trains the same run; OSError where the disk stays
    full at the end.
    """
    with contextlib.ExitStack() as stack:
        ranks.first(lambda: _take_folder(plan, stack))
        run = stack.enter_context(contextlib.closing(Run(plan, ranks)))
        yield from run.catch_up()
        cadence = plan.train
        while run.progress.step < plan.steps and not ranks.any(should_stop() or run.keeper.has_turned(cadence.patience)):
            run.step()
            step = run.progress.step
            last = step == plan.steps
            log, save, evaluate = (last or is_due(step, n) for n in (cadence.log_every, cadence.save_every, cadence.eval_every))
            show = is_due(step, cadence.sample_every)
            if not (ranks.any(run.wants_a_look) or log or save or evaluate or show or is_due(step, LOOK_EVERY) or step == 1):
                continue
            measured = run.measure(log)
            if step == 1 and not math.isfinite(measured.loss):
                ranks.first(partial(_refuse, plan, measured.loss))
            if run.bad >= run.bad_at_most:
                events = run.roll_back()
                yield replace(measured, step=run.progress.step, events=events)
                continue
            save = ranks.any(save or run.owes_a_save or run.keeper.retry_is_due)
            saved = run.save() if save else None
            if evaluate and run.val_tokens:
                val_loss, bits, improved = run.evaluate()
                measured = replace(measured, val_loss=val_loss, val_bits_per_byte=bits)
                if improved and not save:
                    saved = run.save()
                run.keeper.evaluated(step, val_loss, bits)
            samples = sample(run.model) if sample and show and ranks.is_first else ()
            yield replace(measured, saved=saved, samples=samples, events=run.keeper.news(step))
        run.tell_if_turned()
        yield from run.finish()
        ranks.collect("")  # that all of it is there; with no limit to how long the disk takes


def _refuse(plan: Plan, loss: float) -> None:
    raise UserError(plan.never_finite(loss))


def _take_folder(plan: Plan, stack: contextlib.ExitStack) -> None:
    """Hold the folder of the run for this process. Raises UserError where another one got to it since the plan was made."""
    out = plan.out
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(atomic.lock(out))
    if plan.sessions is None and (out / "run.json").exists():
        raise UserError(f"{out} already holds a run: continue it with 'gpt2 train --resume --out {out}'")
    later = [f for f in checkpoint.checkpoints(out) if checkpoint.step_of(f) > plan.first_step]
    if got_to := next((f.name for f in later if checkpoint.is_whole(f)), None):
        raise UserError(f"{out} has got to {got_to} in the meantime: run it again")
    for folder in later:
        folder.rename(checkpoint.aside(folder))
    atomic.sweep(out)
