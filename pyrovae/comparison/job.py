"""The main job: one generative model under each guide, end to end and with one frozen decoder, against long chains.

Every guide trains its own copy of the model (end to end). These numbers mix the model's quality with the guide's, so
all guides then serve as posteriors of *one* frozen decoder, where paired per-datum differences tell them apart.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae import diagnose, evidence, reference, runtime, table
from pyrovae.comparison.machine import require_device, set_threads
from pyrovae.comparison.outcome import Outcome, Settings, no_density
from pyrovae.comparison.recipes import FROZEN_EXTRAS, GUIDES, TUNED, build_guide, build_model
from pyrovae.guides.base import Guide
from pyrovae.provenance import Provenance, fingerprint
from pyrovae.table import Number, Row
from pyrovae.training import FitResult, fit

__all__ = ["run"]


def run(settings: Settings, say: Callable[[Any], None] = print) -> Outcome:
    """Train, evaluate, compare, and write everything below `settings.out`."""
    images = datasets.load(settings.data, binarization=settings.binarization, seed=settings.seed)
    pixels = images.event_shape[0]
    threads = set_threads(settings.threads, pixels, settings.batch_size)
    require_device(settings.device)
    likelihood = "gaussian" if settings.binarization == "none" else "bernoulli"
    train, test = images.train.to(settings.device), images.test.to(settings.device)
    if settings.quick:
        train, test = train[:500], test[:50]
    test = test[:1000]
    outcome = Outcome(settings, images, Provenance(
        data=images.name, fingerprint=images.fingerprint, split="test", num_data=len(test),
        binarization=images.binarization, preprocessing=images.preprocessing, likelihood=likelihood, seed=settings.seed,
        num_samples=settings.num_samples, device=settings.device, threads=threads,
        dtype=str(test.dtype).removeprefix("torch."),
    ))  # fmt: skip
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    say(f"{images!r}; {threads} thread(s), device {settings.device}, seed {settings.seed}")

    job = _Job(settings, outcome, train, test, pixels, likelihood, out, say)
    job.phase("training end to end", job.train_all)
    job.phase("training on the frozen decoder", job.tune_all)
    job.phase("evaluation", job.evaluate_all)
    job.phase("reference chains", job.sample_references)
    job.phase("diagnosis", job.diagnose_all)
    job.phase("report", job.write)
    total = sum(outcome.phases.values())
    say(f"{total:.0f} s in all; see {out / 'report.html'}")
    return outcome


class _Job:
    """The phases of one run."""

    def __init__(
        self, settings: Settings, outcome: Outcome, train: Tensor, test: Tensor, pixels: int, likelihood: str,
        out: Path, say: Callable[[Any], None],
    ) -> None:  # fmt: skip
        self.settings, self.outcome, self.train, self.test = settings, outcome, train, test
        self.pixels, self.likelihood, self.out, self.say = pixels, likelihood, out, say
        self.weights: dict[str, Tensor] = {}

    def phase(self, name: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        self.outcome.phases[name] = time.perf_counter() - began
        self.say(f"{name}: {self.outcome.phases[name]:.1f} s")

    def _fit(self, name: str, model: Any, guide: Guide, epochs: int, learning_rate: float, folder: str) -> FitResult:
        s = self.settings
        return fit(
            model, guide, self.train, epochs=epochs, batch_size=s.batch_size, seed=s.seed,
            optimizer=pyro.optim.Adam({"lr": learning_rate}), transform=self.outcome.data.transform,
            checkpoint=self.out / folder / f"{name.replace(' ', '-')}.pt", resume=s.resume, description=name,
        )  # fmt: skip

    def train_all(self) -> None:
        s, o = self.settings, self.outcome
        for name in s.guides:
            vae = build_model(self.pixels, s.latent_dim, self.likelihood, s.seed, s.device)
            guide = build_guide(name, vae, s.seed, s.device)
            o.models[name], o.guides[name] = vae, guide
            o.fits[name] = self._fit(name, vae, guide, s.epochs, s.learning_rate, "checkpoints")

    def tune_all(self) -> None:
        """Every guide on one frozen decoder; encoders start from the decoder's own run and are tuned to it."""
        s, o = self.settings, self.outcome
        o.frozen_from = "amortized" if "amortized" in s.guides else s.guides[0]
        vae, base = o.models[o.frozen_from].requires_grad_(False).eval(), o.guides[o.frozen_from]
        start = getattr(base, "encoder", None) if o.frozen_from == "amortized" else None
        names = [name for name in s.guides if name != o.frozen_from]
        if start is not None:
            names += [extra for extra in FROZEN_EXTRAS if extra.split(" ")[0] in s.guides]
        o.frozen_guides[o.frozen_from] = base
        for name in sorted(names, key=_order):
            guide = build_guide(name, vae, s.seed, s.device, start)
            if any(p.requires_grad for p in guide.parameters()) and (start is None or name in TUNED):
                # Named after the decoder: after more end-to-end training, old checkpoints are of another one.
                folder = f"frozen/{fingerprint(list(vae.state_dict().values()))[:12]}"
                self._fit(name, vae, guide, s.tune_epochs, s.learning_rate, folder)
            o.frozen_guides[name] = guide

    def evaluate_all(self) -> None:
        o = self.outcome
        for name, guide in o.guides.items():
            values = self._evaluate(name, guide)
            values["train s"] = Number(o.fits[name].seconds)
            o.end_to_end.append(Row(name, values, replace(o.provenance, kl_weight=o.fits[name].kl_weight)))
        own = next(row for row in o.end_to_end if row.guide == o.frozen_from)
        for name, guide in o.frozen_guides.items():
            if name == o.frozen_from:
                values = {column: value for column, value in own.values.items() if column != "train s"}
            else:
                values = self._evaluate(f"{name} (frozen decoder)", guide)
            o.frozen.append(Row(name, values, o.provenance))
        self._differences()

    def _evaluate(self, name: str, guide: Guide) -> dict[str, Number | str]:
        values: dict[str, Number | str] = {"ms": self._milliseconds(guide)}
        if not guide.traits.has_density:
            return {**values, "ELBO": "no density", "IWAE": "no density", "k-hat": "none", "> 0.7": "none"}
        weights = evidence.log_weights(
            guide.model, guide, self.test, num_samples=self.settings.num_samples, seed=self.settings.seed,
            progress=f"evaluating {name}",
        )  # fmt: skip
        elbo, iwae = evidence.summarize(weights)
        khat = diagnose.pareto_khat(weights)
        self.weights[name], self.outcome.khats[name] = weights, khat
        share = float((khat > 0.7).double().mean())
        return {
            **values,
            "ELBO": Number(elbo.mean, elbo.mean_se),
            "IWAE": Number(iwae.mean, iwae.mean_se),
            "k-hat": Number(float(khat.median()), _median_se(khat)),
            "> 0.7": Number(share, math.sqrt(share * (1 - share) / len(khat))),
        }

    def _milliseconds(self, guide: Guide) -> Number:
        """Time of one posterior (one draw of it), batched over the test set; se over repeats."""
        times = []
        for _ in range(4):
            began = time.perf_counter()
            with torch.no_grad(), runtime.preserve_rng(), runtime.evaluating(guide.model, guide):
                guide.draws(1, self.test)
            times.append(1000 * (time.perf_counter() - began) / len(self.test))
        spread = torch.tensor(times[1:], dtype=torch.double)  # the first call also checks the batch
        return Number(float(spread.median()), float(spread.std() / math.sqrt(len(spread))))

    def _differences(self) -> None:
        """Paired per-datum differences from the frozen decoder's own guide."""
        o = self.outcome
        base = self.weights.get(o.frozen_from)
        if base is None:
            return
        for row in o.frozen:
            weights = self.weights.get(f"{row.guide} (frozen decoder)")
            if weights is None:
                continue
            for column, ours, theirs in zip(
                ("ELBO", "IWAE"), evidence.summarize(weights), evidence.summarize(base), strict=True
            ):
                row.values[f"Δ {column}"] = Number(*evidence.difference(ours, theirs))

    def sample_references(self) -> None:
        """Batched HMC on a few held-out data under every decoder, and every guide against its own decoder's."""
        s, o = self.settings, self.outcome
        x = self.test[: s.num_reference]
        for name, vae in o.models.items():
            o.references[name] = reference.hmc(vae, x, seed=s.seed)
            self.say(f"  decoder of {name}: {o.references[name]!r}")
            self._compare(o.end_to_end, name, o.guides[name], o.references[name], x)
        truth = o.references[o.frozen_from]
        for name, guide in o.frozen_guides.items():
            o.draws[name] = self._compare(o.frozen, name, guide, truth, x)

    def diagnose_all(self) -> None:
        """Where each guide loses under its own decoder; and the frozen decoder's own guide on simulated data."""
        s, o = self.settings, self.outcome
        for name, guide in o.guides.items():
            if guide.traits.has_density:
                o.gaps[name] = diagnose.gaps(
                    guide.model, guide, self.test[: s.num_gaps], num_samples=s.num_samples, seed=s.seed,
                    progress=f"gaps of {name}",
                )  # fmt: skip
                self.say(f"  {o.gaps[name]!r}")
        base = o.guides[o.frozen_from]
        o.calibration = diagnose.calibrate(base.model, base, self.test, num_data=s.num_simulated, seed=s.seed)

    def _compare(
        self, rows: Sequence[Row], name: str, guide: Guide, truth: reference.Reference, x: Tensor
    ) -> Tensor:
        row = next(row for row in rows if row.guide == name)
        if not truth.usable.any():
            for column in ("mean error", "sd ratio", "sliced W2"):
                row.values[column] = "the reference is not ok"
            with runtime.seeded(self.settings.seed):
                return guide.draws(1, x)
        result = reference.compare(guide, truth, x, seed=self.settings.seed)
        for column, value, floor in (
            ("mean error", result.mean_error, result.mean_error_floor),
            ("sd ratio", result.sd_ratio.mean(-1), result.sd_ratio_floor.mean(-1)),
            ("sliced W2", result.sliced_w2, result.sliced_w2_floor),
        ):
            kept = value[~value.isnan()]
            se = float(kept.std() / math.sqrt(len(kept))) if len(kept) > 1 else None
            row.values[column] = Number(float(kept.mean()), se, float(floor.nanmean()))
        return result.draws

    def write(self) -> None:
        from pyrovae import export
        from pyrovae.comparison.page import write_report

        o = self.outcome
        x = self.test[: self.settings.num_reference]
        caption = f"{table.LEGEND} {no_density(o)}".strip()
        self.say(table.to_rich("End to end: every guide trains its own decoder", o.end_to_end))
        self.say(table.to_rich(f"Posteriors of one frozen decoder (of {o.frozen_from})", o.frozen, caption))
        (self.out / "comparison.json").write_text(json.dumps(o.to_dict(), indent=1, allow_nan=False))
        export.save(self.out / "posterior.nc", o.references[o.frozen_from], o.draws, {"x": x})
        write_report(o, self.test, self.out / "report.html")


def _order(name: str) -> int:
    """Variants of a guide stand beside it."""
    return list(GUIDES).index(name.split(" ")[0])


def _median_se(values: Tensor, repeats: int = 200) -> float:
    """Bootstrap standard error of the median over data."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (repeats, len(values)), generator=generator)
    return float(values.cpu()[index].median(dim=1).values.std())
