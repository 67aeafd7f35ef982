"""Models of transformers as they come: fused they compute the same, and all that is done with them still works."""

import copy
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="pip install .[huggingface]")

from alike import assert_close, assert_gradients_close, calls_of
from hugging_face_models import LANGUAGE_MODELS, WITH_RMS_NORM, autoencoder, language_model, tokens, unet

from genai_fast import explain, fuse, lazy_logits, unfuse
from genai_fast.fusion.classes import original

pytestmark = pytest.mark.usefixtures("small_is_fused")
every = pytest.mark.parametrize("name", LANGUAGE_MODELS)


def _pair(name, **settings):
    plain = language_model(name, **settings)
    return plain, fuse(copy.deepcopy(plain))


def _gradients(model, **given):
    out = model(**given)
    out.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out, found


def _assert_alike(fused, plain, tolerance=1e-4, **given):
    given = given or dict(input_ids=tokens(), labels=tokens())
    expected, expected_gradients = _gradients(plain, **given)
    found, gradients = _gradients(fused, **given)
    assert_close(found.logits, expected.logits, tolerance, what="logits")
    assert_close(found.loss, expected.loss, tolerance, what="loss")
    assert gradients.keys() == expected_gradients.keys()
    assert_gradients_close(gradients, expected_gradients, 10 * tolerance)


@every
def test_logits_loss_and_gradients(name):
    plain, fused = _pair(name)
    _assert_alike(fused, plain)


@pytest.mark.parametrize("name", WITH_RMS_NORM)
def test_every_norm_product_and_turn_is_served(name):
    plain, fused = _pair(name)
    norms = sum("RMSNorm" in type(module).__name__ for module in plain.modules())
    rows = [row.becomes.partition(" (")[0] for row in explain(plain)]
    assert rows.count("rms_norm") == norms
    assert [rows.count(name) for name in ("rms_norm with its sum", "gated_act", "rotary")] == [2, 2, 2]
    with calls_of("rms_norm", named=True) as normed, calls_of("gated_act") as gated, calls_of("rotary") as turned:
        fused(tokens())
    assert (len(normed), len(gated), len(turned)) == (norms, 2, 4)
    assert sum("residual" in named for named in normed) == 2


@every
def test_unfuse_gives_back_every_class(name):
    plain, fused = _pair(name)
    assert any(original(type(module)) is not type(module) for module in fused.modules())
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


@every
def test_twenty_steps_of_training(name):
    losses = []
    for model in _pair(name):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        losses.append([])
        for step in range(20):
            batch = tokens(seed=step % 4)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), 2e-3)


@every
def test_generation(name):
    plain, fused = _pair(name)
    settings = dict(max_new_tokens=12, do_sample=False)
    expected = plain.eval().generate(tokens()[:, :5], **settings)
    assert torch.equal(fused.eval().generate(tokens()[:, :5], **settings), expected)


@every
def test_bfloat16(name):
    plain, fused = _pair(name)
    exact = language_model(name)(tokens()).logits
    plain, fused = plain.bfloat16(), fused.bfloat16()
    expected, found = plain(tokens()).logits, fused(tokens()).logits
    assert found.dtype is expected.dtype is torch.bfloat16
    error = (expected.float() - exact).norm().item()
    assert (found.float() - exact).norm().item() <= 1.1 * error + 1e-3


@every
def test_autocast(name):
    plain, fused = _pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        _assert_alike(fused, plain, 5e-2)


@pytest.mark.parametrize("name", ("llama", "gemma3"))
def test_gradient_checkpointing(name):
    plain, fused = _pair(name)
    for model in (plain, fused):
        model.gradient_checkpointing_enable()
    _assert_alike(fused, plain)


@pytest.mark.parametrize("name", ("llama", "phi3"))
def test_saved_and_loaded(name, tmp_path):
    plain, fused = _pair(name)
    fused.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert type(loaded) is type(plain)
    assert torch.equal(loaded.eval()(tokens()).logits, plain.eval()(tokens()).logits)


@pytest.mark.parametrize("name", ("llama", "phi3", "gemma3"))
@pytest.mark.parametrize("fused_first", (False, True))
def test_adapters(name, fused_first):
    peft = pytest.importorskip("peft", reason="pip install .[huggingface]")

    def adapted(model):
        torch.manual_seed(5)
        targets = ["gate_up_proj", "down_proj", "qkv_proj"] if name == "phi3" else ["gate_proj", "q_proj", "down_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config)

    plain = language_model(name)
    fused = copy.deepcopy(plain)
    fused = adapted(fuse(fused)) if fused_first else fuse(adapted(fused))
    base = plain(tokens()).logits
    _assert_alike(fused, adapted(plain))
    assert (fused(tokens()).logits - base).abs().max() > 1e-2  # the adapters count
    with fused.disable_adapter():
        assert_close(fused(tokens()).logits, base, 1e-4)


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_hooks_and_hidden_states(name):
    plain, fused = _pair(name)
    expected = plain(tokens(), output_hidden_states=True)
    found = fused(tokens(), output_hidden_states=True)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b, 1e-4)
    for model in (plain, fused):
        for path, module in model.named_modules():
            if path.endswith(("mlp.act_fn", "norm", "layernorm")):
                module.register_forward_hook(lambda module, given, y: 0.9 * y)
    _assert_alike(fused, plain)


@pytest.mark.parametrize("make", (autoencoder, unet), ids=lambda make: make.__name__)
def test_networks_of_diffusers(make):
    pytest.importorskip("diffusers", reason="pip install .[huggingface]")
    plain = make()
    fused = fuse(copy.deepcopy(plain))
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    results = []
    for model in (plain, fused):
        with calls_of("group_norm_act") as made:
            y = (model(noise) if make is autoencoder else model(noise, torch.tensor([3, 7]))).sample
        y.square().mean().backward()
        results.append((y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    norms = sum(".norm2" in n or ".norm1" in n or "conv_norm_out" in n for n, _ in plain.named_parameters()) // 2
    assert [args[5] for args in made].count("silu") == norms
    assert_close(results[1][0], results[0][0], 1e-4)
    assert_gradients_close(results[1][1], results[0][1])
    with torch.no_grad():
        expected, found = (m(noise) if make is autoencoder else m(noise, 3) for m in (plain.eval(), fused.eval()))
    assert_close(found.sample, expected.sample, 1e-4)
    assert [type(m) for m in unfuse(fused).modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("fused_first", (False, True))
def test_dispatched_by_accelerate(fused_first):
    """As device_map does: its hooks replace the forward of every module."""
    accelerate = pytest.importorskip("accelerate", reason="pip install .[huggingface]")
    plain = language_model("llama")
    model = copy.deepcopy(plain)
    model = fuse(model) if fused_first else model
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    model = model if fused_first else fuse(model)
    with calls_of("rms_norm") as made:
        _assert_alike(model, plain)
    assert bool(made) is fused_first


def test_the_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="pip install .[huggingface]")
    import transformers

    results = []
    for prepare in (lambda model: model, lambda model: lazy_logits(fuse(model))):
        model = prepare(language_model("llama"))
        settings = dict(max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-3)
        more = dict(use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=3)
        arguments = transformers.TrainingArguments(str(tmp_path), **settings, **more)
        data = [dict(input_ids=row, labels=row) for row in tokens(8)]
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        results.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        evaluated = trainer.evaluate(data)["eval_loss"]
        results[-1].append(evaluated)
    assert len(results[0]) == 5
    assert_close(torch.tensor(results[1]), torch.tensor(results[0]), 1e-3)
