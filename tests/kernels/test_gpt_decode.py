"""GPTDecoder: the whole against nn.TransformerEncoderLayer, weights that change, and what the op's cases do not say."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops, use_backend
from genai_fast.kernels.common.spec import Tensors
from genai_fast.kernels.gpt_decode import layout
from genai_fast.registry import OPS

CASES = {case.name: case for case in OPS["gpt_decode"].cases}


def _weights(layers=2, channels=48, vocabulary=61, positions=40, hidden=None, tied=True, bias=True):
    generator = torch.Generator().manual_seed(3)
    size = layout.Sizes(vocabulary, channels, positions, layers, hidden or 4 * channels)
    found = {}
    for name, shape in zip(layout.names(layers), layout.shapes(size), strict=True):
        x = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.2)
        found[name] = x + (1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    if tied:
        del found["lm_head.weight"]
    return found if bias else {name: w for name, w in found.items() if not name.endswith("bias")}


def _ids(*shape, vocabulary=61):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(4))


def _transformer(weights, ids, heads):
    """logits [B, T, V] by PyTorch's own Transformer layers in float64."""
    wide = {name: w.double() for name, w in weights.items()}
    x = wide["transformer.wte.weight"][ids] + wide["transformer.wpe.weight"][: ids.size(1)]
    layers = len({name.split(".")[2] for name in weights if ".h." in name})
    for i in range(layers):
        own = {name.split(f".h.{i}.")[1]: w for name, w in wide.items() if f".h.{i}." in name}
        layer = nn.TransformerEncoderLayer(
            x.size(-1), heads, own["mlp.c_fc.weight"].size(0), 0.0, lambda h: F.gelu(h, approximate="tanh"),
            batch_first=True, norm_first=True, dtype=torch.float64,
        )  # fmt: skip
        theirs = {
            "self_attn.in_proj_": "attn.c_attn.",
            "self_attn.out_proj.": "attn.c_proj.",
            "linear1.": "mlp.c_fc.",
            "linear2.": "mlp.c_proj.",
            "norm1.": "ln_1.",
            "norm2.": "ln_2.",
        }
        state = {f"{a}{kind}": own[f"{b}{kind}"] for a, b in theirs.items() for kind in ("weight", "bias")}
        layer.load_state_dict(state)
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype), is_causal=True)
    x = F.layer_norm(x, x.shape[-1:], wide["transformer.ln_f.weight"], wide["transformer.ln_f.bias"])
    return (x @ wide.get("lm_head.weight", wide["transformer.wte.weight"]).T).detach()


def _step_by_step(decoder, ids):
    return torch.stack([decoder.step(column) for column in ids.unbind(1)], 1)


@pytest.mark.parametrize("tied", [True, False])
def test_steps_are_pytorchs_transformer(tied):
    weights, ids = _weights(tied=tied), _ids(3, 20)
    logits = _step_by_step(ops.GPTDecoder(weights, 4, 32, 3), ids)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits.double(), _transformer(weights, ids, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "allowed"), [("bfloat16", 0.03), ("int8", 0.05)])
def test_narrow_weights_are_near(dtype, allowed):
    weights, ids = _weights(), _ids(2, 20)
    truth = _transformer(weights, ids, 4)
    error = _step_by_step(ops.GPTDecoder(weights, 4, 32, 2, dtype), ids).double() - truth
    assert 1e-5 < error.norm() / truth.norm() < allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_one_by_one_in_parts_and_in_a_batch_are_bitwise_equal(dtype):
    weights, ids = _weights(channels=60, positions=100), _ids(9, 90)
    one = ops.GPTDecoder(weights, 5, 100, dtype=dtype)
    steps = _step_by_step(one, ids[4:5])
    assert one.length == 90
    one.reset()
    assert one.length == 0
    assert torch.equal(one.prefill(ids[4:5, :70]), steps[:, 69])
    assert torch.equal(one.append(ids[4:5, 70:89]), steps[:, 88])
    assert torch.equal(one.step(ids[4:5, 89]), steps[:, 89])
    many = ops.GPTDecoder(weights, 5, 100, 9, dtype)
    many.prefill(ids[:, :89])
    assert torch.equal(many.step(ids[:, 89])[4], steps[0, 89])


@pytest.mark.parametrize("name", ["wide", "prompt_in_parts", "batch", "int8"])
def test_thread_count_changes_nothing(name):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            inputs = CASES[name].inputs(Tensors())
            found.append((ops.gpt_decode(**inputs), inputs["cache"]))
    finally:
        torch.set_num_threads(before)
    for logits, cache in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(cache, found[0][1])


