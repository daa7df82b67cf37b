"""One more token of each row on a GPU, with kernels of our own, written in Triton.

Through torch a token is some 14 small kernels a layer, each with a beginning and an end. Here they are five for a few rows:
LayerNorm, product, bias, activation and residual are one kernel, and so are the cache and the attention, which reads what a row
holds and no more. With more rows than `FEW` the products are a library's. What it gains has not been measured: it has not yet
run on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from gpt2cli.cache import KVCache
from gpt2cli.config import SamplingConfig
from gpt2cli.model import ACTIVATIONS, GPT, Block
from gpt2cli.sampling import choose

FEW = 4  # rows
WIDEST = 8192  # n_embd and n_inner: a program reads all weights of an output at once
NUMBERS = 8192  # products that a program makes, where that is enough for an output
PER_THREAD = 64  # of them
LOOK = 4096  # logits at once
# How far apart logits may be beside their own rounding, in their deviations. The model's products in fp32 may be of TF32.
CLOSE = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.05}


class Fused:
    """Steps of the first rows of `cache`: the numbers are the model's but for rounding. The buffers stay where they are, as a
    CUDA graph wants it."""

    verdicts: ClassVar[dict[Hashable, bool]] = {}  # once in a process is enough

    def __init__(self, model: GPT, cache: KVCache) -> None:
        C, like, rows = model.config.n_embd, model.wpe.weight, cache.k.shape[1]
        self._model, self._cache = model, cache
        self._x = like.new_zeros(rows, C, dtype=torch.float32)  # the residual stream
        self._qkv, self._y = like.new_zeros(rows, 3 * C), like.new_zeros(rows, C)
        self._inner = like.new_zeros(rows, model.config.inner_size)
        self._blocks = cast("Sequence[Block]", model.h)
        self._head = vars(model).get("head", SimpleNamespace(weight=model.head_weight))  # `prepare` makes it a layer

    def step(self, ids: Tensor, logits: Tensor) -> None:
        """Write into `logits` (B, V) those of the tokens after `ids` (B), which enter the cache at `cache.at`."""
        with torch.cuda.device_of(ids):
            self._step(ids, logits)

    def _step(self, ids: Tensor, logits: Tensor) -> None:
        config, B, at = self._model.config, len(ids), self._cache.at
        x, qkv, y, inner = (buffer[:B] for buffer in (self._x, self._qkv, self._y, self._inner))
        C, hs = config.n_embd, config.head_size
        whole, head = triton.next_power_of_2(C), triton.next_power_of_2(hs)
        many = min(256, max(16, 2 * NUMBERS // head))  # tokens to see at once
        layer = _few if B <= FEW else _many
        _embed[(B,)](ids, at, self._model.wte.weight, self._model.wpe.weight, x, C, whole)
        for block, k, v in zip(self._blocks, self._cache.k, self._cache.v, strict=True):
            attn, mlp, heads = block.attn, block.mlp, (config.n_head, B)
            qkv = layer(x, attn.c_attn, qkv, norm=block.ln_1)
            _attend[heads](qkv, k, v, at, y, attn.scale, self._cache.size, C, hs, head, many, num_warps=8)
            layer(y, attn.c_proj, x, add=True)
            inner = layer(x, mlp.c_fc, inner, norm=block.ln_2, activation=config.activation_function)
            layer(inner, mlp.c_proj, x, add=True)
        if B > FEW:
            logits.copy_(self._model.head(self._model.ln_f(x.to(logits.dtype))))
        else:
            _few(x, self._head, logits, norm=self._model.ln_f)

    def verdict(self, B: int) -> bool | None:
        """Whether steps of B rows of such a model are right; None where that is not known yet."""
        return Fused.verdicts.get(self._kind(B))

    def judge(self, ids: Tensor, logits: Tensor) -> None:
        """Do a step that the model has just done, and find whether the `logits` are the same. If so they become those of here,
        so that all steps are made alike; if not, it is said why."""
        ours = torch.empty_like(logits)

        def fault() -> str | None:
            self.step(ids, ours)
            theirs = logits.float()
            apart = ours.float() - theirs
            apart -= apart.mean(dim=-1, keepdim=True)  # which no softmax sees
            deviation = theirs.std(dim=-1).mean()
            far = float(apart.square().mean().sqrt() / deviation)
            rounding = float(theirs.abs().max() / deviation) * torch.finfo(logits.dtype).eps
            return None if far <= CLOSE[logits.dtype] + rounding else f"their logits are {far:.2g} deviations off the model's"

        if _judge(self._kind(len(ids)), fault):
            logits.copy_(ours)

    def drawing(self, config: SamplingConfig, V: int) -> Callable[[Tensor, SamplingConfig, Tensor], Tensor]:
        """`draw`, or `sampling.choose` where that does not choose the same of V ids, or is the faster one."""
        kind, device = ("draw", V, config.top_k, config.top_p, self._x.device), self._x.device

        def fault() -> str | None:
            places = torch.randperm(V, generator=torch.Generator().manual_seed(0)).to(device)
            logits = -0.1 * config.temperature * places.float().expand(16, V)  # each a tenth less likely than the one before
            uniform = (torch.arange(16, device=device) + 0.5) / 16
            same = torch.equal(draw(logits, config, uniform), choose(logits, config, uniform))
            return None if same else "they draw other tokens than torch's"

        if config.greedy or not (Fused.verdicts[kind] if kind in Fused.verdicts else _judge(kind, fault)):
            return choose
        return draw

    def _kind(self, B: int) -> Hashable:
        return self._model.config, self._x.device, self._qkv.dtype, type(self._blocks[0].attn.c_attn), B


def _judge(kind: Hashable, fault: Callable[[], str | None]) -> bool:
    """Whether there is none; otherwise it is told, once."""
    try:
        reason = fault()
    except Exception as error:  # a compiler raises what it likes
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:200]}"
    if reason is not None:
        warnings.warn(f"the fused kernels do not work here, so decoding is slower: {reason}", stacklevel=3)
    Fused.verdicts[kind] = reason is None
    return reason is None


def suits(model: GPT) -> bool:
    """Whether there are kernels for it: on CUDA, with weights in the dtype of the products."""
    like, config = model.wpe.weight, model.config
    right = like.is_cuda and like.dtype in CLOSE and not torch.is_autocast_enabled("cuda")
    return right and max(config.n_embd, config.inner_size) <= WIDEST


def draw(logits: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """What `sampling.choose` does, in one kernel and without sorting; ids that are exactly as likely are kept together."""
    B, V = logits.shape
    logits, drawn = logits.contiguous(), torch.empty(B, dtype=torch.int64, device=logits.device)
    block = min(LOOK, triton.next_power_of_2(V))
    weights = torch.empty(B, triton.cdiv(V, block) * block, device=logits.device)  # in whole blocks, read without masks
    top_k = None if config.top_k is None else float(min(config.top_k, V))
    top_p = None if config.top_p is None or config.top_p >= 1 else config.top_p
    with torch.cuda.device_of(logits):
        _draw[(B,)](
            logits, weights, uniform, drawn, V, config.temperature, top_k, top_p, config.min_p or 0.0, block, num_warps=16
        )
    return drawn


def _many(
    x: Tensor, layer: Any, out: Tensor, norm: nn.LayerNorm | None = None, activation: str = "", add: bool = False
) -> Tensor:
    """layer(x), or with `add` out += layer(x); x (B, K) through `norm` first, then the `activation`."""
    y = layer(x if norm is None else norm(x.to(norm.weight.dtype)))
    y = ACTIVATIONS[activation](y) if activation else y
    return out.add_(y) if add else y


def _few(
    x: Tensor, layer: Any, out: Tensor, norm: nn.LayerNorm | None = None, activation: str = "", add: bool = False
) -> Tensor:
    """What `_many` does, in one kernel and in the memory of `out`. The layer is an `nn.Linear` or a `linear.Int8Linear`."""
    weight, scale, bias = layer.weight, getattr(layer, "scale", None), getattr(layer, "bias", None)
    B, (N, K) = len(x), weight.shape
    sizes = blocks(N, K)
    ln = (norm.weight, norm.bias, norm.eps) if norm is not None else (None, None, 0.0)
    _linear[(triton.cdiv(N, sizes["BLOCK_N"]),)](x, weight, scale, bias, *ln, out, N, K, B, activation, add, **sizes)
    return out


def blocks(N: int, K: int) -> dict[str, int]:
    """How many outputs of a product a program makes, reading all K weights of each at once, and how many threads it has."""
    block_k = triton.next_power_of_2(K)
    block_n = max(1, min(8 if N > 2048 else 4, NUMBERS // block_k))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": max(4, block_n * block_k // (32 * PER_THREAD))}


@triton.jit
def _embed(ids, at, wte, wpe, x, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[b] = wte[ids[b]] + wpe[at[b]]; a program a row."""
    b, c = tl.program_id(0), tl.arange(0, BLOCK)
    token, place = tl.load(ids + b), tl.load(at + b)
    embedded = tl.load(wte + token * C + c, mask=c < C).to(tl.float32) + tl.load(wpe + place * C + c, mask=c < C).to(tl.float32)
    tl.store(x + b * C + c, embedded, mask=c < C)


