"""Recursive mixtures: components added one at a time, each where the ones before it fall short (Kim & Pavlovic 2020).

    Q_0 = q_0,   Q_m = (1 - e_m(x)) Q_{m-1} + e_m(x) q_m,     q_m = N(mu_m(x), diag(s_m(x)^2))

that is a mixture with weights alpha_k = e_k prod_{j > k} (1 - e_j), e_0 = 1. Towards a new component q the ELBO of
Q_{m-1} rises, per unit of weight, by

    E_q[log p(x, u) - log Q_{m-1}(u | x)] - ELBO(Q_{m-1}),     whose first part is ELBO(q) + KL(q || Q_{m-1}):

a new component should explain the datum *and* lie where the mixture does not. `losses.RecursiveELBO` trains all
components by that criterion at once, with the KL bounded; `schedules.RecursiveSchedule` one after another. Inference
stays one pass through the encoders.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrovae.batching import Batched
from pyrovae.compat import GuideTraits
from pyrovae.families import DiagonalNormal, Family, MixtureOfNormals
from pyrovae.guides.amortized import encode, first_argument, require_net, run_encoder
from pyrovae.guides.base import FamilyGuide

__all__ = ["RecursiveMixture", "Stages"]


class Stages(NamedTuple):
    """The mixture of one batch as it was built up.

    Attributes:
        locs, scales: of every component, `[M, B, D]`.
        log_new: log e_m, `[M, B]`, 0 for the first.
        log_old: log (1 - e_m), `[M, B]`, 0 for the first.
    """

    locs: Tensor
    scales: Tensor
    log_new: Tensor
    log_old: Tensor

    def log_weights(self) -> Tensor:
        """Row n: the log-weights of Q_n, -inf for components that came later; `[M, M, B]`."""
        kept = self.log_old.cumsum(0)
        table = self.log_new.unsqueeze(0) + kept.unsqueeze(1) - kept.unsqueeze(0)
        later = torch.ones(table.shape[:2], dtype=torch.bool, device=table.device).triu(1)
        return table.masked_fill(later.unsqueeze(-1), -torch.inf)


class RecursiveMixture(FamilyGuide):
    """An amortized mixture of diagonal normals built up by recursion.

    Args:
        model: the Pyro program.
        encoder: module from the data to the first component's `lam: [B, 2 D]` (loc, log_var); or a sequence of M of
            them, all different, with `trunk="separate"`. A trained `Amortized` guide's encoder can be passed on.
        num_components: M >= 1; taken from the sequence where there is one.
        trunk: "shared": all layers but the last serve every component, and components after the first do not disturb
            them (their gradient stops at the last layer). The encoder must be an `nn.Sequential` with an `nn.Linear` at
            its end. "separate": every component has an encoder of its own.
        weights: module from the data to `[B, M - 1]`, logits of e_1 .. e_{M-1}; by default one linear layer on what the
            components are made of (the trunk's features, or all components' parameters), which gets no gradient.
        smallest: e_m lies in [smallest, 1 - smallest].
        spread: new components are never copies: their layers are drawn anew, and their locations begin with an offset
            of this standard deviation.
        encoder_input, plate, batched: as in `Amortized`.

    Raises:
        ValueError: the encoder cannot be shared, or drawn anew, as asked.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z**2, 0.25), obs=x.squeeze(-1))
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        >>> guide = RecursiveMixture(model, net, 3)
        >>> guide.posterior(torch.ones(5, 1)).log_weights.exp().sum(-1)
        tensor([1., 1., 1., 1., 1.], grad_fn=<SumBackward1>)
    """

    traits = GuideTraits(name="RecursiveMixture", reparameterised=False, stratified=True, stages=True)

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | Sequence[nn.Module],
        num_components: int | None = None,
        *,
        trunk: Literal["shared", "separate"] = "shared",
        weights: nn.Module | None = None,
        smallest: float = 0.01,
        spread: float = 1.0,
        encoder_input: Callable[..., Any] = first_argument,
        plate: str | None = "data",
        batched: Batched = "auto",
    ) -> None:
        if trunk not in ("shared", "separate"):
            raise ValueError(f"trunk must be 'shared' or 'separate', got {trunk!r}")
        if not 0 < smallest < 0.5:
            raise ValueError(f"smallest must lie between 0 and 1/2, got {smallest}")
        super().__init__(model, plate=plate, batched=batched)
        given = None if isinstance(encoder, nn.Module) else list(encoder)
        for net in [encoder] if given is None else given:
            require_net(net)
        number = num_components if given is None else len(given)
        if number is None or number < 1 or num_components not in (None, number):
            raise ValueError(
                "say how many components: num_components >= 1, or one encoder for each (and then no other number)"
            )
        self.trunk, self.smallest, self.encoder_input = None, smallest, encoder_input
        if trunk == "shared":
            if given is not None:
                raise ValueError("several encoders have no trunk in common: pass one, or trunk='separate'")
            layers = _layers(cast(nn.Module, encoder))
            self.trunk = nn.Sequential(*layers[:-1])
            first = cast(nn.Linear, layers[-1])
            parts = [first, *(_anew(first, spread) for _ in range(number - 1))]
        else:
            parts = given or [cast(nn.Module, encoder)]
            parts = [*parts, *(_anew(parts[0], spread) for _ in range(number - len(parts)))]
        self.components = nn.ModuleList(parts)
        self.weights = weights
        if weights is None and number > 1:
            last = _last_linear(parts[0])
            width = number * last.out_features if self.trunk is None else last.in_features
            self.weights = _weigher(width, number, smallest, last)
        self._own_weights = weights is None
        self.__dict__["_family"] = None

    @property
    def num_components(self) -> int:
        """M."""
        return len(self.components)

    def _describe(self) -> str:
        return f"components={self.num_components}, trunk={'separate' if self.trunk is None else 'shared'!r}, "

    def family(self, *args: Any, **kwargs: Any) -> Family:
        if self._family is None:
            self.__dict__["_family"] = MixtureOfNormals(self.space(*args, **kwargs).dim, self.num_components)
        return self._family

    def lam(self, *args: Any, **kwargs: Any) -> Tensor:
        parts, log_new, log_old = self._parts(False, *args, **kwargs)
        kept = log_old.flip(0).cumsum(0).flip(0) - log_old
        logits = (log_new + kept).movedim(0, -1)
        return torch.cat([logits, parts.unflatten(-1, (2, -1)).movedim(-2, 1).flatten(1)], dim=-1)

    def stages(self, *args: Any, **kwargs: Any) -> Stages:
        """The components and how they were mixed; a shared trunk hears the first component alone."""
        parts, log_new, log_old = self._parts(True, *args, **kwargs)
        locs, scales = DiagonalNormal(self.family(*args, **kwargs).dim)._parts(parts.movedim(1, 0))
        return Stages(locs, scales, log_new, log_old)

    def blocks(self) -> list[list[nn.Parameter]]:
        """The parameters of every component (with the trunk in the first), then those of the mixing weights."""
        trunk = [] if self.trunk is None else list(self.trunk.parameters())
        found = [list(part.parameters()) for part in self.components]
        found[0] = trunk + found[0]
        return [*found, [] if self.weights is None else list(self.weights.parameters())]

    def _parts(self, staged: bool, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`lam` of every component, `[B, M, 2 D]`; log e_m and log (1 - e_m), `[M, B]`."""
        x = self.encoder_input(*args, **kwargs)
        single = DiagonalNormal(self.family(*args, **kwargs).dim)
        if self.trunk is None:
            parts = torch.stack([encode(part, x, single) for part in self.components], dim=1)
            source = parts.flatten(1) if self._own_weights else x
        else:
            features = run_encoder(self.trunk, x)
            parts = _heads([cast(nn.Linear, part) for part in self.components], features, staged)
            single._check(parts)
            source = features if self._own_weights else x
        if self.weights is None:
            zeros = parts.new_zeros(1, len(parts))
            return parts, zeros, zeros
        gates = run_encoder(self.weights, source.detach() if self._own_weights else source)
        if gates.shape != (len(parts), self.num_components - 1):
            raise ValueError(
                f"weights must return [B, {self.num_components - 1}], one logit for each component after the first, "
                f"but returned {tuple(gates.shape)}"
            )
        new = self.smallest + (1 - 2 * self.smallest) * gates.sigmoid()
        log_new, log_old = (functional.pad(part, (1, 0)).T for part in (new.log(), (-new).log1p()))
        return parts, log_new, log_old


