"""Text to token ids and back: the embedded GPT-2 vocabulary, or any byte-level BPE kept in a model folder.

tiktoken does the merging; the vocabulary comes from `assets/vocab.bpe`, so nothing is ever downloaded.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2cli.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of vocab.bpe, as OpenAI published it
_VOCAB_FILES = ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")  # HuggingFace's names, and OpenAI's own
Merge = tuple[bytes, bytes]


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2 writes each byte as one printable character in its files: `Ġ` is the space. Character -> byte, in the order
    of the first 256 token ids (`bytes_to_unicode` in OpenAI's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@cache
def character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in byte_of_character().items()}


def to_bytes(written: str) -> bytes:
    return bytes(byte_of_character()[character] for character in written)


def to_written(token: bytes) -> str:
    return "".join(character_of_byte()[byte] for byte in token)


class AnotherKind(UserError):
    """A tokenizer that is whole, but not a byte-level BPE like GPT-2's."""


class Encoding:
    """A byte-level BPE with GPT-2's pre-tokenizer.

    `ids` maps each token's bytes to its id; `merges` lists the joined pairs in order of priority.

    >>> Encoding.gpt2().encode("Hello world")
    [15496, 995]
    """

    def __init__(self, ids: dict[bytes, int], merges: Sequence[Merge], eot: int) -> None:
        self.ids = ids
        self.merges = merges
        self.eot = eot
        self.n_vocab = max(max(ids.values()), eot) + 1
        self._bpe = tiktoken.Encoding("gpt2cli", pat_str=r50k_pat_str, mergeable_ranks=ids, special_tokens={END_OF_TEXT: eot})

    def __reduce__(self) -> tuple[Any, ...]:  # workers of another process receive it
        return Encoding, (self.ids, self.merges, self.eot)

    # ==== making one ====

    @staticmethod
    @cache
    def gpt2() -> Encoding:
        """GPT-2's own vocabulary: 50,257 ids, the last of them `<|endoftext|>`."""
        data = resources.files("gpt2cli").joinpath("assets/vocab.bpe").read_bytes()
        if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
            raise UserError("the package's vocab.bpe is damaged; reinstall gpt2cli")
        return Encoding.from_merges(data.decode().splitlines()[1:])

    @staticmethod
    def from_merges(lines: Iterable[str]) -> Encoding:
        """The vocabulary that GPT-2's numbering makes of merges, as `merges.txt` writes them (`Ġ t`): 0 to 255 are the bytes,
        then one id a merge, and `<|endoftext|>` last."""
        merges = parse_merges(lines)
        tokens = [bytes([byte]) for byte in byte_of_character().values()] + [left + right for left, right in merges]
        return Encoding({token: n for n, token in enumerate(tokens)}, merges, eot=len(tokens))

    @staticmethod
    def from_folder(folder: str | Path) -> Encoding | None:
        """The byte-level BPE in a folder of a model, of tokens or of a run, or in a `tokenizer.json` itself; None where there
        is none. Raises UserError for a tokenizer of another kind."""
        folder = Path(folder)
        if (folder / "run.json").is_file():
            folder = max(folder.glob("step-*"), default=folder)  # all checkpoints of a run have the same
        try:
            file = folder if folder.is_file() else folder / "tokenizer.json"
            if file.is_file():
                return _from_tokenizer_json(json.loads(file.read_text(encoding="utf-8")), folder)
            for names in _VOCAB_FILES:
                if all((folder / name).is_file() for name in names):
                    return _from_vocab_files(folder, *names)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder}: the tokenizer files cannot be read ({type(error).__name__}: {error})") from None
        return None

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` loads."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")

    @property
    def written(self) -> dict[str, int]:
        """Each token as GPT-2's files write it (`Ġ` is the space) -> its id."""
        return {to_written(token): n for token, n in self.ids.items()} | {END_OF_TEXT: self.eot}

    @cached_property
    def files(self) -> dict[str, str]:
        special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.eot, **special, "special": True}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": byte_level | {"trim_offsets": False},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self.written,
                "merges": [f"{to_written(left)} {to_written(right)}" for left, right in self.merges],
            },
        }
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        }
        return {
            "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }

    # ==== using one ====

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`. With `special`, a literal `<|endoftext|>` becomes its one id instead of plain text."""
        return self._bpe.encode(text, allowed_special="all" if special else set(), disallowed_special=())

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of plain text as an array (uint32): faster than a list."""
        return self._bpe.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def encode_documents(self, text: str, *, plain: bool = False) -> np.ndarray:
        """Token ids (uint32) of a text whose documents are separated by `<|endoftext|>`; each starts with that id.
        Empty documents leave nothing. With `plain` the text is one document and the separator ordinary text."""
        documents = [text] if plain else text.split(END_OF_TEXT)
        parts = [part for document in documents if document for part in ([self.eot], self.encode(document))]
        return np.concatenate([np.asarray(part, dtype=np.uint32) for part in parts or [[]]])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. Raises UserError for an id outside the vocabulary."""
        return self.decode_bytes(list(ids)).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of token ids. Raises UserError for an id outside the vocabulary."""
        try:
            return self._bpe.decode_bytes(ids)
        except (KeyError, OverflowError):
            return b"".join(map(self.token_bytes, ids))  # which names the id

    def token_bytes(self, token: int) -> bytes:
        try:
            return self._bpe.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            raise UserError(f"token id {token} is not in the vocabulary of {self.n_vocab:,}") from None

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each id stands for (n_vocab,), 0 for `<|endoftext|>`: for bits per byte."""
        lengths = np.zeros(self.n_vocab, dtype=np.int64)
        for token, n in self.ids.items():
            lengths[n] = len(token)
        return lengths

    @property
    def sha256(self) -> str:
        """Of the tokens in order of id: two encodings with one hash give the same ids."""
        ordered = sorted(self.ids.items(), key=lambda item: item[1])
        return hashlib.sha256(repr((ordered, self.eot)).encode()).hexdigest()


class StreamDecoder:
    """Decodes ids as they come and never shows half a character.

    >>> decoder = StreamDecoder(Encoding.gpt2())
    >>> [decoder.feed(n) for n in Encoding.gpt2().encode("🙂")]
    ['', '🙂']
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._utf8.decode(self._encoding.token_bytes(token))

    def feed_all(self, tokens: Sequence[int]) -> str:
        return self._utf8.decode(self._encoding.decode_bytes(tokens))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def parse_merges(lines: Iterable[str]) -> list[Merge]:
    merges = []
    for line in lines:
        left, right = line.split(" ")
        merges.append((to_bytes(left), to_bytes(right)))
    return merges


