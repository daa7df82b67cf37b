"""Times what several processes do together: sums between them, and the training step against one process's. It says which
rank is behind."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpt2cli import device
from gpt2cli.bench import OnTurn, nobody, seconds_of
from gpt2cli.config import GPTConfig
from gpt2cli.data import micro_steps
from gpt2cli.distributed import Ranks
from gpt2cli.model import GPT
from gpt2cli.optim import make_optimizers
from gpt2cli.step import Batch, build, compile_parts, train_step


@dataclass(frozen=True)
class ReduceRow:
    bytes: int
    seconds: float  # median
    bandwidth: float  # bytes a second over each link of a ring: 2 (W - 1) / W of the bytes pass it (as nccl-tests count)


@dataclass(frozen=True)
class RankRow:
    rank: int
    where: str
    seconds: float  # for its part of a step without the others, all ranks at the same time; median
    behind: float  # times the median rank's


@dataclass(frozen=True)
class Scaling:
    world_size: int
    parallel: str
    tokens: int  # of a step
    gradient_bytes: int
    together: float  # seconds a step, median
    own: float  # the slowest rank's seconds for its part without the others
    alone: float  # one process with the threads of a machine's ranks, or with one GPU
    speedup: float  # of alone, median of the turns
    reduces: list[ReduceRow]
    ranks: list[RankRow]


def bench_distributed(
    config: GPTConfig,
    where: torch.device,
    dtype: str,
    *,
    ranks: Ranks,
    parallel: str,
    tokens: int,
    B: int,
    T: int,
    repeats: int,
    compile: bool = False,
    on_turn: OnTurn = nobody,
) -> Scaling:
    """The real step in three ways, in turn: by all ranks together, each rank's part by itself, and all of it by the first
    alone while the others wait. On random ids, with AdamW."""
    ranks.connect(where)
    device.set_up(seed=0)
    rows = max(1, tokens // T)
    precision = partial(device.precision, where, dtype)
    plain = GPT(config).to(where)
    if compile:
        compile_parts(plain)
    model, engine = build(config, where, dtype=dtype, parallel=parallel, compile=compile, ranks=ranks)
    state = plain.state_dict()
    for name, parameter in model.named_parameters():
        ranks.fill(parameter, state[name])
    mine = micro_steps(rows, B, ranks.rank, ranks.world_size)
    batches = _random(config, [count for _, count in mine], T, where)
    everything = _random(config, [count for _, count in micro_steps(rows, B, 0, 1)], T, where)
    settings: dict[str, Any] = {"lr": 1e-4, "grad_clip": 1.0, "precision": precision}
    own_optimizers = make_optimizers(plain, "adamw", 0.1, dtype)
    all_optimizers = make_optimizers(model, "adamw", 0.1, dtype, ranks)
    shares = [count / rows for _, count in mine]
    own = partial(train_step, plain, own_optimizers, batches, **settings)
    alone = partial(train_step, plain, own_optimizers, everything, **settings)
    together = partial(train_step, engine, all_optimizers, batches, **settings, shares=shares, ranks=ranks)
    times: dict[str, list[float]] = {"own": [], "together": [], "alone": []}
    for turn in range(repeats + 2):  # the first two warm up
        on_turn(f"turn {turn - 1} of {repeats}" if turn > 1 else f"warm-up {turn + 1} of 2")
        ranks.any(False)
        times["own"].append(seconds_of(own, where))
        ranks.any(False)
        times["together"].append(seconds_of(together, where))
        ranks.any(False)
        if ranks.is_first:
            times["alone"].append(_with_all_threads(alone, where, ranks))
        ranks.any(False)
        if turn < 2:
            for column in times.values():
                column.clear()
    medians = {name: statistics.median(column) if column else 0.0 for name, column in times.items()}
    owns = ranks.gather(torch.tensor([medians["own"]]))[:, 0].tolist()
    speedups = [a / t for a, t in zip(times["alone"], times["together"], strict=False)]
    size = 4 * config.num_parameters()
    return Scaling(
        world_size=ranks.world_size,
        parallel=parallel,
        tokens=rows * T,
        gradient_bytes=size,
        together=medians["together"],
        own=max(owns),
        alone=medians["alone"],
        speedup=statistics.median(speedups) if speedups else 0.0,
        reduces=[_reduce(count, where, ranks, repeats) for count in (1 << 20, 1 << 24, size)],
        ranks=[
            RankRow(rank, name, seconds, seconds / statistics.median(owns))
            for rank, (name, seconds) in enumerate(zip(ranks.collect(ranks.where), owns, strict=True))
        ],
    )


def _random(config: GPTConfig, counts: Sequence[int], T: int, where: torch.device) -> list[Batch]:
    batches = []
    for count in counts:
        ids = torch.randint(config.vocab_size, (max(1, count), T + 1), device=where)
        batches.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return batches


def _with_all_threads(work: Callable[[], object], where: torch.device, ranks: Ranks) -> float:
    """Seconds of work by one process on the CPU with the threads that the ranks of its machine have together."""
    before = torch.get_num_threads()
    torch.set_num_threads(before * (ranks.local_world_size if where.type == "cpu" else 1))
    try:
        return seconds_of(work, where)
    finally:
        torch.set_num_threads(before)


def _reduce(size: int, where: torch.device, ranks: Ranks, repeats: int) -> ReduceRow:
    numbers = torch.ones(size // 4, device=where)
    times = []
    for _ in range(repeats + 1):
        ranks.any(False)
        times.append(seconds_of(partial(ranks.sum, numbers), where))
    seconds = statistics.median(times[1:])
    W = ranks.world_size
    return ReduceRow(size, seconds, 2 * (W - 1) / W * size / seconds)
