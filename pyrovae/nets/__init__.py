"""Encoders and decoders; any `nn.Module` serves as either."""

from pyrovae.nets.dense import MLP, LinearHeadDecoder, Table
from pyrovae.nets.ladder import LadderDecoder, LadderEncoder
from pyrovae.nets.lstm import LSTMDecoder, LSTMEncoder
from pyrovae.nets.masked import GreyContext, LocalPixelCNN, MaskedConv2d, PixelCNN

__all__ = [
    "MLP", "GreyContext", "LSTMDecoder", "LSTMEncoder", "LadderDecoder", "LadderEncoder", "LinearHeadDecoder",
    "LocalPixelCNN", "MaskedConv2d", "PixelCNN", "Table",
]  # fmt: skip
