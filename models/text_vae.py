r"""A VAE of sentences with a recurrent decoder (Bowman et al. 2016), and the language model without a code.

.. math::
    z \sim N(0, I), \qquad p(x | z) = \prod_t p(x_t | x_{<t}, z)

The product runs over the words and the end; padding is not part of a sentence. *Word dropout* replaces words that the
decoder is shown, in training alone, so that it has to ask z for them.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

from pyrovae.compat import ModelTraits
from pyrovae.data.text import BEGIN, END, PAD, UNKNOWN
from pyrovae.errors import DataError
from pyrovae.nets.lstm import LSTMDecoder

__all__ = ["SentenceDistribution", "TextVAE", "perplexity"]

_ONE = torch.Size()  # a single draw
_NEVER = -1e9  # a logit whose probability is 0; finite, so that second derivatives are


class SentenceDistribution(TorchDistribution):
    """Sentences as padded rows of at most T indices, given codes.

    Args:
        decoder: `nets.LSTMDecoder`.
        z: codes `[*batch, D]`.
        length: T, words and end; a draw that has not ended by then is cut.
        dropout: probability that a word the decoder is shown becomes "unknown".
    """

    arg_constraints = {"z": constraints.real_vector}
    has_rsample = False

    def __init__(
        self, decoder: LSTMDecoder, z: Tensor, length: int, dropout: float = 0.0, validate_args: bool | None = None
    ) -> None:
        self.decoder, self.z, self.length, self.dropout = decoder, z, length, dropout
        super().__init__(z.shape[:-1], torch.Size([length]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return _Rows(self.decoder.vocabulary)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> SentenceDistribution:
        z = self.z.expand(*batch_shape, self.z.shape[-1])
        return SentenceDistribution(self.decoder, z, self.length, self.dropout, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """`[*batch]`, nats a sentence."""
        if self._validate_args:
            self._validate_sample(value)
        lead = torch.broadcast_shapes(value.shape[:-1], self.z.shape[:-1])
        words = value.expand(*lead, -1).reshape(-1, value.shape[-1])
        z = self.z.expand(*lead, -1).reshape(len(words), self.z.shape[-1])
        shown = torch.cat([torch.full_like(words[:, :1], BEGIN), words[:, :-1]], 1)
        if self.dropout:
            # A mask of its own for every sentence; the beginning is always shown.
            dropped = (torch.rand(shown.shape, device=shown.device) < self.dropout) & (shown != PAD)
            dropped[:, 0] = False
            shown = torch.where(dropped, torch.full_like(shown, UNKNOWN), shown)
        logits, _ = self._step(shown, z)
        each = cross_entropy(logits.transpose(1, 2), words, ignore_index=PAD, reduction="none")
        return -each.sum(1).view(lead)

    def _step(
        self, words: Tensor, z: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`decoder.step` without padding and beginnings, which no sentence has: densities and draws are of one law."""
        logits, state = self.decoder.step(words, z, state)
        return logits.index_fill(-1, torch.tensor([PAD, BEGIN], device=logits.device), _NEVER), state

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """`[*sample_shape, *batch, T]`, int64."""
        shape = self._extended_shape(sample_shape)
        z = self.z.expand(*shape[:-1], -1).reshape(shape[:-1].numel(), self.z.shape[-1])
        with torch.no_grad():
            state, word = None, torch.full((len(z), 1), BEGIN, device=z.device)
            ended = torch.zeros(len(z), dtype=torch.bool, device=z.device)
            found = torch.full((len(z), self.length), PAD, device=z.device)
            for t in range(self.length):
                logits, state = self._step(word, z, state)
                word = torch.distributions.Categorical(logits=logits[:, -1]).sample().unsqueeze(1)
                found[:, t] = torch.where(ended, torch.full_like(word[:, 0], PAD), word[:, 0])
                ended |= word[:, 0] == END
                if ended.all():
                    break
        return found.view(shape)


