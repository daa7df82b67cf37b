"""A vocabulary of one's own: a byte-level BPE trained on a text, numbered as GPT-2's is, and checked before it is used.

Byte pair encoding: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: GPT-2's paper, section 2.2. The
tokenizers library counts the words and finds the merges.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt2cli.errors import UserError
from gpt2cli.tokenizer import Encoding, to_written

SMALLEST = 257  # the bytes and <|endoftext|>
LARGEST = 1 << 16  # shards hold 16-bit ids
LONGEST = 256  # bytes of a word that are joined at most: the time is quadratic in them, and a run of one letter is a word
PIECE = 1 << 16  # characters that the library gets at once: it holds some hundred bytes for each

_BEFORE_SPACE = re.compile(r"\S(?=[ \n\t\r])")  # GPT-2's pre-tokenizer always cuts here


def train(texts: Iterable[str], n_vocab: int) -> Encoding:
    """The byte-level BPE of `n_vocab` ids for `texts`: the 256 bytes in GPT-2's order, then one token a merge, the most
    frequent pair first, and `<|endoftext|>` last. A pair that occurs only once is not merged.

    The same text gives the same vocabulary, on any number of threads, and wherever it was cut into `texts` between a word
    and a space. `texts` are read once, as a stream, and never in whole; each may have any length. They hold no separators: a
    literal `<|endoftext|>` is ordinary text here. Memory grows with the distinct words, by some hundred bytes for each byte
    of them.

    Raises UserError for an `n_vocab` outside 257 to 65,536, and for a text too small to yield so many tokens.
    """
    if not SMALLEST <= n_vocab <= LARGEST:
        raise UserError(f"a vocabulary has {SMALLEST} to {LARGEST:,} ids (256 bytes, the merges, 1 separator), not {n_vocab:,}")
    bpe = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's pre-tokenizer
    bpe.pre_tokenizer = pre_tokenizers.Sequence([bytes_of_words, pre_tokenizers.FixedLength(LONGEST)])
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sample: list[str] = []
    bpe.train_from_iterator(_keep_some(_pieces(texts), sample), trainer)
    encoding = Encoding.from_merges([" ".join(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]])
    if encoding.n_vocab < n_vocab:
        raise UserError(
            f"the text is too small for a vocabulary of {n_vocab:,}: it yields {encoding.n_vocab:,} (256 bytes, "
            f"{len(encoding.merges):,} merges, 1 separator); use more text, or ask for {encoding.n_vocab:,} at most"
        )
    check(encoding, sample)
    return encoding


def check(encoding: Encoding, sample: Sequence[str]) -> None:
    """Prove that transformers, which reads the saved files with the tokenizers library, gives the ids that we give.

    The library joins only listed pairs, tiktoken any two neighbours whose bytes are a token: that is the same for every
    text where each token, written out in bytes, merges to itself. Checked for all tokens, and tried on `sample`. Raises
    UserError where it is not so.
    """
    with tempfile.TemporaryDirectory() as folder:
        encoding.save(Path(folder))
        theirs = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    for token, n in encoding.ids.items():
        if [part.id for part in theirs.model.tokenize(to_written(token))] != [n]:
            raise UserError(f"the trained vocabulary is not consistent: token {n} ({token!r}) does not merge to itself")
    for text in sample:
        if theirs.encode(text, add_special_tokens=False).ids != encoding.encode(text, special=True):
            raise UserError(f"the trained vocabulary gives other ids in transformers than here, for the text {text[:40]!r}...")


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """`texts` in pieces of at most 2 * PIECE characters, cut before a space; a longer run without one is cut anyway."""
    for text in texts:
        start = 0
        while len(text) - start > 2 * PIECE:
            found = _BEFORE_SPACE.search(text, start + PIECE, start + 2 * PIECE)
            end = found.end() if found else start + 2 * PIECE
            yield text[start:end]
            start = end
        yield text[start:]


def _keep_some(pieces: Iterable[str], sample: list[str]) -> Iterator[str]:
    """`pieces`, of which the 1st, 2nd, 4th, 8th, ... are kept: from all of the text, and few however long it is."""
    for n, piece in enumerate(pieces, 1):
        if n & (n - 1) == 0:
            sample.append(piece)
        yield piece
