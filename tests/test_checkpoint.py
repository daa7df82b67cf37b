import json
import os
import shutil

import pytest
import torch

from gpt2cli import atomic, checkpoint, device
from gpt2cli.errors import UserError
from gpt2cli.model import GPT


@pytest.fixture
def run(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_holds_these_files(run_folder):
    assert sorted(p.name for p in run_folder.iterdir() if p.name != "loss.png") == [
        ".lock", "metrics.jsonl", "run.json", "step-000004", "step-000008"]  # fmt: skip
    assert sorted(p.name for p in (run_folder / "step-000008").iterdir()) == [
        "checkpoint.json", "config.json", "evaluation.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.json", "training.safetensors"]  # fmt: skip


def test_who_may_read_the_weights_may_resume(run_folder):
    modes = {path.name: path.stat().st_mode for path in (run_folder / "step-000008").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_transformers_loads_a_trained_checkpoint_as_it_is(run_folder, shakespeare):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = checkpoint.load(str(run_folder))
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    model = AutoModelForCausalLM.from_pretrained(loaded.folder).eval()
    text = shakespeare[1000:1060]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == loaded.encoding.encode(text)
    assert (model(ids).logits - loaded.model(ids)[0]).abs().max() < 1e-4


def test_no_path_of_the_machine_is_in_a_checkpoint(run_folder):
    for path in (run_folder / "step-000008").glob("*.json"):
        if path.name != "tokenizer.json":
            assert str(run_folder.parent) not in path.read_text() and os.path.expanduser("~") not in path.read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.safetensors"])
def test_any_flipped_byte_is_noticed(run, name):
    path = run / "step-000008" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="changed since gpt2 wrote it"):
        if name.startswith("training"):
            atomic.check_seal(run / "step-000008")
        else:
            checkpoint.load(str(run / "step-000008"))
    skipped = []
    assert checkpoint.latest(run, skipped.append) == run / "step-000004"
    assert len(skipped) == 1 and "step-000008" in skipped[0]


def test_a_changed_folder_is_used_when_its_owner_deleted_the_seal(run):
    folder = run / "step-000008"
    config = json.loads((folder / "config.json").read_text()) | {"note": "mine"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        GPT.from_pretrained(folder)
    (folder / "checkpoint.json").unlink()
    assert GPT.from_pretrained(folder).config.n_layer == 2


def test_a_run_means_its_best_checkpoint_and_prune_keeps_it_and_the_newest_two(run):
    assert checkpoint.find_model(str(run)) == run / "step-000008"  # a run that learns gets better
    checkpoint.write_evaluation(run / "step-000008", 99.0, None)
    assert checkpoint.find_model(str(run)) == run / "step-000004"
    for step in (9, 10, 11):
        shutil.copytree(run / "step-000008", run / f"step-{step:06d}")
    checkpoint.prune(run, 10)  # 11 is not of this run: it is torn, or from before a rollback
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(run)] == [11, 10, 9, 4]


def test_an_evaluation_that_was_changed_is_named_and_costs_no_checkpoint(run):
    path = run / "step-000004" / "evaluation.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(UserError, match=r"step-000004.evaluation\.json changed since"):
        checkpoint.find_model(str(run))
    for step in (9, 10):
        shutil.copytree(run / "step-000008", run / f"step-{step:06d}")
    checkpoint.prune(run, 10)
    assert len(checkpoint.checkpoints(run)) == 4


def test_without_a_name_the_newest_run_is_meant(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="gpt2 train"):
        checkpoint.find_model(None)
    for n, name in enumerate(["new", "old"]):
        shutil.copytree(run, tmp_path / "runs" / name)
        for path in [tmp_path / "runs" / name, *(tmp_path / "runs" / name).iterdir()]:
            os.utime(path, (1e9 - n, 1e9 - n))
    assert checkpoint.find_model(None).parent.name == "new"


def test_a_folder_that_fails_to_be_replaced_is_put_back(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")

    class Boom(Exception):
        pass

    with pytest.raises(Boom), atomic.new_folder(target, replace=True) as folder:
        (folder / "new").write_text("new")
        raise Boom
    assert [p.name for p in target.iterdir()] == ["old"] and [p.name for p in tmp_path.iterdir()] == ["folder"]
    with atomic.new_folder(target, replace=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_training_state_that_is_not_ours_is_refused(run):
    from gpt2cli.resume import resume_plan
    from gpt2cli.run import Run

    (run / "step-000008" / "checkpoint.json").unlink()
    (run / "step-000008" / "training.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be resumed"):
        Run(resume_plan(run, {}))
    (run / "step-000008" / "training.json").write_text('{"step": 8, "what": 1}')
    shutil.copy(run / "step-000004" / "training.safetensors", run / "step-000008" / "training.safetensors")
    with pytest.raises(UserError, match=r"cannot be resumed from: .*'what'"):
        Run(resume_plan(run, {}))


def test_dropout_is_a_function_of_seed_step_and_rank():
    def mask(*which):
        device.seed_step(*which)
        return torch.rand(8).tolist()

    assert mask(1, 2, 0) == mask(1, 2, 0)
    assert len({tuple(mask(*which)) for which in ((1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0), (2, 1, 0))}) == 5
