"""A trained vocabulary: numbered as GPT-2's, the same every time, and the same ids in transformers."""

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest

from gpt2cli import vocabulary
from gpt2cli.errors import UserError
from gpt2cli.tokenizer import Encoding, byte_of_character

from .conftest import make_model

ODD = [
    "",
    " ",
    "\n\n\n  \t\r\n x  ",
    "naïve café, e\u0301 a\u0300",
    "日本語のテキスト、です。",
    "🙂🙃 emoji 👩‍👩‍👧 🇪🇺",
    "\u00a0\u2003\u200b\u2028\x00\x1c\x85\ufeff\U000e0001\U0010ffff",
    "I'll don't 've DON'T 's",
    "def f(x):\n\treturn {'a': [1, 2, 3]}  # 0x1F_600\n\n\n",
    "مرحبا بالعالم नमस्ते ١٢٣ Ⅻ ½ ²",
    "a" * 5000,
    " " * 5000 + "x",
]
# GPT-2's pre-tokenizer in the standard library's terms, for ASCII.
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def text(shakespeare):
    return shakespeare[:300_000]


@pytest.fixture(scope="module")
def encoding(text):
    return vocabulary.train([text], 1000)


def test_it_is_numbered_as_gpt2s_and_has_just_the_size_asked_for(encoding):
    assert encoding.n_vocab == 1000 and encoding.eot == 999 and len(encoding.merges) == 1000 - 257
    by_id = sorted(encoding.ids, key=lambda token: encoding.ids[token])
    assert by_id[:256] == [bytes([byte]) for byte in byte_of_character().values()]
    assert by_id[256:] == [left + right for left, right in encoding.merges]
    assert [encoding.ids[bytes([byte])] for byte in range(256)] == [Encoding.gpt2().ids[bytes([byte])] for byte in range(256)]
    assert encoding.encode("a<|endoftext|>", special=True)[-1] == 999


def test_each_merge_is_the_most_frequent_pair_of_what_those_before_it_left(text):
    text = text[:6000]
    assert text.isascii()
    merges = vocabulary.train([text], 257 + 150).merges
    words = Counter(tuple(bytes([byte]) for byte in word.encode()) for word in WORDS.findall(text))
    for left, right in merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        assert pairs[left, right] == max(pairs.values()) >= 2
        words = Counter({join(word, left, right): count for word, count in words.items()})


def join(word, left, right):
    out, n = [], 0
    while n < len(word):
        both = word[n : n + 2] == (left, right)
        out.append(left + right if both else word[n])
        n += 1 + both
    return tuple(out)


@pytest.mark.parametrize("odd", ODD)
def test_decoding_gives_the_text_back(encoding, odd):
    assert encoding.decode(encoding.encode(odd)) == odd


def test_it_is_shorter_than_bytes_and_than_other_texts_vocabulary(encoding, text):
    python = vocabulary.train(["def train(self):\n    return self.value[0] + 1\n" * 20], 280)
    assert len(encoding.encode(text)) < 0.5 * len(text) < len(python.encode(text))


def test_transformers_gives_the_same_ids_and_we_read_the_folder_back(encoding, text, tmp_path):
    from transformers import AutoTokenizer

    encoding.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for odd in [*ODD, text[:20_000]]:
        assert theirs(odd)["input_ids"] == encoding.encode(odd)
        assert theirs.decode(encoding.encode(odd), clean_up_tokenization_spaces=False) == odd
    assert theirs("a<|endoftext|>")["input_ids"][-1] == theirs.eos_token_id == encoding.eot and len(theirs) == 1000
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Encoding.from_folder(path).sha256 == encoding.sha256
    with pytest.raises(UserError, match=r"config\.json"):
        Encoding.from_folder(tmp_path / "config.json")


def test_a_model_with_it_is_sampled_from(encoding, gpt2, tmp_path):
    folder = tmp_path / "model"
    make_model(vocab_size=encoding.n_vocab).save_pretrained(folder)
    encoding.save(folder)
    done = gpt2("sample", folder, "--prompt", "First Citizen", "--max-new-tokens", 9, "--ignore-eos")
    assert done.code == 0 and done.out.startswith("First Citizen") and "9 tokens" in done.err
    assert "brings no tokenizer" not in done.err


# ==== the same every time ====

