"""Random models of some 60 kinds of layers, as nn.Sequential or as a class with a written forward, for fuzzing."""

import linecache
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

MOST = 1 << 18  # elements of any tensor in a model
Shape = tuple[int, ...]


class Action(NamedTuple):
    """What is done to each copy of a model."""

    label: str
    do: Callable[[nn.Module, list[str]], Any]  # gets the model, and a list in which hooks write


class View(nn.Module):
    """x.view: raises on a layout that it cannot express."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), *self.sizes)

    def extra_repr(self) -> str:
        return str(self.sizes)


class First(nn.Module):
    """The outputs of a recurrent layer without its states."""

    def forward(self, pair: tuple[torch.Tensor, Any]) -> torch.Tensor:
        return pair[0]


class OwnConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class OwnSequential(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.25


class OwnActivation(nn.Module):
    """Works in place on what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp_(-2.0, 2.0)


_LINEAR = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.RNNBase, First, View, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Upsample,
)  # fmt: skip


class Model(NamedTuple):
    """A model, an input's shape, what is done to each copy of it, and whether it draws numbers of its own."""

    module: nn.Module
    shape: Shape
    actions: list[Action]
    source: str  # of the written forward; "" of a Sequential

    @property
    def drops(self) -> bool:
        """Whether there is an nn.Dropout that drops: its numbers are documented to differ."""
        return any(type(m) is nn.Dropout and m.p > 0 for m in self.module.modules())

    @property
    def kinks(self) -> bool:
        """Whether a rounding can change a gradient much."""
        smooth = (nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softmax, nn.Softplus, nn.Mish, nn.Identity)
        costs = any(True for m in self.module.modules() if not m._modules and not isinstance(m, (*smooth, *_LINEAR)))
        return costs or "relu" in self.source

    @property
    def draws(self) -> bool:
        return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.module.modules())


def _activation(d: random.Random, shape: Shape) -> nn.Module:
    inplace = d.random() < 0.4
    return d.choice((
        lambda: nn.ReLU(inplace), lambda: nn.ReLU(inplace), lambda: nn.LeakyReLU(0.2, inplace), nn.Tanh,
        lambda: nn.LeakyReLU(d.choice((0.2, 0.01, 0, 1.5)), inplace), nn.Sigmoid, lambda: nn.SiLU(inplace), nn.GELU,
        lambda: nn.GELU("tanh"), nn.Identity, lambda: nn.PReLU(d.choice((1, shape[1]))), nn.ELU,
        lambda: nn.Hardswish(inplace), lambda: nn.Softmax(1), nn.Softplus, nn.Mish, lambda: nn.ReLU6(inplace),
        lambda: nn.Hardtanh(inplace=inplace), OwnActivation,
    ))()  # fmt: skip


def _dropout(d: random.Random, shape: Shape) -> nn.Module:
    inplace = d.random() < 0.3
    if d.random() < 0.5:
        return nn.Dropout(d.choice((0, 0.0, np.float32(0), False)), inplace)
    kind = d.choice((nn.Dropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout))
    return kind(d.choice((0.1, 0.5, 1.0)), inplace)


def _convolution(d: random.Random, shape: Shape) -> nn.Module:
    dims, channels = len(shape) - 2, shape[1]
    transposed = d.random() < 0.4
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")

    def sizes(*choices: int) -> int | tuple[int, ...]:
        return d.choice(choices) if d.random() < 0.6 else tuple(d.choice(choices) for _ in range(dims))

    outputs = d.choice((channels, 3, 4, 8, 16, 32))
    groups = d.choice([g for g in (1, 1, 1, 1, 2, channels) if channels % g == outputs % g == 0])
    kernel, stride, padding = d.choice(((3, 1, 1), (4, 2, 1), (1, 1, 0), (sizes(1, 2, 3, 4, 5), sizes(1, 2, 3), 0)))
    if d.random() < 0.3:
        padding = sizes(0, 1, 2)
    if dims == 2 and not transposed and d.random() < 0.1:
        kernel, padding = shape[2:], 0  # one product
    dilation = sizes(1, 2) if d.random() < 0.2 else 1
    settings: dict[str, Any] = {"bias": d.random() < 0.6, "groups": groups, "dilation": dilation}
    if transposed:
        settings["output_padding"] = d.choice((0, 0, 0, 1))
    elif d.random() < 0.3:
        settings["padding_mode"] = d.choice(("zeros", "reflect", "replicate", "circular"))
        if stride == 1 and d.random() < 0.5 and kernel != shape[2:]:  # PyTorch takes 16 s for such a one
            padding = d.choice(("same", "valid"))
    if dims == 2 and not transposed and d.random() < 0.05:
        kind = OwnConv
    return kind(channels, outputs, kernel, stride, padding, **settings)


