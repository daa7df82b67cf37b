"""torch.compile, believed only where it agrees with eager: it has been wrong (NaN with torch 2.10 on an A100), and it may not
run at all, without a C++ compiler or on an old GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gpt2cli.distributed import ALONE, Ranks, local_part
from gpt2cli.model import GPT

Batch = tuple[Tensor, Tensor]  # x, y
Precision = Callable[[], AbstractContextManager[object]]
SCALE = 1024.0  # of the loss, so that fp16 holds its gradients


def agree_or_eager(model: GPT, batch: Batch, precision: Precision, exact: bool, ranks: Ranks = ALONE) -> str | None:
    """Compute the loss and the norm of the gradients of a batch with the compiled parts of `model` and without. Where that
    fails or the results differ by more than rounding (in fp32 if `exact`, else in 16 bits), they are compiled no more, and it
    is returned why. All ranks decide alike; none exchanges gradients for it."""
    parts = [part for part in model.modules() if part._compiled_call_impl is not None]
    if not parts:
        return None
    how = [part._compiled_call_impl for part in parts]
    failure, found = None, torch.zeros(2)
    try:
        found = _loss_and_norm(model, batch, precision)
    except Exception as error:  # a compiler raises what it likes
        lines = [line for line in str(error).splitlines() if line.strip()]
        failure = f"it failed with {type(error).__name__}: {lines[0][:200] if lines else ''}"
    _use(parts, [None] * len(parts))
    if ranks.any(failure is not None):
        return failure or "it failed on another rank"
    expected = _loss_and_norm(model, batch, precision)
    dropout = model.config.dropout or model.config.attn_dropout  # its numbers are others when compiled
    close = torch.tensor([0.05, 0.5] if dropout else [1e-4, 1e-3] if exact else [0.01, 0.1])
    # Where eager's are no numbers either, it is not the compiler.
    differs = bool(expected.isfinite().all()) and not bool(((found - expected).abs() <= close * expected.abs()).all())
    if ranks.any(differs):
        (loss, norm), (eager_loss, eager_norm) = found.tolist(), expected.tolist()
        return f"its loss is {loss:.6g} and gradient norm {norm:.6g}, where eager has {eager_loss:.6g} and {eager_norm:.6g}"
    _use(parts, how)
    return None


def _use(parts: list[nn.Module], how: list[Any]) -> None:
    for part, call in zip(parts, how, strict=True):
        part._compiled_call_impl = call


def _loss_and_norm(model: GPT, batch: Batch, precision: Precision) -> Tensor:
    """(2,), on the host; leaves no gradients."""
    model.train()
    try:
        with precision():
            _, loss = model(*batch, loss_only=True)
        (SCALE * loss).backward()
        norm = nn.utils.get_total_norm([local_part(p.grad) for p in model.parameters() if p.grad is not None])
        return torch.stack([loss.detach(), norm / SCALE]).float().cpu()
    finally:
        model.zero_grad(set_to_none=True)
