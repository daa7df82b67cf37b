"""The next token from logits on a GPU: what `sampling.choose` does, without sorting.

Each row of logits is in parts, a program each, so that one row is work for all of a GPU. What is kept of it, by top-k or top-p,
is found by asking, a kernel each time, what there is from each of several numbers on, and going on between the two that it lies
between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2cli import trial
from gpt2cli.config import SamplingConfig
from gpt2cli.kernels import compile_all, launch
from gpt2cli.sampling import choose

WARPS = 8  # of a program
FEW = 16  # rows
BITS = 0x3F800001  # weights are from 0 to 1, and as integers their bits are below that, in the same order
Draw = Callable[[Tensor, SamplingConfig, Tensor, Tensor], None]


def drawing(config: SamplingConfig, like: Tensor) -> Draw:
    """`draw`, or `best`, or `plain` where they do not choose the same, or fail with logits `like` (B, V)."""
    ours: Draw = best if config.greedy else draw
    V, device = like.shape[1], like.device
    rows = FEW if len(like) <= FEW else FEW + 1  # for the sizes that will be used

    def fault() -> str | None:
        places = torch.randperm(V, generator=torch.Generator().manual_seed(0)).to(device)
        logits = -0.1 * config.temperature * places.float().expand(rows, V)  # each a tenth less likely than the one before
        uniform = (torch.arange(rows, device=device) + 0.5) / rows
        found, expected = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        some = like[:rows]

        def both() -> None:
            ours(some, config, uniform[: len(some)], found[: len(some)])  # in 16 bits many are as likely: not compared
            ours(logits, config, uniform, found)

        compile_all(both)
        both()
        plain(logits, config, uniform, expected)
        return None if torch.equal(found, expected) else "they draw other tokens than torch's"

    kind = ("draw", config.greedy, V, config.top_k, config.top_p, like.dtype, device, rows)
    return ours if trial.passed(kind, fault, "decoding") else plain


def plain(logits: Tensor, config: SamplingConfig, uniform: Tensor, drawn: Tensor) -> None:
    """What the others do, by torch."""
    drawn.copy_(choose(logits, config, uniform))


def sizes(rows: int) -> tuple[int, int]:
    """Logits of a part, and numbers asked about at once. Of few rows many programs are made, which ask much and so not often;
    of more rows there are programs enough, and asking about fewer numbers is less work."""
    return (1024, 32) if rows <= FEW else (4096, 8)


def best(logits: Tensor, config: SamplingConfig, uniform: Tensor, drawn: Tensor) -> None:
    """Write into `drawn` (B) the likeliest of logits (B, V), the first of them where several are."""
    (B, V), (part, _) = logits.shape, sizes(len(logits))
    parts = triton.cdiv(V, part)
    with torch.cuda.device_of(logits):
        launch(_best_of, (B,), *_tops(logits, part), V, parts, drawn, triton.next_power_of_2(parts))


def draw(logits: Tensor, config: SamplingConfig, uniform: Tensor, drawn: Tensor) -> None:
    """Write into `drawn` (B) ids as `choose` draws them from logits (B, V); of ids that are exactly as likely all are kept, or
    none."""
    (B, V), like, (part, asked) = logits.shape, uniform, sizes(len(logits))
    parts = triton.cdiv(V, part)
    padded = triton.next_power_of_2(parts)
    weights = like.new_empty(B, parts, part)  # in whole parts, read without masks
    kept, least = like.new_empty(B, parts), None
    with torch.cuda.device_of(logits):
        tops, _ = _tops(logits, part)
        to_weigh = logits, logits.stride(0), tops, weights, V, config.temperature, parts, padded, part
        launch(_weigh, (B, parts), *to_weigh, num_warps=WARPS)
        if config.top_k is not None:
            least = _least(weights, None, float(min(config.top_k, V)), asked, count=True)
        if config.top_p is not None and config.top_p < 1:
            least = _least(weights, least, config.top_p, asked, count=False)
        launch(_keep, (B, parts), weights, least, config.min_p or 0.0, kept, parts, part, num_warps=WARPS)
        launch(_draw, (B,), weights, least, config.min_p or 0.0, kept, uniform, drawn, parts, padded, part, num_warps=WARPS)


def _tops(logits: Tensor, part: int) -> tuple[Tensor, Tensor]:
    """The likeliest of each part of the rows, (B, parts): the logits, and the ids."""
    (B, V), parts = logits.shape, triton.cdiv(logits.shape[1], part)
    tops = torch.empty(B, parts, device=logits.device)
    places = torch.empty(B, parts, dtype=torch.int32, device=logits.device)
    launch(_best, (B, parts), logits, logits.stride(0), V, tops, places, parts, part, num_warps=WARPS)
    return tops, places


def _least(weights: Tensor, floor: Tensor | None, want: float, asked: int, count: bool) -> Tensor:
    """The largest number (B) of which there is `want` in the weights (B, parts, part) from it on, which are from `floor` (B)
    on, too: so many of them, or else this part of their sum."""
    B, parts, part = weights.shape
    how = {"COUNT": count, "ASKED": asked, "PARTS": triton.next_power_of_2(parts)}
    first, before, low, width = None, None, None, BITS
    while width > 1:
        apart, width = width, triton.cdiv(width, asked)
        there, lower = weights.new_empty(B, parts, asked), weights.new_empty(B, dtype=torch.int32)
        asking = weights, floor, first, before, low, apart, want, width, there, lower, parts
        launch(_ask, (B, parts), *asking, **how, PART=part, num_warps=WARPS)
        first, before, low = there if first is None else first, there, lower
    least = weights.new_empty(B)
    launch(_answer, (B,), first, before, low, width, want, floor, least, parts, **how)
    return least


@triton.jit
def _best(logits, stride, V, tops, places, parts, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The likeliest of a part of a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    n = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row.to(tl.int64) * stride + n, mask=n < V, other=float("-inf")).to(tl.float32)
    top, place = tl.max(x, 0, return_indices=True)
    tl.store(tops + row * parts + part, top)
    tl.store(places + row * parts + part, part * PART + place)


@triton.jit
def _best_of(tops, places, V, parts, drawn, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, n = tl.program_id(0), tl.arange(0, PARTS)
    _, part = tl.max(tl.load(tops + row * parts + n, mask=n < parts, other=float("-inf")), 0, return_indices=True)
    place = tl.load(places + row * parts + tl.minimum(part, parts - 1))  # of NaN any
    tl.store(drawn + row, tl.minimum(place, V - 1).to(tl.int64))


@triton.jit
def _weigh(logits, stride, tops, weights, V, temperature, parts, PARTS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights are probabilities over the likeliest one's."""
    row, part, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, PARTS)
    top = tl.max(tl.load(tops + row * parts + p, mask=p < parts, other=float("-inf")))
    n = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row * stride + n, mask=n < V, other=float("-inf")).to(tl.float32)
    tl.store(weights + row * parts * PART + n, tl.exp(x / temperature - top / temperature))  # 0 behind the last


