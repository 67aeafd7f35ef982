"""Plans of GPU calls, on a GPU that does nothing and on the emulated one. test_plans.py runs this file, in a process in
which Triton compiles.
"""

import contextlib
import copy
import gc
import json
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from bench.host_path.__main__ import LIGER, main
from bench.host_path.calls import calls
from bench.host_path.stub import stub_gpu
from genai_fast import ops, use_backend
from genai_fast.kernels.common import launch, plans, recorder, tuned
from genai_fast.ops import planned, rows
from genai_fast.registry import OPS
from genai_fast.testing import Run, assert_matches_reference, emulated_gpu

CPU = torch.device("cpu")
# With a plan of the whole op; of the others parts have one.
WHOLE = [name for name in calls(CPU, [], True) if name != "conv2d"]
EMULATED = [
    "batch_norm_act-dcgan_block", "causal_attention-gpt", "conv_transpose2d_batch_norm_act", "cross_entropy-gpt",
    "gated_act-pair", "layer_norm-gpt", "reparameterize_kl", "rotary-gpt_j", "vae_loss-mnist",
]  # fmt: skip


@pytest.fixture
def gpu():
    with stub_gpu() as found, use_backend("triton"):
        yield found


@pytest.fixture
def used(monkeypatch):
    """The plans that served calls, in order."""
    found, find = [], plans.Book.find

    def noted(book, key):
        plan = find(book, key)
        found.extend([plan] * (plan is not None))
        return plan

    monkeypatch.setattr(plans.Book, "find", noted)
    return found


def normed(rows=6, columns=40, dtype=torch.float32, offset=0, stride=None):
    """layer_norm's x, weight and bias, x in memory of that stride from that element on."""
    stride = stride or columns
    x = torch.randn(rows * stride + offset)[offset:].to(dtype).as_strided((rows, columns), (stride, 1), offset)
    return x, torch.randn(columns), torch.randn(columns)


def launched(gpu, call):
    """What libcuda saw of a call, and the call's result."""
    with gpu.recorded() as found:
        result = call()
    return found, result


def told(launches, *given):
    """Launches with each address named: the argument that it lies in, how far, or else whether it is aligned."""
    places = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in given]

    def name(value):
        for k, (begin, size) in enumerate(places):
            if begin <= value < begin + size:
                return f"argument {k} + {value - begin}"
        return f"memory % 16 = {value % 16}" if value > 1 << 40 and value < 1 << 48 else value

    return [(x.kernel, x.function, x.grid, x.threads, *map(name, x.parameters)) for x in launches]


