"""Training that takes turns: the guide ahead of the model, batches of one length, KL schedules."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyrovae import checkpoint, diagnose, fit, guides, handlers, losses
from pyrovae.data.text import PAD, Vocabulary
from pyrovae.errors import DataError, IncompatibleError
from pyrovae.models import PPCA, VAE, LadderVAE, LanguageModel, PixelModel, TextVAE, no_latents
from pyrovae.nets import MLP, LadderDecoder, LadderEncoder, LinearHeadDecoder, LSTMDecoder, LSTMEncoder, PixelCNN
from pyrovae.optim import Adam
from pyrovae.schedules import AggressiveEncoder, DeepFirst, RisingTemperature


def toy(rows=200, seed=0, latent_dim=1, dtype=torch.float64):
    torch.manual_seed(seed)
    loading = torch.tensor([[1.5], [-1.0], [0.5]], dtype=dtype)[:, :latent_dim]
    x = torch.randn(rows, latent_dim, dtype=dtype) @ loading.T + 0.5 * torch.randn(rows, 3, dtype=dtype)
    model = PPCA(torch.randn(3, latent_dim, dtype=dtype), noise=1.0)
    return x, model, guides.Amortized(model, nn.Linear(3, 2 * latent_dim).to(dtype))


def maximum_log_likelihood(x, latent_dim):
    """Of probabilistic PCA, per datum (Tipping & Bishop 1999), from the eigenvalues of the covariance."""
    size = x.shape[1]
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = values[latent_dim:].mean()
    log_det = values[:latent_dim].log().sum() + (size - latent_dim) * noise.log()
    return float(-0.5 * (size * math.log(2 * math.pi) + log_det + size))


@pytest.mark.parametrize("aggressive", [False, True])
def test_both_ways_of_training_reach_maximum_likelihood(aggressive):
    """A linear model has no local optimum for the guide's lead to change; the bound is log p(x) at the end."""
    x, model, guide = toy()
    schedule = AggressiveEncoder(max_updates=10, window=2, patience=3) if aggressive else None
    if aggressive:
        fit(model, guide, x, schedule=schedule, validation=x[:50], epochs=30, batch_size=200, optimizer=Adam(lr=0.02),
            progress=False)  # fmt: skip
        assert not schedule.active
        assert len(schedule.information) >= 4
    for rate in (0.02, 0.002):
        fit(model, guide, x, loss=losses.ELBO(num_particles=4), epochs=300, batch_size=200, progress=False,
            optimizer=Adam(lr=rate))  # fmt: skip
    exact = float(model.log_evidence(x).mean().detach())
    assert exact == pytest.approx(maximum_log_likelihood(x, 1), abs=2e-3)


def test_the_guide_leads_and_the_model_follows():
    """While the guide leads a step moves it several times on its own batches, then the model once; later both move."""

    class Counted(Trace_ELBO):
        batches = []

        def loss_and_grads(self, model, guide, x):
            self.batches.append(x.clone())
            return super().loss_and_grads(model, guide, x)

    x, model, guide = toy()
    loss, schedule = Counted(), AggressiveEncoder(max_updates=7, window=10)
    fit(model, guide, x, loss=loss, schedule=schedule, validation=x, max_steps=1, batch_size=20, progress=False)
    calls = loss.batches
    assert len(calls) == 8  # seven of the guide, one of the model
    assert torch.equal(calls[0], calls[-1])
    assert not any(torch.equal(calls[0], other) for other in calls[1:-1])
    assert schedule.active


def test_only_one_side_moves_in_a_block():
    _, model, guide = toy()
    schedule = AggressiveEncoder()
    turns = schedule.blocks(guide, None, 0)
    first = next(turns)
    own, other = next(guide.parameters()), next(model.parameters())
    assert first.owns(own)
    assert not first.owns(other)
    block = first
    for number in range(1, 200):  # the loss falls for a while, then rises
        block = turns.send(max(0.0, 35.0 - number) if number < 41 else 50.0)
        if block.others:
            break
        assert block.fresh
    assert number == 50  # the fifth window is the first one above its predecessor
    assert block.owns(other)
    assert not block.owns(own)
    assert not block.fresh


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 5), (3, 6)])
def test_the_lead_ends_when_information_does_not_rise(monkeypatch, patience, epochs):
    """Epochs that are not the best so far count in all, not in a row."""
    x, model, guide = toy()
    values = iter([1.0, 2.0, 1.9, 2.1, 2.0, 2.1])
    monkeypatch.setattr("pyrovae.diagnose.collapse.mutual_information", lambda *args: next(values))
    schedule = AggressiveEncoder(patience=patience)
    schedule.start((x,))
    while schedule.active:
        schedule.end_epoch(model, guide)
    assert len(schedule.information) == epochs


