"""Where a number comes from travels with it, and numbers of different origin are not subtracted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench import problems

from pyrovae import evidence, fit, guides, reference
from pyrovae.nets import MLP
from pyrovae.provenance import Provenance, fingerprint, require_comparable


def test_every_result_says_which_data_it_is_about():
    model, x = problems.ppca(rows=6, latent=2, pixels=5)
    guide = guides.Amortized(model, MLP([5, 4]).double())
    result = fit(model, guide, x, max_steps=2, batch_size=3, progress=False)
    bound = evidence.iwae(model, guide, x, num_samples=40, seed=3)
    truth = reference.exact(model, x, num_samples=100)
    compared = reference.compare(guide, truth, x, num_samples=100)
    for provenance in (result.provenance, bound.provenance, truth.provenance, compared.provenance):
        assert provenance.fingerprint == fingerprint([x])
        assert provenance.num_data == 6
        assert provenance.dtype == "float64"
        assert provenance.device == "cpu"
        assert set(provenance.versions) == {"python", "pyrovae", "torch", "pyro-ppl"}
    assert bound.provenance.num_samples == 40
    assert bound.provenance.seed == 3
    assert result.provenance.kl_weight == 1.0


def test_paired_differences_need_the_same_data():
    model, x = problems.ppca(rows=6, latent=2, pixels=5)
    guide = guides.Amortized(model, MLP([5, 4]).double())
    first = evidence.elbo(model, guide, x)
    second = evidence.elbo(model, guide, x, seed=1)
    gain, se = evidence.difference(first, second)
    values = first.values - second.values
    assert gain == float(values.mean())
    assert se == pytest.approx(float(values.std()) / 6**0.5)
    with pytest.raises(ValueError, match="not comparable"):
        evidence.difference(first, evidence.elbo(model, guide, x.flip(0)))
    with pytest.raises(ValueError, match="same data"):
        evidence.difference(first, evidence.elbo(model, guide, x[:3]))


def test_a_single_pair_takes_its_error_from_the_estimates():
    model, x = problems.ppca(rows=1, latent=2, pixels=5)
    guide = guides.Amortized(model, MLP([5, 4]).double())
    first, second = (evidence.elbo(model, guide, x, seed=s) for s in (0, 1))
    _, se = evidence.difference(first, second)
    assert se == pytest.approx(float((first.se**2 + second.se**2).sqrt()))


@pytest.mark.parametrize("field", Provenance.comparable_fields)
def test_each_comparable_field_is_checked(field):
    base = Provenance(data="digits", fingerprint="a", split="test", num_data=3, binarization="static")
    require_comparable(base, dataclasses.replace(base, seed=7, threads=9))
    changed = {"num_data": 4, "kl_weight": 0.5}.get(field, "other")
    with pytest.raises(ValueError, match=field):
        require_comparable(base, dataclasses.replace(base, **{field: changed}))


def test_fingerprint_sees_values_shapes_and_dtypes():
    x = torch.arange(6.0)
    prints = {fingerprint([t]) for t in (x, x + 1, x.view(2, 3), x.double())}
    assert len(prints) == 4
