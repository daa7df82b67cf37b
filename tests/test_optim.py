import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gpt2cli.distributed import ALONE
from gpt2cli.optim import COEFFICIENTS, Muon, lr_at, make_optimizers, orthogonalize

from .conftest import make_model

PLAN = {"steps": 110, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 10}


@pytest.mark.parametrize(
    "schedule, step, lr",
    [
        ("cosine", 0, 0.1), ("cosine", 9, 1.0), ("cosine", 10, 1.0), ("cosine", 109, 0.1),
        ("cosine", 43, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3))),
        ("linear", 0, 0.1), ("linear", 10, 1.0), ("linear", 43, 0.7), ("linear", 109, 0.1),
        ("constant", 4, 0.5), ("constant", 50, 1.0), ("constant", 109, 1.0),
        ("wsd", 4, 0.5), ("wsd", 50, 1.0), ("wsd", 87, 1.0), ("wsd", 98, 0.55), ("wsd", 109, 0.1),
    ],
)  # fmt: skip
def test_the_learning_rate_at_the_corners(schedule, step, lr):
    assert lr_at(step, schedule=schedule, **PLAN) == pytest.approx(lr)


def test_one_step_without_warmup_has_the_full_rate():
    assert lr_at(0, steps=1, lr=1.0, min_lr=0.1, warmup_steps=0, schedule="cosine") == 1.0


def test_matrices_decay_and_the_rest_does_not():
    model = make_model()
    names = {p: name for name, p in model.named_parameters()}
    (adamw,) = make_optimizers(model, "adamw", 0.1)
    decayed, free = ({names[p] for p in group["params"]} for group in adamw.param_groups)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    assert decayed | free == set(names.values()) and not decayed & free
    assert decayed == {n for n in names.values() if n.endswith(("wte.weight", "wpe.weight"))} | {
        n for n in names.values() if n.endswith("weight") and "ln" not in n
    }


def test_adamw_is_torchs_bit_for_bit():
    ours, theirs = make_model(), make_model()
    (adamw,) = make_optimizers(ours, "adamw", 0.1)
    groups = [{**group, "params": []} for group in adamw.param_groups]
    for group, same in zip(groups, adamw.param_groups, strict=True):
        names = {p: name for name, p in ours.named_parameters()}
        group["params"] = [theirs.get_parameter(names[p]) for p in same["params"]]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(6):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = torch.randn_like(p)
            p.grad = q.grad.clone()
        for optimizer in (adamw, torchs):
            optimizer.found_inf = torch.tensor(float(step == 3))  # that one is refused
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and adamw.state[p]["step"] == 5
        assert all(torch.equal(adamw.state[p][name], torchs.state[q][name]) for name in adamw.state_names)


def test_muon_has_the_blocks_matrices_and_adamw_everything_else():
    model = make_model(tie_word_embeddings=False)
    names = {p: name for name, p in model.named_parameters()}
    adamw, muon = make_optimizers(model, "muon", 0.1)
    qkv, whole = ({names[p] for p in group["params"]} for group in muon.param_groups)
    assert qkv == {f"h.{n}.attn.c_attn.weight" for n in range(2)}
    assert whole == {f"h.{n}.{m}.weight" for n in range(2) for m in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    rest = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - qkv - whole and {"wte.weight", "wpe.weight", "lm_head.weight"} <= rest


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 24), (2, 40, 10)])
def test_orthogonalize_keeps_the_directions_and_levels_the_sizes(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    for g, x in zip(G, orthogonalize(G), strict=True):
        U, _, V = torch.linalg.svd(g, full_matrices=False)
        inside = U.T @ x.float() @ V.T
        assert inside.diagonal().min() > 0.5 and inside.diagonal().max() < 1.4
        assert (inside - inside.diagonal().diag()).abs().max() < 0.1


@pytest.mark.parametrize("large", [0, 1 << 40])
@pytest.mark.parametrize("worst", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (64, 16)])
def test_orthogonalize_is_its_newton_schulz_steps_in_float64(monkeypatch, shape, worst, large):
    monkeypatch.setattr("gpt2cli.product.LARGE", large)  # with and without oneDNN
    torch.manual_seed(0)
    U, S, V = torch.linalg.svd(torch.randn(2, *shape, dtype=torch.float64), full_matrices=False)
    G = U * torch.logspace(0, math.log10(worst), S.shape[1], dtype=torch.float64) @ V
    X = G if shape[0] <= shape[1] else G.mT
    X = X / (X @ X.mT).abs().sum(2, keepdim=True).sqrt()
    assert torch.linalg.svdvals(X).max() < 1 + 1e-9
    for a, b, c in COEFFICIENTS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    X = X if shape[0] <= shape[1] else X.mT
    assert (orthogonalize(G.float()) - X).norm() < 1e-3 * X.norm()


