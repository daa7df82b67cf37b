"""One more token of each row on a GPU, with kernels of our own, written in Triton.

Through torch a token is some 14 small kernels a layer, each with a beginning and an end. Here they are five for a few rows:
LayerNorm, product, bias, activation and residual are one kernel, and so are the cache and the attention, which reads what a row
holds and no more. With more rows than `FEW` the products are a library's.

Where the GPU can (compute capability 9 and up), a kernel begins before the one that it follows has ended: it asks for its
weights, and then waits for what that one makes (CUDA's programmatic dependent launch). What the memory takes to answer is then
hidden.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpt2cli import trial
from gpt2cli.cache import KVCache
from gpt2cli.kernels import GPU, compile_all
from gpt2cli.linear import Int8Linear
from gpt2cli.loss import multiple
from gpt2cli.model import GPT, Block

FEW = 4  # rows
NUMBERS = 16384  # products that a program makes, where that is enough for an output
PER_THREAD = 128  # of them
AT_ONCE = 4  # programs on a processor
SHORT = 512  # tokens
WIDEST = 8192  # n_embd and n_inner: a program reads all weights of an output at once
# How far apart logits may be beside their own rounding, in their deviations. The model's products in fp32 may be of TF32.
CLOSE = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.05}


class Fused:
    """Steps of the first rows of `cache`: the numbers are the model's but for rounding. The buffers stay where they are, as a
    CUDA graph wants it."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        C, like, rows = model.config.n_embd, model.wpe.weight, cache.k.shape[1]
        self._model, self._cache = model, cache
        self._x = like.new_zeros(rows, C, dtype=torch.float32)  # the residual stream
        self._qkv, self._y = like.new_zeros(rows, 3 * C), like.new_zeros(rows, C)
        self._inner = like.new_zeros(rows, model.config.inner_size)
        self._blocks = cast("Sequence[Block]", model.h)
        tanh = model.config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        self._tanh = like.is_cuda and tanh and not isinstance(self._blocks[0].mlp.c_fc, Int8Linear)
        self._head = vars(model).get("head", SimpleNamespace(weight=model.head_weight))  # `prepare` makes it a layer
        if rows > FEW and not isinstance(self._head, Int8Linear):  # with rows of zeros behind
            weight, more = self._head.weight, -len(self._head.weight) % multiple(like.device.type)
            self._wide = F.pad(weight, (0, 0, 0, more)) if more else weight
        self._gpu = GPU(like.device)

    def step(self, ids: Tensor, logits: Tensor) -> None:
        """Write into `logits` (B, V) those of the tokens after `ids` (B), which enter the cache at `cache.at` and are counted
        there. There may be columns behind, of no use: a GPU's products want an even number of outputs."""
        with torch.cuda.device_of(ids):
            self._embed(ids)
            (self._few if len(ids) <= FEW else self._many)(len(ids), logits)

    def _embed(self, ids: Tensor) -> None:
        C, wte, wpe = self._model.config.n_embd, self._model.wte.weight, self._model.wpe.weight
        self._gpu.launch(_embed, (len(ids),), ids, self._cache.at, wte, wpe, self._x, C, triton.next_power_of_2(C))

    def _few(self, B: int, logits: Tensor) -> None:
        x, qkv, y, inner = (buffer[:B] for buffer in (self._x, self._qkv, self._y, self._inner))
        for layer, block in enumerate(self._blocks):
            attn, mlp = block.attn, block.mlp
            self._linear(x, attn.c_attn, qkv, norm=block.ln_1)
            self._attend(layer, qkv, y)
            self._linear(y, attn.c_proj, x, add=True)
            self._linear(x, mlp.c_fc, inner, norm=block.ln_2, activation=self._model.config.activation_function)
            self._linear(inner, mlp.c_proj, x, add=True)
        self._linear(x, self._head, logits, norm=self._model.ln_f)

    def _many(self, B: int, logits: Tensor) -> None:
        y: Tensor | None = None
        for layer, block in enumerate(self._blocks):
            attn, mlp = block.attn, block.mlp
            qkv = attn.c_attn(self._norm(B, y, block.ln_1))
            y = attn.c_proj(self._attend(layer, qkv, self._y[:B]))
            x, fc = self._norm(B, y, block.ln_2), mlp.c_fc
            # One of the library's products has GELU in it.
            inner = torch._addmm_activation(fc.bias, x, fc.weight.T, use_gelu=True) if self._tanh else mlp.activation(fc(x))
            y = mlp.c_proj(inner)
        last = self._norm(B, y, self._model.ln_f)
        if isinstance(self._head, Int8Linear):
            logits[:, : len(self._head.weight)] = self._head(last)
            return
        torch.mm(last, self._wide.T, out=logits)

    # ==== the kernels, with what they need to know ====

    def _linear(
        self, x: Tensor, layer: Any, out: Tensor, norm: nn.LayerNorm | None = None, activation: str = "", add: bool = False
    ) -> None:
        """out = layer(x), or with `add` out += layer(x); x (B, K) through `norm` first, then the `activation`. The layer is an
        `nn.Linear` or a `linear.Int8Linear`."""
        weight, scale = layer.weight, layer.scale if isinstance(layer, Int8Linear) else None
        bias = None if layer is self._head else layer.bias
        B, (N, K), sizes = len(x), weight.shape, blocks(*weight.shape)
        programs = triton.cdiv(N, sizes["BLOCK_N"])
        ln = (norm.weight, norm.bias, norm.eps) if norm is not None else (None, None, 0.0)
        first = add and programs <= AT_ONCE * self._gpu.processors
        told = x, weight, scale, bias, *ln, out, out.stride(0), N, K, B, activation, add
        self._gpu.launch(_linear, (programs,), *told, **sizes, FIRST=first)

    def _norm(self, B: int, y: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        """norm(x), where `y` has been added to x."""
        C = self._model.config.n_embd
        told = self._x, y, norm.weight, norm.bias, norm.eps, self._y, C, triton.next_power_of_2(C)
        self._gpu.launch(_norm, (B,), *told)
        return self._y[:B]

    def _attend(self, layer: int, qkv: Tensor, y: Tensor) -> Tensor:
        config, cache, scale = self._model.config, self._cache, self._blocks[layer].attn.scale
        told = qkv, cache.k[layer], cache.v[layer], cache.at, y, scale, cache.size, config.n_embd, config.head_size
        self._gpu.launch(_attend, (config.n_head, len(qkv)), *told, **self._looks(len(qkv)))
        return y

    def _looks(self, B: int) -> dict[str, int]:
        config = self._model.config
        return looks(config.n_head * B, triton.next_power_of_2(config.head_size), self._cache.size, self._gpu.processors)

    # ==== whether they are right ====

    def verdict(self, B: int) -> bool | None:
        """Whether steps of B rows of such a model are right; None where that is not known yet."""
        return trial.verdicts.get(self._kind(B))

    def judge(self, ids: Tensor, logits: Tensor) -> None:
        """Do a step that the model has just done, and find whether the `logits` are the same. If so they become those of here,
        so that all steps are made alike; if not, it is said why."""
        ours, V = torch.empty_like(logits), self._model.config.vocab_size

        def fault() -> str | None:
            compile_all(lambda: self.step(ids, ours))
            self.step(ids, ours)
            theirs = logits[:, :V].float()
            apart = ours[:, :V].float() - theirs
            apart -= apart.mean(dim=-1, keepdim=True)  # which no softmax sees
            deviation = theirs.std(dim=-1).mean()
            far = float(apart.square().mean().sqrt() / deviation)
            rounding = float(theirs.abs().max() / deviation) * torch.finfo(logits.dtype).eps
            return None if far <= CLOSE[logits.dtype] + rounding else f"their logits are {far:.2g} deviations off the model's"

        if trial.passed(self._kind(len(ids)), fault, "decoding"):
            logits.copy_(ours)

    def _kind(self, B: int) -> Hashable:
        how = self._qkv.dtype, type(self._blocks[0].attn.c_attn), self._looks(B)["TOKENS"]
        return self._model.config, self._x.device, *how, B


def suits(model: GPT) -> bool:
    """Whether there are kernels for it: on CUDA, with weights in the dtype of the products."""
    like, config = model.wpe.weight, model.config
    right = like.is_cuda and like.dtype in CLOSE and not torch.is_autocast_enabled("cuda")
    return right and max(config.n_embd, config.inner_size) <= WIDEST


@cache
def blocks(N: int, K: int) -> dict[str, int]:
    """How many outputs of a product a program makes, reading all K weights of each at once, and how many threads it has."""
    block_k = triton.next_power_of_2(K)
    block_n = max(1, min(8 if N > 2048 else 4, NUMBERS // block_k))
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": max(4, block_n * block_k // (32 * PER_THREAD))}


@cache
def looks(programs: int, head: int, size: int, processors: int) -> dict[str, int]:
    """The sizes of `_attend`: how many tokens of `size` it looks at at once, with `head` numbers each, more where there are not
    enough programs to keep the GPU busy."""
    tokens = 16 if programs >= 2 * processors else 64 if size <= SHORT else 128
    tokens = max(16, tokens * 64 // head)
    return {"BLOCK": head, "TOKENS": tokens, "num_warps": max(1, min(8, tokens * head // 1024))}


@triton.jit
def _embed(ids, at, wte, wpe, x, C: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[b] = wte[ids[b]] + wpe[at[b]], and at[b] += 1; a program a row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    b, c = tl.program_id(0), tl.arange(0, BLOCK)
    token, place = tl.load(ids + b), tl.load(at + b)
    embedded = tl.load(wte + token * C + c, mask=c < C).to(tl.float32) + tl.load(wpe + place * C + c, mask=c < C).to(tl.float32)
    tl.store(x + b * C + c, embedded, mask=c < C)
    tl.debug_barrier()  # all have read it
    tl.store(at + b, place + 1)


@triton.jit
def _normalized(row, pivot, k, gain, shift, eps, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """LayerNorm of a row of K numbers, behind which there are zeros. Their mean and variance are found at once, from any of the
    numbers, `pivot`, on: a variance from zero on would be a small difference of large numbers where the mean is large."""
    moved = tl.where(k < K, row - pivot, 0.0)
    mean, square = tl.reduce((moved, moved * moved), 0, _sums)
    mean /= K
    return (moved - mean) * tl.rsqrt(square / K - mean * mean + eps) * gain.to(tl.float32) + shift.to(tl.float32)


@triton.jit
def _sums(a, b, c, d):  # type: ignore[no-untyped-def]
    return a + c, b + d


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
    stride,
    N,
    K: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x (B, K) -> out (B, N), a program for BLOCK_N of the outputs. The memory is what takes long, so all is asked for before
    anything is done with it, and the weights before there is an x."""
    if EARLY and FIRST:  # before all else the next kernel begins: where they are few, there is room for its programs
        gdc_launch_dependents()
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    if ln_weight is not None:
        gain = tl.load(ln_weight + k, mask=k < K, other=0.0)
        shift = tl.load(ln_bias + k, mask=k < K, other=0.0)
    if scale is not None:
        unit = tl.load(scale + n, mask=n < N, other=0.0)
    if bias is not None:
        offset = tl.load(bias + n, mask=n < N, other=0.0)
    if EARLY:
        gdc_wait()
        if not FIRST:
            gdc_launch_dependents()
    for b in tl.static_range(B):
        row = tl.load(x + b * K + k, mask=k < K, other=0.0).to(tl.float32)
        if ADD:
            before = tl.load(out + b * stride + n, mask=n < N, other=0.0).to(tl.float32)
        if ln_weight is not None:
            row = _normalized(row, tl.load(x + b * K).to(tl.float32), k, gain, shift, eps, K)
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
        tl.store(out + b * stride + n, y, mask=n < N)


@triton.jit
def _norm(x, y, ln_weight, ln_bias, eps, out, C: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """x (B, C) += y, unless that is None; out = LayerNorm(x). A program a row."""
    b, c = tl.program_id(0), tl.arange(0, BLOCK)
    gain = tl.load(ln_weight + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(ln_bias + c, mask=c < C, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, pivot = tl.load(x + b * C + c, mask=c < C, other=0.0), tl.load(x + b * C)
    if y is not None:
        row += tl.load(y + b * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + b * C + c, _normalized(row, pivot, c, gain, shift, eps, C), mask=c < C)
    if y is not None:  # only now, for its sums were waited for: before, there may be threads that have not yet read the pivot
        tl.store(x + b * C + c, row, mask=c < C)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    qkv,
    k_held,
    v_held,
    at,
    y,
    scale,
    size,
    C,
    HS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The new tokens' (B, 3C) keys and values enter the cache's (B, nh, size, HS), and their queries see all of it: y (B, C).
    A program for a head of a row; the softmax is made on the way (Milakov and Gimelshein 2018)."""
    head, b = tl.program_id(0), tl.program_id(1)
    h, s = tl.arange(0, BLOCK), tl.arange(0, TOKENS)
    if EARLY:
        gdc_launch_dependents()
    held = tl.load(at + b, cache_modifier=".cg") - 1  # not counting the new ones
    row = (b.to(tl.int64) * tl.num_programs(0) + head) * size * HS
    k, v = _held(k_held, row, s, held, h, HS), _held(v_held, row, s, held, h, HS)  # of steps before
    if EARLY:
        gdc_wait()
    new = qkv + b * 3 * C + head * HS + h
    q = tl.load(new, mask=h < HS, other=0.0).to(tl.float32) * (scale * 1.4426950408889634)  # so that exp2 is exp
    k_new = tl.load(new + C, mask=h < HS, other=0.0)
    v_new = tl.load(new + 2 * C, mask=h < HS, other=0.0)
    tl.store(k_held + row + held * HS + h, k_new, mask=h < HS)
    tl.store(v_held + row + held * HS + h, v_new, mask=h < HS)

    # Each of the TOKENS places has a softmax of its own, so that no thread waits for another on the way. The first one's begins
    # with the new token.
    top = tl.where(s == 0, tl.sum(q * k_new.to(tl.float32)), -1e30)
    total = tl.where(s == 0, 1.0, 0.0)
    mixed = total[:, None] * v_new.to(tl.float32)[None, :]
    for start in range(0, held, TOKENS):
        ahead = start + TOKENS + s
        k_ahead, v_ahead = _held(k_held, row, ahead, held, h, HS), _held(v_held, row, ahead, held, h, HS)
        scores = tl.where(start + s < held, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        higher = tl.maximum(top, scores)
        shrink, weights = tl.exp2(top - higher), tl.exp2(scores - higher)
        total = total * shrink + weights
        mixed = mixed * shrink[:, None] + weights[:, None] * v.to(tl.float32)
        top, k, v = higher, k_ahead, v_ahead
    weights = tl.exp2(top - tl.max(top))
    seen = tl.sum(mixed * weights[:, None], 0) / tl.sum(total * weights)
    tl.store(y + b * C + head * HS + h, seen, mask=h < HS)


@triton.jit
def _held(held, row, s, count, h, HS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys or values of the tokens `s`, (TOKENS, BLOCK)."""
    return tl.load(held + row + s[:, None] * HS + h[None, :], mask=(s < count)[:, None] & (h < HS)[None, :], other=0.0)
