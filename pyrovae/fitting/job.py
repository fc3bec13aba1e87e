"""The job of `pyrovae fit`: train one model with one guide, evaluate it on test data, draw it, write it down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyrovae import checkpoint as files
from pyrovae import training
from pyrovae.comparison.machine import require_device, set_threads
from pyrovae.evidence.estimate import UNNORMALISED
from pyrovae.fitting import atlas, numbers, tilted
from pyrovae.fitting.guides import build_guide
from pyrovae.fitting.material import Material, gather
from pyrovae.fitting.objectives import build_loss, build_optimizer, build_schedule
from pyrovae.fitting.outcome import Outcome
from pyrovae.fitting.pairing import require
from pyrovae.fitting.recipes import DIFFUSION, LANGUAGE_MODEL, build_model
from pyrovae.fitting.settings import Settings
from pyrovae.generate import centre
from pyrovae.handlers import LinearSchedule
from pyrovae.provenance import Provenance
from pyrovae.store import fresh

__all__ = ["run"]

_WRITTEN = ("report.html", "results.json", "weights.pt", "checkpoint.pt", "checkpoint-start.pt", "comparison.json")
_CLUSTERED = 5000  # training data whose codes place a VLAC's components
_TEXT_WORK = 1_000_000  # multiply-adds of a step on sentences, at least


def run(settings: Settings, say: Callable[[Any], None] = print) -> Outcome:
    """Train, evaluate, draw, and write everything below `settings.out`: results.json, report.html, weights.pt.

    Args:
        settings: see `Settings`.
        say: takes lines and `rich` tables.

    Raises:
        IncompatibleError: a combination that does not go together; says what does.
        DataError, FileNotFoundError, ValueError: data that cannot be read, or do not suit the model.
        ValueError: `out` holds another run.
        CheckpointError: a checkpoint that is damaged or of other data.
        TrainingDiverged: training came upon numbers that are not finite.
    """
    s = settings
    require(s)
    require_device(s.device)
    out = Path(s.out)
    _require_folder(s, out)
    if s.resume and not (out / "settings.json").exists():
        say(f"there is no run in {out} to go on with: starting one")
    material = gather(s)
    pixels = material.form.pixels or _TEXT_WORK
    threads = set_threads(s.threads, pixels, s.batch_size)
    model = build_model(s.model, material.form, latent_dim=s.latent_dim, variant=s.variant, seed=s.seed,
                        device=s.device)  # fmt: skip
    guide = build_guide(s.guide, model, material.form, seed=s.seed, device=s.device)
    outcome = Outcome(s, _provenance(s, material, threads), model, guide)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(s.to_dict(), indent=1))
    say(f"{s.model} on {s.data}: {len(material.train)} training and {len(material.test)} test data "
        f"({material.told}); {threads} thread(s), device {s.device}, seed {s.seed}")  # fmt: skip
    if s.quick:
        outcome.told.append("This is a quick run on few data: it shows everything and proves nothing.")
    job = _Job(outcome, material, out, say)
    with fresh():  # nothing of earlier runs is in Pyro's store, and nothing of this one is left there
        job.phase("training", job.train)
        job.phase("evaluation", job.evaluate)
        job.phase("report", job.write)
    return outcome


def _require_folder(s: Settings, out: Path) -> None:
    """Nothing is overwritten, and no run goes on with other settings."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: pass a folder as --out")
    if not (out / "settings.json").exists():
        there = sorted(name for name in _WRITTEN if (out / name).exists())
        if there:
            raise ValueError(f"{out} holds {', '.join(there)} of something else: pass another --out")
        return
    if not s.resume:
        raise ValueError(f"{out} holds a run already: pass --resume to go on with it, or another --out")
    try:
        before = json.loads((out / "settings.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{out / 'settings.json'} is damaged ({error}): pass another --out") from error
    s.require_same(before)


def _provenance(s: Settings, material: Material, threads: int) -> Provenance:
    rows = material.rows
    drawn = s.model not in (LANGUAGE_MODEL, DIFFUSION)  # whose numbers are of no importance draws
    return Provenance(
        split="test", num_data=len(material.test), likelihood=material.form.likelihood, seed=s.seed,
        num_samples=s.num_samples if drawn else None, device=s.device, threads=threads,
        dtype=str(rows.dtype if rows.is_floating_point() else torch.get_default_dtype()).removeprefix("torch."),
        **material.origin,
    )  # fmt: skip


class _Job:
    """The phases of one run."""

    def __init__(self, outcome: Outcome, material: Material, out: Path, say: Callable[[Any], None]) -> None:
        self.outcome, self.material, self.out, self.say = outcome, material, out, say

    def phase(self, name: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        self.outcome.phases[name] = time.perf_counter() - began

    def train(self) -> None:
        """One stage, of a VLAC two: its components are placed among the codes of the first.

        Charts are given places before, and their weights after; log Z of a tilted prior is measured at the end.
        """
        o = self.outcome
        s = o.settings
        charts = getattr(getattr(o.guide, "traits", None), "charts", False)
        if charts and not (s.resume and (self.out / "checkpoint.pt").exists()):
            o.guide.start(self.material.train, seed=s.seed)
        if s.model != "vlac" or s.epochs == 1:
            if s.model == "vlac":
                o.told.append("With a single epoch the clusters started blind: pass --epochs 2 or more.")
            self._fit("training", s.epochs, s.warmup, s.schedule, s.patience, "checkpoint.pt")
        else:
            # The KL weight is at 1 before there are clusters: until then codes are not where they will be.
            first = min(s.epochs - 1, max(s.warmup, s.epochs // 5, 1))
            early = s.schedule != "none"
            self._fit("before the clusters", first, s.warmup, s.schedule, 0, "checkpoint-start.pt")
            self._place()
            later = s.schedule if early and s.schedule != "deep-first" else "none"
            self._fit("with clusters", s.epochs - first, 0, later, s.patience, "checkpoint.pt")
        if charts:
            atlas.settle(o.model, o.guide, self.material.train)
        if o.model.traits.tilted:
            tilted.measure(o)
        files.save(self.out / "weights.pt", {"state": files.snapshot_modules(o.model, o.guide)})
        o.objective = "log p(x)" if s.model == LANGUAGE_MODEL else o.fit.objective

    def _fit(self, name: str, epochs: int, kl_warmup: int, schedule: str, patience: int, file: str) -> None:
        o, m = self.outcome, self.material
        s = o.settings
        per_epoch = -(-len(m.train) // s.batch_size)
        groups = len(getattr(o.model, "sizes", (1,)))
        o.fits[name] = training.fit(
            o.model, o.guide, m.train, loss=build_loss(s.loss, o.model, o.guide),
            optimizer=build_optimizer(s.rate, s.energy_rate),
            schedule=build_schedule(schedule, groups=groups, steps=epochs * per_epoch), epochs=epochs,
            batch_size=s.batch_size, transform=m.transform, validation=m.validation, patience=patience or None,
            kl_weight=LinearSchedule(kl_warmup * per_epoch, start=0.1) if kl_warmup else 1.0, seed=s.seed,
            checkpoint=self.out / file, resume=s.resume, description=name,
        )  # fmt: skip

    def _place(self) -> None:
        """A VLAC's components among the codes of training data."""
        o, m = self.outcome, self.material
        x = m.train[:_CLUSTERED]
        if m.transform is not None:
            x = (x > 0.5).to(x)  # grey images that batches binarise anew: one binary form will do for codes
        fewest = max(o.model.num_clusters)
        if len(x) < fewest:
            o.told.append(f"Fewer training data than the {fewest} clusters of a group: these started blind.")
            return
        o.model.start_clusters(centre(o.model, o.guide, x, num_samples=10), seed=o.settings.seed)

    def evaluate(self) -> None:
        o, alone = self.outcome, numbers.independent_pixels(self.material)
        o.findings = numbers.evaluate(o.model, o.guide, self.material, o.settings.num_samples, o.settings.seed)
        if o.log_z is not None:
            o.findings.numbers = {"log Z": o.log_z, **o.findings.numbers}
        score = None if o.findings.kind == UNNORMALISED else o.findings.score
        if alone is not None and score is not None and not score[1].value > alone:
            o.told.append(
                f"The {score[0].removesuffix(', exact')} is not above what independent pixels without any latent "
                f"reach, {alone:.5g} nats: training went wrong, or was too short. Try a smaller --learning-rate, or "
                "more --epochs."
            )

    def write(self) -> None:
        from pyrovae.fitting import page, pictures, sentences

        o, m = self.outcome, self.material
        (self.out / "results.json").write_text(json.dumps(o.to_dict(), indent=1, allow_nan=False))
        text = m.vocabulary is not None
        sections = page.sentences(sentences.write(o, m)) if text else page.pictures(pictures.draw(o, m))
        (self.out / "report.html").write_text(page.report(o, m, sections))
        self.say(page.to_rich(o))
        self.say(f"see {self.out / 'report.html'}")
