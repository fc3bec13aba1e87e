"""Data sets: small images in [0, 1], stored flat, with their binarisation written on them."""

from pyrovae.data.images import BINARIZATIONS, ImageData, binarize, load

__all__ = ["BINARIZATIONS", "ImageData", "binarize", "load"]
