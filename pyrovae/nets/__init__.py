"""Encoders and decoders; any `nn.Module` serves as either."""

from pyrovae.nets.dense import MLP, LinearHeadDecoder, Table
from pyrovae.nets.ladder import LadderDecoder, LadderEncoder

__all__ = ["MLP", "LadderDecoder", "LadderEncoder", "LinearHeadDecoder", "Table"]
