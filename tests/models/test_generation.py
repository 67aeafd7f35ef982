"""Decoders give the forward's logits, samplers the distribution that they are asked for."""

import warnings

import pytest
import torch

from genai_fast import autotune, ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.models.common import cached
from genai_fast.models.common.generation import Sampler, decoder_for, generate, penalized
from genai_fast.models.gpt import GPT
from genai_fast.models.gpt import decoding as gpt_decoding
from genai_fast.models.gpt.decoding import CachedGPT
from genai_fast.models.lstm import LSTMLanguageModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 37
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def gpt(**options):
    torch.manual_seed(0)
    model = GPT(V, 24, 2, 2, 64, **options)
    with torch.no_grad():
        for p in model.parameters():  # far from uniform, so that a wrong cache shows
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.to(DEVICE)


def lstm(**options):
    torch.manual_seed(0)
    model = LSTMLanguageModel(V, 16, 24, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model.to(DEVICE)


MODELS = {"gpt": gpt, "lstm": lstm}
# CachedGPT by its name too: decoder_for may take another where there is a faster one.
DECODERS = {
    "gpt": (gpt, decoder_for),
    "gpt, layer by layer": (gpt, CachedGPT),
    "lstm": (lstm, decoder_for),
    "gpt without biases": (lambda **options: gpt(bias=False, **options), decoder_for),
}


def ids(rows, tokens, seed=1):
    return torch.randint(V, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, x):
    logits = model(x.to(DEVICE))
    return logits[0] if isinstance(logits, tuple) else logits


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@pytest.fixture(params=DECODERS)
def decoding(request):
    """(what makes a model, what makes its decoder)"""
    return DECODERS[request.param]


@pytest.mark.parametrize("begin", [1, 5, 24])
def test_step_by_step_is_the_whole_forward(decoding, begin):
    make, decoder_of = decoding
    model, x = make(), ids(3, 24)
    expected = forward(model, x)
    decoder = decoder_of(model, 3)
    for _ in range(2):  # a second prefill begins anew
        found = [decoder.prefill(x[:, :begin])]
        found += [decoder.step(x[:, t]) for t in range(begin, 24)]
        assert not found[0].requires_grad
        torch.testing.assert_close(torch.stack(found, 1), expected[:, begin - 1 :], **TOLERANCE)


@pytest.mark.skipif(DEVICE == "cuda" or bool(unavailable("cpu", "cpu")), reason="decoded by C++ on a CPU")
def test_a_gpt_on_a_cpu_is_decoded_in_one_call():
    model, x = gpt(), ids(2, 9)
    expected = forward(model, x)[:, -1]
    for weights, tolerance in (("float32", 1e-4), ("bfloat16", 0.05), ("int8", 0.1)):
        decoder = decoder_for(model, 2, weights)
        assert isinstance(decoder, ops.GPTDecoder)
        decoder.prefill(x[:, :4])
        for t in range(4, 9):
            found = decoder.step(x[:, t])
        assert (found - expected).norm() < tolerance * expected.norm(), weights
        assert weights == "float32" or not torch.equal(found, expected)
    with use_backend("reference"):
        assert isinstance(decoder_for(model, 2), CachedGPT)
    model.transformer.h[0].register_forward_hook(lambda *_: None)  # a hook must be called
    assert isinstance(decoder_for(model, 2), CachedGPT)
    for rounded in (model, lstm(), gpt().bfloat16()):
        with pytest.raises(ValueError, match=r"weights: expected 'float32' for .*, got 'int8'"):
            decoder_for(rounded, 1, "int8")


@pytest.mark.parametrize("begin", [1, 5])
def test_a_gpt_by_its_modules_step_by_step(begin):
    model, x = gpt(), ids(3, 24)
    decoder = CachedGPT(model, 3)
    found = [decoder.prefill(x[:, :begin])] + [decoder.step(x[:, t]) for t in range(begin, 24)]
    torch.testing.assert_close(torch.stack(found, 1), forward(model, x)[:, begin - 1 :], **TOLERANCE)


def by_kernels(model, x, begin):
    """The logits of each token behind the first ones, past the modules."""
    decoder = CachedGPT(model, len(x))
    decoder.prefill(x[:, :begin])
    with torch.no_grad():
        return torch.stack([decoder._by_kernels(x[:, t].to(DEVICE)) for t in range(begin, x.size(1))], 1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt_past_its_modules_step_by_step(bias):
    model, x = gpt(bias=bias), ids(3, 24)
    torch.testing.assert_close(by_kernels(model, x, 5), forward(model, x)[:, 5:], **TOLERANCE)
    found, expected = by_kernels(model.bfloat16(), x, 5), forward(model, x)[:, 5:]
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.skipif(bool(unavailable("triton", DEVICE)), reason="no Triton here")
def test_the_kernels_of_a_step():
    torch.manual_seed(0)
    model, x = GPT(V, 8, 1, 2, 32).to(DEVICE), ids(2, 4)
    with use_backend("triton"):
        assert gpt_decoding.serves(model, 16)
        found = by_kernels(model, x, 3)
    torch.testing.assert_close(found, forward(model, x)[:, 3:], **TOLERANCE)


@pytest.mark.skipif(bool(unavailable("triton", DEVICE)), reason="no Triton here")
def test_modules_that_are_not_plain_are_called():
    class Mine(torch.nn.Linear):
        pass

    for change in (
        lambda m: setattr(m.transformer.h[0].mlp, "c_fc", Mine(64, 256)),
        lambda m: m.lm_head.register_forward_hook(lambda *_: None),
        lambda m: m.transformer.ln_f.double(),
        lambda m: m.double(),
    ):
        model = gpt()
        with use_backend("triton"):
            assert gpt_decoding.serves(model, 16) and not gpt_decoding.serves(model, 17)
            change(model)
            assert not gpt_decoding.serves(model, 1)


@pytest.mark.parametrize("faster", ["modules", "kernels"])
def test_the_faster_of_two_captured_steps_is_kept(monkeypatch, tmp_path, faster):
    """With functions in the place of CUDA's graphs, and a clock that knows what it will find."""
    model, x, captured = gpt(), ids(2, 24), []

    def graphed(function, first, state):
        captured.append(function.__name__)
        return function

    def measure(device, ways, fixed):
        for call in [make() for make in ways.values()] * 2:
            call()
        return autotune.Choice(faster, {})

    monkeypatch.setattr(cached, "graphed", graphed)
    monkeypatch.setattr(gpt_decoding, "serves", lambda *_: True)
    monkeypatch.setattr(autotune, "_measure", measure)
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path))
    autotune.forget()
    for _ in range(2):  # the second decoder remembers
        decoder = CachedGPT(model, 2)
        monkeypatch.setattr(decoder, "_capture", True)
        found = [decoder.prefill(x[:, :20])] + [decoder.step(x[:, t]) for t in range(20, 24)]
        torch.testing.assert_close(torch.stack(found, 1), forward(model, x)[:, 19:], **TOLERANCE)
        assert decoder.path == faster
    assert captured == ["_by_modules", "_by_kernels", f"_by_{faster}"]
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")
    decoder = CachedGPT(model, 2)
    monkeypatch.setattr(decoder, "_capture", True)
    decoder.prefill(x[:, :3])
    decoder.step(x[:, 3])
    assert decoder.path == "modules" and captured[3:] == ["_by_modules"]
    autotune.forget()


