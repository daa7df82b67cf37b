"""The output layer and its cross entropy in one, in chunks of rows: the logits of a whole batch never exist.

With V = 50,257 the logits are most of a small model's memory. Here each chunk's logits become probabilities, these the
gradient of the logits, where they were, and that is multiplied out at once; backward has only to scale (the idea of Liger
Kernel's fused linear cross entropy, Hsu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2cli.product import onednn, suits_onednn

IGNORED = -100  # as `F.cross_entropy` has it
ROWS_IN_CACHE = 16  # of V logits in fp32: 3 MB with GPT-2's vocabulary
VOCABULARY_AT_ONCE = 8192  # rows of the weight's gradient; 2,048 to 16,384 were as fast


def rows_at_once(device_type: str, dtype: torch.dtype) -> int:
    """Rows of a chunk: fewer add passes over the weight's gradient, more add memory. On a CPU 256 of fp32 and 512 of bf16
    were as fast as any, on an H200 8,192."""
    return {"cpu": 1024 // dtype.itemsize, "cuda": 8192}.get(device_type, 2048)


def multiple(device_type: str) -> int:
    """What the rows of the weight are padded to a multiple of: a GPU's tensor cores want whole tiles, and V = 50,257 is odd."""
    return 64 if device_type == "cuda" else 1


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy(F.linear(x, weight).float(), targets)`: the mean in nats, of x (N, C), weight (V, C), targets (N), of
    which those of -100 count for nothing. Under autocast the products run in its dtype, the softmax in fp32."""
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    with torch.autocast(device_type, enabled=False):
        return _FusedCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, need_grad: bool) -> Tensor:
        more = -len(weight) % multiple(x.device.type)
        w = F.pad(weight.to(dtype), (0, 0, 0, more)) if more else weight.to(dtype)  # (V, C), V with what is padded
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x)  # (N, C)
        grad_w = weight.new_empty(len(w), x.shape[1]) if need_grad else None  # (V, C)
        fast, fused = suits_onednn(x, w), has_kernel(x.device, dtype)
        if fused:
            from gpt2cli import fused_loss
        size = rows_at_once(x.device.type, dtype)
        counts = targets != IGNORED  # (N)
        ids = targets.where(counts, 0)
        for start in range(0, len(x), size):
            a = x[start : start + size].to(dtype)  # (n, C)
            target, counted = ids[start : start + size, None], counts[start : start + size, None]  # (n, 1)
            logits = onednn(a, w) if fast else a @ w.T  # (n, V)
            if more:
                logits[:, -more:] = -torch.inf  # of no probability, and so without a gradient
            if fused:
                total += fused_loss.into_gradient(logits, target[:, 0], counted[:, 0], need_grad).sum()
            else:
                total += into_gradient(logits, target, counted, need_grad)
            if grad_w is not None:
                into_x = onednn(logits, w.t()) if fast else logits @ w
                grad_x[start : start + size] = into_x if fused else into_x * counted
                add_product(grad_w, logits.T, a if fused else a * counted, first=start == 0)
            del logits  # before the next ones
        ctx.count = counts.sum()
        ctx.gradients = grad_x, grad_w if grad_w is None else grad_w[: len(weight)]
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_w = ctx.gradients  # a second backward fails here, since the first one changes them in place
        ctx.gradients = None
        scale = grad_outputs[0] / ctx.count
        return grad_x.mul_(scale), grad_w.mul_(scale), None, None, None


def into_gradient(logits: Tensor, target: Tensor, counted: Tensor, need_grad: bool) -> Tensor:
    """The sum of the cross entropies of logits (n, V) and targets (n, 1) where they are `counted` (n, 1), with the softmax in
    fp32; where the logits were is then their gradient, but for the mean's 1 / N, or nothing of use where none is needed."""
    # On a CPU a few rows at a time, which stay in its caches until the last of this is done to them.
    rows = ROWS_IN_CACHE if logits.device.type == "cpu" and not torch.compiler.is_compiling() else len(logits)
    total = torch.zeros((), device=logits.device)
    for part, ids, mask in zip(logits.split(rows), target.split(rows), counted.split(rows), strict=True):
        top = part.amax(dim=1, keepdim=True).float()  # (n, 1)
        expected = part.gather(1, ids).float()  # (n, 1)
        p = probabilities(part)  # (n, V)
        # The log of the sum of exponentials, from the likeliest id's, since the target's probability may vanish.
        lse = top - p.amax(dim=1, keepdim=True).log()  # (n, 1)
        total += (lse - expected).where(mask, 0.0).sum()
        if need_grad:
            p.scatter_add_(1, ids, p.new_full(ids.shape, -1.0))
            if p is not part:
                part.copy_(p)
    return total


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `fused_loss` works for such logits: on a GPU. Triton comes with torch for CUDA, on Linux."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    try:
        from gpt2cli import fused_loss, trial
    except ImportError:
        return False

    return trial.passed(("loss", device, dtype), lambda: fault(fused_loss.into_gradient, device, dtype), "training")


def fault(kernel: Callable[[Tensor, Tensor, Tensor, bool], Tensor], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not to use what should be `fused_loss.into_gradient`, if there is a reason."""
    V = 8192 + 64  # as in training it is more than one look, and a multiple of 64
    x = 3 * torch.randn(5, V, device=device, generator=torch.Generator(device).manual_seed(0))
    ids, found = torch.arange(5, device=device), x.to(dtype, copy=True)  # which is overwritten
    exact, counted = x.to(dtype).float(), ids != 3
    losses = kernel(found, ids, counted, True)
    expected = F.cross_entropy(exact, ids, reduction="none") * counted
    gradient = (exact.softmax(dim=1) - F.one_hot(ids, V)) * counted[:, None]
    close = 1e-4 if dtype == torch.float32 else 0.01
    right = torch.allclose(losses, expected, atol=1e-4) and torch.allclose(found.float(), gradient, atol=close)
    return None if right else "its loss or its gradient is another than torch's"


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """`total += a @ b`, or `total = a @ b` the first time, of (V, n) and (n, C), which may be of lower precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
        return
    # Before 2.11 `total` has to be of the factors' dtype.
    if total.is_cuda and torch.__version__ >= "2.11" and not torch.compiler.is_compiling():
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
        return
    # On a CPU a few rows at a time: their product is in its caches when it is added, and nowhere else.
    rows = VOCABULARY_AT_ONCE if total.device.type == "cpu" else len(total)
    for part, factor in zip(total.split(rows), a.split(rows), strict=True):
        if first:
            part.copy_(factor @ b)
        else:
            part += factor @ b


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of each row (n, V) in fp32, on a CPU and CUDA in place where the logits are that already."""
    if logits.dtype != torch.float32 or logits.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return logits.softmax(dim=1, dtype=torch.float32)
    return torch.softmax(logits, dim=1, out=logits)


def tied(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A tied embedding (V, C) twice: to look ids up in, with a sparse gradient of these few rows, and as the output layer's
    weight, with a dense one. Its gradient is the former added to the latter, in place, where autograd would make a third."""
    return _Tied.apply(weight)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        rows, dense = grad_outputs
        return dense.add_(rows)
