"""A model to train, one update, and one evaluation: what training and its benchmarks do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from gpt2cli.config import GPTConfig
from gpt2cli.distributed import ALONE, Ranks, accumulating, is_spread, local_part, put_away, replicate, shard
from gpt2cli.guard import Guard
from gpt2cli.model import GPT, MLP, CausalSelfAttention
from gpt2cli.optim import Optimizer

Batch = tuple[Tensor, Tensor]  # x, y, each (B, T)
Precision = Callable[[], AbstractContextManager[object]]


def build(
    config: GPTConfig,
    where: torch.device,
    *,
    dtype: str,
    parallel: str = "ddp",
    compile: bool = False,
    activation_checkpointing: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[GPT, nn.Module]:
    """A GPT on a device, its memory not filled yet, and what to call in training: that GPT, or DDP around it."""
    model = GPT.on_meta(config)
    model.checkpointing = activation_checkpointing
    spread = parallel == "fsdp" and ranks.is_group
    if compile:
        compile_parts(model, spread)
    if spread:
        shard(model, _large(model), where, dtype)
        model.to_empty(device=where)
        return model, model
    # What `to_empty` does, without the part of torch's compiler that it loads.
    memory = {name: torch.empty(p.shape, dtype=p.dtype, device=where) for name, p in model.named_parameters()}
    model.load_state_dict(memory, assign=True)
    return model, replicate(model, ranks)


def compile_parts(model: GPT, spread: bool = False) -> None:
    """Have torch's compiler take what is in `model` block by block. These are alike, so that it compiles one of them, in
    seconds, and the whole would be no faster, the loss having a kernel of its own. Where each block has a scale of its own they
    are not alike."""
    whole = [model] if model.config.scale_attn_by_inverse_layer_idx else model.h
    for part in _large(model) if spread else whole:
        part.compile()


def _large(model: GPT) -> list[nn.Module]:
    """What has the large matrices and nothing else; LayerNorms and embeddings stay with the whole."""
    return [part for part in model.modules() if isinstance(part, CausalSelfAttention | MLP)]


def train_step(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Sequence[Batch],
    *,
    lr: float | Tensor,
    grad_clip: float,
    precision: Precision = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    guard: Guard | None = None,
    shares: Sequence[float] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """One update from the mean gradient of the micro-batches, which `guard` may refuse. `model` is a GPT, or what
    `distributed.replicate` made of one; each rank has micro-batches of its own, and `shares` says which part of all ranks'
    rows each of them is. Returns the mean loss and the gradient's norm before clipping, as tensors on the device, so that
    nobody waits for them."""
    total = torch.zeros((), device=batches[0][0].device)
    scaler = scaler or torch.amp.GradScaler(total.device.type, enabled=False)
    guard = guard or Guard(total.device)
    model.train()
    shares = shares or [1 / len(batches)] * len(batches)
    for n, ((x, y), share) in enumerate(zip(batches, shares, strict=True)):
        with accumulating(model, last=n == len(batches) - 1):
            with precision():
                _, loss = model(x, y, loss_only=True)
            # Between the ranks gradients are averaged, where the share makes it a sum.
            scaler.scale(loss * (share * ranks.world_size)).backward()
        total += loss.detach() * share
    for optimizer in optimizers:
        scaler.unscale_(optimizer)  # type: ignore[arg-type]  # it reads the groups alone
    total, grad_norm = clip(model.parameters(), grad_clip, total, ranks)
    skip = guard.judge(total, grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = skip
        optimizer.step()
    scaler.update()
    model.zero_grad(set_to_none=True)
    return total, grad_norm


@torch.no_grad()
def clip(parameters: Iterable[Tensor], grad_clip: float, loss: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Scale the gradients down to a norm of at most `grad_clip`, as torch's `clip_grad_norm_` does. Returns the sum of the
    ranks' `loss`, which travels with it, and the norm before."""
    present = [p.grad for p in parameters if p.grad is not None]
    grads = [local_part(grad) for grad in present]
    # On a CPU the norm of 20 million numbers in one go is off by 1e-3: there each row's comes first.
    rows = [torch.linalg.vector_norm(grad, dim=-1) for grad in grads] if loss.device.type == "cpu" else grads
    squares = nn.utils.get_total_norm(rows).square() / (1 if is_spread(present[0]) else ranks.world_size)
    loss, squares = ranks.sum(torch.stack([loss, squares]))
    norm = squares.sqrt()
    torch._foreach_mul_(grads, (grad_clip / (norm + 1e-6)).clamp(max=1.0))
    return loss, norm


@torch.no_grad()
def validate(
    model: GPT, batches: Iterator[Batch], precision: Precision, byte_lengths: Tensor, ranks: Ranks = ALONE
) -> tuple[float, float | None]:
    """Mean loss in nats a token, and bits per byte of the text the tokens stand for (V,) `byte_lengths` long;
    None where they stand for none. The ranks take turns, and add up the same numbers in the same order as one would."""
    model.eval()
    where = model.wte.weight.device
    rows = []  # nats, tokens and bytes of each batch
    for n, (x, y) in enumerate(batches):
        nats = 0.0
        if n % ranks.world_size == ranks.rank:
            nats = _nats(model, x.to(where), y.to(where), precision)
        rows.append([nats, y.numel(), int(byte_lengths[y].sum())])
    if 0 < len(rows) % ranks.world_size <= ranks.rank:
        _nats(model, x.to(where), y.to(where), precision)  # where the model is spread, all are needed to run it
    put_away(model)
    found = torch.tensor(rows, dtype=torch.float64)
    found[:, 0] = ranks.sum(found[:, 0].clone())
    nats, tokens, text_bytes = (sum(column) for column in found.T.tolist())
    return nats / tokens, nats / math.log(2) / text_bytes if text_bytes else None


def _nats(model: GPT, x: Tensor, y: Tensor, precision: Precision) -> float:
    with precision():
        _, loss = model(x, y, loss_only=True)
    return float(loss) * y.numel()
