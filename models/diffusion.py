r"""Denoising diffusion as a Pyro model (Sohl-Dickstein et al. 2015; Ho, Jain & Abbeel 2020).

.. math::
    x_T \sim N(0, I), \qquad x_{t-1} | x_t \sim N(\mu_\theta(x_t, t), \sigma_t^2 I), \qquad
    \mu_\theta(x_t, t) = \frac{1}{\sqrt{\alpha_t}}
        \Big( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon_\theta(x_t, t) \Big)

with alpha_t = 1 - beta_t, abar_t their product; x_0 = x is observed. The guide is the forward process
(`guides.ForwardProcess`), which has no parameters:

.. math::
    q(x_t | x_{t-1}) = N(\sqrt{\alpha_t}\, x_{t-1}, \beta_t I), \qquad
    x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \quad \epsilon \sim N(0, I)

Every KL of the ELBO is then one of Gaussians. With X values per datum and the variance of q(x_{t-1} | x_t, x_0),
:math:`\tilde\beta_t = \beta_t (1 - \bar\alpha_{t-1}) / (1 - \bar\alpha_t)`,

.. math::
    \mathrm{ELBO} = -\mathrm{KL}(q(x_T | x_0) \| N(0, I)) - \sum_{t=1}^T \Big( k_t + w_t
        E_\epsilon \| \epsilon - \epsilon_\theta(x_t, t) \|^2 \Big), \qquad
    w_t = \frac{\beta_t^2}{2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t)}

    k_t = \tfrac{X}{2} \Big( \frac{\tilde\beta_t}{\sigma_t^2} - 1 - \log \frac{\tilde\beta_t}{\sigma_t^2} \Big)
    \;\; (t > 1), \qquad k_1 = \tfrac{X}{2} \log 2 \pi \sigma_1^2

so that it can be estimated from single steps (`losses.DiffusionELBO`). The last step is the likelihood of continuous
data, a Gaussian of variance sigma_1^2 = beta_1: densities are per unit of the data's own scale.

DDIM (Song, Meng & Ermon 2021) takes the same net for a deterministic map between x_T and x_0.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.func import functional_call

from pyrovae.compat import ModelTraits
from pyrovae.errors import DataError
from pyrovae.runtime import evaluating, seeded

__all__ = ["Diffusion"]


class Diffusion(PyroModule):
    """Sites "x{T}" .. "x1" and "x", plate "data".

    Args:
        net: eps_theta, module from x `[B, *event]` and steps t `[B]` (1 to T) to the noise in x, `[B, *event]`
            (`nets.TimeMLP`).
        event_shape: of one datum.
        num_steps: T.
        betas: first and last beta, linear between; the defaults are for T = 1000 and data of about unit variance.
        variance: sigma_t^2 for t > 1: "beta", or "posterior" for the smaller tilde beta.
        average: decay of an exponential moving average of the net's weights (0.999 is usual), which takes their place
            in evaluation mode; the loss updates it at every training step. None keeps none.

    Example:
        >>> from pyrovae.nets.time_mlp import TimeMLP
        >>> model = Diffusion(TimeMLP((2,), hidden=(16,)), (2,), num_steps=5, betas=(0.1, 0.5))
        >>> model(None, size=3).shape, model.generate(4).shape
        (torch.Size([3, 2]), torch.Size([4, 2]))
    """

    traits = ModelTraits(latents="diffusion")
    beta: Tensor
    signal: Tensor
    spread: Tensor
    sigma: Tensor
    weight: Tensor
    count: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: tuple[int, ...],
        num_steps: int = 1000,
        *,
        betas: tuple[float, float] = (1e-4, 0.02),
        variance: Literal["beta", "posterior"] = "beta",
        average: float | None = None,
    ) -> None:
        super().__init__()
        if num_steps < 1 or not 0 < min(betas) <= max(betas) < 1:
            raise ValueError(f"a diffusion needs a step and betas between 0 and 1, got {num_steps} and {betas}")
        if not event_shape:
            raise ValueError("a datum needs a dimension at least: event_shape=(1,) for single numbers")
        if variance not in ("beta", "posterior"):
            raise ValueError(f"variance must be 'beta' or 'posterior', got {variance!r}")
        if average is not None and not 0 <= average < 1:
            raise ValueError(f"average is a decay below 1, got {average}")
        self.net, self.event_shape, self.num_steps, self.average = net, torch.Size(event_shape), num_steps, average
        like = next(net.parameters(), torch.zeros(()))
        beta = torch.linspace(*betas, num_steps, dtype=torch.double)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.double), (1 - beta).cumprod(0)])
        tilde = beta * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
        square = beta.clone()
        if variance == "posterior":
            square[1:] = tilde[1:]
        weight = beta**2 / (2 * square * (1 - beta) * (1 - alpha_bar[1:]))
        ratio = (tilde / square)[1:]
        constants = torch.sum(ratio - 1 - ratio.log()) + (2 * torch.pi * square[0]).log()
        self.constant = float(constants) / 2 * self.event_shape.numel()  # sum_t k_t
        # beta, sigma and weight of step t are at t - 1; signal, sqrt(abar), and spread, sqrt(1 - abar), at t
        schedule = {
            "beta": beta, "sigma": square.sqrt(), "weight": weight, "signal": alpha_bar.sqrt(),
            "spread": (1 - alpha_bar).sqrt(),
        }  # fmt: skip
        for name, value in schedule.items():
            self.register_buffer(name, value.to(like))
        if average is not None:
            # As buffers: Pyro trains whatever parameter it finds.
            self.averages = nn.Module()
            for name, value in net.state_dict().items():
                self.averages.register_buffer(name.replace(".", "/"), copy.deepcopy(value))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """eps_theta(x_t, t), `[*R, *event]` and `[*R]`; in evaluation mode by the averaged weights, if there are."""
        flat = x.reshape(-1, *self.event_shape), t.expand(x.shape[: x.dim() - len(self.event_shape)]).reshape(-1)
        net = self.net
        if self.training or self.average is None:
            return net(*flat).view(x.shape)
        return functional_call(net, self._averaged(), flat).view(x.shape)

    def _averaged(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.averages.named_buffers()}

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averages towards the net; the first steps count more (a decay of n / (10 + n), up to `average`)."""
        if self.average is None:
            return
        self.count += 1
        decay = min(self.average, float(self.count) / (10 + float(self.count)))
        present = self.net.state_dict()
        for name, value in self._averaged().items():
            if value.is_floating_point():
                value.lerp_(present[name], 1 - decay)
            else:
                value.copy_(present[name])

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with data x, or with size=n to generate")
        if x is not None:
            self.check(x)
        rows, dims = len(x) if x is not None else int(size or 0), len(self.event_shape)
        with pyro.plate("data", rows):
            zero = self.beta.new_zeros(self.event_shape)
            here = pyro.sample(f"x{self.num_steps}", dist.Normal(zero, torch.ones_like(zero)).to_event(dims))
            for t in range(self.num_steps, 0, -1):
                step = dist.Normal(self.backward_mean(here, t), self.sigma[t - 1]).to_event(dims)
                here = pyro.sample(f"x{t - 1}", step) if t > 1 else pyro.sample("x", step, obs=x)
        return here

    def check(self, x: Tensor) -> None:
        """Raise `DataError` for data of another shape."""
        if x.shape[1:] != self.event_shape:
            raise DataError(
                f"the data have shape {tuple(x.shape)}, but the diffusion is of {tuple(self.event_shape)} per datum"
            )

    def backward_mean(self, x: Tensor, t: int) -> Tensor:
        """mu_theta(x_t, t), `[*R, *event]`."""
        beta, found = self.beta[t - 1], self.predict_noise(x, torch.tensor(t, device=x.device))
        return (x - beta / self.spread[t] * found) / (1 - beta).sqrt()

    def diffuse(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t of data `[*R, *event]`, steps `[*R]` and noise `[*R, *event]`."""
        ones = [1] * len(self.event_shape)
        return self.signal[t].view(*t.shape, *ones) * x + self.spread[t].view(*t.shape, *ones) * eps

    def prior_kl(self, x: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)), `[B]`, nats."""
        kept, left = self.signal[-1].square(), self.spread[-1]
        return 0.5 * (kept * x.flatten(1).square().sum(1) - self.event_shape.numel() * (kept + 2 * left.log()))

    def generate(self, size: int, *, seed: int = 0) -> Tensor:
        """E[x | x_1] at the end of the model's own chain, `[n, *event]`; in evaluation mode, no gradient."""
        with torch.no_grad(), evaluating(self), seeded(seed):
            x = self._noise_like(size)
            for t in range(self.num_steps, 0, -1):
                x = self.backward_mean(x, t)
                if t > 1:
                    x = x + self.sigma[t - 1] * torch.randn_like(x)
        return x

    def _noise_like(self, size: int) -> Tensor:
        return torch.randn(size, *self.event_shape, dtype=self.beta.dtype, device=self.beta.device)

    def ddim(self, noise: Tensor, num_steps: int = 50) -> Tensor:
        """From x_T to x_0 without randomness, `[B, *event]`; in evaluation mode, no gradient.

        Args:
            noise: x_T.
            num_steps: S of the T steps, evenly spaced.
        """
        return self._transport(noise, self._ladder(num_steps).flip(0))

    def invert(self, x: Tensor, num_steps: int = 50) -> Tensor:
        """From x_0 to x_T: DDIM run backwards, of which `ddim` is the inverse up to O(1 / num_steps)."""
        self.check(x)
        return self._transport(x, self._ladder(num_steps))

    def interpolate(self, x: Tensor, other: Tensor, *, steps: int = 8, num_steps: int = 50) -> Tensor:
        """Between two batches of data on the great circle of their inverted noises, `[steps, B, *event]`.

        Opposite noises, of which there is no one great circle, are joined by the straight line.
        """
        if steps < 2 or x.shape != other.shape:
            raise ValueError(f"an interpolation needs two ends of one shape, got {steps}, {x.shape} and {other.shape}")
        start, end = self.invert(x, num_steps).flatten(1), self.invert(other, num_steps).flatten(1)
        cosine = nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)
        angle = cosine.acos().unsqueeze(1)
        share = torch.linspace(0, 1, steps, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        # sin(a s) / sin a; where the ends are one point, or opposite ones (of which no one great circle is), s itself
        near = (angle < 1e-4) | (angle > math.pi - 1e-3)
        sine = torch.where(near, torch.ones_like(angle), angle.sin())
        first = torch.where(near, 1 - share, ((1 - share) * angle).sin() / sine)
        second = torch.where(near, share, (share * angle).sin() / sine)
        path = (first * start + second * end).reshape(-1, *self.event_shape)
        return self.ddim(path, num_steps).view(steps, *x.shape)

    def _ladder(self, num_steps: int) -> Tensor:
        """0 and S steps up to T."""
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"DDIM takes 1 to T = {self.num_steps} steps, got {num_steps}")
        return torch.linspace(0, self.num_steps, num_steps + 1, dtype=torch.double).round().long()

    def _transport(self, x: Tensor, ladder: Tensor) -> Tensor:
        """DDIM from step to step of a ladder, up or down."""
        with torch.no_grad(), evaluating(self):
            for now, then in itertools.pairwise(ladder):
                eps = self.predict_noise(x, now.clamp_min(1).to(x.device))  # the net knows no step 0
                clean = (x - self.spread[now] * eps) / self.signal[now]
                x = self.signal[then] * clean + self.spread[then] * eps
        return x
