"""What graphs call for mixtures of experts: entries are a token's choices of an expert."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_entries", "count_keys"]


def count_keys(keys: Tensor, count: int) -> Tensor:
    """How many entries have each of the keys 0 … `count` - 1; others count nowhere.

    Shapes: keys, whole numbers from 0, [entries] → LongTensor[count].
    """
    keys = keys.long().clamp(max=count)
    return keys.new_zeros(count + 1).index_add(0, keys, torch.ones_like(keys))[:count]


def add_entries(length: int, rows: Tensor, entries: Tensor) -> Tensor:
    """The sum of each row's entries.

    Shapes: rows LongTensor[n], from 0 to `length` - 1; entries [n, ...] → [length, ...].
    """
    zeros = entries.new_zeros(length, *entries.shape[1:])
    return zeros.index_add(0, rows, entries)
