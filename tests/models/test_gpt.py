"""GPT against the same as everybody writes it, and GPT-2's checkpoints of every layout."""

import copy
from unittest import mock

import pytest
import safetensors.torch
import torch
from alike import assert_close, assert_gradients, gradients

from genai_fast.errors import UsageError
from genai_fast.models.common import language
from genai_fast.models.gpt import GPT, load_gpt2
from genai_fast.models.gpt.plain import PlainGPT
from genai_fast.optim import Adam

SIZES = dict(vocabulary=41, block=24, layers=2, heads=2, width=64)
MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def small(seed=0, **options):
    """Weights as after some training: biases and norms are not 0 and 1, so that a wrong one shows."""
    torch.manual_seed(seed)
    model = GPT(**SIZES, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def pair(**options):
    model, peer = small(**options), PlainGPT(**SIZES, **options)
    peer.load_state_dict(model.state_dict())
    return model, peer


def batch(rows=3, tokens=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZES["vocabulary"], (rows, tokens + 1), generator=generator)
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def test_keys_are_gpt2s_and_weights_load_both():
    model, peer = pair()
    model.load_state_dict(peer.state_dict())
    assert [*model.state_dict()] == [*peer.state_dict()]
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{i}.{name}.{p}" for i in range(2) for name in block for p in ("weight", "bias")]
    names += ["ln_f.weight", "ln_f.bias"]
    assert [*model.state_dict()] == [*(f"transformer.{name}" for name in names), "lm_head.weight"]
    assert not any(name.endswith("bias") for name in GPT(**SIZES, bias=False).state_dict())


def test_the_presets_have_the_sizes_that_they_are_known_for():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT.gpt2().parameters()) == 124_439_808
        nano = GPT.nano(65)
        assert sum(p.numel() for p in nano.transformer.h.parameters()) == 10_646_784
    assert (nano.block, nano.heads, nano.transformer.wpe.weight.shape) == (256, 6, (256, 384))


def test_initialised_as_gpt2():
    torch.manual_seed(0)
    for model in (GPT(300, 64, 8, 2, 64), PlainGPT(300, 64, 8, 2, 64)):
        for name, p in model.named_parameters():
            if p.dim() == 2:
                expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
                assert abs(p.std() / expected - 1) < 0.06 and abs(p.mean()) < 0.1 * expected, name
            else:
                assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [24, 7, 1])
def test_logits_and_gradients_are_the_peers(bias, tokens):
    model, peer = pair(bias=bias)
    x, y = batch(tokens=tokens)
    y[0, 0] = -100  # does not count
    assert_close(model(x), peer(x))
    losses = model.training_step(x, y)
    expected = peer.loss(x, y)
    assert losses.loss.shape == () and losses.loss.dtype == torch.float32
    assert_close(losses.loss, expected)
    assert_gradients(gradients(model, losses.loss), gradients(peer, expected))


@pytest.mark.parametrize("autocast", [False, True])
def test_many_logits_are_made_by_chunks(autocast, monkeypatch):
    model = small()
    x, y = batch()
    y[1, 3] = -100
    found = []
    for most in (x.numel() * 41, x.numel() * 41 - 1):
        monkeypatch.setattr(language, "MOST_LOGITS", most)
        with (
            mock.patch.object(language.ops, "cross_entropy", wraps=language.ops.cross_entropy) as whole,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            loss = model.training_step(x, y).loss
        found.append((whole.call_count, loss, gradients(model, loss)))
    assert [whole for whole, _, _ in found] == [1, 0]
    assert_close(found[1][1], found[0][1], 1e-2 if autocast else 2e-5)
    assert_gradients(found[1][2], found[0][2], 0.1 if autocast else 1e-3)


def test_it_learns_as_the_peer_does():
    model, peer = pair()
    curves = []
    for m, loss, adam in (
        (model, lambda x, y: model.training_step(x, y).loss, Adam(model.parameters(), lr=3e-3)),
        (peer, peer.loss, torch.optim.Adam(peer.parameters(), lr=3e-3)),
    ):
        curve = []
        for step in range(50):
            found = loss(*batch(seed=step % 3))
            m.zero_grad()
            found.backward()
            adam.step()
            curve.append(found.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=2e-4, atol=0)
    assert curves[0][-1] < 0.7 * curves[0][0]


def test_under_autocast():
    model, peer = pair()
    x, y = batch()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss, expected = model(x), model.training_step(x, y).loss, peer.loss(x, y)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_close(logits.float(), exact, 3e-2)
    assert_close(loss, expected.float(), 1e-2)
    assert_gradients(gradients(model, loss), gradients(peer, expected), 0.1)


def test_in_bfloat16_throughout():
    model = small()
    x, y = batch()
    exact = model(x)
    model = model.bfloat16()
    assert_close(model(x).float(), exact, 5e-2)
    found = gradients(model, model.training_step(x, y).loss).values()
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in found)


