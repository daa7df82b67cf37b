"""What a run decides by itself: how much fits, when it has had enough, whom it believes."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2cli import TrainConfig, UserError, atomic, batch, curve, device, make_plan, memory, metrics, train
from gpt2cli.compiled import agree_or_eager
from gpt2cli.config import GPTConfig
from gpt2cli.keeper import Keeper
from gpt2cli.resume import resume_plan
from gpt2cli.step import compile_parts

from .conftest import QUICK, make_model
from .test_train import new_plan

CPU = torch.device("cpu")


# ==== memory ====

LIBRARIES = 110_000_000  # bytes of mapped files where `memory.INTERPRETER` was measured; freshly installed they are more


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch's build for CUDA takes other memory, which was not measured")
@pytest.mark.parametrize(
    "more", [{}, {"optimizer": "adamw", "dtype": "bf16", "batch_size": 2}, {"activation_checkpointing": True}]
)
def test_the_plan_predicts_the_peak_within_a_quarter(text_file, more):
    if more.get("dtype") == "bf16" and not device.has_bf16(CPU):
        pytest.skip("this CPU has no bf16 arithmetic")
    settings = {"dtype": "fp32", "device": "cpu", "steps": 3, "save_every": 2, "seq_len": 128}
    settings |= {"tokens_per_step": 1024, "eval_tokens": 512} | more
    program = f"""
