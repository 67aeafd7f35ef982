"""Losses as modules: torch's constructors and results, with fused calls."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.fusion.classes import replaced_forward
from genai_fast.fusion.functions import cross_entropy
from genai_fast.precision import autocast_dtype, without_autocast


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss: same constructor and results; one fused pass over the logits each way.

    PyTorch's own serves targets that are probabilities, targets other than int64, sizes at which it is as fast, tensor
    subclasses, and dtypes without a kernel. Of [N, C, d1, ...] the classes come second, as there.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as for nn.CrossEntropyLoss.
        z_loss, softcap, return_z_loss, return_token_accuracy, return_predicted_tokens: as of `ops.cross_entropy`,
            which then serves all targets of int64.

    Returns: the loss; dtype of the logits, float32 under autocast. An `ops.CrossEntropyOutput` if more is asked for.
    """

    more: dict[str, Any] = {}  # noqa: RUF012  (of those that are given a class, not made)

    def __init__(
        self, weight: torch.Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
        reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, *, z_loss: float = 0.0,
        softcap: float | None = None, return_z_loss: bool = False, return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        given = dict(
            z_loss=z_loss, softcap=softcap, return_z_loss=return_z_loss, return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
        )  # fmt: skip
        self.more = {name: value for name, value in given.items() if value}

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        if (now := replaced_forward(self)) is not None:
            return now(self, input, target)
        if self.more:
            found = ops.cross_entropy(
                input.movedim(1, -1) if input.dim() > 2 else input, target, class_weight=self.weight,
                ignore_index=self.ignore_index, reduction=self.reduction, label_smoothing=self.label_smoothing,
                **self.more,
            )  # fmt: skip
            if autocast_dtype(input.device.type) is not None:
                return found
            if isinstance(found, torch.Tensor):
                return found.to(input.dtype)
            return found._replace(loss=found.loss.to(input.dtype))
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


class BCELoss(nn.BCELoss):
    """nn.BCELoss: its constructor and results, logarithms clamped at -100; also under autocast, which PyTorch refuses.

    Where a sigmoid before it saturates (beyond 17 in float32), the loss of a wrong target is 100 and its gradient 0, as
    PyTorch's; of logits nn.BCEWithLogitsLoss is exact, and so is `ops.vae_loss`, which is one pass each way too.

    Args:
        weight, size_average, reduce, reduction: as for nn.BCELoss.

    Returns: the loss; dtype of the input, float32 at least under autocast.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if not isinstance(input, torch.Tensor) or autocast_dtype(input.device.type) is None:
            return super().forward(input, target)
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(dtype)
        with without_autocast(input.device.type):
            return F.binary_cross_entropy(input.to(dtype), target.to(dtype), weight, reduction=self.reduction)


class LinearCrossEntropyLoss(nn.Linear):
    """A classifier's last layer and its cross-entropy, by chunks of rows: the logits are never whole in memory.

    `loss = head(x, target)`; `head.logits(x)` is what nn.Linear gives, for generation. Keys as of nn.Linear.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear; the classes are out_features.
        ignore_index, label_smoothing, z_loss, reduction, chunk, softcap, token_scaling, return_z_loss,
            return_token_accuracy, return_predicted_tokens: as of `ops.linear_cross_entropy`.
        class_weight: [out_features] or None: its class weights, in a buffer that is not saved.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
        chunk: int | None = None, class_weight: torch.Tensor | None = None, softcap: float | None = None,
        token_scaling: bool = False, return_z_loss: bool = False, return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.settings: dict[str, Any] = dict(
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction, chunk=chunk,
            softcap=softcap, token_scaling=token_scaling, return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy, return_predicted_tokens=return_predicted_tokens,
        )  # fmt: skip
        self.class_weight: torch.Tensor | None
        self.register_buffer(
            "class_weight", class_weight if class_weight is None else class_weight.to(device), persistent=False
        )

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:  # type: ignore[override]
        """The loss of x [..., in_features] and target [...], int64."""
        return ops.linear_cross_entropy(
            input, self.weight, target, self.bias, class_weight=self.class_weight, **self.settings
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out_features], capped if there is a soft cap."""
        logits, cap = F.linear(x, self.weight, self.bias), self.settings["softcap"]
        return logits if cap is None else cap * torch.tanh(logits / cap)


class VAELoss(nn.Module):
    """-log p(target | recon) + beta KL, and both terms: `ops.vae_loss` with its settings as a module.

    Args:
        likelihood, beta, reduction, from_logits: as of `ops.vae_loss`. `beta` may be assigned between steps.
    """

    def __init__(
        self, likelihood: str = "bernoulli", beta: float = 1.0, reduction: str = "mean", from_logits: bool = True
    ) -> None:
        super().__init__()
        self.likelihood, self.beta, self.reduction, self.from_logits = likelihood, beta, reduction, from_logits

    def forward(self, recon: torch.Tensor, target: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor) -> ops.VAELoss:
        """loss, reconstruction and kl of recon, target [B, ...] and mu, logvar [B, ...]."""
        return ops.vae_loss(
            recon, target, mu, logvar, likelihood=self.likelihood, beta=self.beta, reduction=self.reduction,
            from_logits=self.from_logits,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.likelihood}, beta={self.beta}, reduction={self.reduction}, from_logits={self.from_logits}"
