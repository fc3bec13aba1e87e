"""The `pyrovae` command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

__all__ = ["main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Guides, ground truth and diagnostics for deep latent-variable models in Pyro."""


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist, omniglot, or an .npz file")] = "digits",
    guides: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    latent_dim: Annotated[int, typer.Option(min=1, help="latents per datum")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="training epochs of every guide (5 with --quick)")] = 50,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; 1 by default for small nets")] = None,
    out: Annotated[str, typer.Option(help="folder for report, numbers, draws, checkpoints")] = "runs/compare",
    binarization: Annotated[str, typer.Option(help="static, dynamic or none (Gaussian likelihood)")] = "static",
    quick: Annotated[bool, typer.Option("--quick", help="a small run: shows everything, proves nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the checkpoints in --out")] = False,
) -> None:
    """Train one model under each guide, hold all of them against long chains, write a table and a report."""
    from rich.console import Console
    from rich.markup import escape

    from pyrovae.comparison import Settings, run
    from pyrovae.comparison.recipes import GUIDES
    from pyrovae.errors import CheckpointError, ParameterCollision, TrainingDiverged

    console = Console()
    if console.width < 170:  # the tables need the room; narrower terminals wrap lines instead of cells
        console = Console(width=170)
    names = tuple(name.strip() for name in guides.split(",") if name.strip()) or tuple(GUIDES)
    try:
        settings = Settings(
            data=data, guides=names, latent_dim=latent_dim, epochs=min(epochs, 5) if quick else epochs, seed=seed,
            device=device, threads=threads, out=out, quick=quick, binarization=cast(Any, binarization),
            num_samples=200 if quick else 1000, num_reference=4 if quick else 20,
            num_gaps=10 if quick else 50, num_simulated=200 if quick else 1000, resume=resume,
        )  # fmt: skip
        run(settings, say=lambda item: console.print(item, highlight=False, soft_wrap=isinstance(item, str)))
    except (ValueError, FileNotFoundError, CheckpointError, ParameterCollision, TrainingDiverged) as error:
        console.print(f"[bold red]pyrovae compare:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error


@app.command()
def fit(
    model: Annotated[str, typer.Option(
        help="vae, ppca, piecewise-affine, energy-prior, ladder, joint-energy, hierarchical, hierarchical-energy, "
        "vlac, pixelcnn, lossy, charts, diffusion, text or language-model"
    )] = "vae",
    guide: Annotated[str, typer.Option(
        help="amortized (the default), semi-amortized, laplace, mixture, short-run, exact ...; a wrong name lists all"
    )] = "",
    loss: Annotated[str, typer.Option(help="elbo, iwae, infovae, mae, free-bits ...; the guide's own by default")] = "",
    data: Annotated[str, typer.Option(help="images or text by name, or an .npz file")] = "digits",
    out: Annotated[str, typer.Option(help="folder to write; runs/fit-MODEL-DATA by default")] = "",
    latent_dim: Annotated[int | None, typer.Option(
        min=1, help="latents per datum, of ladders per group, coordinates of a chart"
    )] = None,
    epochs: Annotated[int, typer.Option(min=1, help="of training (at most 10 with --quick)")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="data in a training step")] = 128,
    learning_rate: Annotated[float | None, typer.Option(help="of Adam; 0.001 or, of piecewise-affine, 0.005")] = None,
    energy_rate: Annotated[float, typer.Option(
        help="step size of a tilted prior's energy, as a share of the learning rate"
    )] = 0.2,
    kl_warmup: Annotated[int | None, typer.Option(
        min=0, help="epochs of a KL weight from 0.1 to 1; 10 by default for ladders and text, else 0"
    )] = None,
    schedule: Annotated[str, typer.Option(help="none, aggressive, deep-first or recursive")] = "none",
    binarization: Annotated[str, typer.Option(help="static, dynamic or none; as the model needs by default")] = "",
    patience: Annotated[int, typer.Option(min=0, help="epochs that held-out data wait for better; 0: no end")] = 0,
    num_samples: Annotated[int, typer.Option(min=25, help="importance draws per datum")] = 1000,
    num_data: Annotated[int, typer.Option(min=2, help="test data evaluated, from the first")] = 1000,
    classes: Annotated[str, typer.Option(help="of vlac: collapsed or enumerated")] = "collapsed",
    manifold: Annotated[str, typer.Option(help="of vae's latents: plane, torus or sphere")] = "plane",
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; 1 by default for small nets")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="a small run: shows everything, proves nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
) -> None:
    """Train one model with one guide and one loss, evaluate it, write numbers and a page of pictures."""
    from pyrovae.errors import ParameterCollision, TrainingDiverged

    def work(say: Callable[[Any], None]) -> None:
        from pyrovae.fitting import Settings, run

        run(Settings(
            model=model, guide=guide, loss=loss, data=data, out=out, latent_dim=latent_dim, epochs=epochs,
            batch_size=batch_size, learning_rate=learning_rate, energy_rate=energy_rate, kl_warmup=kl_warmup,
            schedule=schedule, binarization=binarization, patience=patience, num_samples=num_samples, num_data=num_data,
            classes=cast(Any, classes), manifold=cast(Any, manifold), seed=seed, threads=threads, device=device,
            quick=quick, resume=resume,
        ), say)  # fmt: skip

    _after("fit", work, ParameterCollision, TrainingDiverged)