@pytest.mark.parametrize("limits", [{}, {"OMP_THREAD_LIMIT": "2"}], ids=str)
def test_threads_that_must_share_a_core_or_do_not_come(limits):
    """More threads than cores and sleeping waits, and fewer threads than were asked for."""
    code = (
        "import torch\n"
        "from genai_fast import ops\n"
        "from genai_fast.kernels.common.spec import Tensors\n"
        "from genai_fast.registry import OPS\n"
        "case = next(c for c in OPS['gpt_decode'].cases if c.name == 'wide')\n"
        "torch.set_num_threads(1)\n"
        "one = ops.gpt_decode(**case.inputs(Tensors()))\n"
        "torch.set_num_threads(12)\n"
        "for _ in range(5): assert torch.equal(one, ops.gpt_decode(**case.inputs(Tensors())))\n"
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_DYNAMIC": "false", **limits}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_float32_weights_are_not_copied():
    weights = _weights()
    decoder = ops.GPTDecoder(weights, 4, 32)
    held = {w.data_ptr() for w in decoder._weights}
    assert held == {w.data_ptr() for w in weights.values()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_that_change_are_seen(dtype):
    weights = {name: nn.Parameter(w) for name, w in _weights().items()}
    decoder, ids = ops.GPTDecoder(weights, 4, 32, dtype=dtype), _ids(1, 3)
    before = decoder.prefill(ids)
    with torch.no_grad():
        weights["transformer.h.1.mlp.c_fc.weight"].mul_(1.5)
    with pytest.raises(RuntimeError, match=r"GPTDecoder: expected the weights that made the 3 tokens.*reset\(\)"):
        decoder.step(ids[:, 0])
    assert decoder.length == 3
    after = decoder.prefill(ids)
    assert not torch.equal(after, before)
    decoder.reset()
    assert torch.equal(after, _step_by_step(decoder, ids)[:, -1])
    assert torch.equal(after, ops.GPTDecoder(weights, 4, 32, dtype=dtype).prefill(ids))


def test_refresh_reads_what_no_version_tells():
    weights, ids = _weights(), _ids(1, 3)
    decoder = ops.GPTDecoder(weights, 4, 32, dtype="bfloat16")
    decoder.prefill(ids)
    weights["transformer.ln_f.weight"].data.zero_()
    decoder.refresh()
    assert decoder.length == 0
    assert torch.equal(decoder.prefill(ids), ops.GPTDecoder(weights, 4, 32, dtype="bfloat16").prefill(ids))


def test_absent_biases_are_zeros():
    bare = _weights(bias=False)
    full = {name: torch.zeros_like(w) if name.endswith("bias") else w for name, w in _weights().items()}
    ids = _ids(2, 5)
    with torch.inference_mode():
        found = ops.GPTDecoder({name: w.clone() for name, w in bare.items()}, 4, 32, 2).prefill(ids)
    assert torch.equal(found, ops.GPTDecoder(full, 4, 32, 2).prefill(ids))


def test_a_head_that_is_the_embedding_stays_one():
    weights = _weights()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    decoder = ops.GPTDecoder(weights, 4, 32, dtype="int8")
    assert decoder._weights[0] is decoder._weights[-1] and decoder._scales[0] is decoder._scales[-1]
    del weights["lm_head.weight"]
    assert torch.equal(decoder.prefill(_ids(1, 4)), ops.GPTDecoder(weights, 4, 32, dtype="int8").prefill(_ids(1, 4)))


def test_the_reference_serves_too():
    weights, ids = _weights(), _ids(2, 6)
    found = ops.GPTDecoder(weights, 4, 32, 2).prefill(ids)
    with use_backend("reference"):
        torch.testing.assert_close(ops.GPTDecoder(weights, 4, 32, 2).prefill(ids), found, rtol=1e-5, atol=1e-5)


def _renamed(weights, old, new):
    return {new if name == old else name: w for name, w in weights.items()}


QKV = "transformer.h.1.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (lambda w: {**w, QKV: w[QKV].T}, {}, ValueError, rf"{QKV}: expected shape \(144, 48\), got \(48, 144\)"),
        (lambda w: {**w, QKV: w[QKV][:-1]}, {}, ValueError, rf"{QKV}: expected shape \(144, 48\), got \(143, 48\)"),
        (lambda w: {**w, QKV: w[QKV].int()}, {}, TypeError, rf"{QKV}: expected a floating.*got torch\.int32"),
        (lambda w: {**w, QKV: w[QKV].to("meta")}, {}, ValueError, rf"{QKV}: expected a CPU tensor, got one on meta"),
        (lambda w: {k: x for k, x in w.items() if k != QKV}, {}, ValueError, rf"expected a tensor '{QKV}'"),
        (lambda w: _renamed(w, QKV, "blocks.1.qkv"), {}, ValueError, r"expected GPT-2's names.*got 'blocks\.1\.qkv'"),
        (lambda w: w, {"heads": 5}, ValueError, r"heads: expected a divisor of 48 channels, got 5"),
        (lambda w: w, {"block": 41}, ValueError, r"block: expected at most 40.*got 41"),
        (lambda w: w, {"batch": 0}, ValueError, r"batch: expected an int of at least 1, got 0"),
        (lambda w: w, {"dtype": "float16"}, ValueError, r"dtype: expected one of 'float32'.*got 'float16'"),
    ],
)
def test_weights_that_do_not_fit(change, settings, error, message):
    with pytest.raises(error, match=rf"^GPTDecoder: .*{message}"):
        ops.GPTDecoder(change(_weights()), **{"heads": 4, "block": 32, **settings})