@triton.jit
def _linear(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    bias,
    ln_weight,
    ln_bias,
    eps,
    out,
    N,
    K: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x (B, K) -> out (B, N), a program for BLOCK_N of the outputs. All is asked for before anything is done with it, for the
    memory is what takes long."""
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    if ln_weight is not None:
        gain = tl.load(ln_weight + k, mask=k < K, other=0.0).to(tl.float32)
        shift = tl.load(ln_bias + k, mask=k < K, other=0.0).to(tl.float32)
    if scale is not None:
        unit = tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    for b in tl.static_range(B):
        row = tl.load(x + b * K + k, mask=k < K, other=0.0).to(tl.float32)
        if ADD:
            before = tl.load(out + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        if ln_weight is not None:
            centered = tl.where(k < K, row - tl.sum(row) / K, 0.0)
            row = centered / tl.sqrt(tl.sum(centered * centered) / K + eps) * gain + shift
        y = tl.sum(row[None, :] * w.to(tl.float32), 1)  # (BLOCK_N)
        if scale is not None:
            y *= unit
        if bias is not None:
            y += offset
        if ACTIVATION == "gelu":
            y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
        elif ACTIVATION == "relu":
            y = tl.maximum(y, 0.0)
        elif ACTIVATION == "silu":
            y = y * tl.sigmoid(y)
        elif ACTIVATION != "":  # the tanh approximation; (1 + tanh(z)) / 2 is sigmoid(2 z)
            y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        if ADD:
            y += before
        tl.store(out + b * N + n, y, mask=n < N)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    qkv, k_held, v_held, at, y, scale, size, C, HS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr
):
    """The new tokens' (B, 3C) keys and values enter the cache's (B, nh, size, HS), and their queries see all of it: y (B, C).
    A program for a head of a row; the softmax is made on the way (Milakov and Gimelshein 2018)."""
    head, b = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, BLOCK)
    new = qkv + b * 3 * C + head * HS + h
    q = tl.load(new, mask=h < HS, other=0.0).to(tl.float32) * scale
    k_new = tl.load(new + C, mask=h < HS, other=0.0)
    v_new = tl.load(new + 2 * C, mask=h < HS, other=0.0)
    held = tl.load(at + b)
    row = (b.to(tl.int64) * tl.num_programs(0) + head) * size * HS
    tl.store(k_held + row + held * HS + h, k_new, mask=h < HS)
    tl.store(v_held + row + held * HS + h, v_new, mask=h < HS)

    top, total, mixed = tl.sum(q * k_new.to(tl.float32)), 1.0, v_new.to(tl.float32)
    for start in range(0, held, TOKENS):
        s = start + tl.arange(0, TOKENS)
        place, there = row + s[:, None] * HS + h[None, :], (s < held)[:, None] & (h < HS)[None, :]
        k = tl.load(k_held + place, mask=there, other=0.0).to(tl.float32)  # (TOKENS, BLOCK)
        v = tl.load(v_held + place, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(s < held, tl.sum(q[None, :] * k, 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores))
        shrink, weights = tl.exp(top - higher), tl.exp(scores - higher)
        total = total * shrink + tl.sum(weights)
        mixed = mixed * shrink + tl.sum(weights[:, None] * v, 0)
        top = higher
    tl.store(y + b * C + head * HS + h, mixed / total, mask=h < HS)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits, weights, uniform, drawn, V, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr
):
    """A program a row of logits (B, V). Weights are probabilities over the likeliest one's. `top_k` and `top_p` may be None."""
    row, W = tl.program_id(0).to(tl.int64), tl.cdiv(V, BLOCK) * BLOCK
    logits += row * V
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
    found, last, before = V, 0, 0.0
    for start in range(0, W, BLOCK):
        n = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + n)
        weight = tl.where(weight >= least, weight, 0.0)
        cumulative = before + tl.cumsum(weight)
        found = tl.minimum(found, tl.min(tl.where((cumulative > target) & (weight > 0), n, V)))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, n, 0)))
        before = tl.max(cumulative)
    tl.store(drawn + row, tl.where(found < V, found, last))  # rounding may leave the target above the sum


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
    to 1, and the bits of such numbers are in the order of their sizes, so that bisecting these finds it exactly."""
    low, high = tl.full((), 0, tl.int32), tl.full((), 0x3F800001, tl.int32)
    for _ in range(30):
        middle = (low + high) // 2
        kept = _kept(weights, W, tl.maximum(middle.to(tl.float32, bitcast=True), floor), COUNT, BLOCK)
        low, high = tl.where(kept >= want, middle, low), tl.where(kept >= want, high, middle)
    return tl.maximum(low.to(tl.float32, bitcast=True), floor)