def _norm(d: random.Random, shape: Shape) -> nn.Module:
    dims, channels = len(shape) - 2, shape[1]
    settings: dict[str, Any] = {
        "eps": d.choice((1e-5, 1e-3, 0.8, 0, np.float32(1e-5))),
        "affine": d.random() < 0.8,
        "momentum": d.choice((0.1, 0.1, None, 0.0, 1, np.float64(0.3))),
        "track_running_stats": d.random() < 0.85,
    }
    if d.random() < 0.6:
        settings = {}
    batch = getattr(nn, f"BatchNorm{max(dims, 1)}d")
    if dims and d.random() < 0.15:
        settings.pop("track_running_stats", None)
        return getattr(nn, f"InstanceNorm{dims}d")(channels, **settings)
    norm = (nn.SyncBatchNorm if d.random() < 0.1 else batch)(channels, **settings)
    if d.random() < 0.7 and norm.running_mean is not None:  # statistics as after a training
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2.0)
    return norm


def _other_norm(d: random.Random, shape: Shape) -> nn.Module:
    groups = [g for g in (1, 2, 4, shape[1]) if shape[1] % g == 0]
    kind = d.choice((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    if kind is nn.GroupNorm:
        return nn.GroupNorm(d.choice(groups), shape[1], affine=d.random() < 0.7)
    sizes = shape[-1] if d.random() < 0.7 else shape[1:]
    settings = {"bias": d.random() < 0.7} if kind is nn.LayerNorm else {}
    return kind(sizes, **settings, elementwise_affine=d.random() < 0.8)


def _shaping(d: random.Random, shape: Shape) -> nn.Module:
    dims, inner = len(shape) - 2, int(np.prod(shape[1:]))
    choices: list[Callable[[], nn.Module]] = [lambda: View(*shape[1:])]
    if dims > 0:
        pad = [d.choice((0, 1, 2)) for _ in range(2 * dims)]
        kind = d.choice(("Max", "Avg"))
        choices += [
            nn.Flatten, lambda: View(-1), lambda: getattr(nn, f"{kind}Pool{dims}d")(2),
            lambda: getattr(nn, f"AdaptiveAvgPool{dims}d")(d.choice((1, 4))), lambda: nn.Upsample(scale_factor=2),
            lambda: getattr(nn, f"ZeroPad{dims}d")(tuple(pad)), lambda: getattr(nn, f"ReflectionPad{dims}d")(1),
            lambda: nn.Unflatten(1, (1, shape[1])), lambda: View(shape[1], -1),
        ]  # fmt: skip
        if dims == 2:
            choices += [
                lambda: nn.PixelShuffle(2), lambda: nn.PixelUnshuffle(2), lambda: nn.ChannelShuffle(shape[1]),
                lambda: nn.Upsample(scale_factor=2, mode="bilinear"), lambda: nn.MaxPool2d(3, 1, 1),
            ]  # fmt: skip
    elif inner % 16 == 0:
        choices += 3 * [lambda: nn.Unflatten(1, (-1, 4, 4)), lambda: View(-1, 4, 4), lambda: View(-1, 4, 2, 2)]
    return d.choice(choices)()


def _features(d: random.Random, shape: Shape) -> nn.Module:
    if len(shape) == 3 and d.random() < 0.5:
        width = d.choice((4, 8))
        settings = {"batch_first": d.random() < 0.7, "bidirectional": d.random() < 0.3, "bias": d.random() < 0.8}
        kind = d.choice((nn.GRU, nn.GRU, nn.LSTM, nn.RNN))
        return nn.Sequential(kind(shape[-1], width, d.choice((1, 2)), **settings), First())
    return nn.Linear(shape[-1], d.choice((8, 16, 32, 64)), bias=d.random() < 0.7)


def _layer(d: random.Random, shape: Shape) -> nn.Module:
    made = [_activation] * 6 + [_dropout] * 2 + [_norm] * 5 + [_other_norm] + [_shaping] * 2 + [_features]
    made += [_convolution] * 7 if len(shape) > 2 else [_features] * 4
    made += [_features] * 5 if len(shape) == 3 else []
    return d.choice(made)(d, shape)


def _probed(module: Callable[..., Any], x: torch.Tensor) -> torch.Tensor | None:
    """What comes out; None if it raises or is too large or empty."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = module(x.clone())
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return None
    fits = isinstance(y, torch.Tensor) and 0 < y.numel() <= MOST and y.dim() > 1 and len(y) == len(x)
    return y if fits and y.isfinite().all() else None


def _input_shape(d: random.Random, large: bool) -> Shape:
    batch, channels = d.choice((1, 2, 3, 5)), d.choice((1, 3, 4, 8, 16))
    dims = d.choice((0, 1, 1, 2, 2, 2, 2, 2, 3))
    if large:
        batch, channels, dims = d.choice((1, 4, 8)), d.choice((16, 32)), d.choice((0, 2, 2, 2))
        return (512, 256) if dims == 0 else (batch, channels, 32, d.choice((30, 32)))
    plane = {0: (), 1: (d.choice((7, 12, 16)),), 2: d.choice(((8, 8), (7, 9), (16, 12), (4, 4), (1, 1))), 3: (4, 5, 6)}
    return batch, channels * (8 if dims == 0 else 1), *plane[dims]


def _changes(m: nn.Module) -> list[tuple[str, Callable[[nn.Module], Any]]]:
    """Changes of one module's attributes or tensors."""

    def setting(name: str, *values: Any) -> list[tuple[str, Callable[[nn.Module], Any]]]:
        return [(f"{name} = {v!r}", lambda m, v=v: setattr(m, name, v)) for v in values]

    found = [(n, lambda m, n=n: getattr(m, n)()) for n in ("eval", "train")]
    found.append(("frozen", lambda m: m.requires_grad_(False)))
    if isinstance(m, nn.modules.conv._ConvNd) and isinstance(m.padding, tuple):
        first, padding = m.stride[0], m.padding
        found += setting("stride", first, list(m.stride), np.int64(first), torch.tensor(first), (first,))
        found += setting("padding", padding[0], list(padding), tuple(map(np.int64, padding)), np.int64(padding[0]))
        found += setting("dilation", m.dilation[0], [*m.dilation], True) + setting("groups", np.int64(m.groups))
    if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)):
        changed = (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal)
        found += [(f.__name__, f) for f in (*changed, weight_norm, spectral_norm)]
        found.append(("pruned", lambda m: prune.random_unstructured(m, "weight", 0.3)))
        found.append(("frozen weight", lambda m: m.weight.requires_grad_(False)))
        found += setting("bias", None)
    if isinstance(m, nn.modules.batchnorm._BatchNorm):
        found += setting("eps", np.float32(1e-4), torch.tensor(1e-4), 0.01) + setting("momentum", np.float32(0.2), None)
        found += setting("track_running_stats", False) + setting("num_batches_tracked", None)
        found += setting("running_var", None) + setting("weight", None)
        if m.affine:
            found.append(("zero weight", lambda m: m.weight.data.zero_()))
            found.append(("frozen bias", lambda m: m.bias.requires_grad_(False)))
    if isinstance(m, nn.LeakyReLU):
        found += setting("negative_slope", np.float32(0.3), 1, -0.5)
    if isinstance(m, (nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.Dropout)):
        found += 2 * setting("inplace", True)
    if isinstance(m, nn.Dropout) and m.p == 0:
        found += setting("p", np.float64(0.0), torch.tensor(0.0))
    return found


