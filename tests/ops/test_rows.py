"""Selected rows put into full values."""

from __future__ import annotations

import torch

from fxseek.ops.rows import Rows, gather_rows, scatter_rows


def test_a_filled_row_stays_the_base_s():
    """It holds a position that is not selected, whose value another draw of dropout has made."""
    base, rows = torch.zeros(2, 5, 3), torch.ones(2, 3, 3, requires_grad=True)
    kept = torch.tensor([[0, 2, 4], [1, 3, 4]])
    filled = torch.tensor([[False, False, False], [False, True, True]])
    at = Rows(1, 0)
    found = scatter_rows(base, rows, kept, at, filled)
    assert found[..., 0].tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    (slope,) = torch.autograd.grad(found.sum(), rows)
    assert torch.equal(slope, (~filled)[..., None].expand_as(rows).float())
    assert torch.equal(gather_rows(found.detach(), kept, at)[1, 1:], base[1, :2])
