"""Times the product's own `generate`, alone or in turn with other libraries at the same work."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F

from gpt2cli import device, peers, prove
from gpt2cli.bench import OnTurn, nobody, seconds_of
from gpt2cli.config import SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.generate import generate
from gpt2cli.linear import FEW, Int8Linear, few_for, prepare
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding


@dataclass(frozen=True)
class GenerateRow:
    who: str
    time_to_first_token: float  # seconds, the prompt's forward included
    decode_tokens_per_second: float  # of all rows together, after the first token
    spread: tuple[float, float]  # slowest and fastest
    of_ours: float  # its decoding rate against ours, median of the turns
    read_rate: float  # bytes of our weights a second while decoding: bandwidth is the limit for one row
    same_tokens: int  # how many of the first row's tokens are ours, up to the first that is not


def ours(model: GPT, where: torch.device) -> peers.Continue:
    def run(prompt: Sequence[int], rows: int, count: int) -> list[int]:
        config = SamplingConfig(max_new_tokens=count, greedy=True)
        return [row[0] or 0 for row in generate(model, prompt, config, num_samples=rows)]

    return run


def bench_generate(
    model: GPT,
    where: torch.device,
    dtype: str,
    *,
    quantize: str | None = None,
    compare: Sequence[str] = (),
    B: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    on_turn: OnTurn = nobody,
) -> list[GenerateRow]:
    """Greedy decoding of B rows from one prompt of random ids, each library in turn, medians. A run with one new token is
    the time to the first; what longer ones take beyond that is decoding."""
    if prompt_tokens + new_tokens > model.config.block_size:
        raise UserError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the model's context of "
            f"{model.config.block_size}: lower --prompt-tokens or --new-tokens"
        )
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    with peers.started(compare, model, where, dtype, quantize) as others:
        device.set_up(seed=0)
        mine = prepare(copy.deepcopy(model).to(where, device.DTYPES[dtype]).eval(), quantize, rows=B)
        small = isinstance(vars(mine).get("head"), Int8Linear)
        me = "gpt2 " + ("int8" if small else f"{dtype}, rounded to {quantize}" if quantize else dtype)
        me += f", numba {version('numba')}" if few_for(mine, B) else ""
        ways = {me: ours(mine, where)} | others
        tokens = {}
        for who, run in ways.items():
            on_turn(f"warm-up, {who}")
            tokens[who] = run(prompt, B, new_tokens)
        firsts: dict[str, list[float]] = {who: [] for who in ways}
        rates: dict[str, list[float]] = {who: [] for who in ways}
        for turn in range(repeats):
            for who, run in ways.items():
                on_turn(f"turn {turn + 1} of {repeats}, {who}")
                first = seconds_of(partial(run, prompt, B, 1), where)
                whole = seconds_of(partial(run, prompt, B, new_tokens), where)
                firsts[who].append(first)
                rates[who].append(B * (new_tokens - 1) / (whole - first))
    read = weight_bytes(model, "int8" if small else dtype)
    return [
        GenerateRow(
            who=who,
            time_to_first_token=statistics.median(firsts[who]),
            decode_tokens_per_second=statistics.median(rates[who]),
            spread=(min(rates[who]), max(rates[who])),
            of_ours=statistics.median(a / b for a, b in zip(rates[who], rates[me], strict=True)),
            read_rate=read * statistics.median(rates[who]) / B,
            same_tokens=agreement(tokens[me], tokens[who]),
        )
        for who in ways
    ]


def weight_bytes(model: GPT, dtype: str) -> int:
    """Bytes a step reads: all weights but the position embeddings, of which it needs one row."""
    size = 1 if dtype == "int8" else device.DTYPES[dtype].itemsize
    return size * sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def read_bandwidth(where: torch.device) -> float:
    """Bytes a second of a sum over a gigabyte, best of a few: the roof for decoding one row."""
    numbers = torch.ones(1 << 28, device=where)
    return numbers.nbytes / min(seconds_of(numbers.sum, where) for _ in range(5))


@torch.inference_mode()
def perplexities(model: GPT, encoding: Encoding, quantize: str) -> tuple[float, float]:
    """Of the model and of its quantized self, on the sample text that conversions are proven on, in windows of as many
    tokens as still are multiplied as in decoding."""
    T = min(FEW, model.config.block_size)
    ids = prove.sample_ids(encoding, model.config).flatten()
    windows = ids[: len(ids) // (T + 1) * (T + 1)].view(-1, T + 1)

    def perplexity(model: GPT) -> float:
        logits = (model.head(model.hidden(window[None, :-1]))[0].float() for window in windows)
        losses = [F.cross_entropy(one, window[1:]) for one, window in zip(logits, windows, strict=True)]
        return math.exp(float(torch.stack(losses).mean()))

    return perplexity(model), perplexity(prepare(copy.deepcopy(model), quantize))
