"""`x @ W.T`, and what its backward pass multiplies, by the fastest library at hand.

In fp32 on a CPU torch asks MKL, where oneDNN, which is in torch as well, was 1.0 to 1.6 times as fast on an AMD machine at the
shapes of training. Of the three products of a linear layer that holds for the output and for the gradient of x; that of the
weight stays with MKL, which is a tenth faster there.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LARGE = 1 << 17  # weights; with fewer a call of oneDNN takes longer than it saves
FEW, FEW_INT8 = 4, 8  # rows up to which the kernels of `few` are faster than a library's, with fp32 weights and with int8


class Linear(nn.Linear):
    """`nn.Linear`, by whoever multiplies faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if suits_onednn(x, self.weight):
            return _OneDNNLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def has_onednn() -> bool:
    """Whether this torch has oneDNN's linear operator, which its compiler uses, too."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn(x, weight)` is possible and worth it. Not where torch's compiler reads the code, which has its own
    choice, or autocast is to choose a dtype."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= LARGE
        and has_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` by oneDNN: x (..., in), weight (out, in), which may be a transposed view. Autograd does not
    see it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def few_rows(rows: int, int8: bool) -> bool:
    """Whether so many rows of one token each are for the kernels of `few`, whose compiler is there. They were tried on Linux
    only."""
    return rows <= (FEW_INT8 if int8 else FEW) and sys.platform == "linux" and find_spec("numba") is not None


def times(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of (n, m, k) and (n, k, l), without gradients, by whoever multiplies faster."""
    if suits_onednn(a[0], b[0]):
        products = [onednn(left, right.t()) for left, right in zip(a, b, strict=True)]
        return torch.stack(products) if len(products) > 1 else products[0][None]
    # A single one by `mm`, which takes a transposed factor as it is, where `bmm` copies it in bf16.
    return a @ b if len(a) > 1 else (a[0] @ b[0])[None]


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad_outputs[0].flatten(0, -2)  # (N, out)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            onednn(grad_outputs[0], weight.t()) if need_x else None,
            rows.t() @ x.flatten(0, -2) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )
