"""What a model is and how it is trained: frozen dataclasses whose defaults are the documentation. No torch here, so that
the command line can show the true defaults without waiting for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_args, get_type_hints

from gpt2cli.errors import UserError

Config = TypeVar("Config", "GPTConfig", "TrainConfig")

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 (Radford et al. 2019). Field names are HuggingFace's `GPT2Config`'s, but for `block_size`
    (`n_positions`), `dropout` (`resid_pdrop` and `embd_pdrop`) and `attn_dropout` (`attn_pdrop`).

    Raises UserError for a shape that cannot be built.
    """

    block_size: int = 1024  # positions: the longest sequence the model can see
    vocab_size: int = 50257
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0  # of embeddings and residuals
    attn_dropout: float = 0.0  # of attention weights; it has no flash kernel on CPU
    n_inner: int | None = None  # hidden width of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"  # the tanh approximation GPT-2 was trained with
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True  # divide attention logits by sqrt(head size)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, from 1
    tie_word_embeddings: bool = True  # the output layer is wte

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.n_layer > 10_000:
            raise UserError(f"n_layer must be at most 10,000, but is {self.n_layer}")
        if self.n_inner is not None and self.n_inner < 1:
            raise UserError(f"n_inner must be at least 1, but is {self.n_inner}")
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd must be divisible by n_head: {self.n_embd} is not divisible by {self.n_head}; "
                f"try --n-embd {math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )
        for name in ("dropout", "attn_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} must be at least 0 and below 1, but is {getattr(self, name)}")
        if not 0 < self.layer_norm_epsilon < 1:
            raise UserError(f"layer_norm_epsilon must be above 0 and below 1, but is {self.layer_norm_epsilon}")
        if self.activation_function not in ACTIVATIONS:
            raise UserError(f"activation_function is {self.activation_function!r}, but only {', '.join(ACTIVATIONS)} are known")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        return self.n_inner or 4 * self.n_embd

    def num_parameters(self) -> int:
        """Parameters of the model, the tied output layer counted once."""
        C, M = self.n_embd, self.inner_size
        block = 4 * C + (C * 3 * C + 3 * C) + (C * C + C) + (C * M + M) + (M * C + C)
        head = 0 if self.tie_word_embeddings else self.vocab_size * C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C + head

    def flops_per_token(self, seq_len: int) -> int:
        """Model FLOPs to train on one token: 6N + 12*L*H*Q*T, N without position embeddings (PaLM, appendix B; the
        formula of nanoGPT's `estimate_mfu`). An untied input embedding does no arithmetic and is left out of N."""
        N = self.num_parameters() - self.block_size * self.n_embd
        if not self.tie_word_embeddings:
            N -= self.vocab_size * self.n_embd
        return 6 * N + 12 * self.n_layer * self.n_embd * seq_len


PRESETS: dict[str, dict[str, int]] = {
    "seed": {"n_layer": 6, "n_head": 6, "n_embd": 384},  # 30M: trains on a laptop
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024},  # 1558M
}

CHOICES = {
    "optimizer": ("muon", "adamw"),
    "schedule": ("cosine", "linear", "constant", "wsd"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "fp32", "bf16", "fp16"),
    "compile": ("auto", "on", "off"),
    "parallel": ("ddp", "fsdp"),
    "attention": ("auto", "flash", "cudnn", "efficient", "math"),
    "errors": ("strict", "replace"),
    "split": ("auto", "hashed", "tail"),
    "format": ("auto", "text", "jsonl", "parquet"),
}


