"""Times the product's own work: attention kernels and `tokenize`; the rest is in the files of its name. Everything is run
several times, in turn where things are compared, after one to warm up but for `tokenize`; the median is reported."""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from gpt2cli import __version__, device
from gpt2cli.corpus import tokenize
from gpt2cli.documents import EMBEDDED, opened, read
from gpt2cli.errors import UserError, many
from gpt2cli.shards import Tokens
from gpt2cli.survey import Policy
from gpt2cli.tokenizer import Encoding

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
OnTurn = Callable[[str], None]  # is told what is timed next


def nobody(what: str) -> None: ...


def machine(where: torch.device) -> dict[str, Any]:
    """What every figure depends on beside the code."""
    return {"device": device.describe(where), "gpt2cli": __version__, "date": time.strftime("%Y-%m-%d")}


def conditions(where: torch.device, dtype: str) -> dict[str, Any]:
    """What a figure of matrix products depends on, and the roof to hold it against."""
    return machine(where) | {
        "dtype": dtype,
        "torch": torch.__version__,
        "matmul_flops": device.matmul_rate(where, dtype, seconds=1.0),
        "datasheet_flops": device.datasheet_rate(where),
    }


def seconds_of(work: Callable[[], object], where: torch.device) -> float:
    device.synchronize(where)
    started = time.perf_counter()
    work()
    device.synchronize(where)
    return time.perf_counter() - started


# ==== attention ====


