r"""Sheets of pictures: data and reconstructions, samples, traversals, interpolations, imputations, clusters.

An event is grey, `[H, W]` or `[1, H, W]`, or colour, `[3, H, W]`; of flat ones, `[X]`, `image_shape=` says which.
Values lie in [0, 1] or, with `signed=True`, in [-1, 1] (shown as (v + 1) / 2). Grey pictures are ink on paper: 0 is
white and 1 is black. What passes the ends, as means of Gaussians do a little, is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae.errors import DataError
from pyrovae.plots.base import COLORS, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.diagnose.clustering import Clustering
    from pyrovae.generate import Imputation

__all__ = ["clusters", "images", "imputations", "interpolations", "reconstructions", "samples", "traversals"]

Shape = tuple[int, ...] | None

_DPI = 110  # of `blank`
_CELL = 68  # screen pixels of a picture and the gap behind it, unless it has more
_HIDDEN = COLORS[4]  # no grey picture has it
_BEYOND = 0.1  # share of values half a range outside the range: that is another unit, not a mean that overshoots


def images(rows: Mapping[str, Tensor], image_shape: Shape = None, *, signed: bool = False) -> Figure:
    """Rows of pictures with labels: name -> `[K, *event]`, of any scale (clipped); rows may differ in length."""
    return _grid([_pixels(value, image_shape, signed, any_scale=True) for value in rows.values()], list(rows))


def reconstructions(
    x: Tensor, mean: Tensor, *, image_shape: Shape = None, signed: bool = False, columns: int = 16
) -> Figure:
    """Every datum over its reconstruction, in strips of at most `columns` data.

    Args:
        x: data `[B, *event]`.
        mean: E[x | z] at a draw or a mean of each posterior, the same shape.
    """
    _require_same(x, "mean", mean)
    data, made = (_pixels(value, image_shape, signed).split(_at_least_one(columns)) for value in (x, mean))
    strips = [strip for pair in zip(data, made, strict=True) for strip in pair]
    return _grid(strips, ["data", "reconstruction"] * len(data))


def samples(
    images: Tensor, *, image_shape: Shape = None, signed: bool = False, columns: int | None = None
) -> Figure:  # fmt: skip
    """A sheet of pictures `[K, *event]`, as square as can be unless `columns` says otherwise."""
    pixels = _pixels(images, image_shape, signed)
    square = max(1, round(len(pixels) ** 0.5))
    return _grid(pixels.split(square if columns is None else _at_least_one(columns)))


def traversals(
    images: Mapping[str, Tensor], values: Sequence[float] | None = None, *, datum: int = 0, image_shape: Shape = None,
    signed: bool = False,
) -> Figure:  # fmt: skip
    """One latent (or group of them) a row, one of its values a column.

    Args:
        images: label -> what `generate.traverse` gives for that latent, `[V, B, *event]`.
        values: the V values, as titles of the columns.
        datum: which of the B data keeps its other latents.
    """
    rows = []
    for name, found in images.items():
        if found.dim() < 3 or not -found.shape[1] <= datum < found.shape[1]:
            raise DataError(
                f"a traversal is [V, B, *event], as generate.traverse gives it, with datum {datum} among the B, but "
                f"{name!r} has shape {list(found.shape)}"
            )
        if values is not None and len(values) != len(found):
            raise DataError(f"the traversal of {name!r} has {len(found)} pictures, but there are {len(values)} values")
        rows.append(_pixels(found[:, datum], image_shape, signed))
    return _grid(rows, list(images), [] if values is None else [f"{value:g}" for value in values])


def interpolations(images: Tensor, *, image_shape: Shape = None, signed: bool = False) -> Figure:
    """One pair of data a row, from the first to the second: `[steps, B, *event]` of `generate.interpolate`."""
    if images.dim() < 3:
        raise DataError(
            f"an interpolation is [steps, B, *event], as generate.interpolate gives it, got {list(images.shape)}"
        )
    return _grid([_pixels(path, image_shape, signed) for path in images.unbind(1)])


def imputations(
    x: Tensor, mask: Tensor, imputed: Imputation, *, truth: Tensor | None = None, image_shape: Shape = None,
    signed: bool = False,
) -> Figure:  # fmt: skip
    """What is seen (what is hidden in colour), what `generate.impute` makes of it, its sd, and the truth if given.

    Args:
        x: data `[B, *event]`; hidden values may be anything, NaN included.
        mask: bool, the same shape; True where x is seen. A pixel counts as hidden where one of its channels is.
        imputed: its sd, a mean over channels, is white at 0 and black at the largest, which the label gives.
        truth: the same shape.
    """
    _require_same(x, "mask", mask)
    _require_same(x, "imputed", imputed.mean)
    if mask.dtype != torch.bool:
        raise DataError(f"mask must be bool, True where x is seen, got {mask.dtype}")
    seen = _pixels(torch.where(mask, x, torch.zeros_like(x)), image_shape, signed)
    colour = torch.tensor([int(_HIDDEN[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    whole = _planes(mask, image_shape).all(1).cpu().unsqueeze(-1)
    sd = _planes(imputed.sd, image_shape).mean(1)
    largest = float(sd.max())
    rows = {
        "seen": torch.where(whole, seen, colour),
        "imputed": _pixels(imputed.mean, image_shape, signed),
        f"sd, 0 to {largest:.2g}": _pixels(sd / (largest or 1.0), None, False),
    }
    if truth is not None:
        _require_same(x, "truth", truth)
        rows["truth"] = _pixels(truth, image_shape, signed)
    return _grid(list(rows.values()), list(rows))


def clusters(
    rows: Mapping[int, Tensor], found: Clustering | None = None, *, image_shape: Shape = None, signed: bool = False
) -> Figure:
    """One cluster a row, with its number and, from `diagnose.clustering`, its size and the class of most of its data.

    Args:
        rows: cluster -> pictures `[K, *event]`: some of its data, or what the model makes of it (`VLAC.generate`).
        found: clusters against classes.
    """
    labels = []
    for cluster in rows:
        label = f"cluster {cluster}"
        if found is not None:
            if not 0 <= cluster < len(found.table):
                raise DataError(f"there are clusters 0 to {len(found.table) - 1}, but a row of cluster {cluster}")
            size = int(found.table[cluster].sum())
            label += f"\n{size} data, mostly {int(found.names[cluster])}" if size else "\nempty"
        labels.append(label)
    return _grid([_pixels(value, image_shape, signed) for value in rows.values()], labels)


def _grid(rows: Sequence[Tensor], labels: Sequence[str] = (), titles: Sequence[str] = ()) -> Figure:
    """Rows of pictures `[K, H, W, 3]` on one white sheet; labels stand before rows, titles over columns."""
    count = max((len(row) for row in rows), default=0)
    if not count:
        raise DataError("there is no picture to show")
    shapes = {tuple(row.shape[1:3]) for row in rows}
    if len(shapes) > 1:
        raise DataError(f"one sheet takes pictures of one size, got {sorted(shapes)}")
    height, width = shapes.pop()
    down, across = height + max(1, height // 14), width + max(1, width // 14)
    sheet = torch.ones(len(rows) * down, count * across, 3)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet[i * down : i * down + height, j * across : j * across + width] = picture
    sheet = sheet[: height - down, : width - across]
    # Whole screen pixels for each of a picture's: a place of its own, which no layout moves.
    inches = max(1, round(_CELL / max(down, across))) / _DPI
    left = 0.15 + 0.085 * max((len(line) for label in labels for line in label.split("\n")), default=0)
    wide, high, above = inches * sheet.shape[1], inches * sheet.shape[0], 0.3 if titles else 0.05
    figure = blank(left + wide + 0.1, high + above + 0.05)
    figure.set_layout_engine("none")
    whole = figure.get_size_inches()
    axis = figure.add_axes((left / whole[0], 0.05 / whole[1], wide / whole[0], high / whole[1]))
    axis.imshow(sheet.numpy(), interpolation="nearest")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=9, top=False, labeltop=True, labelbottom=False)
    axis.set_yticks([i * down + (height - 1) / 2 for i in range(len(labels))], labels)
    axis.set_xticks([j * across + (width - 1) / 2 for j in range(len(titles))], titles)
    return figure


def _pixels(images: Tensor, image_shape: Shape, signed: bool, *, any_scale: bool = False) -> Tensor:
    """Pictures `[K, *event]` as red, green and blue in [0, 1], `[K, H, W, 3]`, on the CPU."""
    planes = _planes(images.detach(), image_shape).cpu().float()
    if planes.isnan().any():
        raise DataError("pictures with NaN cannot be shown")
    if signed:
        planes = (planes + 1) / 2
    if len(planes) and not any_scale and float(((planes - 0.5).abs() > 1).float().mean()) > _BEYOND:
        raise DataError(
            f"pictures take values in {'[-1, 1]' if signed else '[0, 1]'}, got {float(images.min()):.3g} to "
            f"{float(images.max()):.3g}: rescale them, or {'leave out' if signed else 'pass'} signed=True"
        )
    planes = planes.clamp(0, 1)
    return (planes if planes.shape[1] == 3 else (1 - planes).expand(-1, 3, -1, -1)).movedim(1, -1)


def _planes(images: Tensor, image_shape: Shape) -> Tensor:
    """`[K, *event]` with channels in front, `[K, 1 or 3, H, W]`."""
    event = tuple(images.shape[1:]) if image_shape is None else tuple(image_shape)
    if len(event) not in (2, 3) or (len(event) == 3 and event[0] not in (1, 3)):
        raise DataError(
            f"a picture is [H, W], [1, H, W] or [3, H, W], got {list(event)}: flat ones need image_shape=(H, W)"
        )
    size = torch.Size(event).numel()
    if images[:1].numel() != size * min(1, len(images)):
        raise DataError(f"pictures of shape {list(images.shape[1:])} do not have the {size} values of {list(event)}")
    return images.reshape(len(images), 1 if len(event) == 2 else event[0], *event[-2:])


def _require_same(x: Tensor, name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise DataError(f"{name} must have the shape of the data, {list(x.shape)}, got {list(other.shape)}")


def _at_least_one(columns: int) -> int:
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    return columns
