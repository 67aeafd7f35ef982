"""One training step of any model as one call: eager on the CPU, a captured CUDA graph on a GPU."""

import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from genai_fast.contract import HasAfterStep, HasTrainingStep, InTurns, offers, varies
from genai_fast.errors import UsageError
from genai_fast.kernels.common import onednn
from genai_fast.ops import updates
from genai_fast.spelling import spelled
from genai_fast.training import accumulation, loss_output
from genai_fast.training.buffer_snapshot import Kept, modules_of
from genai_fast.training.graph import Batch, Graphs
from genai_fast.training.optimizer import owners

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the loss in float16, as torch.amp.GradScaler has them: first scale, growth, its interval in steps, backoff.
_SCALE, _GROWTH, _INTERVAL, _BACKOFF = 2.0**16, 2.0, 2000, 0.5


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which losses are computed; `precision` is one of PRECISIONS."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")


class Step:
    """One training step of any model as one call: forward, backward, clipping, the optimizer's update.

        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        optimizer = torch.optim.Adam(net.parameters(), fused=True)  # on CUDA: capturable=True too
        step = Step(lambda x, y: nn.functional.mse_loss(net(x), y), optimizer)
        for x, y in batches:
            loss = step(x, y)  # detached, on the device; float(loss) waits for it

    **Loss.** A loss function takes the batch's tensors and returns the loss, a 0-d tensor; or several 0-d tensors as a
    tuple or NamedTuple that begins with it (or has a field `loss`), or as a dict with "loss". `step(...)` returns the
    same structure, detached, without waiting for the device. A model with `training_step(*batch)` may take the place
    of the function. A batch consists of tensors; pass a dict as `step(*batch.values())`.

    **Alternating updates.** A generator function, or a model's `turns(*batch)`, yields (parameters, loss) for each
    update, in order, and is resumed after those parameters have been updated. Its return value is the step's result;
    without one, the result is the tuple of its losses.

        def turns(real):
            fake = generator(torch.randn(len(real), 100, device=real.device))
            yield critic.parameters(), critic(fake.detach()).mean() - critic(real).mean()
            yield generator.parameters(), -critic(fake).mean()

        step = Step(turns, [critic_optimizer, generator_optimizer])

    A turn computes gradients of its own parameters only, and steps the optimizers that hold them.

    **Non-finite values.** If the loss or the norm of the turn's gradients is infinite or NaN, the turn updates nothing
    and is counted (`skipped()`). Such a step also leaves the buffers (batch norm's statistics) unchanged, and a model's
    `after_step()` (a moving average), which follows each step, has no effect.

    **CUDA graphs.** The first three steps of a shape run eagerly on a side stream, as warm-up; they are ordinary
    training steps. Then the step is captured, and each further call copies its batch into the graph's inputs and
    replays it. Random numbers are fresh in each replay. Whatever a step reads besides the batch may change only in
    place: weights, optimizer state, buffers, tensors (a weight beta of a loss: `beta.fill_(0.5)`); Python numbers are
    frozen. The exception is the learning rate: lr becomes a tensor that torch's schedulers fill. Changing another
    setting of an optimizer, or loading its state, restarts warm-up and capture. Gradients are not kept. If the capture
    fails (something waits for the device: `item()`, a print), this batch and all further steps run eagerly, with a
    FallbackWarning that names the error.

    Args:
        model: the loss function, or a model that has `training_step` or `turns`.
        optimizer: one, or several whose parameters are disjoint. A graph needs them fused, and capturable if they have
            that option: `torch.optim.Adam(..., fused=True, capturable=True)`.
        clip: largest 2-norm of the gradient over the parameters of a turn; 0: no clipping.
        precision: autocast precision: "float32", "bfloat16" or "float16", or "bf16", "fp16". In float16 the loss is
            scaled by a factor that is halved when gradients overflow (that update is skipped) and doubled after 2000
            steps without overflow; a gradient that the loss itself computes (a penalty) is not scaled.
        accumulate: gradient accumulation steps: the batch is split along its first dimension into this many parts,
            whose sizes differ by at most 1, and their gradients are summed before one update. This saves memory and
            equals the whole batch within rounding if the loss is a mean over the rows, or in cross-entropy over the
            targets that are not ignored. A mean over anything else reports the count in an entry `weight`, 0-d, of its
            dict or NamedTuple. The step returns means weighted the same way, and the sum of `weight`. 0-d tensors are
            passed to each part; random numbers are drawn, and batch norm statistics computed, per part.
        graph: capture CUDA graphs; None: if the parameters are on CUDA, and the model does not say that its steps vary.
        graphs: largest number of batch shapes with a graph, in one memory pool; further shapes run eagerly.
        module: the module whose buffers and `after_step` are meant above, if `model` is a loss function; an
            nn.ModuleList for several. None: the buffers of modules among the function's variables or its object's
            attributes.

    Raises:
        UsageError (a ValueError): arguments, batch or loss do not meet the above.
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        clip: float = 0.0,
        precision: str = "float32",
        accumulate: int = 1,
        graph: bool | None = None,
        graphs: int = 4,
        module: nn.Module | None = None,
    ) -> None:
        self._optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._owner = owners(self._optimizers)
        self._parameters = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        self._function = _function_of(model)
        precision = spelled(precision)
        _check_arguments(self._function, precision, accumulate, clip, graphs)
        accumulation.check(model, accumulate)
        self.model, self.clip, self.precision, self.accumulate = model, clip, precision, accumulate
        self._device = self._parameters[0].device
        narrow = PRECISIONS[precision]
        if self._device.type == "cpu" and narrow is not torch.float32 and not onednn.serves(narrow):
            warnings.warn(
                f"Step: precision: this processor does not support {precision}: PyTorch emulates it, which is slower"
                f" than float32, many times so in convolutions; remedy: precision='float32'",
                stacklevel=2,
            )
        images = [p for p in self._parameters if p.dim() == 4 and not p.is_contiguous()]
        last = any(p.is_contiguous(memory_format=torch.channels_last) for p in images)
        self._layout = torch.channels_last if last else torch.preserve_format

        groups = [group for o in self._optimizers for group in o.param_groups]
        self._group_count = len(groups)
        graphed = all(p.is_cuda for p in self._parameters) and not varies(model) if graph is None else graph
        for need in ("capturable", "fused") if graphed else ():
            if not all(group.get(need, need == "capturable") for group in groups):  # SGD has no state to be captured
                raise UsageError(
                    f"Step: optimizer: a CUDA graph needs a capturable and fused one, got {need}=False;"
                    f" remedy: torch.optim.Adam(..., fused=True, capturable=True) or graph=False"
                )
        self._graphs: Graphs | None = None
        if graphed:
            self._graphs = Graphs(self._plain, self._placed, self._ready, self._optimizers, self._device, graphs)
        self._deferred = _can_defer(self._device, groups)
        self._met: set[int] = set()  # numbers of optimizers that a turn was about,
        self._begun: set[int] = set()  # and of those that have stepped

        modules = modules_of(model) if module is None else [module]
        owner: Any = model if module is None else module
        self._after = owner.after_step if offers(owner, HasAfterStep) else None
        self._kept = Kept(modules, modules if self._after and self._deferred else (), self._parameters)
        self._skipped = torch.zeros(2, device=self._device)  # turns in all, steps in a row
        self._scale = torch.full((), _SCALE, device=self._device) if precision == "float16" else None
        self._growth = torch.zeros((), dtype=torch.int32, device=self._device)  # steps since the scale changed

    def __call__(self, *batch: torch.Tensor) -> Any:
        for number, x in enumerate(batch):
            if not isinstance(x, torch.Tensor):
                raise UsageError(
                    f"Step: batch: expected tensors, got {type(x).__name__} as number {number}; remedy: step(*tensors),"
                    f" or step(*batch.values()) for a dict, and a loss function with one parameter per tensor"
                )
        if sum(len(o.param_groups) for o in self._optimizers) != self._group_count:
            raise UsageError(
                "Step: optimizer: expected the parameter groups it had at the start, got others; remedy: a new Step"
            )
        if self._graphs is not None:
            return self._graphs(*batch)
        return self._plain(*(self._placed(x) for x in batch))

    def skipped(self) -> tuple[int, int]:
        """(turns skipped so far, most recent consecutive steps that skipped one); waits for the device."""
        total, row = self._skipped.tolist()
        return int(total), int(row)

    @property
    def captured(self) -> int:
        """Number of batch shapes that have a CUDA graph."""
        return 0 if self._graphs is None else len(self._graphs)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides model, optimizers and generators: counts, and the scale in float16."""
        return {name: x.clone() for name, x in self._state().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises UsageError: names, shapes or values do not match a Step of this precision; nothing is changed then.
        """
        mine = self._state()
        wanted, got = ({name: tuple(x.shape) for name, x in s.items()} for s in (mine, state))
        if wanted != got:
            raise UsageError(f"Step: state: expected {wanted} for precision {self.precision}, got {got}")
        if bad := [name for name, x in state.items() if not (x.isfinite() & (x >= 0)).all()]:
            raise UsageError(f"Step: state: {bad[0]}: expected finite numbers >= 0, got {state[bad[0]].tolist()}")
        for name, x in mine.items():
            x.copy_(state[name])  # in place: a captured graph knows the memory

    def _state(self) -> dict[str, torch.Tensor]:
        scaling = {} if self._scale is None else {"scale": self._scale, "growth": self._growth}
        return {"skipped": self._skipped, **scaling}

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        """On the model's device, images in the memory layout of its convolutions."""
        if x.dim() == 4:
            return x.to(self._device, non_blocking=True, memory_format=self._layout)
        return x.to(self._device, non_blocking=True)

    def _ready(self) -> bool:
        return self._met <= self._begun

    def _plain(self, *batch: torch.Tensor) -> Any:
        self._kept.take()
        total, row = self._skipped
        before = total.clone()
        parts = accumulation.parts(batch, self.accumulate)
        with autocast(self._device, self.precision), updates.part(len(parts) == 1):
            result = self._function(*parts[0][0])
        in_turns = isinstance(result, Generator)
        result = self._take_turns(result) if in_turns else self._take_turn(result, parts)
        bad = total > before
        row.add_(1).mul_(bad)
        if self._scale is not None:
            torch._amp_update_scale_(self._scale, self._growth, bad.float(), _GROWTH, _BACKOFF, _INTERVAL)
        if self._deferred:
            if self._after is not None:
                self._after()
            self._kept.put_back_where(bad)
        elif bad:
            self._kept.put_back()
        elif self._after is not None:
            self._after()
        return result

    def _take_turn(self, result: Any, parts: list[tuple[Batch, int]]) -> Any:
        """The only turn, whose first part has been computed; returns the mean of the results."""
        self._drop_gradients()
        if len(parts) == 1:
            self._backward(self._parameters, loss_output.differentiable(loss_output.minimised(result)))
            means, factor = loss_output.like(result, [x.detach() for x in loss_output.entries(result)]), None
        else:
            mean = accumulation.Mean(sum(rows for _, rows in parts), len(parts))
            for number, (part, rows) in enumerate(parts):
                if number:
                    with autocast(self._device, self.precision), updates.part(number == len(parts) - 1):
                        result = self._function(*part)
                loss = mean.add(result, rows)
                if loss is not None:
                    self._backward(self._parameters, loss)
            means, factor = mean.means(result), mean.factor()
        self._update(self._parameters, loss_output.minimised(means), factor)
        return means

    def _take_turns(self, turns: Generator) -> Any:
        if self.accumulate > 1:
            raise UsageError(accumulation.NO_TURNS)
        yielded: list[torch.Tensor] = []
        while True:
            try:
                with autocast(self._device, self.precision):
                    turn = next(turns)
            except StopIteration as end:
                if not yielded:
                    raise UsageError("Step: turns: expected (parameters, loss) to be yielded, got nothing") from None
                result = tuple(yielded) if end.value is None else end.value
                return loss_output.like(result, [x.detach() for x in loss_output.entries(result)])
            parameters, loss = self._checked(turn)
            self._drop_gradients()
            self._backward(parameters, loss)
            yielded.append(loss.detach())
            self._update(parameters, yielded[-1])

    def _checked(self, turn: Any) -> tuple[list[nn.Parameter], torch.Tensor]:
        expected = "Step: turns: expected (parameters, loss) to be yielded, parameters an iterable of an optimizer's"
        if not isinstance(turn, tuple) or len(turn) != 2:
            raise UsageError(f"{expected}, got {_described(turn)}")
        if isinstance(turn[0], torch.Tensor) or not isinstance(turn[0], Iterable):
            raise UsageError(f"{expected}, got {_described(turn[0])} as parameters")
        given = list(turn[0])
        trained = [x for x in given if not isinstance(x, torch.Tensor) or x.requires_grad]
        strange = [x for x in trained if id(x) not in self._owner]
        if strange or not trained:
            got = _described(strange[0]) + " that no optimizer has" if strange else "none that is trained"
            raise UsageError(f"{expected}, got {got}")
        return trained, loss_output.differentiable(turn[1])

    def _drop_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None

    def _backward(self, parameters: list[nn.Parameter], loss: torch.Tensor) -> None:
        if self._scale is not None:
            loss = loss.float() * self._scale
        # Of a turn's own parameters only: a generator's turn needs no gradients of the discriminator's weights.
        loss.backward(inputs=None if parameters is self._parameters else parameters)

    @torch.no_grad()
    def _update(self, parameters: list[nn.Parameter], loss: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        """Step the optimizers of these parameters, whose gradients are first multiplied by `factor`."""
        given = [p for p in parameters if p.grad is not None]
        if not given:
            raise UsageError("Step: loss: expected one that depends on the turn's parameters, got one that does not")
        gradients: list[Any] = [_dense(p) for p in given]
        # One pass over the gradients, which clipping needs in any case, finds what the loss does not show: a finite
        # loss can have a gradient that is not. A norm beyond 3e38 counts too: its square would be Adam's moment.
        norm = nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # of sharded gradients
            norm, gradients = norm.full_tensor(), [g.to_local() for g in gradients]
        if self._scale is not None:
            exact = self._scale.reciprocal()  # a power of two
            factor = exact if factor is None else factor * exact
        if factor is not None:
            norm = norm * factor
        bad = ~(norm.isfinite() & loss.isfinite())
        self._skipped[0] += bad
        optimizers = {self._owner[id(p)] for p in given}
        self._met |= optimizers
        # The first update sets up an optimizer's state, which a fused SGD that skips it would leave to chance.
        deferred = self._deferred and optimizers <= self._begun
        if not deferred and bad:
            return
        if self.clip:
            limit = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            factor = limit if factor is None else factor * limit
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        for number in sorted(optimizers):
            optimizer: Any = self._optimizers[number]
            if deferred:
                optimizer.found_inf = bad.float()
            optimizer.step()
            if deferred:
                del optimizer.found_inf
        self._begun |= optimizers


def _function_of(model: Any) -> Callable[..., Any]:
    if offers(model, InTurns):
        return model.turns
    return model.training_step if offers(model, HasTrainingStep) else model


def _check_arguments(function: Any, precision: str, accumulate: int, clip: float, graphs: int) -> None:
    if not callable(function):
        raise UsageError(
            f"Step: model: expected a loss function or a model with training_step or turns, got {_described(function)}"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"Step: precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise UsageError(f"Step: accumulate: expected an integer >= 1, got {accumulate!r}")
    if not clip >= 0 or graphs < 0:
        raise UsageError(f"Step: expected clip >= 0 and graphs >= 0, got {clip} and {graphs}")


def _can_defer(device: torch.device, groups: list[dict[str, Any]]) -> bool:
    """Fused optimizers decide on the device whether to update, as in mixed precision: asking would wait for it."""
    return device.type == "cuda" and all(group.get("fused") for group in groups)


def _described(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else f"a {type(x).__name__}"


def _dense(p: nn.Parameter) -> torch.Tensor:
    """The gradient's values, in place."""
    assert p.grad is not None
    if not p.grad.is_sparse:
        return p.grad
    p.grad = p.grad.coalesce()
    return p.grad.values()