@dataclass(frozen=True)
class AttentionRow:
    T: int
    kernel: str
    forward: float  # seconds
    backward: float  # seconds
    output_error: float  # largest difference from float64
    gradient_error: float  # largest difference of the gradients of q, k and v from float64's


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention written out: (B, nh, T, hs) each."""
    T = q.shape[2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, nh, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v  # (B, nh, T, hs)


def sdpa_with(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([device.KERNELS[kernel]]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend, mask = compiled_flex(q.shape[2], q.device.type)
    return attend(q, k, v, block_mask=mask)


@cache
def compiled_flex(T: int, device_type: str) -> tuple[Callable[..., Tensor], Any]:
    """Compiled once for a T, as a program that uses it would."""
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device_type)
    return torch.compile(flex.flex_attention), mask


def attention_kernels(where: torch.device, dtype: torch.dtype, head_size: int) -> tuple[dict[str, Attention], dict[str, str]]:
    """The kernels that run here forward and backward, and why the others do not."""
    candidates: dict[str, Attention] = {"explicit": explicit_attention}
    candidates |= {kernel: partial(sdpa_with, kernel) for kernel in ("math", "flash", "efficient", "cudnn")}
    candidates["flex"] = flex_attention
    there, missing = {}, {}
    for name, attend in candidates.items():
        q = torch.randn(1, 1, 128, head_size, device=where, dtype=dtype, requires_grad=True)
        try:
            attend(q, q, q).sum().backward()
            there[name] = attend
        except Exception as error:  # a compiler or a driver raises what it likes
            lines = [line for line in str(error).splitlines() if line.strip()]
            missing[name] = lines[0][:160] if lines else type(error).__name__
            if where.type != "cuda" and name in ("efficient", "cudnn", "flex"):
                missing[name] = "forward and backward it needs CUDA"
    return there, missing


def bench_attention(
    where: torch.device,
    dtype: str,
    lengths: Sequence[int],
    *,
    B: int,
    n_head: int,
    head_size: int,
    repeats: int,
    on_turn: OnTurn = nobody,
) -> tuple[list[AttentionRow], dict[str, str]]:
    """Every kernel this device has at every length T, run in turn; and why the others are missing."""
    kernels, missing = attention_kernels(where, device.DTYPES[dtype], head_size)
    rows = []
    for T in lengths:
        generator = torch.Generator().manual_seed(T)
        exact = [torch.randn(B, n_head, T, head_size, generator=generator, dtype=torch.float64) for _ in range(4)]
        inputs = [x.to(where, device.DTYPES[dtype]) for x in exact[:3]]
        rounded = [x.double().cpu().requires_grad_() for x in inputs]
        expected = explicit_attention(rounded[0], rounded[1], rounded[2])
        expected_gradients = torch.autograd.grad(expected, rounded, exact[3])
        expected = expected.detach()
        timed: dict[str, list[tuple[float, float]]] = {name: [] for name in kernels}
        errors: dict[str, tuple[float, float]] = {}
        for turn in range(repeats + 1):
            for name, attend in kernels.items():
                on_turn(f"T = {T:,}: turn {turn} of {repeats}, {name}" if turn else f"T = {T:,}: warm-up, {name}")
                forward, backward, output, gradients = _once(attend, inputs, exact[3], where)
                if turn:  # the first one warms up
                    timed[name].append((forward, backward))
                else:
                    errors[name] = _error([output], [expected]), _error(gradients, expected_gradients)
        for name, times in timed.items():
            forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
            rows.append(AttentionRow(T, name, forward, backward, *errors[name]))
    return rows, missing


def _once(
    attend: Attention, inputs: Sequence[Tensor], grad: Tensor, where: torch.device
) -> tuple[float, float, Tensor, Sequence[Tensor]]:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    outputs: list[Tensor] = []
    forward = seconds_of(lambda: outputs.append(attend(q, k, v)), where)
    grad = grad.to(outputs[0])
    backward = seconds_of(lambda: outputs.extend(torch.autograd.grad(outputs[0], (q, k, v), grad)), where)
    return forward, backward, outputs[0].detach(), outputs[1:]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a.double().cpu() - b).abs().max()) for a, b in zip(found, expected, strict=True))


# ==== tokenizing ====


@dataclass(frozen=True)
class TokenizeRow:
    encoder: str
    workers: int
    seconds: float  # from the file to finished shards, median
    bytes_per_second: float
    speedup: float  # of one thread of tiktoken in the same turns
    equal: bool  # to tiktoken's ids of whole documents


@contextlib.contextmanager
def text_to_tokenize(text: Path | None) -> Iterator[Path]:
    """`text`, or the embedded one eight times (40 MB)."""
    if text is not None:
        yield text
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch, opened([EMBEDDED]) as (embedded,):
        once = b"".join(chunk.data for chunk in read(embedded, "strict"))
        path = Path(scratch, "shakespeare.txt")
        path.write_bytes(b"<|endoftext|>".join([once] * 8))
        yield path


def _read(text: Path) -> str:
    try:
        return text.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{text} is not a text in UTF-8: bad byte at offset {error.start}; expected one such file") from None


def bench_tokenize(text: Path, workers: Sequence[int], repeats: int, on_turn: OnTurn = nobody) -> list[TokenizeRow]:
    """The product's `tokenize` on a text file, with each encoder there is, in turn with what people write themselves: the
    whole file through tiktoken on one thread, and its ids to a file."""
    ways = [("alone", 1), *((encoder, count) for encoder in ("tiktoken", "fastest") for count in workers)]
    times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    names, equal = {("alone", 1): f"tiktoken {version('tiktoken')} alone"}, {("alone", 1): True}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch:
        for turn in range(repeats):
            for way in ways:
                on_turn(f"turn {turn + 1} of {repeats}: {way[0]}, {many(way[1], 'worker')}")
                out = Path(scratch, "out")
                started = time.perf_counter()
                if way[0] == "alone":
                    expected = Encoding.gpt2().encode_documents(_read(text)).astype(np.uint16)
                    expected.tofile(Path(scratch, "ids"))
                else:
                    policy = Policy(val_fraction=0)
                    fast = way[0] == "fastest"
                    manifest = tokenize([text], out, encoding=Encoding.gpt2(), policy=policy, workers=way[1], fast=fast)
                times[way].append(time.perf_counter() - started)
                if out.exists():
                    names[way] = f"gpt2 tokenize, {manifest.encoder.split(',')[0]}"
                    tokens = Tokens.open(out, "train")
                    equal[way] = equal.get(way, True) and np.array_equal(tokens.read(0, len(tokens)), expected)
                    shutil.rmtree(out)
    return [
        TokenizeRow(
            encoder=names[way],
            workers=way[1],
            seconds=statistics.median(taken),
            bytes_per_second=text.stat().st_size / statistics.median(taken),
            speedup=statistics.median(alone / here for alone, here in zip(times["alone", 1], taken, strict=True)),
            equal=equal[way],
        )
        for way, taken in times.items()
        if not (way[0] == "fastest" and "tiktoken" in names[way])  # nothing faster is installed
    ]


def as_json(what: str, facts: dict[str, Any], rows: Sequence[Any], missing: dict[str, str] | None = None) -> dict[str, Any]:
    """The object of `--json`."""
    extra = {"missing": missing} if missing is not None else {}
    return {"bench": what, **facts, "rows": [asdict(row) for row in rows], **extra}