def test_a_captured_step_serves_all_steps_and_prefills(monkeypatch):
    """With a recorder in the place of CUDA's graph, which knows the tensors of its capture alone."""
    model, x, captured = gpt(), ids(2, 24), []

    def graphed(function, first, state):
        static = first.clone()
        captured.append(state)

        def replay(given):
            static.copy_(given)
            return function(static)

        return replay

    monkeypatch.setattr(cached, "graphed", graphed)
    decoder, plain = CachedGPT(model, 2), CachedGPT(model, 2)
    monkeypatch.setattr(decoder, "_capture", True)
    monkeypatch.setattr(plain, "_capture", False)
    for begin in (3, 9):
        assert torch.equal(decoder.prefill(x[:, :begin]), plain.prefill(x[:, :begin]))
        for t in range(begin, 24):
            assert torch.equal(decoder.step(x[:, t]), plain.step(x[:, t]))
    assert len(captured) == 1 and captured[0].tolist() == [24, 24]  # what the warm-up must put back


def test_rows_are_on_their_own(decoding):
    make, decoder_of = decoding
    model, x = make(), ids(4, 12)
    together, alone = decoder_of(model, 4), decoder_of(model, 1)
    many = [together.prefill(x[:, :5])] + [together.step(x[:, t]) for t in range(5, 12)]
    one = [alone.prefill(x[2:3, :5])] + [alone.step(x[2:3, t]) for t in range(5, 12)]
    torch.testing.assert_close(torch.stack(many)[:, 2:3], torch.stack(one), **TOLERANCE)


