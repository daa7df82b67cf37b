import json
import re

import pytest

from gpt2cli.errors import UserError
from gpt2cli.tokenizer import AnotherKind, Encoding, StreamDecoder

TEXTS = [
    "Hello world",
    "",
    "\n",
    "  two  spaces ",
    "naïve café",
    "日本語のテキスト、です。",
    "🙂🙃 emoji 👩‍👩‍👧",
    "I'll don't 've",
    "\r\n\t x",
    "a" * 500,
]


def test_the_embedded_vocabulary_is_gpt2s():
    encoding = Encoding.gpt2()
    assert encoding.encode("Hello world") == [15496, 995]
    assert (encoding.n_vocab, encoding.eot) == (50257, 50256)
    assert encoding.encode("<|endoftext|>", special=True) == [50256]
    assert 50256 not in encoding.encode("<|endoftext|>")


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(text):
    encoding = Encoding.gpt2()
    assert encoding.decode(encoding.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_never_shows_half_a_character(text):
    decoder = StreamDecoder(Encoding.gpt2())
    pieces = [decoder.feed(token) for token in Encoding.gpt2().encode(text)] + [decoder.finish()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_appears_with_the_last_of_them():
    ids = Encoding.gpt2().encode("👩")
    decoder = StreamDecoder(Encoding.gpt2())
    assert len(ids) > 1 and [decoder.feed(token) for token in ids] == [""] * (len(ids) - 1) + ["👩"]


def test_documents_begin_with_the_separator_and_empty_ones_leave_nothing():
    encoding = Encoding.gpt2()
    ids = encoding.encode_documents("one<|endoftext|><|endoftext|>two<|endoftext|>")
    assert ids.tolist() == [50256, *encoding.encode("one"), 50256, *encoding.encode("two")]
    assert encoding.encode_documents("").tolist() == []
    assert encoding.encode_documents("a<|endoftext|>", plain=True).tolist() == [50256, *encoding.encode("a<|endoftext|>")]


def test_transformers_reads_our_files_and_we_read_its(tmp_path):
    from transformers import AutoTokenizer

    Encoding.gpt2().save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == Encoding.gpt2().encode(text)
    assert theirs.eos_token_id == 50256 and theirs.decode([15496, 995]) == "Hello world"
    theirs.save_pretrained(tmp_path / "again")
    assert Encoding.from_folder(tmp_path / "again").sha256 == Encoding.gpt2().sha256


def test_a_byte_level_bpe_of_ones_own_is_used_as_tokenizers_uses_it(tmp_path, shakespeare):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([shakespeare[:50_000]], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(tmp_path))
    encoding = Encoding.from_folder(tmp_path)
    assert encoding.n_vocab == 400 and encoding.eot == 0
    assert encoding.encode(shakespeare[:3000]) == bpe.encode(shakespeare[:3000]).ids
    encoding.save(tmp_path)  # as tokenizer.json, which is read first
    assert Encoding.from_folder(tmp_path).sha256 == encoding.sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"].update(type="Unigram"),
        lambda t: t.update(pre_tokenizer={"type": "Metaspace"}),
        lambda t: t["model"].update(merges=t["model"]["merges"][:-5]),
        lambda t: t["model"].update(vocab=7),
        lambda t: t.pop("model"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path, change):
    Encoding.gpt2().save(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    change(written)
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=str(tmp_path)):
        Encoding.from_folder(tmp_path)


ADDED = {"id": 50257, "content": "<|pad|>", "lstrip": False, "rstrip": False, "single_word": False}
TEXT, EOT = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}


def template(*single):
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


def edited(folder, change):
    """An Encoding of GPT-2's tokenizer.json after a change to it."""
    Encoding.gpt2().save(folder)
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(written)
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return Encoding.from_folder(str(folder))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t["added_tokens"].append(ADDED), "256 bytes and one token a merge"),
        (lambda t: t["added_tokens"].append(ADDED | {"content": "<|im start|>"}), "'<|im start|>' is not written in bytes"),
        (lambda t: t["added_tokens"][0].update(rstrip=True), "takes spaces or words around it into account"),
        (lambda t: t["added_tokens"][0].update(lstrip=True), "takes spaces or words around it into account"),
        (lambda t: t["added_tokens"][0].update(single_word=True), "takes spaces or words around it into account"),
        (lambda t: t.update(post_processor=template(EOT, TEXT)), "may add tokens to a text"),
        (lambda t: t.update(post_processor={"type": "Sequence", "processors": [BYTES, template(TEXT, EOT)]}), "may add"),
    ],
)
def test_what_transformers_would_encode_otherwise_is_of_another_kind(tmp_path, change, says):
    with pytest.raises(AnotherKind, match=re.escape(says)):
        edited(tmp_path, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["added_tokens"][0].update(normalized=True, id=50300),  # which the vocabulary knows better
        lambda t: t.update(post_processor=BYTES),  # as OpenAI's own on the hub
        lambda t: t.update(post_processor=None),
        lambda t: t.update(post_processor=template(TEXT)),  # as transformers makes of vocab.json and merges.txt
        lambda t: t.update(post_processor={"type": "Sequence", "processors": [BYTES, template(TEXT)]}),
    ],
)
def test_what_changes_no_id_is_gpt2s(tmp_path, change):
    assert edited(tmp_path, change).sha256 == Encoding.gpt2().sha256


def test_tokens_added_beside_an_older_vocabulary_count(tmp_path):
    encoding = Encoding.gpt2()
    model = json.loads(encoding.files["tokenizer.json"])["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]), encoding="utf-8")
    for known in ({}, {"<|endoftext|>": 50256}, {"<|endoftext|>": 50300}):  # for transformers the first file has the say
        (tmp_path / "added_tokens.json").write_text(json.dumps(known))
        assert Encoding.from_folder(tmp_path).sha256 == encoding.sha256
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|pad|>": 50257}))
    with pytest.raises(AnotherKind, match="one token a merge"):
        Encoding.from_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        Encoding.from_folder(tmp_path)


def test_an_id_outside_the_vocabulary_is_a_user_error():
    with pytest.raises(UserError, match="vocabulary of 50,257"):
        Encoding.gpt2().decode([50257])
