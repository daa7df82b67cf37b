"""A run that was killed, that met a full disk, or whose files were changed goes on as the run that would have been, or says
why not. The long forms, of tests/crash.py: pytest -m long."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from gpt2cli import GPT, TrainConfig, UserError, atomic, checkpoint, device, make_plan, metrics, train
from gpt2cli.guard import WINDOW, Guard
from gpt2cli.resume import resume_plan
from gpt2cli.run import Run
from gpt2cli.step import train_step
from gpt2cli.verify import verify_resume

from .conftest import QUICK, make_model
from .test_train import SHAPE, new_plan, same, weights

HOUSE = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "gpt2cli"]


def crash(*arguments):
    command = [sys.executable, "-m", "tests.crash", *map(str, arguments)]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


LONG = pytest.mark.long


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("count", [10, pytest.param(100, marks=LONG)])
def test_killed_at_random_instants_it_goes_on_bit_for_bit(count):
    found, err = crash("kills", count)
    assert found["kills"] >= count and found["with_checkpoints"] > count // 3, found
    assert found["torn"] == found["lost"] == found["wrong"] == 0, (found, err)


def test_a_disk_that_is_full_at_any_write_call_loses_no_checkpoint():
    found, err = crash("disk")
    assert found["went_on"] > 100 and found["stopped"] > 100, found
    assert found["tracebacks"] == found["lost"] == found["wrong"] == 0, (found, err)


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=LONG)])
def test_changed_files_are_noticed(count):
    found, err = crash("mutations", count)
    assert found["mutations"] > 0.9 * count and found["refused"] > 0.05 * count and found["went_on"] > 0.5 * count, found
    assert found["tracebacks"] == found["wrong"] == found["silent"] == 0, (found, err)


# ==== the seal, the lock ====


def test_every_flipped_bit_of_a_sealed_file_is_noticed_and_its_owner_can_break_the_seal(tmp_path):
    path = tmp_path / "facts.json"
    atomic.write_sealed(path, {"loss": 1.5, "name": "käse", "list": [1, 2]})
    assert atomic.read_sealed(path) == {"loss": 1.5, "name": "käse", "list": [1, 2]}
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with pytest.raises(UserError, match=r"facts\.json"):
            atomic.read_sealed(path, required=True)
    lines = data.decode().replace("1.5", "2.5").splitlines()
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="delete its line"):
        atomic.read_sealed(path)
    path.write_text("\n".join(lines[:1] + lines[2:]))
    assert atomic.read_sealed(path)["loss"] == 2.5


def test_two_processes_on_one_run_the_second_is_refused_and_a_kill_leaves_no_lock(gpt2, text_file):
    command = [*PROGRAM, "train", str(text_file), *QUICK, "--steps", "100000", "--save-every", "2", "--out", "run"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not checkpoint.checkpoints(Path("run")):
            assert first.poll() is None
            time.sleep(0.05)
        for again in (["--resume", "--out", "run"], [text_file, *QUICK, "--out", "run"]):
            refused = gpt2("train", *again)
            assert refused.code == 1 and ("another gpt2 process" in refused.err or "already holds a run" in refused.err)
        assert f"number {first.pid}" in gpt2("train", "--resume", "--out", "run").err
    finally:
        first.kill()
        first.wait()
    step = checkpoint.step_of(checkpoint.checkpoints(Path("run"))[0])
    assert gpt2("train", "--resume", "--out", "run", "--steps", step + 1, "--save-every", 0).code == 0


def test_a_run_that_got_further_between_plan_and_lock_is_not_overwritten(text_file):
    plan = new_plan(text_file, "run", steps=2)
    list(train(plan))
    with pytest.raises(UserError, match="already holds a run"):
        list(train(plan))
    late = resume_plan(Path("run"), {"steps": 6})
    list(train(resume_plan(Path("run"), {"steps": 4})))
    with pytest.raises(UserError, match="has got to step-000004"):
        list(train(late))


# ==== stopping ====


def test_max_minutes_saves_and_stops_as_sigterm_does(gpt2, text_file):
    done = gpt2("train", text_file, *QUICK, "--steps", 100000, "--max-minutes", 0.02, "--out", "run")
    assert done.code == 143 and done.out == "run\n" and "--resume" in done.err
    assert "stopped by --max-minutes 0.02 after step" in done.err
    (saved,) = checkpoint.checkpoints(Path("run"))
    steps = [line["step"] for line in metrics.read(Path("run")) if "loss" in line]
    assert steps == list(range(1, checkpoint.step_of(saved) + 1))


def test_a_limit_that_is_over_before_the_first_step_still_gets_somewhere(gpt2, text_file):
    for step in (1, 2):
        done = gpt2("train", text_file, *QUICK, "--steps", 3, "--max-minutes", 0, "--out", "run", "--resume")
        assert done.code == 143 and f"stopped by --max-minutes 0 after step {step}, which is saved" in done.err
    assert gpt2("train", "--max-minutes", 0, "--out", "run", "--resume").code == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_second_interrupt_leaves_at_once_and_safely(gpt2, text_file):
    # A save that takes an hour: the second signal must not wait for it.
    slow = "import sys, time; from gpt2cli import atomic; from gpt2cli.commands import app; seal = atomic.seal\n"
    slow += "atomic.seal = lambda *a: seal(*a) if a[1]['step'] == 2 else time.sleep(3600)\nsys.exit(app.run(sys.argv[1:]))"
    command = ["train", str(text_file), *QUICK, "--steps", "1000", "--save-every", "2", "--eval-every", "0", "--out", "run"]
    process = subprocess.Popen([sys.executable, "-c", slow, *command], stderr=subprocess.PIPE, text=True)
    while not list(Path("run").glob(".step-000004*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    while "finishing this step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert gpt2("train", "--resume", "--out", "run", "--steps", 4).code == 0
    assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["step-000004", "step-000002"]


def test_training_goes_on_while_a_checkpoint_is_written(text_file, monkeypatch):
    write, seen, written_after = checkpoint.write, [], []

    def slow(run, state):
        end = time.monotonic() + 20
        while state.progress.step == 5 and len(seen) < 9 and time.monotonic() < end:  # steps trained meanwhile
            time.sleep(0.01)
        written_after.append((state.progress.step, len(seen)))
        return write(run, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", slow)
        for step in train(new_plan(text_file, "run", eval_every=0)):
            seen.append(step)
    assert seen[4].saved == Path("run/step-000005") and written_after[0] == (5, 9)
    list(
        train(new_plan(text_file, "five", steps=10, eval_every=0), should_stop=lambda: len(list(Path().glob("five/step*"))) > 0)
    )
    assert same(weights("run/step-000005"), weights("five/step-000005")), "a snapshot is of its own step"


# ==== going on ====


def test_changed_options_are_listed_and_another_save_cadence_or_micro_batch_is_the_same_run(text_file):
    whole = list(train(new_plan(text_file, "whole", shape=SHAPE | {"dropout": 0.1})))
    for metrics_ in train(new_plan(text_file, "run", shape=SHAPE | {"dropout": 0.1})):
        if metrics_.step == 6:
            break
    plan = resume_plan(Path("run"), {"save_every": 3, "log_every": 2})
    assert {"save_every changed from 5 to 3", "log_every changed from 1 to 2"} <= set(plan.notes)
    rest = list(train(plan))
    assert same(weights("whole/step-000010"), weights("run/step-000010")) and rest[-1].loss == whole[-1].loss
    record = atomic.read_sealed(Path("run/run.json"))
    assert [s["from_step"] for s in record["sessions"]] == [0, 5] and record["sessions"][1]["changed"]["save_every"] == [5, 3]

    smaller = resume_plan(Path("run"), {"batch_size": 1, "steps": 12})
    assert smaller.accumulation == 4 and "batch_size changed from 2 to 1" in smaller.notes
    same_rows = list(train(smaller))[-1].loss
    assert same_rows == pytest.approx(list(train(resume_plan(Path("whole"), {"steps": 12})))[-1].loss, abs=0.2)
    with pytest.raises(UserError, match="--batch-size 3"):
        resume_plan(Path("run"), {"batch_size": 3})


def test_another_torch_and_a_changed_log_are_told(text_file):
    list(train(new_plan(text_file, "run", steps=2)))
    path = Path("run/run.json")
    record = atomic.read_sealed(path)
    record["sessions"][0]["made_with"]["torch"] = "1.0"
    atomic.write_sealed(path, record)
    log = Path("run/metrics.jsonl")
    log.write_text(log.read_text().replace('"step": 1', '"step":  1'))
    notes = "\n".join(resume_plan(Path("run"), {}).notes)
    assert "torch was 1.0" in notes and "metrics.jsonl was changed" in notes


def test_run_json_says_what_is_needed_to_repeat_it_and_no_home(text_file, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    plan = make_plan(text_file, SHAPE, TrainConfig(seq_len=32, steps=1), out=Path("run"), cache=tmp_path / "cache")
    list(train(plan))
    record = atomic.read_sealed(Path("run/run.json"))
    assert record["data"]["given"] == "~/input.txt" and record["data"]["tokens"].startswith("~/cache/")
    assert str(tmp_path) not in Path("run/run.json").read_text()
    made_with = record["sessions"][0]["made_with"]
    assert torch.__version__.startswith(made_with["torch"])
    assert {"gpt2cli", "commit", "python", "numpy", "tiktoken", "safetensors", "platform", "device"} <= set(made_with)
    assert resume_plan(Path("run"), {"steps": 2}).sources == plan.sources


def test_verify_resume_proves_it_and_finds_what_is_not_so(gpt2, text_file, monkeypatch):
    done = gpt2("train", text_file, *QUICK, "--dropout", 0.1, "--verify-resume", "--out", "run")
    assert done.code == 0 and done.out == "" and "proved: 6 steps equal 3 steps, a resume and 3 steps" in done.err
    assert not Path("run").exists() and not list(Path().glob(".verify*"))
    list(train(new_plan(text_file, "old", steps=4)))
    assert verify_resume(resume_plan(Path("old"), {"steps": 9})).different == ()
    with pytest.raises(UserError, match="1 steps are left"):
        verify_resume(resume_plan(Path("old"), {"steps": 5}))
    with monkeypatch.context() as patch:
        patch.setattr(device, "seed_step", lambda seed, step, rank: None)
        done = gpt2("train", text_file, *QUICK, "--dropout", 0.1, "--verify-resume", "--out", "run")
    assert done.code == 1 and "tensors differ" in done.err


def test_a_cache_that_was_damaged_is_made_anew_and_damaged_shards_are_refused(gpt2, text_file, tmp_path):
    cache = tmp_path / "cache"
    plan = make_plan(text_file, SHAPE, TrainConfig(seq_len=32), out=Path("a"), cache=cache)
    (shard,) = plan.sources[0].tokens.glob("train*.bin")
    good = shard.read_bytes()
    for damaged in (good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], good[:-2], None):
        if damaged is None:
            (shard.parent / "manifest.json").unlink()
        else:
            shard.write_bytes(damaged)
        assert make_plan(text_file, SHAPE, TrainConfig(seq_len=32), out=Path("b"), cache=cache).data_sha256 == plan.data_sha256
        assert shard.read_bytes() == good
    assert gpt2("tokenize", text_file, "--out", "tokens").code == 0
    Path("tokens/train_000000.bin").write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    done = gpt2("train", "tokens", *QUICK, "--out", "c")
    assert done.code == 1 and "train_000000.bin changed since it was tokenized" in done.err


# ==== memory, divergence ====


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_with_settings_that_fit_and_the_run_goes_on_with_them(gpt2, text_file, monkeypatch, error):
    forward = GPT.forward

    def full(self, x, *args, **more):
        if self.training and x.shape[0] > 2:
            raise error
        return forward(self, x, *args, **more)

    monkeypatch.setattr(GPT, "forward", full)
    done = gpt2("train", text_file, *QUICK, "--steps", 2, "--out", "run")
    assert done.code == 1 and "out of memory at step 1" in done.err and "--resume --out run --batch-size 2" in done.err
    assert gpt2("train", "--resume", "--out", "run", "--batch-size", 2).code == 0


def test_the_guard_judges_numbers_that_are_not_finite_and_spikes():
    guard = Guard(torch.device("cpu"), spike=8.0)
    draw = torch.Generator().manual_seed(0)

    def judge(loss, norm=1.0):
        return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))

    assert judge(float("nan")) and judge(1.0, float("inf")) and int(guard.skipped) == int(guard.in_a_row) == 2
    assert not judge(1e6), "no spike before the window is full"
    for _ in range(2 * WINDOW):
        noise = torch.randn(2, generator=draw).tolist()
        assert not judge(3.0 + 0.05 * noise[0], 1.0 + 0.1 * noise[1])
    assert int(guard.in_a_row) == 0
    window = guard.history.clone()
    assert judge(3.6) and judge(3.0, 3.0) and int(guard.in_a_row) == 2
    assert torch.equal(guard.history, window), "bad updates do not shift what is normal"
    assert not judge(3.2) and not judge(1.0), "a lower loss is never bad"
    off = Guard(torch.device("cpu"), spike=0.0)
    assert not any(bool(off.judge(torch.tensor(loss), torch.tensor(1.0))) for loss in [3.0] * 200 + [1e9])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_refused_update_leaves_weights_and_optimizer_as_they_were(name):
    from gpt2cli.optim import make_optimizers

    model = make_model()
    optimizers = make_optimizers(model, name, 0.1)
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(0))
    guard = Guard(torch.device("cpu"))

    def state():
        moments = [value for o in optimizers for values in o.state.values() for value in values.values()]
        return [tensor.clone() for tensor in (*model.parameters(), *moments)]

    def update():
        train_step(model, optimizers, [(ids[:, :-1], ids[:, 1:])], lr=1e-2, grad_clip=1.0, guard=guard)

    update()
    before = state()
    hook = model.ln_f.weight.register_hook(lambda grad: grad * float("nan"))
    update()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)) and int(guard.skipped) == 1
    hook.remove()
    update()
    after = state()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.dim() == 2)


def poisoned(monkeypatch, when):
    """Make the loss not a number at the rows of the loader for which `when(position)` holds."""
    from gpt2cli.data import DataLoaderLite

    row = DataLoaderLite.row
    forward = GPT.forward

    def marked(self, k):
        ids = row(self, k)
        return -1 - ids if when(k) else ids  # negative ids: told to `forward`

    def bad(self, x, y=None, **more):
        good = (x >= 0).all()
        logits, loss = forward(self, x.where(x >= 0, -1 - x), None if y is None else y.where(y >= 0, -1 - y), **more)
        return logits, None if loss is None else loss * torch.where(good, 1.0, torch.nan)

    monkeypatch.setattr(DataLoaderLite, "row", marked)
    monkeypatch.setattr(GPT, "forward", bad)


def test_one_bad_batch_is_skipped_and_told(text_file, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch, lambda k: k == 4 * 4)  # a row of step 5
        steps = list(train(new_plan(text_file, "run")))
    assert steps[-1].step == 10 and len([s for s in steps if s.loss != s.loss]) == 1
    (told,) = [s.events for s in steps if s.events]
    assert told[0].startswith("step 5: 1 update skipped, loss nan")
    lines = metrics.read(Path("run"))
    assert [line["loss"] for line in lines if line["step"] == 5 and "loss" in line] == [None]
    assert [line["skipped"] for line in lines if line.get("event") == "skipped"] == [1]
    assert "NaN" not in Path("run/metrics.jsonl").read_text()


def test_updates_that_stay_bad_roll_back_to_other_data_and_a_kill_in_between_changes_nothing(text_file, monkeypatch):
    poisoned(monkeypatch, lambda k: 7 * 4 <= k < 10 * 4)  # steps 8, 9 and 10 of the first attempt
    whole = list(train(new_plan(text_file, "whole", steps=14)))
    rollbacks = [event for s in whole for event in s.events if "back to step 5" in event]
    assert len(rollbacks) == 1 and [s.step for s in whole] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 5, *range(6, 15)]
    logged = [line["step"] for line in metrics.read(Path("whole")) if "loss" in line]
    assert logged == list(range(1, 15))
    for stop in (7, 9, 10, 12):  # yields: before the bad steps, among them, at the rollback, after it
        for saves in (False, True):
            out, seen = f"ended-{stop}-{saves}", []
            for step in train(new_plan(text_file, out, steps=14), should_stop=lambda: saves and len(seen) == stop):  # noqa: B023
                seen.append(step)
                if len(seen) == stop and not saves:
                    break
            list(train(resume_plan(Path(out), {})))
            assert same(weights("whole/step-000014"), weights(f"{out}/step-000014")), out
            assert [line["step"] for line in metrics.read(Path(out)) if "loss" in line] == logged


def test_two_rollbacks_leave_no_checkpoint_of_the_way_given_up_and_a_stop_after_them_changes_nothing(text_file, monkeypatch):
    poisoned(monkeypatch, lambda k: 6 * 4 <= k < 12 * 4)  # three steps, and three more after the first rollback
    config = {"steps": 14, "save_every": 2, "eval_every": 0}
    whole = list(train(new_plan(text_file, "whole", **config)))
    told = [event.split("back to ")[1][:6] for s in whole for event in s.events if "back to" in event]
    assert told == ["step 6", "step 4"]
    seen = []
    for step in train(new_plan(text_file, "stopped", **config), should_stop=lambda: len(seen) == 13):
        seen.append(step)
    assert seen[-1].step == 5 and max(map(checkpoint.step_of, checkpoint.checkpoints(Path("stopped")))) == 5
    list(train(resume_plan(Path("stopped"), {})))
    assert same(weights("whole/step-000014"), weights("stopped/step-000014"))


def test_with_no_checkpoint_left_to_trust_a_run_stops_instead_of_starting_over(text_file, monkeypatch):
    poisoned(monkeypatch, lambda k: k >= 8 * 4)
    with pytest.raises(UserError, match="diverged at step"):
        list(train(new_plan(text_file, "run", steps=40, save_every=4, eval_every=0, max_rollbacks=100)))
    assert checkpoint.checkpoints(Path("run")) and len(metrics.read(Path("run"))) >= 4


def test_a_save_that_was_due_while_an_update_was_refused_is_done_at_the_next_good_one(text_file, monkeypatch):
    poisoned(monkeypatch, lambda k: k == 4 * 4)  # step 5
    saved = [s.saved.name for s in train(new_plan(text_file, "run", eval_every=0)) if s.saved]
    assert saved == ["step-000006", "step-000010"]


def test_evaluations_that_come_faster_than_saves_find_their_checkpoints(text_file, monkeypatch):
    write = checkpoint.write

    def slow(run, state):
        time.sleep(0.3)
        return write(run, state)

    losses = iter([9.0, 1.0, *[3.0 + n / 10 for n in range(20)]])
    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr("gpt2cli.run.validate", lambda *_: (next(losses), None))
    list(train(new_plan(text_file, "run", steps=12, eval_every=1, save_every=2)))
    assert checkpoint.best(Path("run")).name == "step-000002"


def test_a_slow_disk_or_a_full_one_holds_one_copy_of_the_state_at_a_time(text_file, monkeypatch):
    write, snapshot, copies, alive = checkpoint.write, checkpoint.snapshot, [], []

    def slow(run, state):
        time.sleep(0.3)
        if state.progress.step == 2:
            raise OSError(28, "No space left on device")
        return write(run, state)

    def counted(*arguments):
        alive.append(sum(copy() is not None for copy in copies))
        state = snapshot(*arguments)
        copies.append(weakref.ref(state))
        return state

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(checkpoint, "snapshot", counted)
    list(train(new_plan(text_file, "run", steps=4, eval_every=0, save_every=1)))
    assert alive == [0, 0, 0, 0]


def test_an_evaluation_that_found_the_disk_full_is_written_with_the_next_save(text_file, monkeypatch):
    write, failed = checkpoint.write_evaluation, []

    def fails_once(folder, *values):
        if not failed:
            failed.append(folder.name)
            raise OSError(28, "No space left on device")
        write(folder, *values)

    monkeypatch.setattr(checkpoint, "write_evaluation", fails_once)
    list(train(new_plan(text_file, "run")))
    assert failed == ["step-000005"] and checkpoint.evaluation(Path("run/step-000005"))["val_loss"] > 0


def test_a_save_that_failed_while_the_run_was_stopped_is_followed_by_one_that_stands(text_file, monkeypatch):
    write, failed = checkpoint.write, []

    def fails_once(run, state):
        if not failed:
            failed.append(state.progress.step)
            time.sleep(0.5)
            raise OSError(28, "No space left on device")
        return write(run, state)

    monkeypatch.setattr(checkpoint, "write", fails_once)
    done = []
    for step in train(new_plan(text_file, "run", save_every=2, eval_every=0), should_stop=lambda: len(done) == 3):
        done.append(step)
    assert failed == [2] and [p.name for p in checkpoint.checkpoints(Path("run"))] == ["step-000003"]


@pytest.mark.parametrize("back", [True, False])
def test_a_run_folder_that_is_moved_is_told_and_nothing_made_in_its_place(gpt2, text_file, monkeypatch, back):
    step = Run.step

    def moved(self):
        step(self)
        if self.progress.step == 3:
            Path("run").rename("away")
        if self.progress.step == 8 and back:
            Path("away").rename("run")

    monkeypatch.setattr(Run, "step", moved)
    monkeypatch.setattr("gpt2cli.writer.RETRY_SECONDS", 0.0)
    done = gpt2("train", text_file, *QUICK, "--steps", 10, "--save-every", 2, "--eval-every", 0, "--out", "run")
    assert "could not save: run is gone: put it back; " in done.err
    if back:
        assert done.code == 0 and "saved after all" in done.err and checkpoint.is_whole(Path("run/step-000010"))
        assert [line["step"] for line in metrics.read(Path("run")) if "loss" in line] == list(range(1, 11))
    else:
        assert done.code == 1 and "error: run is gone: put it back" in done.err and not Path("run").exists()
        assert "free some space" not in done.err


def test_nothing_is_made_in_the_place_of_a_run_folder_that_is_moved_while_a_checkpoint_is_written(gpt2, text_file, monkeypatch):
    write = checkpoint.write_safetensors

    def moved(path, tensors):
        write(path, tensors)
        if Path("run/step-000002").exists():
            Path("run").rename("away")

    monkeypatch.setattr(checkpoint, "write_safetensors", moved)
    done = gpt2("train", text_file, *QUICK, "--steps", 4, "--save-every", 2, "--eval-every", 0, "--out", "run")
    assert done.code == 1 and "error: run is gone: put it back" in done.err and not Path("run").exists()
    assert [p.name for p in checkpoint.checkpoints(Path("away"))] == ["step-000002"]


def test_a_disk_that_may_not_be_written_is_no_full_disk_and_not_waited_for(gpt2, text_file, monkeypatch):
    def forbidden(run, state):
        raise PermissionError(13, "Permission denied", str(run))

    monkeypatch.setattr(checkpoint, "write", forbidden)
    done = gpt2("train", text_file, *QUICK, "--steps", 2, "--out", "run")
    assert done.code == 1 and done.err.splitlines()[-1] == "error: run: Permission denied" and "free some" not in done.err


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread")
def test_a_run_that_may_not_change_its_niceness_saves_all_the_same(text_file, monkeypatch):
    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", forbidden)
    list(train(new_plan(text_file, "run", steps=2)))
    assert checkpoint.is_whole(Path("run/step-000002"))


def test_a_fine_tuning_that_was_killed_before_its_first_checkpoint_wants_the_same_model(run_folder, text_file):
    import shutil

    shutil.copytree(checkpoint.find_model(str(run_folder)), "model")
    config = TrainConfig(seq_len=32, batch_size=2, steps=4, eval_every=0)
    for _ in train(make_plan(text_file, {}, config, init_from="model", out=Path("run"))):
        break
    assert not checkpoint.checkpoints(Path("run")) and not resume_plan(Path("run"), {}).resume_from
    make_model(vocab_size=50257).save_pretrained("model")
    with pytest.raises(UserError, match="is not the model it was started from"):
        resume_plan(Path("run"), {})


def test_a_file_name_that_is_not_unicode_is_no_obstacle(text_file):
    name = os.fsdecode(b"bad\xff.txt")
    try:
        text_file.rename(name)
    except OSError:
        pytest.skip("this file system has only unicode names")
    list(train(new_plan(name, "run", steps=1)))
    assert resume_plan(Path("run"), {"steps": 2}).sources[0].given == name


def test_a_run_that_diverges_again_and_again_stops_with_the_facts(gpt2, text_file, monkeypatch):
    poisoned(monkeypatch, lambda k: k >= 8 * 4)
    done = gpt2("train", text_file, *QUICK, "--steps", 40, "--save-every", 2, "--max-rollbacks", 2, "--out", "run")
    error = done.err.splitlines()[-1]
    assert done.code == 1 and "diverged at step" in error and "2 rollbacks of 2" in error and "--init-from run" in error
    assert all(checkpoint.is_whole(folder) for folder in checkpoint.checkpoints(Path("run")))
    assert done.err.count("note: diverged") == 2


def test_a_learning_rate_that_is_absurd_is_said_within_seconds(gpt2, text_file, monkeypatch):
    assert "with which nothing can be learned" in gpt2("train", text_file, *QUICK, "--lr", 1e30).err
    monkeypatch.setattr("gpt2cli.run.planned_lr", lambda step, config: 1e30)  # one that only the training finds out
    options = ("--warmup-steps", 0, "--optimizer", "adamw", "--grad-clip", 1e30, "--steps", 1000)
    done = gpt2("train", text_file, *QUICK, *options, "--out", "run")
    assert done.code == 1 and "lower --lr" in done.err.splitlines()[-1] and "diverged at step" in done.err
