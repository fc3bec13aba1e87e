"""The recurrent language model: a `TextVAE` without a code, what its decoder can do by itself.

    p(x) = prod_t p(x_t | x_{<t})

There is nothing to infer, so `log_prob` is exact; a text VAE that is no better has not used its latents. Train it with
an empty guide: `fit(model, guide=no_latents, data)`.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.compat import ModelTraits
from pyrovae.models.text_vae import SentenceDistribution, check_sentences
from pyrovae.nets.lstm import LSTMDecoder

__all__ = ["LanguageModel", "no_latents"]


class LanguageModel(PyroModule):
    """Site "x", plate "data"; `x: [B, T]` are padded rows of `pyrovae.data.text`.

    Args:
        decoder: `nets.LSTMDecoder` with `latent_dim=0`.
        max_length: of generated sentences.

    Example:
        >>> from pyrovae.nets import LSTMDecoder
        >>> model = LanguageModel(LSTMDecoder(10, 0, embedding=4, hidden=8), max_length=6)
        >>> model(None, size=3).shape
        torch.Size([3, 6])
    """

    traits = ModelTraits(latents="none")

    def __init__(self, decoder: LSTMDecoder, *, max_length: int = 30) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if not isinstance(decoder, LSTMDecoder) or decoder.latent_dim:
            raise ValueError("a language model has no code: pass a nets.LSTMDecoder with latent_dim=0")
        self.decoder, self.max_length = decoder, max_length
        like = next(decoder.parameters())
        self.register_buffer("no_code", torch.zeros(0, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None and size is None:
            raise ValueError("call the model with sentences x, or with size=n to generate")
        if x is not None:
            check_sentences(x, self.decoder.vocabulary)
        number = len(x) if x is not None else int(size or 0)
        with pyro.plate("data", number):
            length = self.max_length if x is None else x.shape[1]
            found: Tensor = pyro.sample("x", self._sentences(number, length), obs=x)
            return found

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `[B]`, nats a sentence."""
        check_sentences(x, self.decoder.vocabulary)
        return self._sentences(len(x), x.shape[1]).log_prob(x)

    def _sentences(self, number: int, length: int) -> SentenceDistribution:
        return SentenceDistribution(self.decoder, self.no_code.expand(number, 0), length)


def no_latents(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latents."""
