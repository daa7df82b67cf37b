"""HuggingFace's GPT-2 folders: `config.json` and safetensors (or `.bin`), whole or sharded, local or on the hub.

HuggingFace                              ours
transformer.wte.weight (V, C)            wte.weight            the prefix is missing in OpenAI's original files
transformer.h.0.attn.c_attn.weight       h.0.attn.c_attn.weight, transposed (`Conv1D` keeps (in, out))
transformer.h.0.attn.bias, .masked_bias  -                     constant masks of older versions
lm_head.weight                           lm_head.weight        only where it is not tied to wte
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2cli import atomic
from gpt2cli.config import ACTIVATIONS, GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.tokenizer import Encoding

State = dict[str, Tensor]
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all

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
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


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
    """Config and weights (in the dtype they are stored in) of a local folder.

    Raises UserError for a folder that is not a whole GPT-2: a file missing, cut short or changed since we wrote it, a
    tensor missing, left over or of another shape.
    """
    config = read_config(folder)
    atomic.check_seal(folder, names={"config.json", *_WEIGHTS})
    expected = expected_shapes(config)
    state: State = {}
    for file in weight_files(folder):
        for name, tensor in _read_tensors(file):
            ours = name.removeprefix("transformer.")
            if ours.endswith(_MASKS) or (ours == "lm_head.weight" and config.tie_word_embeddings):
                continue
            if ours not in expected or ours in state:
                raise UserError(f"{file}: tensor {name} has no place in this GPT-2, see {folder / 'config.json'}")
            if ours.endswith(_TRANSPOSED) and tensor.dim() == 2:
                tensor = tensor.t().contiguous()
            if tuple(tensor.shape) != expected[ours]:
                raise UserError(
                    f"{file}: {name} has shape {tuple(tensor.shape)}, but config.json asks for {expected[ours]} (in our layout)"
                )
            state[ours] = tensor
    missing = sorted(set(expected) - set(state))
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return config, state


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
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
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    shapes |= {f"h.{n}.{name}": shape for n in range(config.n_layer) for name, shape in block.items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, C)
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before `.bin`. Raises UserError where there are none."""
    for name in _WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        return [_shard(folder, name) for name in shard_names(path)]
    raise UserError(f"{folder} has no weights: expected {' or '.join(_WEIGHTS)}")


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


def _read_tensors(path: Path) -> list[tuple[str, Tensor]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118 - no mapping
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds for damaged or hostile files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a weight file: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} holds no plain table of tensors")
    return list(state.items())


# ==== writing ====


def write(folder: Path, config: GPTConfig, state: State, encoding: Encoding | None) -> None:
    """Write config, weights and tokenizer of a model into an existing folder."""
    for ours, shape in expected_shapes(config).items():
        if ours not in state or tuple(state[ours].shape) != shape:
            raise ValueError(f"{ours} should be a tensor of shape {shape}")
    (folder / atomic.SEAL).unlink(missing_ok=True)  # it would be another model's
    dtype = state["wte.weight"].dtype
    theirs = {}
    for ours, tensor in state.items():
        name = ours if ours == "lm_head.weight" else f"transformer.{ours}"
        theirs[name] = (tensor.t() if ours.endswith(_TRANSPOSED) else tensor).detach().cpu().contiguous()
    eot = encoding.eot if encoding else None
    try:
        save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {folder / 'model.safetensors'}: {error}") from None
    _write_json(folder / "config.json", config_to_json(config, dtype, eot))
    _write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
    if encoding:
        encoding.save(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# ==== the hub ====


def find(name: str, progress: Progress | None = None) -> Path:
    """A local folder as it is, or else the folder in HuggingFace's cache with the hub's model of that name, downloaded
    where it is not there yet. Raises UserError for an unknown name, and for a network that is not there."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name} is neither a model folder nor the name of a model on the hub, like gpt2 or owner/name")
    config = _download(name, "config.json", progress)
    if config is None:
        raise UserError(f"{name} on the hub has no config.json: it is not a transformers model")
    config_from_json(atomic.read_json(config), f"{name}/config.json")
    folder = config.parent
    revision = folder.name  # the cache names it by the commit: all files are to be of one
    for file in _TOKENIZER:
        if _download(name, file, progress, revision) and file == "tokenizer.json":
            break
    for file in _WEIGHTS:
        found = _download(name, file, progress, revision)
        if found:
            for shard in shard_names(found) if file.endswith(".index.json") else []:
                if not _download(name, shard, progress, revision):
                    raise UserError(f"{name} on the hub lacks {shard}, which its {file} names")
            return folder
    raise UserError(f"{name} on the hub has no weights: expected {' or '.join(_WEIGHTS)}")


def _download(name: str, file: str, progress: Progress | None, revision: str | None = None) -> Path | None:
    """One file of a hub model, from HuggingFace's cache where it is there; None where the model has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache
    from tqdm.auto import tqdm

    cached = try_to_load_from_cache(name, file, revision=revision)
    if cached is not None:  # else nobody has asked for it yet
        return None if cached is _CACHED_NO_EXIST else Path(str(cached))

    class Report(tqdm):
        """Tells `progress` instead of drawing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115 - lives as long as the bar

        def update(self, n: float | None = 1) -> bool | None:
            done = super().update(n)
            if progress:
                progress(file, int(self.n), int(self.total or 0))
            return done

    offline = (
        f"{name} is not in HuggingFace's cache, and the hub cannot be reached. On a machine with a network run "
        f"'gpt2 convert --from-hf {name}' and copy the folder here, or give the path of a local folder"
    )
    try:
        return Path(hf_hub_download(name, file, revision=revision, tqdm_class=Report))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"the hub has no model named {name} (or it is private: log in with 'hf auth login'); "
            "expected a local folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or owner/name"
        ) from None
    except errors.LocalEntryNotFoundError:  # also an EntryNotFoundError, so it comes first
        raise UserError(offline) from None
    except errors.EntryNotFoundError:
        return None
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refused {name}/{file}: {str(error).splitlines()[0]}") from None
    except OSError:
        raise
    except Exception as error:  # of the HTTP library, whichever the hub's client uses
        raise UserError(f"downloading {name}/{file} failed ({error or type(error).__name__}): run it again") from None