def test_resumed_equals_unbroken(tmp_path):
    states = []
    for lengths in ((9,), (4, 9)):
        path = tmp_path / f"{len(lengths)}.pt"
        for steps in lengths:
            x, model, guide = toy()
            schedule = AggressiveEncoder(max_updates=6, window=2, patience=2)
            fit(model, guide, x, schedule=schedule, validation=x[:30], max_steps=steps, batch_size=64, checkpoint=path,
                progress=False)  # fmt: skip
        states.append((checkpoint.load(path), schedule))
    (one, first), (two, second) = states
    assert first.information == second.information
    assert first.active == second.active
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key], key


def leaves(tree, prefix=""):
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in leaves(value, f"{prefix}.{key}").items()}
    return {prefix: tree}


def ladder():
    torch.manual_seed(0)
    model = LadderVAE(LadderDecoder([1, 1, 1], (4,), 8), [1, 1, 1], "gaussian")
    return model, guides.Amortized(model, LadderEncoder([1, 1, 1], (4,), 8)), torch.randn(40, 4)


def test_weights_of_a_ladder_that_is_not_whole_are_not_kept():
    """Early stopping begins when all groups are in, however good the held-out ELBO was before."""
    model, guide, x = ladder()
    schedule = DeepFirst(stage=20, fade=10)
    assert schedule.settled(guide) == 50
    result = fit(model, guide, x, schedule=schedule, validation=x[:20], patience=1000, epochs=16, batch_size=10,
                 optimizer=Adam(lr=0.5), progress=False)  # fmt: skip
    assert result.best_epoch >= 13
    assert model.fade.tolist() == [1.0, 1.0, 1.0]


def test_a_ladder_that_stays_unfinished_warns():
    model, guide, x = ladder()
    with pytest.warns(UserWarning, match="takes 50 steps but training stops at step 12"):
        fit(model, guide, x, schedule=DeepFirst(stage=20, fade=10), max_steps=12, batch_size=10, progress=False)


