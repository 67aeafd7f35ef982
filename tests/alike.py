"""Whether two modules compute the same: outputs, gradients, buffers, training steps."""

import contextlib
import copy

import torch
from torch import nn


@contextlib.contextmanager
def norm_calls():
    """The activations that fused batch norms are called with inside the block, measurements apart."""
    from genai_fast import autotune, ops

    made, measuring = [], []
    before = {name: getattr(ops, name) for name in ("batch_norm_act", "conv_transpose2d_batch_norm_act")}
    measure, places = autotune._measure, {"batch_norm_act": 8, "conv_transpose2d_batch_norm_act": 12}

    def counted(name):
        def call(*args, **kwargs):
            if not measuring:
                made.append(args[places[name]])
            return before[name](*args, **kwargs)

        return call

    def measured(*args):
        measuring.append(True)
        try:
            return measure(*args)
        finally:
            measuring.pop()

    try:
        autotune._measure = measured
        for name in before:
            setattr(ops, name, counted(name))
        yield made
    finally:
        autotune._measure = measure
        for name, op in before.items():
            setattr(ops, name, op)


@contextlib.contextmanager
def calls_of(name, named=False):
    """The arguments that an op is called with inside the block: by position, or those that are named."""
    from genai_fast import ops

    made, op = [], getattr(ops, name)

    def counted(*args, **kwargs):
        made.append(kwargs if named else args)
        return op(*args, **kwargs)

    try:
        setattr(ops, name, counted)
        yield made
    finally:
        setattr(ops, name, op)


def assert_close(found, expected, tolerance=2e-5, scale=None, what=""):
    """The largest error beside the largest value, so that rounding near 0 does not count."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    scale = expected.detach().abs().max().item() if scale is None else scale
    error = (found.detach().double() - expected.detach().double()).abs().max().item()
    assert error <= tolerance * max(scale, 1e-6), f"{what}: error {error:.3e} beside {scale:.3e}"


def assert_near(found, expected, tolerance=1e-5):
    """Each element, to that share of it or that much."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def strides(x):
    """Those that mean something: of a single channel PyTorch's own differ with the layout."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def assert_gradients(found, expected, tolerance=1e-3):
    """In 2-norm, since they flip at the kink of ReLU; beside the largest, since some are 0 but for rounding."""
    floor = 1e-2 * max(g.double().norm().item() for g in expected.values())
    for name, g in expected.items():
        error = (found[name].double() - g.double()).norm().item()
        assert error <= tolerance * max(g.double().norm().item(), floor), f"gradient of {name}: error {error:.3e}"


def assert_gradients_close(found, expected, tolerance=1e-3):
    """In 2-norm, since they flip at the kink of ReLU; beside the largest, since some are 0 but for rounding."""
    floor = 1e-2 * max(g.double().norm().item() for g in expected.values())
    for name, g in expected.items():
        error = (found[name].double() - g.double()).norm().item()
        assert error <= tolerance * max(g.double().norm().item(), floor), f"gradient of {name}: error {error:.3e}"


def step(model, *inputs):
    """(outputs, gradients of all parameters and floating inputs) of one forward and backward."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    model.zero_grad()
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads.update({f"input {k}": x.grad for k, x in enumerate(inputs)})
    return outputs, grads


def assert_alike(fused, plain, *inputs, steps=3):
    """Training steps with Adam, then evaluation with and without gradients, agree in everything; strides too."""
    assert [*fused.state_dict()] == [*plain.state_dict()]
    # A large eps: a gradient that is 0 but for rounding must not become a step of the full length.
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-2) for m in (fused, plain)]
    for training in [True] * steps + [False]:
        fused.train(training)
        plain.train(training)
        (found, found_gradients), (expected, expected_gradients) = step(fused, *inputs), step(plain, *inputs)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 1e-4, what="output")
            assert strides(a) == strides(b)
        assert [*found_gradients] == [*expected_gradients]
        assert_gradients(found_gradients, expected_gradients)
        for optimizer in optimizers:
            if training:
                optimizer.step()
    fused.load_state_dict(plain.state_dict(), strict=True)  # evaluation alone, then
    with torch.no_grad():
        found, expected = fused(*inputs), plain(*inputs)
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (found, expected)), strict=True):
        assert_close(a, b, what="output in evaluation")
        assert strides(a) == strides(b)


def assert_buffers_alike(fused, plain):
    found = dict(fused.named_buffers())
    for name, b in plain.named_buffers():
        assert_close(found[name], b, 1e-4, what=name)


def with_statistics(model, seed=0):
    """The model with running statistics and affine parameters as after a long training; in place."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for name in ("running_mean", "running_var", "weight", "bias"):
                draw, least = (torch.rand, 0.1) if name == "running_var" else (torch.randn, 0.0)
                p = getattr(m, name, None)
                if p is not None:
                    p.data.copy_(draw(p.shape, generator=generator) + least)
    return model


def plain_of(sequential):
    """nn.Sequential of copies of the children."""
    return nn.Sequential(*copy.deepcopy(list(sequential)))


def gradients(model, loss):
    """Of the loss, by name, of every parameter; 0 where there is none."""
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
