"""Behaviour on real data: UCI digits, one decoder trained with an amortized guide, then frozen."""

from __future__ import annotations

import pytest
import torch

from pyrovae import data, diagnose, evidence, fit
from pyrovae.comparison.recipes import TUNED, build_guide, build_model


@pytest.fixture(scope="module")
def frozen():
    images = data.load("digits")
    vae = build_model(64, 8, "bernoulli", 0, "cpu")
    guide = build_guide("amortized", vae, 0, "cpu")
    result = fit(vae, guide, images.train, epochs=60, batch_size=100, progress=False)
    assert result.curve[-1] > result.curve[0] + 10  # from about -45 to about -23.5 nats per datum
    vae.requires_grad_(False).eval()
    return vae, guide, images, evidence.log_weights(vae, guide, images.test)


@pytest.mark.parametrize("name", ["semi-amortized", "laplace", "mixture"])
def test_guides_as_posteriors_of_one_frozen_decoder(frozen, name):
    vae, amortized, images, base = frozen
    guide = build_guide(name, vae, 0, "cpu", amortized.encoder)
    if name in TUNED:
        fit(vae, guide, images.train, epochs=10, batch_size=100, progress=False)
    weights = evidence.log_weights(vae, guide, images.test)
    (elbo, iwae), (elbo_base, iwae_base) = evidence.summarize(weights), evidence.summarize(base)
    gain, se = evidence.difference(elbo, elbo_base)
    if name != "mixture":
        assert gain > 3 * se
    # The same decoder: every bound is one of the same log p(x), and no proposal may lose it.
    change, se = evidence.difference(iwae, iwae_base)
    assert change > -3 * se
    assert float((diagnose.pareto_khat(weights) > 0.7).double().mean()) < 0.15


def test_bounds_are_ordered_datum_by_datum(frozen):
    _, _, _, base = frozen
    elbo, iwae = evidence.summarize(base)
    assert (iwae.values > elbo.values).all()
    assert -30 < elbo.mean < -20
    assert iwae.mean - elbo.mean == pytest.approx(0.37, abs=0.2)


def test_mnist_when_it_is_at_hand():
    """MNIST from PYROVAE_DATA: one epoch lifts the ELBO above -210 nats per datum, statically binarised."""
    try:
        images = data.load("mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    vae = build_model(784, 16, "bernoulli", 0, "cpu")
    guide = build_guide("amortized", vae, 0, "cpu")
    fit(vae, guide, images.train[:20_000], epochs=1, batch_size=100, progress=False)
    estimate = evidence.elbo(vae, guide, images.test[:200], num_samples=20)
    assert estimate.mean > -210
    assert torch.isfinite(estimate.values).all()
