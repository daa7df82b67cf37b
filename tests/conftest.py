"""Fixtures: tiny models, a real text, and the command line called in this process."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

# Models this small are fastest on one thread; read when torch is first imported, here and by the programs tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # which would colour what tests read
    os.environ.pop(name, None)

import pytest
import torch

from gpt2cli.commands import app
from gpt2cli.config import GPTConfig
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
