"""One more token of a few rows on a CPU, with kernels of our own, which numba compiles for it (the extra `fast-sample`).

What takes long is reading the weights. torch has a kernel for each product, sum, LayerNorm and activation, which all threads
begin and end together, and its product of one row reads at some three quarters of the memory's speed. Here LayerNorm, product,
bias, activation and residual are one kernel, the cache and the attention are another, and a weight is read as it is kept: the
layers are the model's own, and int8 weights meet x in fp32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange
from numba.core import cgutils, entrypoints, types
from numba.extending import intrinsic
from numba.np.ufunc import omppool  # type: ignore[attr-defined]  # noqa: F401  # its threads, without which nothing is gained
from torch import Tensor, nn

from gpt2cli.cache import KVCache
from gpt2cli.model import GPT, MLP, Block, CausalSelfAttention
from gpt2cli.product import Linear

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")
if numba.config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
    numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]

AHEAD = 6144  # bytes of int8 weights that are asked for before they are needed: without it they came at two thirds of the speed
GELU_TANH, GELU, RELU, SILU, NONE = range(5)
ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu": GELU, "relu": RELU, "silu": SILU}
MOST = cast("int", numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # threads, one for each core
MODULES = {GPT, Block, CausalSelfAttention, MLP, Linear, nn.Embedding, nn.Dropout, nn.ModuleList}
ABSENT = np.empty(0, np.float32)
# Sums in any order, as every fast product has them; what is not a number stays that.
compiled = njit(parallel=True, nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})


class Few:
    """Steps of the first rows of `cache`: the numbers are the model's but for rounding."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        config = model.config
        self._config, self._cache = config, cache
        self._wte, self._wpe = _numbers(model.wte.weight), _numbers(model.wpe.weight)
        self._activation = ACTIVATIONS[config.activation_function]
        self._blocks = [_Block(block) for block in cast("Sequence[Block]", model.h)]
        self._ln_f, self._head = _norm(model.ln_f), _layer(vars(model).get("head", model.head_weight))
        self._k, self._v, self._at = _numbers(cache.k), _numbers(cache.v), cache.at.numpy()

    def step(self, ids: Tensor, logits: Tensor) -> None:
        """Write into `logits` (B, V) those of the tokens after `ids` (B), which enter the cache at `cache.at`."""
        n = min(torch.get_num_threads(), MOST)
        with _threads(n):
            self._step(ids, logits, n)

    def _step(self, ids: Tensor, logits: Tensor, n: int) -> None:
        B, config = len(ids), self._config
        at, eps = self._at[:B], config.layer_norm_epsilon
        x = self._wte[ids.numpy()] + self._wpe[at]  # (B, C), the residual stream
        qkv, y = np.empty((B, 3 * config.n_embd), np.float32), np.empty_like(x)
        inner = np.empty((B, config.inner_size), np.float32)
        for block, k, v in zip(self._blocks, self._k, self._v, strict=True):
            _linear(x, *block.ln_1, eps, *block.c_attn, NONE, False, qkv, n)
            _attend(qkv, k, v, at, block.scale, y, n)
            _linear(y, ABSENT, ABSENT, eps, *block.attn_c_proj, NONE, True, x, n)
            _linear(x, *block.ln_2, eps, *block.c_fc, self._activation, False, inner, n)
            _linear(inner, ABSENT, ABSENT, eps, *block.mlp_c_proj, NONE, True, x, n)
        _linear(x, *self._ln_f, eps, *self._head, NONE, False, logits.numpy(), n)


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """So many of numba's. It begins with all cores, and then sets torch's number as well."""
    torchs = torch.get_num_threads()
    before = numba.get_num_threads()
    numba.set_num_threads(n)
    if torch.get_num_threads() != torchs:
        torch.set_num_threads(torchs)
    try:
        yield
    finally:
        numba.set_num_threads(before)


class _Block:
    def __init__(self, block: Block) -> None:
        self.ln_1, self.ln_2, self.scale = _norm(block.ln_1), _norm(block.ln_2), np.float32(block.attn.scale)
        self.c_attn, self.attn_c_proj = _layer(block.attn.c_attn), _layer(block.attn.c_proj)
        self.c_fc, self.mlp_c_proj = _layer(block.mlp.c_fc), _layer(block.mlp.c_proj)


def _numbers(tensor: Tensor | None) -> Any:
    """The same memory, for numpy; what is not fp32 or int8 is copied."""
    if tensor is None:
        return ABSENT
    return (tensor.detach() if tensor.dtype == torch.int8 else tensor.detach().float()).numpy()


def _norm(norm: nn.LayerNorm) -> tuple[Any, Any]:
    return _numbers(norm.weight), _numbers(norm.bias)


def _layer(layer: Any) -> tuple[Any, Any, Any]:
    """Weight, scale and bias of an `nn.Linear`, a `linear.Int8Linear`, or a weight alone."""
    if isinstance(layer, Tensor):
        return _numbers(layer), ABSENT, ABSENT
    return _numbers(layer.weight), _numbers(getattr(layer, "scale", None)), _numbers(layer.bias)


