import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2cli import TrainConfig, UserError, atomic, make_plan, train
from gpt2cli.checkpoint import checkpoints, load
from gpt2cli.data import eval_batches
from gpt2cli.metrics import read as read_metrics
from gpt2cli.optim import make_optimizers
from gpt2cli.resume import resume_plan
from gpt2cli.shards import Tokens
from gpt2cli.step import train_step, validate

from .conftest import make_model

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}
CONFIG = {
    "seq_len": 32, "batch_size": 2, "tokens_per_step": 128, "steps": 10, "eval_every": 5, "save_every": 5,
    "eval_tokens": 256, "dtype": "fp32", "device": "cpu",
}  # fmt: skip


def new_plan(text_file, out, shape=SHAPE, **config):
    return make_plan(text_file, shape, TrainConfig(**CONFIG | config), out=Path(out))


def weights(folder):
    return {name: tensor.clone() for name, tensor in load(str(folder)).model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_five_steps_and_five_resumed_are_ten_bit_for_bit(text_file, optimizer, dropout):
    options = {"optimizer": optimizer, "shape": SHAPE | {"dropout": dropout}}
    whole = list(train(new_plan(text_file, "whole", **options)))
    done = 0

    def stop():
        return done == 5

    for metrics in train(new_plan(text_file, "halves", save_every=2, **options), should_stop=stop):
        done = metrics.step
    assert done == 5 and metrics.saved == Path("halves/step-000005")
    rest = list(train(resume_plan(Path("halves"), {})))
    assert [m.loss for m in whole[5:]] == [m.loss for m in rest]
    assert [m.val_loss for m in whole[5:]] == [m.val_loss for m in rest]
    assert same(weights("whole/step-000010"), weights("halves/step-000010"))
    steps = [line["step"] for line in read_metrics(Path("halves")) if "loss" in line]
    assert steps == list(range(1, 11))


@pytest.mark.parametrize("when", ["measure", "evaluate", "save", "step"])
def test_a_stop_at_any_moment_of_a_step_is_saved(text_file, monkeypatch, when):
    from gpt2cli import run as module

    asked = []
    original = getattr(module.Run, when)

    def with_signal(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        asked.extend([True] * (self.progress.step == 4))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, when, with_signal)
        steps = list(train(new_plan(text_file, "run", eval_every=2, save_every=2), should_stop=lambda: bool(asked)))
    assert steps[-1].step == 4 and Path("run/step-000004").is_dir()
    asked.clear()

    def stop():
        asked.append(True)
        return len(asked) > 5

    steps = list(train(new_plan(text_file, "rare", log_every=3, eval_every=0, save_every=0), should_stop=stop))
    assert steps[-1].saved == Path("rare/step-000005") and steps[-1].step == 5


def test_two_runs_with_one_seed_are_one_run_and_another_seed_is_another(text_file):
    losses = [[m.loss for m in train(new_plan(text_file, name, seed=seed))] for name, seed in [("a", 1), ("b", 1), ("c", 2)]]
    assert losses[0] == losses[1] != losses[2]


def test_steps_done_after_the_last_checkpoint_are_done_again_once(text_file):
    for metrics in train(new_plan(text_file, "run", save_every=4, eval_every=0)):
        if metrics.step == 7:
            break  # as a kill would: no save
    assert [p.name for p in checkpoints(Path("run"))] == ["step-000004"]
    again = list(train(resume_plan(Path("run"), {})))
    assert [m.step for m in again] == [5, 6, 7, 8, 9, 10]
    assert [line["step"] for line in read_metrics(Path("run")) if "loss" in line] == list(range(1, 11))


@pytest.mark.parametrize("in_log", [True, False])
@pytest.mark.parametrize("in_checkpoint", [True, False])
def test_an_evaluation_that_a_kill_cut_short_is_caught_up(text_file, in_log, in_checkpoint):
    list(train(new_plan(text_file, "run")))
    path, beside = Path("run/metrics.jsonl"), Path("run/step-000010/evaluation.json")
    lines, evaluation = path.read_text().splitlines(), beside.read_text()
    assert json.loads(lines[-1])["val_loss"] == json.loads(evaluation)["val_loss"]
    if not in_log:
        path.write_text("\n".join(lines[:-1]) + "\n")
    if not in_checkpoint:
        beside.unlink()
    steps = list(train(resume_plan(Path("run"), {})))
    assert [m.val_loss for m in steps] == ([] if in_checkpoint else [json.loads(lines[-1])["val_loss"]])
    assert path.read_text().splitlines() == lines and beside.read_text() == evaluation


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accumulated_micro_steps_are_the_whole_batch(name):
    data = torch.randint(97, (4, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for parts in (1, 2, 4):
        model = make_model()
        optimizers = make_optimizers(model, name, 0.1)
        batches = [(part[:, :-1], part[:, 1:]) for part in data.chunk(parts)]
        loss, norm = train_step(model, optimizers, batches, lr=1e-2, grad_clip=1.0)
        results.append((loss.item(), norm.item(), model.h[0].mlp.c_fc.weight.detach().clone()))
    for loss, norm, weight in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5) and norm == pytest.approx(results[0][1], rel=1e-4)
        moved = (results[0][2] - make_model().h[0].mlp.c_fc.weight.detach()).norm()
        assert (weight - results[0][2]).norm() < 0.05 * moved


def test_gradients_are_clipped_to_the_norm_asked():
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), fused=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(97, (2, 33))
    _, norm = train_step(model, [sgd], [(ids[:, :-1], ids[:, 1:])], lr=1.0, grad_clip=0.01)
    moved = math.sqrt(sum((p.detach() - before[name]).square().sum().item() for name, p in model.named_parameters()))
    assert norm.item() > 0.01 and moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_eager_run_does_without_torchs_compiler(text_file, optimizer):
    """Which takes a second to load, and 150 MB."""
    options = "--n-layer 1 --n-head 2 --n-embd 16 --seq-len 32 --tokens-per-step 64 --steps 2 --sample-every 1 --device cpu"
    program = f"""
import sys
from gpt2cli.__main__ import main
sys.argv = ["gpt2", *"train {text_file} --out run --optimizer {optimizer} {options}".split()]
try:
    main()
finally:
    print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "transformers") if name in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).splitlines() == ["run", "[]"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_batch_is_learned_by_heart(name):
    model = make_model(vocab_size=50)
    optimizers = make_optimizers(model, name, 0.0)
    ids = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(80):
        loss, _ = train_step(model, optimizers, [(ids[:, :-1], ids[:, 1:])], lr=1e-2, grad_clip=1.0)
    assert loss.item() < 0.1


def test_a_run_learns_and_its_metrics_are_documented_keys(text_file):
    steps = list(train(new_plan(text_file, "run", steps=40, lr=1e-2, eval_every=10, log_every=2)))
    assert steps[0].loss == pytest.approx(math.log(50257), abs=0.3) and steps[-1].loss < 8
    assert steps[-1].val_loss < 8 and steps[-1].tokens == 40 * 128
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(2, 41, 2))
    assert set(logged[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed"}
    evaluated = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluated] == [10, 20, 30, 40]
    assert set(evaluated[0]) == {"step", "val_loss", "val_bits_per_byte"}


def test_validation_is_the_mean_over_all_targets_and_bits_count_the_texts_bytes():
    model = make_model()
    ids = torch.randint(97, (71,), generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(97) % 5
    batches = eval_batches(Tokens([ids.numpy()]), 2, 10, limit=0)
    import contextlib

    loss, bits = validate(model, batches, contextlib.nullcontext, lengths)
    nats = []
    for start in range(0, 70, 10):
        part = ids[start : start + 11][None]
        nats += torch.nn.functional.cross_entropy(model(part[:, :-1])[0][0], part[0, 1:], reduction="none").tolist()
    assert loss == pytest.approx(sum(nats) / 70, rel=1e-5)
    assert bits == pytest.approx(sum(nats) / math.log(2) / lengths[ids[1:]].sum().item(), rel=1e-5)


def test_fine_tuning_starts_from_the_model_and_takes_its_shape(run_folder, text_file):
    before = load(str(run_folder))
    plan = make_plan(text_file, {}, TrainConfig(**CONFIG | {"steps": 1, "lr": 1e-9}), init_from=str(run_folder), out=Path("ft"))
    assert plan.model.n_embd == 32 and plan.model.block_size == before.model.config.block_size
    list(train(plan))
    for name, tensor in weights("ft").items():
        assert torch.allclose(tensor, before.model.state_dict()[name], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_near_fp32(text_file, dtype):
    exact = [m.loss for m in train(new_plan(text_file, "exact", lr=3e-3))]
    mixed = [m.loss for m in train(new_plan(text_file, "mixed", lr=3e-3, dtype=dtype))]
    assert exact == pytest.approx(mixed, abs=0.05) and exact != mixed


def test_resuming_refuses_other_data_and_another_shape_and_takes_more_steps(text_file):
    list(train(new_plan(text_file, "run", steps=2)))
    with pytest.raises(UserError, match=r"--n-layer 3 would make run a different run \(it has 2\)"):
        resume_plan(Path("run"), {"n_layer": 3})
    with pytest.raises(UserError, match="--lr"):
        resume_plan(Path("run"), {"lr": 0.5})
    assert resume_plan(Path("run"), {"n_layer": 2, "tokens_per_step": 128}).resume_from
    Path("other.txt").write_text("Something else. " * 5000)
    with pytest.raises(UserError, match="data"):
        resume_plan(Path("run"), {}, data="other.txt")
    longer = resume_plan(Path("run"), {"steps": 4})
    assert any("from 2 to 4" in note for note in longer.notes)
    assert [m.step for m in train(longer)] == [3, 4]
    assert [line["step"] for line in read_metrics(Path("run")) if "val_loss" in line] == [2, 4]


def test_shards_of_another_tokenizer_and_a_model_with_more_ids_than_its_tokenizer(text_file):
    from gpt2cli.corpus import tokenize
    from gpt2cli.tokenizer import Encoding

    manifest = tokenize([text_file], Path("tokens"), encoding=Encoding.gpt2())
    make_model(vocab_size=50304).save_pretrained("padded")
    plan = make_plan("tokens", {}, TrainConfig(**CONFIG | {"steps": 1}), init_from="padded", out=Path("a"))
    assert list(train(plan))[-1].val_bits_per_byte > 0
    path = Path("tokens/manifest.json")
    path.write_text(path.read_text().replace(manifest.tokenizer_sha256, "0" * 64))
    with pytest.raises(UserError, match=r"manifest\.json changed since"):
        new_plan("tokens", "b")
    values = {key: value for key, value in atomic.read_json(path).items() if key != "sha256"}
    atomic.write_sealed(path, values)
    with pytest.raises(UserError, match="another vocabulary"):
        new_plan("tokens", "b")


def test_a_split_too_small_to_predict_anything_counts_as_none(text_file):
    import numpy as np

    Path("bin").mkdir()
    np.arange(5000).astype("<u2").tofile("bin/train.bin")
    np.arange(1).astype("<u2").tofile("bin/val.bin")
    plan = new_plan("bin", "run", steps=1)
    assert plan.val_tokens == 0 and list(train(plan))[-1].val_loss is None


def test_what_a_killed_save_left_behind_is_swept(text_file):
    list(train(new_plan(text_file, "run", steps=2)))
    Path("run/step-000002").rename("run/.step-000002.77.old")
    Path("run/.step-000003.77.tmp").mkdir()
    plan = resume_plan(Path("run"), {})
    list(train(plan))
    assert sorted(p.name for p in Path("run").iterdir()) == [".lock", "metrics.jsonl", "run.json", "step-000002"]


def test_public_shards_train_as_they_are_and_ids_beyond_the_vocabulary_stop_before_the_first_step(tmp_path):
    import numpy as np

    (tmp_path / "bin").mkdir()
    np.random.default_rng(0).integers(0, 50257, 5000).astype("<u2").tofile(tmp_path / "bin" / "train.bin")
    np.random.default_rng(1).integers(0, 50257, 500).astype("<u2").tofile(tmp_path / "bin" / "val.bin")
    assert list(train(new_plan(tmp_path / "bin", "run", steps=1)))[-1].val_loss
    np.array([65000] * 5000).astype("<u2").tofile(tmp_path / "bin" / "train.bin")
    with pytest.raises(UserError, match="65,000"):
        new_plan(tmp_path / "bin", "other")
