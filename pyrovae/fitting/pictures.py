"""Pictures of a trained run: what it makes of data, of its prior, and of codes in between.

Models whose pixels are independent given z show E[x | z]. Pixel decoders have no such mean in closed form: they show
draws, made pixel by pixel in raster order.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import generate, plots
from pyrovae.fitting import atlas, denoising
from pyrovae.fitting.material import Material
from pyrovae.fitting.outcome import Outcome
from pyrovae.fitting.picture import Picture
from pyrovae.fitting.recipes import CHARTS, DIFFUSION, PIXEL_MODELS, TILTED
from pyrovae.runtime import evaluating, seeded
from pyrovae.store import isolated

__all__ = ["draw", "left_out"]

_PAIRS, _STEPS, _VALUES, _ROWS = 5, 8, 7, 10
_FEW = 4  # latents or pairs that a pixel decoder shows: each of its pictures takes a pass for every pixel
_HIDDEN = 8  # data with a hidden half


# What a model has no pictures of, and why.
_LEFT_OUT = {
    CHARTS: (
        "Traversals, interpolations and imputations are left out: what a code draws depends on the chart it is in, so "
        "no line leads from one datum's code to another's."
    ),
    DIFFUSION: (
        "Reconstructions, traversals and imputations are left out, and so are numbers of a code: a diffusion's latents "
        "are as many as the data's values in each of its steps, and mostly noise."
    ),
}


def left_out(outcome: Outcome) -> str:
    """What there are no pictures of, and why; empty where there are all."""
    s = outcome.settings
    words = _LEFT_OUT.get(s.model, "")
    if s.model == CHARTS and s.guide != CHARTS:
        words += f" The {s.guide} guide finds no chart, so reconstructions are left out, too."
    return words


def draw(outcome: Outcome, material: Material) -> list[Picture]:
    """All pictures of a model of images."""
    with seeded(outcome.settings.seed):
        if outcome.settings.model == CHARTS:
            return atlas.pictures(outcome, material)
        if outcome.settings.model == DIFFUSION:
            return denoising.pictures(outcome, material)
        return _Sheets(outcome, material).all()


class _Sheets:
    def __init__(self, outcome: Outcome, material: Material) -> None:
        self.outcome, self.model, self.guide = outcome, outcome.model, outcome.guide
        self.x, self.form, self.planes = material.rows, material.form, material.planes
        self.drawn = outcome.settings.model in PIXEL_MODELS
        centre = outcome.findings.centre
        if centre is None:
            raise ValueError("a model of images has latents, but their posterior means were not found")
        self.centre: Tensor = centre
        self.signed = material.signed
        self.few = _FEW if self.drawn else _ROWS

    def all(self) -> list[Picture]:
        torus = self.outcome.settings.manifold == "torus"
        found = [self.reconstructions(), *self.samples(), *([self.circles()] if torus else self.traversals())]
        found.append(self.interpolations())
        if not self.drawn:
            found.append(self.imputations())
        return found + self.clusters()

    @property
    def what(self) -> str:
        return "one draw of the model, pixel by pixel in raster order" if self.drawn else "the model's mean E[x | z]"

    def pictures(self, u: Tensor, **options: Any) -> Tensor:
        """Of codes `[S, B, D]`, `[S, B, C, H, W]` within the range of pixels."""
        if not self.drawn:
            space = self.guide.space(self.x[: u.shape[1]])
            made = generate.decode(space, u, self.x[: u.shape[1]])[0]
        else:
            space = self.guide.space(self.x[:1])
            flat = u.flatten(0, 1)
            with torch.no_grad(), isolated(), evaluating(self.model):
                # One call for all codes: every pixel of a raster draw is a pass of the net.
                made = poutine.condition(self.model, space.constrain(flat))(None, size=len(flat))
        return self.planes(made).view(*u.shape[:2], *self.form.image)

    def reconstructions(self) -> Picture:
        number = min(len(self.x), 8 if self.drawn else 16)
        made = self.pictures(self.centre[:number].unsqueeze(0))[0]
        figure = plots.reconstructions(self.planes(self.x[:number]), made, signed=self.signed, columns=16)
        return Picture("Reconstructions", figure, f"Above, test data; below, {self.what} at their posterior mean.")

    def samples(self) -> list[Picture]:
        """One sheet; where the prior is tilted, one of the tilted prior and one of its base."""
        number = 12 if self.drawn else 36
        if self.outcome.settings.model not in TILTED:
            u = self.guide.space(self.x[:1]).prior(number, self.x[:1])  # [K, 1, D]
            return [self.sheet("Samples", u, "Codes from the prior")]
        steps, model = self.model.chain.num_steps, self.model
        after, before = (model.sample_prior(number, tilted=tilted).unsqueeze(1) for tilted in (True, False))
        return [
            self.sheet("Samples", after, f"Codes from the tilted prior, by {steps} Langevin steps from its base"),
            self.sheet("Samples before the tilt", before, "Codes from the base of the prior, without the energy"),
        ]

    def sheet(self, title: str, u: Tensor, origin: str) -> Picture:
        """Pictures of codes `[K, 1, D]`."""
        made = self.pictures(u.transpose(0, 1) if self.drawn else u).flatten(0, 1)
        figure = plots.samples(made, signed=self.signed, columns=12)
        return Picture(title, figure, f"{origin}; each picture is {self.what}.")

    def traversals(self) -> list[Picture]:
        """One sheet, or one for every group of a ladder, of the latents that move most over data."""
        groups = getattr(self.model, "groups", {"": slice(0, self.centre.shape[1])})
        values = torch.linspace(0.02, 0.98, 5 if self.drawn else _VALUES, dtype=self.centre.dtype)
        ends = torch.quantile(self.centre, values.to(self.centre.device), dim=0)
        found = []
        for level, (name, part) in enumerate(groups.items()):
            spread = self.centre[:, part].var(0)
            chosen = spread.argsort(descending=True)[: self.few].sort().values + part.start
            u = self.centre[:1].repeat(len(chosen) * len(values), 1, 1)
            for row, latent in enumerate(chosen.tolist()):
                u[row * len(values) : (row + 1) * len(values), 0, latent] = ends[:, latent]
            u = self.followed(u, level)
            made = self.pictures(u).view(len(chosen), len(values), 1, *self.form.image)
            rows = {f"latent {latent - part.start}": made[row] for row, latent in enumerate(chosen.tolist())}
            depth = "" if not name else f" of group {name}" + _depth(level, len(groups))
            left_out = part.stop - part.start - len(chosen)
            words = f" The {len(chosen)} that move most of {part.stop - part.start}." if left_out else ""
            found.append(Picture(
                f"Traversals{depth}", plots.traversals(rows, signed=self.signed),
                "The first test datum with one latent moved, from the 2 % to the 98 % quantile of that latent's "
                f"posterior means over test data; {self.others(level)}. Each picture is {self.what}.{words}",
            ))  # fmt: skip
        return found

    def others(self, level: int) -> str:
        """What the other latents do while one of this group moves."""
        if level == 0 or not hasattr(self.model, "conditionals"):
            return "the others stay"
        return "the others of its group stay, and the groups below follow at their conditional means"

    def followed(self, u: Tensor, level: int) -> Tensor:
        """Codes of which a group was moved; in a hierarchy the groups below it follow."""
        if not hasattr(self.model, "conditionals"):
            return u
        groups = self.model.groups
        with torch.no_grad(), evaluating(self.model):
            for below in reversed(range(level)):
                above = u[..., groups[f"z{below + 2}"]]
                u[..., groups[f"z{below + 1}"]] = self.model.prior(below, above).mean
        return u

    def circles(self) -> Picture:
        """Each circle of a torus, all the way round."""
        number = min(_ROWS, self.centre.shape[1] // 2)
        turn = torch.linspace(0, 2 * torch.pi, _VALUES + 1, dtype=self.centre.dtype)[:-1].to(self.centre.device)
        u = self.centre[:1].repeat(number, _VALUES, 1)
        for circle in range(number):
            u[circle, :, 2 * circle : 2 * circle + 2] = torch.stack([turn.cos(), turn.sin()], -1)
        made = self.pictures(u.flatten(0, 1).unsqueeze(1)).view(number, _VALUES, 1, *self.form.image)
        rows = {f"circle {circle}": made[circle] for circle in range(number)}
        words = (
            "The first test datum taken once round each circle of the torus, which closes behind the last picture; the "
            f"others stay at its posterior mean. Each picture is {self.what}."
        )
        return Picture("Round the circles", plots.traversals(rows, signed=self.signed), words)

    def interpolations(self) -> Picture:
        pairs = min(3 if self.drawn else _PAIRS, len(self.x) // 2)
        share = torch.linspace(0, 1, 6 if self.drawn else _STEPS, device=self.centre.device).view(-1, 1, 1)
        start, end = self.centre[:pairs], self.centre[pairs : 2 * pairs]
        made = self.pictures(torch.lerp(start, end, share.to(start)))
        words = f"Straight lines between the posterior means of two test data; each picture is {self.what}."
        return Picture("Interpolations", plots.interpolations(made, signed=self.signed), words)

    def imputations(self) -> Picture:
        x = self.x[:_HIDDEN]
        planes = self.planes(x)
        mask = torch.ones_like(planes, dtype=torch.bool)
        if self.form.image[1] > 1:
            mask[..., self.form.image[1] // 2 :, :] = False
        else:
            mask[..., self.form.image[2] // 2 :] = False
        found = generate.impute(self.model, self.guide, x, mask.view_as(x), num_samples=200)
        shaped = generate.Imputation(self.planes(found.mean), found.sd.view_as(planes), found.khat)
        figure = plots.imputations(planes, mask, shaped, truth=planes, signed=self.signed)
        bad = 0 if found.khat is None else int((~(found.khat <= 0.7)).sum())
        far = "" if not bad else (
            f" k-hat is above 0.7 for {bad} of {len(x)}: there the guide is too far from the posterior given half a "
            "picture for its weights to be trusted."
        )  # fmt: skip
        words = f"Half of every datum hidden (in colour) and filled in from the rest.{far}"
        return Picture("Imputations", figure, words)

    def clusters(self) -> list[Picture]:
        """What a VLAC makes of every class of every group."""
        if not hasattr(self.model, "num_clusters"):
            return []
        found = []
        for level, group in enumerate(self.outcome.findings.groups):
            numbers = range(self.model.num_clusters[level])
            with evaluating(self.model):
                rows = {k: self.planes(self.model.generate(level, k, 10)) for k in numbers}
            figure = plots.clusters(rows, group.clustering)
            known = "" if group.clustering is None else " Sizes and classes are of the test data found in it."
            found.append(Picture(
                f"Clusters of group {group.name}{_depth(level, len(self.outcome.findings.groups))}", figure,
                "One cluster a row: codes of this group from that class, of the other groups from their priors; each "
                f"picture is the model's mean E[x | z].{known}",
            ))  # fmt: skip
        return found


def _depth(level: int, number: int) -> str:
    if number == 1:
        return ""
    return " (shallowest)" if level == 0 else " (deepest)" if level == number - 1 else ""
