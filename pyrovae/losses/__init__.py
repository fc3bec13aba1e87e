"""Training objectives: Pyro ELBO objects for stock `SVI`, each with `per_datum`, in nats."""

from pyrovae.losses.elbo import ELBO
from pyrovae.losses.iwae import IWAE
from pyrovae.losses.joint import ExpectedLogJoint

REGISTRY = {"elbo": ELBO, "iwae": IWAE, "expected-log-joint": ExpectedLogJoint}

__all__ = ["ELBO", "IWAE", "REGISTRY", "ExpectedLogJoint"]
