from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2cli import data
from gpt2cli.data import BLOCK, DataLoaderLite, eval_batches, permute, share_out
from gpt2cli.errors import UserError
from gpt2cli.shards import Tokens
from gpt2cli.tokenizer import Encoding


def rows(loader, count):
    return torch.cat([loader.next_batch()[0] for _ in range(count)])


def test_y_is_x_one_token_later_across_shards_and_the_end():
    parts = [np.arange(n, n + size) for n, size in [(0, 7), (7, 1), (8, 15)]]
    loader = DataLoaderLite(B=2, T=5, data=Tokens(parts))
    for n in range(10):
        x, y = loader.next_batch()
        start = torch.arange(n * 10, n * 10 + 10).view(2, 5)
        assert torch.equal(x, start % 23) and torch.equal(y, (start + 1) % 23)


def test_input_txt_is_the_default(text_file):
    x, y = DataLoaderLite(B=4, T=32).next_batch()
    ids = Encoding.gpt2().encode_documents(text_file.read_text(encoding="utf-8"))[:129]
    assert x.dtype == torch.long and x.flatten().tolist() == ids[:128].tolist() and y.flatten().tolist() == ids[1:].tolist()


@pytest.mark.parametrize("N, T", [(1000, 10), (1003, 10), (997, 31), (64, 63)])
def test_an_epoch_serves_each_token_once_shuffled_or_not(N, T):
    for seed in (None, 7):
        loader = DataLoaderLite(B=1, T=T, data=np.arange(N), seed=seed)
        epochs = T  # whole number of windows: T epochs of N tokens are N windows of T
        served = torch.stack([loader.next_batch()[1] for _ in range(N)]).flatten()
        assert torch.equal(torch.bincount(served, minlength=N), torch.full((N,), epochs))