def _hook(d: random.Random, name: str) -> Action:
    kind = d.choice(("forward", "forward_pre", "full_backward", "full_backward_pre", "forward_changes", "replaced"))

    def add(model: nn.Module, log: list[str]) -> None:
        module = model.get_submodule(name)

        def note(*_: Any) -> None:
            log.append(f"{kind} {name}")

        if kind == "forward_changes":
            module.register_forward_hook(lambda m, args, y: y * 2 if isinstance(y, torch.Tensor) else None)
        elif kind == "replaced":
            own = module.forward
            module.forward = lambda *args: (note(), own(*args))[1]
        else:
            getattr(module, f"register_{kind}_hook")(note)

    return Action(f"hook {kind} on {name}", add)


def _actions(d: random.Random, module: nn.Module) -> list[Action]:
    found: list[Action] = []
    names = {name: m for name, m in module.named_modules() if name}
    leaves = [name for name, m in names.items() if not m._modules]
    for name in leaves:
        if d.random() < 0.08:
            label, change = d.choice(_changes(names[name]))
            do = lambda model, log, name=name, change=change: change(model.get_submodule(name))  # noqa: E731
            found.append(Action(f"{name}: {label}", do))
    if d.random() < 0.2:
        found.append(_hook(d, d.choice(leaves)))
    if d.random() < 0.05:
        found.append(_hook(d, d.choice([*names])))
    if d.random() < 0.1:
        ranks = {p.dim() for p in module.parameters()}
        last = torch.channels_last_3d if 5 in ranks else torch.channels_last
        found.append(Action(str(last), lambda model, log: model.to(memory_format=last)))
    return found


_FUNCTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("F.relu({})", "torch.relu({})", "{}.relu()", "F.relu({}, inplace=True)", "{}.relu_()"),
    nn.LeakyReLU: ("F.leaky_relu({}, 0.2)", "F.leaky_relu({}, negative_slope=0.1, inplace=True)", "F.leaky_relu({})"),
    nn.Tanh: ("{}.tanh()", "torch.tanh({})", "F.tanh({})"),
    nn.Sigmoid: ("torch.sigmoid({})", "{}.sigmoid()"),
    nn.SiLU: ("F.silu({})", "F.silu({}, inplace=True)"),
    nn.GELU: ("F.gelu({})", 'F.gelu({}, approximate="tanh")'),
    nn.Dropout: ("F.dropout({}, 0.0, self.training)",),
}


_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.PReLU, nn.ELU, nn.Mish)
_UNDER = (
    "if self.flag: {v} = {e}", "if self.flag is not None: {v} = {e}", "{v} = {e} if self.flag else {v}",
    "if not self.flag: {v} = {v}.tanh()\n        else: {v} = {e}",
)  # fmt: skip
_SUMS = (
    "{v} = torch.add({v}, {k})", "{v} = torch.add({k}, {v})", "{v} = {v}.add({k})", "{v} = {k}.add({v})",
    "{v}.add_({k})", "{v} = {v}.add_({k})", "if self.flag: {v} = {v} + {k}",
)  # fmt: skip


