"""LlamaDecoder: tokens alone, in batches and in prompts, narrow caches, and weights that change or do not fit."""

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.kernels.common.spec import Tensors
from genai_fast.models import Llama
from genai_fast.registry import OPS

CASES = {case.name: case for case in OPS["llama_decode"].cases}


def model(**more):
    torch.manual_seed(0)
    found = Llama(61, 40, 2, 4, 48, **{"kv_heads": 2, "window": 9, "full_layers": 1, "qk_norm": True, **more})
    with torch.no_grad():
        for p in found.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return found


def decoder(found, batch=1, dtype="float32", **more):
    more = {"windows": found.windows, "softcap": found.softcap, "eps": found.norm_eps, **more}
    return ops.LlamaDecoder(found.state_dict(), found.cos, found.sin, 4, 40, batch, dtype, **more)


def ids(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_token_has_the_same_bits_alone_in_a_batch_and_in_a_prompt(dtype):
    found, x = model(bias="all"), ids(9, 33)
    many = decoder(found, 9, dtype)
    together = many.prefill(x)
    one = decoder(found, 1, dtype)
    one.prefill(x[4:5, :5])
    for t in range(5, 33):
        last = one.step(x[4:5, t])
    assert torch.equal(last, together[4:5]) and one.length == 33


def test_the_numbers_of_the_threads_change_nothing():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(ops.llama_decode(**CASES["wide"].inputs(Tensors())))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_narrow_cache_holds_what_it_rounds(backend):
    found, x = model(softcap=5.0), ids(2, 30)
    with use_backend(backend):
        exact, narrow = (decoder(found, 2, cache=cache).prefill(x) for cache in ("float32", "bfloat16"))
    assert 0 < (narrow - exact).norm() < 0.03 * exact.norm()
    with use_backend("reference"):
        expected = decoder(found, 2, cache="bfloat16").prefill(x)
    assert (narrow - expected).norm() < 3e-3 * expected.norm()


def test_changed_weights_are_seen():
    found, x = model(), ids(1, 3)
    one = decoder(found)
    one.prefill(x)
    with torch.no_grad():
        found.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"LlamaDecoder: expected the weights that made the 3 tokens"):
        one.step(x[:, 0])
    assert torch.equal(one.prefill(x), decoder(found).prefill(x))


def test_meta_and_compiled_calls():
    inputs = CASES["one_token"].inputs(Tensors())
    order = ("cache", "ids", "length", "weights", "scales", "cos", "sin", "heads", "windows", "softcap")
    arguments = (*(inputs[name] for name in order), 1e-5, False, "cpu")
    torch.library.opcheck(torch.ops.genai_fast.llama_decode.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), r"weights: expected a tensor 'model\.norm\.weight'"),
        (lambda s: s.update(more=torch.ones(1)), "expected Hugging Face's names of a Llama .*got 'more'"),
        (lambda s: s.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight: expected shape \(48,\)"),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(36, 48)}),
            r"o_proj\.weight: expected",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    state, found = model(qk_norm=False).state_dict(), model()
    change(state)
    with pytest.raises(ValueError, match=rf"^LlamaDecoder: .*{message}"):
        ops.LlamaDecoder(state, found.cos, found.sin, 4, 40)


def test_misuse_is_named():
    one = decoder(model())
    with pytest.raises(ValueError, match="LlamaDecoder: ids: expected at most 40 new tokens"):
        one.prefill(ids(1, 41))
    with pytest.raises(ValueError, match="block: expected at most 40, the rows of cos, got 41"):
        ops.LlamaDecoder(model().state_dict(), model().cos, model().sin, 4, 41)
    with pytest.raises(ValueError, match=r"cache: expected .*got 'int8'"):
        decoder(model(), cache="int8")
