"""The variational recurrent network, over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from genai_fast import ops
from genai_fast.fusion.chains import obstacle, untouched
from genai_fast.layers import FusedSequential
from genai_fast.models.common import checks, sequences
from genai_fast.models.common.generation import Sampler
from genai_fast.models.common.protocol import Request
from genai_fast.models.common.sequences import SequenceLosses

_PLAIN = (nn.Sequential.forward, FusedSequential.forward)


class VRNNOutput(NamedTuple):
    logits: torch.Tensor  # of p(x_t | z_t, h_{t-1}), [T, B, V]
    posterior: tuple[torch.Tensor, torch.Tensor]  # mu, logvar of q(z_t | x_t, h_{t-1}), [T, B, latent] each
    prior: tuple[torch.Tensor, torch.Tensor]  # mu, logvar of p(z_t | h_{t-1}), [T, B, latent] each


class _Recurrence(torch.autograd.Function):
    """What must go step by step, with U units in the encoder's hidden layer, L in z, E in phi(z), H in h:

        (r, k, m, e) = h w_h^T,  e = relu(e + x_e),  (mu, logvar) = e w_q^T + b_q,  z = mu + exp(logvar / 2) noise,
        f = relu(z w_z^T + b_z),  (r, k, n) gates of a GRU, with f w_f^T + x_g adding to (n, r, k) and b_n to m.

    x_e [T, B, U], x_g [T, B, 3H], noise [T, B, L], h [B, H], w_h [3H + U, H], w_q [2L, U], w_z [E, L], w_f [3H, E] ->
    states [T + 1, B, H] with h first, (mu, logvar) [T, B, 2L], f [T, B, E].

    Autograd would multiply and add up the gradient of each weight at every step; here each is one product of all steps,
    as all derivatives that need no gradient are made for all steps before the way back.
    """

    @staticmethod
    def forward(ctx, x_e, x_g, noise, h, w_h, w_q, b_q, w_z, b_z, w_f, b_n):
        steps, batch, latent = noise.shape
        hidden = h.size(1)
        sizes = (w_q.size(1), 2 * latent, latent, w_z.size(0), 2 * hidden, hidden, hidden)
        kept = [h.new_empty(steps, batch, size) for size in sizes]
        states = h.new_empty(steps + 1, batch, hidden)
        states[0] = h
        for t, (e, q, z, f, rk, m, n) in enumerate(zip(*kept, strict=True)):
            a = states[t] @ w_h.t()
            torch.add(a[:, 3 * hidden :], x_e[t], out=e).relu_()
            torch.addmm(b_q, e, w_q.t(), out=q)
            torch.addcmul(q[:, :latent], torch.exp(0.5 * q[:, latent:]), noise[t], out=z)
            torch.addmm(b_z, z, w_z.t(), out=f).relu_()
            gates = torch.addmm(x_g[t], f, w_f.t())
            torch.add(gates[:, hidden:], a[:, : 2 * hidden], out=rk).sigmoid_()
            torch.add(a[:, 2 * hidden : 3 * hidden], b_n, out=m)
            torch.addcmul(gates[:, :hidden], rk[:, :hidden], m, out=n).tanh_()
            torch.lerp(n, states[t], rk[:, hidden:], out=states[t + 1])
        ctx.save_for_backward(states, *kept, w_h, w_q, w_z, w_f)
        return states, kept[1], kept[3]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_q, grad_f):
        states, e, q, z, f, rk, m, n, w_h, w_q, w_z, w_f = ctx.saved_tensors
        (steps, batch, hidden), latent = n.shape, z.size(2)
        r, k = rk.chunk(2, 2)
        by_n = (1 - k) * (1 - n * n)
        by_k = (states[:-1] - n) * k * (1 - k)
        by_gate = torch.stack([by_n, by_n * m * r * (1 - r), by_k, by_n * r], 2)  # d (n, r, k, m) / d h, [T, B, 4, H]
        by_logvar = 0.5 * (z - q[..., :latent])
        e_on, f_on = e > 0, f > 0
        grad = states.new_empty(steps, batch, 4 * hidden + e.size(2))  # of n, r, k, m, e
        of_gates, of_e = grad[..., : 4 * hidden].unflatten(2, (4, hidden)), grad[..., 4 * hidden :]
        of_q, of_f = grad_q.clone(), torch.empty_like(f)
        grad_h = grad_states[-1]
        for t in range(steps - 1, -1, -1):
            torch.mul(grad_h[:, None], by_gate[t], out=of_gates[t])
            torch.addmm(grad_f[t], grad[t, :, : 3 * hidden], w_f, out=of_f[t]).mul_(f_on[t])
            of_z = of_f[t] @ w_z
            of_q[t, :, :latent] += of_z
            of_q[t, :, latent:].addcmul_(of_z, by_logvar[t])
            torch.mul(of_q[t] @ w_q, e_on[t], out=of_e[t])
            grad_h = torch.addcmul(grad_states[t], grad_h, k[t]).addmm_(grad[t, :, hidden:], w_h)
        of_x, of_a = grad[..., : 3 * hidden], grad[..., hidden:]
        return (
            of_e, of_x, None, grad_h, _of_weight(of_a, states[:-1]), _of_weight(of_q, e), of_q.sum((0, 1)),
            _of_weight(of_f, z), of_f.sum((0, 1)), _of_weight(of_x, f),
            grad[..., 3 * hidden : 4 * hidden].sum((0, 1)),
        )  # fmt: skip


def _of_weight(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad.flatten(0, 1).t() @ x.flatten(0, 1)


class VRNN(nn.Module):
    """A recurrent network with a latent at every step, for sequences of tokens x_1 ... x_T:

        p(z_t | h_{t-1}),  p(x_t | z_t, h_{t-1}),  q(z_t | x_t, h_{t-1}),  h_t = GRU([phi(x_t), phi(z_t)], h_{t-1}).

    p(z) and q are diagonal Gaussians, phi(x) an embedding, phi(z) and each network one hidden layer with ReLU; h_0 = 0.

    Only the encoder, the draw of z, phi(z) and the GRU go step by step, in one call for all of a sequence; their shares
    of x, the noise, the prior, the decoder and all weights' gradients are taken over all steps at once.

    Args:
        vocabulary: V; token ids are in [0, V).
        embedding: channels of phi(x) and of phi(z).
        hidden: units of the GRU and of the hidden layers.
        latent: dimensions of each z_t.
        beta: weight of the KL terms, >= 0.

    The sequential part is computed in the weights' dtype under autocast too. Gradients are of the first order.
    Raises: ValueError on settings and ids that do not fit (values are read on the CPU alone).
    Source: Chung et al. 2015, arXiv:1506.02216.
    """

    continues: ClassVar[bool] = True

    def __init__(
        self, vocabulary: int, embedding: int = 64, hidden: int = 256, latent: int = 32, *, beta: float = 1.0
    ) -> None:
        super().__init__()
        checks.positive("VRNN", vocabulary=vocabulary, embedding=embedding, hidden=hidden, latent=latent)
        if not beta >= 0:
            raise ValueError(f"VRNN: beta: expected at least 0, got {beta}")
        self.vocabulary, self.embedding, self.hidden = vocabulary, embedding, hidden
        self.latent, self.beta = latent, beta
        self.embed = nn.Embedding(vocabulary, embedding)
        self.prior = _network(hidden, hidden, 2 * latent)
        self.encoder = _network(embedding + hidden, hidden, 2 * latent)
        self.phi_z = nn.Sequential(nn.Linear(latent, embedding), nn.ReLU())
        self.decoder_net = _network(embedding + hidden, hidden, vocabulary)
        self.cell = nn.GRUCell(2 * embedding, hidden)

    def forward(self, x: torch.Tensor, *, seed: int | torch.Tensor | None = None) -> VRNNOutput:
        """Token ids [B, T], int64 -> what the losses are made of; `seed` of the z as for `ops.reparameterize`, whose
        element (t, b, j) is the noise of z_t."""
        sequences.check_ids("VRNN", "x", x, self.vocabulary)
        first = next(self.parameters()).new_zeros(len(x), self.hidden)
        with torch.autocast(x.device.type, enabled=False):
            noise = self._noise(x, seed)
            if self._is_as_made():
                states, stats, phi = _Recurrence.apply(*self._of_x(x.t()), noise, first, *self._weights())
            else:
                states, stats, phi = self._by_modules(x.t(), noise, first)
        before = states[:-1]
        logits = self.decoder_net(torch.cat([phi, before], 2))
        return VRNNOutput(logits, stats.chunk(2, 2), self.prior(before).chunk(2, 2))

    def training_step(
        self, x: torch.Tensor, y: torch.Tensor | None = None, *, seed: int | torch.Tensor | None = None
    ) -> SequenceLosses:
        """The negative ELBO of token ids x [B, T], int64; y, which language models predict, is ignored."""
        logits, posterior, prior = self(x, seed=seed)
        nats = ops.cross_entropy(logits, x.t(), reduction="sum", inplace=True).float() / len(x)
        kl = _kl(*(s.float() for s in (*posterior, *prior))) / len(x)
        tokens = torch.full((), float(x.size(1)), device=x.device)
        return SequenceLosses(nats + self.beta * kl, nats, kl, tokens)

    def decoder(self, count: int = 1, *, seed: int | None = None) -> VRNNDecoder:
        """A state that writes `count` sequences step by step; no gradient. A seed gives the same z on every device."""
        return VRNNDecoder(self, count, seed)

    def sample(
        self, count: int, length: int, choose: sequences.Choose | None = None, *, seed: int | None = None
    ) -> torch.Tensor:
        """Ancestral samples, int64 [count, length] on the CPU: z_t from the prior, then x_t.

        Args:
            choose: logits [B, V] -> tokens [B], such as a `Sampler`; None: draws from p(x_t | z_t, h_{t-1}) as it is.
            seed: of z and of those draws; None: the default generator's.
        """
        state = self.decoder(count, seed=seed)
        columns = sequences.steps(state, None, choose or state.sampler(), length, -1)
        return torch.tensor(list(columns)).t().contiguous()

    def generate_ids(
        self, prompt: torch.Tensor | None = None, choose: sequences.Choose | None = None, *, longest: int = 256,
        end: int | None = None, seed: int | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """The token ids of one sequence, one at a time as they are made.

        Args:
            prompt: token ids [T] to continue, or None; each of their z is q's mean.
            choose: logits [B, V] -> tokens [B], such as a `Sampler`; None: draws from p(x_t | z_t, h_{t-1}) as it is.
            longest: most tokens, without the prompt's.
            end: an id to stop at, which is left out; None: none.
            seed: of z and of those draws.
        """
        state = self.decoder(seed=seed)
        if prompt is not None:
            for token in sequences.prompt_ids("VRNN", prompt, self.vocabulary, next(self.parameters()).device)[0]:
                state.read(token[None])
        return sequences.streamed(state, None, choose or state.sampler(), longest, -1 if end is None else end)

    def write_ids(self, request: Request) -> Iterator[int]:
        """See `protocol.Writes`."""
        prompt, end, sampler, longest, seed, *_ = request
        given = torch.tensor(prompt) if prompt else None
        return self.generate_ids(given, sampler, longest=longest, end=end, seed=seed)

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary}, hidden={self.hidden}, latent={self.latent}, beta={self.beta:g}"

    def _is_as_made(self) -> bool:
        """Whether calling encoder, phi_z and cell computes what `_Recurrence` does, and nothing else."""
        expected = ((self.encoder, (nn.Linear, nn.ReLU, nn.Linear)), (self.phi_z, (nn.Linear, nn.ReLU)))
        for network, classes in expected:
            if not isinstance(network, nn.Sequential) or type(network).forward not in _PLAIN or obstacle(network):
                return False
            if len(network) != len(classes) or not all(map(untouched, network, classes)):
                return False
        linears = (self.encoder[0], self.encoder[2], self.phi_z[0], self.cell)
        return untouched(self.cell, nn.GRUCell) and all(m._parameters.get("bias", m) is not None for m in linears)

    def _by_modules(
        self, x: torch.Tensor, noise: torch.Tensor, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `_Recurrence` gives, for ids [T, B]."""
        states, stats, phis = [h], [], []
        for given, drawn in zip(self.embed(x), noise, strict=True):
            stats.append(self.encoder(torch.cat([given, h], 1)))
            mu, logvar = stats[-1].chunk(2, 1)
            phis.append(self.phi_z(mu + torch.exp(0.5 * logvar) * drawn))
            h = self.cell(torch.cat([given, phis[-1]], 1), h)
            states.append(h)
        return torch.stack(states), torch.stack(stats), torch.stack(phis)

    def _of_x(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What x [T, B] adds to the encoder's hidden layer and to the gates (n, r, k), biases included."""
        first, cell, width = self.encoder[0], self.cell, self.embedding
        given = self.embed(x)
        bias = cell.bias_ih + F.pad(cell.bias_hh[: 2 * self.hidden], (0, self.hidden))
        gates = F.linear(given, cell.weight_ih[:, :width].roll(self.hidden, 0), bias.roll(self.hidden, 0))
        return F.linear(given, first.weight[:, :width], first.bias), gates

    def _weights(self) -> tuple[torch.Tensor, ...]:
        """w_h, w_q, b_q, w_z, b_z, w_f and b_n of `_Recurrence`."""
        first, last, phi, cell, width = self.encoder[0], self.encoder[2], self.phi_z[0], self.cell, self.embedding
        return (
            torch.cat([cell.weight_hh, first.weight[:, width:]]), last.weight, last.bias, phi.weight, phi.bias,
            cell.weight_ih[:, width:].roll(self.hidden, 0), cell.bias_hh[2 * self.hidden :],
        )  # fmt: skip

    def _noise(self, x: torch.Tensor, seed: int | torch.Tensor | None) -> torch.Tensor:
        """All steps' noise in one call: it depends on no state."""
        nothing = next(self.parameters()).new_zeros(x.size(1), len(x), self.latent)
        return ops.reparameterize(nothing, nothing, seed=seed)


class VRNNDecoder:
    """What `VRNN.decoder` gives: h of each sequence, and the z drawn last."""

    @torch.no_grad()
    def __init__(self, model: VRNN, count: int, seed: int | None) -> None:
        checks.positive("VRNN", count=count)
        self.model = model
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.h = next(model.parameters()).new_zeros(count, model.hidden)
        self.phi: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, ids: torch.Tensor | None) -> torch.Tensor:
        """The next token ids [B] of all sequences, None the first time -> logits [B, V] of those after them, for a z of
        the prior."""
        model = self.model
        if ids is not None:
            self._advance(ids)
        mu, logvar = model.prior(self.h).chunk(2, 1)
        noise = torch.randn(mu.shape, generator=self.generator, device="cpu").to(mu)
        self.phi = model.phi_z(mu + torch.exp(0.5 * logvar) * noise)
        return model.decoder_net(torch.cat([self.phi, self.h], 1))

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> None:
        """Append given tokens [B], their z being the mean of q."""
        x = self.model.embed(ids)
        self.phi = self.model.phi_z(self.model.encoder(torch.cat([x, self.h], 1)).chunk(2, 1)[0])
        self._advance(ids)

    def sampler(self) -> Sampler:
        """Draws tokens as they come, with a seed of this state's generator."""
        return Sampler(seed=int(torch.randint(2**63 - 1, (), generator=self.generator, device="cpu")))

    def _advance(self, ids: torch.Tensor) -> None:
        self.h = self.model.cell(torch.cat([self.model.embed(ids), self.phi], 1), self.h)


def _network(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, n_out))


def _kl(mu: torch.Tensor, logvar: torch.Tensor, prior_mu: torch.Tensor, prior_logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))), summed over everything."""
    ratio = logvar - prior_logvar
    return 0.5 * (ratio.exp() + (mu - prior_mu).square() * torch.exp(-prior_logvar) - 1.0 - ratio).sum()
