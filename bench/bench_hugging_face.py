"""Training steps of transformers' models, forward and backward, before and after `fuse`; skipped without transformers.

The models have random weights: nothing is downloaded. The fused one has what a user adds in three lines: `fuse`,
`lazy_logits` and the attention of `register_attention`.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from bench.bench_layers import COMPILED, DEVICE, EAGER, FUSED, QUICK, figures
from genai_fast import fuse, lazy_logits, register_attention

# Configuration and model of transformers, layers and width.
MODELS = {"llama-4x512": ("LlamaConfig", "LlamaForCausalLM"), "qwen3-4x512": ("Qwen3Config", "Qwen3ForCausalLM")}
VOCABULARY, BATCH, TOKENS = 32000, 4, 256
TOLERANCE = 1e-4  # of the loss and of gradients in 2-norm, float32 beside float32


@dataclass(frozen=True)
class Subject:
    """A model in training; `figures` asks for what bench_layers' subjects have."""

    model: str
    op = "transformers, training"
    variants = (EAGER, COMPILED, FUSED)

    def __str__(self) -> str:
        return f"transformers-{self.case}"

    @property
    def case(self) -> str:
        return f"{self.model}-{BATCH}x{TOKENS}"

    def _model(self, variant: str) -> nn.Module:
        import transformers

        config, model = (getattr(transformers, name) for name in MODELS[self.model])
        torch.manual_seed(0)
        made = model(
            config(
                vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
                num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=TOKENS,
                use_cache=False,
            )
        ).to(DEVICE).train()  # fmt: skip
        if variant == FUSED:
            made.set_attn_implementation(register_attention())
            return lazy_logits(fuse(made))
        if variant == COMPILED:
            torch.compiler.reset()
            return torch.compile(made, dynamic=False)
        return made

    def step(self, variant: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The loss and the gradients of all parameters."""
        model = self._model(variant)
        tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        parameters = list(model.parameters())

        def forward_backward() -> tuple[torch.Tensor, ...]:
            loss = model(tokens, labels=tokens).loss
            return (loss.detach(), *torch.autograd.grad(loss, parameters))

        return forward_backward


SUBJECTS = tuple(map(Subject, MODELS)) if importlib.util.find_spec("transformers") else ()


def red(subject: Subject) -> str:
    """What the fused model does not share with the plain one; "" if they compute the same."""
    results = zip(subject.step(FUSED)(), subject.step(EAGER)(), strict=True)
    for k, (found, expected) in enumerate(results):
        error, size = (torch.linalg.vector_norm(x).item() for x in (found - expected, expected))
        if not error <= TOLERANCE * size:
            return f"{subject}: result {k}: error {error:g} beside {size:g}"
    return ""


@pytest.mark.parametrize("subject", [pytest.param(s, id=str(s)) for s in SUBJECTS])
@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
def test_transformers(benchmark, measured, quick, subject):
    clock = functools.partial(figures, subject, **(QUICK if quick else {}))
    measured(benchmark, "figures", str(subject), lambda: red(subject), lambda: [clock()])
    step = subject.step(FUSED)
    benchmark(step if DEVICE == "cpu" else lambda: (step(), torch.cuda.synchronize()))
