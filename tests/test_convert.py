"""HuggingFace folders in every form they come in, and a small hub on 127.0.0.1."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2cli.convert import convert
from gpt2cli.errors import UserError
from gpt2cli.formats import huggingface
from gpt2cli.model import GPT

from .conftest import make_model


def same(a, b):
    return all(torch.equal(a.state_dict()[name], tensor) for name, tensor in b.state_dict().items())


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def bare(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def with_masks(state):
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 32, 32).tril() for n in range(2)}
    masks |= {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}
    return state | masks


def with_head(state):
    return state | {"lm_head.weight": state["transformer.wte.weight"].clone()}


def write_safetensors(state, folder):
    save_file(state, folder / "model.safetensors")


def write_bin(state, folder):
    torch.save(state, folder / "pytorch_model.bin")


def write_old_bin(state, folder):
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_shards(state, folder, save=save_file, stem="model", suffix="safetensors"):
    names = sorted(state)
    files = {f"{stem}-0000{n + 1}-of-00002.{suffix}": names[n::2] for n in range(2)}
    for file, part in files.items():
        save({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_bin_shards(state, folder):
    write_shards(state, folder, torch.save, "pytorch_model", "bin")


@pytest.mark.parametrize("form", [lambda s: s, bare, with_masks, with_head, lambda s: bare(with_masks(with_head(s)))])
@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_old_bin, write_shards, write_bin_shards])
def test_every_form_of_a_folder_is_the_same_model(folder, form, write):
    expected, state = GPT.from_pretrained(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(form(state), folder)
    assert same(GPT.from_pretrained(folder), expected)


@pytest.mark.parametrize("shape", [{}, {"n_head": 5, "n_embd": 80, "vocab_size": 311}, {"tie_word_embeddings": False}])
def test_a_conversion_is_proven_and_told(tmp_path, shape):
    make_model(**shape).save_pretrained(tmp_path / "a")
    result = convert(str(tmp_path / "a"), tmp_path / "b")
    assert result.logits_error < 1e-4 and result.tensors == len(GPT.from_pretrained(tmp_path / "b").state_dict())
    assert result.files["model.safetensors"] == hashlib.sha256((tmp_path / "b" / "model.safetensors").read_bytes()).hexdigest()
    assert same(GPT.from_pretrained(tmp_path / "a"), GPT.from_pretrained(tmp_path / "b"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_their_bits(folder, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    assert convert(str(folder), tmp_path / "out").dtype == {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_proof_that_fails_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("gpt2cli.model", fromlist=["x"]).ACTIVATIONS, "gelu_new", torch.nn.functional.gelu)
    with pytest.raises(UserError, match="logits differ from transformers"):
        convert(str(folder), tmp_path / "out")
    monkeypatch.setattr(huggingface, "_TRANSPOSED", ())
    with pytest.raises(UserError):
        convert(str(folder), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_existing_target_is_replaced_only_by_force(folder, tmp_path):
    convert(str(folder), tmp_path / "out")
    with pytest.raises(UserError, match="--force"):
        convert(str(folder), tmp_path / "out")
    convert(str(folder), tmp_path / "out", force=True)
    with pytest.raises(UserError, match="source itself"):
        convert(str(folder), folder, force=True)
    with pytest.raises(UserError, match="name of a new folder"):
        convert(str(folder), folder.parent, force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("mine")
    with pytest.raises(UserError, match="not a model folder"):
        convert(str(folder), tmp_path / "home", force=True)
    assert (tmp_path / "home" / "precious").exists()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_tensor(folder, name, tensor):
    state = load_file(folder / "model.safetensors")
    state[name] = tensor
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")


def use_bin(folder, value):
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


def use_index(folder, value):
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: edit_config(f, model_type="llama"), "'llama'"),
        (lambda f: edit_config(f, activation_function="mish"), "'mish'"),
        (lambda f: edit_config(f, add_cross_attention=True), "add_cross_attention"),
        (lambda f: edit_config(f, n_head=3), "divisible"),
        (lambda f: edit_config(f, n_layer="2"), "n_layer must be int"),
        (lambda f: edit_config(f, n_layer=10**12), "n_layer must be at most"),
        (lambda f: edit_config(f, n_layer=3), "12 tensors are missing"),
        (lambda f: edit_config(f, n_layer=1), "no place"),
        (lambda f: edit_config(f, n_positions=31), "wpe.weight has shape"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "config.json").unlink(), "not a model folder"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: replace_tensor(f, "transformer.extra", torch.ones(1)), "transformer.extra has no place"),
        (lambda f: replace_tensor(f, "transformer.ln_f.bias", None), "the first is ln_f.bias"),
        (lambda f: replace_tensor(f, "transformer.h.0.attn.c_attn.weight", torch.ones(5)), "c_attn.weight has shape"),
        (lambda f: use_bin(f, {"wte.weight": Trap()}), "to be run"),
        (lambda f: use_bin(f, [1, 2]), "no plain table"),
        (lambda f: use_index(f, {"weight_map": {"a": "../w.safetensors"}}), "not a file beside it"),
        (lambda f: use_index(f, {"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors is missing"),
        (lambda f: use_index(f, {"weight_map": [1]}), "no weight_map"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_whole_gpt2_is_refused_and_runs_nothing(folder, damage, says):
    damage(folder)
    with pytest.raises(UserError, match=says):
        GPT.from_pretrained(folder)
    assert not Path("executed").exists()


# ==== the hub ====


@pytest.fixture
def hub(tmp_path, folder):
    """A hub with one model, owner/tiny, and its address; `served` lists what was asked for."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(with_masks(bare(state)), folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        served: list[str] = []  # noqa: RUF012 - of the one server

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.served.append(self.path)
            self.answer(body=True)

        def answer(self, body):
            parts = self.path.split("?")[0].strip("/").split("/")
            known = parts[:3] == ["owner", "tiny", "resolve"]
            data = files.get(parts[-1]) if known else None
            self.send_response(200 if data is not None else 404)
            if known:
                self.send_header("X-Repo-Commit", "0" * 40)
            if data is None:
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                data = b""
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.served, server
    server.shutdown()
    server.server_close()


