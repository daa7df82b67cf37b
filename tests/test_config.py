from dataclasses import asdict

import pytest
import torch

from gpt2cli.config import PRESETS, GPTConfig, SamplingConfig, TrainConfig, from_dict
from gpt2cli.errors import UserError
from gpt2cli.model import GPT


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": -1}, "n_head"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"block_size": "1024"}, "block_size"),
        ({"n_layer": True}, "n_layer"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation_function": "mish"}, "activation_function"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        GPTConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"batch_size": 0}, {"val_fraction": 1.0}, {"dtype": "fp8"},
     {"steps": 1, "epochs": 1.0}, {"log_every": -1}, {"grad_clip": 0.0}],
)  # fmt: skip
def test_training_that_cannot_be_meant_is_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        TrainConfig(**fields)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_p": 1.5}, {"top_k": 0}, {"max_new_tokens": 0}])
def test_sampling_that_cannot_be_meant_is_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields)).replace("_", "-")):
        SamplingConfig(**fields)


def test_a_config_survives_json_and_an_unknown_field_is_named():
    config = GPTConfig(n_layer=3, n_inner=7)
    assert from_dict(GPTConfig, asdict(config), "here") == config
    with pytest.raises(UserError, match="here: unknown setting 'layers'"):
        from_dict(GPTConfig, {"layers": 3}, "here")


@pytest.mark.parametrize(
    "preset, parameters",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameter_counts_are_gpt2s(preset, parameters):
    config = GPTConfig(**PRESETS[preset])
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters() == parameters


def test_parameter_count_of_odd_shapes_is_the_models():
    config = GPTConfig(n_layer=3, n_head=5, n_embd=80, vocab_size=311, block_size=17, n_inner=99, tie_word_embeddings=False)
    assert sum(p.numel() for p in GPT(config).parameters()) == config.num_parameters()


def test_flops_of_a_124m_token_are_those_of_nanogpts_formula():
    assert GPTConfig(**PRESETS["gpt2"]).flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