def test_dropout_and_autocast_are_off_and_the_mode_stays(decoding):
    make, decoder_of = decoding
    model, plain, x = make(dropout=0.5), make(), ids(1, 6)
    expected = forward(plain, x)[:, -1]
    decoder = decoder_of(model.train(), 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        decoder.prefill(x[:, :5])
        found = decoder.step(x[:, 5])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert all(module.training for module in model.modules())


def test_generation_leaves_the_carried_state_alone():
    model, x = lstm(), ids(2, 9).to(DEVICE)
    ones = torch.ones(2, device=DEVICE)
    model.training_step(x[:, :-1], x[:, 1:], ones)
    before = model.carried()
    list(generate(model, [1, 2], max_tokens=4))
    assert all(torch.equal(model.carried()[name], before[name]) for name in before)
    model.eval()
    with torch.no_grad():
        model.training_step(x[:, :-1], x[:, 1:], ones)
        evaluated = model.h_evaluation.clone()
        list(generate(model, [1, 2], max_tokens=4))
    assert torch.equal(model.h_evaluation, evaluated)


def test_in_bfloat16():
    model, x = gpt().bfloat16(), ids(2, 8)
    expected = forward(model, x)[:, -1]
    decoder = decoder_for(model, 2)
    decoder.prefill(x[:, :4])
    for t in range(4, 8):
        found = decoder.step(x[:, t])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1 * expected.abs().max().item())


def greedy(model, prompt, count):
    """What generation at temperature 0 must give, by whole forwards: the documented window included."""
    block = getattr(model, "block", 10**9)
    context, held, out = list(prompt), min(len(prompt), block), []
    for _ in range(count):
        window = torch.tensor([context[-held:]])
        out.append(int(forward(model, window)[0, -1].argmax()))
        context.append(out[-1])
        held = block // 2 if held == block else held + 1
    return out


@pytest.mark.parametrize("length", [1, 7, 23, 24])
def test_greedy_generation_is_that_of_whole_forwards(make, length):
    model = make()
    prompt = ids(1, length, seed=length)[0]
    expected = greedy(model, prompt.tolist(), 40)  # passes the block twice
    assert list(generate(model, prompt, max_tokens=40, temperature=0)) == expected
    assert len(set(expected)) > 2


def test_a_block_of_one_token():
    torch.manual_seed(0)
    model = GPT(V, 1, 1, 1, 8).to(DEVICE)
    found = list(generate(model, [3], max_tokens=5, temperature=0))
    for before, after in zip([3, *found], found, strict=False):
        assert after == forward(model, torch.tensor([[before]]))[0, -1].argmax()


