"""What a machine with one GPU is to show, in one go: `python -m tests.gpu OUT` runs the tests that need one while torch's
compiler fills its cache, then trains and goes on, then times what the README has no figures for yet, the most wanted first. It
ends after `--minutes`. All is in OUT as soon as it is said, and each benchmark is one JSON line in OUT/bench.jsonl."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gpt2cli.commands import app

ROOT = Path(__file__).parents[1]
TESTS = {
    "decoding": ["tests/test_fused.py", "tests/test_generate.py"],
    "training": ["tests/test_recorded.py", "tests/test_model.py", "tests/test_distributed.py"],
}
RUN = ["train", "--device", "cuda", "--preset", "gpt2", "--eval-every", "20", "--save-every", "20", "--max-minutes", "1"]
TRAIN = ["bench", "train", "--dtype", "bf16", "--seq-len", "1024", "--compile", "--device", "cuda", "--json"]
SAMPLE = ["bench", "sample", "--dtype", "bf16", "--prompt-tokens", "32", "--new-tokens", "256", "--device", "cuda", "--json"]
ATTENTION = [
    "bench",
    "attention",
    "--dtype",
    "bf16",
    "--lengths",
    "1024",
    "--batch-size",
    "4",
    "--n-head",
    "12",
    "--device",
    "cuda",
]
COMMANDS = [
    [*TRAIN, "--preset", "gpt2-medium", "--batch-size", "64"],
    [*SAMPLE, "--preset", "gpt2", "--batch-size", "256", "--repeats", "5"],
    [*TRAIN, "--preset", "gpt2", "--batch-size", "2", "--optimizer", "muon"],
    [*TRAIN, "--preset", "gpt2", "--batch-size", "256"],
    [*TRAIN, "--preset", "gpt2", "--batch-size", "64", "--compare", "hf"],
    [*SAMPLE, "--preset", "gpt2-xl", "--repeats", "5"],
    [*SAMPLE, "--preset", "gpt2", "--repeats", "5"],
    [*TRAIN, "--preset", "gpt2-large", "--batch-size", "32"],
    [*TRAIN, "--preset", "gpt2", "--batch-size", "64", "--optimizer", "muon"],
    [*SAMPLE, "--preset", "gpt2", "--batch-size", "16"],
    [*SAMPLE, "--preset", "gpt2", "--quantize", "int8"],
    [*ATTENTION, "--json"],
]


def compile_block(preset: str, rows: int, optimizer: str = "adamw") -> None:
    """A step of two layers, whose blocks are those of the whole model."""
    from dataclasses import replace

    from gpt2cli.bench_train import our_training
    from gpt2cli.config import PRESETS, GPTConfig

    config = replace(GPTConfig(**PRESETS[preset]), n_layer=2, dropout=0.0, attn_dropout=0.0)
    our_training(config, "cuda", "bf16", optimizer, rows, 1024, compile=True)[1]()


def compile_theirs(preset: str, rows: int) -> None:
    from dataclasses import replace

    from gpt2cli import peers
    from gpt2cli.config import PRESETS, GPTConfig

    config = replace(GPTConfig(**PRESETS[preset]), dropout=0.0, attn_dropout=0.0)
    peers.hf_training(config, "cuda", "bf16", "adamw", rows, 1024, compile=True)[1]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    warm_up(options.out, seconds=min(90, 20 * options.minutes))
    with tempfile.TemporaryDirectory() as run:
        go_on = ["train", "--resume", "--steps", "60", "--max-minutes", "1", "--out", run + "/run"]
        drawn = ["sample", run + "/run", "--prompt", "KING.", "--ignore-eos", "--device", "cuda"]
        ways = [[*drawn, "--max-new-tokens", "1000"], [*drawn, "--num-samples", "256"]]
        for command in [[*RUN, "--steps", "40", "--out", run + "/run"], go_on, *ways, *COMMANDS]:
            at = time.monotonic() - started
            if at < 60 * options.minutes - 15:
                said = do(command)
                print(f"after {at:.0f} s:", *command, said[-2000:], flush=True)
                if said.startswith("{"):
                    with (options.out / "bench.jsonl").open("a") as file:
                        file.write(said)
            else:
                print("no time left for", *command, flush=True)


def do(command: list[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = app.run(command)
    gc.collect()
    torch.cuda.empty_cache()
    return said.getvalue() if status == 0 else f"ended with {status}: {said.getvalue()}"


def warm_up(out: Path, seconds: float) -> None:
    """The tests and the compiler's work, at once: their times do not matter."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    shapes = [("gpt2", 64), ("gpt2", 256), ("gpt2-large", 32), ("gpt2-medium", 64)]
    compiling = [f"from tests.gpu import compile_block; compile_block({preset!r}, {rows})" for preset, rows in shapes]
    compiling.append("from tests.gpu import compile_theirs; compile_theirs('gpt2', 64)")
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    commands = {name: [*pytest, *files] for name, files in TESTS.items()}
    commands |= {f"compiling-{n}": [sys.executable, "-c", code] for n, code in enumerate(compiling)}
    with contextlib.ExitStack() as stack:
        processes = []
        for name, command in commands.items():
            log = stack.enter_context((out / f"{name.split('-')[0]}.log").open("a"))
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT))
        end = time.monotonic() + seconds
        for process in processes:
            wait(partial(process.wait, timeout=max(0.1, end - time.monotonic())))
        for process in processes:
            process.send_signal(2)  # whereupon pytest tells what has failed so far
            wait(partial(process.wait, timeout=5))
            process.kill()
    for name in TESTS:
        print(name, (out / f"{name}.log").read_text()[-1500:], flush=True)


def wait(for_it: Callable[[], object]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        for_it()


if __name__ == "__main__":
    main()
