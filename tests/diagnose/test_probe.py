"""Probes and clusterings against counts by hand and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from pyrovae.diagnose import clustering, probe


def blobs(number=900, apart=6.0, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(number) % classes
    z = torch.randn(number, 2, generator=generator)
    angle = 2 * math.pi * y / classes
    return z + apart * torch.stack([angle.cos(), angle.sin()], 1), 10 * y + 4  # labels need not start at 0


@pytest.mark.parametrize("kind", ["linear", "knn", "kmeans"])
def test_what_lies_apart_is_told_apart(kind):
    z, y = blobs()
    found = probe(z, y, kind=kind)
    assert found.accuracy > 0.99
    assert (found.num_labels, found.num_held_out) == (450, 450)
    assert kind in repr(found)


@pytest.mark.parametrize("kind", ["linear", "knn", "kmeans"])
def test_noise_is_guessed(kind):
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(3000, 4, generator=generator), torch.randint(3, (3000,), generator=generator)
    found = probe(z, y, kind=kind)
    assert abs(found.accuracy - 1 / 3) < 4 * found.se
    assert found.se == pytest.approx(math.sqrt(found.accuracy * (1 - found.accuracy) / 1500))


def test_bayes_accuracy_of_two_normals():
    """Means 2 apart, unit variances: Phi(1) for the linear probe."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(6000) % 2
    z = torch.randn(6000, 1, generator=generator) + 2 * y.unsqueeze(1)
    found = probe(z, y)
    assert abs(found.accuracy - float(torch.special.ndtr(torch.tensor(1.0)))) < 4 * found.se


def test_three_labels_are_enough_for_clusters_and_every_class_has_one():
    z, y = blobs()
    found = probe(z, y, kind="kmeans", num_labels=3)
    assert found.accuracy > 0.99
    assert found.num_held_out == 897
    assert probe(z, y, kind="knn", num_labels=3, neighbours=1).accuracy > 0.9


def test_scales_of_latents_do_not_matter_and_seeds_repeat():
    z, y = blobs(apart=1.0)
    assert probe(z, y, kind="knn").accuracy == probe(z * torch.tensor([1e3, 1e-3]), y, kind="knn").accuracy
    assert probe(z, y, kind="knn", seed=1) == probe(z, y, kind="knn", seed=1)


def test_measures_by_hand():
    """Clusters 0, 1, 3 of four; table [[3, 1], [0, 2], [0, 0], [1, 0]]."""
    clusters = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    y = torch.tensor([7, 7, 7, 9, 9, 9, 7])
    found = clustering(clusters, y)
    assert found.table.tolist() == [[3, 1], [0, 2], [0, 0], [1, 0]]
    assert found.hungarian == pytest.approx(5 / 7)
    assert found.many_to_one == pytest.approx(6 / 7)
    assert found.used == 3
    assert found.names.tolist() == [7, 9, 7, 7]
    p = found.table.double() / 7
    outer = p.sum(1, keepdim=True) * p.sum(0)
    information = (p * (p / outer).clamp_min(1e-300).log()).nan_to_num().sum()
    entropies = [-(m * m.clamp_min(1e-300).log()).sum() for m in (p.sum(0), p.sum(1))]
    assert found.nmi == pytest.approx(float(2 * information / sum(entropies)))
    pairs = [sum(math.comb(int(n), 2) for n in counts.flatten()) for counts in (
        found.table, found.table.sum(1), found.table.sum(0))]  # fmt: skip
    expected = pairs[1] * pairs[2] / math.comb(7, 2)
    assert found.ari == pytest.approx((pairs[0] - expected) / ((pairs[1] + pairs[2]) / 2 - expected))
    assert "3 of 4 clusters used" in repr(found)


def test_many_to_one_rises_with_the_number_of_clusters_and_hungarian_does_not():
    y = torch.arange(100) % 2
    singles = clustering(torch.arange(100), y)
    assert singles.many_to_one == 1.0
    assert singles.hungarian == 0.02


@pytest.mark.parametrize(
    ("call", "words"),
    [(lambda: probe(torch.zeros(4), torch.zeros(4)), "codes \\[N, D\\]"),
     (lambda: probe(torch.full((4, 1), torch.nan), torch.arange(4) % 2), "NaN"),
     (lambda: probe(torch.zeros(4, 1), torch.arange(4) % 2, num_labels=1), "num_labels"),
     (lambda: probe(torch.zeros(4, 1), torch.arange(4) % 2, num_labels=4), "num_labels"),
     (lambda: probe(torch.zeros(4, 1), torch.arange(4) % 2, kind="svm"), "kind"),
     (lambda: clustering(torch.zeros(3).long(), torch.zeros(4).long()), "both be \\[N\\]"),
     (lambda: clustering(torch.tensor([0, 5]), torch.zeros(2).long(), num_clusters=3), "between 0 and 2")],
)  # fmt: skip
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
