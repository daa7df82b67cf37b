import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from gpt2cli import corpus, documents, encode
from gpt2cli.corpus import tokenize
from gpt2cli.documents import EMBEDDED
from gpt2cli.errors import UserError
from gpt2cli.pieces import cut_up, find_cut
from gpt2cli.shards import Tokens, find_shards
from gpt2cli.survey import Policy
from gpt2cli.tokenizer import Encoding

from .conftest import QUICK

ALL = Policy(val_fraction=0)
ODD = "ab é漢、。'sdt 19_-\n\t\r\u00a0\u2028\x1c!<|²Ⅷ🙂"


def ids_of(folder, split="train"):
    return Tokens.open(folder, split).read(0, len(Tokens.open(folder, split))).tolist()


def run(inputs, out, policy=ALL, **more):
    return tokenize(inputs, out, encoding=Encoding.gpt2(), policy=policy, **more)


def documents_of(folder, split="train"):
    return Encoding.gpt2().decode(ids_of(folder, split)).split("<|endoftext|>")[1:]


def same_shards(a, b):
    names = [path.name for path in find_shards(a, "train") + find_shards(a, "val")]
    assert names == [path.name for path in find_shards(b, "train") + find_shards(b, "val")]
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.fixture
def blocks(monkeypatch):
    """Set the size of blocks, batches and samples, to see many of them in a small text."""

    def of(size):
        monkeypatch.setattr(documents, "BLOCK", size)
        monkeypatch.setattr("gpt2cli.pieces.BLOCK", size)
        monkeypatch.setattr(encode, "BATCH_BYTES", size)
        monkeypatch.setattr(encode, "WINDOW", max(40, size // 4))
        monkeypatch.setattr("gpt2cli.pieces.HASHED", size // 4)

    return of


# ==== equal to tiktoken ====


def test_the_embedded_text_has_its_known_size(tmp_path, shakespeare):
    manifest = run([EMBEDDED], tmp_path / "out")
    assert manifest.documents == 42 and len(shakespeare.encode()) == 5_052_763
    assert manifest.train_tokens == 1_561_971 + 1  # its 41 separators are counted; every document has one before it
    assert ids_of(tmp_path / "out") == Encoding.gpt2().encode_documents(shakespeare).tolist()


@pytest.mark.parametrize("block", [50, 1000, 1 << 20])
@pytest.mark.parametrize("plain", [False, True])
def test_tokens_do_not_depend_on_how_the_file_is_read(tmp_path, blocks, shakespeare, block, plain):
    blocks(block)
    text = shakespeare[120_000:150_000] + "漢字かな交じり文、句読点。" * 300 + "<|endoftext|>🙂" * 20 + "<|endoftext|>"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    manifest = run([tmp_path / "a.txt"], tmp_path / "one", Policy(val_fraction=0, plain=plain))
    assert ids_of(tmp_path / "one") == Encoding.gpt2().encode_documents(text, plain=plain).tolist()
    assert manifest.documents == (1 if plain else 22)


def test_two_workers_write_the_bytes_of_one(tmp_path, blocks, shakespeare):
    blocks(5000)
    (tmp_path / "a.txt").write_text(shakespeare[:100_000] + "<|endoftext|>and\n" * 200, encoding="utf-8")
    one = run([tmp_path / "a.txt"], tmp_path / "one", Policy(), workers=1, shard_tokens=7000)
    two = run([tmp_path / "a.txt"], tmp_path / "two", Policy(), workers=2, shard_tokens=7000)
    assert one == two and len(one.files) > 3 and one.val_tokens
    assert same_shards(tmp_path / "one", tmp_path / "two")


def test_random_text_may_be_cut_where_find_cut_says():
    encoding, rng = Encoding.gpt2(), random.Random(0)
    cuts = set()
    for _ in range(6000):
        data = "".join(rng.choice(ODD) for _ in range(rng.randrange(60))).encode()
        cut = find_cut(data, 0, len(data))
        left, right = data[:cut].decode(), data[cut:].decode()
        cuts.add((left[-1:], right[:1]))
        assert encoding.encode(left) + encoding.encode(right) == encoding.encode(data.decode()), repr(data.decode())
    assert len(cuts) > 80


@pytest.mark.parametrize("text", ["Pokémon" * 40, "ドラゴンゼウス" * 30, "x" * 50 + "Pokémon、" * 20, "приветмир" * 20])
def test_a_text_read_up_to_the_middle_of_a_character_is_not_cut_there(text):
    """In these GPT-2 joins letters that are not ASCII with their neighbours."""
    data, encoding = text.encode(), Encoding.gpt2()
    for end in range(1, len(data)):
        if cut := find_cut(data, 0, end):
            left, right = data[:cut].decode(), data[cut:].decode()
            assert encoding.encode(left) + encoding.encode(right) == encoding.encode(text), (end, cut)


def test_random_text_of_every_kind_is_tiktokens_for_any_block(tmp_path, blocks):
    """Letters, digits, marks, spaces, separators and half-separators, cut anywhere the reader likes."""
    rng = random.Random(1)
    for turn in range(60):
        blocks(rng.choice([40, 64, 100, 333]))
        alphabet = rng.sample(ODD, rng.choice([1, 2, 3, 20])) + ["<|endoftext|>", "<|end"] * (turn % 3 == 0)
        text = "".join(rng.choice(alphabet) for _ in range(1500))
        (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
        if not text.replace("<|endoftext|>", ""):
            continue
        run([tmp_path / "a.txt"], tmp_path / f"out{turn}")
        assert ids_of(tmp_path / f"out{turn}") == Encoding.gpt2().encode_documents(text).tolist(), (alphabet, text[:100])


RUNS = {
    "one letter": "a" * 40_000,
    "endless ^": "^" * 40_000,
    "digits": "".join(map(str, range(9000))),
    "spaces": " " * 40_000 + "x",
    "newlines": "x" + "\n" * 40_000,
    "one ideograph": "漢" * 12_000,
    "Chinese without marks": "".join(chr(0x4E00 + n * 7919 % 5000) for n in range(12_000)),
    "DNA": "".join(random.Random(2).choice("ACGT") for _ in range(40_000)),
    "contractions": "^'re'll" * 5000,
    "Pokémon": "x" * 7 + "Pokémon" * 4000,
    "Japanese": "ドラゴンゼウス" * 1900 + "、。",
    "apostrophes": "'" * 40_000 + "s",
    "apostrophes and marks": "^-'" * 13_000,
    "letters": "".join(random.Random(3).choice("etaoinshrdlu") for _ in range(40_000)),
    "emoji": "👩‍👩‍👧‍👦" * 1600,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_a_place_to_cut_is_tiktokens_too(tmp_path, blocks, name):
    blocks(4096)
    (tmp_path / "a.txt").write_text(RUNS[name], encoding="utf-8", newline="")
    run([tmp_path / "a.txt"], tmp_path / "out")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": RUNS[name]}), encoding="utf-8")
    run([tmp_path / "a.jsonl"], tmp_path / "records", workers=2)
    expected = [50256, *Encoding.gpt2().encode(RUNS[name])]
    assert ids_of(tmp_path / "out") == expected == ids_of(tmp_path / "records")


@pytest.mark.parametrize("word", ["'re", "'s", "''ll", "''", "é'd"])
def test_a_window_never_ends_in_a_contraction(monkeypatch, word):
    monkeypatch.setattr(encode, "WINDOW", 64)
    encoding = Encoding.gpt2()
    for marks in range(120):
        run = ("^" * marks + word + "xyz" * 40).encode()
        settled = encode.settle(run, encoding)
        rest = encoding.encode_array(run[settled.end :].decode())
        assert [*settled.ids, *rest] == encoding.encode(run.decode()) and rest[0] == settled.then


def test_a_run_that_was_cut_wrongly_would_be_noticed(tmp_path, blocks, monkeypatch):
    blocks(4096)
    right = encode.settle

    def wrong(window, encoding):
        settled = right(window, encoding)
        return encode.Settled(settled.end, settled.ids, settled.then + 1)

    monkeypatch.setattr(encode, "settle", wrong)
    (tmp_path / "a.txt").write_text(RUNS["letters"])
    with pytest.raises(UserError, match="cannot be cut exactly"):
        run([tmp_path / "a.txt"], tmp_path / "out")


@pytest.mark.long
def test_tens_of_megabytes_of_code_are_tiktokens(tmp_path):
    text = bytearray()
    for path in sorted(Path(sys.prefix).rglob("*.py")):
        if len(text) < 50_000_000:
            text += path.read_bytes()
    (tmp_path / "code.txt").write_bytes(text.decode("utf-8", "ignore").encode())
    expected = Encoding.gpt2().encode_documents((tmp_path / "code.txt").read_bytes().decode())
    for fast in (True, False):
        run([tmp_path / "code.txt"], tmp_path / str(fast), workers=2, fast=fast)
        assert np.array_equal(ids_of(tmp_path / str(fast)), expected)


# ==== a faster encoder ====


def test_gigatoken_is_used_once_it_proved_equal(tmp_path, monkeypatch, shakespeare):
    pytest.importorskip("gigatoken")
    (tmp_path / "a.txt").write_text(shakespeare[:400_000] + "naïve 漢字 🙂 <|endof" * 100, encoding="utf-8")
    slow = run([tmp_path / "a.txt"], tmp_path / "slow")
    assert slow.encoder.startswith("tiktoken")  # too small for it to pay
    monkeypatch.setattr(corpus, "FAST_FROM", 1)
    fast = run([tmp_path / "a.txt"], tmp_path / "fast")
    assert fast.encoder.startswith("gigatoken") and "equal to tiktoken on" in fast.encoder
    assert same_shards(tmp_path / "slow", tmp_path / "fast")


def test_gigatoken_is_tiktoken_on_every_character_and_is_not_asked_about_those_that_are_new():
    pytest.importorskip("gigatoken")
    fast, slow = (encode.Encoder(Encoding.gpt2(), "strict", fast=fast).make() for fast in (True, False))
    codes = [code for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 1 << 16):
        text = "".join(f" {c}'m 1{c} {c}" for c in map(chr, codes[start : start + (1 << 16)]) if not encode._unknown()[ord(c)])
        assert not encode.has_new_characters(text.encode())
        assert np.array_equal(fast(text.encode()), slow(text.encode())), f"{codes[start]:x} and on"
    for new in ("\U0003315c", "\ua7ce", "\U000e0080"):
        text = f"so {new}'m 1{new}".encode()
        assert encode.has_new_characters(text) and np.array_equal(fast(text), slow(text))


@pytest.mark.parametrize("spaces", [1_040_000, 2_200_000])
def test_a_million_spaces_in_a_row_are_encoded(tmp_path, spaces):
    """Tiktoken's regex gives up where it has to go back so far."""
    (tmp_path / "a.txt").write_text("x" + " " * spaces + "y\n")
    run([tmp_path / "a.txt"], tmp_path / "out", fast=False, policy=Policy(val_fraction=0.0))
    found = ids_of(tmp_path / "out")[1:]
    assert Encoding.gpt2().decode(found) == "x" + " " * spaces + "y\n"
    few = Encoding.gpt2().encode("x" + " " * 100_000 + "y\n")
    assert found[:5000] == few[:5000] and found[-5000:] == few[-5000:]


@pytest.mark.parametrize("fault", ["other ids", "raises", "not installed"])
def test_a_faster_encoder_that_is_not_equal_is_not_used(tmp_path, monkeypatch, shakespeare, fault):
    class Tokenizer:
        @classmethod
        def from_json(cls, text):
            if fault == "raises":
                raise RuntimeError("no such\nprocessor")
            return cls()

        def encode(self, data):
            return Encoding.gpt2().encode_array(data.decode())[::-1]

    fake = types.SimpleNamespace(Tokenizer=Tokenizer) if fault != "not installed" else None
    monkeypatch.setitem(sys.modules, "gigatoken", fake)
    monkeypatch.setattr(encode, "version", lambda name: "9.9")
    monkeypatch.setattr(corpus, "FAST_FROM", 1)
    (tmp_path / "a.txt").write_text(shakespeare[:5000])
    manifest = run([tmp_path / "a.txt"], tmp_path / "out")
    why = {"other ids": "gives other ids", "raises": "cannot be used: no such", "not installed": "tiktoken 9.9"}[fault]
    assert manifest.encoder.startswith("tiktoken") and why in manifest.encoder
    assert ids_of(tmp_path / "out")[1:] == Encoding.gpt2().encode(shakespeare[:5000])


def test_gigatoken_is_made_anew_when_it_has_grown(monkeypatch, shakespeare):
    pytest.importorskip("gigatoken")
    made = []
    once = encode._Gigatoken._make
    monkeypatch.setattr(encode._Gigatoken, "_make", lambda self: (made.append(1), once(self)))
    for limit, expected in ((1 << 40, 1), (-(1 << 40), 4)):
        made.clear()
        monkeypatch.setattr(encode, "CACHE_BYTES", limit)
        monkeypatch.setattr(encode, "CACHE_TEXT", 1500)
        encoder = encode.Encoder(Encoding.gpt2(), "strict", fast=True).make()
        parts = [shakespeare[n : n + 1000] for n in range(0, 8000, 1000)]
        assert [encoder(part.encode()).tolist() for part in parts] == [Encoding.gpt2().encode(part) for part in parts]
        assert len(made) == expected


# ==== what is held out ====


def test_the_tail_of_one_document_is_held_out_and_a_document_of_its_own(tmp_path, blocks, shakespeare):
    text = shakespeare[:50_000]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    manifest = run([tmp_path / "a.txt"], tmp_path / "out", Policy(val_fraction=0.1))
    train, val = ids_of(tmp_path / "out", "train"), ids_of(tmp_path / "out", "val")
    assert train[0] == val[0] == 50256 and train[1:] + val[1:] == Encoding.gpt2().encode(text)
    assert manifest.documents == 1 and manifest.train_bytes + manifest.val_bytes == 50_000
    assert manifest.split == "tail" and abs(manifest.val_bytes - 5000) < 20
    blocks(333)
    run([tmp_path / "a.txt"], tmp_path / "small", Policy(val_fraction=0.1))
    assert ids_of(tmp_path / "small", "val") == val


def write_records(path, texts):
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))


def test_documents_are_held_out_by_their_hash_and_more_files_move_none(tmp_path, shakespeare):
    shakespeare = shakespeare.replace("<|endoftext|>", "")
    texts = [shakespeare[n * 300 : n * 300 + 300] for n in range(1000)]
    write_records(tmp_path / "b.jsonl", texts[:600])
    before = run([tmp_path / "b.jsonl"], tmp_path / "before", Policy(val_fraction=0.1))
    write_records(tmp_path / "a.jsonl", [*texts[600:], *texts[:50]])
    run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "after", Policy(val_fraction=0.1))
    assert before.split == "hashed" and before.documents == 600 and 0.05 < before.val_bytes / (600 * 300) < 0.2
    held, kept = documents_of(tmp_path / "before", "val"), documents_of(tmp_path / "before", "train")
    assert sorted(held + kept) == sorted(texts[:600])
    assert [text for text in texts[:600] if text in set(held)] == held  # in the order of the text
    held_after, kept_after = documents_of(tmp_path / "after", "val"), documents_of(tmp_path / "after", "train")
    assert set(held) <= set(held_after) and set(kept) <= set(kept_after) and not set(held_after) & set(kept_after)


def test_the_same_documents_are_held_out_of_a_text_file_and_of_records(tmp_path, blocks, shakespeare):
    shakespeare = shakespeare.replace("<|endoftext|>", "")
    texts = [shakespeare[n * 500 : n * 500 + 500 - n % 90] for n in range(200)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8", newline="")
    write_records(tmp_path / "a.jsonl", texts)
    for block in (2000, 7000):
        blocks(block)
        documents_hashed = {}
        for name in ("a.txt", "a.jsonl"):
            out = tmp_path / f"{name}-{block}"
            run([tmp_path / name], out, Policy(val_fraction=0.1, split="hashed"))
            documents_hashed[name] = documents_of(out, "val"), documents_of(out, "train")
        assert documents_hashed["a.txt"] == documents_hashed["a.jsonl"]


def test_the_split_can_be_chosen(tmp_path, text_file, shakespeare):
    with pytest.raises(UserError, match="holds out everything"):
        run([text_file], tmp_path / "a", Policy(split="hashed", val_fraction=0.999999))
    texts = [shakespeare[n * 300 : n * 300 + 300] for n in range(300)]
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    tail = run([tmp_path / "b.txt"], tmp_path / "b", Policy(split="tail"))
    assert tail.split == "tail" and documents_of(tmp_path / "b", "val")[1:] == texts[-14:]
    with pytest.raises(UserError, match="--split is 'half'"):
        Policy(split="half")


def test_what_leaves_nothing_to_train_on_is_refused_and_what_leaves_little_to_validate_on_is_told(tmp_path, text_file, gpt2):
    done = gpt2("train", text_file, *QUICK, "--val-fraction", 0.9999, "--dry-run")
    assert done.code == 1 and "--val-fraction 0.9999 leaves nothing" in done.err and "shards" not in done.err
    assert gpt2("tokenize", text_file, "--out", "tokens", "--val-fraction", 0.9999).code == 1 and not Path("tokens").exists()
    done = gpt2("train", text_file, *QUICK, "--val-fraction", 0.0001, "--dry-run")
    assert done.code == 0 and "only, which says little" in done.err
    assert "only, which" not in gpt2("train", text_file, *QUICK, "--dry-run").err


def test_the_tail_of_a_text_without_spaces_has_its_size(tmp_path):
    for n, text in enumerate(("漢字文、句読点。" * 20_000, "漢字文" * 50_000, "a" * 450_000)):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        manifest = run([tmp_path / "a.txt"], tmp_path / f"out{n}", Policy(val_fraction=0.05))
        assert manifest.split == "tail" and 0.049 < manifest.val_bytes / len(text.encode()) < 0.051


def test_a_document_after_the_separator_at_the_border_is_held_out_whole(tmp_path, shakespeare):
    texts = [shakespeare[n * 100 : n * 100 + 100] for n in range(20)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8", newline="")
    for fraction in (0.10, 0.101, 0.102, 0.103, 0.104, 0.105):
        out = tmp_path / str(fraction)
        run([tmp_path / "a.txt"], out, Policy(val_fraction=fraction, split="tail"))
        if len(documents_of(out, "train")[-1]) == 100:
            assert documents_of(out, "val") == texts[18:]
    assert documents_of(tmp_path / "0.101", "val") == texts[18:]


# ==== inputs ====


def test_folders_and_gzip_are_read_in_natural_order(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for n in (10, 2, 1):
        (tmp_path / "in" / f"part{n}.txt").write_text(f"text {n}")
    (tmp_path / "in" / "part3.txt.gz").write_bytes(gzip.compress(b"text 3"))
    (tmp_path / "in" / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "record"}\n\n{"text": ""}\n'))
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "in" / "empty.txt").touch()
    (tmp_path / "in" / ".hidden").mkdir()
    (tmp_path / "in" / ".hidden" / "a.txt").write_text("hidden")
    run([tmp_path / "in"], tmp_path / "out")
    assert documents_of(tmp_path / "out") == ["record", "text 1", "text 2", "text 3", "text 10"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("pass")
    with pytest.raises(UserError, match="--format text takes files of any name"):
        run([tmp_path / "code"], tmp_path / "none")
    run([tmp_path / "code"], tmp_path / "any", Policy(val_fraction=0, format="text"))
    assert documents_of(tmp_path / "any") == ["pass"]


def test_records_may_begin_with_a_byte_order_mark_and_null_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    run([tmp_path / "a.jsonl"], tmp_path / "out")
    assert documents_of(tmp_path / "out") == ["one", "two"]


def test_stdin_is_read_and_several_inputs_are_one_text(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b'{"body": "three"}\n')))
    policy = Policy(val_fraction=0, format="jsonl", field="body")
    manifest = run([documents.STDIN], tmp_path / "piped", policy)
    assert documents_of(tmp_path / "piped") == ["three"] and manifest.sources[0].path == "stdin"
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"three")))
    run([tmp_path / "a.txt", documents.STDIN], tmp_path / "out")
    assert documents_of(tmp_path / "out") == ["one", "two", "three"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out", "piped"]


@pytest.mark.parametrize("packed", [False, True])
def test_parquet_is_read_like_records(tmp_path, packed):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = [f"text {n} 漢" if n % 7 else None for n in range(300)]
    parquet.write_table(pyarrow.table({"n": range(300), "text": texts}), tmp_path / "a.parquet", row_group_size=90)
    if packed:
        (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    run([tmp_path / ("a.parquet.gz" if packed else "a.parquet")], tmp_path / "out")
    assert documents_of(tmp_path / "out") == [text for text in texts if text]
    for field, says in (("body", "no column 'body', but n, text"), ("n", "holds int64, expected strings")):
        with pytest.raises(UserError, match=says):
            run([tmp_path / "a.parquet"], tmp_path / "bad", Policy(field=field))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole parquet file"):
        run([tmp_path / "a.parquet"], tmp_path / "bad")


def test_parquet_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        run([tmp_path / "a.parquet"], tmp_path / "out")


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"<|endoftext|><|endoftext|>", "holds no text"),
        ("a.txt", b"fine so far \xff and on", "0xff at offset 12"),
        ("a.txt", b"x" * 60 + "é".encode()[:1], "offset 60"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0", "zero byte at offset 8"),
        ("a.txt", "hello".encode("utf-16"), "is UTF-16"),
        ("a.txt", gzip.compress(b"hello"), "gzipped: give it a name that ends in .gz"),
        ("a.txt.gz", gzip.compress(bytes(range(1, 128)) * 100)[:-20], "not a whole gzip file"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": "a\xff"}\n', r"line 3 is not UTF-8: byte 0xff at offset 28"),
        ("a.jsonl", b'{"title": "t", "body": "b"}\n', "line 1 has no field 'text', but the fields title, body"),
        ("a.jsonl", b'["text"]\n', "line 1 has no field 'text', but a list"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' holds int"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"line 1: \\ud83d is half a character"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "holds no text"),
        ("a.parquet", b"PAR1 or not", "not a whole parquet file"),
    ],
)
def test_a_bad_text_is_named_with_the_place(tmp_path, blocks, name, data, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    blocks(16)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        run([tmp_path / name], tmp_path / "out")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_a_record_longer_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "RECORD_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + json.dumps({"text": "x" * (1 << 20)}))
    with pytest.raises(UserError, match="line 2 is longer than 1 MB"):
        run([tmp_path / "a.jsonl"], tmp_path / "out")


@pytest.mark.parametrize("block", [40, 60, 1 << 20])
def test_bad_bytes_can_be_replaced(tmp_path, blocks, block):
    blocks(block)
    data = b"one \xff two\xe2\x82 three\xf0\x9f x" + b"ab\xff" * 40 + b"\xe2\x82\xac\xe2\x82" + b"\xc3" * 3 + b" end " * 30
    (tmp_path / "bad.txt").write_bytes(data)
    run([tmp_path / "bad.txt"], tmp_path / "out", Policy(val_fraction=0, errors="replace"))
    assert ids_of(tmp_path / "out")[1:] == Encoding.gpt2().encode(data.decode("utf-8", "replace"))
    assert not find_shards(tmp_path / "out", "val")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a\xffb \\ud83d"}')
    run([tmp_path / "bad.jsonl"], tmp_path / "records", Policy(val_fraction=0, errors="replace"))
    assert documents_of(tmp_path / "records") == ["a\ufffdb \ufffd"]


def test_a_text_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, text_file):
    choose = encode.choose

    def meanwhile(*arguments, **more):
        text_file.write_text("something else")
        return choose(*arguments, **more)

    monkeypatch.setattr(encode, "choose", meanwhile)
    with pytest.raises(UserError, match="changed while it was read"):
        run([text_file], tmp_path / "out")


# ==== interrupted ====


@pytest.mark.parametrize("kind", ["one text", "many documents", "records", "gzip", "a run", "tail", "parquet", "nanogpt"])
def test_interrupted_work_goes_on_and_is_byte_identical(tmp_path, blocks, monkeypatch, shakespeare, kind):
    blocks(4000)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    text = shakespeare[:60_000]
    documents_there = [text[n : n + 700] for n in range(0, 60_000, 700)]
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    if kind in ("one text", "tail", "nanogpt"):
        inputs[0].write_text(text[:45_000], encoding="utf-8")
    elif kind == "many documents":
        inputs[0].write_text("<|endoftext|>".join(documents_there), encoding="utf-8")
    elif kind == "records":
        inputs[0] = tmp_path / "a.jsonl"
        write_records(inputs[0], documents_there)
    elif kind == "gzip":
        inputs[0] = tmp_path / "a.txt.gz"
        inputs[0].write_bytes(gzip.compress(text.encode()))
    elif kind == "a run":
        inputs[0].write_text(RUNS["letters"])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        inputs[0] = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"text": documents_there}), inputs[0], row_group_size=20)
    inputs[1].write_text(text[45_000:50_000] + "<|endoftext|>", encoding="utf-8")
    policy = Policy(val_fraction=0.4, split="tail") if kind == "tail" else Policy(val_fraction=0.2)
    more = {"shard_tokens": 3000, "layout": "nanogpt" if kind == "nanogpt" else "llmc"}
    whole = run(inputs, tmp_path / "whole", policy, **more)

    begun = []
    for stop in (1, 1, 2, 1, 1) if kind == "tail" else (1, 1, 2, 1):  # batches until the next Ctrl-C
        once = encode.encode_batch

        def interrupted(batch, *rest, left=[stop], once=once):  # noqa: B006
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return once(batch, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encode, "encode_batch", interrupted)
            run(inputs, tmp_path / "out", policy, **more)
        state = json.loads((tmp_path / ".out.partial" / "state.json").read_text())
        begun.append(state["bytes"])
        with (tmp_path / ".out.partial" / "tokens" / "train_000001.bin").open("ab") as file:
            file.write(b"what was written after the state was saved")
    assert begun == sorted(set(begun)) and begun[0] > 0  # each one went on
    assert run(inputs, tmp_path / "out", policy, **more) == whole
    assert same_shards(tmp_path / "whole", tmp_path / "out") and not (tmp_path / ".out.partial").exists()