class TextVAE(PyroModule):
    """Sites "z" and "x", plate "data"; `x: [B, T]` are padded rows of `pyrovae.data.text`.

    Args:
        decoder: `nets.LSTMDecoder`.
        latent_dim: D.
        word_dropout: in training mode alone; sentences are then scored with another mask on every call.
        max_length: of generated sentences.

    Example:
        >>> from pyrovae.nets import LSTMDecoder
        >>> model = TextVAE(LSTMDecoder(10, 2, embedding=4, hidden=8), latent_dim=2, max_length=6)
        >>> model(None, size=3).shape
        torch.Size([3, 6])
    """

    traits = ModelTraits()

    def __init__(
        self, decoder: LSTMDecoder, latent_dim: int, *, word_dropout: float = 0.0, max_length: int = 30
    ) -> None:
        super().__init__()
        if latent_dim < 1 or max_length < 1:
            raise ValueError(f"latent_dim and max_length must be at least 1, got {latent_dim} and {max_length}")
        if not 0 <= word_dropout < 1:
            raise ValueError(f"word_dropout is a probability below 1, got {word_dropout}")
        self.decoder, self.latent_dim = decoder, latent_dim
        self.word_dropout, self.max_length = word_dropout, max_length
        like = next(decoder.parameters())
        self.register_buffer("origin", torch.zeros(latent_dim, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with sentences x, or with size=n to generate")
        if x is not None:
            check_sentences(x, self.decoder.vocabulary)
        with pyro.plate("data", len(x) if x is not None else size):
            z = pyro.sample("z", dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1))
            length = self.max_length if x is None else x.shape[1]
            dropout = self.word_dropout if self.training else 0.0
            found: Tensor = pyro.sample("x", SentenceDistribution(self.decoder, z, length, dropout), obs=x)
            return found


def check_sentences(x: Tensor, vocabulary: int | None = None) -> None:
    """Raise `DataError` for what are no rows of indices; where Pyro validates, also for rows that are no sentences.

    A sentence is words and the end, then padding, or words up to the last column (cut). Rows that no draw can be have
    no probability, yet a decoder would give them one: padding counts for nothing wherever it stands.

    Args:
        x: `[B, T]`.
        vocabulary: number of words that the decoder knows; None leaves the largest index to the site's support.
    """
    if not isinstance(x, Tensor):
        raise DataError(f"sentences are given to models as rows of indices, got {type(x).__name__}: pass its .rows()")
    if x.dim() != 2 or x.is_floating_point() or x.shape[1] < 1:
        raise DataError(
            f"sentences are rows of word indices [B, T], got {x.dtype} of shape {list(x.shape)}: encode them with a "
            "pyrovae.data.Vocabulary"
        )
    if not pyro.settings.get("validate_distributions_pyro"):
        return
    rows = _Rows(vocabulary)
    if not rows.check(x).all():
        raise DataError(rows.explain(x))


def _wrong(x: Tensor, vocabulary: int | None) -> dict[str, Tensor]:
    """What is wrong with rows `[..., T]`, and what to do about it -> where, `[..., T]`."""
    before = torch.cat([torch.full_like(x[..., :1], BEGIN), x[..., :-1]], -1)
    ended, padding, outside = (before == END) | (before == PAD), x == PAD, x < 0
    known = "" if vocabulary is None else f" of {vocabulary} words"
    if vocabulary is not None:
        outside = outside | (x >= vocabulary)
    return {
        f"indices outside the decoder's vocabulary{known}: encode them with the one it was made for": outside,
        f"the index {BEGIN} that begins them, which the model sets itself: leave it out": x == BEGIN,
        f"words after their end, {END}: pad them with {PAD} from there on": ~padding & (before == END),
        f"words after padding, {PAD}: put all padding after the end": ~padding & (before == PAD),
        f"padding, {PAD}, before their end, {END}: end them first, or cut them to their words": padding & ~ended,
    }


class _Rows(constraints.Constraint):
    """Whole sentences: rows that a draw can be."""

    is_discrete = True
    event_dim = 1

    def __init__(self, vocabulary: int | None) -> None:
        self.vocabulary = vocabulary

    def check(self, value: Tensor) -> Tensor:
        masks = torch.stack(list(_wrong(value, self.vocabulary).values()))
        return ~masks.any(0).any(-1)

    def explain(self, value: Tensor) -> str:
        """The first thing that is wrong with rows, and what to do."""
        found = {what: int(mask.any(-1).sum()) for what, mask in _wrong(value, self.vocabulary).items()}
        what, number = next((what, number) for what, number in found.items() if number)
        return f"{number} of {value.shape[:-1].numel()} sentences have {what}"


def perplexity(log_likelihood: Tensor, lengths: Tensor) -> float:
    """exp of minus the mean log-likelihood of a token, ends counted, from nats a sentence `[N]` and lengths `[N]`."""
    return float((-log_likelihood.double().sum() / lengths.sum()).exp())
