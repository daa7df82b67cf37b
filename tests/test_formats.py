"""Every format into every other and back; and each against something that is not ours: nanoGPT's own structure, llm.c's
layout read with numpy, llama.cpp's own package, a checkpoint that TensorFlow wrote."""

import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2cli import Encoding, prove
from gpt2cli.convert import FORMATS, convert
from gpt2cli.errors import UserError
from gpt2cli.formats import gguf, huggingface, llmc, nanogpt, openai
from gpt2cli.formats.weights import write_safetensors
from gpt2cli.identify import find
from gpt2cli.model import GPT
from gpt2cli.tokenizer import END_OF_TEXT, byte_of_character, to_written

from .conftest import make_model

HOUSE = Path(__file__).parent
OPENAI = HOUSE / "data" / "openai"
NAMES = {"hf": "{}", "nanogpt": "{}/ckpt.pt", "llmc": "{}.bin", "gguf": "{}.gguf"}
READ = [name for name in FORMATS if name != "gguf"]


def without_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def save(folder, **shape):
    make_model(**shape).save_pretrained(folder)
    return folder


def loaded(source):
    contents = find(str(source)).contents
    return GPT.from_state(contents.config, contents.weights).eval()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ==== every pair ====

SHAPES = {
    "plain": {},
    "odd": {"n_layer": 3, "n_head": 5, "n_embd": 35, "block_size": 19, "vocab_size": 131},
    "exact GELU": {"activation_function": "gelu"},
    "another name of the tanh GELU": {"activation_function": "gelu_pytorch_tanh"},
    "as wide as the padding": {"vocab_size": 128, "n_head": 1},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("a, b", list(itertools.permutations(READ, 2)))
def test_there_and_back_through_every_pair_keeps_every_bit(tmp_path, a, b, shape, bias):
    model = make_model(**shape) if bias else without_biases(make_model(**shape))
    model.save_pretrained(tmp_path / "source")
    first, second, third = (tmp_path / NAMES[to].format(name) for to, name in ((a, "one"), (b, "two"), (a, "three")))
    convert(str(tmp_path / "source"), first, to=a)
    there, back = convert(str(first), second, to=b), convert(str(second), third, to=a)
    assert there.weights_error == back.weights_error == 0
    assert equal(loaded(third).state_dict(), model.state_dict())
    own = {"nanogpt": "gelu", "llmc": "gelu_new"}
    changed = own.get(a, shape.get("activation_function", "gelu_new")).replace("_pytorch_tanh", "_new") != own.get(b, "same")
    if changed and b != "hf":
        assert any("GELU" in change for change in there.changes) and there.loss_before != there.loss_after
    else:
        assert there.loss_before is None
        x = torch.arange(16)[None]
        assert torch.equal(loaded(first)(x)[0], loaded(second)(x)[0])
    if a == "nanogpt":
        args = [torch.load(path, weights_only=True)["model_args"] for path in (first, third)]
        assert args[0] == args[1] and args[0]["bias"] == bias


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_lossy_types_say_what_they_cost(tmp_path, dtype):
    save(tmp_path / "a")
    for to in ("hf", "llmc", "gguf"):
        if dtype not in FORMATS[to].dtypes:
            continue
        done = convert(str(tmp_path / "a"), tmp_path / NAMES[to].format(f"out-{to}"), to=to, dtype=dtype)
        wide = load_file(tmp_path / "a" / "model.safetensors").values()
        kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        rounding = max(float((tensor - tensor.to(kind)).abs().max()) for tensor in wide)
        assert 0 < done.weights_error <= rounding
        assert abs(done.loss_before - done.loss_after) < 0.02 and done.loss_before != done.loss_after


@pytest.mark.parametrize("to, dtype", [(to, dtype) for to in FORMATS for dtype in FORMATS[to].dtypes])
def test_a_model_of_width_1_goes_everywhere(tmp_path, to, dtype):
    save(tmp_path / "a", n_head=1, n_embd=1, block_size=1)
    assert convert(str(tmp_path / "a"), tmp_path / NAMES[to].format("out"), to=to, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("to", ["nanogpt", "llmc", "gguf"])
@pytest.mark.parametrize(
    "shape, says",
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 100}, "inner_size"),
        ({"activation_function": "relu"}, "activation_function = relu"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_name(tmp_path, to, shape, says):
    save(tmp_path / "a", **shape)
    out = tmp_path / "out" / "file"
    if to == "gguf" and says in ("tie_word_embeddings", "layer_norm_epsilon", "inner_size"):  # which llama.cpp knows
        assert convert(str(tmp_path / "a"), out, to=to).weights_error == 0
        assert getattr(gguf.read_back(out).config, says) == getattr(make_model(**shape).config, says)
        return
    with pytest.raises(UserError, match=f"cannot express {says}"):
        convert(str(tmp_path / "a"), out, to=to)
    assert not out.parent.exists()


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    save(tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    state["transformer.h.1.mlp.c_fc.weight"][3, 4] = 1e6
    save_file(state, tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight holds numbers that fp16 cannot"):
        convert(str(tmp_path / "a"), tmp_path / "b", dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_tensor_that_was_written_wrong_fails_the_proof(tmp_path, to, monkeypatch):
    save(tmp_path / "a")
    module = {"hf": huggingface, "nanogpt": nanogpt, "llmc": llmc, "gguf": gguf}[to]
    real = FORMATS[to].write

    def wrong(path, contents, dtype):
        state = {name: tensor.clone() for name, tensor in contents.weights.items()}
        state["h.1.ln_2.bias"][0] += 1e-3
        return real(path, contents.__class__(contents.config, state, contents.encoding, facts=contents.facts), dtype)

    monkeypatch.setitem(FORMATS, to, FORMATS[to].__class__(**vars(FORMATS[to]) | {"write": wrong}))
    with pytest.raises(UserError, match=r"proof failed: h\.1\.ln_2\.bias reads back differently"):
        convert(str(tmp_path / "a"), tmp_path / "out" / "x", to=to)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), module


# ==== nanoGPT ====


class Block(nn.Module):
    """nanoGPT's, as its model.py has it: names, order, exact GELU."""

    def __init__(self, C, bias):
        super().__init__()
        norm = lambda: nn.LayerNorm(C, bias=bias)  # noqa: E731
        self.ln_1, self.attn = norm(), nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias), "c_proj": nn.Linear(C, C, bias)})
        self.ln_2, self.mlp = norm(), nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias), "c_proj": nn.Linear(4 * C, C, bias)})


