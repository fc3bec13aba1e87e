"""Training objectives: Pyro ELBO objects for stock `SVI`, each with `per_datum`, in nats.

Those with a term of the whole batch have `penalty`, too.
"""

from functools import partial

from pyrovae.losses.charts import ChartLoss
from pyrovae.losses.default import default_loss
from pyrovae.losses.diffusion import DiffusionELBO, SimpleDiffusionLoss
from pyrovae.losses.elbo import ELBO
from pyrovae.losses.energy import EnergyELBO
from pyrovae.losses.free_bits import FreeBits
from pyrovae.losses.info import InfoVAE
from pyrovae.losses.iwae import IWAE
from pyrovae.losses.joint import ExpectedLogJoint
from pyrovae.losses.mutual_divergence import MutualPosteriorDivergence
from pyrovae.losses.recursive import RecursiveELBO

REGISTRY = {
    "ELBO": ELBO,
    "ELBO(stl)": partial(ELBO, "stl"),
    "ELBO(stratified)": partial(ELBO, "stratified"),
    "IWAE-5": partial(IWAE, 5),
    "IWAE-5(reparam)": partial(IWAE, 5, "reparam"),
    "RecursiveELBO": RecursiveELBO,
    "E_q log p(x,z)": ExpectedLogJoint,
    "InfoVAE": InfoVAE,
    "InfoVAE(stein)": partial(InfoVAE, divergence="stein", lambda_=10.0),
    "MAE": MutualPosteriorDivergence,
    "free bits": FreeBits,
    "soft free bits": partial(FreeBits, 5.0, soft=True),
}

__all__ = [
    "ELBO", "IWAE", "REGISTRY", "ChartLoss", "DiffusionELBO", "EnergyELBO", "ExpectedLogJoint", "FreeBits", "InfoVAE",
    "MutualPosteriorDivergence", "RecursiveELBO", "SimpleDiffusionLoss", "default_loss",
]  # fmt: skip
