"""Text: sentences as padded rows of word indices, and batches of about one length.

Words are what blanks separate. Index 0 is padding, 1 begins a sentence, 2 ends it, 3 stands for words that are not in
the vocabulary. A sentence's row is its words and the end, then padding; its length counts the end. Log-likelihoods of
texts with different vocabularies are not comparable: a rare word that became "unknown" is easy to predict.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pyrovae.errors import DataError
from pyrovae.provenance import fingerprint

__all__ = ["BEGIN", "END", "PAD", "UNKNOWN", "Sentences", "TextData", "Vocabulary", "load_text"]

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_UNKNOWN_IN_FILES = ("<unk>", "_UNK")


class Vocabulary:
    """Words and their indices, the most frequent first after the four special ones.

    Args:
        words: without the special ones.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = (*_SPECIAL, *words)
        self.index = {word: index for index, word in enumerate(self.words)}
        if len(self.index) != len(self.words):
            raise ValueError("a vocabulary has every word once")
        self.index.update(dict.fromkeys(_UNKNOWN_IN_FILES, UNKNOWN))

    @classmethod
    def of(cls, lines: Iterable[str], *, min_count: int = 1, max_words: int | None = None) -> Vocabulary:
        """Words that occur at least `min_count` times, at most `max_words` of them; ties in alphabetical order."""
        counts = Counter(word for line in lines for word in line.split() if word not in _UNKNOWN_IN_FILES)
        kept = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
        return cls([word for word in kept[:max_words] if word not in _SPECIAL])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, lines: Iterable[str]) -> Sentences:
        """Sentences of lines; blank ones are left out."""
        rows = [[self.index.get(word, UNKNOWN) for word in line.split()] + [END] for line in lines if line.split()]
        if not rows:
            raise DataError("there is no sentence in this text")
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), PAD)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        return Sentences(tokens, lengths)

    def decode(self, tokens: Tensor) -> list[str]:
        """Lines of rows of indices `[N, T]`, each up to its end."""
        found = []
        for row in tokens.tolist():
            words = row[: row.index(END)] if END in row else row
            found.append(" ".join(self.words[index] for index in words if index not in (PAD, BEGIN)))
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Sentences:
    """Padded rows.

    Attributes:
        tokens: ``[N, T]``, int64.
        lengths: ``[N]``, the end counted; on the CPU.
    """

    tokens: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Sentences({len(self)}, {int(self.lengths.sum())} tokens, longest {int(self.lengths.max())})"

    def __getitem__(self, index: slice) -> Sentences:
        """Some sentences, `sentences[:100]`."""
        return Sentences(self.tokens[index], self.lengths[index])

    def to(self, device: torch.device | str) -> Sentences:
        """The same, words on another device."""
        return Sentences(self.tokens.to(device), self.lengths)

    def rows(self, index: Tensor | None = None) -> Tensor:
        """Some sentences, all by default, ``[B, longest of them]``."""
        if index is None:
            return self.tokens[:, : int(self.lengths.max())]
        return self.tokens[index, : int(self.lengths[index].max())]

    def order(self, batch_size: int, *, generator: torch.Generator | None = None) -> Tensor:
        """A random order `[N]` whose batches, one after another, are of about one length each; the ragged one is last.

        The ragged batch is cut out anywhere, lest the longest sentences always come in one batch at the end.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        mixed = torch.randperm(len(self), generator=generator)
        sorted_ = mixed[self.lengths[mixed].argsort(stable=True)]
        rest = len(self) % batch_size
        cut = int(torch.randint(len(self) - rest + 1, (), generator=generator))
        whole = torch.cat([sorted_[:cut], sorted_[cut + rest :]]).view(-1, batch_size)
        return torch.cat([whole[torch.randperm(len(whole), generator=generator)].flatten(), sorted_[cut : cut + rest]])

    def batches(self, batch_size: int, *, seed: int | None = None) -> list[Tensor]:
        """Indices of batches of about one length: little padding, every sentence once, the last batch ragged.

        Args:
            seed: of the order; None goes from short to long.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed is None:
            return list(self.lengths.argsort(stable=True).split(batch_size))
        return list(self.order(batch_size, generator=torch.Generator().manual_seed(seed)).split(batch_size))


@dataclass(frozen=True, eq=False, repr=False)
class TextData:
    """A text data set.

    Attributes:
        name: of the set.
        train, valid, test: sentences.
        vocabulary: from the training part.
        split: how the parts were separated, in words.
    """

    name: str
    train: Sentences
    valid: Sentences
    test: Sentences
    vocabulary: Vocabulary
    split: str

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all words."""
        return fingerprint([part.tokens for part in (self.train, self.valid, self.test)])

    def __repr__(self) -> str:
        return (
            f"TextData({self.name}: {len(self.train)} / {len(self.valid)} / {len(self.test)} sentences, "
            f"{len(self.vocabulary)} words; {self.split})"
        )


_FILES: dict[str, tuple[str, str | None, str]] = {
    "ptb": ("ptb/ptb.train.txt", "ptb/ptb.valid.txt", "ptb/ptb.test.txt"),
    "snli": ("snli/train.txt", "snli/valid.txt", "snli/test.txt"),
    "yahoo": ("yahoo/val.txt", None, "yahoo/test.txt"),
}
_SPLITS = {
    "ptb": "Mikolov's parts",
    "snli": "sentences of SNLI's test part, split by premise",
    "yahoo": "trained on the first 9,000 validation documents, the last 1,000 held out, tested on the test part",
}


def load_text(
    name: str, *, min_count: int = 1, max_words: int | None = None, root: str | os.PathLike[str] | None = None
) -> TextData:
    """Load a text data set; nothing is dropped or cut.

    Args:
        name: ``"ptb"`` (42,068 / 3,370 / 3,761 sentences), ``"snli"`` (10,346 / 1,297 / 1,267) or ``"yahoo"`` (9,000 /
            1,000 / 10,000 documents; their training part is not among the files).
        min_count: words that are rarer in the training part become unknown.
        max_words: largest vocabulary, the most frequent first.
        root: folder that holds ``ptb``, ``snli`` and ``yahoo``; the environment variable ``PYROVAE_DATA`` if not
            given.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the files are not on disk; says where they were looked for.
    """
    if name not in _FILES:
        raise ValueError(f"unknown text {name!r}: choose one of {', '.join(_FILES)}")
    train, valid, test = (_read(name, file, root) if file else [] for file in _FILES[name])
    if not valid:
        train, valid = train[:-1000], train[-1000:]
    words = Vocabulary.of(train, min_count=min_count, max_words=max_words)
    return TextData(name, words.encode(train), words.encode(valid), words.encode(test), words, _SPLITS[name])


def _read(name: str, file: str, root: str | os.PathLike[str] | None) -> list[str]:
    folder = root if root is not None else os.environ.get("PYROVAE_DATA")
    if folder is None or not (path := Path(folder) / file).is_file():
        where = "PYROVAE_DATA is not set" if folder is None else f"looked for {Path(folder) / file}"
        raise FileNotFoundError(
            f"the text {name!r} is not on disk ({where}): point root= or the environment variable PYROVAE_DATA at the "
            f"folder that holds {file}"
        )
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.split()]