def _heads(heads: list[nn.Linear], features: Tensor, staged: bool) -> Tensor:
    """All last layers as one, `[B, M, 2 D]`; with `staged` the features hear from the first alone."""
    first, rest = heads[:1], heads[1:]
    groups = [(features, first), (features.detach(), rest)] if staged and rest else [(features, heads)]
    found: list[Tensor] = []
    for source, group in groups:
        bias = None if group[0].bias is None else torch.cat([head.bias for head in group])
        output = functional.linear(source, torch.cat([head.weight for head in group]), bias)
        found.append(output.unflatten(-1, (len(group), -1)))
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def _layers(encoder: nn.Module) -> list[nn.Module]:
    layers = list(encoder) if isinstance(encoder, nn.Sequential) else []
    if not layers or not isinstance(layers[-1], nn.Linear):
        raise ValueError(
            "trunk='shared' needs an nn.Sequential with an nn.Linear at its end (as pyrovae.nets.MLP is): pass one, or "
            "trunk='separate'"
        )
    return layers


def _last_linear(net: nn.Module) -> nn.Linear:
    found = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError(
            "the encoder has no nn.Linear to end with: pass one encoder for each component, and weights=..."
        )
    return found[-1]


def _anew(net: nn.Module, spread: float) -> nn.Module:
    """The same architecture with weights of its own, and locations moved aside."""
    new = copy.deepcopy(net)
    for module in new.modules():
        own = next(module.parameters(recurse=False), None)
        reset = getattr(module, "reset_parameters", None)
        if own is not None and reset is None:
            raise ValueError(
                f"the layer {type(module).__name__} has no reset_parameters, so a new component would be a copy: pass "
                "one encoder for each component, with trunk='separate'"
            )
        if callable(reset):
            reset()
    last = _last_linear(new)
    with torch.no_grad():
        if last.bias is not None:
            half = last.out_features // 2
            last.bias[:half] += spread * torch.randn(half).to(last.bias)
    return new


def _weigher(width: int, number: int, smallest: float, like: nn.Module) -> nn.Linear:
    """A linear layer that begins with equal weights: e_m = 1 / (m + 1)."""
    layer = nn.Linear(width, number - 1).to(next(like.parameters()))
    begin = 1 / torch.arange(2.0, number + 1)
    begin = ((begin - smallest) / (1 - 2 * smallest)).clamp(smallest, 1 - smallest)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(begin.logit())
    return layer