def given_of(call):
    return [x for x in (*call.args, *call.keywords.values()) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_a_plan_launches_what_the_whole_way_does(gpu, used, name, grad):
    call = calls(CPU, [name], True)[name]
    with torch.set_grad_enabled(grad):
        first, second, third = (told(launched(gpu, call)[0], *given_of(call)) for _ in range(3))
        assert first == second == third and len(first) > 0
        assert used
        before = len(used)
        call()
        assert len(used) > before


@pytest.mark.parametrize("name", ["layer_norm", "gated_act", "batch_norm_act", "causal_attention", "bias_act"])
def test_backward_has_plans_too(gpu, used, name):
    call = calls(CPU, [name], True)[name]
    seen = []
    for _ in range(3):
        outputs = call()
        used.clear()
        grad, wanted = torch.ones_like(outputs), [x for x in given_of(call) if x.requires_grad]
        launches, _ = launched(gpu, lambda y=outputs, g=grad, w=wanted: torch.autograd.grad(y, w, g))
        seen.append(told(launches, *given_of(call), grad))
    assert used
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 0


def test_other_strides_alignments_and_dtypes_have_plans_of_their_own(gpu):
    arguments = [
        normed(), normed(stride=48), normed(offset=1), normed(offset=4), normed(7), normed(columns=41),
        normed(dtype=torch.bfloat16), normed(dtype=torch.float16),
    ]  # fmt: skip
    with plans.unused():
        expected = [told(launched(gpu, lambda a=a: ops.layer_norm(*a))[0], *a) for a in arguments]
    assert len({str(x) for x in expected}) == len(arguments)
    for _ in range(3):
        assert [told(launched(gpu, lambda a=a: ops.layer_norm(*a))[0], *a) for a in arguments] == expected


def test_numbers_are_of_a_signature_by_value_and_type(gpu):
    x, weight, bias = normed()
    keys = [planned.signature((x, value), {}) for value in (1, 1.0, True, "1", None, 0.0, 2.0)]
    assert len(set(keys)) == len(keys)
    assert planned.signature((x, -0.0), {}) is None
    for eps in (1e-5, 1e-3, 1e-5, 1e-3, 1e-5, 1e-3):
        found, _ = launched(gpu, lambda e=eps: ops.layer_norm(x, weight, bias, e))
        numbers = torch.tensor(found[0].parameters, dtype=torch.int64).to(torch.int32).view(torch.float32)
        assert numbers.tolist().count(pytest.approx(eps)) == 1


def test_what_is_refused_is_refused_beside_a_plan(gpu):
    x, weight, bias = normed()
    for _ in range(3):
        ops.layer_norm(x, weight, bias)
    for wrong in ((x, weight[:3]), (x, weight.double()), (x, weight, bias, -1.0), (x, weight, bias, "1e-5")):
        with pytest.raises((TypeError, ValueError), match="layer_norm"):
            ops.layer_norm(*wrong)


def test_settings_that_are_tried_are_launched(gpu):
    x, weight, bias = normed(64, 64)
    grids = []
    for elements in (None, 512, 4096, None):
        settings = {} if elements is None else {"elements": elements, "num_warps": 2}
        with tuned.tried("layer_norm/forward", settings):
            grids.append({launched(gpu, lambda: ops.layer_norm(x, weight, bias))[0][0].grid for _ in range(4)})
    assert grids[0] == grids[3] and grids[0] != grids[1] != grids[2]
    assert all(len(found) == 1 for found in grids)


def test_whoever_asks_for_settings_sees_every_call(gpu):
    arguments = normed()
    for _ in range(3):
        ops.layer_norm(*arguments)
    with tuned.asked() as asked:
        ops.layer_norm(*arguments)
        ops.layer_norm(*arguments)
    assert [x.name for x in asked] == ["layer_norm/forward"] * 2


def test_another_backend_is_another_signature(gpu):
    arguments = normed()
    for _ in range(3):
        for backend, count in (("triton", 1), ("reference", 0)):
            with use_backend(backend):
                assert len(launched(gpu, lambda: ops.layer_norm(*arguments))[0]) == count


def test_another_device_or_stream_is_launched_on(gpu):
    arguments, seen = normed(), []
    for device, stream in ((2000, 0), (2000, 5), (2001, 6), (2000, 7)):
        gpu.device, gpu.stream = device, stream
        for _ in range(3):
            (found,), _ = launched(gpu, lambda: ops.layer_norm(*arguments))
            assert found.stream == stream
            seen.append((device, found.function))
    assert len({function for _, function in seen}) == len(set(seen)) == 2


def test_a_precision_is_read_at_every_call(gpu):
    q, k, v = (torch.randn(1, 2, 32, 16) for _ in range(3))
    functions = []
    for precision in ("ieee", "tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = precision
        functions.append({launched(gpu, lambda: ops.causal_attention(q, k, v))[0][0].function for _ in range(4)})
    assert functions[0] == functions[2] != functions[1]
    assert all(len(found) == 1 for found in functions)


def test_rows_of_a_process_are_asked_for_at_every_call(gpu):
    mu, logvar, seen = torch.randn(4, 20), torch.randn(4, 20), []

    def offsets():
        found = [launched(gpu, lambda: ops.reparameterize(mu, logvar))[0][0].parameters for _ in range(4)]
        assert len({x[5:] for x in found}) == 1
        return found[0]

    for before in (None, 8, 12):
        block = contextlib.nullcontext() if before is None else rows.having(rows.Rows(before, 4, 16))
        with block:
            seen.append(offsets())
    assert [[offset in x for offset in (160, 240)] for x in seen] == [[False, False], [True, False], [False, True]]


def test_one_tensor_twice_makes_no_plan_for_two(gpu):
    q, k, v = (torch.randn(1, 2, 32, 16) for _ in range(3))
    for _ in range(4):
        found, _ = launched(gpu, lambda: ops.causal_attention(q, q, q))
        assert found[0].parameters[:3] == (q.data_ptr(),) * 3
    found, _ = launched(gpu, lambda: ops.causal_attention(q, k, v))
    assert found[0].parameters[:3] == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    for _ in range(3):
        found, _ = launched(gpu, lambda: ops.causal_attention(q, k, v))
    assert found[0].parameters[:3] == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    found, _ = launched(gpu, lambda: ops.causal_attention(q, q, k))
    assert found[0].parameters[:3] == (q.data_ptr(), q.data_ptr(), k.data_ptr())


def test_each_call_draws_its_seed(gpu):
    mu, logvar = torch.randn(4, 20, requires_grad=True), torch.randn(4, 20)

    def seeds():
        torch.manual_seed(5)
        return [int(ops.reparameterize(mu, logvar).grad_fn.saved_tensors[2]) for _ in range(4)]

    with plans.unused():
        expected = seeds()
    assert seeds() == seeds() == expected and len(set(expected)) == 4


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), named=None):
        return function(*arguments, **(named or {}))


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return function(*arguments, **(named or {}))