BEFORE = {"patience": 0}  # what a run does whose `run.json` was written before it was a setting


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. `None` and `auto` are decided by `make_plan` and written to `run.json` as decided.

    Raises UserError for a value that cannot be meant.
    """

    # batch
    batch_size: int | None = None  # rows of a micro-step
    seq_len: int | None = None  # tokens of a row, T
    tokens_per_step: int = 2048  # of all micro-steps of an update together
    # length
    steps: int | None = None
    epochs: float | None = None
    # optimizer
    optimizer: str = "muon"
    lr: float | None = None
    min_lr: float | None = None  # None means lr / 10
    warmup_steps: int | None = None  # None means a twentieth of the steps
    schedule: str = "cosine"
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    # machine
    device: str = "auto"
    dtype: str = "auto"
    compile: str = "auto"
    attention: str = "auto"
    parallel: str = "ddp"  # of several processes: the whole model in each (ddp), or a slice of every tensor (fsdp)
    activation_checkpointing: bool = False  # compute the blocks' activations again in backward instead of keeping them
    # cadence, in steps; 0 means only at the end (never, for samples)
    log_every: int | None = None  # None means 1 on a CPU, and 10 elsewhere, where each means to wait for the device
    eval_every: int = 50
    patience: int = 5  # evaluations in a row without a lower validation loss after which the run ends; 0: none do
    save_every: int = 100
    sample_every: int = 0
    sample_prompt: str = "\n"  # what samples begin with
    eval_tokens: int = 16384  # validation tokens an evaluation looks at, spread evenly; 0 means all
    # data
    val_fraction: float = 0.05  # of a text
    plain: bool = False  # <|endoftext|> in a text is ordinary text
    errors: str = "strict"  # of bytes that are not UTF-8: strict, or replace with U+FFFD
    split: str = "auto"  # what is held out: hashed documents, the tail of the text, or what suits it
    format: str = "auto"  # of the text: text, jsonl or parquet; by default the file's name tells
    field: str = "text"  # of a JSON or parquet record
    train_vocab: int | None = None  # ids of a vocabulary to be trained on the text, in place of GPT-2's
    seed: int = 1337
    # safety
    spike: float = 8.0  # standard deviations above the last updates' mean that make a loss or gradient norm bad; 0: none do
    max_rollbacks: int = 3  # to an earlier checkpoint when updates stay bad, before the run stops
    deterministic: bool = False  # on CUDA too; a CPU always is

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("batch_size", 1), ("seq_len", 1), ("tokens_per_step", 1), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, but is {value}")
        if self.seed >= 1 << 62:
            raise UserError(f"seed must be below 2^62, but is {self.seed}")
        cadences = ("log_every", "eval_every", "patience", "save_every", "sample_every", "eval_tokens")
        for name in ("warmup_steps", *cadences, "max_rollbacks"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} must be 0 or more, but is {getattr(self, name)}")
        if self.lr is not None and self.lr >= 1:
            raise UserError(f"lr is {self.lr}, with which nothing can be learned: expected 1e-4 to 2e-2, or leave it out")
        for name in ("steps", "epochs"):
            if (getattr(self, name) or 0) > 1e12:
                raise UserError(f"{name} must be at most 10^12, but is {getattr(self, name)}")
        for name in ("lr", "epochs", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be above 0, but is {value}")
        for name in ("min_lr", "weight_decay", "spike"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must be 0 or more, but is {value}")
        if not 0.0 <= self.val_fraction < 1.0:
            raise UserError(f"val_fraction must be at least 0 and below 1, but is {self.val_fraction}")
        if self.steps is not None and self.epochs is not None:
            raise UserError("steps and epochs both say how long to train: give one of them")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. First the repetition penalty makes ids that were in the prompt or came since less likely
    (Keskar et al. 2019); temperature divides the logits; top-k keeps the k likeliest; top-p the fewest that together have
    probability p or more (Holtzman et al. 2020); min-p those with at least that part of the likeliest one's probability
    (Nguyen et al. 2024). It is the order of transformers."""

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    min_p: float | None = None
    repetition_penalty: float = 1.0
    greedy: bool = False
    seed: int = 1337
    overflow: str = "stop"  # at the context's end: stop; error, before anything; slide, and see the last block_size tokens

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 62:
            raise UserError(f"--seed must be at least 0 and below 2^62, but is {self.seed}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, but is {self.max_new_tokens}")
        if not 1e-6 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature must be above 0 (at least 1e-6), but is {self.temperature}; for no randomness use --greedy"
            )
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise UserError(f"--repetition-penalty must be above 0 (1e-6 to 1e6), but is {self.repetition_penalty}; 1 is none")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p must be from 0 to 1, but is {self.min_p}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k must be at least 1, but is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, but is {self.top_p}")
        if self.overflow not in ("stop", "slide", "error"):
            raise UserError(f"--overflow is {self.overflow!r}, but must be stop, slide or error")


def check_types(config: GPTConfig | TrainConfig) -> None:
    """Raises UserError where a field read from somebody's JSON holds another type than it is declared with."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        allowed = get_args(hints[field.name]) or (hints[field.name],)
        if float in allowed:
            allowed = (*allowed, int)
        if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise UserError(f"{field.name} must be {wanted}, but is {value!r}")


def from_dict(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """The config written in a JSON or TOML table. Raises UserError, naming `source`, for an unknown field."""
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise UserError(f"{source}: unknown setting {unknown[0]!r}; known are {', '.join(f.name for f in fields(kind))}")
    try:
        return replace(kind(), **values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
