"""Is this posterior any good? Importance-weight diagnostics, chain diagnostics, distances to a reference."""

from pyrovae.diagnose.anomaly import Detection, anomaly, detection
from pyrovae.diagnose.audit import Audit, audit
from pyrovae.diagnose.calibration import Calibration, calibrate
from pyrovae.diagnose.clustering import Clustering, clustering
from pyrovae.diagnose.collapse import ActiveUnits, Information, active_units, information, mutual_information
from pyrovae.diagnose.convergence import ess_bulk, ess_tail, split_rhat
from pyrovae.diagnose.distance import correlation_error, sd_ratio, sliced_w2, standardized_mean_error, w1
from pyrovae.diagnose.faithfulness import CycleResiduals, coverage, cycle_residuals, unfaithfulness
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
from pyrovae.diagnose.interpolation import InterpolationFailure, interpolation_failure
from pyrovae.diagnose.probe import Probe, probe
from pyrovae.diagnose.topology import Topology, topology
from pyrovae.diagnose.two_sample import c2st, mmd2
from pyrovae.diagnose.verdict import Report, report
from pyrovae.diagnose.weights import khat
from pyrovae.psis import pareto_khat, psis_smooth

__all__ = [
    "ActiveUnits", "Audit", "Calibration", "Clustering", "CycleResiduals", "Detection", "Gaps", "GroupInformation",
    "GroupProbes", "Information", "InterpolationFailure", "Interventions", "Probe", "Report", "Topology",
    "active_units", "anomaly", "audit", "c2st", "calibrate", "clustering", "correlation_error", "coverage",
    "cycle_residuals", "detection", "ess_bulk", "ess_tail", "gaps", "group_information", "image_slant", "image_width",
    "information", "interpolation_failure", "interventions", "khat", "mmd2", "mutual_information", "pareto_khat",
    "probe", "probe_groups", "psis_smooth", "report", "sd_ratio", "sliced_w2", "split_rhat", "standardized_mean_error",
    "stroke_width", "topology", "unfaithfulness", "w1",
]  # fmt: skip
