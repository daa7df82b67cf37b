"""One update, and one evaluation: what training and its benchmark do to a model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gpt2cli.guard import Guard
from gpt2cli.model import GPT

Batch = tuple[Tensor, Tensor]  # x, y, each (B, T)
Precision = Callable[[], AbstractContextManager[object]]


def train_step(
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    *,
    lr: float,
    grad_clip: float,
    precision: Precision = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    guard: Guard | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from the mean gradient of the micro-batches, which `guard` may refuse. Returns their mean loss and the
    gradient's norm before clipping, as tensors on the device, so that nobody waits for them."""
    total = torch.zeros((), device=batches[0][0].device)
    scaler = scaler or torch.amp.GradScaler(total.device.type, enabled=False)
    guard = guard or Guard(total.device)
    model.train()
    for x, y in batches:
        with precision():
            _, loss = model(x, y, loss_only=True)
        scaler.scale(loss / len(batches)).backward()
        total += loss.detach() / len(batches)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    skip = guard.judge(total, grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # where it is 1, step() leaves everything as it is
        optimizer.step()
    scaler.update()
    model.zero_grad(set_to_none=True)
    return total, grad_norm


@torch.no_grad()
def validate(model: GPT, batches: Iterator[Batch], precision: Precision, byte_lengths: Tensor) -> tuple[float, float | None]:
    """Mean loss in nats a token, and bits per byte of the text the tokens stand for (V,) `byte_lengths` long;
    None where they stand for none."""
    model.eval()
    where = model.wte.weight.device
    nats, tokens, text_bytes = 0.0, 0, 0
    for x, y in batches:
        with precision():
            _, loss = model(x.to(where), y.to(where), loss_only=True)
        nats += float(loss) * y.numel()
        tokens += y.numel()
        text_bytes += int(byte_lengths[y].sum())
    return nats / tokens, nats / math.log(2) / text_bytes if text_bytes else None
