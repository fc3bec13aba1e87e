"""Text: nothing dropped, padding and lengths, vocabularies by count, batches of one length."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pyrovae.data import Vocabulary, load_text
from pyrovae.data.text import END, PAD, UNKNOWN
from pyrovae.errors import DataError

LINES = ["the cat sat", "the dog", "a cat sat on the mat", "", "_UNK cat <unk>"]


def test_words_by_count_then_alphabet():
    vocabulary = Vocabulary.of(LINES)
    assert vocabulary.words == ("<pad>", "<s>", "</s>", "<unk>", "cat", "the", "sat", "a", "dog", "mat", "on")
    assert Vocabulary.of(LINES, min_count=2).words[4:] == ("cat", "the", "sat")
    assert Vocabulary.of(LINES, max_words=2).words[4:] == ("cat", "the")


def test_rows_lengths_and_back():
    vocabulary = Vocabulary.of(LINES, min_count=2)
    found = vocabulary.encode(LINES)
    assert found.lengths.tolist() == [4, 3, 7, 4]
    assert found.tokens.shape == (4, 7)
    assert found.tokens[1].tolist() == [5, UNKNOWN, END, PAD, PAD, PAD, PAD]
    assert ((found.tokens == END).sum(1) == 1).all()
    assert vocabulary.decode(found.tokens)[0] == "the cat sat"
    assert vocabulary.decode(found.tokens)[3] == "<unk> cat <unk>"
    assert "4, 18 tokens, longest 7" in repr(found)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_sentence_is_in_one_batch(seed, batch_size):
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(["w"] * int(n)) for n in torch.randint(1, 20, (50,), generator=generator)]
    sentences = Vocabulary.of(lines).encode(lines)
    batches = sentences.batches(batch_size, seed=seed)
    assert torch.cat(batches).sort().values.tolist() == list(range(50))
    assert all(torch.equal(a, b) for a, b in zip(batches, sentences.batches(batch_size, seed=seed), strict=True))
    padding = sum(int((sentences.rows(index) == PAD).sum()) for index in batches)
    if batch_size == 3:
        assert padding < 40  # of some 500 words; in the given order it is about 200
        assert sum(len(index) == 3 for index in batches) == 16
    for index in batches:
        rows = sentences.rows(index)
        assert rows.shape == (len(index), int(sentences.lengths[index].max()))
        assert ((rows != PAD).sum(1) == sentences.lengths[index]).all()


def test_seeds_shuffle():
    sentences = Vocabulary.of(["a"] * 40).encode(["a"] * 40)
    one, two = (torch.cat(sentences.batches(4, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one, two)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ptb\.train\.txt"):
        load_text("ptb", root=tmp_path)
    with pytest.raises(ValueError, match="choose one of ptb, snli, yahoo"):
        load_text("wiki", root=tmp_path)
    with pytest.raises(DataError, match="no sentence"):
        Vocabulary([]).encode(["", "  "])


@pytest.mark.skipif("PYROVAE_DATA" not in os.environ, reason="needs the real texts")
@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [("ptb", (42068, 3370, 3761), 887_521), ("snli", (10346, 1297, 1267), 95_250),
     ("yahoo", (9000, 1000, 10000), None)],
)  # fmt: skip
def test_real_texts_are_whole(name, sizes, words):
    data = load_text(name)
    assert (len(data.train), len(data.valid), len(data.test)) == sizes
    if words is not None:
        assert int(data.train.lengths.sum()) - len(data.train) == words
    assert name in repr(data)
    file = Path(os.environ["PYROVAE_DATA"]) / {"ptb": "ptb/ptb.test.txt"}.get(name, f"{name}/test.txt")
    first = next(line for line in file.read_text().splitlines() if line.split()).split()
    known = [word if data.vocabulary.index.get(word, 3) != 3 else "<unk>" for word in first]
    assert data.vocabulary.decode(data.test.tokens[:1])[0].split() == known
