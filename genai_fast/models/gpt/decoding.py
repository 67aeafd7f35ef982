"""A GPT that keeps the keys and values of all tokens so far, and its step past its modules.

That step makes each linear layer one launch of ops.decode_linear, with the norm before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from genai_fast import autotune, ops
from genai_fast.backends import choose, forced_backend
from genai_fast.capture import aside, capture
from genai_fast.fusion.chains import global_hooks, obstacle
from genai_fast.kernels.common.schema import FLOAT_DTYPES
from genai_fast.kernels.decode_linear.layout import MOST_ROWS
from genai_fast.kernels.gpt_decode import layout
from genai_fast.layers import LayerNorm
from genai_fast.models.common import checks
from genai_fast.models.common.generation import as_it_is, check_rows, unrounded
from genai_fast.models.common.submodules import first_rows
from genai_fast.models.gpt.model import _MLP, GPT, Attend, _Attention, _Block

# What `next_logits` reads; a module of another class may compute anything.
_PARTS = {GPT, _Block, _Attention, _MLP, LayerNorm, nn.Linear, nn.Embedding, nn.ModuleDict, nn.ModuleList}


def serves(model: GPT, batch: int) -> bool:
    """Whether the kernel computes steps of this many rows of this model, and what its modules would."""
    weight = next(model.parameters())
    if batch > MOST_ROWS or weight.dtype not in FLOAT_DTYPES or not _is_as_made(model):
        return False
    if choose("decode_linear", forced_backend(), weight.device.type, weight.dtype)[0] != "triton":
        return False
    return all(p.dtype is weight.dtype for p in model.parameters())


def _is_as_made(model: GPT) -> bool:
    """Whether it has the modules that GPT makes, of its sizes, and calling them does nothing else."""
    if (type(model).run, type(model).forward) != (GPT.run, GPT.forward) or global_hooks():
        return False
    modules = [m for m in model.modules() if m is not model]
    if obstacle(model) or any(type(m) not in _PARTS or obstacle(m) for m in modules):
        return False
    settings = {m.eps for m in modules if isinstance(m, LayerNorm)}, {b.attn.heads for b in model.transformer.h}
    if any(len(found) > 1 for found in settings) or any(getattr(m, "max_norm", None) for m in modules):
        return False
    layers, positions = len(model.transformer.h), len(model.transformer.wpe.weight)
    size = layout.Sizes(model.vocabulary, model.width, positions, layers, 4 * model.width)
    expected = dict(zip(layout.names(layers), layout.shapes(size), strict=True))
    state = model.state_dict()
    whole = all(name in state or name.endswith(".bias") for name in expected)
    return whole and positions >= model.block and all(expected.get(name) == w.shape for name, w in state.items())


def next_logits(model: GPT, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Ids [B] at positions [B] -> logits [B, V] of the next token; `attend` as GPT.run takes it."""
    parts = model.transformer
    h = parts.wte(ids) + parts.wpe(positions)
    for layer, block in enumerate(parts.h):
        # [B, 3 C] -> three of [B, H, 1, D]
        qkv = _normed(h, block.ln_1, block.attn.c_attn).unflatten(1, (3, block.attn.heads, 1, -1))
        y = attend(layer, *qkv.unbind(1)).flatten(1)
        h = ops.decode_linear(y, block.attn.c_proj.weight, block.attn.c_proj.bias, residual=h)
        y = _normed(h, block.ln_2, block.mlp.c_fc, "gelu_tanh")
        h = ops.decode_linear(y, block.mlp.c_proj.weight, block.mlp.c_proj.bias, residual=h)
    return _normed(h, parts.ln_f, model.lm_head)


def _normed(x: torch.Tensor, norm: LayerNorm, linear: nn.Linear, activation: str = "none") -> torch.Tensor:
    return ops.decode_linear(
        x, linear.weight, linear.bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, activation=activation
    )


def cached_decoder(model: GPT, batch: int, weights: str) -> CachedGPT | ops.GPTDecoder:
    """See `generation.decoder_for`."""
    parameters = list(model.parameters())
    plain = all(p.is_cpu and p.dtype is torch.float32 for p in parameters) and _is_as_made(model)
    if plain and choose("gpt_decode", forced_backend(), "cpu")[0] == "cpu":
        eps = model.transformer.ln_f.eps
        return ops.GPTDecoder(model.state_dict(), model.heads, model.block, batch, weights, eps=eps)
    one = parameters[0]
    unrounded(weights, f"a GPT of {one.dtype} on {one.device} that modules decode (changed modules, no kernel)")
    return CachedGPT(model, batch)