@intrinsic
def _ask_for(context: Any, array: Any, n: Any) -> Any:
    """Have the processor fetch array[n] into its cache of the second level."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        data = cgutils.create_struct_proxy(array)(context, builder, value=arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [place, *(number(value) for value in (0, 2, 1))])  # to read; second level; data
        return context.get_dummy_value()

    return types.void(array, n), generate


@compiled
def _linear(x, gain, shift, eps, weight, scale, bias, activation, add, out, threads):  # type: ignore[no-untyped-def]
    """out (B, N) = activation(LayerNorm(x) W.T + bias), or with `add` out += that; x (B, K), W (N, K) times `scale` (N).
    What has no elements is left out."""
    B, (N, K) = len(x), weight.shape
    rows = x
    if len(gain):
        rows = np.empty_like(x)
        for b in range(B):
            mean, square = np.float32(0), np.float32(0)
            for k in range(K):
                mean += x[b, k]
            mean /= np.float32(K)
            for k in range(K):
                square += (x[b, k] - mean) * (x[b, k] - mean)
            narrow = np.float32(1 / math.sqrt(square / K + eps))
            for k in range(K):
                rows[b, k] = (x[b, k] - mean) * narrow * gain[k] + shift[k]
    flat = weight.reshape(N * K)
    for part in prange(threads):
        for n in range(N * part // threads, N * (part + 1) // threads):
            if weight.itemsize == 1:
                for k in range(0, K, 64):
                    _ask_for(flat, n * K + k + AHEAD)  # type: ignore[call-arg]
            for b in range(B):
                y = np.float32(0)
                for k in range(K):
                    y += np.float32(weight[n, k]) * rows[b, k]
                if len(scale):
                    y *= scale[n]
                if len(bias):
                    y += bias[n]
                if activation != NONE:
                    y = _activate(y, activation)
                out[b, n] = out[b, n] + y if add else y


@njit(cache=True)
def _activate(y, activation):  # type: ignore[no-untyped-def]
    if activation == RELU:
        return max(y, np.float32(0))
    if activation == GELU:
        return np.float32(0.5 * y * (1 + math.erf(y * 0.7071067811865476)))
    if activation == SILU:
        return y / (np.float32(1) + np.exp(-y))
    z = np.float32(1.5957691216057308) * (y + np.float32(0.044715) * y * y * y)
    return y / (np.float32(1) + np.exp(-z))  # the tanh approximation; (1 + tanh(z)) / 2 is sigmoid(2 z)


@compiled
def _attend(qkv, k_held, v_held, at, scale, y, threads):  # type: ignore[no-untyped-def]
    """The new tokens' (B, 3C) keys and values enter the cache's (B, nh, size, hs), whose first `at` are held; their queries see
    all of it: y (B, C)."""
    (B, C), (nh, _, hs) = y.shape, k_held.shape[1:]
    for part in prange(threads):
        for item in range(B * nh * part // threads, B * nh * (part + 1) // threads):
            b, head = item // nh, item % nh
            q, k, v = qkv[b, head * hs :], k_held[b, head], v_held[b, head]
            end = at[b] + 1
            for h in range(hs):
                k[end - 1, h], v[end - 1, h] = q[C + h], q[2 * C + h]
            weights, top = np.empty(end, np.float32), np.float32(-np.inf)
            for s in range(end):
                score = np.float32(0)
                for h in range(hs):
                    score += q[h] * k[s, h]
                weights[s] = score * scale
                top = max(top, weights[s])
            total, mixed = np.float32(0), y[b, head * hs : head * hs + hs]
            mixed[:] = 0
            for s in range(end):
                weight = np.exp(weights[s] - top)
                total += weight
                for h in range(hs):
                    mixed[h] += weight * v[s, h]
            for h in range(hs):
                mixed[h] /= total


def try_out() -> None:
    """Have numba make all kernels, or find what it made before; raises what it likes where it cannot."""
    x, y, numbers, n = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32), np.ones(2, np.float32), 1
    with _threads(n), _undisturbed():
        for weight in (np.ones((2, 2), np.float32), np.ones((2, 2), np.int8)):
            _linear(x, numbers, numbers, 1e-5, weight, numbers, numbers, GELU, True, y, n)
        held = np.zeros((1, 1, 2, 2), np.float32)
        _attend(np.ones((1, 6), np.float32), held, held.copy(), np.zeros(1, np.int64), np.float32(1), y, n)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without what other packages would add to numba: awkward, which gigatoken brings, is loaded for that for 0.2 s."""
    before = getattr(entrypoints, "_already_initialized", True)
    entrypoints._already_initialized = True
    try:
        yield
    finally:
        entrypoints._already_initialized = before


def suits(model: GPT) -> bool:
    """Whether its steps are what the kernels do: fp32 on a CPU, every layer there, and none replaced or listened to."""
    like, head = model.wpe.weight, vars(model).get("head")
    right = like.device.type == "cpu" and like.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    dropout = model.training and (model.config.dropout or model.config.attn_dropout)
    known = all(_is_known(module) for module in model.modules()) and (head is None or _is_int8(head))
    plain = all(type(p) is nn.Parameter and p.is_contiguous() and p.dtype == like.dtype for p in model.parameters())
    heard = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return right and known and plain and not (dropout or heard or forked)


def _is_known(module: nn.Module) -> bool:
    if type(module) is nn.LayerNorm:
        return module.weight is not None and module.bias is not None
    return type(module) in MODULES or _is_int8(module)


def _is_int8(module: Any) -> bool:
    return isinstance(getattr(module, "scale", None), Tensor)


def _after_fork() -> None:
    global forked
    forked = True


forked = False  # after numba's threads were started: in such a process GNU's OpenMP ends the program
os.register_at_fork(after_in_child=_after_fork)
