"""What a run that goes on says, keeps and remembers."""

import itertools
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2cli import UserError, atomic, checkpoint, metrics, train, writer
from gpt2cli.resume import resume_plan

from .conftest import QUICK
from .test_train import new_plan


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    return Path("run")


# ==== damaged checkpoints ====


def test_a_damaged_checkpoint_is_set_aside_and_takes_no_good_ones_place(gpt2, run):
    damage(run / "step-000008" / "training.safetensors")
    dry = gpt2("train", "--resume", "--out", run, "--dry-run")
    assert dry.code == 0 and (run / "step-000008").is_dir(), "a dry run changes nothing"
    options = ("--steps", 10, "--save-every", 3, "--eval-every", 0)
    done = gpt2("train", "--resume", "--out", run, *options)
    assert done.code == 0 and "goes on after step 4, from run/step-000004" in done.err
    assert "skipping run/step-000008: " in done.err and "torn" not in done.err
    assert "run/step-000008 is damaged and will be set aside as step-000008.damaged" in done.err
    assert [p.name for p in checkpoint.checkpoints(run)][:2] == ["step-000010", "step-000009"]
    assert (run / "step-000008.damaged").is_dir() and not checkpoint.is_whole(run / "step-000008.damaged")


def test_after_a_stop_past_a_damaged_checkpoint_the_good_one_it_went_on_from_is_kept(text_file):
    list(train(new_plan(text_file, "run", steps=8, save_every=4, eval_every=0)))
    damage(Path("run/step-000008/model.safetensors"))
    done = []
    for step in train(resume_plan(Path("run"), {}), should_stop=lambda: len(done) == 3):  # 5, 6, 7
        done.append(step)
    list(train(resume_plan(Path("run"), {"steps": 9, "save_every": 0})))
    kept = checkpoint.checkpoints(Path("run"))
    assert [p.name for p in kept] == ["step-000009", "step-000004"] and all(map(checkpoint.is_whole, kept))
    damage(Path("run/step-000009/model.safetensors"))
    shutil.copytree("run/step-000009", "run/step-000009.damaged")
    list(train(resume_plan(Path("run"), {})))
    assert Path("run/step-000009.damaged1").is_dir(), "one that was set aside before stays"


def test_a_run_whose_best_checkpoint_is_damaged_names_a_whole_one(gpt2, run):
    damage(run / "step-000008" / "model.safetensors")
    for name in (run, run / "step-000008"):
        done = gpt2("sample", name, "--prompt", "x")
        assert done.code == 1 and "run/step-000004 is whole" in done.err.splitlines()[-1]
    damage(run / "step-000008" / "evaluation.json")
    assert "run/step-000004 is whole" in gpt2("sample", run, "--prompt", "x").err
    damage(run / "step-000004" / "config.json")
    with pytest.raises(UserError, match=r"(?!.*is whole).*changed"):
        checkpoint.load(str(run))


# ==== what is told ====


def test_another_number_of_steps_tells_how_the_learning_rate_jumps(text_file):
    list(train(new_plan(text_file, "run", steps=6, lr=3e-3, save_every=4, eval_every=0)))
    (told,) = [note for note in resume_plan(Path("run"), {"steps": 12}).notes if "steps changed" in note]
    start = "steps changed from 6 to 12: the learning rate of step 7 is "
    assert told.startswith(start) and told.endswith(", where the old schedule ended at 3.0e-04")
    first = next(train(resume_plan(Path("run"), {"steps": 12})))
    assert f"{first.lr:.1e}" == told.removeprefix(start).split(",")[0] != "3.0e-04"
    shutil.rmtree("run/step-000006")
    fewer = resume_plan(Path("run"), {"steps": 5})
    (told,) = [note for note in fewer.notes if "steps changed" in note]
    assert "the learning rate of step 5 is 3.0e-04, where the old schedule had " in told
    (told,) = [note for note in resume_plan(Path("run"), {"steps": 4}).notes if "steps changed" in note]
    assert told == "steps changed from 12 to 4", "no step is left"


def test_fewer_steps_have_a_shorter_warm_up_unless_one_was_asked_for(text_file):
    for out, asked in (("run", {}), ("asked", {"warmup_steps": 50})):
        stopped = itertools.islice(train(new_plan(text_file, out, steps=2000, save_every=2, eval_every=0, **asked)), 2)
        assert len(list(stopped)) == 2
        plan = resume_plan(Path(out), {"steps": 40})
        assert plan.train.warmup_steps == (2 if not asked else 50)
    assert resume_plan(Path("run"), {"steps": 4000}).train.warmup_steps == 100


