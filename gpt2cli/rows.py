"""The prompts that are being continued, as rows of tensors: they enter, take a token at a time, and leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2cli.ahead import Graphs, Readback, put
from gpt2cli.cache import KVCache, Masked, Prompts
from gpt2cli.config import SamplingConfig
from gpt2cli.device import memory_total
from gpt2cli.errors import UserError
from gpt2cli.errors import size as in_bytes
from gpt2cli.loss import multiple
from gpt2cli.model import GPT, Cache
from gpt2cli.sampling import choose, penalize

if TYPE_CHECKING:
    from gpt2cli.drawing import Draw
    from gpt2cli.fused import Fused

PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PROMPT_TOKENS = 2048  # at once, so that memory is bounded
FEW_ROWS = 8  # for which reading all that there is room for costs little: the weights are most of what is read
DRAWN = 256  # random numbers at a time
REACH = 128  # tokens; of more rows that many more are read at a time


class Row:
    """A prompt that is being continued."""

    def __init__(self, number: int, prompt: Sequence[int], config: SamplingConfig) -> None:
        self.number, self.ids, self.start = number, list(prompt), len(prompt)
        self._generator = torch.Generator().manual_seed(config.seed + number)
        self._uniform: list[float] = []  # a number for each token
        self.finish_reason: str | None = None

    @property
    def count(self) -> int:
        return len(self.ids) - self.start

    @property
    def uniform(self) -> float:
        """In [0, 1), what its next token is drawn by."""
        while self.count >= len(self._uniform):
            self._uniform += torch.rand(DRAWN, generator=self._generator).tolist()
        return self._uniform[self.count]


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in order of length, together as long as what they are padded to stays within `PROMPT_TOKENS`."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if groups and (len(groups[-1]) + 1) * len(row.ids) <= PROMPT_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _fused(model: GPT, cache: KVCache) -> Fused | None:
    """Where it is of use. Triton comes with torch for CUDA, on Linux."""
    if not model.wpe.weight.is_cuda:
        return None
    try:
        from gpt2cli import fused
    except ImportError:
        return None
    return fused.Fused(model, cache) if fused.suits(model) else None


class Rows:
    """The rows that are being continued: the first of the cache's, in order, without gaps. What a step reads and writes stays
    where it is, so that a GPU can repeat it; the host learns afterwards what was chosen."""

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig,
        size: int,
        n_vocab: int | None,
        logprobs: bool,
    ) -> None:
        from gpt2cli.linear import few_for  # which asks for large pages: not where a model is trained

        self.model, self.config, self.size, self.n_vocab = model, config, size, n_vocab
        self.rows: list[Row] = []
        like = model.wpe.weight
        longest = max(map(len, prompts), default=0) + config.max_new_tokens
        shape = model.config
        numbers = 2 * shape.vocab_size + 2 * shape.n_layer * shape.n_embd * min(shape.block_size, longest)  # of a row
        needed, there = size * numbers * like.itemsize, memory_total(like.device)
        if 0 < there < needed:
            raise UserError(
                f"{size:,} rows at a time need {in_bytes(needed)} of memory, {in_bytes(there)} are there: "
                "lower --num-samples or --batch-size"
            )
        self.cache = KVCache(model.config, size, min(model.config.block_size, longest), like)
        V = model.config.vocab_size
        self.wide = like.new_zeros(size, V + -V % multiple(like.device.type))
        self.logits = self.wide[:, :V]  # of each row's next token
        self.seen = like.new_zeros(self.logits.shape, dtype=torch.bool) if config.repetition_penalty != 1 else None
        self.uniform = like.new_zeros(size, dtype=torch.float32)
        self.new = like.new_zeros(size, dtype=torch.int64)  # each row's token chosen last
        self.logprobs = like.new_zeros(size, dtype=torch.float32) if logprobs else None  # and its log probability
        self.readback = Readback(self.new) if self.logprobs is None else Readback(self.new, self.logprobs)
        how = replace(config, seed=0, max_new_tokens=1)
        kind = (model.config, like.dtype, type(vars(model).get("head")), how, size, n_vocab, logprobs, self.cache.size)
        self.graphs = Graphs(like.device, kind)
        self.fused = _fused(model, self.cache) if self.graphs.used else None
        few = None if self.graphs.used else few_for(model, size)
        self.few = few.Few(model, self.cache) if few else None
        self.draw = self._drawing() if self.fused else None

    def _drawing(self) -> Draw:
        from gpt2cli.drawing import drawing  # which needs Triton, as `fused` does

        return drawing(self.config, self.logits[:, : self.n_vocab])

    def admit(self, rows: Sequence[Row]) -> None:
        """Compute their prompts' keys, values and first logits, several at once; those of the same prompt are copied."""
        alike: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            alike.setdefault(tuple(row.ids), []).append(row)
        for group in _groups([same[0] for same in alike.values()]):
            self._enter(group)
        for first, *others in alike.values():
            source = self.rows.index(first)
            for row in others:
                self.cache.copy(source, len(self.rows))
                self.logits[len(self.rows)] = self.logits[source]
                self.rows.append(row)
        if self.seen is not None:
            for n, row in enumerate(self.rows):
                if row.count == 0:
                    self.seen[n] = False
                    self.seen[n, self._tensor(row.ids)] = True

    def _enter(self, group: Sequence[Row]) -> None:
        """Several prompts, the longest last; what pads the others comes after them, where they do not see it."""
        prompts = [row.ids[-self.model.config.block_size :] for row in group]
        T, places = len(prompts[-1]), slice(len(self.rows), len(self.rows) + len(group))
        ids = self._tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts])  # (n, T)
        hidden = self._hidden(ids, Prompts(self.cache, places.start))  # (n, T, C)
        last = self._tensor([[len(prompt) - 1] for prompt in prompts])  # (n, 1)
        self.logits[places] = self.model.head(hidden.take_along_dim(last[:, :, None], dim=1)[:, 0])
        self.cache.lengths[places] = [len(prompt) for prompt in prompts]
        self.rows += group

    def choose(self) -> None:
        """The next token of every row."""
        if not self.config.greedy:
            put(self.uniform, [row.uniform for row in self.rows])
        B = self._extent()
        self.graphs.run(("choose", B), partial(self._choose, B))
        self.readback.start()

    def can_go_ahead(self) -> bool:
        """Whether a GPU may compute the next logits before the host knows the tokens: if it needs no more than those, and
        there is a row that goes on if none chooses to end."""
        fits = all(len(row.ids) < self.model.config.block_size for row in self.rows)
        return self.graphs.used and fits and any(row.count + 1 < self.config.max_new_tokens for row in self.rows)

    def chosen(self) -> Iterator[tuple[Row, int, float | None]]:
        """What `choose` chose; it becomes a part of the rows."""
        tokens, *told = self.readback.lists()
        for n, row in enumerate(self.rows):
            row.ids.append(int(tokens[n]))
            yield row, row.ids[-1], told[0][n] if told else None

    def leave_out(self) -> None:
        """The rows that have ended: the last ones take their places."""
        for n in reversed(range(len(self.rows))):
            if self.rows[n].finish_reason:
                last = len(self.rows) - 1
                if n < last:
                    self.rows[n] = self.rows[last]
                    self.cache.copy(last, n)
                    for state in (self.logits, self.new, self.seen):
                        if state is not None:
                            state[n] = state[last]
                self.cache.lengths[last] = 0
                self.rows.pop()

    def step(self) -> None:
        """Every row's next logits."""
        B, block_size = len(self.rows), self.model.config.block_size
        full = [n for n, row in enumerate(self.rows) if len(row.ids) > block_size]  # they slide
        for n in full:
            self.cache.lengths[n] = 0  # every token moves to another position, so nothing in the cache is of use
        if len(full) < B:
            if self.graphs.used:
                self._step_ahead(self._extent())
            elif self.few:
                self.cache.tell()
                self.few.step(self.new[:B], self.logits[:B])
            else:
                self._step(self.cache.rows(B), B)
            self.cache.lengths[:B] = [length + 1 for length in self.cache.lengths[:B]]
        if full:
            some = max(1, PROMPT_TOKENS // block_size)
            for places in (full[n : n + some] for n in range(0, len(full), some)):
                seen = self._tensor([self.rows[n].ids[-block_size:] for n in places])
                self.logits[places] = self.model.head(self._hidden(seen)[:, -1])

    def _step_ahead(self, B: int) -> None:
        self.cache.tell()
        S = self._reach()
        by_model = partial(self._step, Masked(self.cache, B, S), B)
        if self.fused is None or self.fused.verdict(B) is False:
            self.graphs.run(("step", B, S), by_model)
        elif self.fused.verdict(B):
            self.graphs.run(("fused step", B), partial(self.fused.step, self.new[:B], self.wide[:B]))
            # It has counted in rows without a prompt, too: where there are some, it is told at the next step.
            self.cache.known = [length + (n < B) for n, length in enumerate(self.cache.lengths)]
        else:  # not known yet
            by_model()
            self.fused.judge(self.new[:B], self.wide[:B])
            self.cache.known = None
            if not self.fused.verdict(B):
                self.cache.tell()
                by_model()  # once more, since keys and values are wrong now

    # ==== on the device alone, the first B rows ====

    def _choose(self, B: int) -> None:
        logits = plain = self.logits[:B, : self.n_vocab]
        if self.seen is not None:
            logits = penalize(plain.float(), self.seen[:B, : self.n_vocab], self.config.repetition_penalty)
        if self.draw:
            self.draw(logits, self.config, self.uniform[:B], self.new[:B])
        else:
            self.new[:B] = choose(logits, self.config, self.uniform[:B])
        new = self.new[:B, None]  # (B, 1)
        if self.seen is not None:
            self.seen[:B].scatter_(1, new, True)
        if self.logprobs is not None:
            self.logprobs[:B] = plain.float().log_softmax(dim=-1).gather(1, new)[:, 0]

    def _step(self, cache: Cache, B: int) -> None:
        self.logits[:B] = self.model.head(self._hidden(self.new[:B, None], cache)[:, -1])

    def _hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        # cuDNN's attention, which torch prefers on recent GPUs, makes a plan for every number of tokens it has not yet met.
        with sdpa_kernel(PLANLESS) if ids.is_cuda else nullcontext():
            return self.model.hidden(ids, cache)

    # ==== of which sizes: each is a graph, so there are to be few ====

    def _extent(self) -> int:
        """Rows to work on, those in use and maybe some more."""
        if not self.graphs.used:
            return len(self.rows)
        extent = self.size
        while extent // 2 >= len(self.rows):
            extent //= 2
        return extent

    def _reach(self) -> int:
        """Tokens to read of each row: the longest with its new one, and maybe some more."""
        longest = max(self.cache.lengths) + 1
        return self.cache.size if self.size <= FEW_ROWS else min(self.cache.size, -(-longest // REACH) * REACH)

    def _tensor(self, ids: object) -> Tensor:
        return torch.tensor(ids, device=self.logits.device)
