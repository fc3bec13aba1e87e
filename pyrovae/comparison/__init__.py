"""The main job behind `pyrovae compare`: one model under every guide, all of them held against long chains."""

from pyrovae.comparison.job import run
from pyrovae.comparison.outcome import Outcome, Settings

__all__ = ["Outcome", "Settings", "run"]
