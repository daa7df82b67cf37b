"""The output layer and its cross entropy in one, in chunks of rows: the logits of a whole batch never exist.

With V = 50,257 the logits are most of a small model's memory. Here each chunk's logits become probabilities, these the
gradient of the logits, and that is multiplied out at once; backward has only to scale (the idea of Liger Kernel's fused
linear cross entropy, Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2cli.product import onednn, suits_onednn


def rows_at_once(device_type: str, dtype: torch.dtype) -> int:
    """Rows of a chunk: fewer add passes over the weight's gradient, more add memory. On a CPU 256 of fp32 and 512 of bf16
    were as fast as any."""
    return 1024 // dtype.itemsize if device_type == "cpu" else 2048


def multiple(device_type: str) -> int:
    """What the rows of the weight are padded to a multiple of: a GPU's tensor cores want whole tiles, and V = 50,257 is odd."""
    return 64 if device_type == "cuda" else 1


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy(F.linear(x, weight).float(), targets)`: the mean in nats, of x (N, C), weight (V, C), targets (N).
    Under autocast the products run in its dtype, the softmax in fp32."""
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
        grad_w: Tensor | None = None  # (V, C)
        fast = suits_onednn(x, w)
        size = rows_at_once(x.device.type, dtype)
        for start in range(0, len(x), size):
            a = x[start : start + size].to(dtype)  # (n, C)
            target = targets[start : start + size, None]  # (n, 1)
            logits = onednn(a, w) if fast else a @ w.T  # (n, V)
            if more:
                logits[:, -more:] = -torch.inf  # of no probability, and so without a gradient
            top = logits.amax(dim=1, keepdim=True).float()  # (n, 1)
            expected = logits.gather(1, target).float()  # (n, 1)
            p = probabilities(logits)  # (n, V), where the logits were if they are fp32
            del logits
            # The log of the sum of exponentials, from the likeliest id's, since the target's probability may vanish.
            lse = top - p.amax(dim=1, keepdim=True).log()  # (n, 1)
            total += (lse - expected).sum()
            if need_grad:
                p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                grad = p.to(dtype)  # of the logits, but for the mean's 1 / N
                grad_x[start : start + size] = onednn(grad, w.t()) if fast else grad @ w
                if grad_w is None:
                    grad_w = (grad.T @ a).to(weight.dtype)
                elif grad_w.dtype == dtype:
                    grad_w.addmm_(grad.T, a)
                else:
                    grad_w += grad.T @ a
            del p  # before the next one
        ctx.gradients = grad_x, grad_w if grad_w is None else grad_w[: len(weight)]
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_w = ctx.gradients  # a second backward fails here, since the first one changes them in place
        ctx.gradients = None
        scale = grad_outputs[0] / len(grad_x)
        return grad_x.mul_(scale), grad_w.mul_(scale), None, None, None


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of each row (n, V) in fp32, on a CPU and CUDA in place where the logits are that already."""
    if logits.dtype != torch.float32 or logits.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return logits.softmax(dim=1, dtype=torch.float32)
    return torch.softmax(logits, dim=1, out=logits)
