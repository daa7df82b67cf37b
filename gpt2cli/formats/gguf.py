"""GGUF, llama.cpp's file, written with its own `gguf` package: the weights, and the tokenizer, which llama.cpp needs.

Names and choices are those of llama.cpp's convert_hf_to_gguf.py: vectors and position embeddings stay fp32 in every type,
and what Q8_0's blocks of 32 do not divide is fp16. llama.cpp computes the tanh GELU.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import weights
from gpt2cli.formats.weights import Contents, Weights
from gpt2cli.tokenizer import Encoding, to_written

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def is_mine(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def express(config: GPTConfig) -> tuple[GPTConfig, list[str]]:
    free = {name: getattr(config, name) for name in ("layer_norm_epsilon", "inner_size", "tie_word_embeddings")}
    return weights.express(config, "llama.cpp", activation="gelu_new", **free)


def _name(ours: str) -> str:
    """h.3.attn.c_attn.weight -> blk.3.attn_qkv.weight"""
    layer, module, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.*)\.(weight|bias)", ours).groups()  # type: ignore[union-attr]
    return (f"blk.{layer}." if layer else "") + f"{_NAMES[module]}.{kind}"


def write(path: Path, contents: Contents, dtype: str) -> list[str]:
    """Raises UserError where the extra `gguf` is not installed."""
    gguf = _package()
    writer = gguf.GGUFWriter(path, "gpt2")
    _add_config(writer, contents.config, gguf.LlamaFileType[_FILE_TYPES[dtype]])
    _add_tokenizer(writer, contents.encoding, contents.config.vocab_size)
    kinds = {name: _kind(gguf, name, shape, dtype) for name, shape in weights.shapes(contents.config).items()}
    try:
        for name, shape in weights.shapes(contents.config).items():
            stored = gguf.quant_shape_to_byte_shape(shape, kinds[name])
            writer.add_tensor_info(_name(name), stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in kinds:
            array = contents.weights[name].detach().float().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(array, kinds[name]).view(np.uint8))
    finally:
        writer.close()
    held = sorted({kind.name for name, kind in kinds.items() if name.endswith("weight") and kind.name == "F16"})
    return [f"n_embd is not a multiple of 32: those matrices are {held[0]}"] if dtype == "q8_0" and held else []


_FILE_TYPES = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _kind(gguf: Any, name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or name == "wpe.weight" or dtype == "fp32":
        return kinds.F32
    if dtype == "q8_0":
        return kinds.F16 if shape[-1] % 32 else kinds.Q8_0
    return {"fp16": kinds.F16, "bf16": kinds.BF16}[dtype]


def _add_config(writer: GGUFWriter, config: GPTConfig, file_type: int) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner_size)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)


def _add_tokenizer(writer: GGUFWriter, encoding: Encoding | None, vocab_size: int) -> None:
    """Ids that the tokenizer does not have are there, but unused; without one only ids go in and out."""
    if encoding is None:
        writer.add_tokenizer_model("none")
        return
    from gguf import TokenType

    written = {n: token for token, n in encoding.written.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([written.get(n, f"[PAD{n}]") for n in range(vocab_size)])
    kinds = dict.fromkeys(written, TokenType.NORMAL) | {encoding.eot: TokenType.CONTROL}
    writer.add_token_types([kinds.get(n, TokenType.UNUSED) for n in range(vocab_size)])
    writer.add_token_merges([f"{to_written(left)} {to_written(right)}" for left, right in encoding.merges])
    writer.add_bos_token_id(encoding.eot)
    writer.add_eos_token_id(encoding.eot)


def read_back(path: Path) -> Contents:
    """What `write` wrote, as fp32: for the proof. Raises UserError for a tensor that is missing or left over."""
    gguf = _package()
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}

    def value(key: str) -> Any:
        return reader.get_field(f"gpt2.{key}").contents()

    config = GPTConfig(
        block_size=value("context_length"),
        vocab_size=value("vocab_size"),
        n_layer=value("block_count"),
        n_head=value("attention.head_count"),
        n_embd=value("embedding_length"),
        n_inner=value("feed_forward_length"),
        layer_norm_epsilon=float(str(np.float32(value("attention.layer_norm_epsilon")))),  # 1e-05, not 9.99999975e-06
        tie_word_embeddings="output.weight" not in found,
    )
    shapes = weights.shapes(config)
    if set(found) != set(map(_name, shapes)):
        raise UserError(f"{path}: tensor {sorted(set(found) ^ set(map(_name, shapes)))[0]} is missing or left over")

    def tensor(name: str) -> Tensor:
        stored = found[_name(name)]
        values = gguf.quants.dequantize(np.array(stored.data), stored.tensor_type)
        return torch.from_numpy(values).view(shapes[name])

    return Contents(config, Weights({name: partial(tensor, name) for name in shapes}))


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF is written with the gguf package: pip install gguf (the extra 'gguf')") from None
    return gguf