class NanoGPT(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias, dropout):
        super().__init__()
        wte, wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        h = nn.ModuleList(Block(n_embd, bias) for _ in range(n_layer))
        self.transformer = nn.ModuleDict({"wte": wte, "wpe": wpe, "h": h, "ln_f": nn.LayerNorm(n_embd, bias=bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.n_head = n_head

    def forward(self, x):
        B, T = x.shape
        x = self.transformer.wte(x) + self.transformer.wpe(torch.arange(T))
        for block in self.transformer.h:
            q, k, v = (
                part.view(B, T, self.n_head, -1).transpose(1, 2) for part in block.attn.c_attn(block.ln_1(x)).chunk(3, 2)
            )
            scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(T, T).bool().tril(), -math.inf)
            x = x + block.attn.c_proj((scores.softmax(3) @ v).transpose(1, 2).reshape(B, T, -1))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))

    def optimizer(self):
        parameters = list(self.parameters())
        decay, other = ([p for p in parameters if (p.dim() >= 2) == many] for many in (True, False))
        return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=1e-3)


def saved_by_nanogpt(path, *, bias=True, prefix="", vocab_size=97, **more):
    torch.manual_seed(0)
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": vocab_size, "bias": bias, "dropout": 0.2}
    model = NanoGPT(**args)
    optimizer = model.optimizer()
    F.cross_entropy(model(torch.arange(20)[None]).flatten(0, 1), torch.arange(20)).backward()
    optimizer.step()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    config = {"dataset": "shakespeare", "dtype": "float32", "learning_rate": 6e-4}
    checkpoint = {"model": state, "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 1}
    torch.save(checkpoint | {"best_val_loss": torch.tensor(4.5), "config": config} | more, path)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_a_checkpoint_of_nanogpt_computes_what_nanogpt_computes(tmp_path, gpt2, bias, prefix):
    theirs = saved_by_nanogpt(tmp_path / "ckpt.pt", bias=bias, prefix=prefix)
    done = gpt2("convert", tmp_path / "ckpt.pt", "--out", "hf", "--json")
    assert done.code == 0, done.err
    verdict = json.loads(done.out)
    assert verdict["source_format"] == "nanoGPT checkpoint" and verdict["logits_error"] < 1e-5 and verdict["weights_error"] == 0
    assert ("a model without biases" in done.err) == (not bias)
    assert json.loads(Path("hf/config.json").read_text())["activation_function"] == "gelu"
    x = torch.arange(32)[None]
    assert (loaded("hf")(x)[0] - theirs(x)).abs().max() < 1e-5
    info = json.loads(gpt2("convert", "ckpt.pt", "--info", "--json").out)
    assert info["facts"] == {"step": 1, "validation loss": 4.5} and info["config"]["dropout"] == 0.2


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_goes_on_from_what_we_write(tmp_path, bias):
    model = make_model(activation_function="gelu") if bias else without_biases(make_model(activation_function="gelu"))
    model.save_pretrained(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "ckpt.pt", to="nanogpt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert saved["model_args"]["bias"] == bias
    theirs = NanoGPT(**saved["model_args"])
    theirs.load_state_dict(saved["model"])
    x = torch.arange(32)[None]
    assert (theirs(x) - model(x)[0]).abs().max() < 1e-5
    optimizer = theirs.optimizer()
    optimizer.load_state_dict(saved["optimizer"])
    before = [parameter.clone() for parameter in theirs.parameters()]
    F.cross_entropy(theirs(x)[0], x[0]).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, theirs.parameters(), strict=True))
    assert saved["iter_num"] == 0 and saved["best_val_loss"] == 1e9


def test_the_step_and_loss_of_a_run_go_along(tmp_path, run_folder):
    convert(str(run_folder), tmp_path / "hf", to="hf")
    convert(str(run_folder), tmp_path / "ckpt.pt", to="nanogpt")
    facts = find(str(tmp_path / "ckpt.pt")).contents.facts
    assert facts["step"] in (4, 8) and facts["validation loss"] == find(str(run_folder)).contents.facts["validation loss"]
    assert find(str(tmp_path / "hf")).contents.facts["step"] == facts["step"]


