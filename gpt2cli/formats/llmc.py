"""llm.c's model file (`gpt2_124M.bin`, and the checkpoints its trainers write).

    256 little-endian int32   magic 20240326, version, block_size, V, n_layer, n_head, n_embd, Vp; the rest zero
    tensors                   version 3: fp32, version 5: bf16; in the order of `_BLOCK`, each for all layers in turn

wte has Vp rows, V rounded up to a multiple of 128; those beyond V are zeros. Linear weights are (out, in), as ours. Matches
`write_model` of its train_gpt2.py. The architecture is GPT-2's own: tanh GELU, an MLP of 4C, a tied head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import weights
from gpt2cli.formats.weights import DTYPES, Contents, Weights

MAGIC = 20240326
VERSIONS = {3: torch.float32, 5: torch.bfloat16}
HEADER = 256  # int32
_BLOCK = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def is_mine(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def express(config: GPTConfig) -> tuple[GPTConfig, list[str]]:
    return weights.express(config, "llm.c", activation="gelu_new")


def _order(config: GPTConfig) -> list[str]:
    blocks = [f"h.{n}.{name}" for name in _BLOCK for n in range(config.n_layer)]
    return ["wte.weight", "wpe.weight", *blocks, "ln_f.weight", "ln_f.bias"]


def _padded(vocab_size: int) -> int:
    return math.ceil(vocab_size / 128) * 128


def read(path: Path) -> Contents:
    """Raises UserError for another version, a shape that cannot be, and a file that is not exactly as long as its header
    says."""
    header = np.fromfile(path, dtype="<i4", count=HEADER)
    if len(header) < HEADER or header[0] != MAGIC:
        raise UserError(f"{path} is not an llm.c model: it has no whole header")
    version, block_size, vocab_size, n_layer, n_head, n_embd, padded = (int(n) for n in header[1:8])
    if version not in VERSIONS:
        raise UserError(f"{path}: llm.c version {version} is not read; expected 3 (fp32) or 5 (bf16)")
    try:
        config = GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if padded < vocab_size:
        raise UserError(f"{path}: {padded:,} rows are too few for a vocabulary of {vocab_size:,}")
    dtype, place = VERSIONS[version], HEADER * 4
    shapes = weights.shapes(config)
    readers: dict[str, Callable[[], Tensor]] = {}
    for name in _order(config):
        readers[name] = partial(_tensor, path, place, shapes[name], dtype)
        rows = padded if name == "wte.weight" else shapes[name][0]
        place += rows * math.prod(shapes[name][1:]) * dtype.itemsize
    if place != path.stat().st_size:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, but its header describes {place:,}: it is not whole")
    extra = padded - vocab_size
    notes = [f"{extra} rows that pad the vocabulary are left out"] if extra else []
    return Contents(config, Weights(readers), notes=notes, facts={"format": "llm.c model", "version": version})


def _tensor(path: Path, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    stored = np.fromfile(path, dtype=f"<i{dtype.itemsize}", count=math.prod(shape), offset=place)
    return torch.from_numpy(stored).view(dtype).view(shape)


def write(path: Path, contents: Contents, dtype: str) -> list[str]:
    config, stored = contents.config, DTYPES[dtype]
    version = next(number for number, kind in VERSIONS.items() if kind == stored)
    padded = _padded(config.vocab_size)
    header = np.zeros(HEADER, dtype="<i4")
    shape = config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, padded
    header[:8] = (MAGIC, version, *shape)
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name in _order(config):
            tensor = contents.weights[name].to(stored).contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            if name == "wte.weight":
                file.write(bytes((padded - config.vocab_size) * config.n_embd * stored.itemsize))
    return []
