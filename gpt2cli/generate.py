"""Ids from ids: prompts of any lengths, continued together. It knows no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2cli.ahead import Graphs, Readback, put
from gpt2cli.cache import KVCache, Masked
from gpt2cli.config import SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.model import GPT, Cache
from gpt2cli.sampling import choose, penalize

PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FEW_ROWS = 8
REACH = 128  # tokens

Stop = Callable[[int, int], bool]  # (number of the prompt, its new token): is it to end with this token?


@dataclass(frozen=True)
class Chosen:
    """A new token of one prompt, the end of it, or both."""

    prompt: int  # its number, from 0
    token: int | None  # None where it ended before one: the model chose `eot`
    finish_reason: str | None = None  # stop (`eot`, or the caller's word), length, or context
    logprob: float | None = None  # the model's own, of this token, before temperature and all that follows


def generate(
    model: GPT,
    prompt: Sequence[int] | Tensor,
    config: SamplingConfig = SamplingConfig(),
    *,
    num_samples: int = 1,
    eot: int | None = None,
    n_vocab: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompt` in `num_samples` rows at once; yields the rows' new ids, one list a position, None for a row that
    has ended. See `continue_all`."""
    if num_samples < 1:
        raise UserError(f"--num-samples must be at least 1, but is {num_samples}")
    if isinstance(prompt, Tensor) and prompt.dim() != 1:
        raise UserError(f"the prompt has shape {tuple(prompt.shape)}; expected one row of ids, (T)")
    ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    for step in continue_all(model, [ids] * num_samples, config, rows=num_samples, eot=eot, n_vocab=n_vocab):
        new = {chosen.prompt: chosen.token for chosen in step if chosen.token is not None}
        if new:
            yield [new.get(n) for n in range(num_samples)]


@torch.inference_mode()
def continue_all(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig = SamplingConfig(),
    *,
    rows: int = 16,
    eot: int | None = None,
    n_vocab: int | None = None,
    stop: Stop = lambda prompt, token: False,
    logprobs: bool = False,
) -> Iterator[list[Chosen]]:
    """Continue every prompt, up to `rows` of them at a time: where one ends, the next takes its row. Yields what each step
    chose. Prompt n draws from its own generator, seeded with seed + n, so that its continuation does not depend on its
    neighbours. Ids from `n_vocab` up are never chosen.

    Raises UserError for an empty prompt, ids the model does not know, and what does not fit the context (see
    `SamplingConfig.overflow`), before anything is computed.
    """
    for n, prompt in enumerate(prompts):
        check_prompt(model, prompt, config, which=f"prompt {n + 1}" if len(prompts) > 1 else "the prompt")
    batch = _Batch(model, prompts, config, min(rows, len(prompts)), n_vocab, logprobs)
    waiting = deque(enumerate(prompts))
    while waiting or batch.rows:
        while waiting and len(batch.rows) < batch.size:
            batch.admit(*waiting.popleft())
        batch.choose()
        if ahead := batch.can_go_ahead():
            batch.step()
        step = []
        for row, token, logprob in batch.chosen():
            if token == eot:
                row.finish_reason = "stop"
                step.append(Chosen(row.number, None, "stop"))
                continue
            if stop(row.number, token):
                row.finish_reason = "stop"
            elif row.count == config.max_new_tokens:
                row.finish_reason = "length"
            elif len(row.ids) > model.config.block_size and config.overflow != "slide":
                row.finish_reason = "context"
            step.append(Chosen(row.number, token, row.finish_reason, logprob))
        yield step
        batch.leave_out()
        if not ahead:
            batch.step()


def check_prompt(model: GPT, prompt: Sequence[int], config: SamplingConfig, which: str = "the prompt") -> None:
    """Raises UserError for one that cannot be continued."""
    block_size = model.config.block_size
    if not prompt:
        raise UserError(f"{which} is empty: give some text, or <|endoftext|> to start a document")
    for token in prompt:
        if not 0 <= token < model.config.vocab_size:
            raise UserError(f"{which} holds id {token:,}, but the model knows {model.config.vocab_size:,} ids")
    if len(prompt) > block_size and config.overflow != "slide":
        raise UserError(
            f"{which} has {len(prompt):,} tokens, but the model sees {block_size:,}: shorten it, or use --overflow slide"
        )
    if config.overflow == "error" and len(prompt) + config.max_new_tokens > block_size:
        raise UserError(
            f"{which} has {len(prompt):,} tokens, and {config.max_new_tokens:,} more do not fit the context of "
            f"{block_size:,}: lower --max-new-tokens, or use --overflow stop or slide"
        )


