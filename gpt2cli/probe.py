"""Finds out on the device what a model of memory cannot know for sure: which micro-batch fits, by trying."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial

import torch

from gpt2cli import device
from gpt2cli.config import GPTConfig, TrainConfig
from gpt2cli.model import GPT
from gpt2cli.optim import make_optimizers
from gpt2cli.step import train_step


def largest_batch(model: GPTConfig, train: TrainConfig, where: torch.device, seq_len: int, sizes: Sequence[int]) -> int | None:
    """The first of `sizes`, the numbers of rows of a micro-step to be tried, with which two updates of the training do not run
    out of memory; None where each does. It takes a second or two for each. Compiled code needs no more than eager does."""
    return next((B for B in sizes if _fits(model, train, where, seq_len, B)), None)


def _fits(model: GPTConfig, train: TrainConfig, where: torch.device, seq_len: int, B: int) -> bool:
    try:
        _two_updates(model, train, where, seq_len, B)
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


def _two_updates(model: GPTConfig, train: TrainConfig, where: torch.device, seq_len: int, B: int) -> None:
    with torch.device(where):
        network = GPT(model)
        network.checkpointing = train.activation_checkpointing
        ids = torch.randint(model.vocab_size, (B, seq_len + 1))
    optimizers = make_optimizers(network, train.optimizer, train.weight_decay, train.dtype)
    precision = partial(device.precision, where, train.dtype, train.attention)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for _ in range(2):  # the second one has the optimizer's state; and a gradient to add to, as in accumulation
        train_step(network, optimizers, [batch, batch], lr=0.0, grad_clip=train.grad_clip, precision=precision)
    device.synchronize(where)
