"""The problems with exact answers, from the package: `pyrovae certify` uses the same ones."""

from pyrovae.certification.problems import SCHOOLS, bimodal, eight_schools, gamma_normal, ppca, subsampled

__all__ = ["SCHOOLS", "bimodal", "eight_schools", "gamma_normal", "ppca", "subsampled"]
