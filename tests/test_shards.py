import bz2
import gzip
import io
import lzma
import pickle
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpt2cli import shards as shards_module
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
    assert len(tokens) == 25
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


def as_npy(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


TEXT = "Es war einmal ein König, der hatte keine Tokens. ".encode() * 9
IDS = np.arange(50, dtype="<u2")


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("train.bin", b"", "has 0 bytes"),
        ("train.bin", b"abc", "has 3 bytes"),
        ("train.bin", IDS.tobytes() + b"a", "101 bytes, which are no row of 16-bit ids"),
        ("train.bin", with_header(MAGIC, 1, 9) + b"ab", r"promises 9 tokens in 1,042 bytes, but the file has 1,026"),
        ("train.bin", with_header(MAGIC, 1, 1) + b"abc", r"promises 1 tokens in 1,026 bytes, but the file has 1,027"),
        ("train.bin", with_header(MAGIC, 1, 9)[:500], r"promises 9 tokens in 1,042 bytes, but the file has 500"),
        ("train.bin", with_header(MAGIC, 1, -5) + b"ab", "promises -5 tokens; expected 1 or more"),
        ("train.bin", with_header(MAGIC, 1, 0), "promises 0 tokens; expected 1 or more"),
        ("train.bin", with_header(MAGIC, 1, 2**31 - 1) + b"ab", "promises 2,147,483,647 tokens"),
        ("train.bin", with_header(MAGIC, 2, 1) + b"ab", "version 2 of the shard format; expected 1"),
        ("train.bin", with_header(0) + b"ab" * 9, "unfinished"),
        ("train.bin", with_header(20240801, 7, 4) + bytes(16), r"llm\.c's shard of 32-bit ids \(of Llama 3\)"),
        ("train.bin", with_header(20240522, 1, 4) + bytes(16), r"llm\.c's evaluation data"),
        ("train.bin", with_header(20240326, 3, 4) + bytes(16), r"llm\.c's model"),
        ("train.bin", np.frombuffer(with_header(MAGIC, 1, 4), "<i4").astype(">i4").tobytes() + bytes(8), "big-endian"),
        ("train.bin", (IDS * 100).astype("<u4").tobytes(), "ids of 32 or 64 bits"),
        ("train.bin", (IDS * 100).astype("<i8").tobytes(), "ids of 32 or 64 bits"),
        ("train.bin", TEXT, "is text, no token shard: expected llm.c's or nanoGPT's .bin"),
        ("train.bin", "\u4eca\u65e5\u306f".encode() * 999, "is text"),
        ("train.bin", gzip.compress(TEXT), "a gzip file"),
        ("train.bin", pickle.dumps(list(range(20000))), "a pickle"),
        ("train.bin", pickle.dumps(IDS, protocol=4), "a pickle"),
        ("train.bin", as_npy(IDS), r"a NumPy array \(\.npy\)"),
        ("train.npy", with_header(MAGIC, 1, 1) + b"ab", "not a whole .npy file: its header cannot be read"),
        ("train.npy", b"", "header cannot be read"),
        ("train.npy", b"not numpy", "header cannot be read"),
        ("train.npy", TEXT, "is text"),
        ("train.npy", as_npy(IDS)[:60], "header cannot be read"),
        ("train.npy", as_npy(IDS)[:-1], "promises 50 tokens in 228 bytes, but the file has 227"),
        ("train.npy", as_npy(IDS) + b"a", "promises 50 tokens in 228 bytes, but the file has 229"),
        ("train.npy", as_npy(IDS.astype(float)), r"holds .*'<f8'.*'shape': \(50,\).*; expected one row of token ids"),
        ("train.npy", as_npy(IDS.astype(bool)), r"holds .*'\|b1'"),
        ("train.npy", as_npy(IDS.reshape(5, 10)), r"holds .*'shape': \(5, 10\)"),
        ("train.npy", as_npy(np.array(7)), r"holds .*'shape': \(\)"),
        ("train.npy", as_npy(IDS[:0]), r"holds .*'shape': \(0,\)"),
        ("train.npy", as_npy(np.zeros(3, dtype=[("a", "<u2")])), r"holds .*\[\('a', '<u2'\)\]"),
        ("train.npy", npy_header(b"{'descr': '<u2', 'shape': (-1,)}"), r"holds .*\(-1,\)"),
        ("train.npy", npy_header(b"{'descr': '<u2', 'shape': (True,)}") + b"ab", r"holds .*\(True,\)"),
        ("train.npy", npy_header(b"{'descr': '<u2', 'shape': (10**99,)}"), r"holds .*\(10\*\*99,\)"),
        ("train.npy", npy_header(b"{'descr': '<u2', 'shape': (%d,)}" % 10**17), "promises 100,000,000,000,000,000 tokens"),
        ("train.npy", npy_header(b"{'shape': (%d,), 'descr': '<u2'}" % 10**4000), "holds"),
        ("train.npy", npy_header(b"(" * 5000), "header cannot be read"),
        ("train.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr': '<u2'", "header cannot be read"),
    ],
)
def test_a_file_that_is_no_whole_shard_is_refused_by_name(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        open_shard(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_what_other_programs_save_is_refused_by_name(tmp_path):
    path = tmp_path / "train.bin"
    for save, says in [
        (lambda file: torch.save({"w": torch.ones(9)}, file), "a zip file"),
        (lambda file: torch.save({"w": torch.ones(9)}, file, _use_new_zipfile_serialization=False), "an old torch.save"),
        (lambda file: save_file({"w": torch.ones(9)}, file), "a safetensors file"),
        (lambda file: file.write_bytes(lzma.compress(TEXT)), "an xz file"),
        (lambda file: file.write_bytes(bz2.compress(TEXT)), "a bzip2 file"),
    ]:
        save(path)
        with pytest.raises(UserError, match=says):
            open_shard(path)
    np.savez(tmp_path / "many.npz", IDS)
    (tmp_path / "many.npz").rename(tmp_path / "train.npy")
    with pytest.raises(UserError, match="a zip file"):
        open_shard(tmp_path / "train.npy")


def test_an_array_of_python_objects_is_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    np.save(tmp_path / "train.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"holds .*'\|O'"):
        open_shard(tmp_path / "train.npy")
    np.load(tmp_path / "train.npy", allow_pickle=True)
    (tmp_path / "exploded").unlink()  # so it would have


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i2", "|u1", "<u4", ">i4", "<i8", ">u8"])
def test_integers_of_any_width_and_byte_order_are_read(tmp_path, dtype):
    ids = np.array([0, 7, 120, 1, 99])
    np.save(tmp_path / "train.npy", ids.astype(dtype))
    read = Tokens.open(tmp_path, "train").read(1, 6)
    assert read.dtype == np.int64 and read.tolist() == [7, 120, 1, 99, 0, 7]


@pytest.mark.parametrize(
    "values, says",
    [
        (np.array([5, -3, 7]), r"holds id -3 at token 1, but ids are at least 0"),
        (np.array([5, 1, 2**31]), r"holds id 2,147,483,648 at token 2"),
        (np.array([5, 2**64 - 1], dtype=np.uint64), r"holds id 18,446,744,073,709,551,615 at token 1"),
    ],
)
def test_numbers_that_are_no_ids_are_refused_where_they_are_read(tmp_path, values, says):
    np.save(tmp_path / "train.npy", values)
    tokens = Tokens.open(tmp_path, "train")
    assert tokens.read(0, 1).tolist() == [5]
    for look in (tokens.check, lambda: tokens.read(0, 3)):
        with pytest.raises(UserError, match=says) as error:
            look()
        assert "train.npy" in str(error.value)


def test_ids_beyond_the_vocabulary_are_refused_with_their_shard_and_place(shards):
    tokens = Tokens.open(shards, "train", vocab_size=24)
    assert len(tokens.read(0, 24)) == 24
    with pytest.raises(UserError, match=r"train_000002\.bin holds id 24 at token 4, but the model knows 24 ids"):
        tokens.read(22, 3)
    with pytest.raises(UserError, match="holds id 24"):
        tokens.check()
    Tokens.open(shards, "train", vocab_size=25).check()


def test_a_shard_that_shrinks_under_a_run_is_an_error(shards):
    tokens = Tokens.open(shards, "train")
    path = shards / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_000001\.bin became shorter"):
        tokens.read(15, 10)


def test_more_shards_than_a_process_may_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    for n in range(200):
        np.array([n], dtype="<u2").tofile(tmp_path / f"train_{n:03}.bin")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, before[1]))
    try:
        assert Tokens.open(tmp_path, "train").read(0, 200).tolist() == list(range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", ["train.bin", "train.npy"])
def test_a_terabyte_opens_at_once_in_little_memory(tmp_path, name):
    header = npy_header((b"{'descr': '<u2', 'shape': (%d,)}" % (5 * 10**11 - 64)).ljust(118))
    with (tmp_path / name).open("wb") as file:
        file.write(IDS.tobytes() if name == "train.bin" else header)
        try:
            file.truncate(10**12)
        except OSError:
            pytest.skip("this file system has no sparse files so large")
    tracemalloc.start()
    started = time.perf_counter()
    tokens = Tokens.open(tmp_path, "train", vocab_size=50)
    tokens.check()
    assert len(tokens.read(len(tokens) - 100, 300)) == 300
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tokens) >= 5 * 10**11 - 64 and seconds < 30 and peak < 1 << 20


def test_up_front_everything_is_looked_at_or_pieces_spread_evenly_over_all_shards(tmp_path, monkeypatch):
    for n in range(3):
        (ids := np.full(1000, 5, dtype="<u2"))[500] = 60_000 if n == 1 else 5
        ids.tofile(tmp_path / f"train_{n}.bin")
    looked = []
    read = shards_module.Shard.__getitem__

    def counted(shard, part):
        looked.append((int(shard.path.stem[-1]), part.start, len(read(shard, part))))
        return read(shard, part)

    monkeypatch.setattr(shards_module.Shard, "__getitem__", counted)
    tokens = Tokens.open(tmp_path, "train", vocab_size=60_001)
    tokens.check()
    assert sum(count for *_, count in looked) == 3000
    looked.clear()
    monkeypatch.setattr(shards_module, "CHECKED_BYTES", 5999)
    monkeypatch.setattr(shards_module, "SAMPLES", 30)
    monkeypatch.setattr(shards_module, "SAMPLE_TOKENS", 5)
    tokens.check()
    assert looked == [(n // 10, n % 10 * 100, 5) for n in range(30)]
    with pytest.raises(UserError, match=r"train_1\.bin holds id 60,000 at token 500"):
        Tokens.open(tmp_path, "train", vocab_size=50_257).check()


def mutants(whole, draw, count):
    """Changes of a file: bits, bytes, numbers of the header, pieces cut out, doubled or put in, ends cut off."""
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(min(len(data), draw.choice((16, 140, 5000))) or 1)
            kind = draw.randrange(6)
            if kind == 0 and data:
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                data[at : at + 1] = draw.randbytes(1)
            elif kind == 2:
                data[at : at + 4] = draw.choice((0, -1, 1, 2**31 - 1, -(2**31), MAGIC)).to_bytes(4, "little", signed=True)
            elif kind == 3:
                del data[at : at + draw.randrange(1, 40)]
            elif kind == 4:
                data[at:at] = draw.choice((b"9" * draw.randrange(1, 30), draw.randbytes(draw.randrange(1, 9)), b"(-'\"\\,"))
            else:
                del data[at:]
        yield bytes(data)


@pytest.mark.parametrize("name", ["llm.c.bin", "nanogpt.bin", "build.npy", "int64.npy"])
def test_a_mutated_shard_gives_tokens_or_a_user_error_and_takes_no_memory(tmp_path, name):
    ids = np.random.default_rng(0).integers(0, 50257, 2000)
    whole = {
        "llm.c.bin": with_header(MAGIC, 1, len(ids)) + ids.astype("<u2").tobytes(),
        "nanogpt.bin": ids.astype("<u2").tobytes(),
        "build.npy": as_npy(ids.astype("<u2")),
        "int64.npy": as_npy(ids),
    }[name]
    path = tmp_path / f"train{Path(name).suffix}"
    found, largest = {"tokens": 0, "refused": 0}, 0
    tracemalloc.start()
    for data in [whole, *mutants(whole, random.Random(name), 400)]:
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            tokens = Tokens.open(tmp_path, "train", vocab_size=50257)
            tokens.check()
            read = tokens.read(len(tokens) - 1, len(tokens) + 1)
            assert len(read) == len(tokens) + 1 <= len(data) and min(read) >= 0 and max(read) < 50257
            found["tokens"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            found["refused"] += 1
        largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert largest < 1 << 20 and min(found.values()) > 10, (largest, found)