def test_padding_of_the_vocabulary_is_cut_off_and_its_price_told(tmp_path, gpt2):
    theirs = saved_by_nanogpt(tmp_path / "ckpt.pt", vocab_size=50304)
    done = gpt2("convert", "ckpt.pt", "--out", "hf", "--json")
    verdict = json.loads(done.out)
    assert "47 rows that pad the vocabulary" in done.err and verdict["parameters"] < 50304 * 32 + 30_000
    assert 0 < verdict["loss_before"] - verdict["loss_after"] < 0.01  # trained rows take a little probability
    assert loaded("hf").config.vocab_size == 50257
    x = torch.arange(32)[None]
    assert (loaded("hf")(x)[0] - theirs(x)[..., :50257]).abs().max() < 1e-5


def test_a_checkpoint_from_before_biases_were_a_choice_has_the_tanh_gelu(tmp_path):
    saved_by_nanogpt(tmp_path / "new.pt")
    saved = torch.load(tmp_path / "new.pt", weights_only=True)
    del saved["model_args"]["bias"]
    saved["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    torch.save(saved, tmp_path / "old.pt")
    assert find(str(tmp_path / "old.pt")).contents.config.activation_function == "gelu_new"


def save_with_class(path, **more):
    """As build-nanogpt does, whose config's class is one of the script that ran."""
    executed = "raise SystemExit('executed')"
    code = (
        "class GPTConfig:\n"
        f"    def __setstate__(self, state): {executed}\n"
        f"    def __init__(self): self.__dict__.update(block_size=32, vocab_size=97, n_layer=2, n_head=2, n_embd=32)\n"
    )
    module = types.ModuleType("train_gpt2")
    exec(code, module.__dict__)
    sys.modules["train_gpt2"] = module
    try:
        state = {f"transformer.{name}": tensor for name, tensor in make_model().state_dict().items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
        torch.save({"model": state, "config": module.GPTConfig(), "step": 19072, "val_loss": 3.07} | more, path)
    finally:
        del sys.modules["train_gpt2"]


def test_a_checkpoint_of_build_nanogpt_is_read_without_its_class(tmp_path):
    save_with_class(tmp_path / "model.pt")
    found = find(str(tmp_path / "model.pt"))
    assert (found.format, found.contents.facts["step"]) == ("build-nanogpt checkpoint", 19072)
    assert found.contents.config == make_model().config
    assert equal(loaded(tmp_path / "model.pt").state_dict(), make_model().state_dict())


# ==== llm.c ====


def test_an_llmc_file_is_laid_out_as_its_own_reader_expects(tmp_path):
    model = make_model(vocab_size=131, n_layer=3)
    model.save_pretrained(tmp_path / "a")
    for dtype, version in (("fp32", 3), ("bf16", 5)):
        convert(str(tmp_path / "a"), tmp_path / dtype, to="llmc", dtype=dtype)
        data = (tmp_path / dtype).read_bytes()
        header = np.frombuffer(data[:1024], dtype="<i4")
        assert header[:9].tolist() == [20240326, version, 32, 131, 3, 2, 32, 256, 0]
        raw = np.frombuffer(data[1024:], dtype="<f4" if version == 3 else "<i2")
        values = torch.from_numpy(raw.copy()) if version == 3 else torch.from_numpy(raw.copy()).view(torch.bfloat16).float()
        state = model.state_dict()
        stacked = [torch.stack([state[f"h.{n}.{name}"] for n in range(3)]) for name in llmc._BLOCK]
        padded = F.pad(state["wte.weight"], (0, 0, 0, 125))
        parts = [padded, state["wpe.weight"], *stacked, state["ln_f.weight"], state["ln_f.bias"]]
        expected = torch.cat([part.flatten() for part in parts])
        assert torch.equal(values, expected if version == 3 else expected.bfloat16().float())
    assert llmc._BLOCK[2] == "attn.c_attn.weight" and llmc._BLOCK[10] == "mlp.c_proj.weight"


# ==== GGUF ====


def test_a_gguf_holds_what_llama_cpp_asks_for(tmp_path):
    torch.manual_seed(0)
    save(tmp_path / "a", vocab_size=50257)
    convert(str(tmp_path / "a"), tmp_path / "a.gguf", to="gguf", dtype="q8_0")
    reader = pytest.importorskip("gguf").GGUFReader(tmp_path / "a.gguf")
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "gpt2" and value["gpt2.context_length"] == 32 and value["gpt2.block_count"] == 2
    assert value["tokenizer.ggml.model"] == "gpt2" and value["tokenizer.ggml.pre"] == "gpt-2"
    assert value["tokenizer.ggml.tokens"][15496] == "Hello" and value["tokenizer.ggml.tokens"][50256] == "<|endoftext|>"
    assert value["tokenizer.ggml.merges"][0] == "Ġ t" and value["tokenizer.ggml.eos_token_id"] == 50256
    assert value["tokenizer.ggml.token_type"][50255:] == [1, 3]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["position_embd.weight"] == kinds["blk.0.attn_qkv.bias"] == kinds["output_norm.weight"] == "F32"
    layer = "attn_norm attn_qkv attn_output ffn_norm ffn_up ffn_down"
    both = [f"blk.{n}.{name}" for n in range(2) for name in layer.split()] + ["output_norm"]
    names = {f"{name}.{kind}" for name in both for kind in ("weight", "bias")}
    assert set(kinds) == names | {"token_embd.weight", "position_embd.weight"}
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # the row's length first
    assert shapes["blk.0.ffn_up.weight"] == [32, 128] and shapes["blk.0.attn_qkv.weight"] == [32, 96]


def test_ids_without_a_token_are_padding_in_a_gguf_and_rows_that_q8_cannot_cut_are_fp16(tmp_path):
    tokens = Encoding({bytes([n]): n for n in range(256)}, [], eot=256)
    model = make_model(vocab_size=260, n_embd=40)
    (tmp_path / "a").mkdir()
    huggingface.write(tmp_path / "a", model.config, model.state_dict(), tokens)
    done = convert(str(tmp_path / "a"), tmp_path / "a.gguf", to="gguf", dtype="q8_0")
    reader = pytest.importorskip("gguf").GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents()[-3:] == ["[PAD257]", "[PAD258]", "[PAD259]"]
    assert reader.fields["tokenizer.ggml.token_type"].contents()[-4:] == [3, 5, 5, 5]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "F16", "Q8_0"}  # mlp.c_proj has rows of 160
    assert any("F16" in change for change in done.changes)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
def test_llama_cpp_computes_our_logits(tmp_path, dtype):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python")
    save(tmp_path / "a", vocab_size=50257, n_embd=64)
    done = convert(str(tmp_path / "a"), tmp_path / "a.gguf", to="gguf", dtype=dtype)
    assert done.program == "llama.cpp" and done.logits_error < 0.2


def test_a_gguf_is_no_source_and_says_so(tmp_path, gpt2):
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0")
    done = gpt2("convert", "a.gguf", "--to", "hf", "--out", "b")
    assert done.code == 1 and "a GGUF file, which is only written" in done.err


# ==== OpenAI ====


def what_tensorflow_saved():
    """The values that `tests/data/openai` was made with, in OpenAI's order of names, by TensorFlow 2.21's `Saver`."""
    C, V, T, count = 8, 40, 8, itertools.count()

    def values(*shape):
        plain = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        return (plain * 37 % 101 - 50) / 64 + next(count) / 8

    state = {"wpe.weight": values(T, C), "wte.weight": values(V, C)}
    for n in range(2):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            wide = {"attn.c_attn": 3, "mlp.c_fc": 4}.get(name, 1) * C
            weight = values(C) if "ln" in name else values(4 * C if name == "mlp.c_proj" else C, wide).t()
            state |= {f"h.{n}.{name}.weight": weight, f"h.{n}.{name}.bias": values(wide)}
    return state | {"ln_f.weight": values(C), "ln_f.bias": values(C)}


def test_a_checkpoint_that_tensorflow_wrote_is_read_without_it(tmp_path):
    contents = openai.read(OPENAI)
    assert equal(dict(contents.weights), what_tensorflow_saved())
    done = convert(str(OPENAI), tmp_path / "hf")
    assert done.source_format == "OpenAI's TensorFlow checkpoint" and done.logits_error < 1e-3


def test_openais_own_vocabulary_goes_along_and_the_newest_checkpoint_is_read(tmp_path):
    folder = tmp_path / "117M"
    shutil.copytree(OPENAI, folder)
    tokens = Encoding({bytes([n]): n for n in range(39)}, [], eot=39)
    with pytest.raises(UserError, match="vocabulary is not 256 bytes"):
        (folder / "encoder.json").write_text(json.dumps(tokens.written))
        (folder / "vocab.bpe").write_text("#version: 0.2\n")
        find(str(folder))
    ids = {to_written(bytes([byte])): n for n, byte in enumerate(byte_of_character().values())} | {"ab": 256, END_OF_TEXT: 257}
    (folder / "encoder.json").write_text(json.dumps(ids))
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n")
    assert Encoding.from_folder(folder).encode("abba") == [256, ids["b"], ids["a"]]
    for name in ("encoder.json", "vocab.bpe"):
        (folder / name).unlink()
    for path in folder.glob("model.ckpt*"):
        shutil.copy(path, folder / path.name.replace("model.ckpt", "model-500"))
    with pytest.raises(UserError, match=r"2 model\.ckpt\.index"):
        find(str(folder))
    (folder / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model-500"\nall_model_checkpoint_paths: "model-1"\n')
    assert find(str(folder)).contents.facts["checkpoint"] == "model-500"


# ==== what a file is ====


def test_info_says_what_each_file_is(tmp_path, gpt2, run_folder):
    save(tmp_path / "a")
    for to in ("nanogpt", "llmc"):
        convert(str(tmp_path / "a"), tmp_path / to, to=to)
    (tmp_path / "nanogpt").rename(tmp_path / "ckpt.pt")
    for source, says in (
        (tmp_path / "a", "HuggingFace folder"),
        (run_folder, "checkpoint of gpt2"),
        (tmp_path / "ckpt.pt", "nanoGPT checkpoint"),
        (tmp_path / "llmc", "llm.c model"),
        (OPENAI, "OpenAI's TensorFlow checkpoint"),
    ):
        done = gpt2("convert", source, "--info")
        assert done.code == 0 and says in done.out and "n_layer" in done.out, done.err
    found = json.loads(gpt2("convert", run_folder, "--info", "--json").out)
    assert found["tokenizer"] == "GPT-2, 50,257 ids" and found["dtype"] == "float32" and found["facts"]["step"] in (4, 8)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: path.write_text("hello"), "no model"),
        (lambda path: path.mkdir(), "a folder without a model"),
        (lambda path: path.write_bytes((20240520).to_bytes(4, "little") * 300), "a shard of tokens"),
        (lambda path: path.write_bytes(b""), "no model"),
        (lambda path: None, "there is no "),
    ],
)
def test_what_is_no_model_is_told_what_it_is(tmp_path, gpt2, make, says):
    make(tmp_path / "x.bin")
    done = gpt2("convert", tmp_path / "x.bin", "--out", "y")
    assert done.code == 1 and says in done.err


