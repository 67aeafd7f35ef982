"""The variational recurrent network, over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from genai_fast import ops
from genai_fast.models import _check, _sequences
from genai_fast.models._sequences import SequenceLosses


class VRNNOutput(NamedTuple):
    logits: torch.Tensor  # of p(x_t | z_t, h_{t-1}), [T, B, V]
    posterior: tuple[torch.Tensor, torch.Tensor]  # mu, logvar of q(z_t | x_t, h_{t-1}), [T, B, latent] each
    prior: tuple[torch.Tensor, torch.Tensor]  # mu, logvar of p(z_t | h_{t-1}), [T, B, latent] each


class _Recurrence(torch.autograd.Function):
    """What must go step by step, with U units in the encoder's hidden layer, L in z, E in phi(z), H in h:

        a = h w_h^T,  e = relu(given_e + a_e),  (mu, logvar) = e w_q^T + b_q,  z = mu + exp(logvar / 2) noise,
        f = relu(z w_z^T + b_z),  h = GRU cell of the gates given_g + f w_f^T and a_g + (0, 0, b_n).

    given [T, B, U + 3H], noise [T, B, L], h [B, H], w_h [U + 3H, H], w_q [2L, U], w_z [E, L], w_f [3H, E] ->
    states [T + 1, B, H] with h first, (mu, logvar) [T, B, 2L], f [T, B, E].

    Autograd would multiply and add up the gradient of each weight at every step; here each is one product of all steps.
    """

    @staticmethod
    def forward(ctx, given, noise, h, w_h, w_q, b_q, w_z, b_z, w_f, b_n):
        units, hidden, latent = w_q.size(1), w_h.size(1), noise.size(2)
        kept: list[tuple[torch.Tensor, ...]] = []
        states = [h]
        for x, eps in zip(given, noise, strict=True):
            a = h @ w_h.t()
            e = torch.relu(x[:, :units] + a[:, :units])
            q = torch.addmm(b_q, e, w_q.t())
            z = torch.addcmul(q[:, :latent], torch.exp(0.5 * q[:, latent:]), eps)
            f = torch.relu(torch.addmm(b_z, z, w_z.t()))
            gates = torch.addmm(x[:, units:], f, w_f.t())
            rk = torch.sigmoid(gates[:, : 2 * hidden] + a[:, units : units + 2 * hidden])
            r, k = rk.chunk(2, 1)
            m = a[:, units + 2 * hidden :] + b_n
            n = torch.tanh(torch.addcmul(gates[:, 2 * hidden :], r, m))
            h = torch.lerp(n, h, k)
            states.append(h)
            kept.append((e, q, z, f, rk, m, n))
        stacked = [torch.stack(parts) for parts in zip(*kept, strict=True)]
        states = torch.stack(states)
        ctx.save_for_backward(states, *stacked, w_h, w_q, w_z, w_f)
        return states, stacked[1], stacked[3]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_q, grad_f):
        states, e, q, z, f, rk, m, n, w_h, w_q, w_z, w_f = ctx.saved_tensors
        units, latent = e.size(2), z.size(2)
        made: list[tuple[torch.Tensor, ...]] = []
        grad_h = grad_states[-1]
        for t in range(len(z) - 1, -1, -1):
            h, (r, k) = states[t], rk[t].chunk(2, 1)
            grad_n = grad_h * (1 - k) * (1 - n[t] * n[t])
            grad_rk = torch.cat([grad_n * m[t], grad_h * (h - n[t])], 1) * rk[t] * (1 - rk[t])
            grad_gates = torch.cat([grad_rk, grad_n], 1)
            grad_phi = torch.addmm(grad_f[t], grad_gates, w_f) * (f[t] > 0)
            grad_z = grad_phi @ w_z
            # dz / dlogvar = exp(logvar / 2) noise / 2 = (z - mu) / 2
            grad_stats = grad_q[t] + torch.cat([grad_z, 0.5 * grad_z * (z[t] - q[t, :, :latent])], 1)
            grad_e = (grad_stats @ w_q) * (e[t] > 0)
            grad_a = torch.cat([grad_e, grad_rk, grad_n * r], 1)
            grad_h = torch.addmm(torch.addcmul(grad_states[t], grad_h, k), grad_a, w_h)
            made.append((torch.cat([grad_e, grad_gates], 1), grad_a, grad_stats, grad_phi))
        given, a, stats, phi = (torch.stack(parts[::-1]) for parts in zip(*made, strict=True))
        gates = given[..., units:]
        hidden = states.size(2)
        return (
            given, None, grad_h, _of_weight(a, states[:-1]), _of_weight(stats, e), stats.sum((0, 1)),
            _of_weight(phi, z), phi.sum((0, 1)), _of_weight(gates, f), a[..., -hidden:].sum((0, 1)),
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

    def __init__(
        self, vocabulary: int, embedding: int = 64, hidden: int = 256, latent: int = 32, *, beta: float = 1.0
    ) -> None:  # fmt: skip
        super().__init__()
        _check.positive("VRNN", vocabulary=vocabulary, embedding=embedding, hidden=hidden, latent=latent)
        if not beta >= 0:
            raise ValueError(f"VRNN: beta: expected at least 0, got {beta}")
        self.vocabulary, self.embedding, self.hidden, self.latent, self.beta = (
            vocabulary, embedding, hidden, latent, beta,
        )  # fmt: skip
        self.embed = nn.Embedding(vocabulary, embedding)
        self.prior = _network(hidden, hidden, 2 * latent)
        self.encoder = _network(embedding + hidden, hidden, 2 * latent)
        self.phi_z = nn.Sequential(nn.Linear(latent, embedding), nn.ReLU())
        self.decoder_net = _network(embedding + hidden, hidden, vocabulary)
        self.cell = nn.GRUCell(2 * embedding, hidden)

    def forward(self, x: torch.Tensor, *, seed: int | torch.Tensor | None = None) -> VRNNOutput:
        """Token ids [B, T], int64 -> what the losses are made of; `seed` of the z as for `ops.reparameterize`, whose
        element (t, b, j) is the noise of z_t."""
        _sequences.check_ids("VRNN", "x", x, self.vocabulary)
        weight = self.cell.weight_hh
        with torch.autocast(x.device.type, enabled=False):
            states, stats, phi = _Recurrence.apply(
                self._of_x(x.t()), self._noise(x, seed), weight.new_zeros(len(x), self.hidden), *self._weights()
            )
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
        self, count: int, length: int, choose: _sequences.Choose | None = None, *, seed: int | None = None
    ) -> torch.Tensor:
        """Ancestral samples, int64 [count, length] on the CPU: z_t from the prior, then x_t.

        Args:
            choose: logits [V] -> id, such as a `Sampler`; None: a draw from p(x_t | z_t, h_{t-1}) as it is.
            seed: of z and of those draws; None: the default generator's.
        """
        state = self.decoder(count, seed=seed)
        columns = _sequences.steps(state, None, choose or state.draw, length, -1)
        return torch.tensor(list(columns)).t().contiguous()

    def generate_ids(
        self, prompt: torch.Tensor | None = None, choose: _sequences.Choose | None = None, *, longest: int = 256,
        end: int | None = None, seed: int | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """The token ids of one sequence, one at a time as they are made.

        Args:
            prompt: token ids [T] that it goes on from, or None; each of their z is q's mean.
            choose: logits [V] -> id, such as a `Sampler`; None: a draw from p(x_t | z_t, h_{t-1}) as it is.
            longest: most tokens, without the prompt's.
            end: an id to stop at, which is left out; None: none.
            seed: of z and of those draws.
        """
        state = self.decoder(seed=seed)
        if prompt is not None:
            for token in _sequences.prompt_ids("VRNN", prompt, self.vocabulary, self.embed.weight.device)[0]:
                state.read(token[None])
        for (token,) in _sequences.steps(state, None, choose or state.draw, longest, -1 if end is None else end):
            yield token

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary}, hidden={self.hidden}, latent={self.latent}, beta={self.beta:g}"

    def _of_x(self, x: torch.Tensor) -> torch.Tensor:
        """What x [T, B] adds to the encoder's hidden layer and to the GRU's gates, biases included: one product."""
        first, cell, width = self.encoder[0], self.cell, self.embedding
        weight = torch.cat([first.weight[:, :width], cell.weight_ih[:, :width]])
        of_r_and_z = F.pad(cell.bias_hh[: 2 * self.hidden], (0, self.hidden))
        return F.linear(self.embed(x), weight, torch.cat([first.bias, cell.bias_ih + of_r_and_z]))

    def _weights(self) -> tuple[torch.Tensor, ...]:
        """w_h, w_q, b_q, w_z, b_z, w_f and b_n of `_Recurrence`."""
        first, last, phi, cell, width = self.encoder[0], self.encoder[2], self.phi_z[0], self.cell, self.embedding
        return (
            torch.cat([first.weight[:, width:], cell.weight_hh]), last.weight, last.bias, phi.weight, phi.bias,
            cell.weight_ih[:, width:], cell.bias_hh[2 * self.hidden :],
        )  # fmt: skip

    def _noise(self, x: torch.Tensor, seed: int | torch.Tensor | None) -> torch.Tensor:
        """All steps' noise in one call: it depends on no state."""
        nothing = self.cell.weight_hh.new_zeros(x.size(1), len(x), self.latent)
        return ops.reparameterize(nothing, nothing, seed=seed)


