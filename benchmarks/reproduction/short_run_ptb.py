"""Short-run inference for text (Pang, Nijkamp, Han & Wu 2021) on the Penn treebank."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import evidence, guides
from pyrovae.chunks import per_chunk
from pyrovae.data.text import Sentences
from pyrovae.diagnose.collapse import active_units
from pyrovae.fitting.numbers import perplexity
from pyrovae.fitting.sentences import likeliest
from pyrovae.guides.short_run import text_steps
from pyrovae.minibatches import Rows
from pyrovae.models import LanguageModel, TextVAE, no_latents
from pyrovae.nets import LSTMDecoder
from pyrovae.runtime import evaluating
from pyrovae.schedules import RisingTemperature
from reproduction.collapse_text import amortized, refined
from reproduction.evaluation import number, plain
from reproduction.experiment import Arm, Experiment, Preset, Setup, Split

__all__ = ["EXPERIMENT", "experiment"]

STEPS, TEMPERATURE, CHAINS = 20, 0.2, 10  # of the chain; published: ten importance samples by the log-det route
WARMING = 4  # a quarter of all epochs at the lowest temperature: 15 of 60 were published
SEEN, MEANS = 64, 50  # sentences of which posterior means are taken, and draws of each
POINTS = 5  # of an interpolation
ROWS = 8  # sentences whose chains carry their density at once


def decoder(preset: Preset, split: Split, latent_dim: int) -> LSTMDecoder:
    """As published for a width of 256: as many word dimensions, half of them dropped, all weights from U(-0.1, 0.1). A
    narrow one has less to drop."""
    width = preset.hidden[0]
    words = len(split.source.vocabulary)
    net = LSTMDecoder(words, latent_dim, embedding=width, hidden=width, dropout=0.5 if width >= 256 else 0.2)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)
    return net


def language_model(preset: Preset, split: Split) -> LanguageModel:
    return LanguageModel(decoder(preset, split, 0))


def text_vae(preset: Preset, split: Split) -> TextVAE:
    return TextVAE(decoder(preset, split, preset.latent_dim), preset.latent_dim)


def short_run(parts: Setup, *, temperature: float = TEMPERATURE) -> guides.ShortRun:
    return guides.ShortRun(parts.model, STEPS, text_steps(STEPS), temperature=temperature, masks="fresh")


def warming(preset: Preset, split: Split) -> RisingTemperature:
    return RisingTemperature(-(-len(split.train) // preset.batch_size), hold=max(1, preset.epochs // WARMING))


def gaussian(model: Any) -> guides.LocalSVI:
    """Of each sentence's own, fitted to the trained model: chains have no density of their draws."""
    return guides.LocalSVI(model, num_samples=2, max_steps=60, check=20)


def judge(parts: Setup) -> guides.LocalSVI:
    return gaussian(parts.model)


def measure(guide: Any, split: Split, preset: Preset, progress: bool, arm: str) -> list[dict[str, Any]]:
    """What an arm's own inference finds in test sentences, the two routes to log p(x), and sentences in between."""
    seen = split.test[:SEEN]
    x = seen.rows()
    known = active_units(guide.model, guide, x, num_samples=MEANS, chunk=16)
    spread = known.mean_variance.sort(descending=True).values
    rows = [{
        "table": f"What each arm's own inference finds in {len(x)} test sentences: active latents (of {MEANS} draws), "
                 "the largest and the median variance of a posterior mean, and log p(x | z) of a sentence in nats",
        "active": f"{int(known.active.sum())} of {len(spread)}", "largest": plain(float(spread[0])),
        "median": plain(float(spread.median())), "log p(x | z)": number(known.reconstruction),
    }]  # fmt: skip
    if arm == "short-run":
        rows.append(_two_routes(guide, split.test[: preset.extra_rows], preset))
    return rows + _between(guide.model, known.mean[:2].to(next(guide.model.parameters())), split, seen)


def _two_routes(guide: guides.ShortRun, some: Sentences, preset: Preset) -> dict[str, Any]:
    """log p(x) of the same sentences by chains with their density, and by a Gaussian fitted to each."""
    density = guides.DensityShortRun(guide.model, guide.num_steps, guide.steps, temperature=guide.temperature)
    fitted, data = gaussian(guide.model), Rows(some)
    values, bound, folded = torch.zeros(len(some)).double(), torch.zeros(len(some)).double(), torch.zeros(len(some))
    for index in data.in_order(ROWS):
        (x,) = data.take(index)
        weights, folds = per_chunk(
            lambda *rows: torch.stack(density.audited_log_weights(CHAINS, *rows), -1), (guide.model, density), (x,),
            {}, plate="data", indices=index.tolist(),
        ).double().unbind(-1)  # fmt: skip
        values[index], folded[index] = evidence.summarize(weights)[1].values, folds.mean(0).float()
        many = evidence.log_weights(guide.model, fitted, x, num_samples=preset.num_samples, indices=index.tolist())
        bound[index] = evidence.summarize(many)[1].values
    share, hit = 100 * float(folded.mean()), int((folded > 0).sum())
    return {
        "table": f"-log p(x) of {len(some)} test sentences by {CHAINS} chains with their density at fixed noise and by "
                 f"a Gaussian fitted to each (IWAE-{preset.num_samples}), nats and perplexity of a word",
        "NLL, chains": number(-values), "PPL, chains": _ppl(values, some), "steps that fold, %": plain(share),
        "is a bound": "yes, as far as seen" if not hit else f"no: {hit} sentences have steps that fold",
        "NLL, Gaussian": number(-bound), "PPL, Gaussian": _ppl(bound, some),
    }  # fmt: skip