def test_python_takes_names_and_tells_why_logits_were_not_compared(run_folder):
    done = convert(str(run_folder), "model.bin", to="llmc")
    assert done.program is None and done.not_compared == "it is no library that could be asked"
    with pytest.raises(UserError, match=r"is a run, not a model: give one of the checkpoints"):
        GPT.from_pretrained(run_folder)


def test_a_part_of_a_folder_names_the_folder(tmp_path, gpt2):
    save(tmp_path / "a")
    done = gpt2("convert", "a/model.safetensors", "--out", "b")
    assert done.code == 1 and "give the folder, a" in done.err


def test_a_tokenizer_can_be_given_and_must_fit(tmp_path, gpt2):
    save(tmp_path / "a", vocab_size=300)
    Encoding({bytes([n]): n for n in range(256)}, [], eot=256).save(tmp_path)
    done = gpt2("convert", "a", "--out", "b")
    assert done.code == 0 and "no tokenizer is known for its 300 ids" in done.err
    done = gpt2("convert", "a", "--tokenizer", "tokenizer.json", "--out", "c")
    assert done.code == 0 and "no tokenizer" not in done.err and Path("c/tokenizer.json").exists()
    save(tmp_path / "small")
    done = gpt2("convert", "small", "--tokenizer", "tokenizer.json", "--out", "d")
    assert done.code == 1 and "257 ids, but the model knows 97" in done.err
    assert gpt2("convert", "a", "--tokenizer", "a", "--out", "e").code == 1


