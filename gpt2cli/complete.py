"""Text from text: prompts to continuations, whole characters as they come, stop strings, files of prompts."""

from __future__ import annotations

import codecs
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2cli.config import SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.generate import Chosen, continue_all
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding, StreamDecoder

RESULT = {"text", "tokens", "finish_reason", "logprobs", "sample", "seed"}  # fields of a line of results
OnText = Callable[[int, str], None]  # (number of the prompt, characters that are certain now)


@dataclass
class Sample:
    """One continuation, without its prompt."""

    text: str = ""  # up to the stop string, if one came
    tokens: list[int] = field(default_factory=list)  # all that were chosen
    finish_reason: str | None = None  # stop, length, context
    logprobs: list[float] | None = None  # the model's own, of each token


@dataclass(frozen=True)
class Completion:
    samples: list[Sample]
    tokens_per_second: float  # of all together
    time_to_first_token: float  # seconds


def complete(
    model: GPT,
    encoding: Encoding,
    prompts: Sequence[str],
    config: SamplingConfig = SamplingConfig(),
    *,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    logprobs: bool = False,
    rows: int = 16,
    on_text: OnText = lambda prompt, piece: None,
    on_end: Callable[[int, Sample], None] = lambda prompt, sample: None,
) -> Completion:
    """Continue every prompt, see `continue_all`. A literal `<|endoftext|>` in a prompt is that one token; a continuation
    ends with it (unless `ignore_eos`), and where one of the `stop` strings appears, which is left out."""
    if "" in stop:
        raise UserError("a --stop string is empty: every text has it at once")
    texts = [_Text(encoding, stop, logprobs) for _ in prompts]
    ids = [encoding.encode(prompt, special=True) for prompt in prompts]
    steps = continue_all(
        model,
        ids,
        config,
        rows=rows,
        eot=None if ignore_eos else encoding.eot,
        n_vocab=encoding.n_vocab,
        stop=lambda prompt, token: texts[prompt].add(token),
        logprobs=logprobs,
    )
    started, first = time.perf_counter(), 0.0
    for step in steps:
        first = first or time.perf_counter() - started
        for chosen in step:
            text = texts[chosen.prompt]
            text.take(chosen)
            on_text(chosen.prompt, text.certain())
            if chosen.finish_reason:
                on_end(chosen.prompt, text.sample)
    count = sum(len(text.sample.tokens) for text in texts)
    return Completion([text.sample for text in texts], count / (time.perf_counter() - started), first)


class _Text:
    """A continuation while it comes."""

    def __init__(self, encoding: Encoding, stop: Sequence[str], logprobs: bool) -> None:
        self.sample = Sample(logprobs=[] if logprobs else None)
        self._decoder, self._stop, self._shown = StreamDecoder(encoding), stop, 0

    def add(self, token: int) -> bool:
        """Whether a stop string is there with this token; the text then ends before it."""
        before = len(self.sample.text)
        self.sample.tokens.append(token)
        self.sample.text += self._decoder.feed(token)
        found = (self.sample.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop)
        first = min((place for place in found if place >= 0), default=None)
        if first is not None:
            self.sample.text = self.sample.text[:first]
        return first is not None

    def take(self, chosen: Chosen) -> None:
        if chosen.logprob is not None and self.sample.logprobs is not None:
            self.sample.logprobs.append(chosen.logprob)
        if chosen.finish_reason:
            stopped = chosen.finish_reason == "stop" and chosen.token is not None
            self.sample.text += "" if stopped else self._decoder.finish()
            self.sample.finish_reason = chosen.finish_reason

    def certain(self) -> str:
        """The characters since the last call that no stop string can take back any more."""
        text, end = self.sample.text, len(self.sample.text)
        if not self.sample.finish_reason:
            ends = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            end -= max(ends, default=0)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


# ==== files of prompts ====


def read_prompts(data: bytes, path: object) -> list[dict[str, Any]]:
    """The lines of JSONL, each an object with a `prompt` (a string alone is one, too). Raises UserError, naming the line, and
    the `path` it is from."""
    lines: list[dict[str, Any]] = []
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: bad byte at offset {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        value = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise UserError(f"{path}, line {number}: expected an object with a text as its 'prompt'")
        if not value["prompt"]:
            raise UserError(f"{path}, line {number}: the prompt is empty: give some text, or <|endoftext|> to start a document")
        lines.append(value)
    if not lines:
        raise UserError(f"{path} has no prompts: expected a line like " + '{"prompt": "Once upon a time"}')
    return lines


def own_fields(line: dict[str, Any]) -> dict[str, Any]:
    """Of a line with a prompt those that are carried along: not those that its result has."""
    return {name: value for name, value in line.items() if name not in RESULT}


def as_line(value: dict[str, Any]) -> str:
    """JSON, as it is read; half of a surrogate pair, which UTF-8 has no bytes for, as JSON writes it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def done_already(path: Path, lines: Sequence[dict[str, Any]], seed: int) -> int:
    """How many of `lines` have their result in a file that is to be gone on with, each with `seed` and its number. A last line
    that was not finished is cut off. Raises UserError where the file is of other prompts, or of another seed."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    results, rest = data[:end].splitlines(), data[end:]
    begins = as_line(own_fields(lines[len(results)]))[:-1].encode() + b", " if len(results) < len(lines) else b""
    if rest and not (begins and (rest.startswith(begins) or begins.startswith(rest))):  # no result that was not finished
        results.append(rest)
    for number, result in enumerate(results):
        try:
            found = json.loads(result)
            same = (found["prompt"], found["seed"]) == (lines[number]["prompt"], seed + number)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            same = False
        if not same:
            raise UserError(
                f"{path}, line {number + 1} is not what prompt {number + 1} with seed {seed + number} gives: it is of another "
                "job; give another --out"
            )
    os.truncate(path, end)
    return len(results)


class InOrder:
    """Lines that are ready in any order, written in theirs."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._ready, self.next = write, dict[int, str](), 0

    def put(self, number: int, line: str) -> None:
        self._ready[number] = line
        for line in self._written():
            self._write(line + "\n")

    def _written(self) -> Iterator[str]:
        while self.next in self._ready:
            yield self._ready.pop(self.next)
            self.next += 1
