"""Convolutional autoencoder and VAEs: the same as stock modules, and what they make of real digits."""

import copy
import math

import pytest
import torch
from alike import assert_close, assert_gradients, step, strides
from torch import nn

from genai_fast import atomic_files, data
from genai_fast.errors import UsageError
from genai_fast.models import MLPVAE, Autoencoder, ConditionalVAE, ConvVAE
from genai_fast.models.conv_vae.plain import PlainConvVAE
from genai_fast.runs import codes, image_evaluation
from genai_fast.training import checkpoint

SMALL = {"channels": 1, "latent": 4, "widths": (6, 8)}


def plain(model):
    """The same on stock modules."""
    model = copy.deepcopy(model)
    for name in ("encoder", "decoder"):
        blocks = [nn.Sequential(*b) if isinstance(b, nn.Sequential) else b for b in getattr(model, name)]
        setattr(model, name, nn.Sequential(*blocks))
    return model


def digits(count):
    """Images [count, 1, 8, 8] in [-1, 1], and labels."""
    images = data.load("digits").split(0.1, seed=0)[0]
    return 2 * images.batch(slice(0, count)).view(-1, 1, 8, 8) - 1, torch.as_tensor(images.labels[:count]).long()


def trained(model, *batch, steps=60):
    """The model after some steps of Adam, in evaluation, and the first loss beside the last."""
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = model.training_step(*batch).loss.item()
    for _ in range(steps):
        adam.zero_grad()
        loss = model.training_step(*batch).loss
        loss.backward()
        adam.step()
    return model.eval(), first, loss.item()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return trained(ConvVAE(8, channels=1, latent=8, widths=(16, 32), beta=0.1), digits(256)[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28])
def test_autoencoder_is_the_same_as_stock_modules(size, channels):
    model = Autoencoder(size, channels=channels, latent=4, widths=(6, 8))
    x = torch.rand(5, channels, size, size) * 2 - 1
    assert model.encode(x).shape == (5, 4) and model(x).shape == x.shape
    copied = plain(model)
    for layout in (torch.contiguous_format, torch.channels_last):
        for training in (True, False):
            given = x.contiguous(memory_format=layout)
            ((y,), found), ((z,), expected) = (step(m.train(training), given) for m in (model, copied))
            assert_close(y, z)
            assert strides(y) == strides(z)
            assert_gradients(found, expected)
    assert_close(model.reconstruct(x), model(x))
    assert not model.reconstruct(x).requires_grad


def test_autoencoders_loss_is_the_summed_squared_error():
    model, (x, _) = Autoencoder(8, **SMALL), digits(16)
    peer = plain(model).double()
    found = model.training_step(x)
    expected = (peer(x.double()) - x).square().flatten(1).sum(1).mean()
    assert found._fields == ("loss",)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=0)
    found.loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert_close(p.grad.double(), q.grad, 1e-3, scale=max(q.grad.abs().max().item(), 1e-2), what=name)


