"""Fixtures: tiny models, a real text, and the command line called in this process."""

from __future__ import annotations

import gzip
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

# Models this small are fastest on one thread; read when torch is first imported, here and by the programs tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # which would colour what tests read
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from gpt2cli.cache import KVCache, Masked, Prompts
from gpt2cli.commands import app
from gpt2cli.config import GPTConfig
from gpt2cli.loss import multiple
from gpt2cli.model import GPT

TINY = ("--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--seq-len", "32", "--batch-size", "4")
QUICK = (*TINY, "--tokens-per-step", "256", "--dtype", "fp32", "--device", "cpu", "--eval-tokens", "512")


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, with one cache of tokens for all, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def gpt2(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command line as the `gpt2` program does."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = app.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def shakespeare() -> str:
    packed = resources.files("gpt2cli").joinpath("assets/shakespeare.txt.gz").read_bytes()
    return gzip.decompress(packed).decode()


@pytest.fixture
def text_file(tmp_path: Path, shakespeare: str) -> Path:
    """100 kB of it, with no separator."""
    path = tmp_path / "input.txt"
    path.write_text(shakespeare[:100_000], encoding="utf-8")
    return path


def make_model(**fields: object) -> GPT:
    """A small GPT whose biases and LayerNorms are not their trivial first values."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 97} | fields
    model = GPT(GPTConfig(**shape))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, shakespeare: str) -> Path:
    """A finished run of 8 tiny steps; tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "input.txt").write_text(shakespeare[:100_000], encoding="utf-8")
    out = folder / "run"
    command = ["train", folder / "input.txt", *QUICK, "--steps", "8", "--eval-every", "4", "--save-every", "4"]
    command += ["--cache-dir", folder / "cache", "--out", out]
    assert app.run([str(part) for part in command]) == 0
    return out


@torch.inference_mode()
def steps_apart(
    kernels: Callable[..., Any], model: GPT, lengths: list[int], steps: int = 1, oracle: GPT | None = None
) -> float:
    """The largest distance of logits, and of what the cache holds, between steps by `kernels` and by the model (or another)
    of rows that hold `lengths` tokens."""
    torch.manual_seed(1)
    V, B, device, oracle = model.config.vocab_size, len(lengths), model.wpe.weight.device, oracle or model
    caches = [KVCache(model.config, B + 1, model.config.block_size, model.wpe.weight) for _ in range(2)]
    for n, length in enumerate(lengths):
        ids = torch.randint(V, (1, length), device=device)
        for cache in caches:
            oracle.hidden(ids, Prompts(cache, n))
            cache.lengths[n] = length
    new, ours = torch.randint(V, (B,), device=device), kernels(model, caches[1])
    distances = []
    for _ in range(steps):
        for cache in caches:
            cache.tell()
        expected = oracle.head(oracle.hidden(new[:, None], Masked(caches[0], B, caches[0].size))[:, -1])
        wide = torch.zeros(B, V + -V % multiple(device.type), dtype=expected.dtype, device=device)
        ours.step(new, wide)
        found = wide[:, :V]
        pairs = (found, expected), (caches[0].k, caches[1].k), (caches[0].v, caches[1].v)
        distances += [(a - b).abs().max() for a, b in pairs]
        for cache in caches:
            cache.lengths[:B] = [length + 1 for length in cache.lengths[:B]]
        new = expected.argmax(dim=-1)
    assert not caches[1].k[:, B].any()  # the row that has nothing yet
    return float(torch.stack(distances).max())
