"""Other libraries at the same work, for `gpt2 bench --compare`: each continues the same prompt greedily by the same number
of tokens, with the same weights; or trains a model of the same shape. None of them is needed for anything else."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2cli import memory
from gpt2cli.apart import Apart
from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import gguf, huggingface
from gpt2cli.formats.weights import DTYPES, Contents
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding

QUEUED = {"cuda": 4}  # steps that are timed as one: training does not wait for a GPU after each


@dataclass(frozen=True)
class TimedStep:
    seconds: float
    loss: float  # of the first of those that were timed as one
    memory: int  # bytes at the peak so far, of the device's allocator on CUDA, else beyond the interpreter with its imports


Continue = Callable[[Sequence[int], int, int], list[int]]  # (prompt, rows, new tokens) -> the first row's new ids
Make = Callable[[Path, torch.device, str, str | None], tuple[str, Continue]]  # from a model folder; its name, too


def hf(folder: Path, where: torch.device, dtype: str, quantize: str | None) -> tuple[str, Continue]:
    """transformers' `generate`; it has no int8 for a CPU, so there it is what it would be without."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)
    theirs.to(where).eval()  # type: ignore[arg-type]

    def run(prompt: Sequence[int], rows: int, count: int) -> list[int]:
        ids = torch.tensor([list(prompt)] * rows, device=where)
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return new[0, len(prompt) :].tolist()

    return f"transformers {transformers.__version__} {dtype}", run


def ctranslate2(folder: Path, where: torch.device, dtype: str, quantize: str | None) -> tuple[str, Continue]:
    import ctranslate2 as ct2

    converter = ct2.converters.TransformersConverter(str(folder))
    kind = "int8" if quantize else {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    out = folder / f"ctranslate2-{kind}"
    converter.convert(str(out), quantization=kind)
    device = "cuda" if where.type == "cuda" else "cpu"
    generator = ct2.Generator(str(out), device=device, compute_type=kind, intra_threads=torch.get_num_threads())
    words = {n: token for token, n in Encoding.gpt2().written.items()}

    def run(prompt: Sequence[int], rows: int, count: int) -> list[int]:
        start = [[words[n] for n in prompt]] * rows
        settings = {"min_length": count, "max_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
        return list(generator.generate_batch(start, end_token=[], **settings)[0].sequences_ids[0])

    return f"CTranslate2 {ct2.__version__} {kind}", run


def llamacpp(folder: Path, where: torch.device, dtype: str, quantize: str | None) -> tuple[str, Continue]:
    """llama.cpp through its Python package; one row only."""
    import llama_cpp

    kind = "q8_0" if quantize else dtype
    path = folder / f"{kind}.gguf"
    config, state = huggingface.read(folder)
    gguf.write(path, Contents(config, state, Encoding.gpt2()), kind)
    settings = {"n_threads": torch.get_num_threads(), "n_gpu_layers": -1 if where.type == "cuda" else 0}
    theirs = llama_cpp.Llama(str(path), n_ctx=config.block_size, verbose=False, **settings)

    def run(prompt: Sequence[int], rows: int, count: int) -> list[int]:
        if rows > 1:
            raise UserError("--compare llamacpp: its Python package continues one row at a time; use --batch-size 1")
        theirs.reset()
        tokens = theirs.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        return [next(tokens) for _ in range(count)]

    return f"llama.cpp ({llama_cpp.__version__}) {kind.upper()}", run


def hf_training(
    config: GPTConfig, where: str, dtype: str, optimizer: str, B: int, T: int, compile: bool
) -> tuple[str, Callable[[], TimedStep]]:
    """A training step as people write it with transformers' GPT2LMHeadModel, on random ids: autocast where `dtype` is not fp32,
    AdamW, clipping."""
    if optimizer != "adamw":
        raise UserError("--compare hf trains with AdamW: leave out --optimizer")
    from transformers import GPT2Config, GPT2LMHeadModel, __version__  # which loads what it names, and only then

    before = memory.resident()
    device = torch.device(where)
    theirs = GPT2Config.from_dict(huggingface.config_to_json(config, torch.float32, eot=None))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(theirs).train()
    model.to(device)
    if compile:
        model.compile()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch.set_float32_matmul_precision("high")
    ids = torch.randint(config.vocab_size, (B, T + 1), device=device, generator=torch.Generator(device).manual_seed(0))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    wait, count = torch.cuda.synchronize if device.type == "cuda" else lambda: None, QUEUED.get(device.type, 1)

    def step() -> TimedStep:
        started, losses = time.perf_counter(), []
        for _ in range(count):
            with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
                loss = model(input_ids=x, labels=y, shift_labels=y).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        wait()
        seconds = time.perf_counter() - started
        held = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory.peak() - before
        return TimedStep(seconds / count, float(losses[0]), held)

    return f"transformers {__version__}", step


PEERS: dict[str, Make] = {"hf": hf, "ctranslate2": ctranslate2, "llamacpp": llamacpp}
PACKAGES = {"hf": "transformers", "ctranslate2": "ctranslate2", "llamacpp": "llama-cpp-python gguf"}


def missing(name: str) -> str:
    return f"--compare {name} needs {PACKAGES[name]}: pip install {PACKAGES[name]}"


@contextlib.contextmanager
def started(
    names: Sequence[str], model: GPT, where: torch.device, dtype: str, quantize: str | None
) -> Iterator[dict[str, Continue]]:
    """The peers of these names, by their titles. Raises UserError for an unknown one, or one that is not installed."""
    for name in names:
        if name not in PEERS:
            raise UserError(f"--compare {name} is unknown; expected {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as scratch, contextlib.ExitStack() as stack:
        there: dict[str, Continue] = {}
        if names:
            huggingface.write(Path(scratch), model.config, model.state_dict(), Encoding.gpt2())
        for name in names:
            peer = Apart(PEERS[name], Path(scratch), where, dtype, quantize, missing=missing(name))
            stack.callback(peer.close)
            there[peer.title] = peer
        yield there