from pathlib import Path
from gpt2cli import TrainConfig, make_plan, memory, train
plan = make_plan("{text_file}", {{"n_layer": 3, "n_head": 4, "n_embd": 256}}, TrainConfig(**{settings!r}), out=Path("run"))
list(train(plan))
print(plan.memory, memory.peak(), memory._linux("RssFile"))
"""
    predicted, peak, files = map(int, subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert predicted == pytest.approx(peak - files + LIBRARIES, rel=0.25)


def test_the_micro_batch_is_the_largest_that_fits_and_divides_the_update(text_file, monkeypatch):
    def rows(total):
        monkeypatch.setattr(memory, "total", lambda: total)
        train = TrainConfig(seq_len=32, tokens_per_step=32 * 24, device="cpu", dtype="fp32")
        return make_plan(text_file, {"n_layer": 6, "n_embd": 768, "n_head": 2}, train)

    assert rows(0).batch_size == rows(1 << 40).batch_size == 24
    need = rows(1 << 40).memory
    tight = rows(int(need / 0.7 * 0.99))
    assert 1 <= tight.batch_size < 24 and 24 % tight.batch_size == 0 and tight.memory < need
    assert tight.rows == 24 and tight.accumulation * tight.batch_size == 24
    assert rows(1 << 40).memory == need and rows(int(2 * need / 0.7)).batch_size == 24
    none = rows(need // 4)
    assert none.batch_size == 1 and any("there: lower --seq-len, or" in note for note in none.notes)


def test_a_probe_takes_the_first_batch_that_does_not_run_out_of_memory(monkeypatch):
    tried = []
    step = batch.train_step

    def small_machine(model, optimizers, batches, **more):
        tried.append(len(batches[0][0]))
        if tried[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(model, optimizers, batches, **more)

    monkeypatch.setattr(batch, "train_step", small_machine)
    config, settings = make_model().config, TrainConfig(dtype="fp32")
    assert batch.largest_batch(config, settings, CPU, 16, [16, 8, 4, 2, 1], 16) == 4 and tried == [16, 8, 4, 4]
    assert batch.largest_batch(config, settings, CPU, 16, [16, 8], 16) is None
    monkeypatch.setattr(batch, "train_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.largest_batch(config, settings, CPU, 16, [4], 2)


# ==== early stop ====


def test_validation_has_turned_after_so_many_evaluations_without_a_lower_one(tmp_path):
    keeper = Keeper(tmp_path)
    keeper.begin_at(type("Progress", (), {"step": 0, "log": {}})())
    for n, (loss, turned) in enumerate(
        [(3.0, False), (2.0, False), (2.5, False), (math.nan, False), (2.1, True), (1.9, False)]
    ):
        keeper.add({"step": n, "loss": 1.0})
        keeper.add({"step": n, "val_loss": loss})
        assert keeper.has_turned(3) == turned and not keeper.has_turned(0)
    keeper.close()


def test_a_run_ends_when_validation_turns_and_a_resumed_one_ends_there_too(text_file, monkeypatch, gpt2):
    by_step = dict(enumerate([5.0, 4.0, 4.5, 4.2, 4.1, *[3.0] * 9], start=1))
    steps = []
    monkeypatch.setattr("gpt2cli.run.validate", lambda model, *_: (by_step[steps[-1]], None))
    done = new_plan(text_file, "run", steps=12, eval_every=1, save_every=1, patience=3)
    monkeypatch.setattr("gpt2cli.run.planned_lr", lambda step, config: (steps.append(step + 1), 1e-3)[1])
    events = [event for seen in train(done) for event in seen.events]
    assert steps == [1, 2, 3, 4, 5] and len(events) == 1 and "no lower loss in 3 evaluations" in events[0]
    assert [line["event"] for line in metrics.read(Path("run")) if "event" in line] == ["turned"]
    assert not list(train(resume_plan(Path("run"), {}))) and steps == [1, 2, 3, 4, 5]
    again = gpt2("train", "--resume", "--out", "run")
    assert again.code == 0 and "ended after step 5" in again.err and "best checkpoint: run/step-000002" in again.err
    list(train(resume_plan(Path("run"), {"patience": 0})))
    assert steps == list(range(1, 13))


def test_a_run_from_before_there_was_patience_keeps_its_ways(text_file, gpt2):
    list(train(new_plan(text_file, "run", steps=2)))
    record = atomic.read_sealed(Path("run/run.json"))
    del record["train"]["patience"]
    atomic.write_sealed(Path("run/run.json"), record)
    assert resume_plan(Path("run"), {"steps": 4}).train.patience == 0
    assert gpt2("train", "--config", "run/run.json", "--out", "again").code == 0
    assert atomic.read_json(Path("again/run.json"))["train"]["patience"] == 0


# ==== what cannot be meant, or cannot work ====


def test_a_warm_up_longer_than_the_run_and_fp16_on_a_cpu_are_told(text_file):
    plan = make_plan(text_file, {"n_layer": 1}, TrainConfig(seq_len=32, device="cpu", dtype="fp16", steps=9, warmup_steps=20))
    assert any("--warmup-steps 20 is more than all 9 steps" in note for note in plan.notes)
    assert any("fp16 is for GPUs" in note for note in plan.notes)
    assert device.matmul_rate(torch.device("cpu"), "fp32", seconds=0) > 0


def test_ranks_with_nothing_to_do_are_told(text_file):
    def notes(world_size, **settings):
        settings = {"seq_len": 32, "device": "cpu"} | settings
        return make_plan(text_file, {"n_layer": 1}, TrainConfig(**settings), world_size=world_size).notes

    (told,) = notes(3, tokens_per_step=64)
    assert told.startswith("1 of the 3 ranks have nothing to do, an update being 2 rows") and "--tokens-per-step 96" in told
    assert not notes(2, tokens_per_step=64)


def test_a_learning_rate_that_cannot_be_meant_is_told_before_the_run(text_file):
    def notes(**settings):
        return " ".join(make_plan(text_file, {"n_layer": 1}, TrainConfig(seq_len=32, device="cpu", **settings)).notes)

    assert "--lr 0.5 is 167 times what was measured to train best at this width, 3.0e-03" in notes(lr=0.5)
    assert "--lr 1e-07 is 0.0001 times" in notes(lr=1e-7, optimizer="adamw") and "--lr" not in notes(lr=1e-2)
    assert "--lr 0.04 is 13.3 times" in notes(lr=0.04)
    with pytest.raises(UserError, match="with which nothing can be learned"):
        TrainConfig(lr=3.0)


def test_the_default_learning_rate_goes_by_width_and_optimizer(text_file):
    def planned(n_embd, optimizer):
        shape = {"n_layer": 1, "n_head": 2, "n_embd": n_embd}
        return make_plan(text_file, shape, TrainConfig(seq_len=32, device="cpu", optimizer=optimizer)).train.lr

    assert [planned(width, "muon") for width in (32, 192, 384, 768)] == pytest.approx([2.4e-2, 6e-3, 3e-3, 1.5e-3])
    assert [planned(width, "adamw") for width in (32, 192, 384, 768)] == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])


def test_a_first_loss_that_is_no_number_ends_the_run_at_once(text_file, gpt2, monkeypatch):
    from gpt2cli import run

    step = run.train_step
    monkeypatch.setattr(run, "train_step", lambda *a, **more: step(*a, **more | {"shares": [math.nan] * len(more["shares"])}))
    done = gpt2("train", text_file, *QUICK, "--steps", 50, "--log-every", 25, "--out", "run")
    assert done.code == 1 and "the loss of the first step is nan" in done.err


# ==== torch.compile ====


def compiled_as(model, call):
    """As `model.compile()` would, with `call` for the compiler's work."""
    model._compiled_call_impl = call
    x = torch.randint(97, (2, 17))
    return agree_or_eager(model, (x[:, :-1], x[:, 1:]), _plain, exact=True)


def _plain():
    return device.precision(CPU, "fp32")


def test_compiled_code_that_agrees_stays_and_leaves_no_gradients():
    model = make_model()
    call = model._call_impl
    assert compiled_as(model, lambda *a, **k: call(*a, **k)) is None
    assert model._compiled_call_impl is not None and all(p.grad is None for p in model.parameters())
    model._compiled_call_impl = None
    assert agree_or_eager(model, (torch.zeros(1, 1).long(),) * 2, _plain, exact=True) is None


