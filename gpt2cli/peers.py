"""Other libraries at the same work, for `gpt2 bench --compare`: each continues the same prompt greedily by the same number
of tokens, with the same weights. None of them is needed for anything else.

Each works in a process of its own: in one process their thread pools slow each other down even while they wait.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpt2cli.errors import UserError
from gpt2cli.formats import gguf, huggingface
from gpt2cli.formats.weights import DTYPES, Contents
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding

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


PEERS: dict[str, Make] = {"hf": hf, "ctranslate2": ctranslate2, "llamacpp": llamacpp}
PACKAGES = {"hf": "transformers", "ctranslate2": "ctranslate2", "llamacpp": "llama-cpp-python and gguf"}


class Peer:
    """A library in its process; called like the `Continue` it runs. Raises UserError where it is not installed."""

    def __init__(self, name: str, folder: Path, where: torch.device, dtype: str, quantize: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (name, folder, str(where), dtype, quantize, torch.get_num_threads(), theirs)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.title: str = self._answer()

    def __call__(self, prompt: Sequence[int], rows: int, count: int) -> list[int]:
        self._connection.send((list(prompt), rows, count))
        return self._answer()

    def _answer(self) -> Any:
        try:
            fine, value = self._connection.recv()
        except EOFError:
            raise UserError("a library under comparison ended its process: see what it said above") from None
        if not fine:
            raise UserError(value)
        return value

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(name: str, folder: Path, where: str, dtype: str, quantize: str | None, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        title, run = PEERS[name](folder, torch.device(where), dtype, quantize)
        connection.send((True, title))
        while True:
            connection.send((True, run(*connection.recv())))
    except ImportError:
        connection.send((False, f"--compare {name} needs {PACKAGES[name]}: pip install {PACKAGES[name]}"))
    except UserError as error:
        connection.send((False, str(error)))
    except (EOFError, OSError):  # the other end has what it wanted
        return


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
            peer = Peer(name, Path(scratch), where, dtype, quantize)
            stack.callback(peer.close)
            there[peer.title] = peer
        yield there