class Watched(guides.ShortRun):
    """A short run that notes its temperature in training, and elsewhere."""

    def _draws(self, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append((self.model.training, self.temperature))
        return super()._draws(*args, **kwargs)


def test_the_published_temperatures():
    schedule = RisingTemperature(epoch=10)
    by_epoch = [schedule.at(10 * epoch, 0.2) for epoch in range(20)]
    assert by_epoch == pytest.approx([0.05] * 15 + [0.1, 0.15, 0.2, 0.2, 0.2])
    assert schedule.at(9, 0.2) == schedule.at(149, 0.2) == 0.05
    assert schedule.at(159, 0.2) == pytest.approx(0.1)
    _, model, _ = toy()
    assert schedule.settled(guides.ShortRun(model, temperature=0.2)) == 170
    assert schedule.settled(guides.ShortRun(model, temperature=0.05)) == 0
    assert RisingTemperature(epoch=10, hold=2, rise=0.1).settled(guides.ShortRun(model, temperature=0.2)) == 30


def test_chains_warm_up_in_training_alone():
    """Epoch by epoch in training; held-out data and what comes after see the guide's own temperature."""
    x, model, _ = toy()
    guide = Watched(model, 2, 0.1, temperature=0.2)
    fit(model, guide, x, schedule=RisingTemperature(epoch=4, hold=2, rise=0.1), epochs=5, batch_size=50,
        validation=x[:20], progress=False)  # fmt: skip
    training = [temperature for flag, temperature in guide.seen if flag]
    assert training[-20:] == pytest.approx([0.05] * 8 + [0.15] * 4 + [0.2] * 8)
    assert {temperature for flag, temperature in guide.seen if not flag} == {0.2}
    assert guide.temperature == 0.2


def test_a_run_resumed_while_its_chains_warm_up_equals_an_unbroken_one(tmp_path):
    found = []
    for lengths in ((14,), (6, 14)):  # 6 is within the second epoch
        path = tmp_path / f"{len(lengths)}.pt"
        for steps in lengths:
            x, model, _ = toy()
            guide = guides.ShortRun(model, 3, 0.2, temperature=0.2)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*RisingTemperature.* takes 12 steps but")
                result = fit(model, guide, x, schedule=RisingTemperature(epoch=4, hold=1), max_steps=steps,
                             batch_size=50, checkpoint=path, progress=False)  # fmt: skip
        found.append((result.curve, [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    x, model, _ = toy()
    fit(model, guides.ShortRun(model, 3, 0.2, temperature=0.2), x, max_steps=14, batch_size=50, progress=False)
    assert not all(torch.equal(a, b) for a, b in zip(found[0][1], model.parameters(), strict=True))


def test_an_update_that_fails_leaves_the_temperature():
    _, model, _ = toy()
    guide = guides.ShortRun(model, 2, temperature=0.2)
    turns = RisingTemperature(epoch=4).blocks(guide, None, 0)
    next(turns)
    assert guide.temperature == 0.05
    turns.close()
    assert guide.temperature == 0.2


def test_what_a_rising_temperature_is_not_for():
    x, model, guide = toy()
    for other, message in (
        (guide, "Langevin chains"),
        (guides.ShortRun(model, 2, kernel="hmc"), "Langevin chains"),
        (guides.ShortRun(model, 2, temperature=0.01), "above the guide's temperature of 0.01"),
    ):
        with pytest.raises(IncompatibleError, match=message):
            fit(model, other, x, schedule=RisingTemperature(epoch=2), max_steps=1, progress=False)
    for options in ({"epoch": 0}, {"epoch": 2, "hold": -1}, {"epoch": 2, "first": -0.1}, {"epoch": 2, "rise": 0.0}):
        with pytest.raises(ValueError, match=r"at least|not be negative"):
            RisingTemperature(**options)
    with pytest.warns(UserWarning, match="takes 6 steps but training stops at step 3"):
        fit(model, guides.ShortRun(model, 2, temperature=0.2), x, schedule=RisingTemperature(epoch=2, hold=1),
            max_steps=3, progress=False)  # fmt: skip


def test_what_it_is_not_for():
    x, model, guide = toy()
    with pytest.raises(DataError, match="validation="):
        fit(model, guide, x, schedule=AggressiveEncoder(), max_steps=1, progress=False)
    with pytest.raises(IncompatibleError, match="Amortized"):
        fit(model, guides.ShortRun(model, num_steps=2), x, schedule=AggressiveEncoder(), validation=x, max_steps=1,
            progress=False)  # fmt: skip
    for options in ({"max_updates": 0}, {"window": 0}, {"patience": 0}, {"num_data": 1}):
        with pytest.raises(ValueError, match="at least"):
            AggressiveEncoder(**options)


def test_mutual_information_alone():
    """The same estimate as beside KL and active units; closed form of a linear Gaussian encoder."""
    torch.manual_seed(0)
    model = VAE(LinearHeadDecoder(1, [4], (1,)).double(), 1, "gaussian")
    encoder = nn.Linear(1, 2).double()
    a, s = 1.2, 0.4
    encoder.weight.data = torch.tensor([[a], [0.0]]).double()
    encoder.bias.data = torch.tensor([0.0, 2 * math.log(s)]).double()
    guide = guides.Amortized(model, encoder)
    x = torch.randn(3000, 1, dtype=torch.float64)
    found = diagnose.mutual_information(model, guide, x, num_samples=3)
    assert found == pytest.approx(0.5 * math.log(1 + a**2 / s**2), abs=0.05)
    assert found == pytest.approx(
        diagnose.information(model, guide, x, num_samples=100).mutual_information, abs=0.03
    )
    assert diagnose.mutual_information(model, guide, x[:1]) == pytest.approx(0.0, abs=1e-12)


def test_exponential_schedule():
    schedule = handlers.ExponentialSchedule(10.0)
    assert schedule(0) == 0
    assert schedule(7) == pytest.approx(1 - math.exp(-0.7))
    assert schedule.steps == 47
    assert schedule(46) < 0.99 + 1e-9
    assert schedule(47) == 1.0
    x, model, guide = toy()
    assert fit(model, guide, x, kl_weight=schedule, max_steps=50, progress=False).kl_weight == 1.0
    with pytest.warns(UserWarning, match="KL schedule takes 47 steps"):
        found = fit(model, guide, x, kl_weight=schedule, max_steps=8, progress=False)
    assert found.kl_weight == pytest.approx(schedule(7))
    with pytest.raises(ValueError, match="positive"):
        handlers.ExponentialSchedule(0.0)


def texts(rows=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = ["a", "b", "c", "d", "e", "f", "g"]
    lines = [" ".join(words[int(i)] for i in torch.randint(7, (int(n),), generator=generator))
             for n in torch.randint(1, 15, (rows,), generator=generator)]  # fmt: skip
    vocabulary = Vocabulary.of(lines)
    return vocabulary, vocabulary.encode(lines)


def test_fit_takes_sentences_by_length():
    """Every sentence once an epoch, in batches with hardly any padding."""
    vocabulary, sentences = texts()
    seen, padding = [], 0

    class Watched(LanguageModel):
        def forward(self, x=None, size=None):
            nonlocal padding
            if self.training and torch.is_grad_enabled():
                seen.extend(tuple(row[row != PAD].tolist()) for row in x)
                padding += int((x == PAD).sum())
            return super().forward(x, size)

    torch.manual_seed(0)
    model = Watched(LSTMDecoder(len(vocabulary), 0, embedding=4, hidden=8))
    result = fit(model, no_latents, sentences, validation=sentences[:11], epochs=1, batch_size=7, progress=False)
    assert sorted(seen) == sorted(tuple(row[row != PAD].tolist()) for row in sentences.tokens)
    assert padding < 0.15 * int(sentences.lengths.sum())
    held_out = float(model.log_prob(sentences.tokens[:11]).mean().detach())
    assert result.validation[0][1] == pytest.approx(held_out, abs=1e-4)
    assert result.objective == "ELBO"


def test_training_on_sentences_resumes(tmp_path):
    found = []
    for lengths in ((13,), (5, 13)):
        path = tmp_path / f"{len(lengths)}.pt"
        for steps in lengths:
            vocabulary, sentences = texts()
            torch.manual_seed(0)
            model = TextVAE(LSTMDecoder(len(vocabulary), 2, embedding=4, hidden=8), 2, word_dropout=0.3)
            guide = guides.Amortized(model, LSTMEncoder(len(vocabulary), 4, embedding=4, hidden=8))
            result = fit(model, guide, sentences, max_steps=steps, batch_size=7, checkpoint=path, progress=False,
                         kl_weight=0.5)  # fmt: skip
        found.append((result.curve, [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_language_model_is_a_text_vae_without_a_code():
    """A decoder whose code is ignored scores as the language model with its weights."""
    torch.manual_seed(0)
    with_code, without = LSTMDecoder(9, 2, embedding=4, hidden=8), LSTMDecoder(9, 0, embedding=4, hidden=8)
    with_code.start.weight.data.zero_()
    with_code.lstm.weight_ih_l0.data[:, 4:] = 0
    without.start.bias.data = with_code.start.bias.data
    without.embed, without.out = with_code.embed, with_code.out
    without.lstm.load_state_dict({**with_code.lstm.state_dict(),
                                  "weight_ih_l0": with_code.lstm.weight_ih_l0.data[:, :4]})  # fmt: skip
    x = torch.tensor([[4, 5, 2, 0], [6, 7, 8, 2]])
    model = LanguageModel(without)
    mine = model.log_prob(x)
    theirs = losses.ELBO().per_datum(*_pair(with_code), x).detach()
    torch.testing.assert_close(mine.detach(), theirs, rtol=1e-5, atol=1e-5)
    assert float(Trace_ELBO().loss(model, no_latents, x)) == pytest.approx(-float(mine.detach().sum()), rel=1e-6)


def _pair(decoder):
    model = TextVAE(decoder, 2)
    encoder = MLP([4, 4]).requires_grad_(False)
    for p in encoder.parameters():
        p.zero_()  # the prior: no KL
    return model, guides.Amortized(model, encoder, encoder_input=lambda x: x.float())


def test_frozen_parameters_make_no_noise(recwarn):
    x, model, guide = toy()
    before = [p.detach().clone() for p in model.requires_grad_(False).parameters()]
    fit(model, guide, x, max_steps=2, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not [w for w in recwarn if "param store" in str(w.message)]


def test_pixel_model_is_exact():
    """log p of the four images of two pixels sums to one; it is what training maximises, and refuses a guide."""
    torch.manual_seed(0)
    model = PixelModel(PixelCNN(1, 1, width=8, kernel_sizes=(3, 3)), (1, 2)).double()
    images = torch.tensor([[a, b] for a in (0.0, 1.0) for b in (0.0, 1.0)]).double().view(4, 1, 1, 2)
    total = torch.logsumexp(model.log_prob(images), 0)
    assert float(total.detach()) == pytest.approx(0.0, abs=1e-12)
    loss = float(Trace_ELBO().loss(model, no_latents, images))
    assert loss == pytest.approx(-float(model.log_prob(images).detach().sum()), rel=1e-12)
    x = images[[3, 3, 3, 0]]
    result = fit(model, no_latents, x, epochs=150, batch_size=4, optimizer=Adam(lr=0.03), progress=False)
    entropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert entropy - 0.05 < result.curve[-1] < entropy + 1e-9
    assert model(None, size=1).shape == (1, 1, 1, 2)
    with pytest.raises(DataError, match="reshape either"):
        model.log_prob(torch.zeros(2, 2).double())
    with pytest.raises(IncompatibleError, match="no_latents"):
        fit(model, guides.Amortized(model, MLP([2, 4])), x, max_steps=1, progress=False)


def test_a_model_without_latents_refuses_guides():
    model = LanguageModel(LSTMDecoder(9, 0, embedding=4, hidden=8))
    x = torch.tensor([[4, 5, 2]])
    with pytest.raises(IncompatibleError, match="no_latents"):
        fit(model, guides.Amortized(model, LSTMEncoder(9, 4)), x, max_steps=1, progress=False)
    with pytest.raises(ValueError, match="latent_dim=0"):
        LanguageModel(LSTMDecoder(9, 2))
    assert model(None, size=1).shape == (1, 30)
