"""Proof that a converted model is the model: its tensors, its loss on a text, and its logits in other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2cli.config import GPTConfig
from gpt2cli.documents import EMBEDDED, opened, read
from gpt2cli.errors import UserError
from gpt2cli.formats.weights import DTYPES, State
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding

LLAMA_TOLERANCE = {"fp32": 1e-2, "fp16": 5e-2, "bf16": 2e-1, "q8_0": 5e-1}
ROWS, LENGTH = 4, 256  # of the sample text, in tokens


def check_finite(weights: State, source: str) -> set[torch.dtype]:
    """The types of the weights. Raises UserError, naming `source`, for one that holds NaN or infinity."""
    kinds = set()
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinity, so the model computes nothing: take one from before that")
        kinds.add(tensor.dtype)
    return kinds


def largest_difference(weights: State, back: State, dtype: str) -> float:
    """The largest difference between the weights and what was read back of them: 0 where all are equal bit for bit. Raises
    UserError where it is more than rounding to `dtype` explains, and where a number became infinite."""
    if set(weights) != set(back):
        raise UserError(f"the proof failed: {sorted(set(weights) ^ set(back))[0]} was added or left out")
    largest = 0.0
    for name in weights:
        before, after = weights[name], back[name]
        if before.shape != after.shape:
            raise UserError(f"the proof failed: {name} reads back as {tuple(after.shape)}, but was {tuple(before.shape)}")
        if _same(before, after):
            continue
        if not after.isfinite().all():
            raise UserError(f"{name} holds numbers that {dtype} cannot: choose another --dtype")
        if not (_same(before.to(DTYPES.get(dtype, torch.float16)), after) or (dtype == "q8_0" and _within_q8(before, after))):
            raise UserError(f"the proof failed: {name} reads back differently; nothing was written")
        largest = max(largest, float((before.float() - after.float()).abs().max()))
    return largest


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers bit for bit, the wider type being the narrower one's exact widening."""
    wide = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(wide), b.to(wide)
    return torch.equal(a, b) or torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)  # flat: a last dimension of 1 may have any stride


def _within_q8(before: Tensor, after: Tensor) -> bool:
    """Whether each block of 32 is within what Q8_0 keeps of it: half a step of 1/127 of its largest number, and the rounding
    of that step to fp16."""
    if before.numel() % 32:
        return False
    blocks, error = before.float().reshape(-1, 32), (before.float() - after.float()).reshape(-1, 32)
    bound = blocks.abs().amax(1, keepdim=True) * (1 / 254 + 2**-11) + 127 * 2**-25
    return bool((error.abs() <= bound).all())


def sample_ids(encoding: Encoding | None, config: GPTConfig) -> Tensor:
    """Token ids (rows, T + 1) to try a model on: the beginning of the embedded Shakespeare, or random ones where there is no
    tokenizer. They are within every vocabulary that has the encoding's."""
    T = min(LENGTH, config.block_size)
    if encoding is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (ROWS, T + 1), generator=generator)
    with opened([EMBEDDED]) as (text,):
        beginning = next(iter(read(text, "strict"))).data.decode("utf-8", errors="ignore")
    ids = torch.tensor(encoding.encode(beginning[: 16 * ROWS * LENGTH]))
    return ids[: ROWS * (T + 1)].view(ROWS, T + 1)


def beginning(ids: Tensor) -> Tensor:
    """Up to 64 tokens (T) of the first row, on which programs are compared."""
    return ids[0, :-1][:64]


@torch.no_grad()
def forward(config: GPTConfig, weights: State, ids: Tensor) -> tuple[float, Tensor]:
    """Mean cross entropy (nats a token) over `ids` (rows, T + 1), and the logits (T, V) of their `beginning`, in fp32 on
    the CPU."""
    model = GPT.from_state(config, weights).eval()
    logits, _ = model(beginning(ids)[None])
    losses = [float(model(row[None, :-1], row[None, 1:], loss_only=True)[1]) for row in ids]
    assert logits is not None
    return sum(losses) / len(losses), logits[0]


# ==== other programs ====

Logits = tuple[str, Tensor, float]  # a program's name, its logits (T, V), and how far ours may be from them


@torch.no_grad()
def transformers_logits(folder: Path, ids: Tensor, dtype: str) -> Logits:
    """What transformers computes in fp32 for `ids` (T)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # of many kinds, for a config or generation settings that it does not like
        raise UserError(f"the proof failed: transformers does not load it: {str(error).strip().splitlines()[-1]}") from None
    return "transformers", theirs(ids[None]).logits[0], 1e-4


def llama_logits(path: Path, ids: Tensor, dtype: str) -> Logits | None:
    """What llama.cpp computes for `ids` (T), where llama-cpp-python is installed. It looks the GELU up in a table of fp16
    numbers, and rounds what it multiplies to the type of the weights."""
    try:
        import llama_cpp
    except ImportError:
        return None
    fp32 = 0  # of the cache: GGML_TYPE_F32
    settings = {"n_ctx": len(ids), "n_batch": len(ids), "logits_all": True, "type_k": fp32, "type_v": fp32}
    model = llama_cpp.Llama(model_path=str(path), verbose=False, **settings)
    model.eval(ids.tolist())
    logits = torch.from_numpy(np.array(model.scores[: len(ids)]))
    model.close()
    return "llama.cpp", logits, LLAMA_TOLERANCE[dtype]


def check_logits(ours: Tensor, who: str, theirs: Tensor, tolerance: float) -> float:
    """The largest difference between two programs' logits. Raises UserError where it is more than rounding explains:
    `tolerance` for each 10 of their size."""
    error = float((ours - theirs).abs().max())
    if not error <= tolerance * max(1.0, float(theirs.abs().max()) / 10):
        raise UserError(f"the proof failed: our logits differ from {who}'s by {error:.2e}; nothing was written")
    return error
