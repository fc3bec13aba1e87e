r"""The way into an atlas: chart encoders and a chart predictor (Schonsheck, Chen & Lai 2019).

.. math::
    q(c, z | x) = P(x)_c \; q(z | c, x), \qquad \mathrm{logit}\, z | c, x \sim N(m_c, \mathrm{diag}(s_c^2)), \quad
    (m_c, \log s_c^2) = E_c(E(x))

E is the encoder common to all charts, E_c are the small ones, P the predictor. With y_c drawn through chart c, the ELBO
is a sum over charts, which `TraceEnum_ELBO` takes exactly:

.. math::
    \sum_c P(x)_c \Big[ \log N(x; y_c, s^2) + \log \frac{p_c}{P(x)_c} - \log q(z_c | c, x) \Big]
    \;\le\; \log \sum_c p_c N(x; y_c, s^2) e^{-\log q(z_c | c, x)}

As the noise s goes to 0 the best chart takes all, 2 s^2 times minus the right-hand side tends to min_c |x - y_c|^2:
`losses.ChartLoss`, the published objective, with z_c = sigmoid(m_c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyrovae.atlas import Ways, ways
from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.families import Family, MixtureOfNormals
from pyrovae.farthest import farthest_points
from pyrovae.guides.amortized import first_argument, require_net, run_encoder
from pyrovae.guides.base import FamilyGuide
from pyrovae.latents import LatentSpace
from pyrovae.nets.charts import ChartMLP
from pyrovae.runtime import evaluating, seeded
from pyrovae.sites import bijection

__all__ = ["Charts", "Generated"]

_ROUNDS = 50  # of generation, before too few of what is drawn is called faithful


class Generated(NamedTuple):
    """Data from an atlas.

    Attributes:
        x: E[x | z, c], `[n, *event]`.
        c: the chart of each, `[n]`.
        z: its coordinates there, `[n, d]`.
        kept: share of draws that passed the filter (1 without one).
    """

    x: Tensor
    c: Tensor
    z: Tensor
    kept: float


class Charts(FamilyGuide):
    """Sites "c" and "z" for a `models.ChartAutoencoder`.

    Train it with `TraceEnum_ELBO(max_plate_nesting=1)`, which sums over the charts, or, without densities, with
    `losses.ChartLoss`. To all else it is a guide of u = logit z, a mixture of N normals with weights P(x), so evidence
    and diagnostics apply.

    Args:
        model: a `models.ChartAutoencoder`.
        encoder: E, module from the data to `[B, l]`.
        charts: the E_c, `nets.ChartMLP` from l features to 2 d numbers (m_c and log s_c^2), a net for each chart.
        predictor: P, module from the data to logits of the charts, `[B, N]`.
        batched: as in `LatentSpace`.

    Example:
        >>> from pyro.infer import TraceEnum_ELBO
        >>> from pyrovae.models.chart_autoencoder import ChartAutoencoder
        >>> model = ChartAutoencoder(ChartMLP(4, [2, 16, 6]), nn.Linear(6, 9))
        >>> guide = Charts(model, nn.Linear(9, 6), ChartMLP(4, [6, 16, 4]), nn.Linear(9, 4))
        >>> x = torch.zeros(7, 9)
        >>> with pyro.get_param_store().scope():
        ...     value = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
        >>> guide.coordinates(x).shape
        torch.Size([7, 4, 2])
    """

    traits = GuideTraits(name="Charts", reparameterised=False, stratified=True, charts=True)

    def __init__(
        self, model: Any, encoder: nn.Module, charts: ChartMLP, predictor: nn.Module, *, batched: Batched = "auto"
    ) -> None:
        if not hasattr(model, "num_charts"):  # guides know models by what they have
            raise TypeError(f"Charts is for a models.ChartAutoencoder, got {type(model).__name__}")
        require_net(encoder)
        require_net(predictor)
        number, dim = model.num_charts, model.latent_dim
        if not isinstance(charts, ChartMLP) or charts.num_charts != number or charts.sizes[-1] != 2 * dim:
            raise ValueError(
                f"the chart encoders are a nets.ChartMLP of {number} nets with {2 * dim} outputs, locations and "
                "log-variances of the coordinates' logits"
            )
        super().__init__(model, plate="data", batched=batched)
        self.encoder, self.charts, self.predictor = encoder, charts, predictor
        self.num_charts, self.latent_dim = number, dim

    def family(self, *args: Any, **kwargs: Any) -> Family:
        return MixtureOfNormals(self.latent_dim, self.num_charts)

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_argument(*args, **kwargs)
        locs, log_vars = self._encode(x, self._all_charts(x)).movedim(0, 1).chunk(2, -1)
        return torch.cat([self._logits(x), locs.flatten(1), log_vars.flatten(1)], -1)

    def _encode(self, x: Tensor, c: Tensor) -> Tensor:
        """(m_c, log s_c^2) in charts `[*C]` that broadcast with the rows, `[*, B, 2 d]`."""
        found: Tensor = self.charts(run_encoder(self.encoder, x), c)
        return found

    def _all_charts(self, x: Tensor) -> Tensor:
        return torch.arange(self.num_charts, device=x.device).unsqueeze(1)

    def _logits(self, x: Tensor) -> Tensor:
        """log P(x), unnormalised, `[B, N]`."""
        found: Tensor = run_encoder(self.predictor, x)
        if found.shape != (len(x), self.num_charts):
            raise ValueError(
                f"the predictor must return logits of {self.num_charts} charts, one row per datum, but returned "
                f"{list(found.shape)}"
            )
        return found

    def _errors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Logits of the charts and |x - D(D_a(E_a(E(x))))|^2 of every chart a, both `[B, N]` (`losses.ChartLoss`)."""
        x = first_argument(*args, **kwargs)
        every = self._all_charts(x)
        redrawn = self.model.mean(self._encode(x, every)[..., : self.latent_dim].sigmoid(), every)
        return self._logits(x), (x - redrawn).square().flatten(2).sum(-1).T

    def _prepare(self, space: LatentSpace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        q = self._posterior(*args, **kwargs)
        cube = bijection(space.structure.sites[0])

        def write() -> None:
            c = pyro.sample("c", dist.Categorical(logits=q.logits), infer={"enumerate": "parallel"})
            u = dist.Normal(Vindex(q.locs)[..., c, :], Vindex(q.scales)[..., c, :]).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(u, [cube]))

        return write

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """Nets in evaluation mode, for a caller outside any Pyro program; no gradient."""
        with self._aside(), torch.no_grad(), evaluating(self.model, self):
            yield

    def coordinates(self, x: Tensor) -> Tensor:
        """sigmoid(m_c), where every chart has the data, `[B, N, d]`; no gradient."""
        with self._judging():
            return self._encode(x, self._all_charts(x))[..., : self.latent_dim].sigmoid().movedim(0, 1)

    def predict(self, x: Tensor) -> Tensor:
        """P(x), `[B, N]`; no gradient."""
        with self._judging():
            return torch.softmax(self._logits(x), -1)

    def frequencies(self, x: Tensor) -> Tensor:
        """Mean P(x) over data, `[N]`: how often each chart is in use."""
        return self.predict(x).mean(0)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z, c] through the chart that the predictor likes best, `[B, *event]`; no gradient."""
        c = self.predict(x).argmax(-1)
        z = self.coordinates(x)[torch.arange(len(x), device=x.device), c]
        with self._judging():
            return self.model.mean(z, c)

    def transition(self, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """From coordinates in chart a to those in chart b, E_b(E(D(D_a(z)))); `[P, d]`, `[P]`, `[P]` -> `[P, d]`."""
        with self._judging():
            return self._encode(self.model.mean(z, a), b)[..., : self.latent_dim].sigmoid()

    def interpolate(
        self, x: Tensor, other: Tensor, known: Tensor, *, steps: int = 8, within: float | None = None
    ) -> Ways:
        """E[x | z, c] along the shortest ways over charts from one batch to another, `[steps, B, *event]`; no gradient.

        An atlas has no one latent space in which to draw a line: two data in one chart are joined by the straight line
        there, others by way of data that two charts hold.

        Args:
            x, other: the ends, `[B, *event]`.
            known: data among which such places are looked for, `[N, *event]` (training data).
            steps: points of a way, both ends included.
            within: distance from a datum at which a chart redraws, and so holds it; the likeliest one holds it in any
                case. By default twice the median distance of `known` from their reconstructions.

        Raises:
            ValueError: fewer than two steps, or ends of different shapes.
        """
        with self._judging():
            return ways(self, x, other, known, steps=steps, within=within)

    def generate(self, size: int, *, faithful: bool = True, seed: int = 0) -> Generated:
        """Draws of c from the model's weights and of z from its cube, decoded.

        Args:
            size: how many to return.
            faithful: leave out what the predictor takes for another chart's: corners of cubes that no datum is sent to
                are not on the manifold.
            seed: of the draws.

        Raises:
            ValueError: hardly any draw is faithful.
        """
        if size < 1:
            raise ValueError(f"a sample needs at least one draw, got {size}")
        model, drawn = self.model, 0
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with self._judging(), seeded(seed):
            while sum(len(part[0]) for part in found) < size:
                if drawn >= _ROUNDS * size:
                    raise ValueError(
                        f"fewer than 1 in {_ROUNDS} draws is of the chart that the predictor sees in it: train the "
                        "guide, set the model's weights to guide.frequencies(data), or pass faithful=False"
                    )
                c = torch.distributions.Categorical(logits=model.log_weights).sample((size,))
                z = torch.rand(size, self.latent_dim, dtype=model.log_weights.dtype, device=c.device)
                x = model.mean(z, c)
                drawn += size
                keep = self._logits(x).argmax(-1) == c if faithful else torch.ones_like(c, dtype=torch.bool)
                found.append((x[keep], c[keep], z[keep]))
        x, c, z = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Generated(x[:size], c[:size], z[:size], len(x) / drawn)

    def start(
        self, x: Tensor, *, neighbours: int | None = None, num_steps: int = 300, lr: float = 3e-3, batch_size: int = 32,
        seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """Give every chart a place of its own before training: charts that start alike die or fold over one another.

        Seeds are farthest points of the data. Chart a learns to redraw the data around seed a, at coordinates whose
        mean is the centre of its cube, the predictor to name the chart of the nearest seed; nets of model and guide are
        trained.

        Args:
            x: the data, `[n, *event]`.
            neighbours: data around each seed; by default 2 n / N, so that charts overlap.
            num_steps, lr, batch_size: of Adam; rows of each chart in a step.
            seed: of the first seed and of the mini-batches.

        Returns:
            indices of the seeds, `[N]`.
        """
        number = min(len(x), neighbours or -(-2 * len(x) // self.num_charts))
        model = self.model
        parameters = [*self.parameters(), *model.charts.parameters(), *model.decoder.parameters()]
        optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=lr)
        with self._aside(), seeded(seed), torch.enable_grad():
            seeds, _ = farthest_points(x, self.num_charts, first=int(torch.randint(len(x), ())))
            flat = x.flatten(1)
            distance = torch.cdist(flat[seeds], flat, compute_mode="donot_use_mm_for_euclid_dist")
            near, nearest = distance.topk(number, largest=False).indices, distance.argmin(0)
            for _ in range(num_steps):
                some = near[:, torch.randint(number, (batch_size,), device=x.device)]  # [N, rows]
                rows = x[some.flatten()]
                features = run_encoder(self.encoder, rows).unflatten(0, some.shape)
                z = self.charts(features, self._all_charts(x))[..., : self.latent_dim].sigmoid()
                y = model.mean(z, self._all_charts(x)).flatten(0, 1)
                error = (rows - y).square().flatten(1).sum(1).mean()
                centred = (z.mean(1) - 0.5).square().sum(-1).mean()
                named = nn.functional.cross_entropy(self._logits(rows), nearest[some.flatten()])
                optimizer.zero_grad()
                (error + centred + named).backward()
                optimizer.step()
        optimizer.zero_grad()
        return seeds
