"""Inference methods: one guide a file, each usable with stock `pyro.infer.SVI`."""

import sys

if __name__ == "guides":  # imported from the repository root: be the same package, not a second copy
    import pyrovae.guides

    for _name, _module in list(sys.modules.items()):
        if _name == "pyrovae.guides" or _name.startswith("pyrovae.guides."):
            sys.modules[_name.removeprefix("pyrovae.")] = _module
else:
    from pyrovae.guides.amortized import Amortized
    from pyrovae.guides.base import DensityGuide, FamilyGuide, Guide
    from pyrovae.guides.boosted_vi import BoostedVI
    from pyrovae.guides.charts import Charts
    from pyrovae.guides.classified import Classified
    from pyrovae.guides.dais import DAIS
    from pyrovae.guides.density_short_run import DensityShortRun
    from pyrovae.guides.escalating import Escalating
    from pyrovae.guides.exact import Exact
    from pyrovae.guides.forward_process import ForwardProcess
    from pyrovae.guides.hvae import HVAE
    from pyrovae.guides.laplace import Laplace
    from pyrovae.guides.local_svi import LocalSVI
    from pyrovae.guides.mixture import Mixture
    from pyrovae.guides.recursive_mixture import RecursiveMixture
    from pyrovae.guides.semi_amortized import SemiAmortized
    from pyrovae.guides.semi_dais import SemiDAIS
    from pyrovae.guides.short_run import ShortRun, text_steps
    from pyrovae.guides.step_size import tune_step_size

    # For any model with continuous latents ("exact": that has a `posterior`). Not here, as they are of one model alone:
    # Charts (of a ChartAutoencoder), Classified (of a VLAC), ForwardProcess (of a Diffusion).
    REGISTRY = {
        "amortized": Amortized,
        "boosted-vi": BoostedVI,
        "semi-amortized": SemiAmortized,
        "local-svi": LocalSVI,
        "laplace": Laplace,
        "mixture": Mixture,
        "recursive-mixture": RecursiveMixture,
        "short-run": ShortRun,
        "density-short-run": DensityShortRun,
        "dais": DAIS,
        "hvae": HVAE,
        "escalating": Escalating,
        "exact": Exact,
    }

    __all__ = [
        "DAIS", "HVAE", "REGISTRY", "Amortized", "BoostedVI", "Charts", "Classified", "DensityGuide", "DensityShortRun",
        "Escalating", "Exact", "FamilyGuide", "ForwardProcess", "Guide", "Laplace", "LocalSVI", "Mixture",
        "RecursiveMixture", "SemiAmortized", "SemiDAIS", "ShortRun", "text_steps", "tune_step_size",
    ]  # fmt: skip