def test_existing_files_are_replaced_only_by_force_and_wrong_words_are_told(tmp_path, gpt2):
    save(tmp_path / "a")
    assert gpt2("convert", "a", "--to", "llmc").out == "a.bin\n"
    before = Path("a.bin").read_bytes()
    done = gpt2("convert", "a", "--to", "llmc")
    assert done.code == 1 and "--force" in done.err and Path("a.bin").read_bytes() == before
    assert gpt2("convert", "a", "--to", "llmc", "--force", "--dtype", "bf16").code == 0
    assert len(Path("a.bin").read_bytes()) < len(before)
    assert "a-nanogpt/ckpt.pt" in gpt2("convert", "a", "--to", "nanogpt").out
    assert "expected hf, nanogpt, llmc, gguf" in gpt2("convert", "a", "--to", "onnx").err
    assert "expected fp32, bf16" in gpt2("convert", "a", "--to", "llmc", "--dtype", "q8_0").err
    assert "give --out a/a.gguf" in gpt2("convert", "a", "--to", "gguf", "--out", "a").err
    assert gpt2("convert").code == 1 and gpt2("convert", "a", "--from-hf", "a").code == 1


# ==== hostile files ====


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def header(*values):
    return np.array([20240326, *values, *[0] * (255 - len(values))], dtype="<i4").tobytes()


