"""Groups of rows put together are the rows in their order."""

from __future__ import annotations

import pyro.distributions as dist
import torch

from pyrovae.rowwise import RowWise


def test_rows_of_groups_come_back_in_their_order():
    loc = torch.arange(10.0).view(5, 2).double()
    rows = [torch.tensor([3, 0]), torch.tensor([1, 4, 2])]
    scale = torch.tensor([1e-3, 1e-6, 1e-6, 1e-3, 1e-6]).double().view(5, 1)
    whole = dist.Normal(loc, scale).to_event(1)
    parts = RowWise([dist.Normal(loc[some], scale[some]).to_event(1) for some in rows], rows)
    assert (parts.batch_shape, parts.event_shape) == (whole.batch_shape, whole.event_shape)
    value = loc + scale * torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(parts.log_prob(value), whole.log_prob(value))
    torch.manual_seed(0)
    draws = parts.sample(torch.Size([2000]))
    assert draws.shape == (2000, 5, 2)
    assert ((draws.mean(0) - loc).abs() < 4 * scale / 2000**0.5).all()
    torch.testing.assert_close(draws.std(0), scale.expand(5, 2), rtol=0.1, atol=0.0)
