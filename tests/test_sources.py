"""What a run reads: mixtures by weight from the command line to the last resume, and data that is refused by name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2cli import TrainConfig, UserError, atomic, make_plan, sources, train
from gpt2cli.checkpoint import load
from gpt2cli.resume import resume_plan
from gpt2cli.shards import Tokens
from gpt2cli.verify import verify_resume

from .conftest import QUICK
from .test_train import CONFIG, SHAPE, same, weights


@pytest.fixture
def mixture(shakespeare):
    """A text, a folder of texts, and foreign shards without a validation split."""
    Path("a=1.txt").write_text(shakespeare[:40_000], encoding="utf-8")
    Path("texts").mkdir()
    Path("texts/b.txt").write_text(shakespeare[50_000:70_000], encoding="utf-8")
    Path("bin").mkdir()
    np.random.default_rng(0).integers(0, 50257, 3000).astype("<u2").tofile("bin/train.bin")
    return {"a=1.txt": 5, "texts": 3, "bin": 2}


def new_plan(data, out, shape=SHAPE, **config):
    return make_plan(data, shape, TrainConfig(**CONFIG | config), out=Path(out))


def options(mixture):
    return [part for path, weight in mixture.items() for part in ("--data", f"{path}={weight}")]


def losses(out):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


def test_a_mixture_trains_is_resumed_and_repeated_bit_for_bit(mixture):
    whole = list(train(new_plan(mixture, "whole", shape=SHAPE | {"dropout": 0.1})))
    done = []
    for metrics in train(new_plan(mixture, "halves", shape=SHAPE | {"dropout": 0.1}), should_stop=lambda: len(done) == 5):
        done.append(metrics.step)
    plan = resume_plan(Path("halves"), {})
    assert plan.first_step == 5 and plan.sources == new_plan(mixture, "other").sources
    rest = list(train(plan))
    assert [m.loss for m in whole[5:]] == [m.loss for m in rest] and [m.step for m in rest] == [6, 7, 8, 9, 10]
    assert whole[-1].val_loss == rest[-1].val_loss and same(weights("whole/step-000010"), weights("halves/step-000010"))
    verdict = verify_resume(new_plan(mixture, "proof"))
    assert not verdict.different
    alone = list(train(new_plan("a=1.txt", "alone", shape=SHAPE | {"dropout": 0.1})))
    assert alone[0].loss != whole[0].loss


def test_the_rows_of_a_run_are_those_of_the_library_and_the_validation_is_that_of_all(mixture):
    plan = new_plan(mixture, "run")
    opened = sources.open_train(plan.sources, 50257)
    assert list(opened.values()) == [512, 307, 205] and sum(map(len, opened)) == plan.train_tokens
    val = sources.open_val(plan.sources, 50257)
    parts = [Tokens.open(source.tokens, "val") for source in plan.sources if source.given != "bin"]
    assert [source.val_tokens for source in plan.sources][2] == 0 and len(val) == plan.val_tokens > 0
    assert val.read(0, len(val)).tolist() == [n for part in parts for n in part.read(0, len(part))]
    with pytest.raises(UserError, match="the model knows 300 ids"):
        sources.open_val(plan.sources, 300).read(0, len(val))


def test_the_order_of_the_options_and_the_unit_of_the_weights_change_nothing(mixture):
    turned = {path: weight / 8 for path, weight in reversed(mixture.items())}
    a, b = new_plan(mixture, "a"), new_plan(turned, "b")
    assert a.data_sha256 == b.data_sha256
    assert [m.loss for m in train(a)] == [m.loss for m in train(b)]
    assert new_plan({"texts": 9}, "c").data_sha256 == new_plan("texts", "d").data_sha256  # one source is no mixture


def test_run_json_keeps_the_mixture_and_another_one_is_refused(mixture, gpt2, monkeypatch):
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path.cwd()))
    here = {str(Path.cwd() / path): weight for path, weight in mixture.items()}
    list(train(new_plan(here, "run", steps=2)))
    record = atomic.read_json(Path("run/run.json"))["data"]
    assert record["given"] == {"~/a=1.txt": 5, "~/texts": 3, "~/bin": 2}
    assert record["tokens"]["~/bin"] == "~/bin" and set(record["tokens"]) == set(record["given"])
    assert resume_plan(Path("run"), {}, data=here).resume_from
    for other in ({**here, str(Path.cwd() / "texts"): 4}, {"bin": 1, "texts": 1}, "bin"):
        with pytest.raises(UserError, match=r"data run was trained on"):
            resume_plan(Path("run"), {}, data=other)
    np.full(3000, 7, dtype="<u2").tofile("bin/train.bin")
    with pytest.raises(UserError, match="is no longer the data run was trained on, or a part of it"):
        resume_plan(Path("run"), {})


def test_tokens_that_are_gone_from_the_cache_are_made_again(mixture):
    import shutil

    plan = make_plan(mixture, SHAPE, TrainConfig(**CONFIG | {"steps": 2}), out=Path("run"), cache=Path("cache"))
    list(train(plan))
    shutil.rmtree("cache")
    again = resume_plan(Path("run"), {"steps": 3}, cache=Path("cache"))
    assert again.sources == plan.sources and [m.step for m in train(again)] == [3]


def test_a_mixture_on_the_command_line_and_in_a_settings_file(gpt2, mixture):
    command = ("train", *options(mixture), *QUICK, "--steps", 4)
    first = gpt2(*command, "--out", "run")
    assert first.code == 0 and "3 sources" in first.err
    assert re.search(r"50\.0% a=1\.txt: [\d,]+ tokens, 0\.0\d epochs", first.err)
    assert re.search(r"20\.0% bin: 3,000 tokens, 0\.07 epochs", first.err)  # 4 * 256 * 205 / 1024 / 3000
    assert gpt2("train", "--config", "run/run.json", "--out", "again").code == 0
    Path("table.toml").write_text('steps = 4\n[data]\n"texts" = 3\n"a=1.txt" = 5\nbin = 2.0\n')
    assert gpt2("train", "--config", "table.toml", *QUICK, "--out", "table").code == 0
    Path("list.toml").write_text('steps = 4\ndata = ["a=1.txt=0.5", "texts=0.3", "bin=0.2"]\n')
    assert gpt2("train", "--config", "list.toml", *QUICK, "--out", "list").code == 0
    assert losses("run") == losses("again") == losses("table") == losses("list")
    assert gpt2(*command, "--out", "run", "--resume").code == 0
    assert "different" not in gpt2("train", "--resume", "--out", "run", "--steps", 5).err
    assert "texts: " in gpt2("train", "texts", "--config", "list.toml", "--dry-run").err
    assert "2 sources" in gpt2("train", "--data", "bin=1", "--data", "texts=1", "--config", "run/run.json", "--dry-run").err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["texts", "--data", "bin=1"], "INPUT (texts) and --data both say what to train on"),
        (["--data", "bin"], "--data bin: expected a path and its weight, such as --data bin=0.5"),
        (["--data", "bin=much"], "such as --data bin=0.5"),
        (["--data", "=1"], "expected a path and its weight"),
        (["--data", "bin=1", "--data", "bin=2"], "--data bin is given twice"),
        (["--data", "bin=1", "--data", "texts=-2"], "the weight of texts is -2.0; expected a number above 0"),
        (["--data", "bin=1", "--data", "texts=0.0001"], "the weight of texts, 0.0001, is too small for one row in 1,024"),
        (["--data", "bin=1", "--data", "nowhere=1"], "nowhere does not exist"),
        (["--data", "bin=1", "--data", "small=1", "--seq-len", "64"], "small has 64 tokens, but a row of 64 needs 65"),
        (["--config", "both.toml"], "input and data both say what to train on"),
        (["--config", "number.toml"], "data is 5; expected a table of paths and weights"),
        (["--config", "words.toml"], "--data bin=many: expected a path and its weight"),
        (["empty"], "empty holds no text and no shards, it is empty: expected text files, or train*.bin and val*.bin"),
        (["unnamed"], "unnamed holds 0001.bin, but no train*.bin or train*.npy"),
        (["bin/train.bin"], "bin/train.bin is one token shard; give its folder"),
        (["wrong.bin"], "wrong.bin is a zip file"),
        (["onlyval"], "onlyval holds no train shards"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_one_line(gpt2, mixture, arguments, says):
    for name in ("empty", "unnamed", "small", "onlyval"):
        Path(name).mkdir()
    np.arange(64).astype("<u2").tofile("small/train.bin")
    np.arange(64).astype("<u2").tofile("unnamed/0001.bin")
    np.arange(64).astype("<u2").tofile("onlyval/val.bin")
    torch.save(torch.ones(1), "wrong.bin")
    Path("both.toml").write_text('input = "texts"\n[data]\nbin = 1\n')
    Path("number.toml").write_text("data = 5\n")
    Path("words.toml").write_text('[data]\nbin = "many"\n')
    done = gpt2("train", *arguments, "--out", "run")
    assert done.code == 1 and says in done.err and done.err.splitlines()[-1].startswith("error: ")
    assert not Path("run").exists()


def test_a_text_may_be_called_bin(gpt2, shakespeare):
    Path("story.bin").write_text(shakespeare[:20_000], encoding="utf-8")
    assert gpt2("train", "story.bin", *QUICK, "--dry-run").code == 0


def test_an_id_that_the_model_does_not_know_ends_the_run_in_one_line_and_what_was_saved_stands(gpt2, tmp_path, monkeypatch):
    from gpt2cli import shards

    Path("bin").mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, 4000)
    monkeypatch.setattr(shards, "CHECKED_BYTES", 100)  # as if there were too much to look at
    monkeypatch.setattr(shards, "SAMPLES", 2)
    monkeypatch.setattr(shards, "SAMPLE_TOKENS", 10)
    ids[2900] = 60_000
    ids.astype("<u2").tofile("bin/train.bin")
    done = gpt2("train", "bin", *QUICK, "--steps", 16, "--save-every", 1, "--out", "run")
    message = f"error: {tmp_path / 'bin' / 'train.bin'} holds id 60,000 at token 2,900, but the model knows 50,257 ids"
    assert done.code == 1 and done.err.splitlines()[-1].startswith(message)
    assert load("run").model.config.vocab_size == 50257
    ids[0] = 60_001
    ids.astype("<u2").tofile("bin/train.bin")
    assert "60,001 at token 0" in gpt2("train", "bin", *QUICK, "--out", "other").err and not Path("other").exists()
    ids[0] = 1
    ids[2900] = 1
    ids.astype("<u2").tofile("bin/train.bin")
    (ids + 15_000).astype("<u2").tofile("bin/val.bin")
    done = gpt2("train", "bin", *QUICK, "--steps", 2, "--out", "val")
    assert done.code == 1 and "val.bin holds id" in done.err
