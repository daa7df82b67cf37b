"""Looking at tokens: --show and --decode of `gpt2 tokenize`, called as the command calls them."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2cli import corpus, look, vocabulary
from gpt2cli.commands import show
from gpt2cli.documents import Chunk
from gpt2cli.errors import UserError
from gpt2cli.pieces import Piece, cut_up
from gpt2cli.shards import ShardWriter
from gpt2cli.tokenizer import Encoding, StreamDecoder

GPT2 = Encoding.gpt2()
TEXT = 'He said: "tab\there"\n\n  naïve 日本 👩‍👩‍👧 \\n \x1b[31m red \u009b \u2028 [bold]<|endoftext|>end'


@pytest.fixture(autouse=True)
def plain_output(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def forced_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")


def piece(text):
    return Piece(text.encode(), len(text), False, 0.0, None)


def drawn(capsys, text, *, plain=False):
    show.show(cut_up([Chunk(text.encode(), True, 0)], plain=plain, inside=False), GPT2, "strict")
    return capsys.readouterr().out


# ==== show ====


def test_away_from_a_terminal_each_token_is_a_line_of_its_id_and_json(capsys):
    lines = drawn(capsys, TEXT).split("\n")
    assert lines.pop() == ""
    pairs = [line.split("\t") for line in lines]
    ids = [int(n) for n, _ in pairs]
    assert ids == GPT2.encode(TEXT, special=True) and 50256 in ids
    for n, written in pairs:
        token = GPT2.token_bytes(int(n))
        assert json.loads(written) == token.decode("utf-8", "backslashreplace")
        assert written.isprintable()
    assert "\\xf0\\x9f\\x91" in [json.loads(written) for _, written in pairs]  # the first half of a character


def test_plain_shows_a_separator_as_text(capsys):
    assert drawn(capsys, "a<|endoftext|>b").splitlines()[1] == '50256\t"<|endoftext|>"'
    assert drawn(capsys, "<|endoftext|>", plain=True).splitlines()[0] == '27\t"<"'


def test_a_terminal_shows_the_text_in_two_colours_with_the_ids_behind(capsys, forced_terminal):
    text = 'Hello "world"[bold]\n\x1b[31mé'
    out = drawn(capsys, text)
    cyan, yellow, dim = "\x1b[30;46m", "\x1b[30;43m", "\x1b[2m"
    assert out.startswith(f'{cyan}Hello\x1b[0m{dim}15496 \x1b[0m{yellow} "\x1b[0m{dim}366 \x1b[0m{cyan}world\x1b[0m')
    colours = re.findall(r"\x1b\[30;4(\d)m", out)
    assert "".join(colours) == ("63" * 20)[: len(GPT2.encode(text))]
    seen = re.sub(r"\x1b\[[\d;]*m", "", out)  # what was an escape in the text does nothing
    assert seen == 'Hello15496  "366 world6894 "[17912 bold36575 ]60 \\n198 \n\\u001b215 [58 313132 m76 é2634 \n'


def test_a_long_line_is_drawn_whole_and_no_break_is_put_into_it(capsys, forced_terminal):
    out = re.sub(r"\x1b\[[\d;]*m", "", drawn(capsys, "word " * 3000))
    assert out.count("\n") == 1 and out.count("1573 ") == 2999


def test_a_line_without_end_is_drawn_as_it_comes(capsys, forced_terminal):
    def texts():
        yield piece("word " * 3000)
        assert len(capsys.readouterr().out) > 10_000
        yield piece("word")

    show.show(texts(), GPT2, "strict")


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_gets_lines(capsys, forced_terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert drawn(capsys, "Hello world") == '15496\t"Hello"\n995\t" world"\n'


def test_tokens_are_shown_before_the_next_text_is_read(capsys):
    def texts():
        yield piece("Hello")
        assert seen == [15496]
        yield piece(" world")

    seen: list[int] = []
    for n, _ in look.tokens(texts(), GPT2):
        seen.append(n)
    assert seen == [15496, 995]


CLOSED = """
import itertools, sys
from gpt2cli.commands import app, show
from gpt2cli.pieces import Piece
from gpt2cli.tokenizer import Encoding
hello = Piece(b"Hello world\\n", 12, False, 0.0, None)
@app.app.command("endless")
def endless():
    {what}
