"""What a step's inputs say of the rows: which tokens count, which have a label, which begin.

Shapes: [batch, tokens].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxseek.ops.masks import read_tokens
from fxseek.passes.score_plan import Targets, TokenInputs
from fxseek.passes.structure import Place
from fxseek.run.env import Env

__all__ = ["beginnings", "first_tokens", "ids_of", "labels_of", "positions_at", "valid_tokens"]


def valid_tokens(
    inputs: TokenInputs, env: Env, padding_mask: Tensor | None, token_dim: int
) -> tuple[Tensor, bool]:
    """Which tokens are no padding, Bool, and whether a mask says so: the caller's, or the model's.

    `padding_mask`: Bool[batch or 1, tokens], without virtual tokens.
    """
    primary = env.read(inputs.primary)
    batch = 1 if inputs.batch_dim is None else primary.shape[inputs.batch_dim]
    tokens = primary.shape[token_dim]
    shape = (batch, tokens + inputs.virtual)
    valid = torch.ones(shape, dtype=torch.bool, device=primary.device)
    if padding_mask is None and inputs.mask is not None:
        padding_mask = read_tokens(env.read(inputs.mask))
    if padding_mask is None or padding_mask.shape[-1] != tokens:
        return valid, False
    own = padding_mask.expand(batch, -1)
    return torch.cat((valid[:, : inputs.virtual], own), dim=1), True


def labels_of(
    targets: Targets | None, env: Env, valid: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The labels, and which positions have one that counts; None without a token loss."""
    if targets is None:
        return None, None
    labels = supervised = None
    if targets.target is not None:
        labels = env.read(targets.target).reshape(valid.shape)
        supervised = labels != targets.ignore_index
    if targets.full[2] is not None:
        counts = env.read(targets.full[2]).reshape(valid.shape) != 0
        supervised = counts if supervised is None else supervised & counts
    return labels, supervised


def ids_of(inputs: TokenInputs, env: Env, valid: Tensor) -> Tensor | None:
    """A copy of the ids of the tokens, Long, -1 at virtual ones; None without ids.

    The caller may write another batch to the tensor that it gave.
    """
    if inputs.own_ids is None:
        return None
    given = env.read(inputs.own_ids)
    ids = torch.full(valid.shape, -1, dtype=torch.int64, device=valid.device)
    own = ids[:, inputs.virtual :]
    if given.numel() != own.numel():  # several for each token
        return None
    own.copy_(given.reshape(own.shape))
    return ids


def beginnings(inputs: TokenInputs, env: Env, valid: Tensor) -> Tensor | None:
    """Where positions don't go on by one, Bool: where documents of a packed row begin.

    None where the model is given no positions of tokens.
    """
    if inputs.positions is None:
        return None
    positions = env.read(inputs.positions)
    tokens = valid.shape[1] - inputs.virtual
    if positions.shape[-1] != tokens or positions.dim() not in (1, 2, 3):
        return None
    if positions.dim() == 3:  # of several, the first counts time, which images stop
        jumps = positions[0].diff(dim=-1) < 0
    else:
        jumps = positions.diff(dim=-1) != 1  # as transformers tells documents apart
    begins = torch.zeros_like(valid)
    begins[:, inputs.virtual + 1 :] = jumps
    return begins


def positions_at(place: Place, env: Env, valid: Tensor) -> Tensor:
    """A place in the rows as Long[batch, any]; negative ones count from the end."""
    at, (batch, tokens) = place.position, valid.shape
    found = torch.tensor([at], device=valid.device) if isinstance(at, int) else env.read(at)
    found = found.reshape(batch, 1) if place.each else found.reshape(1, -1).expand(batch, -1)
    return torch.where(found < 0, found + tokens, found)


def first_tokens(valid: Tensor, count: int, virtual: int) -> Tensor:
    """The first `count` valid positions behind virtual ones, Long[batch, count].

    A row that has fewer repeats its last.
    """
    own = valid.clone()
    own[:, :virtual] = False
    order = own.long().argsort(dim=-1, descending=True, stable=True)
    last = own.sum(-1, keepdim=True).clamp_min(1) - 1
    return order.gather(-1, torch.arange(count, device=own.device).minimum(last))
