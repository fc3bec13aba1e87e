"""Manifolds of images: what is one point, how far apart points are, and how far images are off."""

from __future__ import annotations

import math

import pytest
import torch

from pyrovae.data.manifolds import REGISTRY, manifold
from pyrovae.errors import DataError

ALL = list(REGISTRY)
DOUBLE = torch.float64


def pairs(name, num=300):
    space = manifold(name)
    a = space.coordinates(num, seed=1, dtype=DOUBLE)
    b = space.coordinates(num, seed=2, dtype=DOUBLE)
    if name == "two-circles":
        b[:, 0] = a[:, 0]
    return space, a, b


def tangents(space, t, step=1e-5):
    """Derivatives of the image along the tangent axes, `[n, dim, pixels]`."""
    found = []
    for axis in range(space.dim):
        s = torch.zeros(len(t), space.dim, dtype=t.dtype)
        s[:, axis] = step
        found.append((space.render(space.move(t, s)) - space.render(space.move(t, -s))) / (2 * step))
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", ALL)
def test_one_image_for_one_point_and_no_other(name):
    """Image distance over geodesic distance has a positive lower bound over all pairs; lifts are one image."""
    space = manifold(name)
    t = torch.cat([space.grid(300), space.coordinates(100, seed=3, dtype=DOUBLE)])
    torch.testing.assert_close(space.render(space.lifts(t)), space.render(t).expand(len(space.lifts(t)), -1, -1))
    images = space.render(t)
    near = space.move(t, 1e-3 * torch.randn(len(t), space.dim, dtype=DOUBLE))
    image = torch.cdist(images, torch.cat([images, space.render(near)]), compute_mode="donot_use_mm_for_euclid_dist")
    along = space.geodesic(t.unsqueeze(1), torch.cat([t, near]))
    apart = along.isfinite() & (along > 1e-7)
    speed = tangents(space, t).norm(dim=-1).mean()
    # Chord over arc: images that share no ink are equally far apart, which is least on the narrow circle (0.106).
    assert float((image[apart] / (speed * along[apart])).min()) > 0.1
    assert float(image[along < 1e-7].max()) < 1e-6
    if name == "two-circles":
        assert float(image[along.isinf()].min()) > 1.5


@pytest.mark.parametrize(("name", "tolerance"), [
    ("circle", 2e-3), ("torus", 2e-3), ("klein-bottle", 8e-3), ("sphere", 8e-3), ("projective-plane", 8e-3),
    ("two-circles", 6e-2),
])  # fmt: skip
def test_renderers_are_isometric_up_to_a_factor(name, tolerance):
    """Tangent axes are orthogonal, of one length everywhere; the narrow blob is smaller than a pixel is wide."""
    space, t, _ = pairs(name)
    jacobian = tangents(space, t)
    metric = jacobian @ jacobian.mT
    factor = metric.diagonal(dim1=1, dim2=2).mean()
    expected = factor * torch.eye(space.dim, dtype=DOUBLE).expand_as(metric)
    assert float((metric - expected).abs().max() / factor) < 2 * tolerance
    if name == "torus":  # |dT/dt1|^2 = kappa^2 sum sin^2 exp(2 kappa (cos - 1)) times sum exp(2 kappa (cos - 1))
        eight = torch.tensor(8.0, dtype=DOUBLE)
        bessel = 16 * 16 * (16 / 8) * torch.special.i1e(eight) * torch.special.i0e(eight)
        assert float(factor) == pytest.approx(float(bessel), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_geodesics(name):
    space, a, b = pairs(name)
    along = space.geodesic(a, b)
    torch.testing.assert_close(along, space.geodesic(b, a))
    for lift in space.lifts(b):
        torch.testing.assert_close(space.geodesic(a, lift), along)
    path = space.geodesic_path(a, b, 9)
    assert path.shape == (300, 9, space.coordinate_dim)
    torch.testing.assert_close(space.render(path[:, 0]), space.render(a))
    torch.testing.assert_close(space.render(path[:, -1]), space.render(b))
    steps = space.geodesic(path[:, 1:], path[:, :-1])
    torch.testing.assert_close(steps, (along / 8).unsqueeze(1).expand(-1, 8), rtol=1e-6, atol=1e-9)
    middle = path[:, 4]  # the triangle inequality is tight on a geodesic, and holds elsewhere
    torch.testing.assert_close(space.geodesic(a, middle) + space.geodesic(middle, b), along)
    other = space.coordinates(300, seed=4, dtype=DOUBLE)
    assert bool((space.geodesic(a, other) + space.geodesic(other, b) >= along - 1e-9).all())
    torch.testing.assert_close(space.geodesic_path(a, a, 3), a.unsqueeze(1).expand(-1, 3, -1))


def test_geodesics_in_closed_form():
    zero, half = torch.tensor([[0.1, 0.3]]), torch.tensor([[0.1 + math.pi, -0.3]])
    assert float(manifold("torus").geodesic(zero, half)) == pytest.approx(math.hypot(math.pi, 0.6), rel=1e-6)
    assert float(manifold("klein-bottle").geodesic(zero, half)) == pytest.approx(0, abs=1e-6)
    assert float(manifold("circle").geodesic(torch.tensor([[0.1]]), torch.tensor([[6.2]]))) == pytest.approx(
        2 * math.pi - 6.1, rel=1e-5
    )
    n, m = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.6, -0.8]])
    assert float(manifold("sphere").geodesic(n, m)) == pytest.approx(math.acos(-0.8), rel=1e-6)
    assert float(manifold("projective-plane").geodesic(n, m)) == pytest.approx(math.acos(0.8), rel=1e-6)
    assert float(manifold("sphere").geodesic(n, -n)) == pytest.approx(math.pi, rel=1e-6)
    path = manifold("sphere").geodesic_path(n, -n, 3)
    assert abs(float(path[0, 1, 2])) < 1e-6
    assert float(path[0, 1].norm()) == pytest.approx(1, rel=1e-6)