@app.command()
def certify(
    guides: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    problems: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    seed: Annotated[int, typer.Option(min=0, help="of training and evaluation")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; 1 by default")] = None,
    out: Annotated[str, typer.Option(help="page to write; docs/certification.md by default, for the whole table")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="two problems, half the draws")] = False,
) -> None:
    """Hold every guide against exact answers; exit with status 1 if any fails."""
    from rich.console import Console
    from rich.markup import escape

    from pyrovae.certification import Settings, run

    console = Console()
    if console.width < 150:
        console = Console(width=150)
    try:
        settings = Settings(
            guides=_names(guides), problems=_names(problems), seed=seed, threads=threads, out=out or None, quick=quick
        )
    except ValueError as error:
        console.print(f"[bold red]pyrovae certify:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    outcome = run(settings, say=lambda item: console.print(item, highlight=False, soft_wrap=isinstance(item, str)))
    if not outcome.passed:
        raise typer.Exit(1)


Run = Annotated[str, typer.Argument(help="folder of a finished `pyrovae compare`")]
Chosen = Annotated[str, typer.Option(help="comma-separated; all by default")]
Seed = Annotated[int, typer.Option(min=0, help="of everything random")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch threads; 1 by default for small nets")]


@app.command()
def evaluate(
    run: Run,
    guides: Chosen = "",
    num_samples: Annotated[int, typer.Option(min=2, help="importance draws per datum")] = 5000,
    num_data: Annotated[int, typer.Option(min=1, help="held-out data, from the first")] = 1000,
    temperatures: Annotated[int, typer.Option(min=0, help="of annealed importance sampling; 0 leaves it out")] = 0,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Tighter bounds of log p(x) for a finished run. A run that was stopped goes on where it was."""
    from pyrovae.comparison import afterwards

    _after(
        "evaluate", lambda say: afterwards.evaluate(
            run, guides=_names(guides), num_samples=num_samples, num_data=num_data, temperatures=temperatures,
            seed=seed, threads=threads, say=say,
        ),
    )  # fmt: skip


@app.command()
def diagnose(
    run: Run,
    guides: Chosen = "",
    num_data: Annotated[int, typer.Option(min=1, help="held-out data, from the first")] = 1000,
    num_reference: Annotated[int, typer.Option(min=0, help="of them, with long chains")] = 100,
    num_gaps: Annotated[int, typer.Option(min=0, help="of them, with local inference")] = 100,
    num_simulated: Annotated[int, typer.Option(min=0, help="simulated data for calibration; 0 leaves it out")] = 1000,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Say how wrong each guide of a finished run is, where, and what to do: verdicts here, pictures in a page."""
    from pyrovae.comparison import afterwards

    _after(
        "diagnose", lambda say: afterwards.diagnose(
            run, guides=_names(guides), num_data=num_data, num_reference=num_reference, num_gaps=num_gaps,
            num_simulated=num_simulated, seed=seed, threads=threads, say=say,
        ),
    )  # fmt: skip


@app.command()
def reference(
    run: Run,
    guides: Chosen = "",
    num_data: Annotated[int, typer.Option(min=1, help="held-out data, from the first")] = 100,
    num_chains: Annotated[int, typer.Option(min=2, help="for every datum")] = 8,
    target_ess: Annotated[float, typer.Option(min=10, help="effective draws of every datum")] = 2000.0,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Long chains for a finished run, its guides held against them. A run that was stopped goes on where it was."""
    from pyrovae.comparison import afterwards

    _after(
        "reference", lambda say: afterwards.reference(
            run, guides=_names(guides), num_data=num_data, num_chains=num_chains, target_ess=target_ess, seed=seed,
            threads=threads, say=say,
        ),
    )  # fmt: skip


def _after(command: str, work: Callable[[Callable[[Any], None]], Any], *others: type[Exception]) -> None:
    """Run it on a console; bad input, and other errors that are named, end with one sentence and status 2."""
    from rich.console import Console
    from rich.markup import escape

    from pyrovae.errors import CheckpointError

    expected: tuple[type[Exception], ...] = (ValueError, OSError, CheckpointError, *others)
    console = Console()
    if console.width < 150:
        console = Console(width=150)
    try:
        work(lambda item: console.print(item, highlight=False, soft_wrap=isinstance(item, str)))
    except expected as error:
        console.print(f"[bold red]pyrovae {command}:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def main() -> None:
    """Entry point."""
    app()