sys.exit(app.run(["endless"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TERM": "xterm"}])
@pytest.mark.parametrize(
    "what",
    ["show.show(itertools.repeat(hello), Encoding.gpt2(), 'strict')", "show.show([hello], Encoding.gpt2(), 'strict')",
     "show.decode(['ones.bin'])", "show.decode(['15496'])"],
)  # fmt: skip
def test_a_reader_that_leaves_is_no_error(what, environment):
    np.ones(10_000_000, dtype="<u2").tofile("ones.bin")
    command, pipe = [sys.executable, "-c", CLOSED.format(what=what)], subprocess.PIPE
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# ==== decode ====


def decoded(capsys, *what, **options):
    show.decode([str(word) for word in what], **options)
    return capsys.readouterr().out


def from_stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def tokens(text_file):
    """A folder of shards of 1,000 tokens, with a separator first."""
    corpus.tokenize([text_file], Path("tokens"), encoding=GPT2, shard_tokens=1000)
    return Path("tokens")


def test_ids_become_text(capsys):
    assert decoded(capsys, 15496, 995) == decoded(capsys, "15496,995") == "Hello world\n"
    assert decoded(capsys, 15496, 198) == "Hello\n"
    assert decoded(capsys, 50256, 64) == "<|endoftext|>a\n"
    assert decoded(capsys, 41840) == "\ufffd\n"  # the first half of a character


def test_ids_come_from_standard_input_as_it_comes(capsys, monkeypatch):
    from_stdin(monkeypatch, b" 15496, 995\n\t198 ,0\n")
    assert decoded(capsys, "-") == "Hello world\n!\n"
    ids = GPT2.encode(TEXT, special=True)
    written = " ".join(map(str, ids))
    assert [n for block in look.parse_ids(written) for n in block] == ids  # a character at a time
    from_stdin(monkeypatch, written.encode())
    assert decoded(capsys, "-") == TEXT + "\n"
    from_stdin(monkeypatch, b"")
    assert decoded(capsys, "-") == "\n"


def test_what_a_pipe_has_is_taken_without_waiting_for_more(monkeypatch):
    class Slow(io.RawIOBase):
        reads = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.reads += 1
            assert self.reads == 1
            buffer[:6] = b"15496 "
            return 6

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Slow())))
    assert next(look.decode(["-"], stdin=show._standard_input())) == "Hello"


def test_what_was_shown_decodes_to_the_text(capsys, monkeypatch):
    ids = "\n".join(line.split("\t")[0] for line in drawn(capsys, TEXT).splitlines())
    from_stdin(monkeypatch, ids.encode())
    assert decoded(capsys, "-") == TEXT + "\n"


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_a_shard_or_the_training_split_of_a_folder_becomes_its_text(capsys, tokens, text_file, monkeypatch, block):
    monkeypatch.setattr(look, "BLOCK", block)
    text = "<|endoftext|>" + text_file.read_text(encoding="utf-8")
    everything = decoded(capsys, tokens)
    assert text.startswith(everything.rstrip("\n")) and 0.9 * len(text) < len(everything) < len(text)
    parts = [decoded(capsys, path).removesuffix("\n") for path in sorted(tokens.glob("train*"))]
    assert len(parts) > 20 and "".join(parts).replace("\n", "") == everything.replace("\n", "")
    ids = [50256, *GPT2.encode(text_file.read_text(encoding="utf-8"))]
    for written, part in (("0:100", ids[:100]), (":3", ids[:3]), ("990:2010", ids[990:2010])):
        assert decoded(capsys, tokens, tokens_range=written).rstrip("\n") == GPT2.decode(part).rstrip("\n")
    first = tokens / "train_000000.bin"
    assert decoded(capsys, first, tokens_range="998:").rstrip("\n") == GPT2.decode(ids[998:1000]).rstrip("\n")


def test_a_character_of_several_blocks_is_whole(capsys, monkeypatch):
    monkeypatch.setattr(look, "BLOCK", 1)
    np.asarray(GPT2.encode("👩‍👩‍👧"), dtype="<u2").tofile("train.bin")
    pieces = list(look.decode(["train.bin"]))
    assert "".join(pieces) == "👩‍👩‍👧" and len(pieces) > 5 and "\ufffd" not in "".join(pieces)
    decoder = StreamDecoder(GPT2)
    assert decoder.feed_all(GPT2.encode("👩")[:-1]) == "" and decoder.feed(GPT2.encode("👩")[-1]) == "👩"


