"""Recurrent nets for text: padded rows of word indices `[B, T]`, 0 for padding (`pyrovae.data.text`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LSTMDecoder", "LSTMEncoder"]


class LSTMEncoder(nn.Module):
    """Tokens `[B, T]` to the parameters of their posterior, `[B, outputs]`, from the state after the last word.

    Args:
        vocabulary: number of words.
        outputs: 2 D for a diagonal Gaussian.
        embedding, hidden: sizes.
    """

    def __init__(self, vocabulary: int, outputs: int, *, embedding: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(tokens))
        # What follows the last word is computed and not looked at: padding changes nothing.
        last = (tokens != 0).sum(1).clamp_min(1) - 1
        return self.head(states[torch.arange(len(tokens), device=tokens.device), last])


class LSTMDecoder(nn.Module):
    """Logits of every next word given the words before it and z, `[B, T, vocabulary]`.

    z enters at every step, beside the word, and makes the first state.

    Args:
        vocabulary: number of words.
        latent_dim: D; 0 for a language model, whose first state is learned.
        embedding, hidden: sizes.
        dropout: of the words' embeddings and of the states, in training.
    """

    def __init__(
        self, vocabulary: int, latent_dim: int, *, embedding: int = 64, hidden: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if latent_dim < 0:
            raise ValueError(f"latent_dim must not be negative, got {latent_dim}")
        self.vocabulary, self.latent_dim, self.hidden = vocabulary, latent_dim, hidden
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=0)
        self.start = nn.Linear(latent_dim, 2 * hidden) if latent_dim else _Learned(2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding + latent_dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, vocabulary)

    def first_state(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c) of the LSTM, `[1, B, hidden]` each."""
        h, c = self.start(z).chunk(2, dim=-1)
        return h.tanh().unsqueeze(0).contiguous(), c.unsqueeze(0).contiguous()

    def step(
        self, words: Tensor, z: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(logits of the word after each of `words: [B, T]`, state after the last)."""
        beside = z.unsqueeze(1).expand(-1, words.shape[1], -1)
        shown = torch.cat([self.dropout(self.embed(words)), beside], -1)
        found, state = self.lstm(shown, state or self.first_state(z))
        return self.out(self.dropout(found)), state

    def forward(self, words: Tensor, z: Tensor) -> Tensor:
        return self.step(words, z)[0]


class _Learned(nn.Module):
    """A linear map of no latents: its bias, `[B, 0] -> [B, size]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, z: Tensor) -> Tensor:
        return self.bias.expand(len(z), -1)
