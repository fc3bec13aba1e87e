"""Generative models: one PyroModule a file; its `forward` is the Pyro program."""

import sys

if __name__ == "models":  # imported from the repository root: be the same package, not a second copy
    import pyrovae.models

    for _name, _module in list(sys.modules.items()):
        if _name == "pyrovae.models" or _name.startswith("pyrovae.models."):
            sys.modules[_name.removeprefix("pyrovae.")] = _module
else:
    from pyrovae.models.chart_autoencoder import ChartAutoencoder
    from pyrovae.models.diffusion import Diffusion
    from pyrovae.models.energy_prior_vae import EnergyPriorVAE
    from pyrovae.models.hierarchical_energy_prior import HierarchicalEnergyPrior
    from pyrovae.models.hierarchical_vae import HierarchicalVAE
    from pyrovae.models.joint_energy_prior import JointEnergyPrior
    from pyrovae.models.ladder_vae import LadderVAE
    from pyrovae.models.language_model import LanguageModel, no_latents
    from pyrovae.models.piecewise_affine_vae import PiecewiseAffineVAE
    from pyrovae.models.pixel_model import PixelModel
    from pyrovae.models.pixelcnn_vae import LossyVAE, PixelCNNVAE
    from pyrovae.models.ppca import PPCA
    from pyrovae.models.text_vae import TextVAE
    from pyrovae.models.tilted import PriorChain
    from pyrovae.models.vae import VAE
    from pyrovae.models.vlac import VLAC

    # Models with latents for a guide to infer.
    REGISTRY = {
        "vae": VAE, "ppca": PPCA, "piecewise-affine": PiecewiseAffineVAE, "energy-prior": EnergyPriorVAE,
        "ladder": LadderVAE, "joint-energy": JointEnergyPrior, "hierarchical": HierarchicalVAE,
        "hierarchical-energy": HierarchicalEnergyPrior, "vlac": VLAC, "pixelcnn": PixelCNNVAE, "lossy": LossyVAE,
        "charts": ChartAutoencoder, "diffusion": Diffusion, "text": TextVAE,
    }  # fmt: skip

    __all__ = [
        "PPCA", "REGISTRY", "VAE", "VLAC", "ChartAutoencoder", "Diffusion", "EnergyPriorVAE", "HierarchicalEnergyPrior",
        "HierarchicalVAE", "JointEnergyPrior", "LadderVAE", "LanguageModel", "LossyVAE", "PiecewiseAffineVAE",
        "PixelCNNVAE", "PixelModel", "PriorChain", "TextVAE", "no_latents",
    ]  # fmt: skip