@pytest.mark.parametrize("N, T", [(1000, 10), (1003, 10), (997, 31), (64, 63)])
def test_every_epoch_by_itself_serves_each_of_its_windows_once(N, T):
    loader = DataLoaderLite(B=1, T=T, data=np.arange(N), seed=7)
    k = 0
    for epoch in range(5):
        plain = [n * T for n in range(-(-epoch * N // T), -(-(epoch + 1) * N // T))]  # where its windows begin, unshuffled
        served = [loader.row(k + n) for n in range(len(plain))]
        assert sorted(int(row[0]) for row in served) == sorted(start % N for start in plain)
        assert all(row.tolist() == [(row[0] + n) % N for n in range(T + 1)] for row in served)
        k += len(plain)


class Endless:
    """A terabyte of ids that are made when they are asked for."""

    dtype = np.dtype("<u2")

    def __len__(self):
        return 1 << 39

    def __getitem__(self, part):
        return np.arange(part.start, min(part.stop, part.start + 9999)) % 50257


def test_any_row_of_any_amount_is_found_without_the_rows_before_it(monkeypatch):
    mixes = []
    mix = data._mix
    monkeypatch.setattr(data, "_mix", lambda *values: mixes.append(1) or mix(*values))
    for source, most in ((Tokens([Endless()]), 100), ({Tokens([Endless()]): 2, Tokens([Endless()]): 1}, 5000)):
        for position in (0, 10**9 + 1, 10**12, 10**15):
            mixes.clear()
            assert len(DataLoaderLite(B=1, T=1024, data=source, seed=3).row(position)) == 1025
            assert 4 <= len(mixes) < most


# ==== mixtures ====

SOURCES = {"a": np.arange(1000), "b": np.arange(1000, 1333), "c": np.arange(2000, 2077)}  # by the thousands told apart
WEIGHTS = {"a": 0.62, "b": 0.3, "c": 0.08}


def mixed(names="abc", B=4, T=8, seed=3, **options):
    return DataLoaderLite(B, T, {Tokens([SOURCES[name]]): WEIGHTS[name] for name in names}, seed=seed, **options)


def source_of(row):
    return "abc"[int(row[0]) // 1000]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_mixture_serves_of_each_source_what_it_would_serve_alone_in_that_order(seed):
    loader = mixed(seed=seed)
    rows = [loader.row(k) for k in range(3 * BLOCK)]
    for name, ids in SOURCES.items():
        alone = DataLoaderLite(1, 8, ids, seed=seed)
        served = [row for row in rows if source_of(row) == name]
        assert all(np.array_equal(row, alone.row(j)) for j, row in enumerate(served))
        assert len(served) * 8 > len(ids)  # more than an epoch of each, so every token was there


def test_each_block_has_the_exact_shares_and_another_order():
    loader = mixed()
    assert loader.shares == (635, 307, 82)  # of 634.88, 307.2, 81.92
    blocks = ["".join(source_of(loader.row(k)) for k in range(n * BLOCK, (n + 1) * BLOCK)) for n in range(3)]
    for block in blocks:
        assert [block.count(name) for name in "abc"] == [635, 307, 82]
        assert min(block[:512].count("c"), block[512:].count("c")) > 20  # mixed, not one after the other
    assert len(set(blocks)) == 3


def test_another_seed_deals_otherwise_and_the_same_one_alike():
    first, second, other = ([source_of(mixed(seed=seed).row(k)) for k in range(200)] for seed in (3, 3, 4))
    assert first == second != other


def test_the_order_of_a_seed_is_that_of_every_version():
    """The numbers of the version before there were mixtures: a run of it goes on."""
    alone = DataLoaderLite(1, 10, np.arange(1003), seed=7)
    assert [int(alone.row(k)[0]) for k in (*range(8), 100, 101, 10**6)] == [300, 10, 50, 100, 670, 860, 230, 940, 40, 957, 90]
    one = DataLoaderLite(1, 10, {Tokens([np.arange(1003)]): 0.25}, seed=7)
    assert all(np.array_equal(one.row(k), alone.row(k)) for k in (*range(300), 10**6))


@pytest.mark.parametrize("position", [1, 1000, 5 * BLOCK + 17, 10**12])
def test_a_mixture_goes_on_from_any_position(position):
    loader = mixed(B=1)
    loader.load_state_dict({"position": position})
    assert all(np.array_equal(loader.next_batch()[0][0], mixed().row(position + n)[:-1]) for n in range(30))


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_sees_the_same_mixture(ranks):
    one = mixed(B=8)
    many = [mixed(B=8 // ranks, rank=rank, world_size=ranks) for rank in range(ranks)]
    for _ in range(BLOCK // 8 + 5):
        assert torch.equal(one.next_batch()[1], torch.cat([loader.next_batch()[1] for loader in many]))


@pytest.mark.parametrize(
    "weights, shares",
    [
        ([7, 3], (717, 307)), ([0.7, 0.3], (717, 307)), ([1, 1, 1], (342, 341, 341)), ([1e300, 1e300], (512, 512)),
        ([1023, 1], (1023, 1)), ([1] * 1024, (1,) * 1024),
    ],
)  # fmt: skip
def test_shares_are_the_largest_remainders_of_the_weights(weights, shares):
    assert share_out([str(n) for n in range(len(weights))], weights) == shares


@pytest.mark.parametrize(
    "weights, says",
    [
        (
            {"a": 1, "b": 0.0003},
            r"the weight of b, 0\.0003, is too small for one row in 1,024: give it at least 0\.00098",
        ),
        ({"a": 1, "b": 0}, "the weight of b is 0; expected a number above 0"),
        ({"a": -2.5}, r"the weight of a is -2\.5"),
        ({"a": 1, "b": float("nan")}, "the weight of b is nan"),
        ({"a": 1, "b": float("inf")}, "the weight of b is inf"),
        ({}, "the mixture is empty"),
    ],
)
def test_weights_that_cannot_be_meant_are_named(weights, says):
    with pytest.raises(UserError, match=says):
        DataLoaderLite(1, 8, weights)


def test_a_source_shorter_than_a_row_is_named():
    for name, ids in (("long", SOURCES["a"]), ("short", np.arange(8))):
        Path(name).mkdir()
        ids.astype("<u2").tofile(f"{name}/train.bin")
    with pytest.raises(UserError, match="short has 8 tokens, but a row of 8 needs 9: use more text, or a smaller --seq-len"):
        DataLoaderLite(4, 8, {"long": 1, "short": 1})
    assert DataLoaderLite(4, 7, {"long": 1, "short": 1}).next_batch()[0].shape == (4, 7)  # it comes round within the batch


# ==== what else ====


def test_a_shard_and_a_row_of_floats(text_file):
    np.arange(100, dtype="<u2").tofile("x.bin")
    assert DataLoaderLite(1, 9, "x.bin").next_batch()[1].tolist() == [list(range(1, 10))]
    with pytest.raises(UserError, match=r"float64 \(100,\); expected one row of token ids"):
        DataLoaderLite(1, 9, np.ones(100))


def test_shuffling_depends_on_seed_and_epoch_and_is_no_identity():
    first, second, other = (DataLoaderLite(B=10, T=10, data=np.arange(1000), seed=s) for s in (1, 1, 2))
    epoch = rows(first, 10)
    assert torch.equal(epoch, rows(second, 10)) and not torch.equal(epoch, rows(other, 10))
    assert not torch.equal(epoch, rows(first, 10))
    assert not torch.equal(epoch, torch.arange(1000).view(100, 10))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_permute_is_a_permutation(n):
    assert sorted(permute(i, n, (3, 4)) for i in range(n)) == list(range(n))


def test_a_position_is_the_whole_state():
    loader = DataLoaderLite(B=2, T=8, data=np.arange(500), seed=3)
    rows(loader, 7)
    state = loader.state_dict()
    again = DataLoaderLite(B=2, T=8, data=np.arange(500), seed=3)
    again.load_state_dict(state)
    assert torch.equal(rows(loader, 40), rows(again, 40))


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(ranks):
    one = DataLoaderLite(B=8, T=8, data=np.arange(777), seed=3)
    many = [DataLoaderLite(B=8 // ranks, T=8, data=np.arange(777), seed=3, rank=r, world_size=ranks) for r in range(ranks)]
    for _ in range(20):
        assert torch.equal(one.next_batch()[0], torch.cat([loader.next_batch()[0] for loader in many]))


def test_too_little_data_is_named_with_what_is_needed():
    with pytest.raises(UserError, match=r"32 tokens, but one batch of 4 rows of 8 needs 33"):
        DataLoaderLite(B=4, T=8, data=np.arange(32))
    with pytest.raises(UserError, match=r"input\.txt does not exist"):
        DataLoaderLite(B=4, T=8)


def test_evaluation_without_a_limit_looks_at_every_target_once():
    for N in (101, 100, 12, 7):
        targets = torch.cat([y.flatten() for _, y in eval_batches(Tokens([np.arange(N)]), 3, 10, limit=0)])
        assert sorted(targets.tolist()) == list(range(1, N))


def test_evaluation_with_a_limit_is_spread_over_the_text():
    batches = list(eval_batches(Tokens([np.arange(1001)]), 4, 10, limit=100))
    starts = torch.cat([x[:, 0] for x, _ in batches]).tolist()
    assert starts == [n * 100 for n in range(10)]
