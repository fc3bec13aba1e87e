"""Is this posterior any good? Importance-weight diagnostics, chain diagnostics, distances to a reference."""

from pyrovae.diagnose.calibration import Calibration, calibrate
from pyrovae.diagnose.clustering import Clustering, clustering
from pyrovae.diagnose.collapse import Information, information
from pyrovae.diagnose.convergence import ess_bulk, ess_tail, split_rhat
from pyrovae.diagnose.distance import correlation_error, sd_ratio, sliced_w2, standardized_mean_error, w1
from pyrovae.diagnose.gaps import Gaps, gaps
from pyrovae.diagnose.groups import Interventions, interventions
from pyrovae.diagnose.probe import Probe, probe
from pyrovae.diagnose.two_sample import c2st, mmd2
from pyrovae.diagnose.verdict import Report, report
from pyrovae.diagnose.weights import khat
from pyrovae.psis import pareto_khat, psis_smooth

__all__ = [
    "Calibration", "Clustering", "Gaps", "Information", "Interventions", "Probe", "Report", "c2st", "calibrate",
    "clustering", "correlation_error", "ess_bulk", "ess_tail", "gaps", "information", "interventions", "khat", "mmd2",
    "pareto_khat", "probe", "psis_smooth", "report", "sd_ratio", "sliced_w2", "split_rhat", "standardized_mean_error",
    "w1",
]  # fmt: skip
