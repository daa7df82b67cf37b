"""Proof on a user's own settings that a run which is stopped and resumed is the run that would have been."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from gpt2cli import atomic, checkpoint
from gpt2cli.errors import UserError
from gpt2cli.plan import Plan
from gpt2cli.resume import resume_plan
from gpt2cli.train import train

STEPS = 6


@dataclass(frozen=True)
class Verdict:
    steps: int
    tensors: int  # compared: weights, optimizer state, the guard's memory
    different: tuple[str, ...]  # names of those that are not equal bit for bit
    largest_difference: float


def verify_resume(plan: Plan) -> Verdict:
    """Train the next few steps of a plan in one go, and again in two halves with a resume between them, in a temporary
    folder near its `out`; compare everything a run goes on from. Raises UserError where fewer than two steps are left."""
    steps = min(STEPS, plan.steps - plan.first_step)
    if steps < 2:
        raise UserError(f"{steps} steps are left: two or more are needed to compare them with halves; give more --steps")
    there = next(parent for parent in plan.out.absolute().parents if parent.exists())  # on the disk of the run
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=there) as folder, _named_as(plan.out, folder):
        quiet = replace(plan.train, log_every=1, eval_every=0, save_every=0)
        whole, halves = (replace(plan, out=Path(folder) / name, train=quiet) for name in ("whole", "halves"))
        last = plan.first_step + steps
        expected = _tensors(_train_to(whole, last))
        _train_to(halves, plan.first_step + steps // 2)
        found = _tensors(_train_to(resume_plan(halves.out, {}), last))
    names = sorted(expected.keys() | found.keys())
    different = [name for name in names if name not in expected or name not in found or not _same(expected[name], found[name])]
    both = [(expected[name].double(), found[name].double()) for name in different if name in expected and name in found]
    return Verdict(steps, len(names), tuple(different), max((float((a - b).abs().max()) for a, b in both), default=0.0))


@contextlib.contextmanager
def _named_as(out: Path, folder: str) -> Iterator[None]:
    """An error that names a run in the temporary folder names the user's instead."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(re.escape(folder) + r".(whole|halves)", lambda match: str(out), str(error))) from None


def _train_to(plan: Plan, step: int) -> Path:
    """The checkpoint of this step, trained to."""
    done = [plan.first_step]
    for metrics in train(plan, should_stop=lambda: done[-1] >= step):
        done.append(metrics.step)
    return checkpoint.folder_of(plan.out, step)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer state, the guard's memory, and the numbers of `training.json` that are not about time."""
    progress = atomic.read_json(folder / "training.json")
    numbers = [float(progress[name] or 0) for name in ("step", "position", "best_loss", "rollbacks")]
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")
    return tensors | {"progress": torch.tensor(numbers, dtype=torch.float64)}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    bits = [tensor.flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
