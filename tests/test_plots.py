"""Sheets of pictures: which pixels stand where, and what is written beside them."""

from __future__ import annotations

import pytest
import torch

from pyrovae import diagnose, generate, guides, plots
from pyrovae.certification.problems import ppca
from pyrovae.errors import DataError

INK = torch.rand(7, 4, 6, generator=torch.Generator().manual_seed(0))


def parts(figure, height=4, width=6):
    """The sheet cut into pictures `[rows, columns, H, W, 3]` (gaps of one pixel), and its labels and titles."""
    (axis,) = figure.axes
    (shown,) = axis.images
    sheet = torch.as_tensor(shown.get_array())
    sheet = torch.nn.functional.pad(sheet, (0, 0, 0, 1, 0, 1), value=2.0)  # the last gaps, never drawn
    rows, columns = sheet.shape[0] // (height + 1), sheet.shape[1] // (width + 1)
    cells = sheet.reshape(rows, height + 1, columns, width + 1, 3)
    assert (cells[:, -1] >= 1).all()
    assert (cells[:, :, :, -1] >= 1).all()
    titles = [text.get_text() for text in axis.get_xticklabels()]
    labels = [text.get_text() for text in axis.get_yticklabels()]
    return cells[:, :height, :, :width].transpose(1, 2), labels, titles


def grey(x):
    return (1 - x).unsqueeze(-1).expand(*x.shape, 3)


def test_reconstructions_stand_below_their_data_in_strips():
    cells, labels, titles = parts(plots.reconstructions(INK, INK.flip(0), columns=4))
    assert cells.shape == (4, 4, 4, 6, 3)
    torch.testing.assert_close(cells[0], grey(INK[:4]))
    torch.testing.assert_close(cells[1], grey(INK.flip(0)[:4]))
    torch.testing.assert_close(cells[2, :3], grey(INK[4:]))
    torch.testing.assert_close(cells[3, :3], grey(INK.flip(0)[4:]))
    assert (cells[2:, 3] == 1).all()
    assert labels == ["data", "reconstruction"] * 2
    assert titles == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layout_of_grey_shows_the_same(dtype):
    x = INK.to(dtype)
    expected = parts(plots.samples(x))[0]
    for same, shape in ((x.unsqueeze(1), None), (x.flatten(1), (4, 6)), (x.flatten(1), (1, 4, 6))):
        assert torch.equal(parts(plots.samples(same, image_shape=shape))[0], expected)
    torch.testing.assert_close(parts(plots.samples(2 * x - 1, signed=True))[0], expected)


def test_samples_fill_a_square():
    cells, labels, _ = parts(plots.samples(INK))
    assert cells.shape[:2] == (3, 3)  # 7 pictures
    torch.testing.assert_close(cells.flatten(0, 1)[:7], grey(INK))
    assert (cells.flatten(0, 1)[7:] == 1).all()
    assert labels == []
    assert parts(plots.samples(INK, columns=7))[0].shape[:2] == (1, 7)
    assert parts(plots.samples(INK[:1]))[0].shape[:2] == (1, 1)


def test_colours_are_as_they_are():
    x = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    cells = parts(plots.samples(x, columns=2))[0]
    torch.testing.assert_close(cells[0], x.movedim(1, -1))
    cells = parts(plots.reconstructions(x.flatten(1), x.flatten(1), image_shape=(3, 4, 6)))[0]
    torch.testing.assert_close(cells[1], x.movedim(1, -1))


def test_traversals_of_a_model():
    model, x = ppca(rows=3, latent=2, pixels=24, noise=0.5)
    guide = guides.LocalSVI(model, "full-rank")
    values = [-1.0, 0.0, 0.25]
    found = {f"z[{i}]": generate.traverse(model, guide, x, i, values) for i in range(2)}
    assert found["z[0]"].shape == (3, 3, 24)
    squashed = {name: torch.sigmoid(value) for name, value in found.items()}
    cells, labels, titles = parts(plots.traversals(squashed, values, datum=1, image_shape=(4, 6)))
    assert (labels, titles) == (["z[0]", "z[1]"], ["-1", "0", "0.25"])
    expected = torch.stack([value[:, 1].reshape(3, 4, 6) for value in squashed.values()]).float()
    torch.testing.assert_close(cells, grey(expected))


def test_interpolations_go_along_rows():
    path = torch.stack([torch.lerp(INK[:2], INK[2:4], share) for share in (0.0, 0.5, 1.0)])
    cells = parts(plots.interpolations(path))[0]
    assert cells.shape[:2] == (2, 3)
    torch.testing.assert_close(cells[1, 0], grey(INK[1]))
    torch.testing.assert_close(cells[1, 2], grey(INK[3]))


