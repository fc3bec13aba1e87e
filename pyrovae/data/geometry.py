"""What is common to manifolds of images: drawing, geodesics through the cover, nearest points, data sets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pyrovae.data.images import ImageData
from pyrovae.data.nearest import Nearest, nearest

__all__ = ["Manifold", "require_prime"]


class Manifold(ABC):
    """A closed manifold of images.

    Args:
        size: g, pixels on a side.
        kappa: concentration of the bump; of no meaning for the circles.

    Attributes:
        name: its key in `REGISTRY`.
        dim: of the manifold.
        embedding_dim: of the smallest Euclidean space that holds a copy of it.
        coordinate_dim: numbers that say where a point lies: angles, or a unit vector's three.
    """

    name: ClassVar[str]
    dim: ClassVar[int]
    embedding_dim: ClassVar[int]
    coordinate_dim: ClassVar[int]
    _betti: ClassVar[dict[str, tuple[int, int, int]]]

    def __init__(self, size: int = 16, kappa: float = 4.0) -> None:
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels for the bump to be seen, got {size}")
        if not kappa > 0:
            raise ValueError(f"kappa must be positive, got {kappa}")
        self.size, self.kappa = size, kappa

    @property
    def pixels(self) -> int:
        """Of an image, g^2."""
        return self.size**2

    @property
    def image_shape(self) -> tuple[int, int]:
        """`(g, g)`, for pictures."""
        return (self.size, self.size)

    def betti(self, prime: int = 2) -> tuple[int, int, int]:
        """Betti numbers b0, b1, b2 over the field of `prime` elements (all odd primes agree)."""
        require_prime(prime)
        return self._betti["even" if prime == 2 else "odd"]

    @abstractmethod
    def render(self, t: Tensor) -> Tensor:
        """Images `[..., g * g]` in [0, 1] of coordinates `[..., coordinate_dim]`; differentiable, keeps the dtype."""

    @abstractmethod
    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Uniform coordinates `[num, coordinate_dim]`, float64."""

    @abstractmethod
    def grid(self, num: int) -> Tensor:
        """About `num` coordinates `[G, coordinate_dim]`, float64, evenly spread, none twice."""

    @abstractmethod
    def move(self, t: Tensor, step: Tensor) -> Tensor:
        """Coordinates after a small step `[..., dim]` in the tangent plane (radians), exact to second order."""

    @abstractmethod
    def lifts(self, t: Tensor) -> Tensor:
        """All points of the cover over `t`, `[L, ..., coordinate_dim]`."""

    @abstractmethod
    def cover_distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance on the cover, `[...]`."""

    @abstractmethod
    def cover_path(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """The point of the cover's geodesic from `a` to `b` at `share` `[...]` of its length."""

    def coordinates(self, num: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform coordinates `[num, coordinate_dim]`."""
        return self._draw(num, seed)[0].to(dtype)

    def sample(
        self, num: int, *, seed: int = 0, noise: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Images at uniform coordinates.

        Args:
            num: how many.
            seed: of coordinates and noise; the coordinates do not depend on `noise`.
            noise: standard deviation of Gaussian pixel noise (not clipped: noisy pixels may leave [0, 1]).
            dtype: of both; float32 and float64 are the same draws.

        Returns:
            images `[num, g * g]` and their coordinates `[num, coordinate_dim]`.
        """
        if noise < 0:
            raise ValueError(f"noise is a standard deviation, at least 0, got {noise}")
        t, generator = self._draw(num, seed)
        images = self.render(t)
        if noise:
            images = images + noise * torch.randn(images.shape, generator=generator, dtype=torch.float64)
        return images.to(dtype), t.to(dtype)

    def data(
        self, num_train: int = 5000, num_test: int = 1000, *, noise: float = 0.0, seed: int = 0
    ) -> ImageData:  # fmt: skip
        """A data set for training, with `split_validation` and `fingerprint` as any other; test draws come last."""
        if num_train < 1 or num_test < 1:
            raise ValueError(f"a data set needs training and test images, got {num_train} and {num_test}")
        images, _ = self.sample(num_train + num_test, seed=seed, noise=noise)
        return ImageData(
            name=self.name, train=images[:num_train], test=images[num_train:], train_labels=None, test_labels=None,
            event_shape=(self.pixels,), image_shape=self.image_shape, binarization="none", seed=seed,
            split=f"{num_train} train / {num_test} test uniform draws of seed {seed}, pixel noise {noise:g}",
        )  # fmt: skip

    def geodesic(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance along the manifold between coordinates, radians, `[...]`; the two broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        return self.cover_distance(a, self.lifts(b)).amin(0)

    def geodesic_path(self, a: Tensor, b: Tensor, num: int = 33) -> Tensor:
        """Evenly spaced coordinates of a shortest geodesic, both ends included, `[..., num, coordinate_dim]`."""
        if num < 2:
            raise ValueError(f"a path has at least its 2 ends, got num={num}")
        lifts = self.lifts(b)
        best = self.cover_distance(a, lifts).argmin(0)
        end = lifts.gather(0, best[None, ..., None].expand(1, *b.shape))[0]
        share = torch.linspace(0, 1, num, dtype=a.dtype, device=a.device)
        return torch.stack([self.cover_path(a, end, s) for s in share], dim=-2)

    def nearest(self, images: Tensor, *, progress: str | None = None) -> Nearest:
        """The nearest points of the manifold to images `[N, g * g]`, found to rounding (`pyrovae.data.nearest`)."""
        return nearest(self, images, progress=progress)

    def distance(self, images: Tensor) -> Tensor:
        """Euclidean distance of images `[N, g * g]` to the manifold, `[N]`."""
        return self.nearest(images).distance

    def _draw(self, num: int, seed: int) -> tuple[Tensor, torch.Generator]:
        if num < 1:
            raise ValueError(f"draw at least one image, got {num}")
        generator = torch.Generator().manual_seed(seed)
        return self.draw(num, generator), generator

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, kappa={self.kappa:g})"


def require_prime(prime: int) -> None:
    """Raises `ValueError` for a number that no field of integers has as its size."""
    if prime < 2 or any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)):
        raise ValueError(f"homology is over a field of prime size, 2 or 3 say, got {prime}")
