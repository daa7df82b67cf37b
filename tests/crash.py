"""What may befall a run, tried many times over, always with the same question: is the run that goes on the run that would
have been? Anyone can repeat it; the tests do, in short.

    python -m tests.crash kills 100         SIGKILL at random instants, then --resume to the end
    python -m tests.crash disk              a disk that is full at each write call in turn, for once and for good
    python -m tests.crash mutations 5000    files that were changed behind our back

Prints one JSON object; `lost`, `tracebacks` and `wrong` are to be 0.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from gpt2cli import GPT, Encoding, GPTConfig, UserError, atomic, checkpoint, curve, device, metrics, writer
from gpt2cli.commands import app
from gpt2cli.formats import huggingface, weights

STEPS = 40
TIMES = ("elapsed", "tokens_per_second")


# ==== a run to be mistreated ====


def prepare(folder: Path) -> list[str]:
    """A text and a model that knows only bytes, so that a run takes a second; returns the command line without --out."""
    device.matmul_rate = lambda *_: 1e9  # only shown, as the curve is, and they take longer than the run
    curve.save = lambda *_: False
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "thinks", "of", "it", "no", "more"]
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(4000)))
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257)
    (folder / "bytes").mkdir()
    byte_level = Encoding({bytes([n]): n for n in range(256)}, [], eot=256)
    huggingface.write(folder / "bytes", config, GPT(config).state_dict(), byte_level)
    return [
        "train", str(folder / "text.txt"), "--init-from", str(folder / "bytes"), "--dropout", "0.1", "--steps", str(STEPS),
        "--tokens-per-step", "64", "--batch-size", "2", "--lr", "0.01", "--save-every", "2", "--eval-every", "3",
        "--eval-tokens", "256", "--dtype", "fp32", "--device", "cpu", "--cache-dir", str(folder / "cache"),
    ]  # fmt: skip


def call(command: list[str]) -> tuple[int, str]:
    """Exit status and stderr of a command line, in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = app.run(command)
    return code, stderr.getvalue()


def outcome(run: Path) -> dict[str, Any]:
    """All that two equal runs have in common: the bytes of the last checkpoint, and the log without its times."""
    last = checkpoint.checkpoints(run)[0]
    files = {p.name: p.read_bytes() for p in sorted(last.iterdir()) if p.name not in ("training.json", "checkpoint.json")}
    progress = {k: v for k, v in atomic.read_json(last / "training.json").items() if k not in ("elapsed", "log", "stopped")}
    # A save that was tried again comes after its step's evaluation instead of before it.
    losses = progress.pop("best_loss"), checkpoint.evaluation(last).get("val_loss")
    progress["best_loss"] = min((loss for loss in losses if loss is not None), default=None)
    lines = [line for line in metrics.read(run) if line.get("event") not in ("save failed", "saved")]
    log = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return {"step": last.name, "progress": progress, "files": files, "log": log}


# ==== kill -9 ====


def kills(folder: Path, count: int, draw: random.Random) -> dict[str, int]:
    command = prepare(folder)
    assert call([*command, "--out", str(folder / "warm")])[0] == 0  # what it imports, the children need not
    started = time.perf_counter()
    assert in_child([*command, "--out", str(folder / "whole")]) == 0
    seconds = time.perf_counter() - started
    expected = outcome(folder / "whole")
    found = {"kills": 0, "resumes": 0, "with_checkpoints": 0, "torn": 0, "lost": 0, "wrong": 0}
    while found["resumes"] < count or found["with_checkpoints"] <= count // 3:
        run = folder / "run"
        again = [*command, "--out", str(run), "--resume"]
        newest, before = 0, found["kills"]
        for _ in range(draw.choice((1, 1, 2))):  # some are killed once more while they resume
            found["kills"] += in_child(again, after=draw.uniform(0, seconds)) == -signal.SIGKILL
            steps = [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)]
            found["torn"] += sum(not checkpoint.is_whole(path) for path in checkpoint.checkpoints(run))
            found["lost"] += max(steps, default=0) < newest
            newest = max(steps, default=0)
            found["with_checkpoints"] += newest > 0
        assert in_child(again) == 0, again
        found["wrong"] += outcome(run) != expected
        found["resumes"] += found["kills"] > before
        shutil.rmtree(run)
    return found


