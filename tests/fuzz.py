"""Hostile model files, many at a time: each reader gets valid files with something changed, and may read them or refuse
them with one line, but never fall over, fill the memory, take long, or run anything. Anyone can repeat it; the tests do, in
short.

    python -m tests.fuzz 10000 [seed]

Prints one JSON object; `tracebacks`, `slow` and `executed` are to be 0, and `largest` (bytes of memory beyond what reading
the unchanged files takes) small.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file

from gpt2cli import GPT, Encoding, UserError
from gpt2cli.convert import convert
from gpt2cli.formats import huggingface, openai
from gpt2cli.identify import find

from .conftest import make_model
from .crash import mutate

HOUSE = Path(__file__).parent
SLOW = 5.0  # seconds
ROOM = 2 << 30  # bytes of address space beyond those in use: who wants more is told no by the system
EXTREMES = (0, 1, -1, 127, 255, 1 << 15, 1 << 24, (1 << 31) - 1, -(1 << 31), 1 << 32, (1 << 62), (1 << 63) - 1, -(1 << 63))


class Trap:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, ("executed",)


def prepare(folder: Path) -> list[Path]:
    """One valid source of each format and kind of file."""
    model, tokens = make_model(vocab_size=257), Encoding({bytes([n]): n for n in range(256)}, [], eot=256)
    hf = folder / "hf"
    hf.mkdir()
    huggingface.write(hf, model.config, model.state_dict(), tokens)
    state = load_file(hf / "model.safetensors")
    for name, save in {
        "bin": lambda path: torch.save(state, path),
        "old": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
    }.items():
        shutil.copytree(hf, folder / name)
        (folder / name / "model.safetensors").unlink()
        save(folder / name / "pytorch_model.bin")
    sharded = folder / "sharded"
    shutil.copytree(hf, sharded)
    (sharded / "model.safetensors").rename(sharded / "one.safetensors")
    index = {"weight_map": dict.fromkeys(state, "one.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(str(hf), folder / "ckpt.pt", to="nanogpt")
    convert(str(hf), folder / "model.bin", to="llmc")
    shutil.copytree(HOUSE / "data" / "openai", folder / "openai")
    torch.save({"model": {}, "extra": Trap()}, folder / "trap.pt")
    return [
        hf,
        folder / "bin",
        folder / "old",
        sharded,
        folder / "ckpt.pt",
        folder / "model.bin",
        folder / "openai",
        folder / "trap.pt",
    ]


def changed(path: Path, data: bytes, draw: random.Random) -> bytes:
    """A file's bytes mistreated; often with its checksums put right again, which would keep the readers from seeing more."""
    if data[:4] == b"PK\3\4" and draw.random() < 0.7:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        victim = draw.choice([name for name in entries if name.endswith(("data.pkl", "byteorder", "version", "/0"))])
        entries[victim] = mistreat(entries[victim], draw)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return file.getvalue()
    after = mistreat(data, draw)
    if path.suffix == ".index" and len(after) == len(data) and draw.random() < 0.8:
        footer = openai._Bytes(data[-48:])
        places = [(footer.varint(), footer.varint()) for _ in range(2)]
        (first,) = (openai._Bytes(value) for _, value in openai._block(data, *places[1]))
        for begin, size in (places[1], (first.varint(), first.varint())):
            crc = openai._masked(openai._crc32c(after[begin : begin + size + 1]))
            after = after[: begin + size + 1] + crc.to_bytes(4, "little") + after[begin + size + 5 :]
    return after


def mistreat(data: bytes, draw: random.Random) -> bytes:
    """As `crash.mutate` does, or with a number that is too large, or text where a number was."""
    kind = draw.choice(("any", "any", "number", "number", "number", "text", "text", "swap"))
    begin = draw.choice((0, 0, 0, max(0, len(data) - 512)))  # most of what decides is at an end
    if kind == "number" and data:
        size = draw.choice((4, 8))
        at = begin + draw.randrange(min(1024, len(data) - begin))
        value = draw.choice((*EXTREMES, draw.randrange(1 << 40))) & ((1 << 8 * size) - 1)
        return data[:at] + value.to_bytes(size, "little") + data[at + size :]
    if kind == "text":
        numbers = [match.span() for match in re.finditer(rb"(?<=[\[:, ])-?\d+", data[:100_000])]
        if numbers:
            start, end = draw.choice(numbers)
            other = draw.choice(
                (b"1e999", b"-1", b"0", b"10000000000000000000000", b"null", b'"a"', b"[" * 10_000, b"4294967296")
            )
            return data[:start] + other + data[end:]
    if kind == "swap":
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        return data[b:] + data[a:b] + data[:a]
    return mutate(data, draw)


def read_all(source: Path) -> None:
    contents = find(str(source)).contents
    GPT.from_state(contents.config, contents.weights)


def used() -> int:
    """Bytes of address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fuzz(folder: Path, count: int, draw: random.Random, say: Callable[[str], None]) -> dict[str, int]:
    sources = prepare(folder)
    for source in sources[:-1]:
        read_all(source)
    resource.setrlimit(resource.RLIMIT_AS, (used() + ROOM, resource.RLIM_INFINITY))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"cases": 0, "read": 0, "refused": 0, "tracebacks": 0, "slow": 0, "executed": 0, "largest": 0}
    while found["cases"] < count:
        source = draw.choice(sources)
        victim = draw.choice([path for path in source.iterdir() if path.suffix != ".npz"]) if source.is_dir() else source
        data = victim.read_bytes()
        after = changed(victim, data, draw)
        if after == data:
            continue
        victim.write_bytes(after)
        found["cases"] += 1
        began = time.process_time()
        try:
            read_all(source)
            found["read"] += 1
        except UserError:
            found["refused"] += 1
        except BaseException as error:
            found["tracebacks"] += 1
            kept = victim.with_name(f"{victim.name}.{found['cases']}")
            say(f"{type(error).__name__}: {error} ({source.name}/{kept.name})")
        if time.process_time() - began > SLOW:
            found["slow"] += 1
            say(f"{time.process_time() - began:.0f} s: {source.name}/{victim.name}, {len(data)} -> {len(after)} bytes")
        victim.write_bytes(data)
        found["executed"] += (folder / "executed").exists()
    found["largest"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    return found


if __name__ == "__main__":
    draw = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns())
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        os.chdir(name)
        result = fuzz(Path(name), int(sys.argv[1]), draw, lambda message: print(message, file=sys.stderr))
    print(json.dumps(result))
    sys.exit(bool(result["tracebacks"] or result["slow"] or result["executed"]))
