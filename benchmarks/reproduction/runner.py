"""Run an experiment: train what is not trained yet, evaluate what is not evaluated yet, write `results.json`."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyrovae import evidence
from pyrovae.data import ImageData
from pyrovae.errors import NormaliserError, TrainingDiverged
from pyrovae.provenance import Provenance
from pyrovae.runtime import seeded, threads
from pyrovae.training import FitResult
from reproduction.evaluation import differences, evaluate
from reproduction.experiment import Arm, Experiment, Preset, Split, Trained, load, setup
from reproduction.training import Clock, train

__all__ = ["Options", "run"]

# What a finished arm may be taken further with; anything else makes it another arm.
_EXTENSIBLE = ("epochs", "test_rows", "num_samples", "extra_rows", "extra_steps")


@dataclass(frozen=True)
class Options:
    """How an experiment is run.

    Attributes:
        preset_name: "quick" or "paper", for the record.
        preset: with the changes the user asked for.
        out: folder of checkpoints and results.
        seed: of the first weights, of training and of the estimators.
        seconds: training time at most of each arm.
        threads, device: of torch.
        arms: names of the arms to run; empty for all of the preset.
        data: path of an `.npz` file to take instead of the experiment's data.
        progress: show progress bars.
    """

    preset_name: str
    preset: Preset
    out: Path
    seed: int = 0
    seconds: float | None = None
    threads: int = 2
    device: str = "cpu"
    arms: tuple[str, ...] = ()
    data: str | None = None
    progress: bool = True


def run(experiment: Experiment, options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and evaluate every arm of the preset; returns what `results.json` then holds.

    Raises:
        ValueError: an unknown arm, no GPU, or a folder that holds arms of other settings.
    """
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that torch can use: pass --device cpu")
    wanted = _choose(experiment, options)
    threads(options.threads)
    split = load(experiment, options.preset, options.device, options.data)
    say(f"{split.source!r}: {len(split.train)} training and {len(split.test)} test data; "
        f"{options.threads} threads, {options.device}, seed {options.seed}")  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    for arm in wanted:
        record = _arm(experiment, arm, options, split, done, say)
        done.append(record)
        _write(options.out / "results.json", _results(experiment, options, split, done))
    return _results(experiment, options, split, done)


def _choose(experiment: Experiment, options: Options) -> list[Arm]:
    available = [arm for arm in experiment.arms if options.preset_name in arm.presets or arm.name in options.arms]
    if not options.arms:
        return available
    unknown = set(options.arms) - {arm.name for arm in available}
    if unknown:
        raise ValueError(
            f"{experiment.name} has no arm {', '.join(sorted(unknown))}: choose among "
            f"{', '.join(arm.name for arm in experiment.arms)}"
        )
    chosen = [arm for arm in available if arm.name in options.arms]
    for arm in chosen:
        if arm.as_long_as is not None and arm.as_long_as not in options.arms:
            raise ValueError(f"{arm.name} trains for as long as {arm.as_long_as} did: name that arm as well")
    return chosen


