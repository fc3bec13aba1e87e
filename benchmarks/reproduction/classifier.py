"""A small net that names pictures: how labels of what a model makes are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrovae.runtime import seeded
from reproduction.experiment import Split

__all__ = ["classifier", "names"]


def classifier(split: Split) -> nn.Module:
    """Trained on all training images of the preset and their labels: the same for all arms."""
    x, y = split.train, split.train_labels
    if not isinstance(x, Tensor) or y is None:
        raise ValueError("a classifier needs images with labels")
    y = y.to(x.device)
    with seeded(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 128), nn.ReLU(), nn.Linear(128, int(y.max()) + 1))
        net.to(x.device)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(max(3, 500 * 100 // len(x))):
            for index in torch.randperm(len(x)).split(100):
                loss = nn.functional.cross_entropy(net(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.requires_grad_(False)


def names(net: nn.Module, images: Tensor) -> Tensor:
    """The class it gives each picture, `[B]`."""
    found: Tensor = net(images).argmax(-1)
    return found
