"""Short runs on generators of several layers and on text: the law of a chain over all groups at once, no collapse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyrovae import fit, guides
from pyrovae.data.text import Vocabulary
from pyrovae.diagnose.collapse import active_units
from pyrovae.guides.short_run import text_steps
from pyrovae.models import LadderVAE, TextVAE
from pyrovae.nets import LadderDecoder, LSTMDecoder, LSTMEncoder
from pyrovae.optim import Adam

SIZES = [1, 2, 2]  # shallowest first
CHAINS, K, S = 10_000, 25, 0.05


class Linear(nn.Module):
    """x = W z, the deepest group first in z; no two groups are independent given x."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z):
        return z @ self.weight.T


def test_one_chain_of_all_groups_has_its_exact_law():
    """The published K = 25 steps of s = 0.05 on a linear ladder: mean (1 - A^K) m, A = 1 - s^2 / 2 Lambda."""
    torch.manual_seed(0)
    weight, noise = torch.randn(6, 5).double(), 0.15
    model = LadderVAE(Linear(weight), SIZES, "gaussian", noise=noise)
    x = torch.randn(2, 6).double()
    eye = torch.eye(5).double()
    precision = eye + weight.T @ weight / noise**2
    centre = torch.linalg.solve(precision, weight.T @ x.T / noise**2).T
    shrink = eye - 0.5 * S**2 * precision
    assert shrink.diagonal().min() > 0
    left = torch.linalg.matrix_power(shrink, K)
    mean = centre - centre @ left.T
    covariance = left @ left + S**2 * sum(torch.linalg.matrix_power(shrink, 2 * k) for k in range(K))

    guide = guides.ShortRun(model, K, S)
    torch.manual_seed(1)
    draws = guide.draws(CHAINS, x)
    assert guide.space(x).sites[0].name == "z3"
    error = (covariance.diagonal() / CHAINS).sqrt()
    assert ((draws.mean(0) - mean).abs() < 4.5 * error).all()
    scale = covariance.diagonal().sqrt()
    for datum in range(2):
        found = torch.cov(draws[:, datum].T)
        assert ((found - covariance) / scale.outer(scale)).abs().max() < 4.5 * (2 / CHAINS) ** 0.5
    assert ((centre - mean).abs() > 20 * error).any()  # the chain has not arrived, and the test would see it
    correlation = covariance / scale.outer(scale)
    assert correlation[:2, 2:].abs().max() > 0.3  # across groups: one chain each would miss it


def test_a_step_of_a_ladder_takes_the_gradient_of_all_groups():
    """One noiseless step is u + s^2 / 2 (d log p(x | u) / du - u), in every group, through a net of real injections."""
    torch.manual_seed(0)
    model = LadderVAE(LadderDecoder(SIZES, (1, 8, 8), 16), SIZES, "gaussian", noise=0.15).double()
    x = torch.rand(3, 1, 8, 8).double()
    torch.manual_seed(1)
    after = guides.ShortRun(model, 1, 0.3, temperature=0.0).draws(1, x)[0]
    torch.manual_seed(1)
    u = guides.ShortRun(model).space(x).prior(1, x)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(-0.5 * ((x - model.mean(u)) / 0.15).square().sum(), u)
    expected = u + 0.045 * (gradient - u)
    torch.testing.assert_close(after, expected.detach(), rtol=1e-9, atol=1e-9)
    parts = [gradient[:, where].abs().max() for where in model.groups.values()]
    assert min(parts) > 1e-3  # no group is left alone


def markov_text(rows=2100, words=20):
    """Sentences in which the word before leaves three choices: a decoder that reads it needs no code."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(words, (words, 3), generator=generator)
    lines = []
    for _ in range(rows):
        line = [int(torch.randint(words, (), generator=generator))]
        for _ in range(int(torch.randint(5, 10, (), generator=generator))):
            line.append(int(successors[line[-1], int(torch.randint(3, (), generator=generator))]))
        lines.append(" ".join(f"w{word}" for word in line))
    vocabulary = Vocabulary.of(lines)
    sentences = vocabulary.encode(lines)
    return len(vocabulary), sentences[: rows - 100], sentences[rows - 100 :]


@pytest.mark.slow
def test_short_runs_keep_latents_that_a_vae_loses():
    """The same LSTM decoder, steps and data: all latents active under the published chain, none under an encoder."""
    words, train, test = markov_text()
    found = {}
    for name in ("short-run", "VAE"):
        torch.manual_seed(0)
        model = TextVAE(LSTMDecoder(words, 4, embedding=16, hidden=32), 4)
        guide = guides.ShortRun(model, 20, text_steps(), temperature=0.2)
        if name == "VAE":
            guide = guides.Amortized(model, LSTMEncoder(words, 8, embedding=16, hidden=32))
        fit(model, guide, train, epochs=3, batch_size=50, optimizer=Adam(lr=5e-3), progress=False)
        found[name] = active_units(model, guide, test.rows(), num_samples=50)
    assert found["short-run"].active.all()
    assert not found["VAE"].active.any()
    gain = found["short-run"].reconstruction - found["VAE"].reconstruction
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
