"""The kernels of `few.py` against the model."""

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed: pip install numba (on Linux)")

if sys.platform != "linux":
    pytest.skip("they are for Linux", allow_module_level=True)

from gpt2cli import few, linear
from gpt2cli.cache import KVCache
from gpt2cli.config import ACTIVATIONS, SamplingConfig
from gpt2cli.linear import Int8Linear, PackedLinear, few_for, prepare
from gpt2cli.model import GPT

from .conftest import make_model, steps_apart
from .test_generate import continuations

SHAPES = [
    {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    {"n_head": 3, "n_embd": 30, "n_inner": 50, "vocab_size": 41, "block_size": 33},
    {"scale_attn_weights": False, "layer_norm_epsilon": 0.1},
    {"n_head": 1, "n_embd": 300, "n_layer": 1},  # more than is asked for ahead
]


@pytest.mark.parametrize("lengths", [[5], [7, 1, 30], [2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]])
def test_a_step_is_the_models(lengths):
    assert steps_apart(few.Few, make_model(), lengths, steps=2) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_models_in_every_shape(shape):
    assert steps_apart(few.Few, make_model(**shape), [31, 2]) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_is_the_models_with_every_activation(activation):
    assert steps_apart(few.Few, make_model(n_layer=1, activation_function=activation), [5]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_are_multiplied_as_they_are_and_not_rounded_to_bf16(shape):
    model, plain = prepare(make_model(**shape), "int8"), make_model(**shape)
    small = dict(model.named_modules()) | {"head": vars(model)["head"]}
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(small.get(name), Int8Linear):
                module.weight.copy_(small[name].weight * small[name].scale[:, None].float())
        head = small["head"].weight * small["head"].scale[:, None].float()
    vars(plain)["head"] = lambda x: x @ head.T
    assert steps_apart(few.Few, model, [9, 3], steps=2, oracle=plain) < 1e-4


def test_how_many_threads_there_are_changes_no_bit(monkeypatch):
    model, before, found = make_model(n_embd=60, n_head=3), torch.get_num_threads(), []
    monkeypatch.setattr(few, "MOST", 7)
    monkeypatch.setattr(few, "_threads", lambda n: nullcontext())  # parts of the work; who does them is numba's choice
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            cache = KVCache(model.config, 5, 8, model.wpe.weight)
            few.Few(model, cache).step(torch.tensor([3, 5, 0, 9, 7]), logits := torch.zeros(5, 97))
        finally:
            torch.set_num_threads(before)
        found.append((logits, cache.k, cache.v))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_torch_keeps_its_threads():
    """Where numba starts its own, in a process of its own."""
    program = """
import os, torch
os.environ["NUMBA_NUM_THREADS"] = "3"
from gpt2cli import few
from gpt2cli.cache import KVCache
from gpt2cli.config import GPTConfig
from gpt2cli.model import GPT
torch.set_num_threads(2)
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9))
few.Few(model, KVCache(model.config, 1, 8, model.wpe.weight)).step(torch.tensor([3]), torch.zeros(1, 9))
print(torch.get_num_threads())
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "2\n"


def test_what_is_not_a_number_stays_that():
    model = make_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 5] = math.nan
    cache = KVCache(model.config, 1, 8, model.wpe.weight)
    few.Few(model, cache).step(torch.tensor([3]), logits := torch.zeros(1, 97))
    assert logits.isnan().all()


def test_they_see_weights_that_were_changed_in_place():
    model = make_model()
    kernels = few.Few(model, KVCache(model.config, 1, 8, model.wpe.weight))
    kernels.step(torch.tensor([3]), before := torch.zeros(1, 97))
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(2)
    kernels.step(torch.tensor([3]), after := torch.zeros(1, 97))
    assert not torch.allclose(before, after)


def changed(change):
    model = make_model()
    change(model)
    return model


OTHERS = {
    "bf16": lambda m: m.bfloat16(),
    "oneDNN's blocks": lambda m: prepare(m, rows=5),
    "a layer that is not ours": lambda m: setattr(m.h[1].mlp, "c_fc", torch.nn.Sequential(m.h[1].mlp.c_fc)),
    "a head that is not ours": lambda m: setattr(m, "head", lambda x: x),
    "a hook": lambda m: m.h[0].mlp.c_fc.register_forward_hook(lambda *_: None),
    "a norm without a bias": lambda m: setattr(m, "ln_f", torch.nn.LayerNorm(32, bias=False)),
    "weights that are transposed": lambda m: setattr(m.h[0].mlp.c_fc, "weight", torch.nn.Parameter(torch.ones(32, 128).T)),
    "weights that are nowhere": lambda m: setattr(m.wpe, "weight", torch.nn.Parameter(torch.ones(32, 32, device="meta"))),
}


def test_for_whom_they_are():
    assert few_for(make_model(), 4) is few and few_for(prepare(make_model(), "int8"), 1) is few
    assert few_for(make_model(), 5) is None
    assert few_for(prepare(make_model(), "int8"), 8) is few and few_for(prepare(make_model(), "int8"), 9) is None
    assert few_for(make_model(dropout=0.1).train(), 1) is None and few_for(make_model(dropout=0.1).eval(), 1) is few
    with torch.autocast("cpu", torch.bfloat16):
        assert few_for(make_model(), 1) is None


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_others_are_left_to_torch(change):
    assert few_for(changed(change), 1) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_decodes_without_them():
    """GNU's OpenMP would end it."""
    config = SamplingConfig(max_new_tokens=9, greedy=True)
    expected = continuations(make_model(), [[5, 3]], config)[0][0]
    if not (child := os.fork()):
        done = few_for(make_model(), 1) is None and continuations(make_model(), [[5, 3]], config)[0][0] == expected
        os._exit(0 if done else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_few_rows_need_no_other_weights():
    model = prepare(make_model(), rows=4)
    assert not any(isinstance(module, PackedLinear) for module in model.modules()) and "head" not in vars(model)
    for rows in (5, 10**10):
        assert any(isinstance(module, PackedLinear) for module in prepare(make_model(), rows=rows).modules())


def test_their_compiler_loads_nothing_for_other_packages():
    program = "import sys; from gpt2cli import few; few.try_out(); print('awkward' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


@pytest.fixture
def tried_anew():
    linear._few.cache_clear()
    yield
    linear._few.cache_clear()


@pytest.mark.usefixtures("tried_anew")
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("where", ["import", "compiling"])
def test_where_numba_does_not_work_decoding_goes_on_without(monkeypatch, where, quantize):
    config = SamplingConfig(max_new_tokens=20, greedy=True)
    expected = continuations(prepare(make_model(), quantize), [[5, 3, 8]], config)
    linear._few.cache_clear()
    if where == "import":
        monkeypatch.setitem(sys.modules, "gpt2cli.few", None)
        monkeypatch.delattr(sys.modules["gpt2cli"], "few")
    else:
        monkeypatch.setattr(few, "_attend", lambda *_: Path("/nowhere/cache").read_bytes())
    with pytest.warns(UserWarning, match="numba does not work here, so decoding is slower: .*(gpt2cli.few|No such)") as told:
        found = continuations(prepare(make_model(), quantize), [[5, 3, 8]], config)
    assert (found == expected or quantize) and len(told) == 1  # int8 weights meet x in bf16 then


def test_it_decodes_with_them(monkeypatch):
    steps, step = [], few.Few.step
    monkeypatch.setattr(few.Few, "step", lambda self, ids, logits: (steps.append(len(ids)), step(self, ids, logits)))
    model, config = make_model(), SamplingConfig(max_new_tokens=3, greedy=True)
    found = continuations(model, [[5, 3], [4], [1, 2, 3]], config, rows=2)
    assert steps == [2, 2, 1, 1]
    with torch.inference_mode():
        for prompt, (ids, _, _) in zip([[5, 3], [4], [1, 2, 3]], found, strict=True):
            for n, new in enumerate(ids):
                assert GPT.forward(model, torch.tensor([prompt + ids[:n]]))[0][0, -1].argmax() == new