def _arm(
    experiment: Experiment, arm: Arm, options: Options, split: Split, done: list[dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """One arm's record, from its file where it is finished."""
    whole = split
    preset = options.preset if arm.kl_epochs is None else replace(options.preset, kl_epochs=arm.kl_epochs)
    preset = replace(preset, epochs=round(arm.stretch * preset.epochs))
    if arm.rows is not None and arm.rows < len(split.train):
        # As many steps as the other arms take, to the nearest epoch.
        theirs, ours = (-(-rows // preset.batch_size) for rows in (len(split.train), arm.rows))
        preset = replace(preset, epochs=round(preset.epochs * theirs / ours))
        split = replace(split, train=split.train[: arm.rows])
    if arm.cut is not None:
        split = arm.cut(split)
    parts = setup(experiment, preset, split, options.seed, arm)
    with seeded(options.seed):
        guide = arm.build(parts)
    parts.model.to(options.device)
    if isinstance(guide, torch.nn.Module):  # what has no latents has a function for a guide
        guide.to(options.device)
    seconds = options.seconds
    if arm.as_long_as is not None:
        other = next(record for record in done if record["name"] == arm.as_long_as)
        if other["failed"]:
            return {"name": arm.name, "published": arm.published,
                    "failed": f"{arm.as_long_as} diverged, so there is no time to train for"}  # fmt: skip
        seconds = other["seconds"]
    settings = {
        **asdict(preset), "hidden": list(preset.hidden), "seed": options.seed,
        "guide": getattr(guide, "__name__", repr(guide)), "rows": len(split.train),
        "seconds": seconds, "by_time": arm.as_long_as is not None, "data": split.fingerprint,
        "device": options.device,
    }  # fmt: skip
    folder = options.out / arm.slug
    record = _finished(folder / "arm.json", settings)
    if record is not None:
        say(f"{arm.name}: {'failed' if record['failed'] else 'finished'} before")
        return {**record, "published": arm.published}
    record = {"name": arm.name, "published": arm.published, "settings": settings, "failed": None}
    loss = None if arm.loss is None else arm.loss()
    schedule = None if arm.schedule is None else arm.schedule(preset, split)
    try:
        if arm.prepare is not None and not (folder / "checkpoint.pt").exists():
            arm.prepare(parts, guide, options.seed)
        if arm.train is not None:
            folder.mkdir(parents=True, exist_ok=True)
            began, cpu = time.perf_counter(), time.process_time()
            result: Trained | FitResult = arm.train(parts, guide, options.seed)
            clock = Clock(result.epochs, time.perf_counter() - began, time.process_time() - cpu)
        else:
            result, clock = train(
                parts.model, guide, loss, split, preset, folder, seed=options.seed, seconds=seconds,
                by_time=arm.as_long_as is not None, name=arm.name, progress=options.progress, schedule=schedule,
            )  # fmt: skip
        if hasattr(parts.model, "normalise"):  # a tilted prior: its program lacks log Z
            evidence.normalise(parts.model, seed=options.seed)
    except (TrainingDiverged, NormaliserError) as error:  # a result as well: the other arms go on
        record["failed"] = str(error)
        say(f"{arm.name}: {error}")
    else:
        judge = guide if arm.judge is None else arm.judge(parts).to(options.device)
        numbers, values = evaluate(
            parts.model, judge, split.test, preset.num_samples, seed=options.seed, name=arm.name,
            progress=options.progress,
        )  # fmt: skip
        record |= {
            "objective": result.objective, "epochs": clock.epochs, "best_epoch": result.best_epoch,
            "steps": result.steps, "seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds,
            "out_of_time": arm.as_long_as is None and clock.epochs < preset.epochs,
            "curve": result.curve, "validation": [list(item) for item in result.validation],
            "numbers": numbers, "values": values,
            "provenance": _provenance(experiment, options, split, result.kl_weight).to_dict(),
            "extra": _extra(experiment, arm, guide, whole, options),
        }  # fmt: skip
        if experiment.draw is not None:
            record["drawn"] = experiment.draw(guide, whole, options.preset, arm.name)
        say(f"{arm.name}: {clock.epochs} epochs in {clock.seconds:.0f} s, {_line(numbers)}")
    _write(folder / "arm.json", record)
    return record


def _finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an arm that was finished with these settings; None where it is to be made or taken further."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    before = record["settings"]
    differing = sorted(name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name))
    if not differing:
        return record
    fixed = [name for name in differing if name not in (*_EXTENSIBLE, "seconds")]
    if fixed:
        raise ValueError(
            f"{path.parent} holds an arm with other settings ({', '.join(fixed)}): pass another --out, or remove it"
        )
    if settings["epochs"] < before["epochs"]:
        raise ValueError(
            f"{path.parent} was trained for {before['epochs']} epochs already, more than the {settings['epochs']} "
            "asked for: pass another --out"
        )
    return None


def _extra(experiment: Experiment, arm: Arm, guide: Any, split: Split, options: Options) -> list[dict[str, Any]]:
    if experiment.measure is None or not hasattr(guide, "traits"):
        return []
    return experiment.measure(guide, split, options.preset, options.progress, arm.name)


def _provenance(experiment: Experiment, options: Options, split: Split, kl_weight: float) -> Provenance:
    images = split.source if isinstance(split.source, ImageData) else None
    return Provenance(
        data=split.source.name, fingerprint=split.fingerprint, split=f"first {len(split.test)} test data",
        num_data=len(split.test), binarization="" if images is None else images.binarization,
        preprocessing="" if images is None else images.preprocessing, likelihood=experiment.likelihood,
        seed=options.seed, num_samples=options.preset.num_samples, device=options.device, kl_weight=kl_weight,
    )  # fmt: skip


def _results(experiment: Experiment, options: Options, split: Split, arms: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything a reader of the numbers needs; values per datum stay in the arms' own files."""
    return {
        "experiment": experiment.name, "preset": options.preset_name, "seed": options.seed,
        "settings": {**asdict(options.preset), "hidden": list(options.preset.hidden)},
        "train_rows": len(split.train), "test_rows": len(split.test), "data": repr(split.source),
        "split": split.source.split, "baseline": experiment.baseline, "machine": _machine(options),
        "differences": differences(arms, experiment.baseline_of),
        "arms": [{key: value for key, value in arm.items() if key != "values"} for arm in arms],
    }  # fmt: skip


def _machine(options: Options) -> str:
    if options.device.startswith("cuda"):
        return torch.cuda.get_device_name(options.device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _line(numbers: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value['mean']:.2f}" + ("" if value["se"] is None else f" ± {value['se']:.2f}")
        for name, value in numbers.items()
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a killed run leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
