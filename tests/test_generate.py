import sys

import pytest
import torch

from gpt2cli import GPT
from gpt2cli.ahead import Graphs, Readback, put
from gpt2cli.config import SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.generate import continue_all, generate
from gpt2cli.linear import Int8Linear, PackedLinear, prepare
from gpt2cli.sampling import choose, nucleus, nucleus_by_sorting, penalize

from .conftest import make_model
from .records import HereToo

GREEDY = SamplingConfig(greedy=True, max_new_tokens=100)
PROMPT = [5, 3, 8]


def by_full_forward(model, ids, count):
    """The slow oracle: every token from a forward pass over the last block_size ids."""
    ids = list(ids)
    for _ in range(count):
        logits, _ = model(torch.tensor([ids[-model.config.block_size :]]))
        ids.append(int(logits[0, -1].argmax()))
    return ids


def first_row(rows):
    return [row[0] for row in rows]


def continuations(model, prompts, config, **options):
    """Ids, log probabilities and reason of each prompt."""
    found = [([], [], []) for _ in prompts]
    for step in continue_all(model, prompts, config, **options):
        for chosen in step:
            ids, logprobs, reasons = found[chosen.prompt]
            ids += [chosen.token] if chosen.token is not None else []
            logprobs += [chosen.logprob] if chosen.logprob is not None else []
            reasons += [chosen.finish_reason] if chosen.finish_reason else []
    assert all(len(reasons) == 1 for _, _, reasons in found)
    return [(ids, logprobs, reasons[0]) for ids, logprobs, reasons in found]


@pytest.fixture(params=["numba's kernels", "torch alone", "ahead, from records"])
def all_ways(request, monkeypatch):
    """As on a CPU, with numba and without, and as on a GPU."""
    if request.param == "torch alone":
        monkeypatch.setattr(sys.modules["gpt2cli.linear"], "few_rows", lambda rows, int8: False)
    elif request.param == "numba's kernels":
        pytest.importorskip("numba", reason="numba is not installed: pip install numba")
    else:
        monkeypatch.setattr(sys.modules["gpt2cli.rows"], "Graphs", HereToo)
        monkeypatch.setattr(sys.modules["gpt2cli.sampling"], "nucleus", nucleus_by_sorting)


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.usefixtures("all_ways")
@pytest.mark.parametrize("shape", [{}, {"n_head": 5, "n_embd": 80, "block_size": 17, "n_layer": 3}, {"block_size": 4}])
def test_greedy_with_a_cache_is_greedy_by_full_forward(shape):
    model = make_model(**shape)
    new = first_row(generate(model, PROMPT, GREEDY))
    assert len(new) == model.config.block_size - len(PROMPT) + 1  # the last one needs no position
    assert PROMPT + new == by_full_forward(model, PROMPT, len(new))


@pytest.mark.usefixtures("all_ways")
def test_sliding_sees_exactly_the_last_block_size_tokens():
    model = make_model(block_size=9)
    slide = SamplingConfig(greedy=True, max_new_tokens=40, overflow="slide")
    assert PROMPT + first_row(generate(model, PROMPT, slide)) == by_full_forward(model, PROMPT, 40)
    long = [n % 97 for n in range(30)]
    assert long + first_row(generate(model, long, slide)) == by_full_forward(model, long, 40)


def test_greedy_is_transformers_greedy(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=25, do_sample=False, pad_token_id=0)[0].tolist()
    assert PROMPT + first_row(generate(model, PROMPT, SamplingConfig(greedy=True, max_new_tokens=25))) == expected


@pytest.mark.usefixtures("all_ways")
def test_a_sample_does_not_depend_on_its_neighbours():
    model = make_model()
    config = SamplingConfig(max_new_tokens=20, seed=11)
    together = list(zip(*generate(model, PROMPT, config, num_samples=3), strict=True))
    assert together[0] == tuple(first_row(generate(model, PROMPT, config)))
    assert together[2] == tuple(first_row(generate(model, PROMPT, SamplingConfig(max_new_tokens=20, seed=13))))
    assert len(set(together)) == 3


