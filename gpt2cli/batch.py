"""How many rows at a time: the most that fit, by a model of the memory, and on a GPU by trying what it suggests."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from gpt2cli import device, memory
from gpt2cli.config import GPTConfig, TrainConfig
from gpt2cli.errors import many
from gpt2cli.loss import rows_at_once
from gpt2cli.model import GPT
from gpt2cli.optim import make_optimizers
from gpt2cli.step import train_step

MOST = {"cuda": 65536}  # tokens at a time; elsewhere 4,096
SPARE = 0.05  # part of a GPU's memory that the trial leaves free, for what a compiler and a gap between tensors take


def decide_batch(train: TrainConfig, model: GPTConfig, train_tokens: int, world_size: int, notes: list[str]) -> TrainConfig:
    """Micro-batch and tokens of an update: where no `batch_size` is given, the most rows up to MOST tokens that divide the
    update and fit the memory and the text."""
    T = train.seq_len or model.block_size
    rows = max(1, train.tokens_per_step // T)
    B = train.batch_size or _largest(train, model, train_tokens, rows, world_size)
    tokens_per_step = math.ceil(rows / B) * B * T
    if tokens_per_step != train.tokens_per_step:
        notes.append(f"{tokens_per_step:,} tokens a step: whole micro-steps of {B} rows of {T}")
    if rows < world_size:
        notes.append(
            f"{world_size - rows} of the {world_size} ranks have nothing to do, an update being {many(rows, 'row')} of {T} "
            f"tokens: use --tokens-per-step {world_size * T}, or fewer processes"
        )
    return replace(train, batch_size=B, tokens_per_step=tokens_per_step)


def _largest(train: TrainConfig, model: GPTConfig, train_tokens: int, rows: int, world_size: int) -> int:
    where, T = torch.device(train.device), train.seq_len or model.block_size
    each = -(-rows // world_size)  # rows of a rank
    most = max(1, MOST.get(where.type, 4096) // T)
    sizes = [b for b in range(min(rows, most), 0, -1) if rows % b == 0 and (b * T < train_tokens or b == 1)]
    # A GPU is a rank's own; other memory is shared by the ranks, and with everything else.
    room = device.memory_total(where) * (0.95 if where.type == "cuda" else 0.7 / world_size)
    sizes = [b for b in sizes if not room or need(model, train, min(b, each), world_size) < room] or [1]
    if where.type == "cuda" and train.parallel == "ddp" and sizes != [1]:
        return largest_batch(model, train, where, T, sizes, each, world_size) or 1
    return sizes[0]


def need(model: GPTConfig, train: TrainConfig, rows: int, world_size: int = 1) -> int:
    """Bytes at the peak, in each process, with micro-steps of so many rows."""
    T = train.seq_len or model.block_size
    loss_rows = rows_at_once(train.device, device.DTYPES[train.dtype])
    return memory.of_training(model, train, rows=rows, loss_rows=loss_rows, seq_len=T, world_size=world_size)


def largest_batch(
    model: GPTConfig,
    train: TrainConfig,
    where: torch.device,
    seq_len: int,
    sizes: Sequence[int],
    each: int,
    world_size: int = 1,
) -> int | None:
    """The first of `sizes`, numbers of rows of a micro-step, of which a rank has at most `each`, with which two updates of the
    training do not run out of memory while some is left free; None where each does. It takes a second or two for each."""
    spare = int(SPARE * device.memory_total(where)) if where.type == "cuda" else 0
    spare += 4 * model.num_parameters() if world_size > 1 else 0  # what the gradients travel in
    return next((B for B in sizes if _fits(model, train, where, seq_len, min(B, each), spare)), None)


def _fits(model: GPTConfig, train: TrainConfig, where: torch.device, seq_len: int, B: int, spare: int) -> bool:
    try:
        _two_updates(model, train, where, seq_len, B, spare)
        return True
    except (MemoryError, RuntimeError) as error:
        if not device.is_out_of_memory(error):
            raise
        return False
    finally:  # when the frames that held the tensors are gone
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _two_updates(model: GPTConfig, train: TrainConfig, where: torch.device, seq_len: int, B: int, spare: int) -> None:
    device.set_up(train.seed, train.deterministic)
    with torch.device(where):
        free = torch.empty(spare, dtype=torch.uint8)
        network = GPT(model)
        network.checkpointing = train.activation_checkpointing
        ids = torch.randint(model.vocab_size, (B, seq_len + 1))
    optimizers = make_optimizers(network, train.optimizer, train.weight_decay, train.dtype)
    precision = partial(device.precision, where, train.dtype, train.attention)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for _ in range(2):  # the second one has the optimizer's state; and a gradient to add to, as in accumulation
        train_step(network, optimizers, [batch, batch], lr=0.0, grad_clip=train.grad_clip, precision=precision)
    device.synchronize(where)
    del free