class VRNNDecoder:
    """What `VRNN.decoder` gives: h of each sequence, and the z drawn last."""

    @torch.no_grad()
    def __init__(self, model: VRNN, count: int, seed: int | None) -> None:
        _check.positive("VRNN", count=count)
        self.model = model
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.h = model.cell.weight_hh.new_zeros(count, model.hidden)
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
        """Go on by given tokens [B], their z being the mean of q."""
        x = self.model.embed(ids)
        self.phi = self.model.phi_z(self.model.encoder(torch.cat([x, self.h], 1)).chunk(2, 1)[0])
        self._advance(ids)

    def draw(self, logits: torch.Tensor) -> int:
        """An id from logits [V], by this state's generator."""
        return int(torch.multinomial(logits.float().softmax(0).cpu(), 1, generator=self.generator))

    def _advance(self, ids: torch.Tensor) -> None:
        self.h = self.model.cell(torch.cat([self.model.embed(ids), self.phi], 1), self.h)


def _network(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, n_out))


def _kl(mu: torch.Tensor, logvar: torch.Tensor, prior_mu: torch.Tensor, prior_logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))), summed over everything."""
    ratio = logvar - prior_logvar
    return 0.5 * (ratio.exp() + (mu - prior_mu).square() * torch.exp(-prior_logvar) - 1.0 - ratio).sum()
