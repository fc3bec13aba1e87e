"""Data sets: small images, stored flat, with their binarisation and preprocessing written on them."""

from pyrovae.data.images import BINARIZATIONS, ImageData, binarize, load
from pyrovae.data.preprocessing import PREPROCESSINGS

__all__ = ["BINARIZATIONS", "PREPROCESSINGS", "ImageData", "binarize", "load"]
