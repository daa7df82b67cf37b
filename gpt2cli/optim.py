"""The optimizers, AdamW and Muon, their groups of parameters, and the learning rate over time."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from gpt2cli.config import CHOICES, TrainConfig
from gpt2cli.device import DTYPES, has_bf16
from gpt2cli.distributed import ALONE, Ranks, gathered, local_part, part_of
from gpt2cli.errors import UserError
from gpt2cli.model import GPT
from gpt2cli.product import times

BETAS = (0.9, 0.95)  # AdamW's, as GPT-3 (Brown et al. 2020, appendix B)
MOMENTUM = 0.95  # Muon's
NUMBERS = 1 << 24  # of the matrices that a GPU orthogonalizes at once
COEFFICIENTS = (  # a, b, c of a Newton-Schulz step a X + b A X + c A^2 X, A = X X^T
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def make_optimizers(model: GPT, name: str, weight_decay: float, dtype: str = "fp32", ranks: Ranks = ALONE) -> list[Optimizer]:
    """`adamw` for all parameters; or `muon` for the matrices inside the blocks, and AdamW for the rest. Matrices decay,
    biases and LayerNorms do not. Muon multiplies in bf16 where `dtype`, that of the model's products, is bf16, and the device
    has it. The learning rate is set at each step, see `planned_lr`."""
    if name not in CHOICES["optimizer"]:
        raise UserError(f"--optimizer {name} is unknown; expected {', '.join(CHOICES['optimizer'])}")
    hidden = {n: p for n, p in model.named_parameters() if name == "muon" and n.startswith("h.") and p.dim() == 2}
    rest = [p for n, p in model.named_parameters() if n not in hidden]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [AdamW(groups)]
    if hidden:
        qkv = [p for n, p in hidden.items() if n.endswith("attn.c_attn.weight")]
        whole = [p for n, p in hidden.items() if not n.endswith("attn.c_attn.weight")]
        # q, k and v are three matrices that happen to be stored as one.
        stored = ((qkv, 3), (whole, 1))
        muon_groups = [{"params": params, "parts": parts, "weight_decay": weight_decay} for params, parts in stored]
        optimizers.append(Muon(muon_groups, ranks, dtype))
    return optimizers


class Optimizer:
    """Groups of parameters, and what is kept of each, in the shape that torch's own optimizers have. These load torch's
    compiler when they are made, which is 1.2 s and 150 MB of what an eager run has no use for."""

    state_names: tuple[str, ...]  # what it keeps of a parameter

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups  # each with its "params", "weight_decay", and from the first step on "lr"
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.found_inf: Tensor | None = None  # where it is 1, a step leaves everything as it is

    def step(self) -> None:
        """One update by the parameters' gradients, which may hold something else afterwards."""
        raise NotImplementedError


class AdamW(Optimizer):
    """Loshchilov and Hutter 2017, by torch's fused kernel: `torch.optim.AdamW(..., fused=True)`, bit for bit."""

    state_names = ("step", "exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": local_part(p).new_zeros(()), **moments}
            steps = [self.state[p]["step"] for p in params]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [local_part(p) for p in params],
                [local_part(p.grad) for p in params],
                [local_part(self.state[p]["exp_avg"]) for p in params],
                [local_part(self.state[p]["exp_avg_sq"]) for p in params],
                [],
                steps,
                lr=group["lr"],
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                amsgrad=False,
                maximize=False,
                found_inf=self.found_inf,
            )
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))


