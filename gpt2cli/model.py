"""GPT-2 (Radford et al. 2019), top to bottom in the order the data flows.

    B  rows of a batch          C  n_embd, the width            nh  n_head
    T  tokens of a row          V  vocab_size                   hs  head size, C / nh

The names are GPT-2's own. `Linear` is `nn.Linear`, faster: its weights are (out, in), where OpenAI and HuggingFace keep them
transposed, which `formats` takes care of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.loss import linear_cross_entropy, tied
from gpt2cli.product import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Cache(Protocol):
    """Keys and values of the tokens already seen, see `cache.KVCache`."""

    def positions(self, T: int) -> Tensor:
        """Where the next T tokens of each row stand: (T), or (B, 1) where rows hold different numbers of tokens."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the new tokens' (B, nh, T, hs) to a layer; return all of the layer's, (B, nh, S, hs) each, and where a row may
        not see all of them what is added to its scores, (B, 1, 1, S), 0 or -inf."""


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.attn_dropout = config.attn_dropout
        self.n_head = config.n_head
        self.layer = layer
        self.scale = 1 / math.sqrt(config.head_size) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)  # (B, nh, S, hs)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=T > 1,  # one new token may see everything before it
            scale=self.scale,
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner_size)
        self.c_proj = Linear(config.inner_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)  # tokens talk to each other
        x = x + self.mlp(self.ln_2(x))  # each token thinks by itself
        return x


class GPT(nn.Module):
    """`logits, loss = model(x, y)`.

    >>> model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100))
    >>> logits, loss = model(torch.zeros(1, 16, dtype=torch.long))
    >>> logits.shape, loss
    (torch.Size([1, 16, 100]), None)
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.checkpointing = False  # training computes a block's activations again in backward instead of keeping them
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal with deviation 0.02, and smaller where a residual stream of 2 * n_layer branches sums up."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("c_proj.weight"):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(std=0.02)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, loss_only: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) of the next token after each of `idx` (B, T), and with `targets` (B, T) the mean cross entropy
        in nats, else None. With `loss_only` the logits are None and never exist as a whole, which is how training saves
        time and memory. Raises UserError where T is beyond `block_size`."""
        if loss_only and targets is not None:
            # On CUDA their sum is another one each time, so not where it is to be the same; and torch's compiler knows none.
            on, same = idx.device.type, torch.are_deterministic_algorithms_enabled()
            sparse = on == "cpu" or (on == "cuda" and not same)
            tie = self.config.tie_word_embeddings and sparse and not torch.compiler.is_compiling()
            wte, head = tied(self.wte.weight) if tie else (None, self.head_weight)
            x = self.hidden(idx, wte=wte)  # (B, T, C)
            return None, linear_cross_entropy(x.flatten(0, 1), head, targets.flatten())
        x = self.hidden(idx)  # (B, T, C)
        logits = self.head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def hidden(self, idx: Tensor, cache: Cache | None = None, *, wte: Tensor | None = None) -> Tensor:
        """The last layer's output (B, T, C) for `idx` (B, T), which come after the tokens in `cache`. With `wte` (V, C) they
        are looked up in it, and its gradient is sparse. Raises UserError where T is beyond `block_size`."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise UserError(f"{T} tokens do not fit the model's context of {self.config.block_size}")
        pos = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)  # (T) or (B, 1)
        embedded = self.wte(idx) if wte is None else F.embedding(idx, wte, sparse=True)  # (B, T, C)
        x = self.drop(embedded + self.wpe(pos))  # (B, T, C)
        for block in self.h:
            keep = not (self.checkpointing and self.training)
            x = block(x, cache) if keep else checkpoint(block, x, use_reentrant=False)
        return self.ln_f(x)  # (B, T, C)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return F.linear(x, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output layer's (V, C): the embedding, used backwards."""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    # ==== weights from and to a HuggingFace folder ====

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> GPT:
        """A GPT-2 from a local HuggingFace folder or from the hub (`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, or any
        `owner/name`), in fp32 and, as transformers has it, in evaluation mode: `train()` turns its dropout on. Raises
        UserError where it is not there or is no GPT-2."""
        from gpt2cli.formats import hub, huggingface

        return cls.from_state(*huggingface.read(hub.find(str(name_or_folder)))).eval()

    @classmethod
    def on_meta(cls, config: GPTConfig) -> GPT:
        """A model without memory for its weights yet."""
        with torch.device("meta"), _Unfilled():
            return cls(config)

    @classmethod
    def from_state(cls, config: GPTConfig, state: Mapping[str, Tensor]) -> GPT:
        """A model that holds `state`'s own tensors, in fp32."""
        model = cls.on_meta(config)
        model.load_state_dict({name: tensor.float().contiguous() for name, tensor in state.items()}, assign=True)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, with GPT-2's tokenizer if its size fits.
        Files of the same names are replaced, others left alone."""
        from gpt2cli.formats import huggingface
        from gpt2cli.tokenizer import Encoding

        if "head" in vars(self):
            raise UserError("this model was prepared for generating, which changed its layers: save it before that")
        encoding = Encoding.gpt2()
        fits = encoding.n_vocab == self.config.vocab_size
        Path(folder).mkdir(parents=True, exist_ok=True)
        huggingface.write(Path(folder), self.config, self.state_dict(), encoding if fits else None)


class _Unfilled(TorchFunctionMode):
    """Modules made in it skip their own first values: on `meta` there are none to make, but torch imports its compiler
    to find that out, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))