def test_a_long_prompt_is_cut_with_a_warning():
    model, prompt = gpt(), ids(1, 30)[0]
    with pytest.warns(UserWarning, match="the prompt has 30 tokens, the model sees 24: the first 6 are cut"):
        found = list(generate(model, prompt, max_tokens=6, temperature=0))
    assert found == list(generate(model, prompt[6:], max_tokens=6, temperature=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(generate(lstm(), prompt, max_tokens=2))  # which has no block


def test_seeds_make_texts(make):
    model = make()
    one, same, other = (list(generate(model, [1, 2, 3], max_tokens=30, seed=s)) for s in (1, 1, 2))
    assert one == same != other
    assert len(one) == 30 and all(0 <= token < V for token in one)
    state = torch.get_rng_state()
    list(generate(model, [1], max_tokens=3, seed=5))
    assert torch.equal(torch.get_rng_state(), state)  # a seed moves no other generator
    torch.manual_seed(9)
    drawn = list(generate(model, [1], max_tokens=20))
    torch.manual_seed(9)
    assert drawn == list(generate(model, [1], max_tokens=20))


def test_the_stop_token_ends_the_text(make):
    model = make()
    text = list(generate(model, [4], max_tokens=30, seed=3))
    stop = text[12]
    assert list(generate(model, [4], max_tokens=30, seed=3, stop_id=stop)) == text[: text.index(stop)]


def test_tokens_come_as_they_are_drawn(monkeypatch):
    calls, draw = [], Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits: calls.append(1) or draw(self, logits))
    tokens = generate(gpt(), [1], max_tokens=10**9)
    assert not calls
    for count in range(1, 4):
        next(tokens)
        assert len(calls) == count


PROBABILITIES = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]])


def drawn(count=20000, logits=None, **options):
    """How often each token came."""
    logits = PROBABILITIES.log() if logits is None else logits
    found = Sampler(seed=0, **options)(logits.expand(count, -1))
    return torch.bincount(found, minlength=logits.size(-1)) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"temperature": 0.5}, [0.0092, 0.5872, 0.0367, 0.2294, 0.1468]),
        ({"temperature": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 0.6154, 0, 0.3846, 0]),
        ({"top_k": 9}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"top_p": 0.6}, [0, 0.6154, 0, 0.3846, 0]),  # 0.4 alone is less, 0.65 is enough
        ({"top_p": 0.7}, [0, 0.4706, 0, 0.2941, 0.2353]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),  # the likeliest always can
        ({"top_k": 3, "top_p": 0.7}, [0, 0.6154, 0, 0.3846, 0]),  # of the three's own probabilities
    ],
)
def test_samplers_draw_the_distribution(options, expected):
    found = drawn(**options)
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=0, atol=0.015)
    assert torch.equal(found > 0, torch.tensor(expected) > 0)


def test_impossible_tokens_never_come():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for options in ({}, {"top_k": 4}, {"top_p": 0.999}):
        found = drawn(logits=logits, **options)
        assert found[[0, 2, 4]].sum() == 0 and abs(found[1] - 0.5) < 0.02


def test_equally_likely_tokens_are_treated_alike():
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]])
    for options in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"top_k": 2, "top_p": 0.9}):
        torch.testing.assert_close(
            drawn(logits=logits, **options), torch.tensor([0, 1, 1, 1, 0]) / 3, rtol=0, atol=0.015
        )