@contextlib.contextmanager
def _hook(name):
    hook = lambda *metadata: None  # noqa: E731
    chain = getattr(knobs.runtime, name)
    chain.add(hook)
    yield
    chain.remove(hook)


@contextlib.contextmanager
def _setting(name, value):
    before = getattr(knobs.runtime, name)
    setattr(knobs.runtime, name, value)
    yield
    setattr(knobs.runtime, name, before)


@pytest.mark.parametrize(
    "mode",
    [
        _Functions, _Dispatched, forward_ad.dual_level, plans.unused, lambda: _hook("launch_enter_hook"),
        lambda: _hook("launch_exit_hook"), lambda: _setting("debug", True),
        lambda: _setting("add_stages_inspection_hook", lambda *a: ("", "")),
        lambda: _setting("jit_cache_hook", lambda **a: False),
    ],
)  # fmt: skip
def test_whoever_listens_hears_the_whole_way(gpu, mode):
    x = torch.randn(4, 8)
    assert planned.signature((x,), {}) is not None
    with mode():
        assert planned.signature((x,), {}) is None
    assert planned.signature((x,), {}) is not None


def test_transforms_take_the_whole_way(gpu):
    x, seen = torch.randn(3, 4, 8), []

    def look(y):
        seen.append(planned.signature((y,), {}))
        return y.sum()

    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    y = x.requires_grad_() * 2

    def look_alone(y):
        look(y)

    y.register_hook(look_alone)
    torch.autograd.grad(y.sum(), x, torch.ones(2), is_grads_batched=True)
    assert len(seen) >= 4 and set(seen) == {None}


def test_a_compiled_call_takes_the_whole_way(gpu, used):
    x = torch.randn(4, 8)
    for _ in range(3):
        ops.layer_norm(x)
    used.clear()
    found = torch.compile(lambda x: ops.layer_norm(x) * 2, backend="eager", fullgraph=True)(x)
    assert found.shape == x.shape and not used


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 8).as_subclass(_Subclass), lambda: torch.randn(4, 8)._neg_view(),
        lambda: torch.zeros(4, 8).to_sparse(), lambda: torch.randn(0, 8), lambda: torch._efficientzerotensor((4, 8)),
        lambda: torch.nested.nested_tensor([torch.randn(4, 8)]), lambda: torch.randn(4, 8, device="meta"),
        lambda: [torch.randn(4, 8)],
    ],
)  # fmt: skip
def test_special_tensors_take_the_whole_way(gpu, make):
    x = torch.randn(4, 8)
    for arguments in ((make(),), (x, make())):
        assert planned.signature(arguments, {}) is None