def test_two_circles_have_no_path_between_them():
    space = manifold("two-circles")
    a, b = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert space.geodesic(a, b).isinf().all()
    with pytest.raises(ValueError, match="no path"):
        space.geodesic_path(a, b)


@pytest.mark.parametrize("name", ALL)
def test_distance_to_the_manifold(name):
    space, t, other = pairs(name, 30)
    images = space.render(t)
    found = space.nearest(images)
    assert float(found.distance.max()) < 1e-9
    assert float(space.geodesic(found.coordinates, t).max()) < 1e-7
    assert float(space.distance(images.float()).max()) < 1e-6
    # Along a normal, and not past the centre of curvature, the foot stays where it was.
    normal = torch.randn(images.shape, dtype=DOUBLE)
    frame = torch.linalg.qr(tangents(space, t).mT).Q
    normal = normal - (frame @ (frame.mT @ normal.unsqueeze(-1))).squeeze(-1)
    normal = normal / normal.norm(dim=1, keepdim=True)
    for delta in (1e-4, 0.05, 0.3):
        moved = space.nearest(images + delta * normal)
        torch.testing.assert_close(moved.distance, torch.full((30,), delta, dtype=DOUBLE), rtol=0, atol=1e-9)
        assert float(space.geodesic(moved.coordinates, t).max()) < 1e-5
    # Far off, with several valleys of nearly one depth: never farther than the best of 10,000 points.
    far = torch.cat([torch.lerp(images, space.render(other), 0.5), 0.5 * images, torch.rand(30, 256, dtype=DOUBLE)])
    dense = torch.cdist(far, space.render(space.grid(10_000))).amin(1)
    reached = space.distance(far)
    assert bool((reached <= dense + 1e-9).all())
    assert float((dense - reached).max()) < 0.1  # and not nearer than the grid can miss
    torch.testing.assert_close(space.distance(far[:1]), reached[:1])  # alone as in a batch


def test_distance_refuses_what_is_no_image():
    space = manifold("circle")
    with pytest.raises(DataError, match=r"\[N, 256\]"):
        space.distance(torch.zeros(2, 16, 16))
    with pytest.raises(DataError, match="NaN"):
        space.distance(torch.full((1, 256), torch.nan))
    assert space.distance(torch.zeros(0, 256)).shape == (0,)


