"""Linear layers for decoding, where every token reads every weight and does little with it: bandwidth is the limit.

On a CPU torch's own product of one row reads at half the speed of the memory (MKL's works on one core), and that of a few
rows is slower still; oneDNN's, with its weights in blocks, reads at some three quarters of it. (The kernels of `few`, where
numba is installed, read at nearly all of it for one row, and want the weights as they are.) With int8 weights there is a
quarter to read.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt2cli import device
from gpt2cli.errors import UserError
from gpt2cli.model import GPT
from gpt2cli.product import FEW_INT8, few_rows, has_onednn, onednn

# Large tensors in pages of 2 MB: fewer of them to look up, and the memory is read at more of its speed. torch looks when it
# first allocates. Training gains nothing by it, and would need a tenth more memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

MANY = 1024  # rows that a layout is asked for at the most: oneDNN fails where they are too many for it
FEW = 64  # rows up to which the int8 product is faster than one with fp32 weights made of them


def prepare(model: GPT, quantize: str | None = None, rows: int = 1) -> GPT:
    """Put `model`'s linear layers, the output layer too, into the form that decodes `rows` at a time fastest where it is: the
    numbers are the same but for rounding. With `quantize="int8"` weights become int8, see `Int8Linear`; for many rows on a CPU
    they are rounded as they would be, and kept in fp32, in which products of many rows are faster. For generating only: no
    weight has a gradient any more.

    Changes `model`, and returns it. Raises UserError for another `quantize`, and where the device has no int8 product.
    """
    if quantize not in (None, "int8"):
        raise UserError(f"--quantize {quantize} is unknown; expected int8")
    weight = model.requires_grad_(False).wpe.weight
    packs = weight.device.type == "cpu" and weight.dtype == torch.float32 and has_onednn()
    if quantize is None and not packs:
        return model
    few = few_for(model, rows, int8=quantize is not None)  # found out now, not when tokens are awaited
    if quantize is None and few:
        return model  # whose weights are read as they are

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        if quantize and not (packs and rows > FEW_INT8):
            return Int8Linear(weight, bias)
        return PackedLinear(min(rows, MANY), rounded(weight) if quantize else weight, bias)

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, make(child.weight.detach(), None if child.bias is None else child.bias.detach()))
    vars(model)["head"] = make(model.head_weight.detach(), None)  # in place of the method
    return model


def few_for(model: GPT, rows: int, int8: bool = False) -> ModuleType | None:
    """`few`, where its kernels do what `model` does, and are of use. `int8` if that is what its layers are going to be."""
    few = _few() if few_rows(rows, int8 or isinstance(vars(model).get("head"), Int8Linear)) else None
    return few if few and few.suits(model) else None


@cache
def _few() -> ModuleType | None:
    """The kernels, made: that takes seconds, once on a machine. None where numba, an extra, does not work."""
    try:
        from gpt2cli import few

        few.try_out()
    except Exception as error:  # of another numpy than it knows, of a cache that is broken or cannot be written, ...
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        warnings.warn(f"numba does not work here, so decoding is slower: {reason}", stacklevel=3)
        return None
    return few


def place(model: GPT, device_name: str, dtype: str, quantize: str | None = None, rows: int = 1) -> GPT:
    """`model` on a device in a dtype, `prepare`d. `auto` is bf16 on CUDA where it has it, and fp32 elsewhere: on a CPU only
    fp32 gives what other programs give, and int8 is faster than bf16."""
    where = device.pick_device(device_name)
    if dtype == "auto" and where.type != "cuda":
        dtype = "fp32"
    device.set_up(seed=0)
    return prepare(model.to(where, device.DTYPES[device.pick_dtype(dtype, where)]), quantize, rows)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> (out, in) in int8 and (out) in bf16: each output's weights (a row) as whole multiples of 1/127 of the
    largest of them."""
    scale = (weight.float().abs().amax(dim=1).clamp(min=1e-20) / 127).bfloat16()
    steps = weight.float() / scale.float()[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def rounded(weight: Tensor) -> Tensor:
    """The weight that int8 stands for, in fp32."""
    steps, scale = to_int8(weight)
    return steps * scale.float()[:, None]


class PackedLinear(nn.Module):
    """`F.linear` through oneDNN, with a copy of the weight in the blocked layout that suits `rows` best."""

    def __init__(self, rows: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return onednn(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """Weight-only int8, see `to_int8`. x stays as it is but for a rounding to bf16, in which the product is made. (The
    kernels of `few` make it in fp32.)

    A row of x is computed without regard to the others: no scale is taken over them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.scale = to_int8(weight)  # (out, in), (out)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        if len(rows) > FEW:
            return F.linear(x, self.weight * self.scale.to(x.dtype)[:, None], self.bias)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).view(*x.shape[:-1], -1)  # (..., out), bf16
        return (y if self.bias is None else y + self.bias).to(x.dtype)
