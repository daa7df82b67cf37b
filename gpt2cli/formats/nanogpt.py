"""The checkpoints of nanoGPT (`ckpt.pt`) and build-nanogpt (`model_19072.pt`).

    nanoGPT         model, optimizer, model_args, iter_num, best_val_loss, config    exact GELU, perhaps without biases
    build-nanogpt   model, config (a pickled GPTConfig), step, val_loss              tanh GELU

Both name weights as HuggingFace does but keep linear ones as (out, in), and the tied head under both of its names. nanoGPT
computed the tanh GELU until May 2023; of that only the oldest files tell, which do not know `bias` (before January 2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import pickled, weights
from gpt2cli.formats.weights import Contents, Weights

PROGRAMS = ("nanoGPT checkpoint", "build-nanogpt checkpoint")
_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_PREFIXES = re.compile(r"^(_orig_mod\.|module\.)*(transformer\.)?")  # torch.compile's, DDP's, and the models' own


def is_mine(path: Path) -> bool:
    return path.is_file() and pickled.is_pickle(path)


def express(config: GPTConfig) -> tuple[GPTConfig, list[str]]:
    return weights.express(config, "nanoGPT", activation="gelu")


# ==== reading ====


def read(path: Path) -> Contents:
    """Raises UserError for a file of another program, one that is damaged, and tensors left over or missing."""
    saved = pickled.load(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of nanoGPT or build-nanogpt: it has no table 'model'")
    settings, program = saved.get("model_args"), PROGRAMS[0]
    if settings is None:
        settings, program = vars(saved["config"]) if isinstance(saved.get("config"), pickled.Settings) else None, PROGRAMS[1]
    if not isinstance(settings, dict) or not set(_SHAPE) <= set(settings):
        raise UserError(f"{path} does not say its shape: expected 'model_args' (nanoGPT) or 'config' (build-nanogpt)")
    tanh = program == PROGRAMS[1] or "bias" not in settings
    try:
        shape = {name: settings[name] for name in _SHAPE}
        dropout = float(settings.get("dropout", 0.0))
        activation = "gelu_new" if tanh else "gelu"
        config = GPTConfig(**shape, dropout=dropout, attn_dropout=dropout, activation_function=activation)
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None
    tensors = _named(saved["model"], path)
    notes = _without_biases(config, tensors)
    state = Weights({name: partial(tensors.__getitem__, name) for name in tensors})
    weights.check(config, state, str(path))
    return Contents(config, state, notes=notes, facts={"format": program} | _facts(saved))


def _named(model: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors by our names, without masks and the head's second name."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds no plain table of tensors")
        name = _PREFIXES.sub("", key)
        if name.endswith(".attn.bias"):
            continue  # the causal mask
        if name in tensors:
            raise UserError(f"{path} has tensor {name} twice")
        tensors[name] = tensor
    weights.check_plain(tensors, str(path))
    pickled.check_size(path, tensors, tied="lm_head.weight")
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in tensors and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but these programs tie them")
    return tensors


def _without_biases(config: GPTConfig, tensors: dict[str, Tensor]) -> list[str]:
    """A model with `bias=False` is the one whose biases are zero."""
    missing = [name for name in weights.shapes(config) if name.endswith(".bias") and name not in tensors]
    if not missing or any(name.endswith(".bias") for name in tensors):
        return []
    some = next(iter(tensors.values()))
    for name in missing:
        tensors[name] = torch.zeros(weights.shapes(config)[name], dtype=some.dtype)
    return ["a model without biases: they are written as zeros, which is the same function"]


def _facts(saved: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, keys in (("step", ("iter_num", "step")), ("validation loss", ("best_val_loss", "val_loss"))):
        value = next((saved[key] for key in keys if key in saved), None)
        if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
            value = value.item()
        if isinstance(value, int | float) and abs(value) < 1e15:  # NaN is not
            facts[name] = value
    return facts


# ==== writing ====


def write(path: Path, contents: Contents, dtype: str) -> list[str]:
    """What nanoGPT's `--init_from=resume` goes on from, and its sample.py reads: with an optimizer that has seen nothing
    yet. Where all biases are zero it is a model with `bias=False`."""
    config, state, notes = contents.config, contents.weights, []
    bias = any(bool(state[name].any()) for name in state if name.endswith(".bias"))
    if not bias:
        notes.append("all biases are zero: it is written with bias=False, which is the same function")
    model = {f"transformer.{name}": state[name].float().contiguous() for name in state if bias or not name.endswith(".bias")}
    decayed = [torch.nn.Parameter(torch.empty(0)) for tensor in model.values() if tensor.dim() >= 2]
    others = [torch.nn.Parameter(torch.empty(0)) for tensor in model.values() if tensor.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))  # nanoGPT's own
    checkpoint = {
        "model": model | {"lm_head.weight": model["transformer.wte.weight"]},
        "optimizer": optimizer.state_dict(),
        "model_args": {name: getattr(config, name) for name in _SHAPE} | {"bias": bias, "dropout": config.dropout},
        "iter_num": contents.facts.get("step", 0),
        "best_val_loss": contents.facts.get("validation loss") or 1e9,  # nanoGPT's own first value
        "config": {},
    }
    try:
        with path.open("wb") as file:  # a name would go into the file
            torch.save(checkpoint, file)
    except RuntimeError as error:  # torch's zip writer hides an interrupt and a full disk behind one of its own
        raise error.__context__ or error from None
    return notes