@pytest.mark.usefixtures("all_ways")
def test_top_k_of_one_is_greedy_and_ids_beyond_the_tokenizers_are_never_chosen():
    model = make_model()
    one = SamplingConfig(max_new_tokens=20, top_k=1)
    assert first_row(generate(model, PROMPT, one)) == first_row(
        generate(model, PROMPT, SamplingConfig(greedy=True, max_new_tokens=20))
    )
    wild = SamplingConfig(max_new_tokens=29, temperature=50.0, top_p=None)
    assert max(first_row(generate(model, PROMPT, wild, n_vocab=10))) < 10


@pytest.mark.usefixtures("all_ways")
def test_a_row_ends_at_the_end_of_text_and_the_others_go_on():
    model = make_model()
    config = SamplingConfig(max_new_tokens=20)
    free = list(generate(model, PROMPT, config, num_samples=3))
    eot = free[4][1]
    rows = list(generate(model, PROMPT, config, num_samples=3, eot=eot))
    for n, column in enumerate(zip(*free, strict=True)):
        length = column.index(eot) if eot in column else len(column)
        assert [row[n] for row in rows] == [*column[:length], *[None] * (len(rows) - length)]
    assert list(generate(model, PROMPT, SamplingConfig(greedy=True), eot=first_row(generate(model, PROMPT, GREEDY))[0])) == []


MANY = [[5, 3, 8], [1], [9, 9, 2, 4, 4, 1, 7], [3, 3], list(range(20)), [5, 3, 8], [60, 61]]


@pytest.mark.usefixtures("all_ways")
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 4}, {"seed": 4, "repetition_penalty": 1.4, "top_k": 9}])
def test_a_prompt_in_a_batch_is_the_prompt_alone_whatever_its_neighbours_lengths(rows, options):
    model = make_model()
    config = SamplingConfig(max_new_tokens=9, **options)
    together = continuations(model, MANY, config, rows=rows, logprobs=True)
    for n, prompt in enumerate(MANY):
        alone = SamplingConfig(max_new_tokens=9, **options | {"seed": config.seed + n})
        ((ids, logprobs, reason),) = continuations(model, [prompt], alone, logprobs=True)
        assert (together[n][0], together[n][2]) == (ids, reason)
        assert together[n][1] == pytest.approx(logprobs, abs=1e-4)


def test_prompts_enter_together_and_the_same_one_only_once(monkeypatch):
    model, seen = make_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *cache: (seen.append(tuple(ids.shape)), hidden(ids, *cache))[1])
    config = SamplingConfig(greedy=True, max_new_tokens=1)
    expected = continuations(model, MANY, config, rows=1)
    assert seen == [(1, len(prompt)) for prompt in MANY]
    for most, shapes in ((2048, [(6, 20)]), (14, [(4, 3), (1, 7), (1, 20)])):
        monkeypatch.setattr(sys.modules["gpt2cli.rows"], "PROMPT_TOKENS", most)
        seen.clear()
        assert continuations(model, MANY, config) == expected and seen == shapes


@pytest.mark.usefixtures("all_ways")
@pytest.mark.parametrize("rows, most", [(2, 2048), (4, 2048), (4, 18), (4, 1)])
def test_rows_that_slide_and_rows_that_do_not_share_a_batch(rows, most, monkeypatch):
    monkeypatch.setattr(sys.modules["gpt2cli.rows"], "PROMPT_TOKENS", most)
    model = make_model(block_size=9)
    prompts = [[n % 97 for n in range(30)], [1, 2], [4] * 8, [7]]
    slide = SamplingConfig(greedy=True, max_new_tokens=14, overflow="slide")
    for prompt, (ids, _, reason) in zip(prompts, continuations(model, prompts, slide, rows=rows), strict=True):
        assert prompt + ids == by_full_forward(model, prompt, 14) and reason == "length"
    ends = [reason for _, _, reason in continuations(model, prompts[1:], SamplingConfig(greedy=True, max_new_tokens=4))]
    assert ends == ["length", "context", "length"]


