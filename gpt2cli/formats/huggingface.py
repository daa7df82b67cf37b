"""HuggingFace's GPT-2 folders: `config.json` and safetensors (or `.bin`), whole or sharded.

HuggingFace                              ours
transformer.wte.weight (V, C)            wte.weight            the prefix is missing in OpenAI's original files
transformer.h.0.attn.c_attn.weight       h.0.attn.c_attn.weight, transposed (`Conv1D` keeps (in, out))
transformer.h.0.attn.bias, .masked_bias  -                     constant masks of older versions
lm_head.weight                           lm_head.weight        only where it is not tied to wte
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gpt2cli import atomic
from gpt2cli.config import ACTIVATIONS, GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import pickled, weights
from gpt2cli.formats.weights import State, Weights, write_safetensors
from gpt2cli.tokenizer import Encoding

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")
_SAME_NAME = (
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
_CARRIED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "embd_pdrop", "reorder_and_upcast_attn"),
    *("task_specific_params", "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"),
)


# ==== config.json ====


def read_config(folder: Path) -> GPTConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    return config_from_json(atomic.read_json(folder / "config.json"), str(folder / "config.json"))


def config_from_json(values: dict[str, Any], source: str) -> GPTConfig:
    """Raises UserError for another architecture and for a field that would change the logits in a way we do not do."""
    if values.get("model_type") != "gpt2":
        raise UserError(f"{source}: model_type is {values.get('model_type')!r}; expected 'gpt2'")
    if values.get("add_cross_attention"):
        raise UserError(f"{source}: add_cross_attention is not supported: a language model has no encoder to attend to")
    known = {name: values[name] for name in _SAME_NAME if name in values}
    if known.get("activation_function") == "swish":
        known["activation_function"] = "silu"
    if known.get("activation_function", "gelu_new") not in ACTIVATIONS:
        raise UserError(
            f"{source}: activation_function {known['activation_function']!r} is not supported; "
            f"known are {', '.join(ACTIVATIONS)}"
        )
    for ours, theirs in (("block_size", "n_positions"), ("dropout", "resid_pdrop"), ("attn_dropout", "attn_pdrop")):
        known[ours] = values.get(theirs, 0.1 if ours != "block_size" else 1024)
    if type(known.get("layer_norm_epsilon")) is int and abs(known["layer_norm_epsilon"]) < 2:
        known["layer_norm_epsilon"] = float(known["layer_norm_epsilon"])
    for name, default in (("n_layer", 12), ("n_head", 12), ("n_embd", 768)):  # GPT2Config's defaults, where they differ
        known.setdefault(name, default)
    try:
        return GPTConfig(**known)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def config_to_json(config: GPTConfig, dtype: torch.dtype, eot: int | None) -> dict[str, Any]:
    shared = {name: getattr(config, name) for name in _SAME_NAME}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.block_size,
        **shared,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attn_dropout,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name before transformers 4.56
        "use_cache": True,
    }


# ==== reading ====


def read(folder: Path) -> tuple[GPTConfig, State]:
    """Config and weights (in the dtype they are stored in, read when they are asked for) of a local folder.

    Raises UserError for a folder that is not a whole GPT-2: a file missing, cut short or changed since we wrote it, a
    tensor missing, left over or of another shape.
    """
    config = read_config(folder)
    atomic.check_seal(folder, names={"config.json", *WEIGHTS})
    readers: dict[str, Callable[[], Tensor]] = {}
    expected = {*weights.shapes(config), "lm_head.weight"}
    for file in weight_files(folder):
        for name, reader in _tensors(file).items():
            ours = name.removeprefix("transformer.")
            if ours in readers or not (ours in expected or ours.endswith(_MASKS)):
                raise UserError(f"{file}: tensor {name} has no place in this GPT-2, see {folder / 'config.json'}")
            readers[ours] = partial(_transposed, reader) if ours.endswith(_TRANSPOSED) else reader
    head = readers.pop("lm_head.weight") if config.tie_word_embeddings and "lm_head.weight" in readers else None
    state = Weights({name: reader for name, reader in readers.items() if not name.endswith(_MASKS)})
    weights.check(config, state, str(folder))
    if head and not torch.equal(head(), state["wte.weight"]):
        raise UserError(
            f"{folder}: lm_head.weight differs from wte.weight, though config.json ties them: which one is meant? "
            'Write "tie_word_embeddings": false there to use both, or delete lm_head.weight'
        )
    return config, state


def _transposed(reader: Callable[[], Tensor]) -> Tensor:
    tensor = reader()
    return tensor.t() if tensor.dim() == 2 else tensor


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before `.bin`. Raises UserError where there are none."""
    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        return [_shard(folder, name) for name in shard_names(path)]
    raise UserError(f"{folder} has no weights: expected {' or '.join(WEIGHTS)}")


