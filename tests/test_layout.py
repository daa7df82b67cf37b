"""The house: who may import whom (the README's map), and how large a room may be."""

import ast
import re
from pathlib import Path

import pytest

import gpt2cli

HOUSE = Path(gpt2cli.__file__).parent
ROOMS = [
    "errors", "config", "memory", "atomic", "tokenizer", "shards", "documents", "pieces", "look", "survey", "encode",
    "vocabulary", "corpus", "product", "device", "distributed", "formats", "trial", "kernels", "fused_loss", "loss", "model",
    "data", "optim", "guard", "metrics", "checkpoint", "writer", "keeper", "sources", "provenance", "ahead", "step", "recorded",
    "compiled", "batch", "plan", "resume", "together", "run", "train", "verify", "curve",
    "cache", "sampling", "drawing", "few", "linear", "fused", "rows", "generate", "identify", "prove", "convert",
    "complete", "apart", "peers", "bench", "bench_train", "bench_generate", "bench_distributed", "commands",
]  # fmt: skip
MAY_IMPORT = {
    "config": "",
    "atomic": "",
    "tokenizer": "",
    "shards": "atomic",
    "documents": "",
    "pieces": "documents tokenizer",
    "look": "atomic pieces shards tokenizer",
    "survey": "config documents pieces",
    "encode": "pieces tokenizer",
    "vocabulary": "tokenizer",
    "corpus": "atomic documents encode pieces shards survey tokenizer vocabulary",
    "memory": "config",
    "product": "",
    "device": "memory product",
    "distributed": "device",
    "formats": "atomic config tokenizer",
    "trial": "",
    "fused_loss": "",
    "loss": "fused_loss product trial",
    "model": "config loss formats product tokenizer",
    "data": "shards tokenizer",
    "optim": "config device distributed model product",
    "guard": "",
    "metrics": "atomic",
    "checkpoint": "atomic config distributed formats guard model optim tokenizer",
    "writer": "atomic checkpoint metrics",
    "keeper": "atomic checkpoint metrics writer",
    "sources": "atomic config corpus data documents shards survey tokenizer",
    "provenance": "device",
    "step": "config distributed guard model optim",
    "recorded": "ahead config step",
    "compiled": "distributed model",
    "batch": "config device loss memory model optim step",
    "plan": "atomic batch checkpoint config data device documents formats optim provenance sources survey tokenizer",
    "resume": "atomic checkpoint config device documents formats metrics optim plan provenance shards sources survey tokenizer",
    "together": "atomic device distributed plan resume shards sources survey tokenizer",
    "run": "atomic checkpoint compiled data device distributed formats guard keeper metrics model optim plan recorded sources "
    "step",
    "train": "atomic checkpoint distributed metrics model plan run",
    "curve": "",
    "verify": "atomic checkpoint plan resume train",
    "ahead": "",
    "cache": "ahead config",
    "sampling": "config",
    "kernels": "",
    "drawing": "config kernels sampling trial",
    "few": "cache model product",
    "linear": "device few model product",
    "fused": "cache kernels linear loss model trial",
    "rows": "ahead cache config device drawing few fused linear loss model sampling",
    "generate": "config model rows",
    "complete": "config generate model tokenizer",
    "identify": "atomic checkpoint formats shards tokenizer",
    "prove": "config documents formats model tokenizer",
    "convert": "atomic config formats identify prove",
    "apart": "device encode",
    "peers": "apart config formats memory model tokenizer",
    "bench": "config corpus device documents shards survey tokenizer",
    "bench_train": "apart bench config device memory model optim peers recorded step",
    "bench_distributed": "bench config data device distributed model optim step",
    "bench_generate": "bench config device generate linear model peers prove tokenizer",
}
LIBRARIES = {
    "typer": ["commands"],
    "rich": ["commands/console"],
    "tiktoken": ["tokenizer"],
    "gigatoken": ["encode"],
    "tokenizers": ["vocabulary"],
    "pyarrow": ["documents"],
    "transformers": ["prove", "peers"],
    "llama_cpp": ["prove", "peers"],
    "ctranslate2": ["peers"],
    "matplotlib": ["curve"],
    "tensorboard": ["commands/board"],
    "triton": ["drawing", "fused", "kernels"],
    "numba": ["few"],
    "llvmlite": ["few"],
    "gguf": ["formats/gguf"],
    "huggingface_hub": ["formats/hub"],
    "safetensors": ["formats/huggingface", "checkpoint", "verify"],
}
FILES = [path for path in sorted(HOUSE.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py")]


def room_of(path):
    return path.relative_to(HOUSE).with_suffix("").parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_imports_only_what_the_map_says(path):
    room = room_of(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "gpt2cli" and rest[0] in ROOMS:
            allowed = ROOMS if room == "commands" else [room, "errors", *MAY_IMPORT.get(room, "").split()]
            assert rest[0] in allowed, f"{path.name} imports {name}"
        elif top in LIBRARIES:
            where = str(path.relative_to(HOUSE).with_suffix("")).replace("\\", "/")
            assert any(where.startswith(place) for place in LIBRARIES[top]), f"{path.name} imports {name}"


def test_rooms_import_only_rooms_above_them_and_none_is_missing_from_the_map():
    assert {room_of(path) for path in FILES} == set(ROOMS)
    for room, above in MAY_IMPORT.items():
        assert all(ROOMS.index(name) < ROOMS.index(room) for name in above.split()), room


def test_the_readmes_map_names_every_room():
    readme = (HOUSE.parent / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        name = path.relative_to(HOUSE).as_posix()
        name = "commands/" if name.startswith("commands/") else "formats/" if name.startswith("formats/") else name
        assert f"`{name}`" in readme, f"{name} is not on the README's map"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_room_is_too_large(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        # A command's parameters are its options, one line each.
        if isinstance(node, ast.FunctionDef) and node.name != "command":
            assert node.end_lineno - node.lineno < 70, f"{path.name}: {node.name}"


def test_the_options_in_the_readme_exist(gpt2):
    readme = (HOUSE.parent / "README.md").read_text(encoding="utf-8")
    for command in (
        "tokenize",
        "train",
        "sample",
        "convert",
        "bench attention",
        "bench train",
        "bench sample",
        "bench tokenize",
        "bench distributed",
    ):
        known = gpt2(*command.split(), "--help").out
        for line in re.findall(rf"^gpt2 {command}\b.*$", readme, re.MULTILINE):
            for option in re.findall(r"--[a-z-]+", line):
                assert option in known, f"{line}: {option}"


def test_the_package_shows_its_public_names():
    assert dir(gpt2cli) == sorted(gpt2cli.__all__) and all(hasattr(gpt2cli, name) for name in gpt2cli.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Gpt'"):
        gpt2cli.Gpt  # noqa: B018


def test_the_readmes_python_runs(text_file):
    readme = (HOUSE.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    small = code.replace("GPTConfig()", "GPTConfig(n_layer=1, n_head=1, n_embd=16)").replace("range(50)", "range(2)")
    assert small.count("n_layer=1") == 1 and "range(2)" in small
    names: dict[str, object] = {}
    exec(small, names)
    assert names["loss"].item() < 11 and Path("my-model/model.safetensors").exists()
