"""Times the product's own training step, alone or in turn with transformers at the same work, each in a process of its own,
whose memory is its own, too."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gpt2cli import device, memory, peers
from gpt2cli.apart import Apart
from gpt2cli.bench import OnTurn, nobody, seconds_of
from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.model import GPT
from gpt2cli.optim import make_optimizers
from gpt2cli.peers import TimedStep
from gpt2cli.recorded import Recorded, is_short
from gpt2cli.step import Batch, compile_parts, train_step

WARM_UP = 2  # steps


@dataclass(frozen=True)
class TrainRow:
    who: str
    seconds: float  # a step, median
    spread: tuple[float, float]  # fastest and slowest
    tokens_per_second: float
    of_ours: float  # its tokens a second against ours, median of the turns
    flops: float  # model FLOP/s
    mfu: float  # of the matmul rate measured in the same turn, median of the turns
    loss: float  # of the first step: it is about ln V with random weights
    memory: int  # bytes at the peak, see `peers.TimedStep`


def our_training(
    config: GPTConfig, where: str, dtype: str, optimizer: str, B: int, T: int, compile: bool
) -> tuple[str, Callable[[], TimedStep]]:
    """The product's `train_step` with its optimizer and clipping, on random ids."""
    before = memory.resident()
    on = torch.device(where)
    device.set_up(seed=0)
    with on:
        model = GPT(config)
    if compile:
        compile_parts(model)
    optimizers = make_optimizers(model, optimizer, weight_decay=0.1, dtype=dtype)
    ids = torch.randint(config.vocab_size, (B, T + 1), device=on, generator=torch.Generator(on).manual_seed(0))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def update(batch: Batch, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        precision = partial(device.precision, on, dtype)
        return train_step(model, optimizers, [batch], lr=lr, grad_clip=1.0, precision=precision)

    make = Recorded(update, model, batch) if dtype != "fp16" and is_short(config, on, B, T) else update
    count = peers.QUEUED.get(on.type, 1)

    def step() -> TimedStep:
        losses: list[Tensor] = []
        seconds = seconds_of(lambda: losses.extend(make(batch, 1e-4)[0] for _ in range(count)), on)
        held = device.memory_peak(on) - (before if on.type != "cuda" else 0)
        return TimedStep(seconds / count, float(losses[0]), held)

    return "gpt2", step


def bench_train(
    config: GPTConfig,
    where: torch.device,
    dtype: str,
    *,
    compare: Sequence[str] = (),
    B: int,
    T: int,
    repeats: int,
    compile: bool,
    optimizer: str,
    on_turn: OnTurn = nobody,
) -> list[TrainRow]:
    """An update of B rows of T tokens in one micro-step, by each library in turn, without dropout."""
    if unknown := next((name for name in compare if name != "hf"), None):
        raise UserError(f"--compare {unknown} is unknown; expected hf")
    config = replace(config, block_size=max(T, config.block_size), dropout=0.0, attn_dropout=0.0)
    work = config, str(where), dtype, optimizer, B, T, compile
    with contextlib.ExitStack() as stack:
        ways = [Apart(our_training, *work)]
        ways += [Apart(peers.hf_training, *work, missing=peers.missing(name)) for name in compare]
        for way in ways:
            stack.callback(way.close)
        turns, roofs = [], []
        for turn in range(WARM_UP + repeats):
            on_turn(f"turn {turn + 1 - WARM_UP} of {repeats}" if turn >= WARM_UP else f"warm-up {turn + 1} of {WARM_UP}")
            turns.append([way() for way in ways])
            roofs.append(device.matmul_rate(where, dtype, seconds=0.1))
    first, timed, ours = turns[0], turns[WARM_UP:], [turn[0].seconds for turn in turns[WARM_UP:]]
    work_flops = B * T * config.flops_per_token(T)
    rows = []
    for n, way in enumerate(ways):
        times = [turn[n].seconds for turn in timed]
        median = statistics.median(times)
        rows.append(
            TrainRow(
                who=way.title,
                seconds=median,
                spread=(min(times), max(times)),
                tokens_per_second=B * T / median,
                of_ours=statistics.median(a / b for a, b in zip(ours, times, strict=True)),
                flops=work_flops / median,
                mfu=statistics.median(work_flops / a / b for a, b in zip(times, roofs[WARM_UP:], strict=True)),
                loss=first[n].loss,
                memory=timed[-1][n].memory,
            )
        )
    return rows
