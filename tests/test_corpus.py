import gzip
import random

import pytest

from gpt2cli import corpus
from gpt2cli.corpus import EMBEDDED, Policy, find_cut, tokenize
from gpt2cli.errors import UserError
from gpt2cli.shards import Tokens, find_shards
from gpt2cli.tokenizer import Encoding


def ids_of(folder, split):
    return Tokens.open(folder, split).read(0, len(Tokens.open(folder, split))).tolist()


def run(inputs, out, policy=Policy(), **more):
    return tokenize(inputs, out, encoding=Encoding.gpt2(), policy=policy, **more)


def test_the_embedded_text_has_its_known_size(tmp_path, shakespeare):
    manifest = run([EMBEDDED], tmp_path / "out", Policy(val_fraction=0))
    assert manifest.documents == 42 and len(shakespeare.encode()) == 5_052_763
    assert manifest.train_tokens == 1_561_971 + 1  # its 41 separators are counted; every document has one before it
    assert ids_of(tmp_path / "out", "train") == Encoding.gpt2().encode_documents(shakespeare).tolist()


@pytest.mark.parametrize("block", [50, 1000, 1 << 20])
def test_tokens_do_not_depend_on_how_the_file_is_read(tmp_path, monkeypatch, shakespeare, block):
    monkeypatch.setattr(corpus, "BLOCK", block)
    text = shakespeare[120_000:150_000] + "漢字かな交じり文、句読点。" * 300 + "<|endoftext|>🙂" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    run([tmp_path / "a.txt"], tmp_path / "one", Policy(val_fraction=0))
    assert ids_of(tmp_path / "one", "train") == Encoding.gpt2().encode_documents(text).tolist()


def test_two_workers_write_the_bytes_of_one(tmp_path, monkeypatch, shakespeare):
    monkeypatch.setattr(corpus, "BLOCK", 5000)
    (tmp_path / "a.txt").write_text(shakespeare[:100_000], encoding="utf-8")
    one = run([tmp_path / "a.txt"], tmp_path / "one", workers=1, shard_tokens=7000)
    two = run([tmp_path / "a.txt"], tmp_path / "two", workers=2, shard_tokens=7000)
    assert one == two and len(one.shards) > 3
    for name in one.shards:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_random_text_may_be_cut_where_find_cut_says(shakespeare):
    encoding, rng = Encoding.gpt2(), random.Random(0)
    alphabet = "ab é漢、。'sdt 19_-\n\t\r\u00a0\u2028\x1c!<|²Ⅷ🙂"
    cuts = 0
    for _ in range(3000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
        cut = find_cut(text)
        cuts += cut > 0
        assert encoding.encode(text[:cut]) + encoding.encode(text[cut:]) == encoding.encode(text), repr(text)
    assert cuts > 1000


def test_the_validation_split_is_the_tail_and_a_document_of_its_own(tmp_path, monkeypatch, shakespeare):
    text = shakespeare[:50_000]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    manifest = run([tmp_path / "a.txt"], tmp_path / "out", Policy(val_fraction=0.1))
    train, val = ids_of(tmp_path / "out", "train"), ids_of(tmp_path / "out", "val")
    assert train[0] == val[0] == 50256 and train[1:] + val[1:] == Encoding.gpt2().encode(text)
    assert manifest.documents == 1 and manifest.train_bytes + manifest.val_bytes == 50_000
    assert abs(manifest.val_bytes - 5000) < 20
    monkeypatch.setattr(corpus, "BLOCK", 333)
    run([tmp_path / "a.txt"], tmp_path / "small", Policy(val_fraction=0.1))
    assert ids_of(tmp_path / "small", "val") == val


def test_folders_and_gzip_are_read_in_natural_order(tmp_path):
    (tmp_path / "in").mkdir()
    for n in (10, 2, 1):
        (tmp_path / "in" / f"part{n}.txt").write_text(f"text {n}")
    (tmp_path / "in" / "part3.txt.gz").write_bytes(gzip.compress(b"text 3"))
    run([tmp_path / "in"], tmp_path / "out", Policy(val_fraction=0))
    assert Encoding.gpt2().decode(ids_of(tmp_path / "out", "train")).split("<|endoftext|>")[1:] == [
        "text 1", "text 2", "text 3", "text 10"]  # fmt: skip


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "empty"),
        (b"fine so far \xff and on", "0xff at offset 12"),
        (b"x" * 60 + "é".encode()[:1], "offset 60"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "zero byte at offset 8"),
    ],
)
def test_a_bad_text_is_named_with_the_place(tmp_path, monkeypatch, data, says):
    monkeypatch.setattr(corpus, "BLOCK", 16)
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError, match=says):
        run([tmp_path / "bad.txt"], tmp_path / "out")
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt"]


def test_bad_bytes_can_be_replaced(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"one \xff two")
    run([tmp_path / "bad.txt"], tmp_path / "out", Policy(val_fraction=0, errors="replace"))
    assert ids_of(tmp_path / "out", "train")[1:] == Encoding.gpt2().encode("one \ufffd two")
    assert not find_shards(tmp_path / "out", "val")


def test_a_torn_gzip_is_a_user_error(tmp_path):
    whole = gzip.compress(bytes(range(1, 128)) * 100)
    for torn in (whole[:-20], whole[:30] + b"\xff" * 20 + whole[50:], b"not gzip"):
        (tmp_path / "a.txt.gz").write_bytes(torn)
        with pytest.raises(UserError, match="gzip"):
            run([tmp_path / "a.txt.gz"], tmp_path / "out")


def test_finished_work_is_kept_and_other_work_is_never_overwritten(tmp_path, text_file):
    first = run([text_file], tmp_path / "out")
    stamp = (tmp_path / "out" / "train_000000.bin").stat().st_mtime_ns
    assert run([text_file], tmp_path / "out") == first
    assert (tmp_path / "out" / "train_000000.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="already exists"):
        run([text_file], tmp_path / "out", Policy(val_fraction=0.2))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, text_file):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt2cli.corpus.ShardWriter.close", full)
    with pytest.raises(OSError, match="No space"):
        run([text_file], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.txt"]