def in_child(command: list[str], after: float | None = None) -> int:
    """Exit status of a command line in a forked process, which is killed `after` so many seconds."""
    child = os.fork()
    if not child:
        code = 70
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            code = app.run(command)
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ==== a full disk ====


class Disk:
    """Counts every call that writes, and lets the `first`-th fail, or all from there on."""

    def __init__(self, first: int = 0, for_good: bool = False) -> None:
        self.first, self.for_good, self.calls = first, for_good, 0

    def use(self) -> None:
        self.calls += 1
        if self.first and (self.calls == self.first or (self.for_good and self.calls > self.first)):
            raise OSError(28, "No space left on device")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        real_open, real_write = io.open, weights.write_safetensors

        def open_file(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if not set(mode) & set("wax+") or str(file) == os.devnull or str(file).endswith(".lock"):
                return real_open(file, mode, *args, **more)
            self.use()
            opened = real_open(file, mode, *args, **more)
            if "training.safetensors" in str(file):  # written by what writes the model's
                return opened
            write = opened.write

            def half(data: Any) -> int:
                try:
                    self.use()
                except OSError:
                    write(data[: len(data) // 2])
                    opened.flush()
                    raise
                return write(data)

            try:
                opened.write = half
            except AttributeError:
                return opened
            return opened

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def function(*args: Any, **more: Any) -> Any:
                self.use()
                return real(*args, **more)

            return function

        def write_safetensors(path: Any, *args: Any) -> None:
            real_write(path, *args)
            try:
                self.use()
            except OSError:
                os.truncate(path, os.path.getsize(path) // 2)
                raise

        places: list[tuple[Any, str, Any]] = [(io, "open", open_file)]
        places += [(module, "write_safetensors", write_safetensors) for module in (huggingface, checkpoint)]
        places += [(os, name, counted(getattr(os, name))) for name in ("fsync", "mkdir", "rename", "replace")]
        before = [(module, name, getattr(module, name)) for module, name, _ in places]
        for module, name, function in places:
            setattr(module, name, function)
        try:
            yield
        finally:
            for module, name, function in before:
                setattr(module, name, function)


def disk(folder: Path) -> dict[str, int]:
    command = prepare(folder)
    command[command.index(str(STEPS))] = "6"
    assert call([*command, "--out", str(folder / "whole")])[0] == 0
    expected = outcome(folder / "whole")
    writer.RETRY_SECONDS = 0.0
    counter = Disk()
    with counter.installed():
        assert call([*command, "--out", str(folder / "counted")])[0] == 0
    found = {"write_calls": counter.calls, "went_on": 0, "stopped": 0, "tracebacks": 0, "lost": 0, "wrong": 0}
    for first in range(1, counter.calls + 1):
        for for_good in (False, True):
            run = folder / f"run-{first}-{for_good}"
            try:
                with Disk(first, for_good).installed():
                    code, err = call([*command, "--out", str(run)])
            except Exception:
                found["tracebacks"] += 1
                continue
            found["went_on" if code == 0 else "stopped"] += 1
            if code != 0 and sum(line.startswith("error: ") for line in err.splitlines()) != 1:
                found["wrong"] += 1
                print(f"call {first} fails, for good {for_good}: {err}", file=sys.stderr)
            found["lost"] += sum(not checkpoint.is_whole(path) for path in checkpoint.checkpoints(run))
            code, err = call([*command, "--out", str(run), "--resume"])
            if code != 0 or outcome(run) != expected:
                found["wrong"] += 1
                print(f"call {first} failed, for good {for_good}: {err}", file=sys.stderr)
            shutil.rmtree(run)
    return found


# ==== changed files ====


def mutate(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data)) if data else 0
    kind = draw.choice(("bit", "bit", "bit", "byte", "cut", "remove", "insert", "empty", "double", "digit"))
    if kind == "bit" and data:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == "byte" and data:
        return data[:at] + draw.randbytes(1) + data[at + 1 :]
    if kind == "digit":
        digits = [n for n, byte in enumerate(data) if 48 <= byte <= 57][:100_000]
        at = draw.choice(digits) if digits else 0
        return data[:at] + str(draw.randrange(10)).encode() + data[at + 1 :]
    if kind == "insert":
        return data[:at] + draw.randbytes(draw.randrange(1, 64)) + data[at:]
    if kind == "remove":
        return data[:at] + data[at + draw.randrange(1, 64) :]
    return {"cut": data[:at], "empty": b"", "double": data + data}.get(kind, b"\0")


def mutations(folder: Path, count: int, draw: random.Random) -> dict[str, int]:
    """One file is changed; resuming from the run, and loading its model, ends as without the change, or with one line."""
    command = prepare(folder)
    command[command.index(str(STEPS))] = "9"
    tokens, run = folder / "tokens", folder / "run"
    assert call([*command, "--out", str(folder / "first")])[0] == 0
    (cached,) = (folder / "cache" / "tokens").iterdir()
    shutil.copytree(cached, tokens)
    shutil.copytree(cached, folder / "tokens.whole")
    command[1] = str(tokens)
    assert call([*command, "--out", str(run)])[0] == 0
    expected = outcome(run)
    shutil.rmtree(run / "step-000009")  # as if it had been killed before
    shutil.copytree(run, folder / "run.whole")
    resume = ["train", "--resume", "--out", str(run)]
    best = checkpoint.best(folder / "run.whole")
    assert best
    weights = (best / "model.safetensors").read_bytes()
    found = {"mutations": 0, "refused": 0, "went_on": 0, "tracebacks": 0, "wrong": 0, "silent": 0}
    for _ in range(count):
        for name in (run, tokens):
            shutil.rmtree(name)
            shutil.copytree(f"{name}.whole", name)
        files = [p for p in [*run.rglob("*"), *tokens.rglob("*")] if p.is_file() and p.name != ".lock"]
        victim = draw.choice(files)
        data = victim.read_bytes()
        changed = mutate(data, draw)
        if changed == data:
            continue
        victim.write_bytes(changed)
        found["mutations"] += 1
        where = f"{victim.relative_to(folder)}: {len(data)} -> {len(changed)} bytes"
        try:
            if victim.suffix == ".json":
                call(["train", "--config", str(victim), "--dry-run"])
            with contextlib.suppress(UserError):  # a best checkpoint that nobody can know is refused
                loaded = checkpoint.find_model(str(run))
                checkpoint.load(str(run))
                if (loaded / "model.safetensors").read_bytes() != weights:
                    found["wrong"] += 1
                    print("another best:", where, file=sys.stderr)
            code, err = call(resume)
        except Exception as error:
            found["tracebacks"] += 1
            print(f"{type(error).__name__}:", where, file=sys.stderr)
            continue
        found["refused" if code else "went_on"] += 1
        told = "error: " in err or "note: " in err or "skipping" in err
        if code == 0 and {**outcome(run), "log": 0} != {**expected, "log": 0}:
            found["wrong"] += 1
            print("another end:", where, err, file=sys.stderr)
        elif not told and outcome(run) != expected:
            found["silent"] += 1
            print("nothing said:", where, err, file=sys.stderr)
    return found


if __name__ == "__main__":
    what, arguments = sys.argv[1], [int(part) for part in sys.argv[2:]]
    draw = random.Random(arguments[1] if len(arguments) > 1 else time.time_ns())
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where a flush takes no time
    with tempfile.TemporaryDirectory(dir=memory) as name:
        os.chdir(name)
        result = {
            "kills": lambda: kills(Path(name), arguments[0], draw),
            "disk": lambda: disk(Path(name)),
            "mutations": lambda: mutations(Path(name), arguments[0], draw),
        }[what]()
    print(json.dumps(result))
