"""What models may offer besides `genai_fast.contract`, by these names: commands and evaluation ask with `offers`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Choose = Callable[[torch.Tensor], torch.Tensor]
"""logits [B, V] -> the tokens that come next, [B] int64, such as a `generation.Sampler`. None: the likeliest."""


class Draws(Protocol):
    """Images of latents z ~ N(0, I), [N, latent]."""

    def sample(self, count: int, *, seed: int | None = None) -> torch.Tensor:
        """`count` images as the model has them; a seed gives the same z on every device."""

    def decode(self, z: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """Images of z; with the likelihood "bernoulli", their logits."""


class Truncates(Protocol):
    """Draws images closer to the mean one: 1: as it learned to; 0: the mean image alone."""

    truncation: float

    def decode(self, z: torch.Tensor) -> torch.Tensor: ...


class Encodes(Protocol):
    def encode(self, x: torch.Tensor, *labels: torch.Tensor) -> Any:
        """Images -> mu, logvar of q(z | x), [B, latent] each; of an autoencoder the codes [B, latent]."""


class Reconstructs(Protocol):
    def reconstruct(self, x: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """What encoder and decoder make of images, in their shape."""


class FitsDensity(Protocol):
    """Codes have a density that is fitted to them, from which samples are drawn."""

    def fit_density(self, batches: Iterable[torch.Tensor]) -> None:
        """Fit it to the codes of images. Raises ValueError on codes that have none."""


class Interpolates(Protocol):
    """Of models that do not draw; with those that do, the command line interpolates between latents that it draws."""

    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Images [C, H, W] a and b -> [steps, C, H, W], from the reconstruction of a to that of b."""


class Inpaints(Protocol):
    def inpaint(
        self, x: torch.Tensor, mask: torch.Tensor, *labels: torch.Tensor, steps: int = 200, seed: int | None = None
    ) -> torch.Tensor:
        """Images [B, C, H, W] repaired where mask [B, 1, H, W] is True."""


class Translates(Protocol):
    """Images of one set as they would be in another; `targets` names the sets that it can make, the first by default.

    translator(to): the network that does it.
    """

    targets: tuple[str, ...]

    def translate(self, x: torch.Tensor, to: str = "b") -> torch.Tensor:
        """Images [N, C, H, W] as the model has them -> the same number and shape, of set `to`."""

    def translator(self, to: str) -> torch.nn.Module: ...


class Upscales(Protocol):
    """Larger images of small ones."""

    scale: int  # by which sides grow
    reach: int  # pixels of a small image on each side of one that what becomes of it may depend on

    def lower(self, x: torch.Tensor) -> torch.Tensor:
        """Large images [N, C, H, W] as the small ones that the model learns to enlarge."""

    def upscale(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] of any size -> [N, C, scale H, scale W]."""


class DrawsWaves(Protocol):
    """Sounds, sample by sample. reach: codes that the distribution of the next one depends on."""

    reach: int

    def draw_codes(
        self, count: int, steps: int, labels: torch.Tensor | None = None, *, temperature: float = 1.0,
        seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`count` sounds of `steps` mu-law codes, [count, steps] int64; a seed gives the same draws on every device."""


class Request(NamedTuple):
    """A text that is asked for."""

    prompt: Sequence[int]  # token ids without `end`; empty: the model begins by itself
    end: int  # the token at which it ends, which is left out
    sampler: Choose
    longest: int  # tokens
    seed: int | None = None  # of what is drawn besides the tokens, such as z
    weights: str = "float32"  # precision of the matrices, where the model can round them
    penalty: float = 1.0  # of tokens that have been there; see `generation.penalized`


class Writes(Protocol):
    """A model of text."""

    continues: bool  # its text continues the prompt rather than answering it

    def write_ids(self, request: Request) -> Iterator[int]:
        """Token ids as they are made. Raises UsageError on a prompt that is too long."""


class Decoder(Protocol):
    """What writes B texts at the same time and keeps what it has seen."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Start again with ids [B, T] -> logits [B, V] of the next token."""

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B] -> logits [B, V] of the next token."""


class Verifies(Protocol):
    """A decoder that can look at several tokens at once, and forget the last ones. length: tokens that it has seen."""

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B, T] -> logits [B, T, V] of the token after each."""

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""


class WritesOn(Protocol):
    """A language model, which `generation.generate` serves. It has `block` if it sees at most that many tokens."""

    vocabulary: int

    def cached_decoder(self, batch: int, weights: str = "float32") -> Decoder: ...