def test_compiled_code_that_is_wrong_or_fails_is_not_used():
    model = make_model()

    def wrong(*args, **more):
        logits, loss = model._call_impl(*args, **more)
        return logits, loss * 1.01

    def broken(*args, **more):
        raise RuntimeError("no C++ compiler\nfound here")

    why = compiled_as(model, wrong)
    assert "where eager has" in why and model._compiled_call_impl is None
    why = compiled_as(model, broken)
    assert why == "it failed with RuntimeError: no C++ compiler" and model._compiled_call_impl is None
    model.config = GPTConfig(**vars(model.config) | {"dropout": 0.1})
    assert compiled_as(model, wrong) is None  # dropout draws other numbers when compiled


def test_what_is_alike_is_compiled_once_and_what_is_not_as_a_whole(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    for settings in ({}, {"scale_attn_by_inverse_layer_idx": True}):
        compile_parts(make_model(**settings))
    assert [type(part).__name__ for part in compiled] == ["Block"] * 2 + ["GPT"]
    compiled.clear()
    compile_parts(make_model(), spread=True)
    assert [type(part).__name__ for part in compiled] == ["CausalSelfAttention", "MLP"] * 2


def test_a_run_tells_that_it_goes_on_without_the_compiler(text_file, monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, *_, **__: setattr(self, "_compiled_call_impl", lambda *_, **__: 1 / 0)
    )
    plan = new_plan(text_file, "run", steps=2, compile="on")
    events = [event for seen in train(plan) for event in seen.events]
    assert events == ["torch.compile is not used: it failed with ZeroDivisionError: division by zero"]
    expected = new_plan(text_file, "eager", steps=2)
    list(train(expected))
    losses = [[line["loss"] for line in metrics.read(Path(run)) if "loss" in line] for run in ("run", "eager")]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch's compiler needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_an_eager_one(text_file):
    def losses(**settings):
        plan = new_plan(text_file, settings["compile"], shape={"n_layer": 1, "n_head": 2, "n_embd": 16}, steps=4, **settings)
        seen = list(train(plan))
        assert not [event for one in seen for event in one.events]
        return [one.loss for one in seen]

    assert losses(compile="on") == pytest.approx(losses(compile="off"), abs=1e-4)


def test_training_in_bf16_stays_near_fp32(text_file):
    def losses(dtype):
        return [seen.loss for seen in train(new_plan(text_file, dtype, dtype=dtype, steps=20, eval_every=0, save_every=0))]

    exact, rounded = losses("fp32"), losses("bf16")
    assert rounded == pytest.approx(exact, abs=0.02) and rounded != exact and exact[-1] < exact[0] - 0.5


# ==== the curve ====


LINES = [{"step": n, "loss": 10.0 - n / 10} for n in range(1, 51)] + [
    {"step": 50, "val_loss": 7.0},
    {"step": 7, "loss": math.nan},
]


def test_the_curve_falls_from_left_to_right():
    *rows, axis = curve.draw(LINES, width=50, height=10)
    assert len(rows) == 10 and rows[0].startswith("9.90 │·") and rows[-1].startswith("5.00 │") and rows[-1].endswith("·")
    assert "step 1" in axis and axis.endswith("50")
    heights = [next(n for n, row in enumerate(rows) if len(row) > column and row[column] == "·") for column in range(6, 50)]
    assert heights == sorted(heights) and heights[0] == 0
    assert sum(row.count("○") for row in rows) == 1 and rows[5].endswith("○")
    assert curve.draw([]) == curve.draw(LINES[:1]) == []
    strange = [{"step": 10**400, "loss": 1.0}, {"step": -1, "loss": 2.0}, {"step": 3, "loss": 1e308}, {"step": 4, "loss": "x"}]
    assert curve.draw(LINES + strange, width=50, height=10) == [*rows, axis]
    assert len(curve.draw([{"step": n, "loss": 2.0} for n in (1, 2)])) == 13  # a flat one


def test_the_curve_as_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert curve.save(LINES, tmp_path / "loss.png") and (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not curve.save(LINES[:1], tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not curve.save(LINES, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_a_run_ends_with_its_curve_its_best_checkpoint_and_tensorboard(text_file, gpt2, monkeypatch):
    command = ["train", text_file, *QUICK, "--steps", 4, "--eval-every", 2, "--save-every", 2]
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = gpt2(*command, "--out", "run", "--log", "tensorboard")
    assert done.code == 0 and done.out == "run\n" and " │" in done.err and "best checkpoint: run/step-00000" in done.err
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    logged = [line for line in metrics.read(Path("run")) if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in logged])
    assert [event.step for event in events.Scalars("val_loss")] == [2, 4] and events.Scalars("memory")[-1].value > 1e8
    gpt2("train", "--resume", "--out", "run", "--steps", 6, "--log", "tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert "--log wandb is unknown" in gpt2(*command, "--out", "other", "--log", "wandb").err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = gpt2(*command, "--out", "other", "--log", "tensorboard")
    assert done.code == 1 and "pip install tensorboard" in done.err and not os.path.exists("other")