def _written(d: random.Random, layers: list[nn.Module], shapes: list[Shape], seed: int) -> tuple[nn.Module, str]:
    """A class with a forward that calls the layers: nested, by statements, with skips, branches and functions."""
    lines, names, expression, variable, kept = [], {}, "x", "x", ""
    more = random.Random(~seed)  # what came later draws of its own
    for k, layer in enumerate(layers):
        functions = _FUNCTIONS.get(type(layer), ()) if d.random() < 0.5 else ()
        under = more.choice(_UNDER) if isinstance(layer, _ELEMENTWISE) and more.random() < 0.25 else ""
        if under and expression != variable:
            lines.append(f"{variable} = {expression}")
            expression = variable
        if functions:
            expression = d.choice(functions).format(expression)
        else:
            name = names.setdefault(id(layer), f"m{k}" if d.random() < 0.8 else f"blocks[{len(names)}]")
            expression = f"self.{name}({expression})"
        if under:
            lines.append(under.format(v=variable, e=expression))
            expression = variable
        if d.random() < 0.55 or k == len(layers) - 1:
            variable = variable if d.random() < 0.8 else f"v{k}"
            lines.append(f"{variable} = {expression}")
            expression = variable
            if kept and shapes[k] == shapes[int(kept[1:])] and d.random() < 0.7:
                joined = d.choice((f"= {variable} + {kept}", f"+= {kept}", f"= {kept} * {variable}"))
                spelled = more.choice(_SUMS).format(v=variable, k=kept) if more.random() < 0.4 else ""
                lines.append(spelled or f"{variable} {joined}")
                kept = ""
            elif not kept and d.random() < 0.4:
                kept = f"h{k}"
                lines.append(f"{kept} = {variable}")
            elif d.random() < 0.1:
                lines.append(f"if self.training: {variable} = {variable} * 1.5")
    lines.append(d.choice((f"return {expression}", f"return {expression}.tanh()", f"return {expression} + 0")))
    body = "\n".join(f"        {line}" for line in lines)
    source = f"class Written(Base):\n    def forward(self, x):\n{body}\n"
    file = f"<chain {seed}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    scope = {"torch": torch, "F": F, "Base": nn.Module, "__name__": "written_chain"}
    exec(compile(source, file, "exec"), scope)
    model = scope["Written"]()
    model.flag = more.choice((True, True, False, None))
    model.blocks = nn.ModuleList([nn.Identity() for _ in names])
    for layer in layers:
        name = names.get(id(layer), "")
        if name.startswith("blocks"):
            model.blocks[int(name[7:-1])] = layer
        elif name:
            setattr(model, name, layer)
    return model, source


def draw(seed: int) -> Model:
    """The model of a seed: weights too."""
    d = random.Random(seed)
    torch.manual_seed(seed)
    shape = _input_shape(d, d.random() < 0.12)
    x, layers, shapes = torch.randn(shape), [], []
    most = d.choice((1, 3, 4, 5, 6, 8, 10))
    more, waiting = random.Random(~seed), []
    for _ in range(60):
        if len(layers) >= most:
            break
        if x.dim() == 4 and more.random() < 0.1:
            waiting += [nn.Upsample(scale_factor=2), nn.Conv2d(x.size(1), more.choice((3, 8)), 3, padding=1)]
        try:
            shared = layers and d.random() < 0.06
            layer = d.choice(layers) if shared else _layer(d, tuple(x.shape))
            layer = waiting.pop(0) if waiting else layer
        except (ValueError, TypeError, AttributeError, RuntimeError):
            continue
        if isinstance(layer, nn.Module) and (y := _probed(layer.eval(), x)) is not None:
            x = y
            layers.append(layer.train())
            shapes.append(tuple(y.shape))
        elif isinstance(layer, nn.Module) and d.random() < 0.01:  # both must raise
            layers.append(layer.train())
            shapes.append(())
            break
    layers, shapes = layers or [nn.ReLU()], shapes or [shape]
    if d.random() < 0.45:
        module, source = _written(d, layers, shapes, seed)
    else:
        module, source = nn.Sequential(*layers), ""
        if len(layers) > 2 and d.random() < 0.3:
            cut = d.randrange(1, len(layers))
            kind = d.choice((nn.Sequential, OwnSequential))
            module = nn.Sequential(*layers[:cut], kind(*layers[cut:]))
    return Model(module, shape, _actions(d, module), source)
