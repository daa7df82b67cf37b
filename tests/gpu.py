"""What a machine with one GPU is to show, in one go: `python -m tests.gpu OUT` runs the tests of decoding, then times what the
README has no figures for yet, the most wanted first, then runs the other tests that need a GPU. Each benchmark is one JSON line
in OUT/bench.jsonl, and all that was said is in OUT/log.txt. Ends after `--minutes` (9), whatever is left."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--durations", "5"]
DECODING = ["tests/test_fused.py", "tests/test_generate.py"]
TRAIN = ["train", "--dtype", "bf16", "--seq-len", "1024", "--compile", "--repeats", "10"]
SAMPLE = ["sample", "--dtype", "bf16", "--prompt-tokens", "32"]
BENCH = [
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--compare", "hf"],
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--batch-size", "256"],
    [*SAMPLE, "--preset", "gpt2-xl", "--new-tokens", "128"],
    [*TRAIN, "--preset", "gpt2", "--batch-size", "32", "--compare", "hf"],
    [*TRAIN, "--preset", "gpt2-xl", "--batch-size", "8"],
    [*TRAIN, "--preset", "gpt2-large", "--batch-size", "16"],
    [*TRAIN, "--preset", "gpt2-medium", "--batch-size", "16"],
    ["attention", "--dtype", "bf16", "--lengths", "1024", "--batch-size", "32", "--n-head", "12"],
    [*TRAIN, "--preset", "gpt2", "--batch-size", "32", "--optimizer", "muon"],
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--quantize", "int8"],
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--batch-size", "4"],
]
# The benchmarks decode greedily; this is what the command does unless told otherwise, in its last line's tokens/s.
MODEL = "from gpt2cli import *; GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768)).save_pretrained('{}')"
DRAWN = ["-m", "gpt2cli", "sample", "--prompt", "O Romeo,", "--max-new-tokens", "512", "--ignore-eos", "--num-samples"]


class Runs:
    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds

    def run(self, *arguments: str, most: float = 240) -> str:
        """What `python ARGUMENTS` writes to stdout; stderr is shown, too, for a warning there says that a figure is not what it
        seems."""
        left = min(most, self.end - time.monotonic())
        if left < 20:
            self.say("no time left for", *arguments)
            return ""
        command, path = [sys.executable, *arguments], os.environ.get("PYTHONPATH", "")
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}  # also where nothing was installed
        started = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=left, env=environment)
        except subprocess.TimeoutExpired as late:
            self.say(*arguments, f"-> not done after {left:.0f} s", (late.stdout or b"").decode(errors="replace")[-1500:])
            return ""
        took = f"-> {done.returncode} in {time.monotonic() - started:.0f} s"
        self.say(*arguments, took, done.stdout[-3000:], done.stderr[-1500:])
        return done.stdout

    def say(self, *words: str) -> None:
        print(*words, flush=True)
        with (self.out / "log.txt").open("a") as log:
            print(*words, file=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.out, 60 * options.minutes)
    runs.run(*TESTS, *DECODING)
    for n, work in enumerate(BENCH):
        with (options.out / "bench.jsonl").open("a") as file:
            file.write(runs.run("-m", "gpt2cli", "bench", *work, "--device", "cuda", "--json"))
        if n == 2:
            with tempfile.TemporaryDirectory() as model:
                runs.run("-c", MODEL.format(model))
                for rows in ("1", "16"):
                    runs.run(*DRAWN, rows, model)
    runs.run(*TESTS, *(f"--ignore={path}" for path in DECODING))


if __name__ == "__main__":
    main()