def _ppl(values: Tensor, some: Sentences) -> dict[str, Any]:
    found = perplexity(values, some.lengths)
    return {"mean": found.value, "se": found.se}


def _between(model: Any, ends: Tensor, split: Split, some: Sentences) -> list[dict[str, Any]]:
    """The words that are likeliest one by one, at points on the line between two sentences' posterior means."""
    words = split.source.vocabulary
    share = torch.linspace(0, 1, POINTS, device=ends.device).unsqueeze(1)
    with torch.no_grad(), evaluating(model):
        made = words.decode(likeliest(model.decoder, torch.lerp(ends[:1], ends[1:], share), model.max_length))
    given = words.decode(some.tokens[:2])
    places = ["first sentence", *(f"{100 * float(part):.0f} %" for part in share), "second sentence"]
    return [
        {"table": "Greedy decoding between the posterior means of two test sentences", "at": at, "words": f"`{line}`"}
        for at, line in zip(places, [given[0], *made, given[1]], strict=True)
    ]


FULL_NOISE = Arm("short-run, full noise", partial(short_run, temperature=1.0), model=text_vae, kl_epochs=0, judge=judge)
ARMS = (
    Arm("VAE", amortized, model=text_vae, kl_epochs=0),
    Arm("language model", lambda parts: no_latents, model=language_model, kl_epochs=0),
    Arm("SA-VAE, warm-up", partial(refined, gradient="total"), model=text_vae),
    Arm("short-run", short_run, model=text_vae, kl_epochs=0, schedule=warming, judge=judge),
)
_QUICK = Preset(
    epochs=8, train_rows=3000, validation_rows=200, test_rows=200, num_samples=100, batch_size=32, learning_rate=2e-3,
    max_norm=160.0, hidden=(64,), latent_dim=32, kl_epochs=4, extra_rows=24, extra_steps=5, max_words=2000,
)  # fmt: skip
_PAPER = replace(
    _QUICK, epochs=60, train_rows=None, validation_rows=1000, test_rows=None, num_samples=500, learning_rate=1e-3,
    hidden=(256,), kl_epochs=10, extra_rows=500, extra_steps=20, max_words=10_000,
)  # fmt: skip


def experiment(
    data: str, title: str, missing: tuple[str, ...], full_noise: tuple[str, ...], **quick: Any
) -> Experiment:  # fmt: skip
    """The experiment on a text; presets in which the arm with full noise takes part, and what the quick one changes."""
    return Experiment(
        name=f"short-run-{data}",
        title=f"Short-run inference for text on {title}",
        paper="Pang, Nijkamp, Han & Wu (2021)",
        data=data,
        likelihood="categorical",
        baseline="VAE",
        arms=(*ARMS, replace(FULL_NOISE, presets=full_noise)),
        pairs=(("short-run", "language model"), ("short-run", "short-run, full noise")),
        presets={"quick": replace(_QUICK, **quick), "paper": _PAPER},
        settings=(
            "LSTM decoder of one layer, z (D = 32) at every step and in the first state, weights from U(-0.1, 0.1), "
            "dropout of words and states of 0.5 (0.2 below a width of 256), batches of 32 sentences of about one "
            "length, Adam, gradients of the mean loss clipped to a norm of 5, weights of the best epoch on validation "
            "sentences. Short runs: 20 Langevin steps from the prior with noise scales 0.8, 0.7, 0.6, 0.5, 0.2, 0.2, "
            "0.1, 0.1 and 0.05 from there on, fresh masks at every step in training, temperature 0.05 in the first "
            "quarter of the epochs (published: 15 of 60), then 0.05 more in each epoch up to 0.2"
        ),
        remarks=(
            "Log-likelihoods are nats per sentence, and hold for this vocabulary alone: they cannot be held against "
            "published ones. SA-VAE takes 5 steps of 0.05 (paper preset 20) and a KL weight from 0.1 to 1; the other "
            "arms have a KL weight of 1 from the first step.",
            "Short runs have no density of their draws. Their rows in the table of bounds are bounds by a Gaussian "
            "fitted to each test sentence (LocalSVI, 60 steps), which says how well the trained decoder models "
            "sentences; what the short run itself finds is in the tables below.",
            "The noise of the published chain is a fifth of that of the posterior, so its codes are close to the most "
            "probable ones: log p(x | z) at them is no bound and no likelihood of a sentence. The arm with full noise "
            "has the same steps, and noise of the posterior's own size.",
            "By the published route the first steps may fold the map from the start to the end of a chain. Then "
            "neither NLL nor PPL by that route is a bound; the table says where it happened. The released evaluator "
            "draws other noise for the density than for the chain; ours draws it once.",
        ),
        missing=missing,
        measure=measure,
    )  # fmt: skip


EXPERIMENT = experiment(
    "ptb", "the Penn treebank",
    ("The treebank has no labels, so codes cannot be held against any (published: labels of short Yelp reviews, which "
     "are not at hand).",),
    full_noise=("paper",),
)  # fmt: skip
