"""Arrange rows into padded micro-batches. B rows, T tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor


def arrange(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Return positions grouped so that rows x longest row <= `most_tokens`, at least one row to a group.

    Rows of like length go together, so that little is padding.
    """
    groups: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= most_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(rows: Sequence[Sequence[int]] | Sequence[Sequence[float]], dtype: torch.dtype = torch.long) -> Tensor:
    """Return rows of numbers as a (B, T) tensor, zeros to the right.

    Zeros to the right need no attention mask: a causal model never looks at them from a real token,
    and the losses count positions by length, never by token id.
    """
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return padded
