"""Other libraries at the same work, for `gpt2 bench --compare`: each continues the same prompt greedily by the same number
of tokens, with the same weights. None of them is needed for anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gpt2cli.errors import UserError
from gpt2cli.formats import gguf, huggingface
from gpt2cli.formats.weights import DTYPES, Contents
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding

Continue = Callable[[Sequence[int], int, int], list[int]]  # (prompt, rows, new tokens) -> the first row's new ids
Make = Callable[[GPT, torch.device, str, str | None, Path], tuple[str, Continue]]  # its name, too


def hf(model: GPT, where: torch.device, dtype: str, quantize: str | None, scratch: Path) -> tuple[str, Continue]:
    """transformers' `generate`; it has no int8 for a CPU, so there it is what it would be without."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = _folder(model, scratch)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)
    theirs.to(where).eval()  # type: ignore[arg-type]

    def run(prompt: Sequence[int], rows: int, count: int) -> list[int]:
        ids = torch.tensor([list(prompt)] * rows, device=where)
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return new[0, len(prompt) :].tolist()

    return f"transformers {transformers.__version__} {dtype}", run


def ctranslate2(model: GPT, where: torch.device, dtype: str, quantize: str | None, scratch: Path) -> tuple[str, Continue]:
    import ctranslate2 as ct2

    converter = ct2.converters.TransformersConverter(str(_folder(model, scratch)))
    kind = "int8" if quantize else {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    out = scratch / f"ctranslate2-{kind}"
    converter.convert(str(out), quantization=kind)
    device = "cuda" if where.type == "cuda" else "cpu"
    generator = ct2.Generator(str(out), device=device, compute_type=kind, intra_threads=torch.get_num_threads())
    words = {n: token for token, n in Encoding.gpt2().written.items()}

    def run(prompt: Sequence[int], rows: int, count: int) -> list[int]:
        start = [[words[n] for n in prompt]] * rows
        settings = {"min_length": count, "max_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
        return list(generator.generate_batch(start, end_token=[], **settings)[0].sequences_ids[0])

    return f"CTranslate2 {ct2.__version__} {kind}", run


def llamacpp(model: GPT, where: torch.device, dtype: str, quantize: str | None, scratch: Path) -> tuple[str, Continue]:
    """llama.cpp through its Python package; one row only."""
    import llama_cpp

    kind = "q8_0" if quantize else dtype
    path = scratch / f"{kind}.gguf"
    gguf.write(path, Contents(model.config, model.state_dict(), Encoding.gpt2()), kind)
    settings = {"n_threads": torch.get_num_threads(), "n_gpu_layers": -1 if where.type == "cuda" else 0}
    theirs = llama_cpp.Llama(str(path), n_ctx=model.config.block_size, verbose=False, **settings)

    def run(prompt: Sequence[int], rows: int, count: int) -> list[int]:
        if rows > 1:
            raise UserError("--compare llamacpp: its Python package continues one row at a time; use --batch-size 1")
        theirs.reset()
        tokens = theirs.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        return [next(tokens) for _ in range(count)]

    return f"llama.cpp ({llama_cpp.__version__}) {kind.upper()}", run


PEERS: dict[str, Make] = {"hf": hf, "ctranslate2": ctranslate2, "llamacpp": llamacpp}
PACKAGES = {"hf": "transformers", "ctranslate2": "ctranslate2", "llamacpp": "llama-cpp-python and gguf"}


def make(
    names: Sequence[str], model: GPT, where: torch.device, dtype: str, quantize: str | None, scratch: Path
) -> dict[str, Continue]:
    """The peers of these names, with their versions. Raises UserError for an unknown one, or one that is not installed."""
    there = {}
    for name in names:
        if name not in PEERS:
            raise UserError(f"--compare {name} is unknown; expected {', '.join(PEERS)}")
        try:
            title, run = PEERS[name](model, where, dtype, quantize, scratch)
        except ImportError:
            raise UserError(f"--compare {name} needs {PACKAGES[name]}: pip install {PACKAGES[name]}") from None
        there[title] = run
    return there


def _folder(model: GPT, scratch: Path) -> Path:
    folder = scratch / "model"
    if not folder.exists():
        folder.mkdir()
        huggingface.write(folder, model.config, model.state_dict(), Encoding.gpt2())
    return folder