def _from_vocab_files(folder: Path, ids: str, merges: str) -> Encoding:
    vocab = json.loads((folder / ids).read_text(encoding="utf-8"))
    added = folder / "added_tokens.json"  # of older fine-tunes; the vocabulary's own id goes first, as in transformers
    vocab = (json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}) | vocab
    lines = (folder / merges).read_text(encoding="utf-8").split("\n")
    return _from_vocab(vocab, [line for line in lines if line and not line.startswith("#version")], folder)


def _from_tokenizer_json(data: dict[str, Any], folder: Path) -> Encoding:
    def steps(part: Any, within: str) -> Iterator[dict[str, Any]]:
        yield from part[within] if part and part["type"] == "Sequence" else [part or {}]

    model = data["model"]
    if model["type"] != "BPE" or data.get("normalizer"):
        raise AnotherKind(f"{folder}: its tokenizer is not a plain byte-level BPE like GPT-2's ({model['type']})")
    for step in steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") != "ByteLevel" or step.get("add_prefix_space") or not step.get("use_regex", True):
            raise AnotherKind(f"{folder}: its pre-tokenizer is not GPT-2's ({step.get('type')})")
    for step in steps(data.get("post_processor"), "processors"):
        if not _adds_nothing(step):
            raise AnotherKind(f"{folder}: its tokenizer may add tokens to a text, which GPT-2's does not ({step.get('type')})")
    for token in data.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise AnotherKind(f"{folder}: its token {token['content']} takes spaces or words around it into account")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
    return _from_vocab(added | model["vocab"], merges, folder)


def _adds_nothing(step: dict[str, Any]) -> bool:
    """Whether a step of a post-processor leaves the ids of a text alone, as ByteLevel does. transformers also writes a template
    of nothing but the text."""
    if step.get("type") == "TemplateProcessing":
        return [list(piece) for piece in step["single"]] == [["Sequence"]]
    return step.get("type") in (None, "ByteLevel")


def _from_vocab(vocab: dict[str, int], lines: Sequence[str], folder: Path) -> Encoding:
    vocab = dict(vocab)
    if END_OF_TEXT not in vocab:
        raise AnotherKind(f"{folder}: its vocabulary has no {END_OF_TEXT}")
    if not all(isinstance(n, int) and 0 <= n < 1 << 31 for n in vocab.values()):
        raise UserError(f"{folder}: its vocabulary gives a token an id that is none")
    eot = vocab.pop(END_OF_TEXT)
    try:
        ids = {to_bytes(written): n for written, n in vocab.items()}
    except KeyError:
        foreign = next(written for written in vocab if set(written) - byte_of_character().keys())
        raise AnotherKind(f"{folder}: its token {foreign!r} is not written in bytes as GPT-2 writes them") from None
    merges = parse_merges(lines)
    joined = [left + right for left, right in merges]
    # tiktoken merges in order of id, HuggingFace in order of the list: they must be the same order.
    order = [ids[token] for token in joined]
    if len({*ids.values(), eot}) != len(ids) + 1:
        raise UserError(f"{folder}: its vocabulary gives one id to two tokens")
    if len(ids) != 256 + len(merges) or order != sorted(set(order)) or any(bytes([b]) not in ids for b in range(256)):
        raise AnotherKind(f"{folder}: its vocabulary is not 256 bytes and one token a merge, in order of the merges")
    return Encoding(ids, merges, eot)
