"""Faster products against torch's own, in float64."""

import mmap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt2cli import memory, product
from gpt2cli.product import Linear, onednn, suits_onednn

needs_onednn = pytest.mark.skipif(not product.has_onednn(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 7), (1, 1, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_by_onednn_is_torchs_in_value_and_gradients(monkeypatch, shape, bias):
    monkeypatch.setattr(product, "LARGE", 0)
    torch.manual_seed(0)
    layer, exact = Linear(7, 11, bias=bias), nn.Linear(7, 11, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    assert suits_onednn(x, layer.weight)
    y, expected = layer(x), exact(exact_x)
    grad = torch.randn(expected.shape)
    y.backward(grad)
    expected.backward(grad.double())
    found = [y, x.grad, *(p.grad for p in layer.parameters())]
    for ours, theirs in zip(found, [expected, exact_x.grad, *(p.grad for p in exact.parameters())], strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours.double(), theirs, atol=1e-5)


@needs_onednn
def test_gradients_that_nobody_needs_are_not_computed(monkeypatch):
    monkeypatch.setattr(product, "LARGE", 0)
    layer, x = Linear(7, 11).requires_grad_(False), torch.randn(3, 7, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None


@needs_onednn
def test_onednn_takes_transposed_weights():
    x, weight = torch.randn(3, 11), torch.randn(11, 7)
    assert torch.allclose(onednn(x, weight.t()), F.linear(x, weight.t()), atol=1e-5)


def test_onednn_is_for_large_fp32_products_on_a_cpu_outside_of_autocast():
    small, large = torch.zeros(2, 2), torch.zeros(512, 512)
    assert suits_onednn(large, large) == product.has_onednn() and not suits_onednn(small, small)
    assert not suits_onednn(large.bfloat16(), large) and not suits_onednn(large.double(), large.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits_onednn(large, large)


def test_the_peak_of_a_process_is_what_it_held():
    before, size = memory.resident(), 1 << 26
    with mmap.mmap(-1, size) as block:
        for start in range(0, size, 4096):
            block[start] = 1
        assert memory.resident() - before > 0.9 * size and memory.peak() >= memory.resident() > 50e6
    assert memory.total() > memory.peak()