def zipped(path, method):
    torch.save({"model": {}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data + b"\0" * 10_000_000)


VAST = torch.zeros(1).expand((10**9, 32))  # one number that claims to be many


def both_heads(tensor):
    return dict.fromkeys(["lm_head.weight", "transformer.wte.weight"], tensor)


def nanogpt_with(path, **changes):
    saved_by_nanogpt(path)
    saved = torch.load(path, weights_only=True)
    for name, value in changes.items():
        saved["model" if name == "tensor" else "model_args"] |= value
    torch.save(saved, path)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: torch.save({"model": Trap()}, p), "mkdir to be run"),
        (lambda p: torch.save(Trap(), p, _use_new_zipfile_serialization=False), "to be run"),
        (lambda p: save_with_class(p, extra=Trap()), "to be run"),
        (lambda p: zipped(p, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda p: torch.save([1], p), "no table 'model'"),
        (lambda p: torch.save({"model": {}}, p), "does not say its shape"),
        (lambda p: nanogpt_with(p, args={"vocab_size": 10**12}), "wte.weight has shape"),
        (lambda p: nanogpt_with(p, args={"n_layer": 10**9}), "n_layer must be at most"),
        (lambda p: nanogpt_with(p, args={"n_head": "two"}), "n_head must be int"),
        (lambda p: nanogpt_with(p, args={"n_layer": 3}), "12 tensors are missing"),
        (lambda p: nanogpt_with(p, tensor={"transformer.extra": torch.ones(1)}), "extra has no place"),
        (lambda p: nanogpt_with(p, tensor={"lm_head.weight": torch.ones(97, 32)}), "differs from wte.weight"),
        (lambda p: nanogpt_with(p, tensor={"_orig_mod.transformer.ln_f.bias": torch.ones(32)}), "ln_f.bias twice"),
        (lambda p: nanogpt_with(p, tensor={"transformer.ln_f.bias": torch.ones(32, dtype=torch.int64)}), "is int64"),
        (lambda p: nanogpt_with(p, tensor={"transformer.ln_f.bias": torch.ones(32).to_sparse()}), "not a plain tensor"),
        (lambda p: nanogpt_with(p, args={"block_size": 10**9}, tensor={"transformer.wpe.weight": VAST}), "its tensors claim"),
        (lambda p: nanogpt_with(p, args={"vocab_size": 10**9}, tensor=both_heads(VAST)), "its tensors claim"),
        (lambda p: p.write_bytes(header(3, 32, 97, 2, 2, 32, 128)), "header describes"),
        (lambda p: p.write_bytes(header(3, 32, 97, 2, 2, 32, 128)[:100]), "no whole header"),
        (lambda p: p.write_bytes(header(1, 32, 97, 2, 2, 32, 128)), "version 1 is not read"),
        (lambda p: p.write_bytes(header(3, 32, 97, 2, 2, 32, 64)), "too few for a vocabulary"),
        (lambda p: p.write_bytes(header(3, 2**31 - 1, 2**31 - 1, 9999, 1, 2**31 - 1, 2**31 - 1)), "header describes"),
        (lambda p: p.write_bytes(header(3, 32, -97, 2, 2, 32, 128)), "vocab_size must be at least 1"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_line_and_nothing_is_run(tmp_path, gpt2, make, says):
    path = tmp_path / "ckpt.pt"
    make(path)
    done = gpt2("convert", path, "--out", "out")
    assert done.code == 1 and says in done.err, done.err
    assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda h: h["transformer.ln_f.bias"].update(data_offsets=[0, 128]), "damaged"),  # which lies over another's bytes
        (lambda h: h["transformer.ln_f.bias"].update(shape=[2**62]), "damaged"),
        (lambda h: h["transformer.ln_f.bias"].update(dtype="I64"), "damaged"),
        (lambda h: h["transformer.ln_f.bias"].update(data_offsets=[0, 2**63]), "damaged"),
        (lambda h: h.pop("transformer.ln_f.bias"), "damaged"),  # bytes of nobody
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, gpt2, change, says):
    save(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    done = gpt2("convert", "a", "--out", "b")
    assert done.code == 1 and says in done.err and not Path("b").exists()
    path.write_bytes((2**63).to_bytes(8, "little") + data[8:])
    assert "damaged" in gpt2("convert", "a", "--out", "b").err


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("hparams.json", lambda d: d.replace(b'"n_embd"', b'"width"'), "has no n_embd"),
        ("hparams.json", lambda d: d.replace(b"40", b"41"), "wte has shape (40, 8)"),
        ("hparams.json", lambda d: d.replace(b'"n_layer": 2', b'"n_layer": 1'), "has no place"),
        ("hparams.json", lambda d: d.replace(b'"n_layer": 2', b'"n_layer": 3'), "12 tensors are missing"),
        ("model.ckpt.data-00000-of-00001", lambda d: d[:-1], "beyond its end"),
        ("model.ckpt.index", lambda d: d[:-1], "does not end as one does"),
        ("model.ckpt.index", lambda d: d[:40] + bytes([d[40] ^ 1]) + d[41:], "checksum"),
        ("model.ckpt.index", lambda d: b"", "does not end as one does"),
        ("model.ckpt.index", lambda d: d[:-48] + bytes(20 * [255]) + d[-28:], "not a whole index"),
    ],
)
def test_openai_files_that_are_not_whole_are_refused(tmp_path, gpt2, name, change, says):
    shutil.copytree(OPENAI, tmp_path / "o")
    path = tmp_path / "o" / name
    path.write_bytes(change(path.read_bytes()))
    done = gpt2("convert", "o", "--out", "b")
    assert done.code == 1 and says in done.err, done.err
    (path.parent / "model.ckpt.data-00000-of-00001").unlink()
    assert gpt2("convert", "o", "--out", "b").code == 1


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def table(entries, shared=0, flag=0, repeat=1):
    """A LevelDB table of one block with (name, value) pairs, as TensorFlow writes its index."""

    def block(pairs):
        data = b"".join(varint(shared) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
        data += (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
        crc = openai._masked(openai._crc32c(data + bytes([flag])))
        return data + bytes([flag]) + crc.to_bytes(4, "little")

    one = block([(b"", b"\x08\x01"), *entries] if not shared else entries)
    place = varint(0) + varint(len(one) - 5)
    shared, flag = 0, 0
    index = block([(b"x%d" % n, place) for n in range(repeat)])
    footer = varint(0) * 2 + varint(len(one)) + varint(len(index) - 5)
    return one + index + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def entry(shape, offset, size, slices=False):
    dims = b"".join(b"\x12" + varint(len(b"\x08" + varint(n))) + b"\x08" + varint(n) for n in shape)
    return b"\x08\x01\x12" + varint(len(dims)) + dims + b"\x20" + varint(offset) + b"\x28" + varint(size) + b"\x38\x01" * slices


@pytest.mark.parametrize(
    "index, says",
    [
        (table([(b"model/ln_f/b", entry([8], 0, 32))]), "27 tensors are missing"),
        (table([(b"model/ln_f/b", entry([8], 0, 32)), (b"model/ln_f/g", entry([8], 16, 32))]), "lie over each other"),
        (table([(b"model/ln_f/g", entry([8], 0, 32)), (b"model/ln_f/w", entry([8], 32, 32))]), "ln_f.weight twice"),
        (table([(b"model/ln_f/b", entry([8], 0, 1 << 62))]), "beyond its end"),
        (table([(b"model/ln_f/b", entry([8], 1 << 62, 32))]), "beyond its end"),
        (table([(b"model/ln_f/b", entry([1 << 62], 0, 32))]), "has shape"),
        (table([(b"model/ln_f/b", entry([8], 0, 32, slices=True))]), "cut in slices"),
        (table([(b"model/ln_f/b", b"\x0b")]), "unknown kind"),
        (table([(b"model/ln_f/b", b"\x12\x7f")]), "ends too early"),
        (table([(b"model/ln_f/b", entry([8], 0, 32))], flag=1), "compressed"),
        (table([(b"model/ln_f/b", entry([8], 0, 32))], repeat=2), "not one after the other"),
        (table([(b"a" * 300, b"")]), "no end"),
        (table([(b"a", b"")], shared=1), "no beginning"),
        (table([]) + bytes(1 << 20), "too large"),
    ],
)
def test_an_index_of_tensorflow_that_lies_is_refused(tmp_path, gpt2, index, says):
    shutil.copytree(OPENAI, tmp_path / "o")
    (tmp_path / "o" / "model.ckpt.index").write_bytes(index)
    done = gpt2("convert", "o", "--out", "b")
    assert done.code == 1 and says in done.err, done.err


def test_tensors_that_claim_more_than_the_file_has_are_refused(tmp_path, gpt2):
    saved_by_nanogpt(tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    one = torch.zeros(97 * 128)
    saved["model"] = {name: one[: tensor.numel()].view(tensor.shape) for name, tensor in saved["model"].items()}
    del saved["optimizer"]
    torch.save(saved, tmp_path / "ckpt.pt")
    done = gpt2("convert", "ckpt.pt", "--out", "b")
    assert done.code == 1 and "its tensors claim" in done.err
    (tmp_path / "a").mkdir()
    shutil.copy(save(tmp_path / "c") / "config.json", tmp_path / "a")
    torch.save(saved["model"], tmp_path / "a" / "pytorch_model.bin")
    done = gpt2("convert", "a", "--out", "b")
    assert done.code == 1 and "its tensors claim" in done.err


def test_a_zip_that_hides_from_python_is_no_way_around_its_checks(tmp_path, gpt2):
    zipped(tmp_path / "x.pt", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.comment = b"hidden PK\5\6"
    done = gpt2("convert", "x.pt", "--out", "b")
    assert done.code == 1 and ("compressed" in done.err or "damaged" in done.err)


# ==== what must not be lost ====


def test_what_appears_at_the_target_meanwhile_is_kept(tmp_path, gpt2, monkeypatch):
    save(tmp_path / "a")
    forward = prove.forward

    def meanwhile(*arguments):
        for name in ("b/file", "c.bin"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("precious")
        return forward(*arguments)

    monkeypatch.setattr(prove, "forward", meanwhile)
    for arguments in (("--out", "b"), ("--to", "llmc", "--out", "c.bin")):
        done = gpt2("convert", "a", *arguments)
        assert done.code == 1 and "already exists" in done.err
        for name in ("b/file", "c.bin"):
            assert (tmp_path / name).read_text() == "precious"
            (tmp_path / name).unlink()
        shutil.rmtree(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_force_replaces_nothing_but_a_model(tmp_path, gpt2, run_folder):
    save(tmp_path / "a")
    save(tmp_path / "b")
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    shutil.copytree(run_folder, tmp_path / "run")
    (step,) = (path for path in (tmp_path / "run").glob("step-*") if path.name.endswith("8"))
    for out in ("b", step):
        done = gpt2("convert", "a", "--out", out, "--force")
        assert done.code == 1 and "or holds more" in done.err
    done = gpt2("convert", "a", "--to", "llmc", "--out", "a/model.safetensors", "--force")
    assert done.code == 1 and "is in it" in done.err
    assert find("a").format == "HuggingFace folder" and (step / "training.json").exists()


def test_a_link_is_followed_and_what_is_no_file_is_left_alone(tmp_path, gpt2, monkeypatch):
    save(tmp_path / "a")
    save(tmp_path / "real", n_layer=1)
    (tmp_path / "link").symlink_to("real")
    assert gpt2("convert", "a", "--out", "link", "--force").code == 0
    assert (tmp_path / "link").is_symlink() and find("real").contents.config.n_layer == 2
    done = gpt2("convert", "a", "--to", "llmc", "--out", os.devnull, "--force")
    assert done.code == 1 and "neither a file nor a folder" in done.err
    assert gpt2("convert", os.devnull, "--out", "x").code == 1
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = gpt2("convert", "../a", "--out", ".")
    assert done.code == 1 and "the name of a new folder" in done.err
    monkeypatch.chdir(tmp_path / "a")
    assert gpt2("convert", ".", "--to", "nanogpt", "--out", "../x/y/z.pt").code == 0
    assert gpt2("convert", ".", "--to", "llmc").out == "a.bin\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_are_not_hidden_by_torchs_zip_writer(tmp_path, error, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise error

    save(tmp_path / "a")
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **more: Full() if "w" in mode else real(self, mode, **more))
    with pytest.raises(type(error)):
        convert(str(tmp_path / "a"), tmp_path / "n" / "m" / "x.pt", to="nanogpt")
    assert not (tmp_path / "n").exists()


def test_what_is_written_is_what_safetensors_writes(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.tensor(7),
        "half": torch.randn(3).half(),
        "bf16": torch.randn(2, 2).bfloat16(),
    }
    write_safetensors(tmp_path / "ours", tensors | {"t": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T})
    tensors["t"] = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T.contiguous()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_broken_model_is_refused_by_name(tmp_path, gpt2):
    save(tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    state["transformer.h.1.mlp.c_fc.bias"][3] = math.nan
    save_file(state, tmp_path / "b.safetensors")
    shutil.move(tmp_path / "b.safetensors", tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "checkpoint.json").unlink(missing_ok=True)
    done = gpt2("convert", "a", "--out", "b")
    assert done.code == 1 and "h.1.mlp.c_fc.bias holds NaN" in done.err


# ==== what goes along ====


def test_what_a_folder_says_beside_its_weights_goes_along(tmp_path, gpt2):
    save(tmp_path / "a", vocab_size=50257)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"eos_token_id": 7, "pad_token_id": 8}))
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "max_length": 99}))
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "a" / "vocab.txt").symlink_to("/etc/passwd")
    assert gpt2("convert", "a", "--out", "b").code == 0
    written = {name: json.loads(Path("b", name).read_text()) for name in ("config.json", "generation_config.json")}
    assert (written["config.json"]["eos_token_id"], written["config.json"]["pad_token_id"]) == (7, 8)
    assert written["generation_config.json"]["max_length"] == 99
    assert json.loads(Path("b/tokenizer_config.json").read_text()) == settings and not Path("b/vocab.txt").exists()
    assert gpt2("convert", "a", "--out", "c", "--tokenizer", "a").code == 0
    assert json.loads(Path("c/config.json").read_text())["eos_token_id"] == 50256


