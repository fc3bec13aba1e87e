"""The job behind `pyrovae certify`: every guide held against exact answers, or the best member of its family."""

from pyrovae.certification.outcome import Outcome, Settings
from pyrovae.certification.run import run

__all__ = ["Outcome", "Settings", "run"]