def test_a_launch_hook_hears_a_call_that_has_a_plan(gpu):
    arguments, heard = normed(), []
    for _ in range(3):
        ops.layer_norm(*arguments)
    hook = lambda metadata: heard.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        ops.layer_norm(*arguments)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert heard == ["_layer_norm_forward"]


def test_what_looks_at_values_makes_no_plan(gpu, used):
    @planned.planned
    def op(x):
        return ops.layer_norm(x) if float(x.sum()) > 0 else x

    x = torch.ones(4, 8)
    assert op(x) is not x and op(x) is not x and op(x) is not x
    x.neg_()
    used.clear()
    assert op(x) is x and op(x) is x
    assert not used


def test_a_plan_keeps_no_memory(gpu):
    arguments = normed()
    weight = arguments[1].requires_grad_()
    kept = [weakref.ref(x) for x in arguments]
    for _ in range(4):
        y = ops.layer_norm(*arguments)
        kept.append(weakref.ref(y))
        y.sum().backward()
    del arguments, weight, y
    gc.collect()
    assert [x() for x in kept] == [None] * len(kept)


def test_a_signature_that_comes_once_makes_no_plan_and_few_are_kept(gpu, monkeypatch, used):
    monkeypatch.setattr(plans, "_MOST_KEPT", 8)
    x = torch.randn(4, 20)
    for offset in range(0, 80, 4):
        ops.reparameterize(x, x.clone(), seed=torch.tensor(3), offset=offset)
    assert not used
    for book in plans._books:
        assert len(book._seen) <= 8 and len(book._plans) <= 8


def test_an_error_while_a_plan_is_recorded_leaves_nothing(gpu):
    def fail(x):
        ops.layer_norm(x)
        raise RuntimeError("as always")

    op, x = planned.planned(fail), torch.randn(4, 8)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="as always"):
            op(x)
    assert recorder.watching() is None and not torch._C._len_torch_function_stack()
    from triton.runtime.jit import JITFunction

    assert not hasattr(JITFunction.run, "reports")


@pytest.mark.parametrize("name", EMULATED)
def test_numbers_by_a_plan_are_right(monkeypatch, used, name):
    op, _, case = name.partition("-")
    case = next(c for c in OPS[op].cases if str(c) == case) if case else OPS[op].cases[0]
    run = Run(OPS[op], case, torch.float32, "triton", "cpu")
    with emulated_gpu(90):
        monkeypatch.setattr(launch.emulated, "plans", True)
        monkeypatch.setattr(launch.emulated, "current_device", lambda: 1090, raising=False)
        monkeypatch.setattr(planned, "_hooked", lambda: False)  # the emulator's own change of the compiler
        for _ in range(3):
            assert_matches_reference(run)
    assert len(used) >= 2


def test_copies_of_arguments_share_a_plan(gpu, used):
    arguments = normed()
    for _ in range(2):
        ops.layer_norm(*arguments)
    used.clear()
    others = copy.deepcopy(arguments)
    found, y = launched(gpu, lambda: ops.layer_norm(*others))
    assert len(used) == 1
    assert found[0].parameters[:3] == tuple(x.data_ptr() for x in others) and found[0].parameters[3] == y.data_ptr()


@pytest.mark.parametrize("warps", [4, 8])
def test_a_convolution_is_launched_with_the_warps_that_are_tried(gpu, warps):
    call = calls(CPU, ["conv_transpose2d"], False)["conv_transpose2d"]
    with tuned.tried("conv_transpose/forward", {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": warps}):
        found, _ = launched(gpu, call)
    assert [x.threads for x in found] == [32 * warps]


def test_figures_are_printed_as_json(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["host_path", "layer_norm", "--json", "--rounds", "1"])
    main()
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == [LIGER, "layer_norm"]
    monkeypatch.setattr("sys.argv", ["host_path", "layer_nor"])
    with pytest.raises(SystemExit):
        main()
    assert "got layer_nor" in capsys.readouterr().err
