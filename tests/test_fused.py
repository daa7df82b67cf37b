"""The kernels of `fused.py` against the model: on a GPU where there is one, else by Triton's interpreter, which runs what they
say on a CPU. That a GPU's compiler takes them needs no GPU."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch.nn.attention import sdpa_kernel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from gpt2cli import drawing, fused, kernels, trial
from gpt2cli.ahead import Graphs
from gpt2cli.cache import KVCache
from gpt2cli.config import ACTIVATIONS, SamplingConfig
from gpt2cli.linear import prepare
from gpt2cli.loss import linear_cross_entropy
from gpt2cli.rows import PLANLESS
from gpt2cli.sampling import choose

from .conftest import make_model, steps_apart
from .test_generate import continuations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SHAPES = [
    {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    {"n_head": 3, "n_embd": 30, "n_inner": 50, "vocab_size": 41, "block_size": 33},  # nothing is a power of two
    {"scale_attn_weights": False, "layer_norm_epsilon": 0.1},
]


@sdpa_kernel(PLANLESS)
def apart(model, lengths, steps=1):
    return steps_apart(fused.Fused, model, lengths, steps)


@pytest.mark.parametrize("lengths", [[5], [7, 1, 30], [2, 3, 4, 5], [9, 1, 2, 30, 4, 5]])
def test_a_step_is_the_models(lengths):
    assert apart(make_model(n_layer=1).to(DEVICE), lengths, steps=2) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_models_in_every_shape(shape, monkeypatch):
    looks = fused.looks
    monkeypatch.setattr(fused, "blocks", fused.blocks.__wrapped__)
    monkeypatch.setattr(fused, "NUMBERS", 64)  # many programs
    monkeypatch.setattr(fused, "looks", lambda *sizes: looks(*sizes) | {"TOKENS": 16})  # many looks at the tokens
    assert apart(make_model(**shape).to(DEVICE), [31, 2]) < 1e-5


@pytest.mark.parametrize("lengths", [[9, 1, 2, 30, 4], [3, 4]])
def test_there_may_be_columns_behind_the_logits(lengths, monkeypatch):
    for place in ("gpt2cli.fused", "tests.conftest"):
        monkeypatch.setattr(f"{place}.multiple", lambda device_type: 64)  # of 97
    assert apart(make_model(n_layer=1).to(DEVICE), lengths) < 1e-5


@pytest.mark.parametrize("lengths", [[5, 1], [9, 1, 2, 30, 4]])
def test_layer_norm_is_exact_where_the_mean_is_large(lengths):
    model = make_model(n_layer=1).to(DEVICE)
    with torch.no_grad():
        model.wpe.weight += 1000.0
    assert apart(model, lengths) < 3e-3  # fp32 has 6e-5 at 1,000, and a deviation here is 0.03
    model.wpe.weight.data[:, 0] += 30.0  # the number from which the others are counted is far away
    assert apart(model, lengths) < 3e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_is_the_models_with_every_activation(activation):
    assert apart(make_model(n_layer=1, activation_function=activation).to(DEVICE), [5]) < 1e-5


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_step_in_16_bits_is_the_models(dtype, close, quantize):
    """Logits are up to about 3 here, keys and values too."""
    model = make_model().to(DEVICE, dtype)
    if quantize:
        prepare(model, quantize)
        close = 0.04  # it rounds to bf16
    for lengths in ([5, 3], [5, 3, 1, 2, 7]):
        assert 0 < apart(model, lengths) < close


@pytest.fixture(autouse=True)
def in_full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


OPTIONS = [
    {"top_p": None},
    {"top_p": 0.9},
    {"top_k": 5, "top_p": None},
    {"top_k": 5, "top_p": 0.7, "min_p": 0.01},
    {"top_k": 1000, "temperature": 0.02},
    {"top_p": 1e-9, "temperature": 50.0},
    {"min_p": 0.2, "temperature": 3.0, "top_p": None},
]


def drawn(draw, logits, config, uniform):
    found = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    draw(logits, config, uniform, found)
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [(16, 8), (16, 32), (1024, 32), (4096, 8)])
def test_what_is_drawn_is_what_is_chosen(options, sizes, monkeypatch):
    monkeypatch.setattr(drawing, "sizes", lambda rows: sizes)
    torch.manual_seed(0)
    logits, uniform = 2 * torch.randn(5, 41, device=DEVICE), torch.rand(5, device=DEVICE)
    config = SamplingConfig(**options)
    found = drawn(drawing.draw, logits[:, :37], config, uniform)  # not contiguous
    assert torch.equal(found, choose(logits[:, :37], config, uniform))
    assert options.get("temperature") != 50 or torch.equal(found, logits[:, :37].argmax(dim=-1))


def test_all_that_are_as_likely_are_kept_and_ends_are_drawn():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, -torch.inf]], device=DEVICE)
    almost = torch.tensor([1 - 2**-24], device=DEVICE)
    for config in (SamplingConfig(top_k=2, top_p=None), SamplingConfig(top_p=0.6)):  # the likeliest alone has 0.45
        assert drawn(drawing.draw, logits, config, almost).tolist() == [4]
        assert drawn(drawing.draw, logits, config, 0 * almost).tolist() == [1]
    assert drawn(drawing.draw, logits, SamplingConfig(top_p=None), almost).tolist() == [4]


@pytest.mark.parametrize("sizes", [(16, 8), (1024, 32)])
def test_the_likeliest_is_the_first_of_them(sizes, monkeypatch):
    monkeypatch.setattr(drawing, "sizes", lambda rows: sizes)
    torch.manual_seed(0)
    logits = torch.randn(5, 41, device=DEVICE).bfloat16()
    logits[0, [5, 20, 33]] = logits[1, 36] = logits[2, 40] = 9.0
    logits[3] = -torch.inf
    logits[4, ::2] = torch.nan
    *found, of_infinities, of_nan = drawn(drawing.best, logits[:, :37], SamplingConfig(greedy=True), logits[:, 0]).tolist()
    assert found == [5, 36, int(logits[2, :37].argmax())] and of_infinities == 0 and 0 <= of_nan < 37


def test_what_is_tried_has_the_sizes_of_what_is_drawn(taken, monkeypatch):
    sizes, tried = drawing.sizes, []
    monkeypatch.setattr(drawing, "sizes", lambda rows: tried.append(sizes(rows)) or tried[-1])
    for rows in (3, 40):
        tried.clear()
        drawing.drawing(SamplingConfig(), torch.zeros(rows, 97, device=DEVICE))
        assert set(tried) == {sizes(rows)}


def test_drawing_that_goes_wrong_is_told_and_not_taken(taken, monkeypatch):
    config, greedy, like = SamplingConfig(), SamplingConfig(greedy=True), torch.zeros(3, 128, device=DEVICE).bfloat16()[:, :97]
    assert drawing.drawing(config, like) is drawing.draw and drawing.drawing(greedy, like) is drawing.best
    trial.verdicts.clear()
    monkeypatch.setattr(
        drawing, "draw", lambda logits, config, uniform, drawn: drawn.copy_(choose(logits, config, 0.9 * uniform))
    )
    monkeypatch.setattr(drawing, "best", lambda logits, config, uniform, drawn: drawn.copy_(logits.argmin(dim=-1)))
    for settings in (config, greedy):
        with pytest.warns(UserWarning, match="they draw other tokens than torch's"):
            assert drawing.drawing(settings, like) is drawing.plain
        assert drawing.drawing(settings, like) is drawing.plain


class Unrecorded(Graphs):
    """The way of a GPU without its records, which the interpreter's kernels cannot be in."""

    def __init__(self, *what, **more):
        super().__init__(*what, **more)
        self.used = True

    def run(self, key, work):
        type(self).keys.append(key)
        work()