def run(endpoint, *arguments):
    """The program in a process of its own: the hub's address is read when its library is imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(Path("hf").absolute()), "HF_HUB_DISABLE_XET": "1"}
    environment["NO_PROXY"] = "127.0.0.1"
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "gpt2cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_model_comes_from_the_hub_once_and_then_from_the_cache(hub):
    endpoint, served, server = hub
    done = run(endpoint, "convert", "--from-hf", "owner/tiny")
    assert (done.returncode, done.stdout) == (0, "tiny\n"), done.stderr
    assert "downloading model-00001-of-00002.safetensors" in done.stderr and "equal bit for bit" in done.stderr
    assert same(GPT.from_pretrained("tiny"), make_model())
    count = len(served)
    server.shutdown()
    server.server_close()
    done = run(endpoint, "convert", "--from-hf", "owner/tiny", "--out", "again")
    assert done.returncode == 0 and len(served) == count, done.stderr
    assert Path("again/model.safetensors").read_bytes() == Path("tiny/model.safetensors").read_bytes()


def test_an_unknown_model_and_a_missing_network_are_told_apart(hub):
    endpoint, _, server = hub
    done = run(endpoint, "convert", "--from-hf", "owner/nobody")
    assert done.returncode == 1 and "no model named owner/nobody" in done.stderr
    server.shutdown()
    server.server_close()
    done = run(endpoint, "convert", "--from-hf", "gpt2")
    assert done.returncode == 1 and "hub cannot be reached" in done.stderr and "local folder" in done.stderr
    assert not Path("gpt2").exists()


def test_a_local_folder_can_be_given_to_from_hf(gpt2, folder):
    done = gpt2("convert", "--from-hf", folder, "--out", "copy")
    assert (done.code, done.out) == (0, "copy\n")
    shutil.rmtree("copy")
