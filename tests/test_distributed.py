"""Several processes, started as a user starts them: gloo on the CPU, with torchrun or `--nproc`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2cli import atomic, checkpoint
from gpt2cli.commands import launch
from gpt2cli.config import TrainConfig
from gpt2cli.data import micro_steps
from gpt2cli.errors import UserError
from gpt2cli.model import GPT
from gpt2cli.plan import check_parallel, make_plan

from .conftest import QUICK, TINY

RANKS = Path(__file__).with_name("ranks.py")
GPT2 = [sys.executable, "-m", "gpt2cli"]
LONG = ("train", "input.txt", *QUICK, "--steps", 100_000, "--eval-every", 0, "--out", "run")
EXACT = (
    "train",
    "input.txt",
    *TINY,
    "--tokens-per-step",
    256,
    "--batch-size",
    2,
    "--dtype",
    "fp32",
    "--eval-tokens",
    600,
    "--lr",
    3e-3,
)


def torchrun(nproc, *more):
    return [sys.executable, "-m", "torch.distributed.run", *(more or ["--standalone"]), "--nproc-per-node", str(nproc)]


def start(command, **environment):
    command = [str(part) for part in command]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ | environment)


def end(process, code=0, seconds=600):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    if "torch.distributed.run" not in " ".join(process.args):
        assert "Traceback" not in err
    return out, err


def run(*command, code=0, **environment):
    return end(start(command, **environment), code)


def losses(out):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], key): line[key] for line in lines for key in ("loss", "val_loss") if key in line}


def assert_same_run(out, expected, tolerance=1e-5, weights=1e-3):
    found, wanted = losses(out), losses(expected)
    assert found.keys() == wanted.keys()
    assert max(abs(found[at] - wanted[at]) for at in wanted) <= tolerance
    (folder,), (other,) = (checkpoint.checkpoints(Path(run))[:1] for run in (out, expected))
    assert folder.name == other.name and {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}
    for file in ("model.safetensors", "training.safetensors"):
        ours, theirs = load_file(folder / file), load_file(other / file)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    ours, theirs = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < weights
    assert torch.isfinite(GPT.from_pretrained(folder)(torch.zeros(1, 4, dtype=torch.long))[0]).all()


def wait_until(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def has_logged(count):
    log = Path("run/metrics.jsonl")
    return log.is_file() and log.read_text().count("\n") >= count


# ==== the same training, whatever the number of ranks ====


@pytest.mark.parametrize("rows", [1, 3, 8, 30])
@pytest.mark.parametrize("most", [1, 4, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_rows_of_an_update_are_dealt_out_once_and_as_often_to_each(rows, most, world_size):
    dealt = [micro_steps(rows, most, rank, world_size) for rank in range(world_size)]
    assert [row for part in dealt for first, count in part for row in range(first, first + count)] == list(range(rows))
    assert len({len(part) for part in dealt}) == 1 and max(count for part in dealt for _, count in part) <= most


def test_a_step_of_all_ranks_is_the_step_of_one():
    run(*torchrun(3), RANKS, "check")


@pytest.fixture(scope="module")
def runs_of_one(tmp_path_factory, shakespeare):
    """Undisturbed runs of 50 steps of one process: {optimizer: folder}."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "input.txt").write_text(shakespeare[:100_000], encoding="utf-8")
    processes = {}
    for optimizer in ("muon", "adamw"):
        arguments = [*EXACT, "--steps", "50", "--eval-every", "25", "--optimizer", optimizer, "--out", folder / optimizer]
        arguments[1] = folder / "input.txt"
        processes[folder / optimizer] = start([*GPT2, *arguments], XDG_CACHE_HOME=str(folder / "cache"))
    for process in processes.values():
        end(process)
    return folder


