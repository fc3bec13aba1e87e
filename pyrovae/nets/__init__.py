"""Encoders and decoders; any `nn.Module` serves as either."""

from pyrovae.nets.charts import ChartMLP
from pyrovae.nets.dense import MLP, LinearHeadDecoder, Table
from pyrovae.nets.ladder import LadderDecoder, LadderEncoder
from pyrovae.nets.lstm import LSTMDecoder, LSTMEncoder
from pyrovae.nets.masked import GreyContext, LocalPixelCNN, MaskedConv2d, PixelCNN
from pyrovae.nets.time_mlp import TimeMLP

__all__ = [
    "MLP", "ChartMLP", "GreyContext", "LSTMDecoder", "LSTMEncoder", "LadderDecoder", "LadderEncoder",
    "LinearHeadDecoder", "LocalPixelCNN", "MaskedConv2d", "PixelCNN", "Table", "TimeMLP",
]  # fmt: skip