def test_denoising_trains_on_corrupted_input_towards_the_clean_one():
    model, (x, _) = Autoencoder(8, noise=0.5, masking=0.25, **SMALL), digits(64)
    torch.manual_seed(1)
    found = model.training_step(x).loss
    torch.manual_seed(1)
    noisy = x + 0.5 * torch.randn(x.shape)
    noisy = torch.where(torch.rand(64, 1, 8, 8) < 0.25, -1.0, noisy)
    assert_close(found, (model(noisy) - x).square().sum() / 64)
    assert abs(float((noisy == -1).float().mean()) - 0.25) < 0.03
    with pytest.raises(ValueError, match="expected noise >= 0 and 0 <= masking < 1"):
        Autoencoder(8, masking=1.0, **SMALL)
    # It removes noise that a plain one keeps.
    errors = []
    for noise in (0.0, 0.5):
        torch.manual_seed(0)
        trained_, _, _ = trained(Autoencoder(8, channels=1, latent=16, widths=(16, 32), noise=noise), x, steps=120)
        dirty = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        errors.append(float((trained_.reconstruct(dirty) - x).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_the_density_of_codes_is_fitted_and_samples_follow_it():
    model, (x, _) = Autoencoder(8, **SMALL), digits(200)
    model.training_step(x)  # running statistics
    model.eval()
    code = model.coded(x)[0].detach()
    assert torch.equal(model.encode(x), code)  # before it is fitted
    model.train().fit_density(x.split(70))
    assert model.training
    model.eval()
    covariance = torch.cov(code.double().T)
    covariance += 1e-4 * (covariance.diagonal().mean() * torch.eye(4) - covariance)
    assert_close(model.code_mean, code.mean(0))
    assert_close(model.code_factor @ model.code_factor.T, covariance.float())
    z = model.encode(x).detach()
    assert_close(torch.cov(z.T), torch.eye(4), 1e-3)
    assert_close(model.decode(z), model.reconstruct(x), 1e-4)
    drawn = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    expected = model.decoded(model.code_mean + drawn @ model.code_factor.T)
    assert_close(model.sample(3, seed=5), expected)
    before = model.code_mean.clone()
    for images, got in ((x[:1], "fewer"), (x[:0], "fewer"), (torch.full_like(x, math.nan), "infinite or NaN")):
        with pytest.raises(ValueError, match=f"finite codes of at least 2 images, got {got}"):
            model.fit_density([images] if len(images) else [])
    assert torch.equal(model.code_mean, before)
    model.fit_density([x[:1].repeat(3, 1, 1, 1)])  # all alike: no direction in which they differ
    assert model.sample(2, seed=0).isfinite().all()


def test_a_checkpoint_from_before_there_was_a_density_loads(tmp_path):
    model = Autoencoder(8, **SMALL)
    optimizer = torch.optim.Adam(model.parameters())
    model.fit_density([digits(20)[0]])
    fitted = model.code_mean.clone()
    kept = model.code_mean, model.code_factor
    del model._buffers["code_mean"], model._buffers["code_factor"]
    checkpoint.save(tmp_path, model, optimizer, 1, {}, {})
    model.register_buffer("code_mean", kept[0])
    model.register_buffer("code_factor", kept[1])
    other = Autoencoder(8, **SMALL)
    checkpoint.load_model(checkpoint.latest(tmp_path), other)
    assert not other.code_mean.any() and fitted.any()
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_codes_in_a_file_and_back(bits, tmp_path):
    model, (x, _) = Autoencoder(8, **SMALL).eval(), digits(50)
    z = model.encode(x).detach()
    size = codes.write(tmp_path / "c.safetensors", z, model, (1, 8, 8), bits)
    assert 50 * 4 * bits // 8 < size < 50 * 4 * bits // 8 + 800
    found = codes.read(tmp_path / "c.safetensors", model, (1, 8, 8))
    error = (found - z).abs().amax(0)
    most = {8: (z.amax(0) - z.amin(0)) / 255 / 2 * 1.001, 16: z.abs().amax(0) * 2**-11, 32: torch.zeros(4)}[bits]
    assert (error <= most).all() and found.dtype is torch.float32


def test_files_that_hold_no_codes_are_refused(tmp_path):
    model, path, shape = Autoencoder(8, **SMALL), tmp_path / "c.safetensors", (1, 8, 8)
    z = torch.randn(5, 4)
    codes.write(path, z, model, shape, 8)
    good = atomic_files.read_tensors(path)

    def refused(match, **changes):
        tensors = {name: x for name, x in {**good, **changes}.items() if x is not None}
        atomic_files.write_tensors(path, tensors)
        with pytest.raises(UsageError, match=match):
            codes.read(path, model, shape)

    refused("expected a file that `genai-fast compress` wrote, got one of codes, low, shape, weights", step=None)
    refused(r"codes: expected codes \[N, 4\] as the model has, got codes of torch.uint8 \(4, 5\)",
            codes=good["codes"].T.contiguous())  # fmt: skip
    refused(r"low: expected codes", low=torch.zeros(3))
    refused("expected finite codes", low=torch.full((4,), math.nan))
    refused("expected codes of this run's weights, got those of others", shape=torch.tensor([1, 8, 9]))
    refused("expected codes of this run's weights, got those of others", weights=good["weights"].flip(0))
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="expected a file that `genai-fast compress` wrote, got "):
        codes.read(path, model, shape)
    with pytest.raises(UsageError, match="that 16 bits hold, got others; remedy: --bits 32"):
        codes.write(path, z * 1e6, model, shape, 16)


@pytest.mark.parametrize("make", [Autoencoder, ConditionalVAE])
def test_a_training_step_is_one_graph_to_a_compiler(make):
    batch, model = digits(4), make(size=8, channels=1, latent=4, widths=(4,))
    step = torch.compile(model.training_step, backend="aot_eager", fullgraph=True)
    loss = step(*(batch if make is ConditionalVAE else batch[:1])).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


def test_autoencoder_learns_real_digits():
    x, _ = digits(256)
    model, first, last = trained(Autoencoder(8, channels=1, latent=8, widths=(8, 16)), x, steps=40)
    assert last < 0.5 * first
    assert (model.reconstruct(x) - x).square().mean() < 0.7 * (x.mean(0) - x).square().mean()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28])
