import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.loss import linear_cross_entropy, rows_at_once
from gpt2cli.model import GPT

from .conftest import make_model

ODD_SHAPES = [
    {"n_head": 5, "n_embd": 80, "vocab_size": 311, "block_size": 19, "n_layer": 3},
    {"n_head": 1, "n_embd": 8, "vocab_size": 2, "block_size": 3, "n_layer": 1},
    {"n_inner": 52, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    {"activation_function": "relu", "scale_attn_weights": False},
    {"activation_function": "silu", "scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_logits_are_transformers_after_export_and_import(tmp_path, shape):
    from transformers import AutoModelForCausalLM

    model = make_model(**shape)
    model.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(model.config.vocab_size, (3, model.config.block_size))
    logits, loss = model(ids)
    assert loss is None and (logits - theirs(ids).logits).abs().max() < 1e-4

    theirs.save_pretrained(tmp_path / "theirs")
    again = GPT.from_pretrained(tmp_path / "theirs").eval()
    assert dataclasses.replace(again.config, dropout=0.0, attn_dropout=0.0) == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_ten_steps_of_training_have_the_losses_of_transformers(tmp_path):
    from transformers import GPT2LMHeadModel

    model = make_model(n_head=5, n_embd=80, vocab_size=311)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).train()
    model.train()
    data = torch.randint(311, (10, 4, 33))

    def losses(loss_of, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for batch in data:
            optimizer.zero_grad()
            loss = loss_of(batch[:, :-1], batch[:, 1:])
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours = list(losses(lambda x, y: model(x, y)[1], model.parameters()))
    expected = losses(lambda x, y: F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()), theirs.parameters())
    assert ours == pytest.approx(list(expected), abs=1e-4)


def test_the_future_cannot_change_the_past():
    model = make_model()
    ids = torch.randint(97, (1, 32))
    changed = ids.clone()
    changed[0, 20:] = torch.randint(97, (12,))
    before, after = model(ids)[0], model(changed)[0]
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6) and not torch.allclose(before[:, 20:], after[:, 20:])


def test_attention_is_the_softmax_written_out():
    model = make_model()
    attn, x = model.h[1].attn, torch.randn(2, 9, 32)
    q, k, v = (part.view(2, 9, 2, 16).transpose(1, 2) for part in attn.c_attn(x).split(32, dim=2))
    scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    expected = attn.c_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 9, 32))
    assert torch.allclose(attn(x), expected, atol=1e-5)


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=5000))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert not model.h[3].mlp.c_fc.bias.any() and torch.equal(model.ln_f.weight, torch.ones(128))
    ids = torch.randint(5000, (2, 65))
    assert model(ids[:, :-1], ids[:, 1:])[1].item() == pytest.approx(math.log(5000), abs=0.1)


def test_a_tie_is_one_tensor_with_one_name():
    model = make_model()
    assert model.head_weight is model.wte.weight and "lm_head.weight" not in model.state_dict()


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(UserError, match="33 tokens do not fit the model's context of 32"):
        make_model()(torch.zeros(1, 33, dtype=torch.long))


AT_ONCE = rows_at_once("cpu", torch.float32)


@pytest.mark.parametrize(("large", "padded"), [(0, 1), (1 << 40, 1), (1 << 40, 64)])
@pytest.mark.parametrize("rows", [5, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE - 7])
def test_the_fused_loss_is_cross_entropy_in_value_and_gradients(rows, large, padded, monkeypatch):
    monkeypatch.setattr("gpt2cli.product.LARGE", large)  # with and without oneDNN
    monkeypatch.setattr("gpt2cli.loss.multiple", lambda device_type: padded)  # as on a GPU
    torch.manual_seed(0)
    x, weight, targets = torch.randn(rows, 24), torch.randn(300, 24), torch.randint(300, (rows,))
    fused_inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain_inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    fused = linear_cross_entropy(*fused_inputs, targets)
    plain = F.cross_entropy(F.linear(*plain_inputs), targets)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    (3 * fused).backward()
    (3 * plain).backward()
    for ours, expected in zip(fused_inputs, plain_inputs, strict=True):
        assert ours.grad.shape == expected.grad.shape and torch.allclose(ours.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ignored", [[], [0, 3, AT_ONCE], range(AT_ONCE + 5)])
def test_targets_of_minus_100_count_for_nothing(ignored):
    torch.manual_seed(0)
    x, weight, targets = torch.randn(AT_ONCE + 5, 24), torch.randn(300, 24), torch.randint(300, (AT_ONCE + 5,))
    targets[list(ignored)] = -100
    both = [[x.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2)]
    fused, plain = linear_cross_entropy(*both[0], targets), F.cross_entropy(F.linear(*both[1]), targets)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5, nan_ok=True)
    if len(ignored) < len(x):
        fused.backward(), plain.backward()
        for ours, expected in zip(*both, strict=True):
            assert torch.allclose(ours.grad, expected.grad, rtol=1e-4, atol=1e-7)
    targets[1] = -1
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(*both[0], targets)