def test_what_is_left_of_other_work_is_not_gone_on_with(tmp_path, blocks, monkeypatch, text_file, shakespeare):
    blocks(4000)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("gpt2cli.corpus.ShardWriter.close", full_disk)
        run([text_file], tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial" / "state.json").exists()
    text_file.write_text(shakespeare[300_000:360_000], encoding="utf-8")
    run([text_file], tmp_path / "out")
    assert ids_of(tmp_path / "out")[1:] == Encoding.gpt2().encode(shakespeare[300_000:360_000])


def test_work_is_not_gone_on_with_on_the_shards_of_other_work(tmp_path, blocks, monkeypatch, shakespeare):
    blocks(4000)
    texts = {"x": shakespeare[:60_000], "y": shakespeare[300_000:380_000]}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    for name, seconds in (("x", 0.0), ("y", 1e9)):  # y stops before it saved its state
        monkeypatch.setattr(corpus, "SAVE_SECONDS", seconds)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr("gpt2cli.corpus.ShardWriter.close", full_disk)
            run([tmp_path / f"{name}.txt"], tmp_path / "out")
    run([tmp_path / "x.txt"], tmp_path / "out")
    assert ids_of(tmp_path / "out")[1:] == Encoding.gpt2().encode(texts["x"])


def test_records_that_end_with_a_separator_can_be_gone_on_with(tmp_path):
    write_records(tmp_path / "a.jsonl", [f"text {n}<|endoftext|>" for n in range(9)])
    with documents.opened([tmp_path / "a.jsonl"]) as (text,):
        pieces = list(cut_up(documents.read(text, "strict"), plain=False, inside=False))
    assert len(pieces) == 9 and all(piece.after for piece in pieces)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("after", [0.3, 0.8])
def test_workers_go_quietly_with_their_parent(tmp_path, number, after):
    # With a letter that is none, which is left to tiktoken: gigatoken may be through before the signal comes.
    (tmp_path / "a.txt").write_text("Many words, and more of them \u0378.\n" * 3_000_000, encoding="utf-8")
    command = [sys.executable, "-m", "gpt2cli", "tokenize", "a.txt", "--out", "out", "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path, start_new_session=True, text=True) as process:
        deadline = time.monotonic() + 60
        while not (begun := children(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(after)
        begun += children(process.pid)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        _, err = process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in begun) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert begun and not any(alive(pid) for pid in begun)
    assert number == signal.SIGKILL or ("Traceback" not in err and "interrupted" in err)


def children(parent):
    done = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_too_small_is_told_first(tmp_path, monkeypatch, text_file):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the shards need about .* kB, but the disk of .* has .* free"):
        run([text_file], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.txt"]


def test_work_that_was_cut_short_is_not_finished(tmp_path, monkeypatch, text_file):
    monkeypatch.setattr("gpt2cli.shards.CHECKED_BYTES", 0)
    for layout, name in (("llmc", "train_000000.bin"), ("nanogpt", "train.bin")):
        run([text_file], tmp_path / layout, layout=layout)
        os.truncate(tmp_path / layout / name, 20_000)
        with pytest.raises(UserError, match="already exists and was made of"):
            run([text_file], tmp_path / layout, layout=layout)


def test_a_text_under_another_kind_of_name_is_other_work(tmp_path):
    cache = tmp_path / "cache"
    made = {}
    for name in ("a.txt", "a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "one", "body": "two"}\n')
        policy = Policy(val_fraction=0, field="body" if name == "b.jsonl" else "text")
        made[name] = documents_of(corpus.cached([tmp_path / name], cache, encoding=Encoding.gpt2(), policy=policy))
    assert made == {"a.txt": ['{"text": "one", "body": "two"}\n'], "a.jsonl": ["one"], "b.jsonl": ["two"]}


def test_a_damaged_cache_is_made_anew(tmp_path, text_file):
    policy = Policy(val_fraction=0)
    folder = corpus.cached([text_file], tmp_path / "cache", encoding=Encoding.gpt2(), policy=policy)
    (folder / "train_000000.bin").write_bytes(b"damaged")
    assert corpus.cached([text_file], tmp_path / "cache", encoding=Encoding.gpt2(), policy=policy) == folder
    assert ids_of(folder)[1:] == Encoding.gpt2().encode(text_file.read_text(encoding="utf-8"))


def test_finished_work_is_kept_and_other_work_is_never_overwritten(tmp_path, text_file):
    first = run([text_file], tmp_path / "out")
    stamp = (tmp_path / "out" / "train_000000.bin").stat().st_mtime_ns
    assert run([text_file], tmp_path / "out") == first
    assert (tmp_path / "out" / "train_000000.bin").stat().st_mtime_ns == stamp
    for other in ({"policy": Policy(val_fraction=0.2)}, {"shard_tokens": 500}, {"layout": "nanogpt"}):
        with pytest.raises(UserError, match="already exists and was made of"):
            run([text_file], tmp_path / "out", **other)


def test_a_file_in_the_way_is_told_before_anything_is_read(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(corpus, "survey", None)
    with pytest.raises(UserError, match=r"input\.txt already exists and is a file"):
        run([text_file], text_file)


@pytest.mark.parametrize(
    "options, says",
    [
        (("--show", "--train-vocab", 300, "--out", "zz", "--json"), "--out, --train-vocab, --json do nothing with --show"),
        (("--show", "--val-fraction", 0.05), "--val-fraction does nothing with --show"),  # its default, but given
        (("--decode", "--show"), "--show does nothing with --decode"),
        (("--to", "nanogpt", "--shard-tokens", 5), "--shard-tokens is for shards"),
        (("--decode", "--plain", "--field", "body"), "--field, --plain do nothing with --decode"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(gpt2, text_file, options, says):
    done = gpt2("tokenize", text_file, *options)
    assert (done.code, done.out) == (1, "") and says in done.err


def test_options_that_say_how_to_read_go_with_show(gpt2, tmp_path):
    (tmp_path / "a.txt").write_text('{"body": "Hello"}')
    done = gpt2("tokenize", "a.txt", "--show", "--format", "jsonl", "--field", "body", "--plain", "--errors", "replace")
    assert done.code == 0 and "15496" in done.out


# ==== for nanoGPT ====


def test_nanogpts_files_are_its_own(tmp_path, text_file):
    manifest = run([text_file], tmp_path / "out", Policy(), layout="nanogpt", shard_tokens=100)
    assert sorted(manifest.files) == ["train.bin", "val.bin"]
    data = np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r")  # as its train.py opens it
    run([text_file], tmp_path / "ours", Policy())
    assert data.tolist() == ids_of(tmp_path / "ours") == ids_of(tmp_path / "out")


# ==== with a vocabulary of one's own ====


def test_an_own_vocabulary_is_of_the_training_split_and_goes_on_after_an_interrupt(tmp_path, blocks, monkeypatch, shakespeare):
    blocks(4000)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    text = shakespeare[:60_000] + " zyzzogeton" * 1000  # the tail has a word of its own
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    policy = Policy(val_fraction=0.2, split="tail")
    whole = run([tmp_path / "a.txt"], tmp_path / "whole", policy, train_vocab=600)
    own = Encoding.from_folder(tmp_path / "whole")
    assert own.n_vocab == 600 == whole.vocab_size and own.sha256 == whole.tokenizer_sha256
    assert not any(b"zyz" in token for token in own.ids)
    train, val = ids_of(tmp_path / "whole"), ids_of(tmp_path / "whole", "val")
    assert train[0] == val[0] == own.eot == 599 and train[1:] + val[1:] == own.encode(text)

    once, trained = encode.encode_batch, []

    def interrupted(batch, *rest):
        if len(trained) < 5:
            trained.append(1)
            return once(batch, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode, "encode_batch", interrupted)
        run([tmp_path / "a.txt"], tmp_path / "out", policy, train_vocab=600)
    monkeypatch.setattr("gpt2cli.vocabulary.train", None)  # it is not trained again
    assert run([tmp_path / "a.txt"], tmp_path / "out", policy, train_vocab=600) == whole
    assert same_shards(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(UserError, match="already exists and was made of"):
        run([tmp_path / "a.txt"], tmp_path / "out", policy, train_vocab=601)
