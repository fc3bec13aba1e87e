"""Data sets: small images with their binarisation and preprocessing written on them, text, and points of the plane."""

from pyrovae.data.images import BINARIZATIONS, ImageData, binarize, load
from pyrovae.data.manifolds import manifold
from pyrovae.data.preprocessing import PREPROCESSINGS
from pyrovae.data.text import Sentences, TextData, Vocabulary, load_text
from pyrovae.data.toys import toy

__all__ = [
    "BINARIZATIONS", "PREPROCESSINGS", "ImageData", "Sentences", "TextData", "Vocabulary", "binarize", "load",
    "load_text", "manifold", "toy",
]  # fmt: skip