@pytest.mark.usefixtures("all_ways")
def test_a_row_that_filled_its_context_leaves_the_others_alone():
    model, prompts = make_model(block_size=8), [[2], [3, 4], [1] * 7]
    found = continuations(model, prompts, SamplingConfig(greedy=True, max_new_tokens=6))
    assert [reason for _, _, reason in found] == ["length", "length", "context"]
    for prompt, (ids, _, _) in zip(prompts, found, strict=True):
        assert prompt + ids == by_full_forward(model, prompt, len(ids))


@pytest.mark.usefixtures("all_ways")
def test_log_probabilities_are_the_models_own():
    model = make_model()
    config = SamplingConfig(max_new_tokens=6, temperature=2.0, top_k=5, repetition_penalty=1.5)
    ((ids, logprobs, _),) = continuations(model, [PROMPT], config, logprobs=True)
    logits = model(torch.tensor([PROMPT + ids]))[0][0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.usefixtures("all_ways")
def test_a_caller_can_end_a_prompt():
    model = make_model()
    config = SamplingConfig(greedy=True, max_new_tokens=20)
    free = continuations(model, MANY[:3], config)
    stopped = continuations(model, MANY[:3], config, stop=lambda prompt, token: prompt == 1 and token == free[1][0][2])
    at = free[1][0].index(free[1][0][2])
    assert stopped[1] == (free[1][0][: at + 1], [], "stop") and stopped[0] == free[0] and stopped[2] == free[2]


@pytest.mark.usefixtures("all_ways")
def test_a_row_that_moves_in_the_batch_keeps_what_it_has_seen():
    model = make_model()
    config = SamplingConfig(greedy=True, max_new_tokens=9, repetition_penalty=2.0)
    together = continuations(model, MANY, config, rows=3, stop=lambda prompt, token: prompt == 0)  # the last takes its place
    assert len(together[0][0]) == 1
    for prompt, (ids, _, _) in list(zip(MANY, together, strict=True))[1:]:
        assert continuations(model, [prompt], config)[0][0] == ids


class Counted(HereToo):
    """Counts what is done step by step, recorded, and replayed."""

    def __init__(self, device, kind=None):
        super().__init__(device, kind)
        self.counts, self.records = {}, 0
        type(self).latest = self

    def _record(self, work):
        self.records += 1
        return super()._record(work)

    def run(self, key, work):
        self.counts[key] = self.counts.get(key, 0) + 1
        super().run(key, work)


def test_few_graphs_are_made_and_they_are_used(monkeypatch):
    monkeypatch.setattr(sys.modules["gpt2cli.rows"], "Graphs", Counted)
    config = SamplingConfig(greedy=True, max_new_tokens=25)
    list(generate(make_model(), PROMPT, config))
    assert Counted.latest.counts == {("choose", 1): 25, ("step", 1, 32): 24}  # after the last token no step is wanted
    assert Counted.latest.records == 2
    continuations(make_model(), MANY, config, rows=5, stop=lambda prompt, token: prompt < 4)  # three are left, two end
    assert {key[1] for key in Counted.latest.counts} == {5, 2}
    many = make_model(block_size=300)
    list(generate(many, PROMPT, SamplingConfig(greedy=True, max_new_tokens=290), num_samples=9))
    reaches = [key[2] for key in Counted.latest.counts if key[0] == "step"]
    assert reaches == [128, 256, 296]  # of many rows no more is read than there is


def test_where_recording_fails_decoding_goes_on_without(monkeypatch):
    """Here it fails since top-p, on a CPU, looks at what it has found."""
    model, config = make_model(), SamplingConfig(max_new_tokens=20, seed=3)
    expected = first_row(generate(model, PROMPT, config))
    monkeypatch.setattr(sys.modules["gpt2cli.rows"], "Graphs", HereToo)
    monkeypatch.setattr(Graphs, "failed", False)
    with pytest.warns(UserWarning, match="CUDA graphs do not work here, so decoding is slower: operation not permitted"):
        assert first_row(generate(model, PROMPT, config)) == expected
    assert Graphs.failed


def test_numbers_go_to_a_device_and_come_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", None)  # not asked for without CUDA, where it looks for another accelerator
    there = torch.zeros(3, dtype=torch.int64)
    put(there, [4, 5])
    back = Readback(there, there.float())
    back.start()
    there.zero_()
    assert back.lists() == [[4, 5, 0], [4.0, 5.0, 0.0]]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 4, "repetition_penalty": 1.4, "min_p": 0.01}])