class Muon(Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices (out, in). The update is scaled to the size AdamW's
    typically has, 0.2 a weight (Liu et al. 2025, "Muon is scalable for LLM training"), so that one learning rate serves
    both.

    Several ranks share the work: of as many matrices of a shape as there are ranks, or on a GPU of as many as `at_once` allows,
    every rank orthogonalizes its share, and they exchange the results. Only a whole matrix can be orthogonalized; where the
    ranks hold slices (FSDP), those of these few are gathered for it, so that no others are whole in a rank's memory.
    """

    state_names = ("momentum",)

    def __init__(self, groups: list[dict[str, Any]], ranks: Ranks = ALONE, dtype: str = "fp32") -> None:
        """In a group each tensor is "parts" matrices, one below the other."""
        super().__init__(groups)
        self.ranks = ranks
        self.dtype = DTYPES[dtype if dtype != "fp16" else "fp32"]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = dict.fromkeys(p.shape for p in group["params"])
            for same in ([p for p in group["params"] if p.shape == shape] for shape in shapes):
                size = self.ranks.world_size * max(1, at_once(same[0]) // self.ranks.world_size)
                for start in range(0, len(same), size):
                    self._update(same[start : start + size], group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Of matrices of one shape, as many for each rank, in the memory of their gradients."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, requires_grad=False)
        momenta, grads = [local_part(self.state[p]["momentum"]) for p in params], [local_part(grad_of(p)) for p in params]
        if self.found_inf is not None:  # a gradient that is the momentum leaves that as it is
            refused = self.found_inf > 0
            for momentum, grad in zip(momenta, grads, strict=True):
                torch.where(refused, momentum, grad, out=grad)
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        torch._foreach_lerp_(grads, momenta, MOMENTUM)  # Nesterov's
        each = -(-len(params) // self.ranks.world_size)
        # Where there are fewer than places, the last one is done several times.
        places = [min(self.ranks.rank * each + n, len(params) - 1) for n in range(each)]
        whole = {}
        for n, p in enumerate(params):
            update = gathered(grad_of(p))  # (out, in)
            if n in places:
                whole[n] = update
        mine = torch.stack([whole[n] for n in places]) if each > 1 else whole[places[0]][None]  # (each, out, in)
        dtype = self.dtype if has_bf16(mine.device) else torch.float32
        matrices = mine.unflatten(1, (group["parts"], -1)).flatten(0, 1)  # (each * parts, out / parts, in)
        mine = orthogonalize(matrices, dtype).reshape(mine.shape)
        apply = 1 if self.found_inf is None else 1 - self.found_inf
        rate = momenta[0].new_ones(()) * (apply * group["lr"] * 0.2 * math.sqrt(max(matrices.shape[1:])))
        torch._foreach_mul_([local_part(p) for p in params], 1 - apply * group["lr"] * group["weight_decay"])
        for p, update in zip(params, self.ranks.gather(mine).flatten(0, 1), strict=False):
            local_part(p).addcmul_(part_of(update, p), rate, value=-1)


def grad_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def at_once(matrix: Tensor) -> int:
    """How many of its shape are orthogonalized at once: on a GPU several, since to start the work on one takes longer than to
    do it."""
    return max(1, NUMBERS // matrix.numel()) if matrix.device.type == "cuda" else 1


def orthogonalize(G: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest matrix with singular values of one, to each of (n, out, in): Newton-Schulz steps with the coefficients
    of Amsel et al. 2025 ("The Polar Express"), which leave them below 1.16, and the larger ones above 0.97. The first of their
    five is replaced by a scaling of the rows (Boissin et al. 2025, "Turbo-Muon"). It is computed and returned in `dtype`."""
    X = G.to(dtype) if G.shape[1] <= G.shape[2] else G.to(dtype).mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    A = times(X, X.mT)
    scale = A.abs().sum(dim=2, keepdim=True).clamp(min=1e-12).rsqrt()  # with it no singular value is above one
    X, A = X * scale, A * scale * scale.mT
    if dtype == torch.float32 and X.device.type == "cpu" and X.shape[2] >= 2 * X.shape[1]:
        X = _by_gram(X, A)
    else:
        for n, (a, b, c) in enumerate(COEFFICIENTS):
            A = times(X, X.mT) if n else A
            X = times(_polynomial(A, b, c), X).add_(X, alpha=a)
    return X if G.shape[1] <= G.shape[2] else X.mT


def _polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """b A + c A^2, of symmetric (n, m, m). A step has a I beside it, which 16 bits would not hold as well."""
    return times(A, A).mul_(c).add_(A, alpha=b)


def _by_gram(X: Tensor, A: Tensor) -> Tensor:
    """The steps on wide matrices (n, m, k), by the small A = X X^T alone: a step makes P X of X, so P A P of A, and X is
    multiplied once, by all the P. Half the work where k = 4 m; in fp32 it is exact to 1e-4, in TF32 it would not be."""
    product = None
    for n, (a, b, c) in enumerate(COEFFICIENTS):
        P = _polynomial(A, b, c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        product = P if product is None else times(P, product)
        if n < len(COEFFICIENTS) - 1:
            A = times(times(P, A), P)
    assert product is not None
    return times(product, X)


def best_lr(optimizer: str, n_embd: int) -> float:
    """The default learning rate, as it was measured on Shakespeare (README, "Bench"): Muon's is in proportion smaller for
    wider models, from 64 to 768; AdamW's from 384 on, which is then about GPT-3's (Brown et al. 2020, table 2.1)."""
    if optimizer == "muon":
        return min(2.4e-2, 3e-3 * 384 / n_embd)
    return 1e-3 * min(1.0, 384 / n_embd)


def planned_lr(step: int, train: TrainConfig) -> float:
    """`lr_at` of a plan's settings."""
    return lr_at(
        step,
        steps=train.steps or 0,
        lr=train.lr or 0.0,
        min_lr=train.min_lr or 0.0,
        warmup_steps=train.warmup_steps or 0,
        schedule=train.schedule,
    )


def lr_at(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int, schedule: str) -> float:
    """Learning rate of update `step`, counted from 0: a linear warm-up to `lr`, then `cosine` or `linear` down to
    `min_lr` at the last update, or `constant`, or `wsd` (warm-up, stable, decay; Hu et al. 2024, "MiniCPM"): `lr`, and in the
    last fifth of the steps linear down."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)  # 0 to 1
    if schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule == "linear":
        left = 1 - done
    else:
        left = min(1.0, (steps - 1 - step) / max(1, steps // 5))
    return min_lr + max(0.0, left) * (lr - min_lr)
