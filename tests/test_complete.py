"""Text from text: stop strings, streaming, files of prompts, and the command around them."""

import codecs
import io
import json
import random
from pathlib import Path

import pytest

from gpt2cli import Encoding
from gpt2cli.commands import sample
from gpt2cli.complete import InOrder, _Text, complete, read_prompts
from gpt2cli.config import SamplingConfig
from gpt2cli.errors import UserError
from gpt2cli.generate import Chosen

from .conftest import make_model

BYTES = Encoding({bytes([n]): n for n in range(256)}, [], eot=256)


def told(text, stop, ids=None):
    """Feed a text byte by byte, as a model would choose it; the pieces that were shown, and the sample."""
    one, pieces = _Text(BYTES, stop, logprobs=False), []
    for token in ids or text.encode():
        stopped = one.add(token)
        one.take(Chosen(0, token, "stop" if stopped else None))
        pieces.append(one.certain())
        if stopped:
            return pieces, one.sample
    one.take(Chosen(0, None, "stop"))
    return [*pieces, one.certain()], one.sample


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("ab END cd", ["END"], "ab "),
        ("ab EN cd", ["END"], "ab EN cd"),
        ("aaab", ["aab"], "a"),
        ("ab\n\ncd\n", ["\n\n", "cd"], "ab"),
        ("xcdab", ["ab", "cdab"], "x"),  # the earliest beginning of those that end together
        ("héé🙂x", ["🙂"], "héé"),
        ("no", [], "no"),
        ("EEND", ["END"], "E"),
    ],
)
def test_text_ends_before_a_stop_string_and_nothing_of_it_is_ever_shown(text, stop, expected):
    pieces, sample = told(text, stop)
    assert sample.text == "".join(pieces) == expected and sample.finish_reason == "stop"


def test_stop_strings_in_random_texts_are_found_as_a_plain_search_finds_them():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choice("abc") for _ in range(12))
        stop = ["".join(draw.choice("abc") for _ in range(draw.randrange(1, 5))) for _ in range(draw.randrange(3))]
        ends = {
            min((text.find(s) + len(s), text.find(s)) for s in stop if s in text) for _ in "x" if any(s in text for s in stop)
        }
        expected = text[: min(begin for end, begin in ends)] if ends else text
        pieces, sample = told(text, stop)
        assert "".join(pieces) == sample.text
        end = min((end for end, _ in ends), default=len(text))
        firsts = [text[:end].find(s) for s in stop if s in text[:end]]
        assert sample.text == (text[: min(firsts)] if firsts else expected)


def test_half_characters_are_not_shown():
    pieces, sample = told("", [], ids=list("é".encode())[:1])
    assert pieces == ["", "\ufffd"] and sample.text == "\ufffd"


def test_completing_stops_at_strings_that_the_model_writes_over_several_tokens():
    model = make_model(vocab_size=257)
    config = SamplingConfig(max_new_tokens=25, seed=3, temperature=2.0)
    free = complete(model, BYTES, ["ab", "c"], config, ignore_eos=True)
    text = free.samples[0].text
    stop = text[6:9]
    shown: dict[int, str] = {0: "", 1: ""}
    cut = complete(
        model, BYTES, ["ab", "c"], config, ignore_eos=True, stop=[stop], logprobs=True,
        on_text=lambda n, piece: shown.update({n: shown[n] + piece}),
    )  # fmt: skip
    assert cut.samples[0].text == shown[0] == text[: text.find(stop)] and cut.samples[0].finish_reason == "stop"
    assert len(cut.samples[0].tokens) == len(cut.samples[0].logprobs) < 25
    assert cut.samples[1].text == shown[1]
    with pytest.raises(UserError, match="--stop string is empty"):
        complete(model, BYTES, ["a"], config, stop=[""])