def test_another_kind_of_tokenizer_goes_along_and_a_damaged_one_is_refused(tmp_path, gpt2):
    save(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    done = gpt2("convert", "a", "--out", "b")
    assert done.code == 0 and "in HuggingFace folders alone" in done.err
    assert Path("b/tokenizer.json").read_bytes() == Path("a/tokenizer.json").read_bytes()
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    done = gpt2("convert", "a", "--out", "c")
    assert done.code == 1 and "cannot be read" in done.err
    Path("b/tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    done = gpt2("convert", "b", "--out", "c")
    assert done.code == 1 and "changed since gpt2 wrote it" in done.err


def test_tokens_added_to_an_older_folder_go_along_and_are_not_lost(tmp_path, gpt2):
    save(tmp_path / "a", vocab_size=50258)
    model = json.loads(Encoding.gpt2().files["tokenizer.json"])["model"]
    files = {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "\n".join(model["merges"])}
    for name, text in (files | {"added_tokens.json": '{"<|pad|>": 50257}'}).items():
        (tmp_path / "a" / name).write_text(text, encoding="utf-8")
    for source, out in (("a", "b"), ("b", "c")):
        assert gpt2("convert", source, "--out", out).code == 0
        assert not Path(out, "tokenizer.json").exists()  # which would be read first
        for name in (*files, "added_tokens.json"):
            assert Path(out, name).read_bytes() == Path("a", name).read_bytes()
    done = gpt2("convert", "a", "--to", "llmc", "--out", "a.bin")
    assert done.code == 0 and "in HuggingFace folders alone" in done.err
    done = gpt2("sample", "b", "--prompt", "x")
    assert done.code == 1 and "one token a merge" in done.err


def test_weights_that_git_left_behind_and_nanogpts_folder_are_told(tmp_path, gpt2):
    save(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in gpt2("convert", "a", "--out", "b").err
    (tmp_path / "out").mkdir()
    saved_by_nanogpt(tmp_path / "out" / "ckpt.pt")
    assert "give its out/ckpt.pt" in gpt2("convert", "out", "--to", "hf", "--out", "b").err
    torch.save({}, tmp_path / "a" / "pytorch_model.bin")
    assert "give the folder" in gpt2("convert", "a/pytorch_model.bin", "--out", "b").err


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited and measured through Linux's /proc")
@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_changed_files_are_read_or_refused(count):
    command = [sys.executable, "-m", "tests.fuzz", str(count), "7"]
    done = subprocess.run(command, cwd=HOUSE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cases"] == count and found["read"] + found["refused"] == count and found["largest"] < 200e6
