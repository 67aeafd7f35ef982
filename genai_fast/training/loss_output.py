"""What a loss function returns: a 0-d tensor, or several of them as a tuple, NamedTuple or dict."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genai_fast.errors import UsageError

_FORMS = "a 0-d loss tensor, a tuple or NamedTuple of 0-d tensors that begins with it, or a dict with 'loss'"


def entries(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a result, in its order.

    Raises UsageError: it has another form, or something in it is no 0-d tensor.
    """
    if isinstance(result, torch.Tensor):
        named = {"the loss": result}
    elif isinstance(result, Mapping):
        named = {repr(key): x for key, x in result.items()}
    elif isinstance(result, (tuple, list)):
        names = getattr(result, "_fields", range(len(result)))
        named = {f"entry {name}": x for name, x in zip(names, result, strict=True)}
    else:
        named = {}
    if not named:
        raise UsageError(f"Step: loss function: expected it to return {_FORMS}, got {type(result).__name__}")
    for name, x in named.items():
        if not isinstance(x, torch.Tensor) or x.dim():
            got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise UsageError(
                f"Step: loss function: expected it to return {_FORMS}, got {name}: {got}; remedy: a function that"
                f" returns the mean loss, such as lambda x, y: torch.nn.functional.mse_loss(model(x), y)"
            )
    return tuple(named.values())


def minimised(result: Any) -> torch.Tensor:
    """The entry that is minimised: `loss` where there is such a name, else the first.

    Raises UsageError: as `entries`; and of a dict without 'loss'.
    """
    first = entries(result)[0]
    if isinstance(result, Mapping):
        if "loss" not in result:
            raise UsageError(
                f"Step: loss function: expected it to return {_FORMS}, got a dict with {', '.join(map(repr, result))}"
            )
        return result["loss"]
    return getattr(result, "loss", first) if hasattr(result, "_fields") else first


def place(result: Any) -> int:
    """Where among its entries the minimised one is."""
    loss = minimised(result)
    return next(k for k, x in enumerate(entries(result)) if x is loss)


def differentiable(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself. Raises UsageError: it is no 0-d tensor, or no gradient goes through it."""
    entries(loss if isinstance(loss, torch.Tensor) else (loss,))
    if not loss.requires_grad:
        raise UsageError(
            "Step: loss: expected one that depends on the parameters, got one without gradient; remedy: no detach(),"
            " item() or no_grad() on its way"
        )
    return loss


def like(result: Any, values: Sequence[torch.Tensor]) -> Any:
    """`values` in the form of `result`."""
    if isinstance(result, torch.Tensor):
        return values[0]
    if isinstance(result, Mapping):
        return dict(zip(result, values, strict=True))
    return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