@pytest.mark.parametrize("nproc, parallel, optimizer", [(2, "ddp", "muon"), (4, "ddp", "adamw"), (2, "fsdp", "muon")])
def test_any_number_of_ranks_trains_the_same_model(text_file, runs_of_one, nproc, parallel, optimizer):
    more = ["--steps", 50, "--eval-every", 25, "--optimizer", optimizer, "--nproc", nproc, "--parallel", parallel]
    out, err = run(*GPT2, *EXACT, *more, "--out", "run")
    assert out == "run\n" and f"{nproc}, {parallel}" in err and err.count("best checkpoint") == 1, "one process speaks"
    assert_same_run("run", runs_of_one / optimizer)
    assert atomic.read_sealed(Path("run/run.json"))["sessions"][-1]["world_size"] == nproc


def test_a_run_goes_on_with_another_number_of_ranks_and_the_other_way_of_spreading_it(text_file, runs_of_one):
    more = ["--steps", 50, "--eval-every", 25, "--optimizer", "muon", "--out", "run", "--resume", "--max-minutes", 0]
    run(*GPT2, *EXACT, *more, "--nproc", 2, "--parallel", "fsdp", code=143)
    assert [f.name for f in checkpoint.checkpoints(Path("run"))] == ["step-000001"]
    _, err = run(*GPT2, *EXACT, *more, "--nproc", 3, "--parallel", "ddp", code=143)
    assert "it was trained by 2 processes and is by 3" in err and "parallel changed from 'fsdp' to 'ddp'" in err
    run(*GPT2, "train", "--resume", "--out", "run")
    assert_same_run("run", runs_of_one / "muon")


def test_two_ranks_with_dropout_resume_bit_for_bit(text_file):
    settings = ["--dropout", 0.1, "--steps", 6, "--save-every", 3, "--eval-every", 0]
    run(*GPT2, "train", "input.txt", *QUICK, *settings, "--nproc", 2, "--out", "whole")
    shutil.copytree("whole", "halves")
    shutil.rmtree("halves/step-000006")
    _, err = run(*GPT2, "train", "--resume", "--out", "halves", "--nproc", 2)
    assert "goes on after step 3" in err
    for file in ("model.safetensors", "training.safetensors"):
        assert Path("whole/step-000006", file).read_bytes() == Path("halves/step-000006", file).read_bytes()


# ==== failures ====


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks' processes in /proc")
def test_a_rank_that_is_killed_ends_the_others_within_seconds_and_the_run_goes_on(text_file):
    process = start([*GPT2, *LONG, "--save-every", 4, "--nproc", 2])
    wait_until(lambda: has_logged(6), process)
    os.kill(next(pid for pid in children_of(process.pid) if rank_of(pid) == "1"), signal.SIGKILL)
    killed = time.monotonic()
    _, err = end(process, 137, seconds=120)
    assert time.monotonic() - killed < 60  # where waiting for the other rank would take 600
    assert "rank 1 was killed by SIGKILL" in err and "lost another rank, whose own error says why" in err
    _, err = run(*GPT2, "train", "--resume", "--out", "run", "--nproc", 2, "--max-minutes", 0, code=143)
    assert "goes on after step" in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ranks_whose_launcher_was_killed_save_and_stop(text_file):
    process = start([*GPT2, *LONG, "--nproc", 2])
    wait_until(lambda: has_logged(3), process)
    process.kill()
    _, err = end(process, -signal.SIGKILL, seconds=120)  # its output ends with that of the ranks
    (folder,) = checkpoint.checkpoints(Path("run"))
    assert checkpoint.is_whole(folder) and checkpoint.was_stopped(folder)
    assert f"stopped after step {checkpoint.step_of(folder)}, which is saved" in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_rank_that_waits_for_others_leaves_when_its_launcher_is_gone(text_file):
    code = "import os, subprocess, sys; rank = os.environ | {'RANK': '0', 'GPT2CLI_LAUNCHER': str(os.getpid())}; "
    code += "subprocess.Popen([sys.executable, '-m', 'gpt2cli', 'train', 'input.txt', '--device', 'cpu'], env=rank)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = start([sys.executable, "-c", code], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert end(launcher, seconds=120) == ("", "")  # its output ends with that of the rank


