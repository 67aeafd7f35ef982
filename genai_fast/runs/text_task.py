"""Training on text: the data, the tokenizer, the model that fits them, and the texts that show how it learns."""

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from genai_fast import atomic_files
from genai_fast.config import TextConfig
from genai_fast.data import text
from genai_fast.data.text import Tokenizer
from genai_fast.errors import UsageError
from genai_fast.models.registry import RECIPES
from genai_fast.runs import text_generation
from genai_fast.training import checkpoint, distributed, parallel
from genai_fast.training.batches import Feed
from genai_fast.training.loop import Look, evaluate
from genai_fast.training.tensorboard import Board

TOKENIZER = "tokenizer.json"
_SAMPLE = 200  # tokens of a text in samples/


class TextTask:
    """A recipe for text and its data."""

    packages = ()

    def __init__(self, name: str, settings: TextConfig, resumed: Path | None = None) -> None:
        self.name, self.settings, self._kind = name, settings, RECIPES[name].feed
        corpus = self._corpus(resumed)
        self._source = corpus.name
        self.training, self.validation = corpus.split(settings.validation, settings.seed)
        if self._kind == "sequences":
            self.training, self.validation = self.training.passages(), self.validation.passages()
        self.tokenizer = self._tokenizer(resumed)
        self.about: dict[str, Any] = {
            "recipe": name,
            "tokenizer": self.tokenizer.digest,
            "vocabulary": self.tokenizer.size,
            "documents": len(corpus),
            "characters": _size(corpus),
            "data": _digest(corpus.documents),
        }
        self._bytes_a_token = 0.0

    def _corpus(self, resumed: Path | None) -> Any:
        load = text.load_pairs if self._kind == "pairs" else text.load
        corpus = load(self.settings.data, strict=self.settings.strict)
        stand = checkpoint.found(resumed) if resumed and self.settings.data == text.PYDOC else []
        if stand and checkpoint.read_state(stand[0])["about"].get("characters") != _size(corpus):
            return load(text.PYDOC_0_1)  # the run began under that version
        return corpus

    def _tokenizer(self, resumed: Path | None) -> Tokenizer:
        """Of the run that is resumed, of the run whose weights begin this one, or made from the training part."""
        settings, folders = self.settings, [resumed] if resumed else []
        if settings.init:
            begun = Path(settings.init)
            folders.append(begun if begun.is_dir() else begun.parent)
        for folder in folders:
            if (pretrained := RECIPES[self.name].pretrained) and pretrained.found(folder):
                return pretrained.tokenizer(folder)
            if (folder / TOKENIZER).exists():
                return text.read_tokenizer(folder / TOKENIZER)
        size = settings.vocabulary if settings.tokenizer == "bpe" else None
        return text.make_tokenizer(settings.tokenizer, self.training.documents, size)

    @property
    def described(self) -> str:
        """The data in words."""
        what = {"pairs": "pairs", "sequences": "passages"}.get(self._kind, "documents")
        return f"{self._source}: {len(self.training):,} {what} for training, {len(self.validation):,} held out"

    def model(self) -> nn.Module:
        try:
            return RECIPES[self.name].make(self.settings, self.tokenizer.size, self.tokenizer.end)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def feeds(self, model: nn.Module) -> tuple[Feed, Feed]:
        """For training and for validation."""
        training, self._held_out = self._feed(self.training), self._feed(self.validation)
        training.steps  # noqa: B018  (says so where there is too little text, before anything is written)
        return training, self._held_out

    def _feed(self, corpus: Any) -> Feed:
        s, tokenizer = self.settings, self.tokenizer
        if self._kind == "pairs":
            return text.Pairs(*text.pack_pairs(corpus.pairs, tokenizer), s.block, s.batch_size, s.seed)
        if self._kind == "sequences":
            return text.Sequences(text.pack(corpus.documents, tokenizer), s.block, s.batch_size, s.seed)
        tokens = text.pack(corpus.documents, tokenizer)
        if self._kind == "streams":
            return text.Streams(tokens, s.block, s.batch_size)
        return text.Windows(tokens, s.block, s.batch_size, s.seed)

    def prepare(self, folder: Path) -> None:
        """What a run's folder holds besides: the tokenizer."""
        self.tokenizer.save(folder / TOKENIZER)

    def watch(self, model: nn.Module, folder: Path, board: Board | None) -> Callable[[int, dict[str, float]], Look]:
        """Called at the end of an epoch: writes samples/epoch-<n>.txt, to a board too; gives figures on held-out text,
        and what was written."""

        def look(epoch: int, train: dict[str, float]) -> Look:
            every, sample = self.settings.sample_every, ""
            if every and epoch % every == 0:
                shown = parallel.whole_model(model, self.model)
                if distributed.first():
                    path, sample = folder / "samples" / f"epoch-{epoch:04d}.txt", self.example(shown)
                    path.parent.mkdir(exist_ok=True)
                    atomic_files.write_text(path, sample)
                if board is not None:
                    board.text("samples", sample)
            return Look(per_token(evaluate(model, self._held_out, self.settings), self._bytes()), [], sample)

        return look

    def _bytes(self) -> float:
        """Bytes of held-out text a token, of what the model predicts."""
        if not self._bytes_a_token:
            pairs = self._kind == "pairs"
            texts = [target for _, target in self.validation.pairs] if pairs else self.validation.documents
            tokens = sum(len(self.tokenizer.encode(x)) + 1 for x in texts)  # each has its end
            self._bytes_a_token = sum(len(x.encode()) for x in texts) / tokens
        return self._bytes_a_token

    def example(self, model: nn.Module) -> str:
        """A text by the model as it is now."""
        return text_generation.example(model, self.tokenizer, self.settings.seed + 1, _SAMPLE)

    def finish(self, model: nn.Module, folder: Path) -> None:
        atomic_files.write_text(folder / "sample.txt", self.example(model))

    @staticmethod
    def open(name: str, settings: TextConfig, about: dict[str, Any], folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        """A run's model, without its weights, and what else `Opened` says of it."""
        tokenizer = text.read_tokenizer(folder / TOKENIZER)
        if tokenizer.digest != about["tokenizer"]:
            raise UsageError(
                f"{folder / TOKENIZER}: expected the tokenizer {about['tokenizer']} of the run's checkpoint, got"
                f" {tokenizer.digest}; remedy: put the run's own file back"
            )
        return RECIPES[name].make(settings, tokenizer.size, tokenizer.end), {"tokenizer": tokenizer}


def _size(corpus: Any) -> int:
    """Characters."""
    return sum(map(len, corpus.documents))


def _digest(documents: Iterable[str]) -> str:
    """16 hexadecimal digits of the documents, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{len(document)} {document}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def per_token(figures: dict[str, float], bytes_a_token: float) -> dict[str, float]:
    """With perplexity (exp of the nats a token) and bits a byte; of a variational model, of its bound."""
    if "nats" in figures:
        nats = figures["nats"] / figures["tokens"]
    elif "kl" in figures:
        nats = (figures["reconstruction"] + figures["kl"]) / figures["tokens"]
    else:
        nats = figures["loss"]
    return {**figures, "perplexity": math.exp(min(nats, 700.0)), "bits_per_byte": nats / math.log(2) / bytes_a_token}
