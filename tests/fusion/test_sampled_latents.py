"""Sampling of latents in methods that somebody wrote: served by one call, and left alone where it is something else."""

import pytest
import torch
from alike import assert_close
from torch import nn
from torch.distributions import Normal

from genai_fast import explain, fuse, ops, unfuse

pytestmark = pytest.mark.usefixtures("small_is_fused")
ROWS, WIDE = 64, 20


class _Base(nn.Module):
    def forward(self, mu, logvar):
        return self.sample(mu, logvar)


class _Textbook(_Base):
    def sample(self, mu, logvar):
        """PyTorch's example."""
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std


class _InTraining(_Base):
    def sample(self, mu, logvar):
        if self.training:
            std = logvar.mul(0.5).exp_()
            eps = torch.randn_like(std)
            return eps.mul(std).add_(mu)
        else:
            return mu


class _OneLine(_Base):
    def sample(self, mean, log_var):
        return mean + torch.randn_like(mean) * torch.exp(log_var / 2)


class _NoiseFirst(_Base):
    def sample(self, mu, logvar):
        noise = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype)
        z = torch.mul(noise, (logvar * 0.5).exp()) + mu
        return z


class _Sizes(_Base):
    def sample(self, mu, logvar):
        std = (logvar / 2.0).exp()
        eps = torch.randn(std.size())
        z = torch.add(mu, std.mul(eps))
        return z


class _Addcmul(_Base):
    def sample(self, mu, logvar):
        return torch.addcmul(mu, torch.exp(0.5 * logvar), torch.randn_like(logvar))


class _Root(_Base):
    def sample(self, mu, logvar):
        return mu.add(torch.randn_like(mu).mul(torch.sqrt(torch.exp(logvar))))


class _Distribution(_Base):
    def sample(self, mu, logvar):
        q = Normal(mu, torch.exp(0.5 * logvar))
        return q.rsample()


class _Inside(_Base):
    def forward(self, mu, logvar):
        std = torch.exp(logvar * 0.5)
        return self.kept(mu + torch.randn_like(std) * std), logvar

    def kept(self, z):
        return z


SERVED = (
    _Textbook, _InTraining, _OneLine, _NoiseFirst, _Sizes, _Addcmul, _Root, _Distribution, _Inside,
)  # fmt: skip


class _Variance(_Base):
    def sample(self, mu, logvar):
        return mu + torch.randn_like(mu) * torch.exp(logvar)


class _Difference(_Base):
    def sample(self, mu, logvar):
        return mu - torch.randn_like(mu) * torch.exp(0.5 * logvar)


class _Kept(_Base):
    def sample(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        self.std = std
        return mu + torch.randn_like(std) * std


class _Changed(_Base):
    def sample(self, mu, logvar):
        return mu.add_(torch.randn_like(mu) * torch.exp(0.5 * logvar))


class _Shared(_Base):
    def sample(self, mu, logvar):
        eps = torch.randn(mu.shape[0], 1)
        return mu + eps * torch.exp(0.5 * logvar)


class _Scaled(_Base):
    def sample(self, mu, logvar):
        return mu + torch.randn_like(mu) * torch.exp(0.3 * logvar)


class _Uniform(_Base):
    def sample(self, mu, logvar):
        return mu + torch.rand_like(mu) * torch.exp(0.5 * logvar)


class _InPlaceHalf(_Base):
    def sample(self, mu, logvar):
        return mu + torch.randn_like(mu) * logvar.mul_(0.5).exp()


LEFT = (_Variance, _Difference, _Kept, _Changed, _Shared, _Scaled, _Uniform, _InPlaceHalf)


def _given(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    shape = shape or (ROWS, WIDE)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2)]


def _first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("cls", SERVED, ids=lambda cls: cls.__name__)
def test_a_spelling_is_one_call_with_its_gradients(cls):
    model = fuse(cls())
    assert any(row.becomes == "reparameterize" for row in explain(model))
    mu, logvar = _given()
    torch.manual_seed(5)
    z = _first(model(mu, logvar))
    torch.manual_seed(5)
    assert torch.equal(z, ops.reparameterize(mu, logvar))
    grads = torch.autograd.grad(z.sum(), (mu, logvar))
    assert torch.equal(grads[0], torch.ones_like(mu))
    assert_close(grads[1], 0.5 * (z - mu).detach(), 1e-6)


@pytest.mark.parametrize("cls", SERVED, ids=lambda cls: cls.__name__)
def test_what_the_op_does_not_take_runs_as_it_is_written(cls):
    plain, model = cls(), fuse(cls())
    for mu, logvar in (_given(ROWS, 1), _given(0, 3), _given(2, 3, dtype=torch.float64)):
        if cls is _Sizes and mu.dtype is torch.float64:
            continue  # its noise has the default dtype: the sum is promoted, as PyTorch has it
        if logvar.size(1) == 1:
            mu = mu.expand(ROWS, WIDE)
            logvar = logvar.detach().expand(ROWS, WIDE) if cls is _NoiseFirst else logvar.expand(ROWS, WIDE)
        if mu.dtype is torch.float64 or mu.stride(-1) == 0 or mu.numel() == 0:
            torch.manual_seed(5)
            expected = _first(plain(mu, logvar))
            torch.manual_seed(5)
            z = _first(model(mu, logvar))
            assert z.shape == expected.shape and z.dtype is expected.dtype and z.stride() == expected.stride()


@pytest.mark.parametrize("cls", LEFT, ids=lambda cls: cls.__name__)
def test_something_else_is_left_alone(cls):
    model = cls()
    assert not any(row.becomes for row in explain(model))
    assert type(fuse(model)) is cls


def test_evaluation_returns_the_mean():
    model = fuse(_InTraining()).eval()
    mu, logvar = _given()
    assert model(mu, logvar) is mu


def test_a_replaced_function_is_called(monkeypatch):
    model = fuse(_Textbook())
    mu, logvar = _given()
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    assert torch.equal(model(mu, logvar), mu + torch.exp(0.5 * logvar))


def test_pytorch_draws_where_its_numbers_are_asked_for():
    mu, logvar = _given()
    model = fuse(nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Dropout(0.5)), random=False)
    plain = unfuse(fuse(nn.Sequential(*model)))
    for made, given in ((model, (mu,)), (fuse(_Textbook(), random=False), (mu, logvar))):
        other = plain if made is model else _Textbook()
        torch.manual_seed(5)
        expected = other(*given)
        torch.manual_seed(5)
        assert torch.equal(made(*given), expected)
    with pytest.raises(TypeError, match=r"fuse: random: expected a bool"):
        fuse(_Textbook(), random="no")


def test_a_compiled_model_samples():
    model = torch.compile(fuse(_Textbook()), backend="eager", fullgraph=True)
    mu, logvar = _given()
    torch.manual_seed(5)
    z = model(mu, logvar)
    torch.manual_seed(5)
    assert torch.equal(z, ops.reparameterize(mu, logvar))


class _NamesInARing(nn.Module):
    """Variables that are each other's values have no end."""

    def forward(self, x):
        y = x
        x = y
        x = x
        return x


def test_variables_that_are_each_others_values():
    model, x = _NamesInARing(), torch.ones(2)
    assert type(fuse(model)) is _NamesInARing and model(x) is x
