"""Whether what was asked for goes together, and if not, what would: found out by asking, before any data are read."""

from __future__ import annotations

from functools import cache
from typing import Any

from pyrovae.compat import compatible
from pyrovae.data.sources import NAMES
from pyrovae.errors import DataError, IncompatibleError
from pyrovae.fitting.guides import GUIDES, KINDS, NO_GUIDE, build_guide
from pyrovae.fitting.material import COLOUR, TEXTS
from pyrovae.fitting.objectives import LOSSES, SCHEDULES, build_loss, build_schedule, candidates
from pyrovae.fitting.recipes import (
    DIFFUSION,
    GREY_MODELS,
    LANGUAGE_MODEL,
    MODELS,
    PIXEL_MODELS,
    PLAIN,
    TEXT_MODELS,
    TILTED,
    Form,
    Variant,
    build_model,
)
from pyrovae.fitting.settings import Settings
from pyrovae.models import no_latents

__all__ = ["require"]

_TINY_IMAGES, _TINY_TEXTS = Form(image=(1, 4, 4)), Form(vocabulary=8, longest=4, likelihood="words")


def require(settings: Settings) -> None:
    """Raise, with one sentence that says why and what goes together, for what does not.

    Raises:
        DataError: the model does not read such data.
        IncompatibleError: model, guide, loss, schedule or classes.
        ValueError: options that exclude each other.
    """
    s = settings
    _data(s)
    reason = _pairing(s.model, s.guide)
    if reason is not None:
        others = [name for name in MODELS if _pairing(name, s.guide) is None]
        raise IncompatibleError(
            f"{_why(reason)}; with --model {s.model} go --guide {_or(_guides(s.model))}, with --guide {s.guide} go "
            f"--model {_or(others)}"
        )
    if s.manifold != "plane" and s.model != "vae":
        raise IncompatibleError(
            f"the latents of the model {s.model!r} lie on no {s.manifold}: leave --manifold out, or pass --model vae"
        )
    model, guide = _pair(s.model, s.guide, s.variant)
    if s.classes == "enumerated":
        _enumerated(s)
    if s.loss:
        reason = _why_not(s.model, s.guide, s.loss)
        if reason is not None:
            fitting = [name for name in _guides(s.model) if _why_not(s.model, name, s.loss) is None]
            more = f", with --loss {s.loss} go --guide {_or(fitting)}" if fitting else ""
            own = _or(_losses(s))
            raise IncompatibleError(f"{_why(reason)}; with --guide {s.guide} go --loss {own}{more}")
    loss = build_loss(s.loss, model, guide)
    _warmup(s)
    if s.patience and s.model in TILTED:
        raise IncompatibleError(
            "held-out numbers of a tilted prior lack log Z, which moves with training, so the best of them is not the "
            "best model: leave --patience out"
        )
    reason = _schedule(s.schedule, guide, loss)
    if reason is not None:
        fitting = [name for name in SCHEDULES if _schedule(name, guide, loss) is None]
        raise IncompatibleError(
            f"{_why(reason)}; with --model {s.model}, --guide {s.guide} and this loss go --schedule {_or(fitting)}"
        )


def _data(s: Settings) -> None:
    images = f"{', '.join(NAMES)} or an .npz file"
    if s.data not in (*NAMES, *TEXTS) and not s.data.endswith(".npz"):
        raise DataError(f"unknown data {s.data!r}: choose from {images}, for models of sentences {_or(TEXTS)}")
    if s.wants_text and not s.is_text:
        raise DataError(
            f"the model {s.model!r} reads sentences, which {s.data!r} is not: pass --data {_or(TEXTS)}, or a model of "
            f"images, --model {_or([name for name in MODELS if name not in TEXT_MODELS])}"
        )
    if s.is_text and not s.wants_text:
        raise DataError(
            f"the model {s.model!r} reads images, but {s.data!r} is text: pass --data {images}, or a model of "
            f"sentences, --model {_or(TEXT_MODELS)}"
        )
    if s.is_text and s.binarization:
        raise DataError(f"words are not binarised: leave --binarization out for {s.data!r}")
    if s.model in GREY_MODELS and s.binarization not in ("", "none"):
        raise DataError(
            f"{s.model} has a Gaussian likelihood, which binary pixels do not follow: pass --binarization none, or "
            f"--model {_or([name for name in MODELS if name not in (*GREY_MODELS, *TEXT_MODELS)])}"
        )
    if s.model in PIXEL_MODELS and s.data in COLOUR and s.binarization == "dynamic":
        raise DataError("colours are not binarised anew for pixel decoders: pass --binarization none")


