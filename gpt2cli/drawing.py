"""The next token from logits on a GPU: what `sampling.choose` does, in a kernel or two and without sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2cli import trial
from gpt2cli.config import SamplingConfig
from gpt2cli.sampling import choose

LOOK, WARPS = 8192, 16  # logits at once, and by how many threads
Draw = Callable[[Tensor, SamplingConfig, Tensor], Tensor]


def drawing(config: SamplingConfig, like: Tensor) -> Draw:
    """`draw`, or `best`, or `choose` where they do not choose the same, or fail with logits `like` (B, V)."""
    ours: Draw = best if config.greedy else draw
    V, device = like.shape[1], like.device

    def fault() -> str | None:
        places = torch.randperm(V, generator=torch.Generator().manual_seed(0)).to(device)
        logits = -0.1 * config.temperature * places.float().expand(16, V)  # each a tenth less likely than the one before
        uniform = (torch.arange(16, device=device) + 0.5) / 16
        ours(like[:1], config, uniform[:1])  # in 16 bits many are equally likely, so that these are not compared
        same = torch.equal(ours(logits, config, uniform), choose(logits, config, uniform))
        return None if same else "they draw other tokens than torch's"

    kind = ("draw", config.greedy, V, config.top_k, config.top_p, like.dtype, device)
    return ours if trial.passed(kind, fault, "decoding") else choose


def best(logits: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """The likeliest of logits (B, V), the first of them where several are."""
    (B, V), device = logits.shape, logits.device
    parts = triton.cdiv(V, LOOK)
    tops, places = torch.empty(B, parts, device=device), torch.empty(B, parts, dtype=torch.int32, device=device)
    drawn = torch.empty(B, dtype=torch.int64, device=device)
    with torch.cuda.device_of(logits):
        _best[(parts, B)](logits, logits.stride(0), V, tops, places, LOOK)
        _best_of[(B,)](tops, places, V, parts, drawn, triton.next_power_of_2(parts))
    return drawn


def draw(logits: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """Ids (B) as `choose` draws them; of ids that are exactly as likely all are kept, or none."""
    (B, V), device = logits.shape, logits.device
    block = min(LOOK, triton.next_power_of_2(V))
    weights = torch.empty(B, triton.cdiv(V, block) * block, device=device)  # in whole blocks, read without masks
    drawn = torch.empty(B, dtype=torch.int64, device=device)
    top_k = None if config.top_k is None else float(min(config.top_k, V))
    top_p = None if config.top_p is None or config.top_p >= 1 else config.top_p
    settings = config.temperature, top_k, top_p, config.min_p or 0.0
    with torch.cuda.device_of(logits):
        _draw[(B,)](logits, logits.stride(0), weights, uniform, drawn, V, *settings, block, num_warps=WARPS)
    return drawn


@triton.jit
def _best(logits, stride, V, tops, places, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The likeliest of a part of a row."""
    part, row = tl.program_id(0), tl.program_id(1)
    n = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + n, mask=n < V, other=float("-inf")).to(tl.float32)
    top, place = tl.max(x, 0, return_indices=True)
    tl.store(tops + row * tl.num_programs(0) + part, top)
    tl.store(places + row * tl.num_programs(0) + part, part * BLOCK + place)


@triton.jit
def _best_of(tops, places, V, parts, drawn, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, n = tl.program_id(0), tl.arange(0, PARTS)
    _, part = tl.max(tl.load(tops + row * parts + n, mask=n < parts, other=float("-inf")), 0, return_indices=True)
    place = tl.load(places + row * parts + tl.minimum(part, parts - 1))  # of NaN any
    tl.store(drawn + row, tl.minimum(place, V - 1).to(tl.int64))


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits, stride, weights, uniform, drawn, V, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr
):
    """A program a row of logits (B, V). Weights are probabilities over the likeliest one's. `top_k` and `top_p` may be None."""
    row, W = tl.program_id(0).to(tl.int64), tl.cdiv(V, BLOCK) * BLOCK
    logits += row * stride
    weights += row * W
    top = float("-inf")
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.load(logits + n, mask=n < V, other=float("-inf")).to(tl.float32)))
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        x = tl.load(logits + n, mask=n < V, other=float("-inf")).to(tl.float32)
        tl.store(weights + n, tl.exp(x / temperature - top / temperature))  # 0 behind the last
    tl.debug_barrier()

    least = 0.0
    if top_k is not None:
        least = _least(weights, W, 0.0, top_k, True, BLOCK)
    if top_p is not None:
        least = _least(weights, W, least, top_p * _kept(weights, W, least, False, BLOCK), False, BLOCK)
    least = tl.maximum(least, min_p)

    target = tl.load(uniform + row) * _kept(weights, W, least, False, BLOCK)
    here, before_here, before = 0, 0.0, 0.0
    for start in range(0, W, BLOCK):
        weight = tl.load(weights + start + tl.arange(0, BLOCK))
        weight = tl.sum(tl.where(weight >= least, weight, 0.0))
        reached = (weight > 0) & (before <= target)  # the last of them holds it, or all there is
        here, before_here = tl.where(reached, start, here), tl.where(reached, before, before_here)
        before += weight
    n = here + tl.arange(0, BLOCK)
    weight = tl.load(weights + n)
    weight = tl.where(weight >= least, weight, 0.0)
    passed = (before_here + tl.cumsum(weight) > target) & (weight > 0)
    found, last = tl.min(tl.where(passed, n, V)), tl.max(tl.where(weight > 0, n, 0))
    tl.store(drawn + row, tl.where(found < V, found, last))


@triton.jit
def _kept(weights, W, least, COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many weights are at least `least`, or their sum."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, W, BLOCK):
        weight = tl.load(weights + start + tl.arange(0, BLOCK))
        sums += tl.where(weight >= least, 1.0 if COUNT else weight, 0.0)
    return tl.sum(sums)


@triton.jit
def _least(weights, W, floor, want, COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest number of which there is `want` in the weights from it on, which are from `floor` on, too. Weights are from 0
    to 1, and the bits of such numbers are in the order of their sizes, so that a search over these finds it exactly: each time
    the weights are read, a quarter of what is left remains."""
    low, width, quarter = tl.full((), 0, tl.int32), tl.full((), 0x3F800001, tl.int32), tl.arange(0, 4)
    n = tl.arange(0, BLOCK)
    for _ in range(15):
        width = (width + 3) // 4
        least = tl.maximum((low + quarter * width).to(tl.float32, bitcast=True), floor)[:, None]  # (4, 1)
        kept = tl.zeros((4, BLOCK), tl.float32)
        weight = tl.load(weights + n)[None, :]
        for start in range(0, W, BLOCK):
            ahead = tl.load(weights + n + start + BLOCK, mask=n + start + BLOCK < W, other=0.0)[None, :]
            kept += tl.where(weight >= least, 1.0 if COUNT else weight, 0.0)
            weight = ahead
        low += tl.maximum(tl.sum((tl.sum(kept, 1) >= want).to(tl.int32)) - 1, 0) * width
    return tl.maximum(low.to(tl.float32, bitcast=True), floor)