def rank_of(pid):
    return dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line).get("RANK")


def children_of(pid):
    """Their process numbers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("parallel, under_torchrun", [("ddp", True), ("fsdp", False)])
def test_a_signal_to_the_launcher_saves_once(text_file, parallel, under_torchrun):
    command = [*torchrun(2), "-m", "gpt2cli"] if under_torchrun else GPT2
    process = start([*command, *LONG, "--parallel", parallel, *([] if under_torchrun else ["--nproc", 2])])
    wait_until(lambda: has_logged(3), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == (1 if under_torchrun else 143), err  # torchrun's own for a signal
    (folder,) = checkpoint.checkpoints(Path("run"))
    assert checkpoint.is_whole(folder) and checkpoint.was_stopped(folder)
    assert err.count("finishing this step") == 1 and f"stopped after step {checkpoint.step_of(folder)}" in err


def test_torchrun_starts_again_and_the_run_goes_on_by_itself(text_file):
    arguments = ["train", "input.txt", *QUICK, "--steps", 8, "--save-every", 3, "--eval-every", 0]
    run(*torchrun(2, "--standalone", "--max-restarts", 1), RANKS, "crash", *arguments, "--out", "run")
    assert Path("crashed").exists() and checkpoint.checkpoints(Path("run"))[0].name == "step-000008"
    run(*GPT2, *arguments, "--out", "undisturbed", "--nproc", 2)
    assert (
        Path("run/step-000008/model.safetensors").read_bytes() == Path("undisturbed/step-000008/model.safetensors").read_bytes()
    )
    assert [s["from_step"] for s in atomic.read_sealed(Path("run/run.json"))["sessions"]] == [0, 3]
    _, err = run(*torchrun(1, "--standalone", "--max-restarts", 1), "-m", "gpt2cli", *arguments, code=1)
    assert "--max-restarts needs --out" in err


def test_all_ranks_go_back_together_when_the_updates_of_one_stay_bad(text_file):
    arguments = ["train", "input.txt", *QUICK, "--steps", 10, "--save-every", 4, "--eval-every", 0, "--out", "run"]
    _, err = run(*torchrun(2), RANKS, "poison", *arguments)
    assert "diverged at step 8" in err and "back to step 4, with other data" in err
    assert checkpoint.checkpoints(Path("run"))[0].name == "step-000010"


def test_two_agents_meet_as_two_nodes_and_a_missing_shard_is_named_before_step_1(text_file, gpt2, tmp_path):
    assert gpt2("tokenize", text_file, "--out", "tokens").code == 0
    homes = [tmp_path / "node0", tmp_path / "node1"]
    for home in homes:
        shutil.copytree("tokens", home / "tokens")
    shutil.rmtree("tokens")

    def both(data, code, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        agents = []
        for home in homes:
            rendezvous = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test"]
            command = [*torchrun(1, *rendezvous), "-m", "gpt2cli", "train", home / data, *QUICK, "--steps", 2]
            agents.append(start([*command, "--out", home / "run"], HOME=str(home), XDG_CACHE_HOME=str(home / "cache")))
        return [end(agent, code) for agent in agents]

    outs = both("tokens", 0)
    assert sorted(out for out, _ in outs)[0] == "" and sum("run" in out for out, _ in outs) == 1
    assert sum((home / "run").exists() for home in homes) == 1
    for home in homes:
        shutil.rmtree(home / "run", ignore_errors=True)
        (home / "input.txt").write_bytes(text_file.read_bytes())
    both("input.txt", 0)  # each tokenizes for itself
    assert all(list((home / "cache").rglob("train_000000.bin")) for home in homes)
    for home in homes:
        shutil.rmtree(home / "run", ignore_errors=True)
    (homes[1] / "tokens/train_000000.bin").unlink()
    errors = "".join(err for _, err in both("tokens", 1))
    assert "train_000000.bin is missing" in errors and not any((home / "run").exists() for home in homes)


# ==== mistakes ====


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--parallel", "fsdp"), "--parallel fsdp is for several processes: add --nproc N"),
        (("--nproc", "0"), None),
        (("--parallel", "pipeline"), "parallel is 'pipeline'"),
    ],
)
def test_mistakes_of_one_process(gpt2, text_file, arguments, says):
    done = gpt2("train", text_file, *QUICK, *arguments)
    assert done.code == (1 if says else 2) and (says or "nproc") in done.err and not Path("runs").exists()


def test_an_error_of_the_plan_is_told_once(text_file):
    _, err = run(*GPT2, "train", "input.txt", "--n-head", 7, "--nproc", 2, code=1)
    assert err.count("error:") == 1 and "n_embd must be divisible" in err


def test_what_fsdp_cannot_do_is_refused():
    with pytest.raises(UserError, match="does not sample while it trains"):
        check_parallel(TrainConfig(parallel="fsdp", sample_every=1))
    with pytest.raises(UserError, match="does not scale gradients"):
        check_parallel(TrainConfig(parallel="fsdp", dtype="fp16"))


def test_half_an_environment_is_an_error(gpt2, text_file, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "not all of it: start it with torchrun" in gpt2("train", text_file, *QUICK).err
    assert "leave it out under torchrun" in gpt2("train", text_file, *QUICK, "--nproc", 2).err


def test_the_command_for_the_ranks_is_ours_without_nproc():
    assert launch._without_nproc(["train", "--nproc", "2", "a.txt"]) == ["train", "a.txt"]
    assert launch._without_nproc(["train", "a.txt", "--nproc=2", "--steps", "2"]) == ["train", "a.txt", "--steps", "2"]


def test_the_plan_of_several_ranks_has_less_in_each(text_file):
    def memory(**settings):
        world_size = settings.pop("world_size", 1)
        train = TrainConfig(seq_len=32, tokens_per_step=1024, batch_size=32, dtype="fp32", device="cpu", **settings)
        return make_plan(text_file, {"n_layer": 6, "n_embd": 768, "n_head": 2}, train, world_size=world_size).memory

    alone = memory()
    assert memory(world_size=2, parallel="fsdp") < memory(world_size=2) < alone
    assert memory(activation_checkpointing=True) < alone


# ==== measuring ====


def test_bench_distributed_measures_the_sums_the_step_and_every_rank():
    small = ["--tokens-per-step", 32, "--seq-len", 16, "--repeats", 1, "--dtype", "fp32"]
    out, _ = run(*GPT2, "bench", "distributed", "--nproc", 2, *small, "--json")
    found = json.loads(out)
    assert found["world_size"] == 2 and len(found["ranks"]) == 2 and found["tokens"] == 32
    assert found["gradient_bytes"] == 4 * 30_339_456 and found["reduces"][-1]["bytes"] == found["gradient_bytes"]
    assert found["together"] > 0 and found["alone"] > 0 and found["speedup"] > 0
    assert all(row["bandwidth"] > 0 for row in found["reduces"]) and found["ranks"][1]["where"].startswith("rank 1 on")


def test_bench_distributed_needs_several_processes(gpt2):
    assert "add --nproc N, or start it with torchrun" in gpt2("bench", "distributed").err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_gpu_under_nccl_trains_as_without(text_file, parallel):
    how = ["--device", "cuda", "--compile", "off", "--deterministic"]
    settings = ["train", "input.txt", *TINY, "--tokens-per-step", 256, "--steps", 8, *how]
    run(*GPT2, *settings, "--out", "alone")
    run(*torchrun(1), "-m", "gpt2cli", *settings, "--parallel", parallel, "--out", "run")
    # FSDP rounds to bf16 in other places, and where there is next to no gradient, the direction of an update is its noise.
    far = {"ddp": {}, "fsdp": {"tolerance": 5e-3, "weights": 0.1}}[parallel]
    assert_same_run("run", "alone", **far)
