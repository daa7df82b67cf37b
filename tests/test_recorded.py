"""Recorded updates against those started one by one: on a GPU where there is one, else by a stand-in for CUDA graphs."""

import json
from types import SimpleNamespace

import pytest
import torch

from gpt2cli import device, recorded, run
from gpt2cli.ahead import Graphs
from gpt2cli.config import GPTConfig, TrainConfig
from gpt2cli.guard import Guard
from gpt2cli.optim import make_optimizers
from gpt2cli.recorded import Recorded, is_short
from gpt2cli.step import train_step

from .conftest import TINY, make_model
from .records import HereToo
from .test_nothing_lost import poisoned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def here_too(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(recorded, "Graphs", HereToo)
    monkeypatch.setattr(Graphs, "failed", False)


def trained(how, optimizer, look=False, **shape):
    """What is there after some updates, by a learning rate of its own each, one of which is refused."""
    model = make_model(**shape).to(DEVICE)
    optimizers, guard = make_optimizers(model, optimizer, 0.1), Guard(torch.device(DEVICE))

    def update(batch, lr):
        loss, norm = train_step(model, optimizers, [batch], lr=lr, grad_clip=1.0, guard=guard)
        assert not look or loss.item()
        return loss, norm

    ids = torch.randint(97, (7, 3, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    make, told = None, []
    for n, rows in enumerate(ids):
        device.seed_step(1, n, 0)
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        good = model.ln_f.weight.detach().clone()
        if n == 4:
            model.ln_f.weight.data.fill_(torch.nan)
        if how == "recorded":
            make = make or Recorded(update, model, batch)
            told += make(batch, 0.01 * (n + 1))
        else:
            told += update(batch, torch.tensor(0.01 * (n + 1), device=DEVICE))
        if n == 4:
            model.ln_f.weight.data.copy_(good)
    kept = [value for o in optimizers for values in o.state.values() for value in values.values()]
    assert guard.skipped == 1 and told[8].isnan() and torch.stack(told[10:]).isfinite().all()
    return [*told, *model.parameters(), *kept, *guard.state_dict().values()]


def near(found, expected):
    """On a GPU sums of a sparse gradient come in any order, and the gradient of a bias of keys is but noise. First are loss
    and norm of each."""
    both = [(a, b) for n, (a, b) in enumerate(zip(found, expected, strict=True)) if n < 14 or a.dim() == 2]
    return all(torch.allclose(a, b, rtol=1e-2, atol=1e-2, equal_nan=True) for a, b in both)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [{"dropout": 0.1}, {"tie_word_embeddings": False, "n_inner": 40}])
def test_recorded_updates_are_those_started_one_by_one(optimizer, shape):
    found, expected = trained("recorded", optimizer, **shape), trained("one by one", optimizer, **shape)
    assert len(found) == len(expected)
    if DEVICE == "cpu":
        assert all(torch.equal(a, b) or (a.isnan() & b.isnan()).all() for a, b in zip(found, expected, strict=True))
    assert near(found, expected)


def test_where_recording_fails_updates_go_on_without():
    expected = trained("one by one", "muon")
    with pytest.warns(UserWarning, match="CUDA graphs do not work here, so training is slower: "):
        found = trained("recorded", "muon", look=True)
    assert near(found, expected)


def test_short_updates_on_a_gpu_are_recorded():
    seed, gpu = GPTConfig(), torch.device("cuda")
    assert is_short(seed, gpu, 8, 256) and not is_short(seed, torch.device("cpu"), 8, 256)
    assert not is_short(seed, gpu, 512, 1024)


@pytest.mark.parametrize(
    "fields",
    [{}, {"dtype": "fp16"}, {"deterministic": True}, {"activation_checkpointing": True}, {"rows": 16}, {"memory": 60 << 30}],
)
def test_updates_are_recorded_where_nothing_is_decided_on_the_way_and_memory_is_to_spare(fields, monkeypatch):
    monkeypatch.setattr(run.device, "memory_total", lambda where: 100 << 30)
    plan = {"rows": 8, "batch_size": 8, "seq_len": 256, "memory": 1 << 30, "device": torch.device("cuda"), "model": GPTConfig()}
    of_plan = {name: value for name, value in fields.items() if name in plan}
    train = TrainConfig(**({"dtype": "bf16"} | {name: value for name, value in fields.items() if name not in plan}))
    assert run._can_be_recorded(SimpleNamespace(train=train, **(plan | of_plan))) == (fields == {})


SETTINGS = [
    *TINY,
    "--tokens-per-step",
    128,
    "--steps",
    14,
    "--eval-every",
    4,
    "--save-every",
    4,
    "--device",
    DEVICE,
    "--compile",
    "off",
]


def lines(out):
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("elapsed", "tokens_per_second")} for line in steps]


def test_a_run_is_the_same_recorded_with_a_rollback_and_a_resume(gpt2, text_file, tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda row: 6 * 4 <= row < 9 * 4)
    settings = [text_file, *SETTINGS, "--dtype", "fp32", "--dropout", 0.1, "--log-every", 1]
    monkeypatch.setattr(run, "_can_be_recorded", lambda plan: False)
    assert gpt2("train", *settings, "--out", "plain").code == 0
    made = []
    monkeypatch.setattr(run, "_can_be_recorded", lambda plan: True)
    monkeypatch.setattr(run, "Recorded", lambda *how: made.append(Recorded(*how)) or made[-1])
    assert gpt2("train", *settings, "--out", "run", "--max-minutes", 0).code == 143
    assert gpt2("train", "--resume", "--out", "run").code == 0
    assert len(made) > 2  # one more after the rollback
    found, expected = lines(tmp_path / "run"), lines(tmp_path / "plain")
    assert len(found) == len(expected) and any(line.get("event") == "rollback" for line in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "val_loss"):
            close = pytest.approx(theirs.get(key) or 0.0, rel=1e-5 if DEVICE == "cpu" else 0.05)
            assert (ours.get(key) or 0.0) == close  # None where it is not a number