def test_on_cuda_graphs_decode_what_a_cpu_does(options, recwarn):
    """In fp32, where the two best logits of a random model are hardly ever as near as rounding."""
    config = SamplingConfig(max_new_tokens=9, **options)
    expected = continuations(make_model(), MANY, config, rows=3, logprobs=True)
    found = continuations(make_model().cuda(), MANY, config, rows=3, logprobs=True)
    assert not [warning for warning in recwarn if "decoding is slower" in str(warning.message)]
    assert [(ids, reason) for ids, _, reason in found] == [(ids, reason) for ids, _, reason in expected]
    for (_, ours, _), (_, theirs, _) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-2)  # TF32


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_on_cuda_graphs_in_bf16_decode_what_single_kernels_do(rows, monkeypatch):
    model, config = make_model().cuda().bfloat16(), SamplingConfig(max_new_tokens=9, seed=2)
    found = continuations(model, MANY, config, rows=rows, logprobs=True)
    monkeypatch.setattr(Graphs, "failed", True)  # in the same shapes, so that they round alike
    monkeypatch.setattr(Graphs, "run", lambda self, key, work: work())
    monkeypatch.setattr(Graphs, "used", property(lambda self: True, lambda self, value: None), raising=False)
    assert continuations(model, MANY, config, rows=rows, logprobs=True) == found


@pytest.mark.gpu
@cuda
def test_on_cuda_a_look_while_recording_leaves_all_as_it_was(monkeypatch):
    monkeypatch.setattr(Graphs, "failed", False)
    graphs, numbers, stream = Graphs(torch.device("cuda")), torch.zeros(3, device="cuda"), torch.cuda.current_stream()
    graphs.run("look", lambda: numbers.add_(numbers[0].item() + 1))
    with pytest.warns(UserWarning, match="CUDA graphs do not work here"):
        graphs.run("look", lambda: numbers.add_(numbers[0].item() + 1))
    assert not graphs.used and torch.cuda.current_stream() == stream
    assert numbers.tolist() == [3, 3, 3] and torch.randn(1 << 20, device="cuda").isfinite().all()


def test_the_repetition_penalty_is_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

    seen = torch.tensor([[1, 5, 5], [0, 2, 7]])
    logits = torch.randn(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool).scatter(1, seen, True)
    assert torch.equal(penalize(logits, mask, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.clone()))
    model = make_model()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.3}
    expected = theirs.generate(torch.tensor([PROMPT]), **settings)[0].tolist()
    config = SamplingConfig(greedy=True, max_new_tokens=25, repetition_penalty=1.3)
    assert PROMPT + first_row(generate(model, PROMPT, config)) == expected != by_full_forward(model, PROMPT, 25)


# ==== the linear layers of decoding ====


