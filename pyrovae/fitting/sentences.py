"""Sentences of a trained text model: from its prior, of test sentences, and on the way between two of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.data.text import BEGIN, END, PAD
from pyrovae.fitting.material import Material
from pyrovae.fitting.outcome import Outcome
from pyrovae.runtime import evaluating, seeded

__all__ = ["Sentences", "likeliest", "write"]

_SAMPLES, _RECONSTRUCTIONS, _STEPS = 12, 10, 6
_SHOWN = 60  # words


@dataclass
class Sentences:
    """What a text model writes.

    Attributes:
        samples: draws, codes from the prior.
        reconstructions: (test sentence, the words that are likeliest one by one at its posterior mean).
        path: words at codes on the straight line between those of two test sentences, the first and the last theirs.
    """

    samples: list[str] = field(default_factory=list)
    reconstructions: list[tuple[str, str]] = field(default_factory=list)
    path: list[str] = field(default_factory=list)


def write(outcome: Outcome, material: Material) -> Sentences:
    """Let the model write."""
    model, words, centre = outcome.model, material.vocabulary, outcome.findings.centre
    if words is None:
        raise ValueError("only models of sentences write any")
    with seeded(outcome.settings.seed), torch.no_grad(), evaluating(model):
        found = Sentences(samples=words.decode(model(None, size=_SAMPLES)))
        if centre is None:
            return found
        length = min(_SHOWN, model.max_length)
        given = words.decode(material.rows[:_RECONSTRUCTIONS])
        made = words.decode(likeliest(model.decoder, centre[:_RECONSTRUCTIONS], length))
        found.reconstructions = [(" ".join(a.split()[:_SHOWN]), b) for a, b in zip(given, made, strict=True)]
        share = torch.linspace(0, 1, _STEPS, device=centre.device).unsqueeze(1)
        found.path = words.decode(likeliest(model.decoder, torch.lerp(centre[:1], centre[1:2], share), length))
    return found


def likeliest(decoder: Any, z: Tensor, length: int) -> Tensor:
    """The likeliest word after those before it, again and again: rows `[B, length]` for codes `[B, D]`.

    That is not the likeliest sentence, which would take a search.
    """
    state, word = None, torch.full((len(z), 1), BEGIN, device=z.device)
    ended = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    found = torch.full((len(z), length), PAD, device=z.device)
    never = torch.tensor([PAD, BEGIN], device=z.device)
    for t in range(length):
        logits, state = decoder.step(word, z, state)
        word = logits[:, -1].index_fill(-1, never, -torch.inf).argmax(-1, keepdim=True)
        found[:, t] = torch.where(ended, torch.full_like(word[:, 0], PAD), word[:, 0])
        ended |= word[:, 0] == END
    return found
