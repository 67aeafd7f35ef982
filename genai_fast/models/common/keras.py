"""Weights of Keras models, put into the networks here that have the same layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from genai_fast.models.common.plain_conv import HalfTurn

_CONVS, _NORMS = (nn.Conv2d, nn.ConvTranspose2d), (nn.BatchNorm1d, nn.BatchNorm2d)
_Slot = tuple[torch.Tensor, tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]


def load_keras(network: nn.Module, arrays: Iterable[Any]) -> nn.Module:
    """Put the weights of a Keras model with the same layers into a network, in place; returns the network.

        np.savez("generator.npz", *model.get_weights())  # with Keras
        load_keras(KerasGenerator(), np.load("generator.npz").values())

    Args:
        network: of Linear, Conv2d, ConvTranspose2d and batch norms, such as KerasGenerator or MLPVAE.
        arrays: layer by layer as `model.get_weights()` has them: kernels [in, out], [h, w, in, out] or (of
            Conv2DTranspose) [h, w, out, in], then the bias if there is one; gamma, beta, mean and variance of a norm.
            What is flattened or reshaped has the channels last there.

    Raises: ValueError on another number of arrays or other shapes; nothing is changed then.
    """
    given = [torch.as_tensor(array) for array in arrays]
    slots = list(_slots(network))
    if len(given) != len(slots):
        raise ValueError(
            f"load_keras: arrays: expected {len(slots)} for {type(network).__name__}, got {len(given)}; remedy: all of"
            " model.get_weights(), of the same layers"
        )
    for number, (x, (_, shape, _)) in enumerate(zip(given, slots, strict=True)):
        if x.shape != shape:
            raise ValueError(f"load_keras: arrays: expected shape {shape} of number {number}, got {tuple(x.shape)}")
    with torch.no_grad():
        for x, (target, _, laid_out) in zip(given, slots, strict=True):
            target.copy_(laid_out(x))
    return network


def _slots(network: nn.Module) -> Iterator[_Slot]:
    """Each tensor in Keras' order, its shape there, and what turns an array of that shape into it."""
    leaves = [m for m in network.modules() if not any(m.children())]
    turned = any(isinstance(m, HalfTurn) for m in leaves)
    channels, flattened = 0, False
    units: tuple[int, ...] = ()  # (C, H, W) that the present units are reshaped to, or were flattened from

    def vector(x: torch.Tensor) -> _Slot:
        return x, tuple(x.shape), partial(_channels_first, shape=units, turned=turned)

    for number, module in enumerate(leaves):
        if isinstance(module, nn.Flatten):
            flattened = True
        elif isinstance(module, nn.Linear):
            side = math.isqrt(module.in_features // channels) if flattened else 0
            taken = (channels, side, side) if flattened else ()
            units, flattened = _reshaped(leaves[number + 1 :]), False
            yield module.weight, module.weight.shape[::-1], partial(_matrix, taken=taken, made=units, turned=turned)
        elif isinstance(module, _CONVS):
            pair, channels, units = (module.in_channels, module.out_channels), module.out_channels, ()
            shape = (*module.kernel_size, *(pair if isinstance(module, nn.Conv2d) else pair[::-1]))
            yield module.weight, shape, partial(_kernel, turned=turned)
        elif isinstance(module, _NORMS):
            if flattened:
                raise ValueError("load_keras: network: expected no norm between Flatten and Linear, got one")
            for x in (module.weight, module.bias, module.running_mean, module.running_var):
                yield vector(x)
            continue
        if getattr(module, "bias", None) is not None:
            yield vector(module.bias)


def _reshaped(after: list[nn.Module]) -> tuple[int, ...]:
    """The shape of an Unflatten before the next layer with weights other than a norm, or ()."""
    for module in after:
        if isinstance(module, nn.Unflatten):
            return tuple(module.unflattened_size)
        if isinstance(module, (nn.Linear, *_CONVS)):
            break
    return ()


def _kernel(x: torch.Tensor, turned: bool) -> torch.Tensor:
    return (x.flip(0, 1) if turned else x).permute(3, 2, 0, 1)


def _matrix(x: torch.Tensor, taken: tuple[int, ...], made: tuple[int, ...], turned: bool) -> torch.Tensor:
    """[in, out] -> [out, in]."""
    return _channels_first(_channels_first(x, taken, turned).T, made, turned)


def _channels_first(x: torch.Tensor, shape: tuple[int, ...], turned: bool) -> torch.Tensor:
    """[H W C, ...] -> [C H W, ...], turned by 180 degrees if so; () leaves x as it is."""
    if not shape:
        return x
    channels, height, width = shape
    pixels = x.reshape(height, width, channels, *x.shape[1:])
    return (pixels.flip(0, 1) if turned else pixels).movedim(2, 0).reshape(x.shape)