@needs_onednn
@pytest.mark.parametrize("shape", [{}, {"n_head": 5, "n_embd": 80, "vocab_size": 311}, {"tie_word_embeddings": False}])
def test_packed_layers_compute_what_the_model_computes(shape):
    model, packed = make_model(**shape), prepare(make_model(**shape), rows=5)
    kinds = [type(module) for module in packed.modules()]
    assert kinds.count(PackedLinear) == 8 and isinstance(vars(packed)["head"], PackedLinear)
    for T in (1, 3, 32):
        x = torch.arange(T)[None]
        assert (packed(x)[0] - model(x)[0]).abs().max() < 1e-4
    assert first_row(generate(packed, PROMPT, GREEDY)) == first_row(generate(model, PROMPT, GREEDY))


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_int8_weights_are_the_weights_to_half_a_step_and_rows_do_not_see_each_other(rows):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(rows, 64)
    weight[7] *= 1000
    layer = Int8Linear(weight, bias)
    kept = layer.weight * layer.scale.float()[:, None]
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((kept - weight).abs() <= 0.51 * step + 0.005 * weight.abs().amax(dim=1, keepdim=True)).all()
    expected = x @ kept.t() + bias
    assert ((layer(x) - expected).abs() <= 0.01 * (x.abs() @ kept.abs().t() + bias.abs())).all()
    if rows > 64:  # in fp32
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-3)
    else:
        assert torch.equal(layer(x)[:1], layer(x[:1]))


@needs_onednn
def test_many_rows_of_int8_are_multiplied_in_fp32_by_what_int8_stands_for():
    few, many, plain = prepare(make_model(), "int8", rows=8), prepare(make_model(), "int8", rows=9), make_model()
    vars(plain)["head"] = torch.nn.Linear(32, 97, bias=False)
    layers = {name: layer for name, layer in few.named_modules() if isinstance(layer, Int8Linear)}
    pairs = [(layer, plain.get_submodule(name)) for name, layer in layers.items()]
    for layer, own in [*pairs, (vars(few)["head"], vars(plain)["head"])]:
        own.weight = torch.nn.Parameter(layer.weight * layer.scale.float()[:, None])
    assert len(pairs) == 8 and isinstance(vars(many)["head"], PackedLinear)
    ids = torch.arange(32)[None]
    with torch.inference_mode():
        assert (many(ids)[0] - plain(ids)[0]).abs().max() < 1e-5 < (many(ids)[0] - make_model()(ids)[0]).abs().max()


def test_a_model_whose_parts_are_compiled_generates_without_the_compiler():
    model = make_model()
    expected = first_row(generate(model, PROMPT, GREEDY))
    model.h[0]._compiled_call_impl = call = lambda *_: 1 / 0
    assert first_row(generate(model, PROMPT, GREEDY)) == expected
    assert model.h[0]._compiled_call_impl is call


def test_a_model_that_is_at_training_generates_without_dropout_and_is_at_training_again(tmp_path):
    model = make_model(dropout=0.5, attn_dropout=0.5)
    expected = first_row(generate(model, PROMPT, GREEDY))
    model.train().h[0].eval()
    before = [module.training for module in model.modules()]
    new = generate(model, PROMPT, GREEDY)
    assert [next(new), *new] == [[token] for token in expected]
    assert [module.training for module in model.modules()] == before
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config.dropout == 0.5 and not any(module.training for module in loaded.modules())