def test_lines_are_written_in_order_as_soon_as_they_can_be():
    written = []
    lines = InOrder(written.append)
    for n in (2, 0, 1, 4, 3):
        lines.put(n, str(n))
    assert written == ["0\n", "1\n", "2\n", "3\n", "4\n"]


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3: expected an object with a text"),
        ('{"text": "a"}', "line 1: expected"),
        ('{"prompt": ""}', "line 1: the prompt is empty"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("\n", "has no prompts"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_names_the_line(tmp_path, text, says):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts((tmp_path / "p.jsonl").read_bytes(), "p.jsonl")


def test_many_prompts_of_many_lengths_come_back_in_order(gpt2, run_folder):
    lines = [{"prompt": "O " * (1 + n % 7), "id": n} for n in range(12)]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '"plain text"\n')
    options = ["--max-new-tokens", 6, "--top-k", 5, "--seed", 5, "--logprobs"]
    done = gpt2("sample", run_folder, "--prompts", "p.jsonl", "--out", "o.jsonl", "--batch-size", 3, *options)
    assert (done.code, done.out) == (0, "") and "tokens/s" in done.err
    results = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [result.get("id") for result in results] == [*range(12), None] and results[12]["prompt"] == "plain text"
    assert [result["seed"] for result in results] == list(range(5, 18))
    for result in (results[4], results[11]):
        alone = gpt2("sample", run_folder, "--prompt", result["prompt"], "--json", *options[:4], "--seed", result["seed"])
        assert json.loads(alone.out)["samples"][0]["text"] == result["text"]
        assert len(result["logprobs"]) == len(result["tokens"])
    done = gpt2("sample", run_folder, "--prompts", "p.jsonl", "--num-samples", 2, "--max-new-tokens", 2)
    assert [json.loads(line)["sample"] for line in done.out.splitlines()] == [0, 1] * 13
    done = gpt2("sample", run_folder, "--prompts", "p.jsonl", "--out", "o.jsonl")
    assert done.code == 1 and "already exists" in done.err
    assert "cannot be written" in gpt2("sample", run_folder, "--prompts", "p.jsonl", "--out", "no/o.jsonl").err


def test_a_try_that_fails_before_the_first_line_is_not_in_the_way_of_the_next(gpt2, run_folder):
    Path("p.jsonl").write_text(json.dumps({"prompt": "O " * 40, "text": "mine", "author": "me"}) + "\n")
    command = ["sample", run_folder, "--prompts", "p.jsonl", "--out", "o.jsonl", "--max-new-tokens", 2]
    failed = gpt2(*command)
    assert failed.code == 1 and "--overflow slide" in failed.err and not Path("o.jsonl").exists()
    assert gpt2(*command, "--overflow", "slide").code == 0
    line = json.loads(Path("o.jsonl").read_text())
    assert line["author"] == "me" and line["text"] != "mine"


def test_a_file_of_results_that_was_cut_off_is_gone_on_with(gpt2, run_folder):
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": "O " * (1 + n % 3)}) + "\n" for n in range(5)))
    command = ["sample", run_folder, "--prompts", "p.jsonl", "--out", "o.jsonl", "--num-samples", 2, "--max-new-tokens", 4]
    command += ["--top-k", 5]
    assert gpt2(*command).code == 0
    whole = Path("o.jsonl").read_bytes()
    assert "has all 10 results already" in gpt2(*command, "--resume").err
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, ends[0] - 7, ends[2], ends[6] + 20):
        Path("o.jsonl").write_bytes(whole[:size])
        assert gpt2(*command, "--resume").code == 0 and Path("o.jsonl").read_bytes() == whole, size
    assert "line 1 is not what prompt 1 with seed 8 gives" in gpt2(*command, "--resume", "--seed", 8).err
    Path("o.jsonl").write_bytes(whole + whole)
    assert "line 11 is not what prompt 11" in gpt2(*command, "--resume").err
    assert Path("o.jsonl").read_bytes() == whole + whole
    for other in (b"an essay without a line break", b'{"prompt": "O "}', whole + b"and more", whole[: ends[2]] + b"and more"):
        Path("o.jsonl").write_bytes(other)  # nothing of it was ours to cut off
        assert "it is of another job" in gpt2(*command, "--resume").err and Path("o.jsonl").read_bytes() == other
    Path("o.jsonl").unlink()
    assert gpt2(*command, "--resume").code == 0 and Path("o.jsonl").read_bytes() == whole
    assert "add --prompts and --out" in gpt2("sample", run_folder, "--prompt", "O", "--resume").err


