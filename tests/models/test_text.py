"""Sentences: normalised, padding counts for nothing, guides that differentiate through the LSTM twice."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch

from pyrovae import evidence, fit, guides, losses
from pyrovae.data.text import BEGIN, END, PAD, UNKNOWN, Vocabulary
from pyrovae.errors import DataError
from pyrovae.models import TextVAE
from pyrovae.models.text_vae import SentenceDistribution, check_sentences, perplexity
from pyrovae.nets import LSTMDecoder, LSTMEncoder
from pyrovae.optim import Adam

WORDS, D = 7, 2


def small(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = TextVAE(LSTMDecoder(WORDS, D, embedding=4, hidden=8), D, max_length=6, **options)
    return model.to(dtype), LSTMEncoder(WORDS, 2 * D, embedding=4, hidden=8).to(dtype)


def sentences(rows=4, longest=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((rows, longest), PAD)
    for row in range(rows):
        length = int(torch.randint(1, longest, (), generator=generator)) if row else longest - 1
        x[row, :length] = torch.randint(UNKNOWN, WORDS, (length,), generator=generator)
        x[row, length] = END
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_counts_for_nothing(dtype):
    """The same nats per sentence padded to any length, alone or in a batch, under every estimate."""
    model, encoder = small(dtype)
    model.eval()
    guide = guides.Amortized(model, encoder)
    x = sentences()
    wide = torch.cat([x, torch.full((len(x), 5), PAD)], 1)
    tight, padded = (evidence.log_weights(model, guide, rows, num_samples=8) for rows in (x, wide))
    torch.testing.assert_close(tight, padded, rtol=1e-5, atol=1e-5)
    lengths = (x != PAD).sum(1)
    alone = torch.cat([evidence.log_weights(model, guide, x[i : i + 1, : lengths[i]], num_samples=8, indices=[i])
                       for i in range(len(x))], 1)  # fmt: skip
    torch.testing.assert_close(alone, tight, rtol=1e-5, atol=1e-5)


def test_sentences_are_normalised():
    """Every sentence of at most two words, and every one cut at three, once: they sum to one; one of them by hand."""
    torch.manual_seed(0)
    decoder = LSTMDecoder(5, D, embedding=4, hidden=8).double()
    z = torch.randn(2, D).double()
    q = SentenceDistribution(decoder, z, 3)
    words = [UNKNOWN, 4]
    rows = [[END, PAD, PAD], *([a, END, PAD] for a in words)]
    rows += [[a, b, c] for a, b in itertools.product(words, repeat=2) for c in (*words, END)]
    total = torch.stack([q.log_prob(torch.tensor(row)) for row in rows]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2).double())
    each = torch.log_softmax(decoder(torch.tensor([[BEGIN, 4], [BEGIN, 4]]), z)[..., 2:], -1)
    torch.testing.assert_close(q.log_prob(torch.tensor([4, END, PAD])), each[:, 0, 4 - 2] + each[:, 1, END - 2])


def test_draws_end_and_follow_the_probabilities():
    torch.manual_seed(0)
    decoder = LSTMDecoder(6, D, embedding=4, hidden=8).double()
    z = torch.randn(1, D).double()
    draws = SentenceDistribution(decoder, z, 4).sample(torch.Size([6000]))[:, 0]
    assert draws.shape == (6000, 4)
    for row in draws[:200].tolist():
        if END in row:
            assert all(word == PAD for word in row[row.index(END) + 1 :])
        assert PAD not in row[: row.index(END)] if END in row else PAD not in row
    q = SentenceDistribution(decoder, z, 4)
    for row in ([END, PAD, PAD, PAD], [4, END, PAD, PAD], [UNKNOWN, 5, END, PAD]):
        p = float(q.log_prob(torch.tensor(row)).exp())
        share = float((draws == torch.tensor(row)).all(1).double().mean())
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / 6000)


@pytest.mark.parametrize("rows", [1, 4])
def test_guides_and_losses_train_it(rows):
    x = sentences(rows)
    model, encoder = small(torch.float64)
    amortized = guides.Amortized(model, encoder)
    for guide, loss in (
        (amortized, losses.ELBO()), (guides.SemiAmortized(amortized, num_steps=2, step_size=0.05), losses.ELBO()),
        (guides.ShortRun(model, num_steps=3, step_size=0.1), losses.ExpectedLogJoint()),
        (amortized, losses.FreeBits(1.0)), (amortized, losses.InfoVAE(0.0, 10.0)), (amortized, losses.IWAE(3)),
    ):  # fmt: skip
        for parameter in (*model.parameters(), *encoder.parameters()):
            parameter.grad = None
        loss.loss_and_grads(model, guide, x)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    encoder.zero_grad()
    losses.ELBO().loss_and_grads(model, guides.SemiAmortized(amortized, num_steps=2, step_size=0.05), x)
    assert all(p.grad.abs().sum() > 0 for p in encoder.lstm.parameters())  # through the inner steps


def test_gradients_through_the_inner_steps_are_right():
    """Double backward through the LSTM against central differences."""
    model, encoder = small(torch.float64)
    guide = guides.SemiAmortized(guides.Amortized(model, encoder), num_steps=2, step_size=0.1)
    x, weight = sentences(), encoder.lstm.weight_hh_l0

    def value():
        torch.manual_seed(3)
        return losses.ELBO().per_datum(model, guide, x).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    for place in ((0, 0), (9, 3), (30, 7)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
            values.append(float(value().detach()))
            with torch.no_grad():
                weight[place] -= step
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[place]), rel=1e-4, abs=1e-7)


def test_word_dropout_is_for_training():
    model, encoder = small(word_dropout=0.5)
    guide = guides.Amortized(model, encoder)
    x = sentences()
    model.eval()
    still = [evidence.log_weights(model, guide, x, num_samples=3) for _ in range(2)]
    assert torch.equal(*still)
    model.train()
    assert torch.equal(evidence.log_weights(model, guide, x, num_samples=3), still[0])  # evaluation is evaluation
    torch.manual_seed(0)
    z = torch.zeros(4, D)
    shown = [SentenceDistribution(model.decoder, z, 6, 0.5).log_prob(x) for _ in range(2)]
    assert not torch.equal(*shown)


def test_a_language_model_learns_and_perplexity_is_its_formula():
    """Sentences "a b a b ..." of random length: the only surprise is where they end."""
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join((["a", "b"] * 6)[: int(n)]) for n in torch.randint(1, 5, (256,), generator=generator)]
    vocabulary = Vocabulary.of(lines)
    data = vocabulary.encode(lines)
    torch.manual_seed(0)
    model = TextVAE(LSTMDecoder(len(vocabulary), 1, embedding=8, hidden=16), 1, max_length=8)
    guide = guides.Amortized(model, LSTMEncoder(len(vocabulary), 2, embedding=8, hidden=16))
    fit(model, guide, data.tokens, epochs=120, batch_size=64, optimizer=Adam(lr=0.01), progress=False)
    bound = evidence.iwae(model, guide, data.tokens, num_samples=50)
    assert bound.mean == pytest.approx(-math.log(4), abs=0.1)
    expected = math.exp(-float(bound.values.sum()) / int(data.lengths.sum()))
    assert perplexity(bound.values, data.lengths) == pytest.approx(expected)
    for line in vocabulary.decode(model(None, size=20)):
        words = line.split()
        assert words == (["a", "b"] * 6)[: len(words)]


MALFORMED = [
    ([4, 0, 5, END], "have words after padding"), ([PAD, 4, END, PAD], "have words after padding"),
    ([4, END, 5, END], "have words after their end"), ([4, END, END, PAD], "have words after their end"),
    ([4, PAD, PAD, PAD], "have padding, 0, before their end"), ([0, 0, 0, 0], "have padding, 0, before their end"),
    ([BEGIN, 4, END, PAD], "have the index 1 that begins"), ([4, BEGIN, END, PAD], "have the index 1 that begins"),
    ([4, END, PAD, BEGIN], "have the index 1 that begins"), ([4, WORDS, END, PAD], "have indices outside"),
    ([4, -1, END, PAD], "have indices outside the decoder's vocabulary of 7 words"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), MALFORMED)
@pytest.mark.parametrize("good", [0, 3])
def test_rows_that_are_no_sentences_are_refused_where_pyro_validates(row, words, good):
    model, encoder = small()
    x = torch.cat([sentences(3, 4)[:good], torch.tensor([row])])
    with pyro.validation_enabled(True):
        with pytest.raises(DataError, match=f"^1 of {good + 1} sentences {words}.*: "):
            model(x)
        if min(row) >= 0 and max(row) < WORDS:  # no index for the encoder to stumble on first
            with pytest.raises(DataError, match=words):
                fit(model, guides.Amortized(model, encoder), x, max_steps=1, progress=False)
            with pyro.validation_enabled(False):
                model(x)


def test_no_draw_is_refused_and_nothing_else_is_taken():
    """Of all rows of three indices exactly those are refused that no draw can be, padding and cut ones included."""
    decoder = LSTMDecoder(5, D, embedding=4, hidden=8)
    torch.manual_seed(0)
    draws = SentenceDistribution(decoder, torch.zeros(4000, D), 3).sample()
    possible = {tuple(row) for row in draws.tolist()}
    for row in itertools.product(range(5), repeat=3):
        try:
            with pyro.validation_enabled(True):
                check_sentences(torch.tensor([row]), 5)
            taken = True
        except DataError:
            taken = False
        assert taken == (row in possible), row


@pytest.mark.parametrize("rows", [1, 5])
def test_generated_sentences_are_data_with_word_dropout_too(rows):
    model, encoder = small(word_dropout=0.5)
    model.train()
    with pyro.validation_enabled(True):
        x = model(None, size=rows)
        cut = torch.full((rows, 3), UNKNOWN)  # never ended
        for batch in (x, cut):
            loss = losses.ELBO().per_datum(model, guides.Amortized(model, encoder), batch)
            assert torch.isfinite(loss).all()


def test_bad_input():
    model, _ = small()
    with pytest.raises(DataError, match="Vocabulary"):
        model(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="word_dropout"):
        small(word_dropout=1.0)


@pytest.mark.parametrize("bad", [[4, PAD, 5, END], [4, END, 5, PAD], [BEGIN, 4, END, PAD], [WORDS, END, PAD, PAD]])
def test_evidence_refuses_what_is_no_sentence(bad):
    """A decoder would give such rows a probability; no draw can be one."""
    model, encoder = small()
    x = torch.tensor([[4, 5, END, PAD], bad])
    embeds = LSTMEncoder(WORDS + 1, 2 * D, embedding=4, hidden=8)
    guide = guides.Amortized(model, encoder if max(bad) < WORDS else embeds)
    with pytest.raises(DataError, match=r"site 'x': 1 of 2 sentences have"):
        evidence.iwae(model, guide, x, num_samples=3)