def test_no_token_sees_a_later_one():
    model = small()
    x, _ = batch()
    with torch.no_grad():
        before = model(x)
        x[:, 15] = (x[:, 15] + 1) % SIZES["vocabulary"]
        after = model(x)
    assert torch.equal(after[:, :15], before[:, :15])
    assert not torch.equal(after[:, 15], before[:, 15])


def test_dropout_is_of_training_alone():
    model, plain = small(dropout=0.5), small()
    x, y = batch()
    assert torch.equal(model.eval()(x), plain(x))
    model.train()
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(model.training_step(x, y).loss)
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != plain.training_step(x, y).loss
    assert all(g.abs().sum() > 0 for g in gradients(model, losses[0]).values())


def test_used_twice_before_backward():
    model = small()
    single = [gradients(model, model.training_step(*batch(seed=seed)).loss) for seed in (1, 2)]
    first, second = (model.training_step(*batch(seed=seed)).loss for seed in (1, 2))
    together = gradients(model, first + second)
    assert_gradients(together, {name: single[0][name] + single[1][name] for name in together}, 1e-5)


def test_under_compile():
    torch.manual_seed(0)
    model, (x, y) = GPT(41, 24, 1, 2, 64), batch()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: model.training_step(x, y).loss, fullgraph=True, backend="aot_eager")
    expected = model.training_step(x, y).loss
    found = compiled(x, y)
    assert_close(found, expected)
    assert_gradients(gradients(model, found), gradients(model, expected))


def tied(model):
    return model.lm_head.weight is model.transformer.wte.weight


def test_the_head_stays_tied():
    model = small()
    state = {name: p + 1 for name, p in model.state_dict().items()}
    for change in (
        lambda m: copy.deepcopy(m),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to_empty(device="meta"),
        lambda m: m.load_state_dict(state) and m,
        lambda m: m.load_state_dict(state, assign=True) and m,
    ):
        changed = change(copy.deepcopy(model))
        assert tied(changed)
        assert sum(p is changed.lm_head.weight for p in changed.parameters()) == 1
    torch.testing.assert_close(changed.lm_head.weight, model.lm_head.weight + 1)
    with torch.device("meta"):
        empty = GPT(**SIZES)
    assert tied(empty.to_empty(device="cpu"))


@pytest.mark.parametrize("head", [torch.nn.Linear(64, 2, bias=False), torch.nn.Linear(64, 41), torch.nn.Identity()])
def test_a_replaced_head_stays(head):
    """Also one of the embedding's own sizes, which could be tied to it."""
    model, (x, _) = small(), batch()
    model.lm_head = copy.deepcopy(head)
    expected = model(x)
    for change in (
        lambda m: m.to("cpu"),
        lambda m: m.half().float(),
        lambda m: m.to_empty(device="meta").to_empty(device="cpu"),
        lambda m: m,
    ):
        changed = change(copy.deepcopy(model))
        for assign in (False, True):
            changed.load_state_dict(model.state_dict(), assign=assign)
            assert_close(changed(x), expected, 1e-5)
    state = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}
    if "lm_head.weight" in model.state_dict():
        with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
            model.load_state_dict(state)


def test_a_parametrized_embedding_stays_tied():
    model, (x, _) = small(), batch()
    torch.nn.utils.parametrize.register_parametrization(model.transformer.wte, "weight", torch.nn.Identity())
    expected = model(x)
    moved = copy.deepcopy(model).to_empty(device="meta").to_empty(device="cpu")
    moved.load_state_dict(model.state_dict())
    assert moved.lm_head.weight is moved.transformer.wte.parametrizations.weight.original
    assert_close(moved(x), expected, 1e-6)


def test_a_state_without_the_head_loads():
    model, other = small(), small(seed=1)
    state = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}
    other.load_state_dict(state)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert "lm_head.weight" not in state
    inside = torch.nn.ModuleDict({"text": small(seed=1)})
    inside.load_state_dict({f"text.{name}": p for name, p in state.items()})
    assert tied(inside["text"]) and torch.equal(inside["text"].lm_head.weight, model.lm_head.weight)
    del state["transformer.wpe.weight"]
    with pytest.raises(RuntimeError, match=r"transformer\.wpe\.weight"):
        other.load_state_dict(state)


def hugging_face(model, prefix="transformer.", head=True):
    """Conv1D's [in, out], the masks of older files, and the head or not."""
    state = {}
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and not head:
            continue
        name = name if name == "lm_head.weight" else prefix + name.removeprefix("transformer.")
        state[name] = (p.t() if name.endswith(MATRICES) else p).contiguous().clone()
    for i in range(len(model.transformer.h)):
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


