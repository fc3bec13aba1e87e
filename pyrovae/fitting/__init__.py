"""The job behind `pyrovae fit`: one model, one guide, one objective, trained, evaluated and shown."""

from pyrovae.fitting.job import run
from pyrovae.fitting.outcome import Outcome
from pyrovae.fitting.saved import Saved, load
from pyrovae.fitting.settings import Settings

__all__ = ["Outcome", "Saved", "Settings", "load", "run"]
