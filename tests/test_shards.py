import numpy as np
import pytest

from gpt2cli.errors import UserError
from gpt2cli.shards import HEADER_BYTES, MAGIC, ShardWriter, Tokens, find_shards, open_shard


@pytest.fixture
def shards(tmp_path):
    writer = ShardWriter(tmp_path, "train", shard_tokens=10)
    for part in np.split(np.arange(25), [3, 4, 17]):
        writer.write(part)
    writer.close()
    return tmp_path


def test_shards_are_llm_cs_format_and_cut_at_their_size(shards):
    paths = find_shards(shards, "train")
    assert [path.name for path in paths] == ["train_000000.bin", "train_000001.bin", "train_000002.bin"]
    header = np.fromfile(paths[2], dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 5] and not header[3:].any()
    assert np.fromfile(paths[2], dtype="<u2", offset=HEADER_BYTES).tolist() == [20, 21, 22, 23, 24]


def test_many_shards_read_as_one_row_and_go_on_at_the_beginning(shards):
    tokens = Tokens.open(shards, "train")
    assert len(tokens) == 25 and tokens.largest() == 24
    for start, count in [(0, 25), (8, 4), (9, 12), (10, 10), (20, 5), (23, 7), (24, 60), (50, 3), (5, 0)]:
        assert tokens.read(start, count).tolist() == [n % 25 for n in range(start, start + count)]


def test_shards_of_others_are_read(tmp_path):
    np.arange(7, dtype="<u2").tofile(tmp_path / "train.bin")
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(5, dtype=np.uint16))
    assert Tokens.open(tmp_path, "train").read(0, 7).tolist() == list(range(7))
    assert Tokens.open(tmp_path, "val").read(0, 5).tolist() == list(range(5))
    with pytest.raises(UserError, match="no test shards"):
        Tokens.open(tmp_path, "test")


def test_a_split_is_a_word_of_the_name_not_a_part_of_one(tmp_path):
    for name in ("medieval_train_000000", "fineweb_val_000000", "fineweb_train_000001", "validation", "interval", "train"):
        (tmp_path / f"{name}.bin").write_bytes(b"ab")
    assert [p.stem for p in find_shards(tmp_path, "val")] == ["fineweb_val_000000", "validation"]
    assert [p.stem for p in find_shards(tmp_path, "train")] == ["fineweb_train_000001", "medieval_train_000000", "train"]


def with_header(*values):
    return np.array([*values, *[0] * (256 - len(values))], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("train.bin", b"", "0 bytes"),
        ("train.bin", b"abc", "3 bytes"),
        ("train.bin", with_header(MAGIC, 1, 9) + b"ab", "9 tokens"),
        ("train.bin", with_header(MAGIC, 1, -5) + b"ab", "-5 tokens"),
        ("train.bin", with_header(MAGIC, 2, 1) + b"ab", "version 2"),
        ("train.bin", with_header(0) + b"ab" * 9, "unfinished"),
        ("train.npy", b"not numpy", "npy"),
        ("train.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<u2'", "npy"),
    ],
)
def test_a_file_that_is_no_whole_shard_is_refused_by_name(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        open_shard(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_an_array_of_python_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "train.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="npy"):
        open_shard(tmp_path / "train.npy")