class _Row:
    """A prompt that is being continued."""

    def __init__(self, number: int, prompt: Sequence[int], config: SamplingConfig) -> None:
        self.number, self.ids, self.start = number, list(prompt), len(prompt)
        generator = torch.Generator().manual_seed(config.seed + number)
        self.uniform = torch.rand(config.max_new_tokens, generator=generator).tolist()
        self.finish_reason: str | None = None

    @property
    def count(self) -> int:
        return len(self.ids) - self.start


class _Batch:
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
        self.model, self.config, self.size, self.n_vocab = model, config, size, n_vocab
        self.rows: list[_Row] = []
        like = model.wpe.weight
        longest = max(map(len, prompts), default=0) + config.max_new_tokens
        self.cache = KVCache(model.config, size, min(model.config.block_size, longest), like)
        self.logits = like.new_zeros(size, model.config.vocab_size)  # of each row's next token
        self.seen = like.new_zeros(self.logits.shape, dtype=torch.bool) if config.repetition_penalty != 1 else None
        self.uniform = like.new_zeros(size, dtype=torch.float32)
        self.new = like.new_zeros(size, dtype=torch.int64)  # each row's token chosen last
        self.logprobs = like.new_zeros(size, dtype=torch.float32) if logprobs else None  # and its log probability
        self.readback = Readback(self.new) if self.logprobs is None else Readback(self.new, self.logprobs)
        self.graphs = Graphs(like.device)

    def admit(self, number: int, prompt: Sequence[int]) -> None:
        """Compute a prompt's keys, values and first logits, or copy them from a row that has the same and is no further."""
        row, n = _Row(number, prompt, self.config), len(self.rows)
        twin = next((m for m, other in enumerate(self.rows) if other.count == 0 and other.ids == row.ids), None)
        if twin is not None:
            self.cache.copy(twin, n)
            self.logits[n] = self.logits[twin]
        else:
            ids = self._tensor([row.ids[-self.model.config.block_size :]])
            self.logits[n] = self.model.head(self._hidden(ids, self.cache.row(n))[0, -1])
            self.cache.lengths[n] = ids.shape[1]
        if self.seen is not None:
            self.seen[n] = False
            self.seen[n, self._tensor(row.ids)] = True
        self.rows.append(row)

    def choose(self) -> None:
        """The next token of every row."""
        if not self.config.greedy:
            put(self.uniform, [row.uniform[row.count] for row in self.rows])
        B = self._extent()
        self.graphs.run(("choose", B), partial(self._choose, B))
        self.readback.start()

    def can_go_ahead(self) -> bool:
        """Whether a GPU may compute the next logits before the host knows the tokens: if it needs no more than those, and
        there is a row that goes on if none chooses to end."""
        fits = all(len(row.ids) < self.model.config.block_size for row in self.rows)
        return self.graphs.used and fits and any(row.count + 1 < self.config.max_new_tokens for row in self.rows)

    def chosen(self) -> Iterator[tuple[_Row, int, float | None]]:
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
                rows, S = self._extent(), self._reach()
                self.cache.tell()
                self.graphs.run(("step", rows, S), lambda: self._step(Masked(self.cache, rows, S), rows))
            else:
                self._step(self.cache.rows(B), B)
            self.cache.lengths[:B] = [length + 1 for length in self.cache.lengths[:B]]
        if full:
            seen = self._tensor([self.rows[n].ids[-block_size:] for n in full])
            self.logits[full] = self.model.head(self._hidden(seen)[:, -1])

    # ==== on the device alone, the first B rows ====

    def _choose(self, B: int) -> None:
        plain = self.logits[:B, : self.n_vocab].float()
        logits = plain if self.seen is None else penalize(plain, self.seen[:B, : self.n_vocab], self.config.repetition_penalty)
        new = choose(logits, self.config, self.uniform[:B])[:, None]  # (B, 1)
        self.new[:B] = new[:, 0]
        if self.seen is not None:
            self.seen[:B].scatter_(1, new, True)
        if self.logprobs is not None:
            self.logprobs[:B] = plain.log_softmax(dim=-1).gather(1, new)[:, 0]

    def _step(self, cache: Cache, B: int) -> None:
        self.logits[:B] = self.model.head(self._hidden(self.new[:B, None], cache)[:, -1])

    def _hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        # cuDNN's attention, which torch prefers on recent GPUs, makes a plan for each number of tokens, in 60 ms and more.
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
        """Tokens to read of each row, the longest with its new one and maybe some more: for few rows all that there is room
        for, since the weights are most of what is read then."""
        longest = max(self.cache.lengths) + 1
        return self.cache.size if self.size <= FEW_ROWS else min(self.cache.size, -(-longest // REACH) * REACH)

    def _tensor(self, ids: object) -> Tensor:
        return torch.tensor(ids, device=self.logits.device)