@pytest.fixture
def taken(monkeypatch):
    """What was done step by step, where the kernels are taken."""
    monkeypatch.setattr(trial, "verdicts", {})
    monkeypatch.setattr(sys.modules["gpt2cli.rows"], "_fused", fused.Fused)
    monkeypatch.setattr(sys.modules["gpt2cli.rows"], "Graphs", Unrecorded)
    monkeypatch.setattr(Unrecorded, "keys", [], raising=False)
    return Unrecorded.keys


PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 5], [8, 9, 7, 9]]


def test_rows_are_continued_as_by_the_model(taken, monkeypatch):
    model, config = make_model(n_layer=1).to(DEVICE), SamplingConfig(max_new_tokens=6, seed=3, repetition_penalty=1.3)

    def continued():
        count = [0] * 5  # tokens of each prompt

        def stop(prompt, token):
            count[prompt] += 1
            return prompt in (0, 2, 3) and count[prompt] == 3

        return [ids for ids, _, _ in continuations(model, PROMPTS, config, rows=5, stop=stop)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = continued()
    steps = [key for key in taken if key[0] != "choose"]
    assert steps == [("fused step", 5)] * 2 + [("fused step", 2)]  # beside the first of each size, where they are tried
    monkeypatch.setattr(sys.modules["gpt2cli.rows"], "_fused", lambda model, cache: None)
    assert found == continued()


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_kernels_that_do_not_work_are_told_and_not_taken(taken, fault, monkeypatch):
    model, config = make_model().to(DEVICE), SamplingConfig(max_new_tokens=4, greedy=True)
    expected = continuations(model, PROMPTS[:1], config, logprobs=True)[0]
    trial.verdicts.clear()
    plain = fused.Fused._linear

    def faulty(self, x, layer, out, norm=None, activation="", add=False):
        if fault == "broken" and len(layer.weight) == model.config.vocab_size:  # at the end of a step
            raise RuntimeError("no ptxas\nat all")
        return plain(self, x, layer, out, norm, activation)

    monkeypatch.setattr(fused.Fused, "_linear", faulty)
    with pytest.warns(UserWarning, match="RuntimeError: no ptxas$" if fault == "broken" else "deviations off the model's"):
        ids, logprobs, _ = continuations(model, PROMPTS[:1], config, logprobs=True)[0]
    assert ids == expected[0] and logprobs == pytest.approx(expected[1], abs=1e-5)  # nothing of theirs is left
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        assert continuations(model, PROMPTS[:1], config)[0][0] == ids
        for length in (3, 20, 28):
            continuations(model, [[1] * length], config)
    assert len(trial.verdicts) == 2  # and found once: this one, and that of drawing


def test_memory_that_ends_says_nothing_about_kernels():
    def fault():
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        trial.passed("kind", fault, "decoding")
    assert "kind" not in trial.verdicts and trial.passed("kind", lambda: None, "decoding")


def made():
    """How many kernels are compiled."""
    kernels = [fused._embed, fused._linear, fused._attend, drawing._best, drawing._weigh, drawing._ask, drawing._draw]
    return sum(len(held[0]) for kernel in kernels for held in getattr(kernel, "device_caches", {}).values())


def test_compiling_is_not_launching():
    model = make_model(n_head=3, n_embd=30, vocab_size=50).to(DEVICE)  # of sizes that no other test has
    cache = KVCache(model.config, 1, 40, model.wpe.weight)
    step, at_first = fused.Fused(model, cache), made()
    logits, uniform = torch.full((1, 64), 7.0, device=DEVICE), torch.zeros(1, device=DEVICE)
    ids = torch.ones(1, dtype=torch.int64, device=DEVICE)
    drawn = ids.clone()

    def work():
        step.step(ids, logits)
        drawing.draw(logits[:, :50], SamplingConfig(top_p=0.9), uniform, drawn)

    kernels.compile_all(work)
    compiled = made()
    assert (compiled > at_first) == (DEVICE == "cuda")
    assert (logits == 7).all() and not cache.k.any() and cache.at.item() == 0 and drawn.item() == 1
    work()
    assert made() == compiled  # and is not done again
    assert (logits != 7).any() and cache.k.any() and cache.at.item() == 1
    with pytest.raises(ZeroDivisionError):
        kernels.compile_all(lambda: 1 / 0)
    work()
    assert cache.at.item() == 2  # what fails leaves all as it was


def test_kernels_are_loaded_where_they_are_launched(monkeypatch):
    """On the device of their tensors, which is the current one only while they are launched."""
    current, loaded = [0], []

    class Device:
        def __init__(self, index):
            self.index, self.before = index, None

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    class Kernel:
        def run(self, grid, warmup):
            return Made()

    class Made:
        @property
        def run(self):
            loaded.append(current[0])

    def work():
        with torch.cuda.device(1):
            kernels.launch(Kernel(), (1,))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernels.compile_all(work)
    assert loaded == [1]


def test_all_steps_are_made_alike(taken):
    """The first, in which the kernels are tried, too: the logits are theirs in every one."""
    model, config = make_model(n_layer=1).to(DEVICE, torch.bfloat16), SamplingConfig(max_new_tokens=4, greedy=True)
    first, second = (continuations(model, PROMPTS[:1], config, logprobs=True) for _ in range(2))
    assert first == second and taken.count(("fused step", 1)) == 2 + 3


@pytest.fixture
def fused_loss(monkeypatch):
    """As where it is used, with several looks at a row and more rows than there are programs."""
    from gpt2cli import fused_loss

    monkeypatch.setattr(fused_loss, "BLOCK", 32)
    monkeypatch.setattr("gpt2cli.loss.has_kernel", lambda device, dtype: True)
    monkeypatch.setattr("gpt2cli.loss.rows_at_once", lambda device_type, dtype: 10)  # of 25
    return fused_loss


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_the_kernel_of_the_loss_makes_probabilities_and_gradients(fused_loss, dtype, close):
    torch.manual_seed(0)
    logits, ids = (5 * torch.randn(9, 97, device=DEVICE)).to(dtype), torch.randint(97, (9,), device=DEVICE)
    logits[:, 90:], ids[0], ids[1] = -torch.inf, 0, 89
    counted = torch.arange(9, device=DEVICE) != 4
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, ids.clamp(max=89), reduction="none") * counted
    expected.sum().backward()
    without = fused_loss.into_gradient(logits.clone(), ids.clamp(max=89), counted, need_grad=False)
    found = fused_loss.into_gradient(logits, ids.clamp(max=89), counted, need_grad=True)
    assert torch.equal(without, found) and torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(logits.double(), exact.grad, atol=close) and not logits[4].any() and not logits[:, 90:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_of_the_loss_passes_its_trial_and_another_does_not(dtype):
    from gpt2cli import fused_loss
    from gpt2cli.loss import fault

    def wrong(logits, ids, counted, need_grad):
        losses = fused_loss.into_gradient(logits, ids, counted, need_grad)
        logits[1, 1] += 0.1
        return losses

    assert fault(fused_loss.into_gradient, torch.device(DEVICE), dtype) is None
    assert "is another than torch's" in fault(wrong, torch.device(DEVICE), dtype)
    assert "is another than torch's" in fault(lambda logits, *more: torch.zeros(5, device=DEVICE), torch.device(DEVICE), dtype)


def test_the_fused_loss_by_its_kernel_is_the_plain_one(fused_loss):
    torch.manual_seed(0)
    x = torch.randn(25, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(97, 16, device=DEVICE, requires_grad=True)
    targets = torch.randint(97, (25,), device=DEVICE)
    targets[[3, 17]] = -100
    results = []
    for loss in (linear_cross_entropy, lambda x, w, t: torch.nn.functional.cross_entropy(x @ w.T, t)):
        x.grad = weight.grad = None
        value = loss(x, weight, targets)
        value.backward()
        results.append((value.detach(), x.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


COMPILE = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from gpt2cli import drawing, fused, fused_loss

    def compiled(kernel, arguments, capability=90, **options):
        # arguments: a type, or the value of what is known then
        types = [isinstance(value, str) and (value[:1] == "*" or value in ("i32", "fp32")) for value in arguments]
        known = {(n,): value for n, value in enumerate(arguments) if not types[n]}
        signature = {name: "constexpr" if (n,) in known else arguments[n] for n, name in enumerate(kernel.arg_names)}
        source = ASTSource(fn=kernel, signature=signature, constexprs=known)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": 8, **options}).asm["cubin"]

    b, f = "*bf16", "*fp32"
    ln, none = [b, b, "fp32"], [None, None, 0.0]
    sizes = [8, 1024, False]
    for early, capability in ((True, 90), (False, 80)):
        made = lambda kernel, arguments: compiled(kernel, [*arguments, early], capability, launch_pdl=early)
        assert made(fused._embed, ["*i64", "*i64", b, b, f, 768, 1024])
        for activation in ("gelu_new", "gelu", "silu", "relu"):
            assert made(fused._linear, [f, b, None, b, *ln, b, "i32", "i32", 768, 1, activation, False, *sizes])
        assert made(fused._linear, [f, f, None, f, f, f, "fp32", f, "i32", "i32", 768, 1, "", False, *sizes])
        assert made(fused._linear, [b, "*i8", b, None, *none, f, "i32", "i32", 768, 3, "", True, 2, 1024, True])
        for y in (b, None):
            assert made(fused._norm, [f, y, *ln, b, 768, 1024])
        for kind in (f, b):
            assert made(fused._attend, [kind, kind, kind, "*i64", kind, "fp32", "i32", "i32", 64, 64, 128])
    i = "*i32"
    for part, asked, parts in ((1024, 32, 64), (4096, 8, 16)):
        for first in ((None, None, None), (f, f, i)):
            for floor in (None, f):
                asking = [f, floor, *first, "i32", "fp32", "i32", f, i, "i32", first[0] is None, asked, parts, part]
                assert compiled(drawing._ask, asking)
        assert compiled(drawing._answer, [f, f, i, "i32", "fp32", None, f, "i32", False, asked, parts])
        assert compiled(drawing._weigh, [b, "i32", f, f, "i32", "fp32", "i32", parts, part])
        for least in (None, f):
            assert compiled(drawing._keep, [f, least, "fp32", f, "i32", part])
            assert compiled(drawing._draw, [f, least, "fp32", f, f, "*i64", "i32", parts, part])
    for grad in (True, False):
        assert compiled(fused_loss._into_gradient, [b, "*i64", "*i1", f, "i32", "i32", grad, 8192])
    assert compiled(drawing._best, [b, "i32", "i32", f, i, "i32", 1024])
    assert compiled(drawing._best_of, [f, i, "i32", "i32", "*i64", 64])
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(COMPILE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