def test_a_draw_at_the_end_of_the_distribution(monkeypatch):
    """Where rounding leads past all sums, the last token that can come is drawn."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape, dtype=torch.float64))
    for options, expected in (({}, 4), ({"top_k": 2}, 3), ({"top_p": 0.7}, 4)):
        assert Sampler(**options)(PROBABILITIES.log()) == expected
    assert Sampler()(torch.tensor([[0.0, 0.0, -torch.inf]])) == 1


def test_logits_of_any_floating_type_and_shape():
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    found = Sampler(temperature=0)(logits)
    assert found.dtype == torch.int64 and torch.equal(found, logits.argmax(-1))
    drawn = Sampler(seed=4)(logits)
    for shape in ((2, 3, V), (6, 1, V)):
        assert torch.equal(Sampler(seed=4)(logits.view(shape)), drawn.view(shape[:-1]))
    single = Sampler(seed=4, top_k=5, top_p=0.9)
    assert [int(single(row)) for row in logits] == Sampler(seed=4, top_k=5, top_p=0.9)(logits).tolist()
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="logits: expected finite ones"):
            Sampler()(torch.tensor([[0.0, wrong]]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number >= 0, got nan"),
        ({"temperature": "1"}, TypeError, "temperature: expected a float, got '1'"),
        ({"top_k": -1}, ValueError, "top_k: expected at least 1, or 0 for all, got -1"),
        ({"top_k": 1.5}, TypeError, "top_k: expected an int, got 1.5"),
        ({"top_p": 0}, ValueError, "top_p: expected 0 < top_p <= 1, got 0"),
        ({"seed": "x"}, TypeError, "seed: expected an int, got 'x'"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"prompt_ids": []}, ValueError, r"prompt_ids: expected token ids \[T\], T >= 1, got shape \(0,\)"),
        ({"prompt_ids": [[1]]}, ValueError, r"prompt_ids: expected token ids \[T\], T >= 1, got shape \(1, 1\)"),
        ({"prompt_ids": [V]}, ValueError, f"prompt_ids: expected token ids from 0 to {V - 1}, got {V}"),
        ({"prompt_ids": [0.5]}, TypeError, "prompt_ids: expected token ids of torch.int64, got torch.float32"),
        ({"stop_id": V}, ValueError, f"stop_id: expected a token id from 0 to {V - 1}, got {V}"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model: expected a GPT or an LSTMLanguageModel, got Linear"),
    ],
)
def test_misuse_is_named_at_the_call(options, error, message):
    arguments = {"model": gpt(), "prompt_ids": [1], "max_tokens": 3, **options}
    with pytest.raises(error, match=message):
        generate(arguments.pop("model"), arguments.pop("prompt_ids"), **arguments)


def test_decoders_say_what_does_not_fit():
    model = gpt()
    decoder = CachedGPT(model, 2)
    with pytest.raises(ValueError, match="step: expected 1 to 23 tokens before this one, got 0; remedy: prefill"):
        decoder.step(ids(2, 1)[:, 0])
    with pytest.raises(ValueError, match="expected at most block=24 tokens, got 25"):
        decoder.prefill(ids(2, 25))
    with pytest.raises(ValueError, match="expected 2 rows, got 3"):
        decoder.prefill(ids(3, 2))
    decoder.prefill(ids(2, 24))
    with pytest.raises(ValueError, match="step: expected 1 to 23 tokens before this one, got 24"):
        decoder.step(ids(2, 1)[:, 0])
    decoder.prefill(ids(2, 3))
    with pytest.raises(ValueError, match="expected 2 rows, got 1"):
        decoder.step(ids(1, 1)[:, 0])
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        decoder_for(model, 0)


def test_min_p_and_the_repetition_penalty_are_those_of_transformers():
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = 3 * torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    kept = processors.MinPLogitsWarper(0.1)(None, logits.double() / 0.7).isfinite()
    drawn = torch.zeros(4, V, dtype=torch.bool)
    sampler = Sampler(temperature=0.7, min_p=0.1, seed=0)
    for _ in range(400):
        drawn[torch.arange(4), sampler(logits)] = True
    assert not (drawn & ~kept).any() and (drawn | ~kept).float().mean() > 0.9
    assert torch.equal(Sampler(min_p=1.0)(logits), logits.argmax(-1))
    seen = [1, 5, 9]
    expected = processors.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen] * 4), logits)
    torch.testing.assert_close(penalized(logits, seen, 1.3), expected)


def test_a_repetition_penalty_counts_prompt_and_text():
    model, text = gpt(), [3, 4]
    found = list(generate(model, text, max_tokens=15, temperature=0, repetition_penalty=50.0))
    for token in found:
        logits = forward(model, torch.tensor([text]))[0, -1]
        assert token == penalized(logits, [*set(text)], 50.0).argmax()
        text = [*text, token]
    assert len({*text}) > len({*generate(model, [3, 4], max_tokens=15, temperature=0)})
    with pytest.raises(ValueError, match="repetition_penalty: expected a finite number above 0, got 0"):
        generate(model, [1], max_tokens=1, repetition_penalty=0)
    with pytest.raises(ValueError, match="min_p: expected 0 <= min_p <= 1, got 2"):
        generate(model, [1], max_tokens=1, min_p=2)