class CachedGPT:
    """A GPT with the keys and values of all tokens so far; on CUDA a step is one captured graph.

    Weights may change between the calls, but on CUDA only in place.

    Attributes:
        path: how a step is computed. "modules": by the model's own; "kernels": by `ops.decode_linear`, on CUDA alone,
            for up to 16 rows of a model whose modules are as GPT made them, where the first step measures it the faster
            (genai_fast.autotune remembers that; GENAI_FAST_DETERMINISTIC=1 pins "modules").
    """

    def __init__(self, model: GPT, batch: int) -> None:
        weight = next(model.parameters())
        shape = (len(model.transformer.h), batch, model.heads, model.block, model.width // model.heads)
        self._model, self._batch, self._held = model, batch, 0
        self._keys, self._values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        self.path = "modules"
        self._capture = weight.is_cuda
        self._replay: Callable[[torch.Tensor], torch.Tensor] | None = None

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Forget all and begin with ids [B, T], T <= block -> logits [B, V] of the next token."""
        ids = ids.to(self._lengths.device)
        check_rows(ids, self._batch)
        self._model.check_ids(ids)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._keys[layer, :, :, : k.size(2)] = k
            self._values[layer, :, :, : v.size(2)] = v
            return ops.causal_attention(q, k, v)

        with as_it_is(self._model):
            y = self._model.run(ids, first_rows(self._model.transformer.wpe, ids.size(1), ids.device), attend)
            self._held = ids.size(1)
            self._lengths.fill_(self._held)
            return self._model.lm_head(y[:, -1])

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B] -> logits [B, V] of the next token."""
        check_rows(ids, self._batch)
        if not 0 < self._held < self._model.block:
            raise ValueError(
                f"CachedGPT: step: expected 1 to {self._model.block - 1} tokens before this one, got {self._held};"
                f" remedy: prefill"
            )
        checks.token_ids("CachedGPT", "ids", ids[:, None], self._model.vocabulary)  # not checked on a GPU
        ids = ids.to(self._lengths.device)
        with as_it_is(self._model):
            if self._capture and self._replay is None:
                self._replay = self._captured(ids)
            logits = (self._replay or self._by_modules)(ids)
        self._held += 1
        return logits

    def _captured(self, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The step as a graph, by its modules or, where that is faster, by kernels."""
        ways, graphs = {"modules": self._by_modules, "kernels": self._by_kernels}, {}

        def maker(name: str) -> autotune.Maker:
            def make() -> Callable[[], Any]:
                graphs[name] = _graphed(ways[name], ids, self._lengths)

                def replay() -> None:
                    self._lengths.fill_(self._held)  # each replay moves them on
                    graphs[name](ids)

                return replay

            return make

        if serves(self._model, self._batch):
            family = ("step of a GPT", "vocabulary", self._model.vocabulary, self._keys.dtype)
            makers, shape = {name: maker(name) for name in ways}, tuple(self._keys.shape)
            self.path = autotune.choose(family, shape, self._lengths.device, lambda: (makers, "modules")).name
            self._lengths.fill_(self._held)
        return graphs.get(self.path) or _graphed(ways[self.path], ids, self._lengths)

    def _by_modules(self, ids: torch.Tensor) -> torch.Tensor:
        positions = self._model.transformer.wpe(self._lengths)[:, None]
        y = self._model.run(ids[:, None], positions, self._attend)
        self._lengths += 1
        return self._model.lm_head(y[:, 0])

    def _by_kernels(self, ids: torch.Tensor) -> torch.Tensor:
        logits = next_logits(self._model, ids, self._lengths, self._attend)
        self._lengths += 1
        return logits

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.decode_attention(q, self._keys[layer], self._values[layer], self._lengths, k, v)


def _graphed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, state: torch.Tensor) -> Any:
    """function(x) as one CUDA graph; `state` is what it moves on and the warm-up must not."""
    static, before = x.clone(), state.clone()
    with aside(x.device):  # libraries set themselves up, kernels are compiled
        for _ in range(2):
            function(static)
            state.copy_(before)
    graph, result = capture(lambda: function(static), x.device)

    def replay(x: torch.Tensor) -> torch.Tensor:
        static.copy_(x)
        graph.replay()
        return result.clone()

    return replay
