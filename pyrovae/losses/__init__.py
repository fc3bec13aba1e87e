"""Training objectives: Pyro ELBO objects for stock `SVI`, each with `per_datum`, in nats."""

from functools import partial

from pyrovae.losses.elbo import ELBO
from pyrovae.losses.iwae import IWAE
from pyrovae.losses.joint import ExpectedLogJoint
from pyrovae.losses.recursive import RecursiveELBO

REGISTRY = {
    "ELBO": ELBO,
    "ELBO(stl)": partial(ELBO, "stl"),
    "ELBO(stratified)": partial(ELBO, "stratified"),
    "IWAE-5": partial(IWAE, 5),
    "IWAE-5(reparam)": partial(IWAE, 5, "reparam"),
    "RecursiveELBO": RecursiveELBO,
    "E_q log p(x,z)": ExpectedLogJoint,
}

__all__ = ["ELBO", "IWAE", "REGISTRY", "ExpectedLogJoint", "RecursiveELBO"]
