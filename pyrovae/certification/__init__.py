"""The job behind `pyrovae certify`: every guide held against exact answers, or the best member of its family."""

from pyrovae.certification.run import Outcome, Settings, run

__all__ = ["Outcome", "Settings", "run"]