def test_the_fields_of_a_line_go_along_but_for_those_that_its_result_has(gpt2, run_folder):
    line = {"prompt": "O", "title": "\ud83d", "logprobs": [1], "sample": 9, "text": "old", "seed": 3}
    Path("p.jsonl").write_bytes(codecs.BOM_UTF8 + (json.dumps(line) + '\n{"prompt": "naïve"}\n').encode())
    command = ["sample", run_folder, "--prompts", "p.jsonl", "--out", "o.jsonl", "--max-new-tokens", 2, "--ignore-eos"]
    assert gpt2(*command).code == 0
    first, second = Path("o.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(first)
    assert found.keys() == {"prompt", "title", "seed", "text", "tokens", "finish_reason"} and found["title"] == "\ud83d"
    assert found["seed"] == SamplingConfig().seed and found["text"] != "old" and '"naïve"' in second
    assert "has all 2 results already" in gpt2(*command, "--resume").err


def test_prompts_come_from_standard_input_too(gpt2, run_folder, monkeypatch):
    lines = '{"prompt": "O"}\n"Romeo"\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    done = gpt2("sample", run_folder, "--prompts", "-", "--max-new-tokens", 1, "--ignore-eos")
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["O", "Romeo"]
    assert done.err.startswith("2 tokens, ")
    done = gpt2("sample", run_folder, "--prompt", "O", "--max-new-tokens", 1, "--ignore-eos")
    assert done.err.startswith("1 token, ")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    assert "standard input, line 1: expected an object" in gpt2("sample", run_folder, "--prompts", "-").err


@pytest.mark.parametrize("how, code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])  # as SIGTERM does
def test_what_is_interrupted_is_told_how_to_go_on(gpt2, run_folder, monkeypatch, how, code):
    Path("p.jsonl").write_text('"O"\n' * 3)
    command = ["sample", run_folder, "--prompts", "p.jsonl", "--out", "o.jsonl", "--max-new-tokens", 2, "--batch-size", 1]
    assert gpt2(*command).code == 0
    whole = Path("o.jsonl").read_bytes()
    Path("o.jsonl").unlink()
    end = sample.Lines.end

    def interrupted(self, number, result):
        end(self, number, result)
        if number == 1:
            raise how

    with monkeypatch.context() as patched:
        patched.setattr(sample.Lines, "end", interrupted)
        done = gpt2(*command)
    assert done.code == code and "o.jsonl has 2 of 3 results: the same command with --resume goes on" in done.err
    assert gpt2(*command, "--resume").code == 0 and Path("o.jsonl").read_bytes() == whole
    monkeypatch.setattr(sample.Stream, "text", lambda self, number, piece: (_ for _ in ()).throw(how))
    done = gpt2("sample", run_folder, "--prompt", "O")
    assert (done.code, done.out) == (code, "\n")


def test_options_of_sample_do_what_they_say(gpt2, run_folder):
    command = ["sample", run_folder, "--prompt", "First Citizen", "--max-new-tokens", 12, "--ignore-eos"]
    free = json.loads(gpt2(*command, "--json", "--logprobs").out)["samples"][0]
    assert len(free["logprobs"]) == 12 and max(free["logprobs"]) <= 0
    stop = free["text"][3:5]
    cut = json.loads(gpt2(*command, "--json", "--stop", stop, "--stop", "never").out)["samples"][0]
    assert cut["text"] == free["text"][: free["text"].find(stop)] and cut["finish_reason"] == "stop"
    assert gpt2(*command, "--stop", stop).out == "First Citizen" + cut["text"] + "\n"
    others = [("--min-p", "0.9"), ("--repetition-penalty", "5"), ("--temperature", "3")]
    assert all(json.loads(gpt2(*command, "--json", *other).out)["samples"][0]["text"] != free["text"] for other in others)
    small = json.loads(gpt2(*command, "--json", "--greedy", "--quantize", "int8").out)["samples"][0]
    exact = json.loads(gpt2(*command, "--json", "--greedy").out)["samples"][0]
    assert small["tokens"][:1] == exact["tokens"][:1]
    assert "do not fit the context" in gpt2(*command[:-2], "256", "--overflow", "error").err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--prompts", "p.jsonl", "--prompt", "x"), "leave out --prompt"),
        (("--prompts", "p.jsonl", "--json"), "leave out --prompt"),
        (("--prompt", "x", "--out", "y"), "--out is for what --prompts gives"),
        (("--prompt", "x", "--logprobs"), "add --json"),
        (("--prompt", "x", "--min-p", "2"), "--min-p must be from 0 to 1"),
        (("--prompt", "x", "--repetition-penalty", "0"), "--repetition-penalty must be above 0"),
        (("--prompt", "x", "--temperature", "inf"), "--temperature must be above 0"),
        (("--prompt", "x", "--overflow", "wrap"), "must be stop, slide or error"),
        (("--prompt", "x", "--quantize", "int4"), "--quantize int4 is unknown"),
        (("--prompts", "missing.jsonl"), "missing.jsonl: No such file"),
        (("--prompt", "x", "--greedy", "--top-p", "0.9"), "whatever the --top-p"),
        (("--prompt", "x", "--temperature", "0.8", "--greedy"), "whatever the --temperature"),
    ],
)
def test_mistakes_are_told(gpt2, run_folder, arguments, says):
    done = gpt2("sample", run_folder, *arguments)
    assert done.code == 1 and says in done.err and done.out == ""
