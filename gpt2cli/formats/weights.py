"""What every format is read into and written from: a config, and weights by `GPT`'s own names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.tokenizer import Encoding

State = Mapping[str, Tensor]  # `GPT`'s names, linear weights as (out, in)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # one function, two names


class Weights(Mapping[str, Tensor]):
    """Tensors of files, each read when it is asked for and not kept: a model larger than the memory can pass through."""

    def __init__(self, readers: dict[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Contents:
    """A model as one of the formats holds it."""

    config: GPTConfig
    weights: State
    encoding: Encoding | None = None  # its own tokenizer, where the format has a place for one
    notes: list[str] = field(default_factory=list)  # what reading changed, for people
    facts: dict[str, Any] = field(default_factory=dict)  # where it comes from, as far as it says
    folder: Path | None = None  # a HuggingFace folder whose other files go along
    another_tokenizer: str | None = None  # why its tokenizer is one that only HuggingFace's code reads


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a GPT of this config."""
    C, M = config.n_embd, config.inner_size
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (M, C),
        "mlp.c_fc.bias": (M,),
        "mlp.c_proj.weight": (C, M),
        "mlp.c_proj.bias": (C,),
    }
    table: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    table |= {f"h.{n}.{name}": shape for n in range(config.n_layer) for name, shape in block.items()}
    table |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = (config.vocab_size, C)
    return table


def express(config: GPTConfig, program: str, activation: str, **free: Any) -> tuple[GPTConfig, list[str]]:
    """`config` as a program has it that knows GPT-2's own architecture with one `activation`; `free` are the fields it knows
    more of, with the values they have. A GELU of the other kind becomes its own, which is told, for their values differ by
    less than 5e-4; anything else it does not know raises UserError."""
    plain = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "inner_size": 4 * config.n_embd,
    } | free
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise UserError(f"{program} cannot express {name} = {getattr(config, name)}: it computes with {value}")
    function = config.activation_function
    if function == activation or {function, activation} <= set(TANH_GELU):
        return config, []
    if {function, activation} <= {"gelu", *TANH_GELU}:
        names = {"gelu": "the exact GELU"}
        note = (
            f"{program} computes {names.get(activation, 'the tanh GELU')}, where the model has "
            f"{names.get(function, 'the tanh GELU')}: the weights are the same, the function nearly"
        )
        return replace(config, activation_function=activation), [note]
    raise UserError(f"{program} cannot express activation_function = {function}: it computes with {activation}")


def check(config: GPTConfig, weights: State, source: str) -> None:
    """Raises UserError, naming `source`, unless `weights` are exactly the tensors of a GPT of this config."""
    expected = shapes(config)
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing:
        raise UserError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra:
        raise UserError(f"{source}: tensor {extra[0]} has no place in this GPT-2")
    for name, shape in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, but its config asks for {shape}")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}; expected {', '.join(DTYPES)}")


def check_plain(tensors: State, source: str) -> None:
    """Raises UserError for a tensor of a pickle that is sparse, or has no numbers at all."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{source}: {name} is not a plain tensor")


def write_safetensors(path: Path, tensors: State, dtype: torch.dtype | None = None) -> None:
    """The file that `safetensors.torch.save_file` writes, of tensors in `dtype` or else their own. That one wants all of them
    at once, and here each may be made when it is written. The format: https://huggingface.co/docs/safetensors. Replaces `path`
    at the end: it may be mapped."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored = {name: dtype or tensors[name].dtype for name in tensors}
    order = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))  # wide ones first keeps each aligned
    end = 0
    for name in order:
        shape = list(tensors[name].shape)
        begin, end = end, end + math.prod(shape) * stored[name].itemsize
        header[name] = {"dtype": _STORED[stored[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                tensor = tensors[name].detach().to("cpu", stored[name]).contiguous()
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
