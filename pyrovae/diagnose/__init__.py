"""Is this posterior any good? Importance-weight diagnostics, chain diagnostics, distances to a reference."""

from pyrovae.diagnose.anomaly import Detection, anomaly, detection
from pyrovae.diagnose.calibration import Calibration, calibrate
from pyrovae.diagnose.clustering import Clustering, clustering
from pyrovae.diagnose.collapse import Information, information, mutual_information
from pyrovae.diagnose.convergence import ess_bulk, ess_tail, split_rhat
from pyrovae.diagnose.distance import correlation_error, sd_ratio, sliced_w2, standardized_mean_error, w1
from pyrovae.diagnose.gaps import Gaps, gaps
from pyrovae.diagnose.group_information import GroupInformation, group_information
from pyrovae.diagnose.groups import (
    GroupProbes,
    Interventions,
    image_slant,
    image_width,
    interventions,
    probe_groups,
    stroke_width,
)
from pyrovae.diagnose.probe import Probe, probe
from pyrovae.diagnose.two_sample import c2st, mmd2
from pyrovae.diagnose.verdict import Report, report
from pyrovae.diagnose.weights import khat
from pyrovae.psis import pareto_khat, psis_smooth

__all__ = [
    "Calibration", "Clustering", "Detection", "Gaps", "GroupInformation", "GroupProbes", "Information",
    "Interventions", "Probe", "Report", "anomaly", "c2st", "calibrate", "clustering", "correlation_error", "detection",
    "ess_bulk", "ess_tail", "gaps", "group_information", "image_slant", "image_width", "information", "interventions",
    "khat", "mmd2", "mutual_information", "pareto_khat", "probe", "probe_groups", "psis_smooth", "report", "sd_ratio",
    "sliced_w2", "split_rhat", "standardized_mean_error", "stroke_width", "w1",
]  # fmt: skip
