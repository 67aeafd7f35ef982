"""Weights of a whole model as one list, narrowed for reading, and ids that are looked at."""

from collections.abc import Sequence

import torch

MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def narrowed(
    weights: Sequence[torch.Tensor], where: Sequence[int], dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The list with its matrices, which are at `where`, of `dtype` and the rest of `wide`, contiguous, and a factor for
    each row of int8 matrices.

    What has its dtype already is not copied; a last matrix that is the first one (a tied head) stays so.
    """
    matrices = set(where)
    found = [w if k in matrices else w.to(wide).contiguous() for k, w in enumerate(weights)]
    scales = []
    for k in where:
        if k == where[-1] and weights[k] is weights[where[0]]:
            found[k] = found[where[0]]
            scales += scales[:1]
        elif dtype is torch.int8:
            row = weights[k].to(wide)
            scale = row.abs().amax(1).div_(127.0)
            # A row of zeros stays one.
            found[k] = (row / torch.where(scale == 0.0, 1.0, scale)[:, None]).round_().to(torch.int8)
            scales.append(scale)
        else:
            found[k] = weights[k].to(dtype).contiguous()
    return found, scales


def span(ids: torch.Tensor) -> tuple[int, int]:
    """The least and the largest."""
    if ids.numel() == 1:
        return (one := ids.item()), one
    least, most = torch.aminmax(ids)
    return least.item(), most.item()