def test_the_fused_loss_stays_finite_where_the_targets_probability_vanishes():
    x = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 1000.0 and torch.equal(x.grad, torch.tensor([[1.0, -1.0]]))


def test_the_fused_loss_without_gradients_and_the_model_without_logits():
    model = make_model()
    ids = torch.randint(97, (3, 33))
    with torch.no_grad():
        logits, loss = model(ids[:, :-1], ids[:, 1:])
        none, fused = model(ids[:, :-1], ids[:, 1:], loss_only=True)
    assert none is None and logits.shape == (3, 32, 97) and fused.item() == pytest.approx(loss.item(), rel=1e-6)


def test_bf16_autocast_is_near_fp32(monkeypatch):
    monkeypatch.setattr("gpt2cli.loss.rows_at_once", lambda device_type, dtype: 35)  # of 96
    monkeypatch.setattr("gpt2cli.loss.VOCABULARY_AT_ONCE", 40)  # of 97
    model = make_model()
    ids = torch.randint(97, (3, 33))
    exact = model(ids[:, :-1], ids[:, 1:])[1]
    with torch.autocast("cpu", torch.bfloat16):
        logits, plain = model(ids[:, :-1], ids[:, 1:])
        _, fused = model(ids[:, :-1], ids[:, 1:], loss_only=True)
    assert logits.dtype == torch.bfloat16
    assert plain.item() == pytest.approx(exact.item(), rel=0.01) and fused.item() == pytest.approx(plain.item(), rel=1e-3)
    exact.backward()
    expected = model.wte.weight.grad
    model.zero_grad()
    fused.backward()
    assert model.wte.weight.grad.dtype == torch.float32
    assert (model.wte.weight.grad - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_the_embeddings_gradient_as_an_input_is_sparse_only_where_a_dense_one_is_there(tied):
    """Sparse ones are not for users: their optimizers refuse them."""
    model, ids = make_model(tie_word_embeddings=tied), torch.tensor([[5, 3, 5, 8, 5]])
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    expected = model.wte.weight.grad
    model.zero_grad()
    for _ in range(2):  # micro-steps
        (model(ids[:, :-1], ids[:, 1:], loss_only=True)[1] / 2).backward()
    assert model.wte.weight.grad.layout == torch.strided
    torch.testing.assert_close(model.wte.weight.grad, expected)
    model.zero_grad()
    model.hidden(ids).sum().backward()
    assert model.wte.weight.grad.layout == torch.strided
    made = []
    embedding = torch.nn.functional.embedding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch.nn.functional.embedding", lambda *a, **k: (made.append(bool(k.get("sparse"))), embedding(*a, **k))[1]
        )
        model(ids[:, :-1], ids[:, 1:], loss_only=True)
    assert made[0] is tied


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_flash_attention_in_bf16_is_near_fp32_and_compiled_near_eager():
    from gpt2cli import device

    model = make_model().cuda()
    ids = torch.randint(97, (3, 33), device="cuda")
    exact = model(ids[:, :-1], ids[:, 1:])[1]
    with device.precision(torch.device("cuda"), "bf16", "flash"):
        flash = model(ids[:, :-1], ids[:, 1:], loss_only=True)[1]
    assert flash.item() == pytest.approx(exact.item(), rel=0.01)
    model.compile()
    assert model(ids[:, :-1], ids[:, 1:], loss_only=True)[1].item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_cuda_loss_and_gradients_are_a_cpus(deterministic):
    """By the loss's kernel, with a sparse gradient of the embedding and without."""
    from gpt2cli import device

    ids = torch.randint(97, (3, 33), generator=torch.Generator().manual_seed(0))
    results, before = [], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    device.set_deterministic(deterministic)
    try:
        for where in ("cpu", "cuda"):
            model, batch = make_model().to(where), ids.to(where)
            loss = model(batch[:, :-1], batch[:, 1:], loss_only=True)[1]
            loss.backward()
            results.append({"loss": loss.detach().cpu()} | {name: p.grad.cpu() for name, p in model.named_parameters()})
    finally:
        device.set_deterministic(False)
        torch.set_float32_matmul_precision(before)
    apart = {name: float((found - results[0][name]).abs().max()) for name, found in results[1].items()}
    assert max(apart.values()) < 1e-4, apart