def test_a_model_with_int8_weights_is_nearly_the_model():
    model, small = make_model(), prepare(make_model(), "int8")
    x = torch.arange(32)[None]
    a, b = model(x)[0].log_softmax(-1), small(x)[0].log_softmax(-1)
    divergence = (a.exp() * (a - b)).sum(-1).mean()
    assert 0 < divergence < 1e-3
    assert len(first_row(generate(small, PROMPT, GREEDY))) == 30
    with pytest.raises(UserError, match="int4 is unknown"):
        prepare(make_model(), "int4")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"min_p": 0.2},
        {"top_p": 0.9, "min_p": 0.1},
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_k": 5, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("keep", [nucleus, nucleus_by_sorting])
def test_the_distribution_is_the_one_promised(options, keep, monkeypatch):
    """Chi-square of 40,000 draws against transformers' own processors, at p = 0.001."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    config = SamplingConfig(**{"temperature": 1.0, "top_p": None} | options)
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.3, 3.0, 1.1, -3.0, 0.0]])
    expected = TemperatureLogitsWarper(config.temperature)(None, logits)
    if config.top_k:
        expected = TopKLogitsWarper(config.top_k)(None, expected)
    if config.top_p:
        expected = TopPLogitsWarper(config.top_p)(None, expected)
    if config.min_p:
        expected = MinPLogitsWarper(config.min_p)(None, expected)
    p = expected.softmax(dim=-1)[0].double()
    monkeypatch.setattr(sys.modules["gpt2cli.sampling"], "nucleus", keep)
    n = 40_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    drawn = [choose(logits.expand(len(some), -1), config, some) for some in uniform.split(1000)]
    counts = torch.bincount(torch.cat(drawn), minlength=8).double()
    assert not counts[p == 0].any()
    chi2 = ((counts - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum()
    assert chi2 < {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}[int((p > 0).sum()) - 1]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 0.999])
def test_a_nucleus_is_that_found_by_sorting(top_p):
    """Of peaked and flat rows, and of one where all are exactly as likely, so that any will do. Rounding may move its end."""
    torch.manual_seed(0)
    scales = torch.tensor([[0.0], [0.001], [0.5], [4.0], [30.0], [1000.0]])
    probabilities = (scales * torch.randn(6, 5003)).softmax(dim=1)
    found, expected = nucleus(probabilities, top_p), nucleus_by_sorting(probabilities, top_p)
    assert ((found == 0) | (found == probabilities)).all()
    assert ((found > 0).sum(dim=1) - (expected > 0).sum(dim=1)).abs().max() <= 1
    assert (found[1:] != expected[1:]).sum(dim=1).max() <= 1


@pytest.mark.parametrize("options", [{"top_p": None}, {"top_p": 0.9}, {"top_k": 2}, {"top_p": None, "min_p": 0.5}])
def test_ids_are_drawn_in_their_order_and_none_that_is_not_kept(options):
    """A number that rounding takes up to the whole, and NaN, draw one, too."""
    logits = torch.tensor([[-200.0, 2.0, 0.0, 3.0, -200.0, -200.0]]).expand(2, -1)
    config = SamplingConfig(**options)
    first, last = choose(logits, config, torch.tensor([0.0, 1 - 2**-24])).tolist()
    assert first == {None: 1, 0.5: 3}[options.get("min_p")] and last == 3
    assert 0 <= int(choose(torch.full((1, 6), torch.nan), config, torch.tensor([0.5]))) < 6


@pytest.mark.parametrize(
    "prompt, says", [([], "empty"), ([97], "97"), ([-1], "-1"), ([0] * 33, "33 tokens, but the model sees 32")]
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompt, says):
    with pytest.raises(UserError, match=says):
        next(generate(make_model(), prompt))
    with pytest.raises(UserError, match=says.replace("33", "prompt 2 has 33")):
        next(continue_all(make_model(), [PROMPT, prompt]))


def test_a_prompt_can_be_a_tensor_of_one_row():
    model, config = make_model(), SamplingConfig(max_new_tokens=4)
    assert list(generate(model, torch.tensor([1, 2, 3]), config)) == list(generate(model, [1, 2, 3], config))
    with pytest.raises(UserError, match=r"shape \(1, 3\); expected one row"):
        next(generate(model, torch.tensor([[1, 2, 3]]), config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_layers_keep_the_type_of_what_they_are_given(dtype):
    model = prepare(make_model(n_embd=64).to(dtype), "int8")
    assert model.hidden(torch.tensor([[1, 2, 3]])).dtype == dtype


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_prepared_model_is_not_trained(quantize):
    x = torch.arange(8)[None]
    with pytest.raises(RuntimeError, match="does not require grad"):
        prepare(make_model(), quantize).train()(x, x)[1].backward()


def test_a_prepared_model_is_not_saved_as_if_it_were_one(tmp_path):
    with pytest.raises(UserError, match="prepared for generating"):
        prepare(make_model(), "int8").save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("all_ways")
def test_what_would_reach_the_end_of_the_context_can_be_refused():
    config = SamplingConfig(max_new_tokens=30, overflow="error")
    with pytest.raises(UserError, match="30 more do not fit the context of 32"):
        next(generate(make_model(), PROMPT, config))
    assert len(list(generate(make_model(), PROMPT[:2], config))) == 30
