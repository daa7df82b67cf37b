import sys

import pytest
import torch

from gpt2cli.config import SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.generate import choose, generate

from .conftest import make_model

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


@pytest.mark.parametrize("shape", [{}, {"n_head": 5, "n_embd": 80, "block_size": 17, "n_layer": 3}, {"block_size": 4}])
def test_greedy_with_a_cache_is_greedy_by_full_forward(shape):
    model = make_model(**shape)
    new = first_row(generate(model, PROMPT, GREEDY))
    assert len(new) == model.config.block_size - len(PROMPT) + 1  # the last one needs no position
    assert PROMPT + new == by_full_forward(model, PROMPT, len(new))


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


def test_a_sample_does_not_depend_on_its_neighbours():
    model = make_model()
    config = SamplingConfig(max_new_tokens=20, seed=11)
    together = list(zip(*generate(model, PROMPT, config, num_samples=3), strict=True))
    assert together[0] == tuple(first_row(generate(model, PROMPT, config)))
    assert together[2] == tuple(first_row(generate(model, PROMPT, SamplingConfig(max_new_tokens=20, seed=13))))
    assert len(set(together)) == 3


def test_top_k_of_one_is_greedy_and_ids_beyond_the_tokenizers_are_never_chosen():
    model = make_model()
    one = SamplingConfig(max_new_tokens=20, top_k=1)
    assert first_row(generate(model, PROMPT, one)) == first_row(
        generate(model, PROMPT, SamplingConfig(greedy=True, max_new_tokens=20))
    )
    wild = SamplingConfig(max_new_tokens=29, temperature=50.0, top_p=None)
    assert max(first_row(generate(model, PROMPT, wild, n_vocab=10))) < 10


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


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8}])
@pytest.mark.parametrize("likeliest", [1, 3, 1024])
def test_the_distribution_is_the_one_promised(options, likeliest, monkeypatch):
    """Chi-square of 100,000 draws against transformers' own processors, at p = 0.001."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    config = SamplingConfig(**{"temperature": 1.0, "top_p": None} | options)
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.3, 3.0, 1.1, -3.0, 0.0]])
    expected = TemperatureLogitsWarper(config.temperature)(None, logits)
    if config.top_k:
        expected = TopKLogitsWarper(config.top_k)(None, expected)
    if config.top_p:
        expected = TopPLogitsWarper(config.top_p)(None, expected)
    p = expected.softmax(dim=-1)[0].double()
    monkeypatch.setattr(sys.modules["gpt2cli.generate"], "LIKELIEST", likeliest)
    n = 100_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(choose(logits.expand(n, -1), config, uniform), minlength=8).double()
    assert not counts[p == 0].any()
    chi2 = ((counts - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum()
    assert chi2 < {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}[int((p > 0).sum()) - 1]


@pytest.mark.parametrize(
    "prompt, says", [([], "empty"), ([97], "97"), ([-1], "-1"), ([0] * 33, "33 tokens, but the model sees 32")]
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompt, says):
    with pytest.raises(UserError, match=says):
        next(generate(make_model(), prompt))