def test_small_sizes_are_not_shown_as_nothing(text_file, monkeypatch):
    plan = new_plan(text_file, "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=70_000_000))
    assert any("70.0 MB free, but the checkpoints may need 98.1 MB" in note for note in new_plan(text_file, "run").notes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(UserError, match=r"has 2\.0 MB free, but one checkpoint needs 19\.6 MB"):
        new_plan(text_file, "run")
    assert re.search(r"about \d+\.\d MB\. --batch-size 1 needs about \d+\.\d MB", plan.out_of_memory(1))


def test_resuming_a_run_that_is_not_there_needs_an_input(gpt2, text_file):
    done = gpt2("train", "--resume", "--out", "runs/typo")
    assert done.code == 1 and done.err == "error: runs/typo holds no run: give INPUT to start one there\n"
    for name in ("runs/mine", "elsewhere/other"):
        assert gpt2("train", text_file, *QUICK, "--steps", 1, "--out", name, "--resume").code == 0
    assert "name one of: runs/mine\n" in gpt2("train", "--resume", "--out", "runs/typo").err
    assert "name one of: elsewhere/other, runs/mine\n" in gpt2("train", "--resume", "--out", "elsewhere/typo").err
    assert not Path("runs/typo").exists()


def test_other_data_is_told_from_data_that_changed(gpt2, text_file):
    cache = ("--cache-dir", "cache")
    assert gpt2("train", text_file, *QUICK, *cache, "--steps", 1, "--out", "run").code == 0
    Path("other.txt").write_text("Something else. " * 5000)
    resume = ("--resume", "--out", "run", *cache)
    done = gpt2("train", "other.txt", *resume)
    assert done.code == 1 and f"error: other.txt is not the data run was trained on ({text_file}): leave INPUT" in done.err
    text_file.write_text(text_file.read_text() + "more")
    assert gpt2("train", *resume, "--steps", 2).code == 0, "what was tokenized before is still in the cache"
    shutil.rmtree("cache")
    for given in ((), ("input.txt",)):
        done = gpt2("train", *given, *resume)
        assert done.code == 1 and f"error: {text_file} is no longer the data run was trained on: start a new" in done.err


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_save_that_waits_for_the_disk_is_told_once_and_when_it_is_there(text_file, monkeypatch, at_the_end):
    write, tries = checkpoint.write, []

    def full(run, state):
        tries.append(state.progress.step)
        if len(tries) <= 4:
            raise OSError(28, "No space left on device")
        return write(run, state)

    monkeypatch.setattr(checkpoint, "write", full)
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.0)
    config = {"steps": 20, "save_every": 20 if at_the_end else 2, "eval_every": 0}
    events = []
    for step in train(new_plan(text_file, "run", **config)):
        time.sleep(0.02)  # for the disk
        events += step.events
    assert len(tries) >= 5 and (tries[4] == 20) == at_the_end
    failed, *waits, saved = events
    assert failed.startswith("could not save") and saved == "saved after all" and len(waits) == at_the_end
    kinds = ["save failed", *["waits"] * at_the_end, "saved"]
    assert sorted(line["event"] for line in metrics.read(Path("run")) if "event" in line) == sorted(kinds)


# ==== what is remembered ====


def test_the_prompt_of_samples_is_remembered_and_may_be_changed(gpt2, text_file):
    options = (*QUICK, "--steps", 1, "--sample-every", 1, "--sample-prompt", "KING.", "--out", "run")
    assert "--- step 1 ---\nKING." in gpt2("train", text_file, *options).err
    assert "--- step 2 ---\nKING." in gpt2("train", "--resume", "--out", "run", "--steps", 2).err
    changed = gpt2("train", "--resume", "--out", "run", "--steps", 3, "--sample-prompt", "O\n")
    assert "sample_prompt changed from 'KING.' to 'O\\n'" in changed.err and "--- step 3 ---\nO\n" in changed.err
    assert "--- step 1 ---\nO\n" in gpt2("train", "--config", "run/run.json", "--steps", 1, "--out", "again").err


def test_an_extended_run_is_repeated_with_its_last_settings_and_says_which_session_changed_what(gpt2, text_file):
    assert gpt2("train", text_file, *QUICK, "--steps", 2, "--out", "run").code == 0
    assert gpt2("train", "--resume", "--out", "run", "--steps", 4, "--save-every", 3).code == 0
    record = atomic.read_sealed(Path("run/run.json"))
    assert record["asked"]["steps"] == 2 and record["train"]["steps"] == 4
    assert [s["changed"] for s in record["sessions"]] == [{}, {"steps": [2, 4], "save_every": [100, 3]}]
    done = gpt2("train", "--config", "run/run.json", "--out", "again")
    assert done.code == 0 and "step 4/4" in done.err
    again = atomic.read_sealed(Path("again/run.json"))
    assert again["train"] == record["train"] and again["asked"]["steps"] == 4
