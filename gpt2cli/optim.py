"""The optimizer's parameter groups and the learning rate over time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpt2cli.config import CHOICES, TrainConfig
from gpt2cli.device import DTYPES, has_bf16
from gpt2cli.distributed import ALONE, Ranks, gathered, local_part, part_of
from gpt2cli.errors import UserError
from gpt2cli.model import GPT
from gpt2cli.product import times

BETAS = (0.9, 0.95)  # GPT-3 (Brown et al. 2020, appendix B)


def make_optimizers(
    model: GPT, name: str, weight_decay: float, dtype: str = "fp32", ranks: Ranks = ALONE
) -> list[torch.optim.Optimizer]:
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
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)]
    if hidden:
        qkv = [p for n, p in hidden.items() if n.endswith("attn.c_attn.weight")]
        whole = [p for n, p in hidden.items() if not n.endswith("attn.c_attn.weight")]
        # q, k and v are three matrices that happen to be stored as one.
        muon_groups = [{"params": qkv, "parts": 3}, {"params": whole, "parts": 1}]
        optimizers.append(Muon(muon_groups, ranks, dtype, weight_decay=weight_decay))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices (out, in). The update is scaled to the size AdamW's
    typically has, 0.2 a weight (Liu et al. 2025, "Muon is scalable for LLM training"), so that one learning rate serves
    both.

    Several ranks share the work: of each `world_size` matrices of a shape every rank orthogonalizes one, and they exchange
    the results. Only a whole matrix can be orthogonalized; where the ranks hold slices (FSDP), those of these few are
    gathered for it, so that never more than `world_size` matrices are whole in a rank's memory.
    """

    state_names = ("momentum",)  # what it keeps of a parameter

    def __init__(
        self,
        params: Any,
        ranks: Ranks = ALONE,
        dtype: str = "fp32",
        *,
        lr: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.ranks = ranks
        self.dtype = DTYPES[dtype if dtype != "fp16" else "fp32"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever given
        """One update; where `self.found_inf` is a tensor that is not 0, none, as torch's fused optimizers have it."""
        for group in self.param_groups:
            shapes = dict.fromkeys(p.shape for p in group["params"])
            for same in ([p for p in group["params"] if p.shape == shape] for shape in shapes):
                for start in range(0, len(same), self.ranks.world_size):
                    self._update(same[start : start + self.ranks.world_size], group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Of up to `world_size` matrices of one shape."""
        skip = getattr(self, "found_inf", None)
        momenta, mine = [], params[0]
        for rank, p in enumerate(params):
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p, requires_grad=False)
            assert p.grad is not None
            momenta.append(state["momentum"].lerp(p.grad, 1 - group["momentum"]))
            update = gathered(p.grad.lerp(momenta[-1], group["momentum"]))  # Nesterov; (out, in)
            if rank <= self.ranks.rank:  # where there are fewer than ranks, the last ones do the same
                mine = update
        dtype = self.dtype if has_bf16(mine.device) else torch.float32
        mine = orthogonalize(mine.unflatten(0, (group["parts"], -1)), dtype).flatten(0, 1)
        for p, momentum, update in zip(params, momenta, self.ranks.gather(mine), strict=False):
            scale = 0.2 * math.sqrt(max(p.shape[0] // group["parts"], p.shape[1]))
            weight = local_part(p)
            new = weight.mul(1 - group["lr"] * group["weight_decay"])
            new.add_(part_of(update.to(p.dtype), p), alpha=-group["lr"] * scale)
            for old, value in ((local_part(self.state[p]["momentum"]), local_part(momentum)), (weight, new)):
                old.copy_(value if skip is None else torch.where(skip > 0, old, value))


def orthogonalize(G: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest matrix with singular values of one, to each of (n, out, in): five Newton-Schulz steps with
    Jordan's coefficients, which leave them between 0.7 and 1.2. It is computed and returned in `dtype`."""
    X = G.to(dtype) if G.shape[1] <= G.shape[2] else G.to(dtype).mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if dtype == torch.float32 and X.device.type == "cpu" and X.shape[2] >= 2 * X.shape[1]:
        X = _by_gram(X)
    else:
        for _ in range(5):
            X = times(_polynomial(times(X, X.mT)), X).add_(X, alpha=3.4445)
    return X if G.shape[1] <= G.shape[2] else X.mT


def _polynomial(A: Tensor) -> Tensor:
    """-4.7750 A + 2.0315 A^2, of symmetric (n, m, m). A step has 3.4445 I beside it, which 16 bits would not hold as well."""
    return times(A, A).mul_(2.0315).sub_(A, alpha=4.7750)


def _by_gram(X: Tensor) -> Tensor:
    """The five steps on wide matrices (n, m, k), by the small A = X X^T alone: a step makes P X of X, so P A P of A, and X is
    multiplied once, by all five P. Half the work where k = 4 m; in fp32 it is exact to 1e-4, in TF32 it would not be."""
    A, product = times(X, X.mT), None
    for step in range(5):
        P = _polynomial(A)
        P.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = P if product is None else times(P, product)
        if step < 4:
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
