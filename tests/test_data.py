import numpy as np
import pytest
import torch

from gpt2cli.data import DataLoaderLite, eval_batches, permute
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