PROGRAM = """
from gpt2cli import vocabulary
print(vocabulary.train([open("text", encoding="utf-8").read()], 1000).sha256)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "2"},
        {"PYTHONHASHSEED": "3", "TOKENIZERS_PARALLELISM": "false"},
    ],
)
def test_another_process_trains_the_same_and_prints_nothing(encoding, text, tmp_path, environment):
    (tmp_path / "text").write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (encoding.sha256 + "\n", "")


def test_pieces_cut_before_a_space_train_as_the_whole_text(encoding, text, monkeypatch):
    assert vocabulary.train([text], 1000).sha256 == encoding.sha256
    assert vocabulary.train(re.split(r"(?<=\S)(?=\s)", text), 1000).sha256 == encoding.sha256
    monkeypatch.setattr(vocabulary, "PIECE", 500)
    cut = text.index(" ", 100_000)
    assert vocabulary.train([text[:cut], "", text[cut:]], 1000).sha256 == encoding.sha256
    pieces = list(vocabulary._pieces([text]))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 1000 < len(pieces) * 2


def test_a_stream_is_read_as_it_comes_and_its_error_is_the_callers():
    def texts():
        yield "hello " * 100
        raise UserError("the text ends in the middle")

    with pytest.raises(UserError, match="in the middle"):
        vocabulary.train(texts(), 260)


# ==== texts that are not prose ====


@pytest.mark.parametrize("run", ["a" * 1_000_000, " " * 1_000_000, "=-" * 500_000, "\n" * 1_000_000, "日" * 300_000])
def test_a_run_without_end_takes_no_time_to_speak_of(run, shakespeare):
    started = time.process_time()
    encoding = vocabulary.train([run, " ", shakespeare[:50_000]], 600)
    assert time.process_time() - started < 20  # under a second; uncut, 300,000 letters take 44 s and a million minutes
    assert encoding.n_vocab == 600 and encoding.decode(encoding.encode(run)) == run
    assert max(map(len, encoding.ids)) <= vocabulary.LONGEST


def test_a_literal_separator_and_every_byte_break_nothing():
    draw = random.Random(0)
    odd = "".join(chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(20_000))
    text = "one<|endoftext|>two <|endoftext|>" * 50 + odd
    encoding = vocabulary.train([text], 500)
    assert encoding.n_vocab == 500 and encoding.decode(encoding.encode(text)) == text
    assert encoding.eot not in encoding.encode(text) and b"<|endoftext|>" not in encoding.ids


def test_no_merges_at_all_is_a_vocabulary_of_bytes():
    encoding = vocabulary.train([], 257)
    assert encoding.n_vocab == 257 and encoding.encode("aé") == [Encoding.gpt2().ids[bytes([n])] for n in "aé".encode()]


@pytest.mark.parametrize("n_vocab", [-1, 0, 256, 65_537, 10**9])
def test_a_size_out_of_range_is_refused_before_the_text_is_read(n_vocab):
    def unread():
        raise AssertionError("was read")
        yield

    with pytest.raises(UserError, match="257 to 65,536"):
        vocabulary.train(unread(), n_vocab)


def test_a_text_too_small_says_how_many_tokens_it_yields():
    with pytest.raises(UserError, match=r"vocabulary of 300: it yields 259 \(256 bytes, 2 merges"):
        vocabulary.train(["abc abc"], 300)
    assert vocabulary.train(["abc", "abc"], 259).encode("abc") == [257]
    with pytest.raises(UserError, match="257 at most"):
        vocabulary.train([], 258)


# ==== the check ====


def test_merges_that_two_libraries_would_read_differently_are_found():
    # `abc` is a token, but `ab` is joined first: tokenizers then stops at ab + c, tiktoken makes it `abc`.
    with pytest.raises(UserError, match=r"b'abc'\) does not merge to itself"):
        vocabulary.check(Encoding.from_merges(["a b", "b c", "a bc"]), [])
    vocabulary.check(Encoding.from_merges(["b c", "a bc"]), ["abc xbc"])


def test_other_ids_than_transformers_on_the_text_itself_are_found(encoding, monkeypatch):
    vocabulary.check(encoding, ODD)
    monkeypatch.setattr(Encoding, "encode", lambda self, text, special=False: [0])
    with pytest.raises(UserError, match="other ids"):
        vocabulary.check(encoding, ["First Citizen"])


def test_what_is_tried_comes_from_all_of_the_text():
    sample = []
    assert list(vocabulary._keep_some(map(str, range(1, 101)), sample)) == [str(n) for n in range(1, 101)]
    assert sample == ["1", "2", "4", "8", "16", "32", "64"]
