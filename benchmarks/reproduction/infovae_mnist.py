"""InfoVAE (Zhao, Song & Ermon 2019) on MNIST: what matching q(z) to the prior is worth on few and on many images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from pyrovae import diagnose, generate, guides, losses
from pyrovae.kernels import kernel_of, mmd2
from pyrovae.runtime import seeded
from reproduction.classifier import classifier, names
from reproduction.evaluation import number, plain
from reproduction.experiment import Arm, Experiment, Preset, Setup, Split

__all__ = ["EXPERIMENT"]

FEW = 500  # training images of the small runs
WEIGHT, LESS, STEIN = 1000.0, 50.0, 5.0  # lambda: alpha = 0 keeps the KL at weight 1
_LABELS, _CODES, _PARTS, _PICTURES = 1000, 4000, 10, 2000


def amortized(parts: Setup) -> guides.Amortized:
    return guides.Amortized(parts.model, parts.encoder(2 * parts.dim))


def measure(guide: Any, split: Split, preset: Preset, progress: bool, arm: str) -> list[dict[str, Any]]:
    """How far q(z) is from the prior, what the codes know of digits, and how even the classes of samples are."""
    x, y, model = split.wide, split.wide_labels, guide.model
    if x is None or y is None or len(x) < 4 * len(y.unique()):
        return []
    with seeded(0), torch.no_grad():
        u = guide.draws(1, x[:_CODES])[0]
        kernel = kernel_of("rbf", u.shape[1])
        # Parts have an error of their own; each is unbiased.
        parts = torch.stack([mmd2(part, torch.randn_like(part), kernel) for part in u.chunk(_PARTS) if len(part) > 1])
        volume = torch.linalg.slogdet(torch.cov(u.T.double()))[1]
        pictures = model.mean(torch.randn(_PICTURES, u.shape[1], dtype=u.dtype, device=u.device))
    found = names(classifier(split), pictures)
    shares = torch.bincount(found, minlength=int(y.max()) + 1).double() / len(found)
    uneven = float((shares * (shares.clamp_min(1e-12) * len(shares)).log()).sum())
    codes = generate.centre(model, guide, x, 20)
    probe = diagnose.probe(codes, y, num_labels=min(_LABELS, len(x) // 2))
    return [{
        "table": "Aggregate posterior, samples and codes",
        "MMD x 1000": number(1000 * parts),
        "log det Cov": plain(volume),
        "classes of samples, nats from even": plain(uneven),
        "error with few labels %": {"mean": 100 * (1 - probe.accuracy), "se": 100 * probe.se},
    }]  # fmt: skip


def _both(name: str, loss: Any = None, **options: Any) -> tuple[Arm, Arm]:
    return Arm(name, amortized, loss, **options), Arm(f"{name}, {FEW} images", amortized, loss, rows=FEW, **options)


EXPERIMENT = Experiment(
    name="infovae-mnist",
    title="InfoVAE on MNIST: ELBO, maximum mean discrepancy and Stein, on many and on few images",
    paper="Zhao, Song & Ermon (2019)",
    data="mnist",
    binarization="static",
    likelihood="bernoulli",
    baseline="ELBO",
    arms=(
        *_both("ELBO"),
        *_both("InfoVAE, MMD, lambda 50", partial(losses.InfoVAE, 0.0, LESS)),
        *_both("InfoVAE, Stein, lambda 5", partial(losses.InfoVAE, 0.0, STEIN, "stein")),
        *_both("InfoVAE, MMD", partial(losses.InfoVAE, 0.0, WEIGHT)),
        *_both("MMD without KL", partial(losses.InfoVAE, 1.0, WEIGHT)),
        *_both("InfoVAE, Stein", partial(losses.InfoVAE, 0.0, WEIGHT, "stein")),
        Arm("InfoVAE, MMD, the authors' kernel", amortized, partial(losses.InfoVAE, 0.0, WEIGHT, kernel="original")),
    ),
    pairs=(
        (f"InfoVAE, MMD, lambda 50, {FEW} images", f"ELBO, {FEW} images"),
        (f"InfoVAE, MMD, {FEW} images", f"ELBO, {FEW} images"),
    ),
    presets={
        "quick": Preset(epochs=15, train_rows=20_000, test_rows=500, num_samples=500, batch_size=200,
                        learning_rate=1e-3, hidden=(400, 400), latent_dim=10, extra_rows=5000),
        "paper": Preset(epochs=500, num_samples=5000, batch_size=200, learning_rate=1e-3, hidden=(1024, 1024),
                        latent_dim=10, extra_rows=10_000),
    },
    settings=(
        f"D = 10, ReLU MLPs, alpha = 0 and lambda = {WEIGHT:g} where no other is named (alpha = 1: no KL), RBF kernel "
        f"with s^2 = D, batch 200, Adam 1e-3, last weights; runs on {FEW} images take as many steps as the others"
    ),
    remarks=(
        "No table of the paper could be checked. It reports over-dispersed codes under the ELBO on small training sets "
        "(log det Cov above 0), a better match to the prior with MMD, and no loss of likelihood.",
        "MMD: unbiased estimates between codes of test images and draws of the prior, times 1,000, mean over ten parts "
        "of 400. Log det Cov: of the same codes; 0 for the prior.",
        "Classes of samples: KL of the classes that a small classifier gives 2,000 mean pictures of prior draws from "
        "even ones. Error: logistic regression on posterior means, 1,000 labels, the other test images held out.",
        "1,000 is the lambda quoted of the authors, for their kernel, whose MMD is some 15 times smaller at 10 "
        "latents; with the RBF kernel, and with Stein, it holds q(z) to the prior at the cost of what z says.",
        "Objectives with a weight on D(q(z) || p(z)) are no bounds; ELBO and IWAE are computed afterwards.",
    ),
    missing=("The adversarial divergence of the paper is not in the library.",),
    measure=measure,
)  # fmt: skip