@triton.jit(do_not_specialize=["apart", "width"])
def _ask(  # type: ignore[no-untyped-def]
    weights,
    floor,
    first,
    before,
    low,
    apart,
    want,
    width,
    there,
    lower,
    parts,
    COUNT: tl.constexpr,
    ASKED: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """What there is in a part of a row from each of the numbers on that are `width` apart."""
    row, part, q = tl.program_id(0), tl.program_id(1), tl.arange(0, ASKED)
    weight = tl.load(weights + (row.to(tl.int64) * parts + part) * PART + tl.arange(0, PART))[None, :]
    start = tl.full((), 0, tl.int32)
    if before is not None:
        start = _found(first, before, low, apart, want, row, parts, COUNT, ASKED, PARTS)
    least = (start + q * width).to(tl.float32, bitcast=True)
    if floor is not None:
        least = tl.maximum(least, tl.load(floor + row))
    found = tl.sum(tl.where(weight >= least[:, None], 1.0 if COUNT else weight, 0.0), 1)  # (ASKED)
    tl.store(there + (row * parts + part) * ASKED + q, found)
    tl.store(lower + row, start)


@triton.jit(do_not_specialize=["apart"])
def _answer(  # type: ignore[no-untyped-def]
    first, before, low, apart, want, floor, least, parts, COUNT: tl.constexpr, ASKED: tl.constexpr, PARTS: tl.constexpr
):
    row = tl.program_id(0)
    found = _found(first, before, low, apart, want, row, parts, COUNT, ASKED, PARTS).to(tl.float32, bitcast=True)
    if floor is not None:
        found = tl.maximum(found, tl.load(floor + row))
    tl.store(least + row, found)


@triton.jit
def _found(  # type: ignore[no-untyped-def]
    first, before, low, apart, want, row, parts, COUNT: tl.constexpr, ASKED: tl.constexpr, PARTS: tl.constexpr
):
    """The highest number asked about `before`, `apart` from each other, from which on there is as much as wanted."""
    p, q = tl.arange(0, PARTS), tl.arange(0, ASKED)
    place = row * parts * ASKED + p * ASKED
    there = tl.sum(tl.load(before + place[:, None] + q[None, :], mask=(p < parts)[:, None], other=0.0), 0)  # (ASKED)
    if not COUNT:  # of all, which is what was asked first
        want *= tl.sum(tl.load(first + place, mask=p < parts, other=0.0))
    return tl.load(low + row) + tl.maximum(tl.sum((there >= want).to(tl.int32)) - 1, 0) * apart


@triton.jit
def _keep(weights, least, min_p, kept, parts, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    row, part = tl.program_id(0), tl.program_id(1)
    weight = _kept(weights, least, min_p, row, part, parts, PART)
    tl.store(kept + row * parts + part, tl.sum(weight))


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    weights, least, min_p, kept, uniform, drawn, parts, PARTS: tl.constexpr, PART: tl.constexpr
):
    """The first id at which the sum of what is kept passes the row's part of it all."""
    row, p, n = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, PART)
    sums = tl.load(kept + row * parts + p, mask=p < parts, other=0.0)
    until = tl.cumsum(sums)
    target = tl.load(uniform + row) * tl.sum(sums)
    here = tl.max(tl.where((sums > 0) & (until - sums <= target), p, 0))  # the last of them holds it, or all there is
    weight = _kept(weights, least, min_p, row, here, parts, PART)
    passed = (tl.sum(tl.where(p < here, sums, 0.0)) + tl.cumsum(weight) > target) & (weight > 0)
    found, last = tl.min(tl.where(passed, n, PART)), tl.max(tl.where(weight > 0, n, 0))
    tl.store(drawn + row, here * PART + tl.where(found < PART, found, last).to(tl.int64))


@triton.jit
def _kept(weights, least, min_p, row, part, parts, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights of a part, 0 for those that are not kept."""
    weight = tl.load(weights + (row.to(tl.int64) * parts + part) * PART + tl.arange(0, PART))
    if least is not None:
        min_p = tl.maximum(min_p, tl.load(least + row))
    return tl.where(weight >= min_p, weight, 0.0)