def test_imputations_mark_what_is_hidden():
    mask = torch.ones_like(INK, dtype=torch.bool)
    mask[:, 2:] = False
    sd = torch.where(mask, torch.zeros_like(INK), INK / 2)
    found = generate.Imputation(INK.flip(0), sd, None)
    hidden = torch.where(mask, INK, torch.full_like(INK, torch.nan))
    cells, labels, _ = parts(plots.imputations(hidden, mask, found, truth=INK))
    assert [label.split(",")[0] for label in labels] == ["seen", "imputed", "sd", "truth"]
    assert labels[2] == f"sd, 0 to {float(sd.max()):.2g}"
    torch.testing.assert_close(cells[0, :, :2], grey(INK)[:, :2])
    marked = cells[0, :, 2:].reshape(-1, 3)
    assert (marked == marked[0]).all()
    assert len(set(marked[0].tolist())) == 3  # no grey
    torch.testing.assert_close(cells[1], grey(INK.flip(0)))
    torch.testing.assert_close(cells[2], grey(sd / sd.max()))
    torch.testing.assert_close(cells[3], grey(INK))
    everything = generate.Imputation(INK, torch.zeros_like(INK), None)
    cells, labels, _ = parts(plots.imputations(INK, torch.ones_like(mask), everything))
    torch.testing.assert_close(cells[0], grey(INK))
    assert (cells[2] == 1).all()
    assert len(labels) == 3


def test_colour_pixels_are_hidden_whole():
    x = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 1, 0, 0] = False
    cells = parts(plots.imputations(x, mask, generate.Imputation(x, (~mask).float(), None)))[0]
    assert not torch.allclose(cells[0, 0, 0, 0], x[0, :, 0, 0])
    torch.testing.assert_close(cells[0, 0, 1:], x[0].movedim(0, -1)[1:])
    torch.testing.assert_close(cells[2, 0, 0, 0], torch.full((3,), 0.0))
    torch.testing.assert_close(cells[2, 0, 1:], torch.ones(3, 6, 3))


def test_clusters_have_sizes_and_classes():
    found = diagnose.clustering(torch.tensor([0, 0, 0, 2]), torch.tensor([7, 7, 5, 5]), num_clusters=3)
    rows = {0: INK[:3], 1: INK[:0], 2: INK[3:4]}
    cells, labels, _ = parts(plots.clusters(rows, found))
    assert labels == ["cluster 0\n3 data, mostly 7", "cluster 1\nempty", "cluster 2\n1 data, mostly 5"]
    torch.testing.assert_close(cells[0], grey(INK[:3]))
    torch.testing.assert_close(cells[2, 0], grey(INK[3]))
    assert (cells[1] == 1).all()
    assert (cells[2, 1:] == 1).all()
    assert parts(plots.clusters(rows))[1] == ["cluster 0", "cluster 1", "cluster 2"]
    with pytest.raises(DataError, match="clusters 0 to 2"):
        plots.clusters({3: INK}, found)


def test_rows_of_any_scale_are_clipped():
    cells, labels, _ = parts(plots.images({"a": 5 * INK.flatten(1), "b": INK[:2].flatten(1)}, (4, 6)))
    assert labels == ["a", "b"]
    torch.testing.assert_close(cells[0], grey((5 * INK).clamp(0, 1)))
    assert (cells[1, 2:] == 1).all()


def test_pictures_stay_sharp_and_inside_their_figure():
    """A picture's pixel is a whole number of the screen's; labels lie inside the figure."""
    figure = plots.reconstructions(INK, INK)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.axes[0].get_window_extent()
    rows, columns = figure.axes[0].images[0].get_array().shape[:2]
    assert box.width / columns == pytest.approx(round(box.width / columns), abs=1e-3)
    assert box.height / rows == pytest.approx(round(box.height / rows), abs=1e-3)
    for text in figure.axes[0].get_yticklabels():
        assert text.get_window_extent().x0 > 0
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plots.samples(INK.flatten(1)), "image_shape"),
        (lambda: plots.samples(INK.flatten(1), image_shape=(5, 5)), "do not have the 25 values"),
        (lambda: plots.samples(torch.zeros(2, 2, 4, 4)), r"\[3, H, W\], got \[2, 4, 4\]"),
        (lambda: plots.samples(255 * INK), "rescale"),
        (lambda: plots.samples(2 * INK.round() - 1), "pass signed=True"),
        (lambda: plots.samples(INK / 0), "NaN|rescale"),
        (lambda: plots.samples(INK * torch.nan), "NaN"),
        (lambda: plots.samples(INK[:0]), "no picture"),
        (lambda: plots.images({}), "no picture"),
        (lambda: plots.images({"a": INK, "b": INK[:, :2]}), "one size"),
        (lambda: plots.reconstructions(INK, INK[:3]), "shape of the data"),
        (lambda: plots.traversals({"z": INK[:, 0]}), "generate.traverse"),
        (lambda: plots.traversals({"z": INK.unsqueeze(1)}, datum=1), "datum 1"),
        (lambda: plots.traversals({"z": INK.unsqueeze(1)}, [0.0]), "7 pictures, but there are 1 values"),
        (lambda: plots.interpolations(INK[0]), "generate.interpolate"),
        (lambda: plots.imputations(INK, INK, generate.Imputation(INK, INK, None)), "mask must be bool"),
        (lambda: plots.imputations(INK, INK[:2] > 0, generate.Imputation(INK, INK, None)), "mask must have the shape"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(DataError, match=words):
        call()


def test_columns_must_be_positive():
    for call in (lambda: plots.samples(INK, columns=0), lambda: plots.reconstructions(INK, INK, columns=0)):
        with pytest.raises(ValueError, match="columns"):
            call()
