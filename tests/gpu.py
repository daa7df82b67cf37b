"""What a machine with one GPU is to show, in one go: `python -m tests.gpu OUT` runs the tests that need it, then times what the
README has no figures for yet, the most wanted first, each as one JSON line in OUT/bench.jsonl. Stops after `--minutes` (12)."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

TRAIN = ["train", "--dtype", "bf16", "--seq-len", "1024", "--compile", "--repeats", "10"]
SAMPLE = ["sample", "--dtype", "bf16", "--prompt-tokens", "32"]
WORK = [
    [*TRAIN, "--preset", "gpt2", "--batch-size", "32", "--compare", "hf"],
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--compare", "hf"],
    ["attention", "--dtype", "bf16", "--lengths", "1024", "--batch-size", "32", "--n-head", "12"],
    [*TRAIN, "--preset", "gpt2-xl", "--batch-size", "8"],
    [*TRAIN, "--preset", "gpt2-large", "--batch-size", "16"],
    [*TRAIN, "--preset", "gpt2-medium", "--batch-size", "16"],
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--batch-size", "256"],
    [*SAMPLE, "--preset", "gpt2-xl", "--new-tokens", "128"],
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--quantize", "int8"],
    [*SAMPLE, "--preset", "gpt2", "--new-tokens", "256", "--batch-size", "4"],
    [*TRAIN, "--preset", "gpt2", "--batch-size", "32", "--optimizer", "muon"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=12)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    print(subprocess.run(tests, capture_output=True, text=True).stdout[-3000:], flush=True)
    for work in WORK:
        left = end - time.monotonic()
        if left < 30:
            print("no time left for", *work)
            continue
        command = [sys.executable, "-m", "gpt2cli", "bench", *work, "--device", "cuda", "--json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            print("no time left in", *work)
            continue
        print(*work, "->", done.stdout or done.stderr[-1000:], flush=True)
        with (options.out / "bench.jsonl").open("a") as file:
            file.write(done.stdout)


if __name__ == "__main__":
    main()