@pytest.mark.parametrize("name", ALL)
def test_samples(name):
    space = manifold(name)
    images, t = space.sample(400, seed=3)
    assert images.shape == (400, 256)
    assert images.dtype == t.dtype == torch.float32
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    torch.testing.assert_close(images, space.render(t), rtol=1e-4, atol=1e-5)
    assert torch.equal(t, space.coordinates(400, seed=3))
    again, wide = space.sample(400, seed=3, noise=0.1, dtype=DOUBLE)
    torch.testing.assert_close(wide.float(), t)
    residual = again - space.render(wide)
    assert float(residual.std()) == pytest.approx(0.1, rel=4 / math.sqrt(2 * 400 * 256))
    assert not torch.equal(space.sample(400, seed=4)[0], images)
    state = torch.get_rng_state()
    space.sample(5, noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    # Noisy images are as far off as noise has dimensions beside the manifold.
    expected = 0.02 * math.sqrt(256 - space.dim)
    noisy, _ = space.sample(200, noise=0.02, seed=5)
    assert float(space.distance(noisy).mean()) == pytest.approx(expected, rel=4 / math.sqrt(2 * 256 * 200) + 0.002)


@pytest.mark.parametrize(("name", "even", "odd"), [
    ("circle", (1, 1, 0), (1, 1, 0)), ("sphere", (1, 0, 1), (1, 0, 1)), ("torus", (1, 2, 1), (1, 2, 1)),
    ("klein-bottle", (1, 2, 1), (1, 1, 0)), ("projective-plane", (1, 1, 1), (1, 0, 0)),
    ("two-circles", (2, 2, 0), (2, 2, 0)),
])  # fmt: skip
def test_betti_numbers_have_the_euler_characteristic_of_every_field(name, even, odd):
    space = manifold(name)
    assert space.betti() == space.betti(2) == even
    assert space.betti(3) == space.betti(5) == odd
    assert even[0] - even[1] + even[2] == odd[0] - odd[1] + odd[2]


def test_render_is_differentiable_and_keeps_dtypes():
    for name in ALL:
        space, t, _ = pairs(name, 3)
        assert space.render(t.float()).dtype == torch.float32
        assert torch.autograd.gradcheck(space.render, t.clone().requires_grad_())
        assert space.render(t.expand(2, 3, -1)).shape == (2, 3, 256)
    assert manifold("torus", size=32).sample(2)[0].shape == (2, 1024)
    assert manifold("sphere", size=32, kappa=6.0).image_shape == (32, 32)


def test_a_data_set():
    data = manifold("torus").data(50, 20, noise=0.02, seed=1)
    assert data.train.shape == (50, 256)
    assert data.test.shape == (20, 256)
    assert (data.name, data.image_shape, data.binarization, data.seed) == ("torus", (16, 16), "none", 1)
    assert "noise 0.02" in data.split
    assert data.fingerprint == manifold("torus").data(50, 20, noise=0.02, seed=1).fingerprint
    assert data.fingerprint != manifold("torus").data(50, 20, noise=0.02, seed=2).fingerprint
    rest, held_out = data.split_validation(10)
    assert (len(rest.train), len(held_out)) == (40, 10)


def test_bad_inputs_say_what_to_do():
    with pytest.raises(ValueError, match="choose one of circle"):
        manifold("mobius")
    with pytest.raises(ValueError, match="prime"):
        manifold("torus").betti(4)
    with pytest.raises(ValueError, match="at least 8"):
        manifold("torus", size=4)
    with pytest.raises(ValueError, match="kappa"):
        manifold("torus", kappa=0)
    with pytest.raises(ValueError, match="noise"):
        manifold("torus").sample(3, noise=-1)
    with pytest.raises(ValueError, match="at least one"):
        manifold("torus").sample(0)
    with pytest.raises(ValueError, match="2 ends"):
        manifold("torus").geodesic_path(torch.zeros(1, 2), torch.ones(1, 2), 1)
    with pytest.raises(ValueError, match="training and test"):
        manifold("torus").data(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_path_between_antipodes_stays_on_the_sphere(dtype):
    sphere = manifold("sphere")
    a = torch.nn.functional.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).to(dtype), dim=-1)
    path = sphere.geodesic_path(a, -a, 9)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert (path.norm(dim=-1) - 1).abs().max() < tolerance
    steps = sphere.geodesic(path[:, :-1].flatten(0, 1), path[:, 1:].flatten(0, 1))
    torch.testing.assert_close(steps, torch.full_like(steps, math.pi / 8), rtol=1e-5, atol=0)
