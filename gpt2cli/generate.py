"""Ids from ids: the KV cache, prefill and decode, and sampling. It knows no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2cli.config import GPTConfig, SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.model import GPT

LIKELIEST = 1024


class KVCache:
    """Keys and values of the tokens seen so far, allocated once: two tensors (n_layer, B, nh, size, hs)."""

    def __init__(self, config: GPTConfig, size: int, like: Tensor) -> None:
        shape = config.n_layer, 1, config.n_head, size, config.head_size
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.size, self.length = size, 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def repeat(self, B: int) -> None:
        """Make one row into B equal ones."""
        if B > 1:
            self.k, self.v = self.k.repeat(1, B, 1, 1, 1), self.v.repeat(1, B, 1, 1, 1)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    config: SamplingConfig = SamplingConfig(),
    *,
    num_samples: int = 1,
    eot: int | None = None,
    n_vocab: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompt` in `num_samples` rows at once; yields the rows' new ids, one list a position. A row that has
    chosen `eot` (which is not yielded) gives None from then on, and when all have, generation ends. Ids from `n_vocab` up
    are never chosen. Row n draws from its own generator, seeded with seed + n, whatever the number of rows.

    Ends early at the end of the context unless `config.overflow` is `slide`. Raises UserError for an empty prompt, ids
    the model does not know, and a prompt longer than the context (unless `slide`).
    """
    slide = config.overflow == "slide"
    check_prompt(model, prompt, num_samples, slide)
    block_size, where = model.config.block_size, model.wte.weight.device
    generators = [torch.Generator().manual_seed(config.seed + n) for n in range(num_samples)]
    done = [False] * num_samples

    seen = torch.tensor([prompt], device=where)[:, -block_size:]  # (1, T)
    cache = KVCache(model.config, min(block_size, seen.shape[1] + config.max_new_tokens), like=model.wpe.weight)
    logits = F.linear(model.hidden(seen, cache)[:, -1], model.head_weight).expand(num_samples, -1)  # (B, V)
    cache.repeat(num_samples)
    seen = seen.repeat(num_samples, 1)
    for n in range(config.max_new_tokens):
        uniform = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(where)  # (B)
        new = choose(logits[:, :n_vocab].float(), config, uniform)  # (B)
        ids = new.tolist()
        done = [over or token == eot for over, token in zip(done, ids, strict=True)]
        if all(done):
            return
        yield [None if over else token for over, token in zip(done, ids, strict=True)]
        if n == config.max_new_tokens - 1 or (cache.length == block_size and not slide):
            return
        seen = torch.cat([seen, new[:, None]], dim=1)[:, -block_size:]
        if cache.length < block_size:
            logits = F.linear(model.hidden(new[:, None], cache)[:, -1], model.head_weight)
        else:  # every token moves to another position, so nothing in the cache is of use
            logits = F.linear(model.hidden(seen)[:, -1], model.head_weight)


def check_prompt(model: GPT, prompt: Sequence[int], num_samples: int, slide: bool) -> None:
    if num_samples < 1:
        raise UserError(f"--num-samples must be at least 1, but is {num_samples}")
    if not prompt:
        raise UserError("the prompt is empty: give some text, or <|endoftext|> to start a document")
    for token in prompt:
        if not 0 <= token < model.config.vocab_size:
            raise UserError(f"the prompt holds id {token:,}, but the model knows {model.config.vocab_size:,} ids")
    if len(prompt) > model.config.block_size and not slide:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens, but the model sees {model.config.block_size:,}: "
            "shorten it, or use --overflow slide"
        )


def choose(logits: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """Ids (B) drawn from logits (B, V), each row by its number of `uniform` (B) in [0, 1): the first id at which the
    cumulative probability passes it."""
    if config.greedy:
        return logits.argmax(dim=-1)
    logits = logits / config.temperature
    ids = None  # of the columns, where they are not the vocabulary any more
    if config.top_k is not None:
        logits, ids = logits.topk(min(config.top_k, logits.shape[-1]), dim=-1)  # (B, k), the likeliest first
    probabilities = logits.softmax(dim=-1)
    if config.top_p is not None and config.top_p < 1:
        if ids is None:
            # The few likeliest are nearly always enough, and finding them costs a hundredth of sorting the vocabulary.
            some, ids = probabilities.topk(min(LIKELIEST, probabilities.shape[-1]), dim=-1)
            if bool((some.sum(dim=-1) < config.top_p).any()):
                some, ids = probabilities.sort(dim=-1, descending=True)
            probabilities = some
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)  # (B, 1)
    drawn = drawn.clamp(max=cumulative.shape[-1] - 1)
    return drawn[:, 0] if ids is None else ids.gather(1, drawn)[:, 0]
