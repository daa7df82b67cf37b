"""Any GPT-2 we can read -> a HuggingFace folder, proven before it is called done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2cli import __version__, atomic, checkpoint
from gpt2cli.errors import UserError
from gpt2cli.formats import hub, huggingface
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding

TOLERANCE = 1e-4  # of fp32 logits, for each 10 of their size


@dataclass(frozen=True)
class Conversion:
    """What was written, and how it was proven."""

    source: str
    out: str
    parameters: int
    dtype: str
    tensors: int  # compared bit for bit after reading back
    logits_error: float  # largest difference from transformers' logits
    bytes: int
    files: dict[str, str]  # name -> sha256


def convert(source: str, out: Path, *, force: bool = False, progress: hub.Progress | None = None) -> Conversion:
    """Write `source` (a run, a checkpoint, a HuggingFace folder or a hub name) as the HuggingFace folder `out`, in the
    dtype it has. The weights are read back and compared bit for bit, and the logits with transformers' own, before `out`
    appears. Raises UserError where the source cannot be read, `out` is there already (unless `force`), or a proof fails.
    """
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists: give another --out, or --force to replace it")
    found = checkpoint.find_model(source, progress)
    if found.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} is the source itself, or holds it: give another --out")
    if out.is_dir() and any(out.iterdir()) and (not (out / "config.json").is_file() or any(p.is_dir() for p in out.iterdir())):
        raise UserError(f"{out} is not a model folder, so --force does not replace it: give another --out")
    config, state = huggingface.read(found)
    encoding = Encoding.from_folder(found)
    if encoding is None and config.vocab_size == Encoding.gpt2().n_vocab:
        encoding = Encoding.gpt2()
    with atomic.new_folder(out, replace=True) as folder:
        huggingface.write(folder, config, state, encoding)
        again_config, again = huggingface.read(folder)
        changed = [name for name in state if not torch.equal(state[name], again[name])]
        if changed or again_config != config:
            raise UserError(f"the proof failed: {changed[0] if changed else 'config.json'} reads back differently")
        del again
        error = logits_error(folder, GPT.from_state(config, state))
        atomic.seal(folder, {"gpt2cli": __version__, "source": Path(source).name})
        files = atomic.read_json(folder / atomic.SEAL)["files"]
        total = sum(path.stat().st_size for path in folder.iterdir())
    return Conversion(
        source=str(found) if Path(source).exists() else source,
        out=str(out),
        parameters=config.num_parameters(),
        dtype=str(state["wte.weight"].dtype).removeprefix("torch."),
        tensors=len(state),
        logits_error=error,
        bytes=total,
        files=files,
    )


@torch.no_grad()
def logits_error(folder: Path, model: GPT) -> float:
    """The largest difference between our fp32 logits and those transformers computes from `folder`, on fixed random ids.
    Raises UserError where it is more than rounding explains."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    generator = torch.Generator().manual_seed(0)
    T = min(model.config.block_size, 64)
    ids = torch.randint(model.config.vocab_size, (2, T), generator=generator)
    expected = theirs(ids).logits
    error = float((model(ids)[0] - expected).abs().max())
    if not error <= TOLERANCE * max(1.0, float(expected.abs().max()) / 10):
        raise UserError(f"the proof failed: our logits differ from transformers' by {error:.2e}; nothing was written")
    return error