def _pair(model: str, guide: str, variant: Variant = PLAIN) -> tuple[Any, Any]:
    """Small ones of that name; what they offer does not depend on their size."""
    found = _tiny(model, variant)
    return found, build_guide(guide, found, _form(model))


def _tiny(model: str, variant: Variant = PLAIN) -> Any:
    return build_model(model, _form(model), latent_dim=2, variant=variant)


def _form(model: str) -> Form:
    return _TINY_TEXTS if model in TEXT_MODELS else _TINY_IMAGES


@cache
def _pairing(model: str, guide: str) -> str | None:
    """Why model and guide do not go together."""
    if guide == NO_GUIDE:
        if model == LANGUAGE_MODEL:
            return None
        return f"the latents of {model!r} need a guide, and 'none' is for the {LANGUAGE_MODEL}"
    return compatible(_tiny(model), KINDS[guide])


def _guides(model: str) -> list[str]:
    return [name for name in GUIDES if _pairing(model, name) is None]


@cache
def _why_not(model: str, guide: str, loss: str) -> str | None:
    """Why a loss does not go with them: the reason of its first form, or None when any form goes."""
    if model == LANGUAGE_MODEL and loss != "elbo":
        return f"a {LANGUAGE_MODEL} has no latents, so --loss {loss} has nothing to act on"
    pair = _pair(model, guide)
    reasons = [compatible(*pair, form) for form in candidates(loss, *pair)]
    return None if None in reasons else reasons[0]


def _losses(s: Settings) -> list[str]:
    if s.classes == "enumerated":
        return ["elbo"]
    return [name for name in LOSSES if _why_not(s.model, s.guide, name) is None]


def _enumerated(s: Settings) -> None:
    """Classes as sites of their own are summed out by Pyro's TraceEnum_ELBO and nothing else here."""
    if s.model != "vlac":
        raise IncompatibleError(f"the model {s.model!r} has no classes: leave --classes out, or pass --model vlac")
    if s.loss not in ("", "elbo") or s.guide != "amortized":
        raise IncompatibleError(
            "enumerated classes are trained by the ELBO with an amortized guide: pass --guide amortized and leave "
            "--loss out, or pass --classes collapsed"
        )


def _warmup(s: Settings) -> None:
    """Raise where there is no KL to be weighed."""
    if not s.warmup:
        return
    if s.model == DIFFUSION:
        raise IncompatibleError("a KL weight is not defined for a diffusion: pass --kl-warmup 0")
    reasons = {
        "iwae": "an importance-weighted bound under a KL weight is none",
        "chart-loss": "the chart loss has no KL that a weight could act on",
    }
    if s.loss in reasons:
        others = [name for name in _losses(s) if name not in reasons]
        raise IncompatibleError(f"{reasons[s.loss]}: pass --kl-warmup 0, or --loss {_or(others)}")


def _schedule(name: str, guide: Any, loss: Any) -> str | None:
    """Why a schedule does not go with them."""
    found = build_schedule(name)
    if found is None:
        return None
    if guide is no_latents:
        return f"the schedule {name!r} is for guides, and a {LANGUAGE_MODEL} has none"
    try:
        found.require(guide, loss)
    except IncompatibleError as error:
        return str(error)
    return None


def _why(reason: str) -> str:
    """Without the advice for Python, which options take the place of."""
    return reason.partition(": ")[0]


def _or(names: Any) -> str:
    """A list in words."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else str(last)