def weights_sha256(folder: Path) -> str:
    """One hash for all weight files of a folder."""
    return hashlib.sha256("".join(atomic.sha256(path) for path in weight_files(folder)).encode()).hexdigest()


def shard_names(index: Path) -> list[str]:
    weight_map = atomic.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map of tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{index} names {name!r}, which is not a file beside it")
    return names


def _shard(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing: the sharded model is not whole")
    return folder / name


def _tensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a weight file; those of safetensors are mapped into memory as long as they live."""
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path} only says where git-lfs keeps the weights: run 'git lfs pull' where it came from")
    if path.suffix == ".safetensors":
        try:
            opened = safe_open(path, framework="pt")
        except Exception as error:  # the library raises many kinds for damaged or hostile files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path} is damaged or not a weight file: {reason}") from None
        return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    state = pickled.load(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} holds no plain table of tensors")
    weights.check_plain(state, str(path))
    pickled.check_size(path, state, tied="lm_head.weight")
    return {name: partial(state.__getitem__, name) for name in state}


# ==== writing ====


def write(folder: Path, config: GPTConfig, state: State, encoding: Encoding | None, dtype: torch.dtype | None = None) -> None:
    """Write config, weights (in `dtype`, by default their own) and tokenizer of a model into an existing folder."""
    weights.check(config, state, "the model")
    (folder / atomic.SEAL).unlink(missing_ok=True)  # it would be another model's
    theirs: dict[str, Callable[[], Tensor]] = {}
    for ours in state:
        reader = partial(state.__getitem__, ours)
        name = ours if ours == "lm_head.weight" else f"transformer.{ours}"
        theirs[name] = partial(_transposed, reader) if ours.endswith(_TRANSPOSED) else reader
    write_safetensors(folder / "model.safetensors", Weights(theirs), dtype)
    dtype = dtype or state["wte.weight"].dtype
    eot = encoding.eot if encoding else None
    _write_json(folder / "config.json", config_to_json(config, dtype, eot))
    _write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
    if encoding:
        encoding.save(folder)


def carry_over(source: Path, folder: Path) -> None:
    """Take over, as they are, what another model folder says beside its weights: the tokenizer, how to generate, special
    ids."""
    for name in (*TOKENIZER, "generation_config.json"):
        path = source / name
        if path.is_file() and _is_own(path):
            shutil.copyfile(path, folder / name)
    theirs = atomic.read_json(source / "config.json")
    kept = {name: theirs[name] for name in _CARRIED if name in theirs}
    _write_json(folder / "config.json", atomic.read_json(folder / "config.json") | kept)


def is_only_a_model(folder: Path) -> bool:
    """Whether it is a model folder, and nothing in it is anything else, such as a run's training state."""
    known = {*WEIGHTS, *TOKENIZER, "config.json", "generation_config.json", atomic.SEAL, "README.md", ".gitattributes"}
    names = [path.name for path in folder.iterdir()]
    others = [name for name in names if name not in known and not re.fullmatch(r"(model|pytorch_model)-[\w-]+\.\w+", name)]
    return "config.json" in names and not others


def _is_own(path: Path) -> bool:
    """Whether a file is one of its folder's, and not a link to somebody else's; the hub's cache has links to its `blobs`."""
    home = path.resolve().parent
    return home == path.parent.resolve() or home == path.parent.resolve().parent.parent / "blobs"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
