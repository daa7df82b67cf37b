import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gpt2cli import bench, bench_train, peers
from gpt2cli.apart import Apart
from gpt2cli.commands import console
from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError

CPU = torch.device("cpu")


def test_attention_kernels_are_timed_and_held_against_float64(gpt2):
    done = gpt2(
        "bench",
        "attention",
        "--lengths",
        "8,40",
        "--batch-size",
        1,
        "--repeats",
        1,
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--json",
    )
    result = json.loads(done.out)
    rows = {(row["T"], row["kernel"]): row for row in result["rows"]}
    assert {(T, kernel) for T in (8, 40) for kernel in ("explicit", "math", "flash")} <= set(rows)
    for row in rows.values():
        assert row["forward"] > 0 and row["backward"] > 0 and row["output_error"] < 1e-5 and row["gradient_error"] < 1e-4
    assert {result["missing"][name] for name in ("efficient", "cudnn")} == {"forward and backward it needs CUDA"}
    assert result["matmul_flops"] > 1e8


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_timed_is_told(gpt2, monkeypatch, terminal):
    drawn = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=drawn, force_terminal=terminal, width=80, soft_wrap=True))
    command = ["bench", "attention", "--lengths", 8, "--repeats", 2, "--dtype", "fp32", "--device", "cpu", "--json"]
    told = "T = 8: warm-up, math", "T = 8: turn 2 of 2, flash"
    gpt2(*command)
    assert all((what in drawn.getvalue()) is terminal for what in told)  # elsewhere only what takes long
    monkeypatch.setattr(console, "LINE_SECONDS", -1.0)
    assert json.loads(gpt2(*command).out)["bench"] == "attention" and all(what in drawn.getvalue() for what in told)


def test_a_wrong_kernel_would_show_in_the_error(monkeypatch):
    monkeypatch.setattr(bench, "sdpa_with", lambda kernel, q, k, v: bench.explicit_attention(q, k, v) + 0.5)
    rows, _ = bench.bench_attention(CPU, "fp32", [8], B=1, n_head=1, head_size=8, repeats=1)
    errors = {row.kernel: row.output_error for row in rows}
    assert errors["flash"] > 0.4 and errors["explicit"] < 1e-5


def test_our_side_of_the_training_bench_is_the_products_step(monkeypatch):
    steps = []
    monkeypatch.setattr(bench_train, "train_step", lambda *args, **kwargs: (steps.append(kwargs), (torch.tensor(2.5), None))[1])
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=97, block_size=16)
    title, step = bench_train.our_training(config, "cpu", "fp32", "adamw", 2, 16, False)
    timed = step()
    assert title == "gpt2" and steps[0]["grad_clip"] == 1.0 and timed.loss == 2.5 and timed.seconds > 0


def test_training_is_timed_beside_transformers_in_processes_of_their_own(gpt2):
    command = ["bench", "train", "--batch-size", 1, "--seq-len", 16, "--repeats", 1, "--device", "cpu", "--dtype", "fp32"]
    result = json.loads(gpt2(*command, "--compare", "hf", "--json").out)
    ours, theirs = result["rows"]
    assert ours["who"] == "gpt2" and theirs["who"].startswith("transformers") and ours["of_ours"] == 1
    assert ours["tokens_per_second"] == pytest.approx(16 / ours["seconds"])
    assert ours["flops"] == pytest.approx(16 * GPTConfig(block_size=1024).flops_per_token(16) / ours["seconds"])
    assert 0 < ours["mfu"] < 1 and theirs["mfu"] / ours["mfu"] == pytest.approx(theirs["of_ours"])
    for row in (ours, theirs):  # logits of random weights have a variance of C * 0.02^2; the mean of 16 losses strays by 0.1
        assert row["loss"] == pytest.approx(math.log(50257) + 384 * 0.02**2 / 2, abs=0.7)
        # weights, gradients and two moments are in memory
        assert row["memory"] > 4 * 4 * result["parameters"]
    assert "--compare vllm is unknown" in gpt2(*command, "--compare", "vllm").err
    assert "trains with AdamW" in gpt2(*command, "--compare", "hf", "--optimizer", "muon").err


def test_the_other_side_of_the_training_bench_computes_our_loss():
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=97, block_size=16)
    _, step = peers.hf_training(config, "cpu", "fp32", "adamw", 2, 16, False)
    losses = [step().loss for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(97), abs=0.1) and losses[-1] < losses[0]