LAYOUTS = {
    "hugging face": hugging_face,
    "hugging face, body alone": lambda model: hugging_face(model, "", False),
    "linear": lambda model: dict(model.state_dict()),
    "compiled": lambda model: {f"_orig_mod.{name}": p for name, p in model.state_dict().items()},
    "distributed": lambda model: {f"module.{name}": p for name, p in model.state_dict().items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpt2_checkpoints_of_every_layout(layout):
    model = small()
    tensors = LAYOUTS[layout](model)
    x, _ = batch()
    for found in (load_gpt2(None, tensors, heads=2), load_gpt2(small(seed=1), tensors)):
        assert tied(found)
        assert torch.equal(found(x), model(x))
        assert next(found.parameters()).requires_grad


def test_gpt2_files(tmp_path):
    model = small()
    x, _ = batch()
    # Weights that share memory are what safetensors refuses, so files lack the head.
    safetensors.torch.save_file(hugging_face(model, "", False), tmp_path / "model.safetensors")
    torch.save(hugging_face(model), tmp_path / "a.bin")
    torch.save({"model": model.state_dict(), "model_args": {"n_head": 2}, "iter_num": 5}, tmp_path / "ckpt.pt")
    for path in (tmp_path / "model.safetensors", tmp_path, tmp_path / "a.bin", tmp_path / "ckpt.pt"):
        assert torch.equal(GPT.from_gpt2(path, heads=2)(x), model(x))
    assert GPT.from_gpt2(tmp_path).heads == 1  # width / 64, as GPT-2's own


def test_gpt2_files_without_biases(tmp_path):
    model = small(bias=False)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    x, _ = batch()
    assert torch.equal(GPT.from_gpt2(tmp_path / "plain.pt", heads=2)(x), model(x))


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UsageError, match=r"evil\.pt: expected \.safetensors, or a torch file that holds tensors"):
        GPT.from_gpt2(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    for name, message in {
        "none.pt": "got no such file",
        "cut.safetensors": "expected safetensors, got a file that cannot be read",
        "notes.pt": "expected .safetensors, or a torch file",
        "list.pt": "expected a state dict, got list",
        "": "expected model.safetensors or pytorch_model.bin in this folder",
    }.items():
        with pytest.raises(UsageError, match=message):
            GPT.from_gpt2(tmp_path / name)


def _without(key):
    return lambda state: state.pop(key)


def _with(key, value):
    return lambda state: state.update({key: value})


CHANGES = {
    r"transformer\.h\.1\.mlp\.c_fc\.weight: expected a tensor \[256, 64\], got none": _without("h.1.mlp.c_fc.weight"),
    r"transformer\.wte\.weight: expected a matrix, got none; is this": _without("wte.weight"),
    r"transformer\.extra\.weight: expected no such tensor": _with("extra.weight", torch.zeros(2)),
    r"h\.0\.attn\.c_attn\.weight: expected \[192, 64\] \(nn\.Linear\) or \[64, 192\] \(Conv1D\) .*got \[5, 7\]": _with(
        "h.0.attn.c_attn.weight", torch.zeros(5, 7)
    ),
    r"transformer\.ln_f\.weight: expected shape \[64\], got \[63\]": _with("ln_f.weight", torch.zeros(63)),
    r"lm_head\.weight: expected transformer\.wte\.weight again": _with("lm_head.weight", torch.zeros(41, 64)),
    r"h\.0\.ln_1\.weight: expected a tensor, got str": _with("h.0.ln_1.weight", "x"),
    r"wpe\.weight: expected one tensor of this name": _with("transformer.wpe.weight", torch.zeros(24, 64)),
}


@pytest.mark.parametrize("message", CHANGES)
def test_checkpoints_that_do_not_fit_are_named(message):
    model, other = small(), small(seed=1)
    state = hugging_face(model, "", False)
    CHANGES[message](state)
    before = copy.deepcopy(other.state_dict())
    for target in (None, other):
        with pytest.raises(ValueError, match=message):
            load_gpt2(target, state, heads=2)
    assert all(torch.equal(p, before[name]) for name, p in other.state_dict().items())


def test_a_model_of_other_sizes_is_named():
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight: expected shape \[16, 64\], got \[24, 64\]"):
        load_gpt2(GPT(**{**SIZES, "block": 16}), small().state_dict())
    narrow = GPT(20, 8, 1, 2, 48)
    with pytest.raises(ValueError, match="heads: expected a number of heads, as a width of 48 is no multiple of 64"):
        load_gpt2(None, narrow.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT(0), "vocabulary: expected at least 1, got 0"),
        (lambda: GPT(9, heads=5), "heads: expected a divisor of width=384, got 5"),
        (lambda: GPT(9, dropout=1.0), "dropout: expected 0 <= dropout < 1, got 1.0"),
        (lambda: small()(torch.zeros(1, 25, dtype=torch.long)), "expected at most block=24 tokens, got 25"),
        (lambda: small()(torch.zeros(5, dtype=torch.long)), r"expected token ids \[B, T\], T >= 1, got shape \(5,\)"),
        (
            lambda: small()(torch.full((1, 2), 41)),
            "from 0 to 40, got 41; encode the text with the model's own tokenizer",
        ),
        (lambda: small()(torch.full((1, 2), -1)), "expected token ids from 0 to 40, got -1"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ids_are_integers():
    with pytest.raises(TypeError, match=r"x: expected token ids of torch.int64, got torch.float32"):
        small()(torch.zeros(1, 2))
