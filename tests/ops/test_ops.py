"""Every op of the registry: numerics on every backend, derivatives, PyTorch's subsystems, bad input."""

import contextlib

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.common.spec import Tensors
from genai_fast.registry import OPS
from genai_fast.testing import (
    AUTOMATIC,
    SECOND_ORDER,
    Run,
    assert_matches_reference,
    assert_second_derivative,
    every_run,
)

DIFFERENTIABLE = [op for op in OPS.values() if op.double_backward]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _call(op, inputs):
    outputs = getattr(ops, op.name)(**inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _gradients(op, inputs, outputs, **more):
    """Gradients of a fixed weighted sum of the outputs."""
    targets = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    total = sum((o * torch.arange(1, o.numel() + 1, device=o.device).view(o.shape) / o.numel()).sum() for o in outputs)
    return torch.autograd.grad(total, targets, **more)


def _backends(op):
    return [backend for backend in op.backends if not unavailable(backend, DEVICE)]


def _missing(op, called):
    """Library operators of an op that have a kernel on this device and were not called."""
    native = {"cpu": "cpu", "cuda": "triton"}[DEVICE]
    return {o.name for o in op.library if native in o.kernels and native in op.backends} - set(called)


def _each(operators, *cases):
    """(op, first case of that op with one of the names, or its first case)."""
    for op in operators:
        named = [case for case in op.cases if case.name in cases]
        yield from ((op, case) for case in named or op.cases[:1])


def _ids(values):
    return [f"{op}-{case}" for op, case in values]


def _parametrize(operators, *cases):
    values = list(_each(operators, *cases))
    return pytest.mark.parametrize(("op", "case"), values, ids=_ids(values))


@pytest.mark.parametrize("run", list(every_run()), ids=str)
def test_matches_reference(run):
    assert_matches_reference(run)


ERRORS = [(op, case) for op in OPS.values() for case in op.error_cases]


@pytest.mark.parametrize(("op", "case"), ERRORS, ids=_ids(ERRORS))
def test_bad_input_is_refused(op, case):
    with pytest.raises(case.error, match=f"^{op}: .*{case.message}"):
        _call(op, case.inputs(Tensors()))


@_parametrize(DIFFERENTIABLE, *SECOND_ORDER)
@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_gradcheck_and_gradgradcheck(op, case):
    inputs = case.inputs(Tensors(torch.float64))
    names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def function(*values):
        outputs = _call(op, {**inputs, **dict(zip(names, values, strict=True))})
        return tuple(o for o in outputs if o.requires_grad)

    tensors = tuple(inputs[name] for name in names)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@_parametrize(DIFFERENTIABLE, *SECOND_ORDER)
def test_second_derivative_in_float32(op, case):
    assert_second_derivative(Run(op, case, torch.float32, AUTOMATIC, DEVICE))


@_parametrize(DIFFERENTIABLE, "latent_20", "mnist")
def test_second_backward_gives_the_same_numbers(op, case):
    for backend in _backends(op):
        with use_backend(backend):
            inputs = case.inputs(Tensors(device=DEVICE))
            outputs = _call(op, inputs)
            first = _gradients(op, inputs, outputs, retain_graph=True)
            kept = [g.clone() for g in first]
            second = _gradients(op, inputs, outputs)
        for a, b, c in zip(first, second, kept, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@_parametrize(DIFFERENTIABLE, "latent_20", "long_row", "mnist", "many_rows", "large_plane", "small_planes")
def test_two_runs_are_bitwise_equal(op, case):
    for backend in _backends(op):
        if backend == "triton" and DEVICE == "cpu":
            continue  # the interpreter's programs run one after another: no order could differ
        with use_backend(backend):
            runs = []
            for _ in range(2):
                inputs = case.inputs(Tensors(device=DEVICE))
                outputs = _call(op, inputs)
                runs.append([*outputs, *_gradients(op, inputs, outputs)])
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)


OURS_ON_CPU = [op for op in DIFFERENTIABLE if "cpu" in op.backends and op.name != "conv2d"]  # its result is PyTorch's
BY_PYTORCH = {
    "gru": ("weight_ih", "weight_hh")
}  # gradients that are products of its library, whose sums threads may cut


@_parametrize(OURS_ON_CPU, "latent_20", "long_row", "mnist", "gaussian", "many_rows", "large_plane", "small_planes")
def test_thread_count_changes_nothing(op, case):
    if unavailable("cpu", "cpu"):
        pytest.skip(unavailable("cpu", "cpu"))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = case.inputs(Tensors())
            outputs = _call(op, inputs)
            leaves = [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]
            found = dict(zip(leaves, _gradients(op, inputs, outputs), strict=True))
            for name in BY_PYTORCH.get(op.name, ()):
                del found[name]
            results.append([*outputs, *found.values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@_parametrize(DIFFERENTIABLE, "latent_20", "mnist", "none")
def test_expanded_gradients(op, case):
    """sum() and mean() send gradients with strides of zero."""
    for backend in _backends(op):
        with use_backend(backend):
            inputs = case.inputs(Tensors(device=DEVICE))
            targets = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
            expanded = torch.autograd.grad(sum(o.sum() for o in _call(op, inputs)), targets)
            outputs = [o for o in _call(op, inputs) if o.requires_grad]
            dense = torch.autograd.grad(outputs, targets, [torch.ones_like(o) for o in outputs])
        for a, b in zip(expanded, dense, strict=True):
            assert torch.equal(a, b)


@_parametrize(DIFFERENTIABLE, "latent_20", "odd_rows", "mnist", "none", "beta_tensor")
def test_torch_compile_fullgraph(op, case):
    torch._dynamo.reset()
    inputs = case.inputs(Tensors(device=DEVICE))
    function = getattr(ops, op.name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, got = _call(op, inputs), compiled(**inputs)
    got = [got] if isinstance(got, torch.Tensor) else list(got)
    gradients = _gradients(op, inputs, got)
    for a, b in zip([*got, *gradients], [*expected, *_gradients(op, inputs, expected)], strict=True):
        # lstm on a CPU is PyTorch's, which the compiler takes apart: its sums have another order then.
        assert torch.equal(a, b) or (op.name == "lstm" and torch.allclose(a, b, rtol=1e-5, atol=1e-5))


@_parametrize(DIFFERENTIABLE, "latent_20", "mnist")
def test_torch_compile_keeps_the_kernels(op, case):
    """Forward and backward of a compiled region call our operators, not the decomposed reference."""
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    called = []

    def collect(graph, _):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        # An operator that updates its arguments is itself the argument of auto_functionalized.
        called.extend(str(target) for node in calls for target in (node.target, *node.args[:1]))
        return graph.forward

    inputs = case.inputs(Tensors(device=DEVICE))
    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    compiled = torch.compile(getattr(ops, op.name), fullgraph=True, backend=backend)
    outputs = compiled(**inputs)
    _gradients(op, inputs, [outputs] if isinstance(outputs, torch.Tensor) else list(outputs))
    assert called
    assert not _missing(op, [name.removeprefix("genai_fast.").removesuffix(".default") for name in called])


@_parametrize(DIFFERENTIABLE, "latent_20", "mnist")
def test_torch_export(op, case):
    inputs = case.inputs(Tensors(device=DEVICE))
    inputs = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}

    class Model(torch.nn.Module):
        def forward(self, *values):
            return tuple(_call(op, dict(zip(inputs, values, strict=True))))

    program = torch.export.export(Model(), tuple(inputs.values()))
    for a, b in zip(program.module()(*inputs.values()), _call(op, inputs), strict=True):
        assert torch.equal(a, b)


@_parametrize(DIFFERENTIABLE, "latent_20", "odd_rows", "mnist", "odd")
def test_func_grad_agrees_with_autograd(op, case):
    inputs = case.inputs(Tensors(device=DEVICE))
    names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def total(values):
        return sum(o.float().pow(2).sum() for o in _call(op, {**inputs, **values}))

    values = {name: inputs[name].detach() for name in names}
    got = torch.func.grad(total)(values)
    expected = torch.autograd.grad(total({name: inputs[name] for name in names}), [inputs[name] for name in names])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)


@_parametrize(DIFFERENTIABLE, "latent_20", "heads", "channels_last", "mnist", "none", "mixed_layout", "one_element")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(op, case, dtype):
    """Schema, fake tensors and AOT dispatch of each library op, on the calls that the public op makes."""
    calls = []
    inputs = case.inputs(Tensors(dtype, DEVICE))

    def run():
        outputs = [o for o in _call(op, inputs) if o.requires_grad]
        targets = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.grad(outputs, targets, [torch.ones_like(o) for o in outputs])

    with _recorded(calls):
        run()
    if not calls:  # PyTorch serves here as planned, past the library
        with _recorded(calls), use_backend("reference"):
            run()
    assert calls
    assert not _missing(op, [name for name, _ in calls])
    for name, arguments in calls:
        plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(getattr(torch.ops.genai_fast, name).default, plain)


@contextlib.contextmanager
def _recorded(calls):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "genai_fast":
                calls.append((func._schema.name.split("::")[1], args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield


@_parametrize([op for op in DIFFERENTIABLE if op.folder in ("reparameterize", "vae_loss")], "latent_20", "mnist")
def test_autocast_promotes_mixed_dtypes(op, case):
    """Under autocast a bfloat16 and a float32 partner meet in the wider dtype; outside they are refused."""
    inputs = case.inputs(Tensors(device=DEVICE))
    partner = "logvar" if "target" not in inputs else "target"
    mixed = {**inputs, partner: inputs[partner].detach().bfloat16()}
    with pytest.raises(TypeError, match=partner):
        _call(op, mixed)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = _call(op, mixed)
    widened = {**inputs, partner: mixed[partner].float()}
    for a, b in zip(got, _call(op, widened), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_beta_does_not_recompile():
    """A schedule changes beta every step: as a float it compiles at most twice, as a tensor once."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs = {k: v for k, v in OPS["vae_loss"].cases[0].inputs(Tensors()).items() if k != "beta"}
    compiled = torch.compile(lambda beta: ops.vae_loss(**inputs, beta=beta).loss, backend=counter, fullgraph=True)
    for beta in (0.1, 0.2, 0.3, 0.4):
        assert torch.equal(compiled(beta), ops.vae_loss(**inputs, beta=beta).loss)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
    counter.frame_count = 0
    for beta in (0.1, 0.2, 0.3):
        compiled(torch.tensor(beta))
    assert counter.frame_count == 1


def test_gradient_of_a_beta_tensor():
    inputs = OPS["vae_loss"].cases[0].inputs(Tensors())
    beta = torch.tensor(0.5, requires_grad=True)
    loss, _, kl = ops.vae_loss(**inputs, beta=beta)
    (gradient,) = torch.autograd.grad(loss, beta)
    torch.testing.assert_close(gradient, kl.detach())


@pytest.mark.parametrize("backend", _backends(OPS["vae_loss"]))
def test_raw_operators_refuse_what_would_read_foreign_memory(backend):
    """The kernels work on addresses; torch.ops.genai_fast can be called past the public functions' checks."""
    if backend == "reference":
        pytest.skip("plain PyTorch checks by itself")
    library, seed = torch.ops.genai_fast, torch.tensor(1, device=DEVICE)
    x, short = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 7, device=DEVICE)
    loss = (torch.ones(4, device=DEVICE), None, None)
    settings = (None, 1.0, "bernoulli", "none", backend)
    for call in (
        lambda: library.reparameterize(x, short, seed, 0, True, backend),
        lambda: library.reparameterize(x, x.bfloat16(), seed, 0, True, backend),
        lambda: library.reparameterize(x, x, seed.int(), 0, True, backend),
        lambda: library.reparameterize_backward(short, None, x, x, seed, 0, backend),
        lambda: library.reparameterize_backward(x, x[:2, 0], x, x, seed, 0, backend),
        lambda: library.vae_loss(x, short, x, x, *settings),
        lambda: library.vae_loss(x, x, x[:2], x[:2], *settings),
        lambda: library.vae_loss_backward(loss[0][:2], None, None, x, x, x, x, *settings),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            call()


def test_adam_refuses_a_state_of_another_size():
    tensors = [[torch.zeros(4)] for _ in range(4)]
    tensors[2] = [torch.zeros(2)]
    settings = (1e-3, 0.9, 0.999, 1e-8, 0.0, False, "cpu")
    with pytest.raises(ValueError, match=r"adam_step: expected float32 \(4,\)"):
        torch.ops.genai_fast.adam_step(*tensors, [torch.zeros(())], *settings)


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors")
@_parametrize(DIFFERENTIABLE, "latent_20", "mnist")
def test_a_default_device_does_not_move_results(op, case):
    inputs = case.inputs(Tensors())
    expected = _call(op, inputs)
    with torch.device("meta"):
        got = _call(op, inputs)
        (target, *_) = (x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad)
        gradients = torch.autograd.grad(got[0], target, torch.ones_like(got[0], device="cpu"))
    assert torch.equal(got[-1], expected[-1])
    assert gradients[0].device.type == "cpu"


def test_vae_loss_under_autocast_takes_heads_of_two_dtypes():
    inputs = OPS["vae_loss"].cases[0].inputs(Tensors(device=DEVICE))
    mixed = {**inputs, "mu": inputs["mu"].bfloat16()}
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ops.vae_loss(**mixed)
    torch.testing.assert_close(got.loss, ops.vae_loss(**{**inputs, "mu": mixed["mu"].float()}).loss)


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_adam_step_in_a_dtype_without_a_kernel():
    tensors = [[torch.zeros(5, dtype=torch.bfloat16)] for _ in range(4)]
    tensors[1][0] += 1
    ops.adam_step(*tensors, [torch.zeros((), dtype=torch.bfloat16)])
    assert (tensors[0][0] < 0).all()