def test_a_shard_is_read_with_the_vocabulary_beside_it(capsys, text_file, tmp_path):
    text = text_file.read_text(encoding="utf-8")
    own = vocabulary.train([text], 500)
    corpus.tokenize([text_file], tmp_path / "own", encoding=own)
    shard = tmp_path / "own" / "train_000000.bin"
    (tmp_path / "own" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"another vocabulary than this one of 50,257"):
        decoded(capsys, shard, tokens_range="0:100")
    given = decoded(capsys, shard, tokens_range="0:100", encoding=own)
    assert text.startswith(given.removeprefix("<|endoftext|>").rstrip("\n")) and len(given) > 100
    own.save(tmp_path / "own")
    assert decoded(capsys, shard, tokens_range="0:100") == decoded(capsys, shard.parent, tokens_range="0:100") == given
    with pytest.raises(UserError, match="another vocabulary"):
        decoded(capsys, shard, encoding=GPT2)


@pytest.mark.parametrize(
    "what, tokens_range, says",
    [
        ([], None, "nothing to decode"),
        (["50257"], None, "token id 50257 is not in the vocabulary of 50,257"),
        (["hello"], None, "'hello' is neither a token id nor a token shard"),
        (["x" * 5000], None, "neither a token id"),
        (["a\0b"], None, "neither a token id"),
        (["15496", "-5"], None, "'-5' is neither"),
        (["9" * 5000], None, "neither a token id"),
        (["1.5"], None, "neither a token id"),
        (["-", "5"], None, "'-' is neither"),
        (["tokens", "5"], None, "tokens is not a token id"),
        (["tokens", "tokens"], None, "one folder of shards"),
        (["15496"], "0:1", "--range 0:1 is for a token shard"),
        (["input.txt"], None, "gpt2 tokenize input.txt"),
        (["empty"], None, "empty holds no train shards"),
        (["torn.bin"], None, "torn.bin has 3 bytes"),
        (["large.npy"], None, "token id 70000 is not in the vocabulary"),
        (["negative.npy"], None, "holds id -1 at token 1"),
        (["tokens/train_000000.bin"], "0:1001", "has 1,000 tokens, at positions 0 to 999"),
        (["tokens/train_000000.bin"], "1001:", "has 1,000 tokens, at positions 0 to 999"),
        (["tokens/train_000000.bin"], "1000:", "--range 1000: is empty"),
        (["tokens/train_000000.bin"], "5:5", "--range 5:5 is empty"),
        (["tokens/train_000000.bin"], "9:5", "--range 9:5 is empty"),
        (["tokens/train_000000.bin"], "0:0", "--range 0:0 is empty"),
        (["tokens/train_000000.bin"], "-5:5", "--range -5:5: expected START:END"),
        (["tokens/train_000000.bin"], "100", "--range 100: expected START:END"),
        (["tokens/train_000000.bin"], "", "expected START:END"),
        (["tokens/train_000000.bin"], "a:b", "expected START:END"),
        (["tokens/train_000000.bin"], "0:" + "9" * 5000, "expected START:END"),
    ],
)
def test_a_mistake_is_named_and_prints_nothing(capsys, tokens, what, tokens_range, says):
    Path("empty").mkdir()
    Path("torn.bin").write_bytes(b"abc")
    np.save("large.npy", np.array([1, 70_000]))
    np.save("negative.npy", np.array([1, -1]))
    with pytest.raises(UserError, match=re.escape(says)) as error:
        decoded(capsys, *what, tokens_range=tokens_range)
    assert capsys.readouterr().out == "" and "\n" not in str(error.value)


@pytest.mark.parametrize("data, says", [(b"15496 x", "'x' is not"), (b"1 \xff", "not a token id"), (b"1 -2", "'-2' is not")])
def test_standard_input_that_is_not_ids_is_refused(capsys, monkeypatch, data, says):
    from_stdin(monkeypatch, data)
    with pytest.raises(UserError, match=re.escape(says)):
        decoded(capsys, "-")


def test_a_number_without_end_is_refused_at_once():
    def endless():
        while True:
            yield "0" * 1000

    with pytest.raises(UserError, match="is not a token id"):
        list(look.parse_ids(endless()))


def test_a_folder_of_others_is_read_with_gpt2s(capsys, tmp_path):
    writer = ShardWriter(tmp_path, "fineweb_train")
    writer.write(np.array(GPT2.encode("Hello world")))
    writer.close()
    assert decoded(capsys, tmp_path) == "Hello world\n"
