r"""Do interpolations stay on the data's manifold? Paths of decoded images against a manifold that is known.

For a path of images :math:`x_0, \dots, x_T` in X pixels, with pixel noise of standard deviation :math:`\sigma`:

.. math::
    s_i = \frac{\mathrm{dist}(x_i, M)}{\sigma \sqrt{X}}, \qquad
    w = \max_i s_i, \qquad
    r = \frac{\sum_i \lVert x_{i+1} - x_i \rVert}{\sum_i \lVert g_{i+1} - g_i \rVert} ,

g being as many images along the shortest geodesic between the ends. The unit of :math:`s` is how far noisy data lie
from M: an image of the data, M plus noise, has :math:`s \approx \sqrt{1 - d / X}`, 1 but for the d dimensions of M, and
so has a decoder with errors of :math:`\sigma` in each pixel. Per pixel, :math:`s` is the root mean square deviation
from the nearest image of M over :math:`\sigma`. A path *fails* where :math:`w > 3`: somewhere on it the image is three
times as far off as data are. (In units of :math:`\sigma` along the one direction off M, the same distance is
:math:`\sqrt X` times as many; that scale would call every decoder with small errors in all pixels a failure.)

The score of cross-fading the same ends, :math:`(1 - i/T)\, x_0 + (i/T)\, x_T`, stands beside: it leaves M as far as can
be, and where it does not pass 3 either, the noise is too large for the score to see any failure (on the 16 x 16 torus
from about 0.03 on).

Path lengths are compared by the ratio of means over pairs: the mean of ratios has no variance, for near pairs. 1 is
the shortest; a path that jumps, takes a detour or goes through other images is longer, one that cuts across
shorter. Pairs without a geodesic (in two components) fail by the score and are left out of the ratio.

The score is after Jin et al., Implications of data topology for deep generative models (2024); scale, control and
ratio are our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.data.geometry import Manifold
from pyrovae.errors import DataError
from pyrovae.provenance import Provenance

__all__ = ["InterpolationFailure", "interpolation_failure"]


@dataclass(frozen=True, eq=False, repr=False)
class InterpolationFailure:
    """How far paths leave a manifold.

    Attributes:
        manifold: its name.
        scores: `[P, T]`, distance to it over that of noisy data.
        crossfade: `[P]`, the largest such score of cross-fading the ends.
        lengths: `[P]`, of the paths, in image space.
        geodesics: `[P]`, of the shortest geodesics between the ends, inf where there is none.
        threshold: score from which a path fails.
        noise: sigma.
        provenance: of the numbers.
    """

    manifold: str
    scores: Tensor
    crossfade: Tensor
    lengths: Tensor
    geodesics: Tensor
    threshold: float
    noise: float
    provenance: Provenance

    @property
    def worst(self) -> Tensor:
        """Largest score of each path, `[P]`."""
        return self.scores.amax(1)

    @property
    def mean_worst(self) -> tuple[float, float]:
        """Mean of `worst` over paths, and its standard error."""
        return _mean(self.worst)

    @property
    def failed(self) -> tuple[float, float]:
        """Share of paths with a score beyond the threshold, and its binomial standard error."""
        return _share(self.worst > self.threshold)

    @property
    def crossfade_failed(self) -> tuple[float, float]:
        """The same of cross-fading."""
        return _share(self.crossfade > self.threshold)

    @property
    def length_ratio(self) -> tuple[float, float]:
        """Mean length of paths over that of geodesics, and its standard error (delta method); nan without pairs."""
        joined = self.geodesics.isfinite()
        length, geodesic = self.lengths[joined].double(), self.geodesics[joined].double()
        if not geodesic.sum() > 0:
            return math.nan, math.nan
        ratio = float(length.mean() / geodesic.mean())
        _, se = _mean(length - ratio * geodesic)
        return ratio, se / float(geodesic.mean())

    def __repr__(self) -> str:
        paths, points = self.scores.shape
        (share, se), (fade, fade_se), (worst, worst_se) = self.failed, self.crossfade_failed, self.mean_worst
        ratio, ratio_se = self.length_ratio
        return "\n".join([
            f"{paths} paths of {points} images against the {self.manifold}, pixel noise {self.noise:g}",
            f"  {share:.1%} +- {se:.1%} leave it by more than {self.threshold:g} times the distance of noisy data "
            f"(cross-fading: {fade:.1%} +- {fade_se:.1%})",
            f"  largest score of a path: {worst:.2f} +- {worst_se:.2f} (noisy data: 1; cross-fading: "
            f"{float(self.crossfade.mean()):.2f})",
            f"  length over geodesic length: {ratio:.3f} +- {ratio_se:.3f}",
        ])  # fmt: skip

    def _repr_html_(self) -> str:
        return f"<pre>{self!r}</pre>"


def interpolation_failure(
    manifold: Manifold, paths: Tensor, noise: float, *, between: tuple[Tensor, Tensor] | None = None,
    threshold: float = 3.0, progress: str | None = None,
) -> InterpolationFailure:  # fmt: skip
    """Score paths of decoded images.

    Args:
        manifold: the true one.
        paths: `[P, T, pixels]`, means (not draws) of the decoder along P paths, 33 points usually; what
            `generate.interpolate` gives, `[T, P, pixels]`, transposed.
        noise: standard deviation of the pixel noise in the data; of clean data, that which the model has learned, or
            its root mean square reconstruction error.
        between: coordinates `[P, coordinate_dim]` of the two data that each path is to join; by default the points of
            the manifold that are nearest to the path's ends.
        threshold: score from which a path fails.
        progress: label of a progress bar.

    Raises:
        DataError: paths of another shape, or with NaN or infinite values.
        ValueError: a noise or threshold that is not positive, or coordinates that do not match.
    """
    if paths.dim() != 3 or paths.shape[0] < 1 or paths.shape[1] < 2 or paths.shape[2] != manifold.pixels:
        raise DataError(f"paths must be [P, T, {manifold.pixels}] with T of at least 2, got {list(paths.shape)}")
    if not (noise > 0 and threshold > 0):
        raise ValueError(f"noise and threshold must be positive, got {noise} and {threshold}")
    num, points, _ = paths.shape
    paths = paths.detach()
    share = torch.linspace(0, 1, points, dtype=paths.dtype, device=paths.device)[:, None]
    fades = torch.lerp(paths[:, :1], paths[:, -1:], share)
    near = manifold.nearest(torch.cat([paths, fades]).flatten(0, 1), progress=progress)
    scores, faded = (near.distance / (noise * math.sqrt(manifold.pixels))).unflatten(0, (2, num, points))
    if between is None:
        reached = near.coordinates.unflatten(0, (2, num, points))[0]
        between = (reached[:, 0], reached[:, -1])
    for end in between:
        if end.shape != (num, manifold.coordinate_dim):
            raise ValueError(
                f"between must be coordinates [{num}, {manifold.coordinate_dim}] twice, got {list(end.shape)}"
            )
    return InterpolationFailure(
        manifold=manifold.name, scores=scores, crossfade=faded.amax(1), lengths=_length(paths),
        geodesics=_geodesic_lengths(manifold, *between, points).to(paths), threshold=threshold, noise=noise,
        provenance=Provenance.of_call((paths,), {}, data=manifold.name, num_data=num, seed=None),
    )  # fmt: skip


def _length(paths: Tensor) -> Tensor:
    return torch.linalg.vector_norm(paths[:, 1:] - paths[:, :-1], dim=-1).sum(1)


def _geodesic_lengths(manifold: Manifold, a: Tensor, b: Tensor, points: int) -> Tensor:
    """In image space, `[P]`."""
    a, b = a.detach().double(), b.detach().double()
    joined = manifold.geodesic(a, b).isfinite()
    found = a.new_full((len(a),), torch.inf)
    found[joined] = _length(manifold.render(manifold.geodesic_path(a[joined], b[joined], points)))
    return found


def _mean(values: Tensor) -> tuple[float, float]:
    values = values.double()
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se


def _share(flags: Tensor) -> tuple[float, float]:
    share = float(flags.double().mean())
    return share, math.sqrt(share * (1 - share) / len(flags))
