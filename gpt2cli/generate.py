"""Ids from ids: prompts of any lengths, continued together. It knows no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt2cli.config import SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.model import GPT
from gpt2cli.rows import Row, Rows

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
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    with evaluating(model, compiled):
        batch = Rows(model, prompts, config, min(rows, len(prompts)), n_vocab, logprobs)
    waiting = deque(enumerate(prompts))
    while waiting or batch.rows:
        free = min(len(waiting), batch.size - len(batch.rows))
        with evaluating(model, compiled):
            batch.admit([Row(*waiting.popleft(), config) for _ in range(free)])
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
            with evaluating(model, compiled):
                batch.step()


@contextmanager
def evaluating(model: GPT, compiled: Sequence[nn.Module]) -> Iterator[None]:
    """Without dropout, also where `model` is being trained, and without torch's compiler, which would compile its `compiled`
    modules again for every number of tokens; and then as it was."""
    training = [module for module in model.modules() if module.training] if model.training else []
    calls = [module._compiled_call_impl for module in compiled]
    for module in training:
        module.training = False
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call


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