def test_work_apart_has_a_process_of_its_own_and_tells_its_errors(monkeypatch):
    monkeypatch.setenv("PYTEST_PID", str(os.getpid()))
    there = Apart(counter, 5)
    assert there.title == "from 5" and there(2) == (7, False) and there(1) == (8, False)
    with pytest.raises(UserError, match="enough"):
        there(0)
    there.close()
    with pytest.raises(UserError, match="pip install nothing"):
        Apart(broken, missing="pip install nothing")


def counter(start):
    total = start

    def add(n):
        nonlocal total
        if not n:
            raise UserError("enough")
        total += n
        return total, os.getpid() == int(os.environ["PYTEST_PID"])

    return f"from {start}", add


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_for_the_process_that_asked():
    """In a fresh process, the first of whose children is the one that tracks resources, and meddles with signals."""
    program = "from tests.test_bench import Apart, interrupted; there = Apart(interrupted); print(there.title); there.close()"
    house = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=house, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("still here\n", "")


def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    return "still here", print


def broken():
    import gpt2cli.nothing_of_this_name  # noqa: F401


def test_bench_sample_times_generate(gpt2, run_folder):
    done = gpt2(
        "bench", "sample", run_folder, "--prompt-tokens", 4, "--new-tokens", 24, "--repeats", 7, "--json", "--device", "cpu"
    )
    result = json.loads(done.out)
    (row,) = result["rows"]
    assert row["decode_tokens_per_second"] > 0 and row["time_to_first_token"] > 0 and row["of_ours"] == 1
    assert row["read_rate"] == 4 * (1_634_720 - 32 * 32) * row["decode_tokens_per_second"]
    assert result["new_tokens"] == 24 and result["parameters"] == 1_634_720 and result["read_bandwidth"] > 1e8


def test_other_libraries_continue_the_same_prompt_to_the_same_tokens(gpt2, run_folder):
    command = ["bench", "sample", run_folder, "--prompt-tokens", 4, "--new-tokens", 8, "--repeats", 1, "--device", "cpu"]
    rows = json.loads(gpt2(*command, "--compare", "hf", "--batch-size", 2, "--json").out)["rows"]
    assert rows[1]["who"].startswith("transformers") and rows[1]["same_tokens"] == rows[0]["same_tokens"] == 8
    done = gpt2(*command, "--quantize", "int8")
    assert done.code == 0 and "perplexity" in done.err and "with int8" in done.err and "gpt2 int8" in done.out
    assert "gpt2 fp32, rounded to int8" in gpt2(*command, "--quantize", "int8", "--batch-size", 9).out
    assert "--compare vllm is unknown" in gpt2(*command, "--compare", "vllm").err
    for name, package in (("ctranslate2", "ctranslate2"), ("llamacpp", "llama-cpp-python")):
        done = gpt2(*command, "--compare", name)
        assert done.code == 0 or f"pip install {package}" in done.err


def test_tables_are_the_product_and_conditions_the_narration(gpt2, monkeypatch):
    done = gpt2("bench", "attention", "--lengths", 8, "--repeats", 1, "--device", "cpu")
    assert done.code == 0 and "flash" in done.out and "GFLOP/s measured" in done.err and "not available here" in done.err


def test_tokenizing_is_timed_against_tiktoken_and_every_id_compared(gpt2, text_file, monkeypatch):
    monkeypatch.setattr("gpt2cli.corpus.FAST_FROM", 1)
    done = gpt2("bench", "tokenize", text_file, "--workers", "1,2", "--repeats", 1, "--json")
    rows = json.loads(done.out)["rows"]
    assert [row["workers"] for row in rows[:3]] == [1, 1, 2] and len(rows) in (3, 5)
    assert all(row["equal"] and row["seconds"] > 0 for row in rows) and rows[0]["speedup"] == 1
    wrong = np.ones(9, np.uint16), np.empty(0, np.uint16)
    monkeypatch.setattr("gpt2cli.encode.encode_batch", lambda batch, encode, eot: wrong)
    done = gpt2("bench", "tokenize", text_file, "--workers", "1", "--repeats", 1)
    assert "DIFFERENT" in done.out and sorted(path.name for path in text_file.parent.iterdir()) == ["input.txt"]
