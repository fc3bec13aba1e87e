"""Reproduce published results on real data (`make reproduce NAME=savae-mnist`).

    python benchmarks/reproduce.py savae-mnist --preset quick
    python benchmarks/reproduce.py --page

`quick` fits in about an hour on two cores, `paper` is the published setting. A run that was stopped goes on where it
was; finished arms are not run again; more epochs than before take finished arms further. Data sets are looked up below
PYROVAE_DATA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduction import EXPERIMENTS, GROUPS
from reproduction.experiment import Experiment, override
from reproduction.page import show, write_page
from reproduction.runner import Options, run

RUNS, PAGE = Path("runs/reproduce"), Path("docs/reproduction.md")


def main(arguments: list[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    if given.page:
        write_page(RUNS, PAGE)
        print(f"wrote {PAGE}")
        return
    if given.name is None:
        _parser().error(f"name an experiment ({', '.join([*EXPERIMENTS, *GROUPS])}), or pass --page")
    if given.name in EXPERIMENTS:
        _run(EXPERIMENTS[given.name], given, given.out or RUNS / given.name)
    for name in GROUPS.get(given.name, ()):
        _run(EXPERIMENTS[name], given, (given.out or RUNS) / name)
    print("all results together: python benchmarks/reproduce.py --page")


def _run(experiment: Experiment, given: argparse.Namespace, folder: Path) -> None:
    """Every seed of an experiment, its tables and its picture."""
    preset = override(
        experiment.presets[given.preset], epochs=given.epochs, train_rows=given.train_rows, test_rows=given.test_rows
    )
    seconds = None if given.time_limit is None else 60 * given.time_limit
    seeds = experiment.seeds if given.seed is None else (given.seed,)
    results = [
        run(experiment, Options(
            given.preset, preset, folder / f"{given.preset}-seed{seed}", seed=seed, seconds=seconds,
            threads=given.threads, device=given.device, arms=tuple(given.arms or ()), data=given.data,
            progress=not given.no_progress,
        ))
        for seed in seeds
    ]  # fmt: skip
    show(experiment, results)
    if experiment.picture is not None:
        experiment.picture(results).savefig(folder / f"{given.preset}.png")
    print(f"see results.json below {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS, *GROUPS], help="the experiment")
    parser.add_argument("--preset", choices=("quick", "paper"), default="quick")
    parser.add_argument("--seed", type=int, help="of first weights, training and estimators, instead of all seeds")
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--train-rows", type=int, help="instead of the preset's")
    parser.add_argument("--test-rows", type=int, help="instead of the preset's")
    parser.add_argument("--time-limit", type=float, help="minutes of training at most of each arm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="these arms only")
    parser.add_argument("--data", help="an .npz file instead of the experiment's data set")
    parser.add_argument("--out", type=Path, help=f"holds a folder PRESET-seedSEED of each run; {RUNS}/NAME by default")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE} from all results below {RUNS}")
    return parser


if __name__ == "__main__":
    main()
