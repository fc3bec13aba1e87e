"""Paths on the manifold, off it, and between what is known of both."""

from __future__ import annotations

import math

import pytest
import torch

from pyrovae.data.manifolds import manifold
from pyrovae.diagnose.interpolation import interpolation_failure
from pyrovae.errors import DataError

NOISE = 0.02


def ends(name, num=25):
    space = manifold(name)
    return space, *(space.coordinates(num, seed=seed, dtype=torch.float64) for seed in (1, 2))


@pytest.mark.parametrize("name", ["circle", "torus", "sphere", "klein-bottle", "projective-plane"])
def test_geodesics_pass(name):
    space, a, b = ends(name, 10)
    found = interpolation_failure(space, space.render(space.geodesic_path(a, b)), NOISE)
    assert float(found.scores.max()) < 1e-6
    assert found.failed == (0.0, 0.0)
    ratio, se = found.length_ratio
    assert ratio == pytest.approx(1, abs=1e-6)
    assert se < 1e-6
    assert found.crossfade_failed[0] > 0.5  # the score could have seen it


def test_cross_fading_fails_with_the_score_in_closed_form():
    """Halfway between two images that share no ink, the nearest image of the circle is an end, |a - b| / 2 away."""
    space = manifold("circle")
    a, b = torch.tensor([[0.0]]), torch.tensor([[math.pi]])
    x, y = space.render(a), space.render(b)
    paths = torch.lerp(x.unsqueeze(1), y.unsqueeze(1), torch.linspace(0, 1, 33)[:, None])
    found = interpolation_failure(space, paths, NOISE)
    expected = float((x - y).norm()) / 2 / (NOISE * 16)
    assert float(found.scores[0, 16]) == pytest.approx(expected, rel=1e-3)
    assert float(found.worst) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(found.crossfade, found.worst)
    torch.testing.assert_close(found.lengths, (x - y).norm(dim=1))
    assert found.failed == (1.0, 0.0)
    # The chord of half a turn; its images share no ink, so the path along the manifold is far longer.
    assert found.length_ratio[0] == pytest.approx(float((x - y).norm()) / float(found.geodesics), rel=1e-5)
    assert found.length_ratio[0] < 0.3
    # Twice the noise halves the score; where it is large, nothing can fail, and the control says so.
    loud = interpolation_failure(space, paths, 10 * NOISE)
    torch.testing.assert_close(loud.scores * 10, found.scores)
    assert loud.failed == loud.crossfade_failed == (0.0, 0.0)


def test_noisy_data_score_one():
    space = manifold("torus")
    images, _ = space.sample(330, noise=NOISE, seed=3)
    found = interpolation_failure(space, images.reshape(10, 33, 256), NOISE)
    # chi with 254 degrees of freedom, over sqrt(256)
    assert float(found.scores.mean()) == pytest.approx(math.sqrt(254 / 256), abs=4 / math.sqrt(2 * 256 * 330) + 0.002)
    assert found.failed == (0.0, 0.0)


def test_detours_jumps_and_shares():
    """Half of the paths go the long way round and a quarter leave the manifold for one image of all."""
    space = manifold("circle")
    start, turn = torch.linspace(0, 6, 40)[:, None], torch.linspace(0.5, 2.5, 40)[:, None]
    share = torch.linspace(0, 1, 65)
    angle = start + turn * share
    angle[::2] = (start - (2 * math.pi - turn) * share)[::2]
    paths = space.render(angle.unsqueeze(-1))
    paths[::4, 30] = 0
    found = interpolation_failure(space, paths, NOISE, between=(start, start + turn))
    share_failed, se = found.failed
    assert share_failed == 0.25
    assert se == pytest.approx(math.sqrt(0.25 * 0.75 / 40))
    assert (found.worst > 3).tolist() == [True, False, False, False] * 10
    ratios = found.lengths / found.geodesics
    torch.testing.assert_close(ratios[1::2], torch.ones(20), rtol=2e-3, atol=0)
    long = ((2 * math.pi - turn) / turn)[2::4, 0]
    torch.testing.assert_close(ratios[2::4], long, rtol=2e-2, atol=0)
    blank = ratios[::4] - ((2 * math.pi - turn) / turn)[::4, 0]
    assert bool((blank * found.geodesics[::4] > 4).all())  # there and back: twice an image's norm, 2.66, less a step
    ratio, ratio_se = found.length_ratio
    assert ratio == pytest.approx(float(found.lengths.sum() / found.geodesics.sum()), rel=1e-5)
    # The delta method's standard error against the bootstrap's.
    index = torch.randint(40, (2000, 40), generator=torch.Generator().manual_seed(0))
    draws = found.lengths[index].sum(1) / found.geodesics[index].sum(1)
    assert ratio_se == pytest.approx(float(draws.std()), rel=0.15)
    mean, mean_se = found.mean_worst
    assert mean == pytest.approx(float(found.worst.mean()))
    assert mean_se == pytest.approx(float(found.worst.std()) / math.sqrt(40), rel=1e-5)


def test_pairs_in_two_components_fail_and_have_no_length():
    space = manifold("two-circles")
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    b = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    paths = torch.lerp(space.render(a).unsqueeze(1), space.render(b).unsqueeze(1), torch.linspace(0, 1, 33)[:, None])
    paths[1] = space.render(space.geodesic_path(a[1:], b[1:]))[0]
    found = interpolation_failure(space, paths, 0.01)
    assert (found.worst > 3).tolist() == [True, False]
    assert found.geodesics.isinf().tolist() == [True, False]
    assert found.length_ratio[0] == pytest.approx(1, rel=1e-4)
    alone = interpolation_failure(space, paths[:1], 0.01)
    assert math.isnan(alone.length_ratio[0])
    assert "nan" in repr(alone)


def test_a_result_says_what_it_is():
    space, a, b = ends("torus", 4)
    paths = space.render(space.geodesic_path(a, b)).float()
    found = interpolation_failure(space, paths, NOISE)
    assert found.scores.dtype == found.geodesics.dtype == torch.float32
    for part in ("4 paths of 33 images against the torus, pixel noise 0.02", "0.0% +- 0.0%", "cross-fading", "1.000"):
        assert part in repr(found)
    assert found._repr_html_().startswith("<pre>")
    assert found.provenance.num_data == 4
    alone = interpolation_failure(space, paths[:1], NOISE)
    torch.testing.assert_close(alone.lengths, found.lengths[:1])
    assert math.isnan(alone.mean_worst[1])


def test_bad_inputs_say_what_to_do():
    space = manifold("torus")
    paths = torch.zeros(2, 5, 256)
    with pytest.raises(DataError, match=r"\[P, T, 256\]"):
        interpolation_failure(space, paths[0], NOISE)
    with pytest.raises(DataError, match="NaN"):
        interpolation_failure(space, paths * torch.nan, NOISE)
    with pytest.raises(ValueError, match="positive"):
        interpolation_failure(space, paths, 0.0)
    with pytest.raises(ValueError, match=r"coordinates \[2, 2\]"):
        interpolation_failure(space, paths, NOISE, between=(torch.zeros(2, 1), torch.zeros(2, 1)))