def test_conv_vae_is_the_same_as_stock_modules(size, channels):
    model = ConvVAE(size, channels=channels, latent=4, widths=(6, 8))
    copied, x = plain(model), torch.rand(5, channels, size, size) * 2 - 1
    for layout in (torch.contiguous_format, torch.channels_last):
        for training in (True, False):
            x = x.contiguous(memory_format=layout)
            for a, b in zip(model.train(training)(x, seed=3), copied.train(training)(x, seed=3), strict=True):
                assert_close(a, b, 1e-4)


def test_conditional_vae_is_the_same_as_stock_modules():
    (x, labels), model = digits(8), ConditionalVAE(10, 8, **SMALL)
    copied = plain(model)
    for training in (True, False):
        for m in (model, copied):
            m.train(training)
        for a, b in zip(model(x, labels, seed=3), copied(x, labels, seed=3), strict=True):
            assert_close(a, b, 1e-4)
    losses = []
    for m in (model, copied):
        torch.manual_seed(4)  # the draw of z
        losses.append(m.training_step(x, labels).loss)
        losses[-1].backward()
    assert_close(*losses)
    for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-4, what=name)
    assert model.embed.weight.grad.abs().amax(1).nonzero().flatten().tolist() == labels.unique().tolist()


@pytest.mark.parametrize("make", [Autoencoder, ConvVAE, ConditionalVAE])
def test_under_autocast_all_is_finite(make):
    (x, labels), conditional = digits(8), make is ConditionalVAE
    model = make(size=8, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(*((x, labels) if conditional else (x,))).loss
    loss.backward()
    assert loss.dtype is torch.float32 and loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_default_widths_go_with_the_size():
    with torch.device("meta"):
        for make in (Autoencoder, ConvVAE, ConditionalVAE):
            for size, widths, side in ((28, 2, 7), (32, 4, 2), (64, 5, 2), (128, 5, 4), (256, 5, 8)):
                model = make(size=size, channels=1)
                assert [block[0].out_channels for block in model.encoder] == [32, 64, 128, 256, 512][:widths]
                assert model.unflatten.unflattened_size == (16 << widths, side, side)
                assert model.decoder[-2].out_channels == 1


def test_keys_of_conv_vae_are_those_of_before():
    keys = [*ConvVAE(8, **SMALL).state_dict()]
    assert keys == [*PlainConvVAE(8, 1, 4, (6, 8)).state_dict()]
    assert {*ConditionalVAE(10, 8, **SMALL).state_dict()} == {*keys, "embed.weight"}


def test_conv_vae_learns_real_digits(vae):
    model, first, last = vae
    x, _ = digits(256)
    assert last < 0.5 * first
    assert (model.reconstruct(x) - x).square().mean() < 0.8 * (x.mean(0) - x).square().mean()
    one, same, other = (model.sample(5, seed=s) for s in (1, 1, 2))
    assert one.shape == (5, 1, 8, 8) and torch.equal(one, same) and not torch.equal(one, other)


def test_repaired_digits_are_nearer_than_the_mean_digit(vae):
    model, (x, _) = vae[0], digits(256)
    mask = torch.zeros(32, 1, 8, 8, dtype=torch.bool)
    mask[..., 5:, :] = True
    truth, mean = x[:32], x.mean(0, keepdim=True).expand(32, 1, 8, 8)
    repaired, start = (model.inpaint(truth, mask, steps=steps, lr=0.1) for steps in (60, 0))
    error, first, blurred = ((y - truth)[mask].square().mean() for y in (repaired, start, mean))
    assert error < 0.97 * first and error < 0.8 * blurred, (error, first, blurred)


def test_conditional_vae_draws_the_digit_that_is_asked_for():
    x, labels = digits(256)
    model, first, last = trained(ConditionalVAE(10, 8, channels=1, latent=4, widths=(8, 16)), x, labels)
    assert last < 0.5 * first
    assert model.reconstruct(x, labels).shape == x.shape
    means = torch.stack([x[labels == k].mean(0) for k in range(10)]).flatten(1)
    samples = model.sample(100, seed=1).flatten(1)  # labels 0, 1, ..., 9, 0, ...
    nearest = torch.cdist(samples, means).argmin(1)
    assert (nearest == torch.arange(100) % 10).float().mean() > 0.8
    sevens = model.sample(3, torch.full((3,), 7), seed=1)
    assert torch.equal(sevens, model.sample(3, torch.full((3,), 7), seed=1))
    assert not torch.equal(sevens, model.sample(3, torch.full((3,), 7), seed=2))


def test_an_interpolation_goes_from_one_reconstruction_to_the_other(vae):
    model, (x, _) = vae[0], digits(2)
    model.train()
    model.encoder.eval()
    steps = model.interpolate(x[0], x[1], 5)
    assert model.training and model.decoder[0][1].training and not model.encoder[0][1].training
    model.eval()
    assert steps.shape == (5, 1, 8, 8)
    ends = model.reconstruct(x)
    assert_close(steps[[0, -1]], ends)
    way = (steps - ends[0]).flatten(1).norm(dim=1)
    assert (way.diff() > 0).all()
    assert_close(steps[2:3], model.decode(model.encode(x)[0].mean(0, keepdim=True)))


def test_an_interpolation_between_classes():
    model, (x, labels) = ConditionalVAE(10, 8, **SMALL).eval(), digits(2)
    steps = model.interpolate(x[0], x[1], 5, labels)
    ends = model.reconstruct(x, labels)
    assert_close(steps[[0, -1]], ends)
    middle = model.encode(x, labels)[0].mean(0, keepdim=True)
    assert_close(steps[2:3], model.decode(middle, labels[:1]))
    mlp = MLPVAE(64, 16, 3)
    assert mlp.interpolate(x[0], x[1], 4).shape == (4, 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvVAE(100), r"ConvVAE: size: expected a multiple of 32, or one .* 28, got 100"),
        (lambda: Autoencoder(27), r"Autoencoder: size: expected a multiple of 32.*got 27"),
        (lambda: ConditionalVAE(size=8, widths=(4, 4, 4, 4)), r"size: expected a multiple of 16, got 8"),
        (lambda: ConvVAE(64, widths=(8, 0)), r"widths: expected at least 1, got 0"),
        (lambda: ConvVAE(64, widths=()), r"widths: expected at least 1, got 0"),
        (lambda: ConvVAE(channels=0), r"ConvVAE: channels: expected at least 1, got 0"),
        (lambda: ConditionalVAE(0), r"ConditionalVAE: classes: expected at least 1, got 0"),
        (lambda: ConvVAE(8, **SMALL).interpolate(*torch.zeros(2, 1, 8, 8), 0), "steps: expected at least 1, got 0"),
        (lambda: ConvVAE(8, **SMALL)(torch.zeros(1, 1, 16, 16)), r"ConvVAE: expected images \[B, 1, 8, 8\], got"),
        (lambda: Autoencoder(8, **SMALL)(torch.zeros(1, 3, 8, 8)), r"Autoencoder: expected images \[B, 1, 8, 8\]"),
        (lambda: ConditionalVAE(10, 8, **SMALL).sample(2, torch.tensor([1, 10])), "labels: expected 0 to 9, got 10"),
        (
            lambda: ConditionalVAE(10, 8, **SMALL).training_step(torch.zeros(2, 1, 8, 8), torch.zeros(2)),
            r"ConditionalVAE: labels: expected int64, got torch.float32",
        ),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@torch.no_grad()
def test_codes_of_two_dimensions_are_drawn_a_few_images_at_a_time(tmp_path, monkeypatch):
    images = data.load("digits").resized(28)
    drawn, sizes = [], []
    monkeypatch.setattr(image_evaluation.pictures, "plane", lambda points, *others: drawn.append(points))
    for model in (Autoencoder(28, channels=1, latent=2), ConvVAE(28, channels=1, latent=2)):
        encode = model.encode
        monkeypatch.setattr(model, "encode", lambda x, encode=encode: sizes.append(len(x)) or encode(x))
        image_evaluation.draw(model, images, images, tmp_path)
        expected = model.eval().encode(images.batch(slice(0, 9), signed=True))
        expected = expected if isinstance(expected, torch.Tensor) else expected[0]
        assert drawn[-1].shape == (1797, 2)
        torch.testing.assert_close(drawn[-1][:9], expected)
    assert max(sizes) <= 100