@pytest.mark.parametrize("refused", [None, 2])
def test_muon_is_nesterovs_momentum_orthogonalized_at_the_size_of_adamws(refused):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (24, 8), (8, 24))]
    expected, momenta = [w.detach().clone() for w in weights], [torch.zeros_like(w) for w in weights]
    muon = Muon([{"params": weights, "parts": 1, "weight_decay": 0.1}])
    for step in range(4):
        lr = muon.param_groups[0]["lr"] = 0.02 * (step + 1)
        for n, w in enumerate(weights):
            w.grad = torch.randn_like(w)
            if step != refused:
                momenta[n] = 0.95 * momenta[n] + 0.05 * w.grad
                direction = orthogonalize((0.05 * w.grad + 0.95 * momenta[n])[None])[0]
                expected[n] = expected[n] * (1 - lr * 0.1) - lr * 0.2 * math.sqrt(max(w.shape)) * direction
            else:
                w.grad[0, 0] = math.nan
        muon.found_inf = None if refused is None else torch.tensor(float(step == refused))
        muon.step()
    for w, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.detach(), right, atol=1e-5, rtol=1e-5)


def test_muon_treats_q_k_and_v_as_matrices_of_their_own():
    torch.manual_seed(0)
    joined = torch.nn.Parameter(torch.randn(12, 4))
    parts = [torch.nn.Parameter(part.clone()) for part in joined.detach().split(4)]
    joined.grad = torch.randn(12, 4)
    for part, grad in zip(parts, joined.grad.split(4), strict=True):
        part.grad = grad.clone()
    more = {"lr": 0.1, "weight_decay": 0.1}
    Muon([{"params": [joined], "parts": 3, **more}]).step()
    Muon([{"params": parts, "parts": 1, **more}]).step()
    assert torch.allclose(joined, torch.cat(parts), atol=1e-6)


class Sharing:
    """A rank that is a thread."""

    def __init__(self, rank, world_size, meeting, given):
        self.rank, self.world_size, self._meeting, self._given = rank, world_size, meeting, given

    def gather(self, values):
        self._given[self.rank] = values
        self._meeting.wait()
        found = torch.stack([self._given[rank] for rank in range(self.world_size)])
        self._meeting.wait()
        return found


@pytest.mark.parametrize("at_once, world_size", [(2, 1), (5, 1), (100, 1), (1, 2), (2, 2), (2, 3), (100, 2), (3, 7)])
def test_muon_does_the_same_with_several_at_once_and_by_several_ranks(at_once, world_size, monkeypatch):
    """As on a GPU; of five matrices of a shape."""

    def trained(ranks, model):
        numbers = torch.Generator().manual_seed(0)
        *_, muon = make_optimizers(model, "muon", 0.1, ranks=ranks)
        for _ in range(3):
            for group in muon.param_groups:
                group["lr"] = 0.02
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=numbers)
            muon.step()
        return list(model.parameters())

    expected = trained(ALONE, make_model(n_layer=5))
    monkeypatch.setattr("gpt2cli.optim.at_once", lambda matrix: at_once)
    meeting, given = threading.Barrier(world_size, timeout=60), {}
    ranks = [Sharing(rank, world_size, meeting, given) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as threads:
        for found in threads.map(trained, ranks, [make_model(n_layer=5) for _ in ranks]):
            for p, q in zip(found, expected, strict=True):
                torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