def test_tokens_that_do_not_fit_change_nothing():
    decoder, ids = ops.GPTDecoder(_weights(), 4, 8), _ids(1, 8)
    decoder.prefill(ids[:, :6])
    with pytest.raises(ValueError, match=r"^GPTDecoder: ids: expected at most 8 new tokens, as the cache holds 0 of 8"):
        decoder.prefill(_ids(1, 9))
    for wrong, error, message in (
        (ids[:, :3], ValueError, r"expected at most 2 new tokens, as the cache holds 6 of 8, got 3; reset"),
        (ids[:, :1] + 61, ValueError, r"ids: expected 0 to 60, got \d+"),
        (ids[:, :1].int(), TypeError, r"ids: expected an int64 tensor, got torch\.int32"),
        (ids[:, :1].expand(2, 1), ValueError, r"ids: expected a batch of 1, got 2"),
    ):
        with pytest.raises(error, match=rf"^GPTDecoder: .*{message}"):
            decoder.append(wrong)
    with pytest.raises(ValueError, match=r"ids: expected int64 \[1\].*got \(1, 1\)"):
        decoder.step(ids[:, :1])
    decoder.append(ids[:, 6:])
    with pytest.raises(ValueError, match=r"expected at most 0 new tokens"):
        decoder.step(ids[:, 0])
    assert decoder.length == 8 and "8 of 8 tokens" in repr(decoder)


@pytest.mark.parametrize("name", ["int8"])
def test_opcheck_and_compile(name):
    inputs = CASES[name].inputs(Tensors())
    cache = inputs.pop("cache")
    arguments = (cache.clone(), inputs["ids"], inputs["length"], inputs["weights"], inputs["scales"], 1e-5, False, "")
    torch.library.opcheck(torch.ops.genai_fast.gpt_decode.default, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(ops.gpt_decode, fullgraph=True, backend="aot_eager")
    caches = cache.clone(), cache.clone()
    assert torch.equal(compiled(cache=caches[0], **inputs), ops.gpt_decode(cache=caches[1], **inputs))
    assert torch.equal(*caches) and not torch.equal(caches[0], cache)


def test_the_raw_operator_refuses_what_would_read_foreign_memory():
    good = CASES["int8"].inputs(Tensors())
    weights, cache, ids, scales = good["weights"], good["cache"], good["ids"], good["scales"]
    names = ("cache", "ids", "length", "weights", "scales")

    def call(**changes):
        return torch.ops.genai_fast.gpt_decode(*({**good, **changes}[name] for name in names), 1e-5, False, "cpu")

    call()
    for changes in (
        {"cache": cache[:, :, :, :1].contiguous()}, {"cache": cache[:1]}, {"cache": cache.transpose(3, 4)},
        {"ids": ids.int()}, {"ids": ids + 65}, {"ids": ids - 65}, {"ids": ids[:, :0]}, {"length": 10}, {"length": -1},
        {"weights": weights[:-1]}, {"weights": [*weights[:4], weights[4].float(), *weights[5:]]},
        {"weights": [*weights[:4], weights[4][:-1], *weights[5:]]}, {"scales": scales[:-1]},
        {"scales": [scales[0].half(), *scales[1:]]}, {"weights": [*weights[:2], weights[2].half(), *weights[3:]]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"(genai_fast|gpt_decode: ids): expected"):
            call(**changes)
