"""What an exported script consists of besides its network: `export` copies this source, so it is plain PyTorch.

Nothing here may read a global but functions, classes and imports.
"""

import argparse
import itertools
import json
import math
import struct
import wave
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from genai_fast.data.audio.mel import Spectrum, to_sound
from genai_fast.data.audio.mu_law import mu_law_decode
from genai_fast.data.text.tokenizer import byte_alphabet


def save_images(images: torch.Tensor, path: Path, columns: int) -> None:
    """Write images [N, C, H, W], C 1 or 3, in [0, 1]: as a grid to a picture, or the tensor to a .pt file."""
    if path.suffix == ".pt":
        torch.save(images, path)
        return
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("a picture needs Pillow; remedy: pip install pillow, or --out FILE.pt") from None
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    sheet = torch.zeros(rows * columns, channels, height, width)
    sheet[:count] = images
    sheet = sheet.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)  # rows, H, columns, W, C
    pixels = bytes((sheet.reshape(-1) * 255).round().byte().tolist())
    Image.frombytes("L" if channels == 1 else "RGB", (columns * width, rows * height), pixels).save(path)


def read_image(path: Path, channels: int, sides: tuple[int, int] | None = None) -> torch.Tensor:
    """A picture as an image [C, H, W] in [-1, 1]; of these sides (H, W), the middle is taken."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise SystemExit("pictures need Pillow; remedy: pip install pillow") from None
    Image.init()
    known = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # for PostScript Pillow starts a program
    formats = [name for name in known if name in Image.OPEN]
    try:
        with Image.open(path, formats=formats) as picture:
            picture = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow raises all kinds on broken files
        raise SystemExit(f"{path}: expected a picture, got {error}") from None
    if sides:
        picture = ImageOps.fit(picture, sides[::-1])
    pixels = torch.tensor(list(picture.tobytes()), dtype=torch.float32)
    return pixels.view(picture.height, picture.width, channels).permute(2, 0, 1) / 127.5 - 1


def draw(model: nn.Module, shape: tuple[int, int, int], latent: int, classes: tuple[str, ...], signed: bool) -> None:
    """The command line of a model that makes images [C, H, W] of latents; signed: it makes them in [-1, 1]."""
    parser = argparse.ArgumentParser(description="Draw samples.")
    parser.add_argument("--count", type=int, default=64, help="how many; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    if classes:
        parser.add_argument("--class", dest="label", metavar="NAME", choices=classes, help="default: each in turn")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a picture, or a .pt file of [N, C, H, W] in [0, 1]; default: %(default)s",
    )
    options = parser.parse_args()
    inputs = [torch.randn(options.count, latent, generator=torch.Generator().manual_seed(options.seed))]
    if classes:
        labels = torch.arange(options.count) % len(classes)
        inputs.append(labels if options.label is None else torch.full_like(labels, classes.index(options.label)))
    decode = getattr(model, "decode", model)
    with torch.no_grad():
        parts = [decode(*part) for part in zip(*(x.split(100) for x in inputs), strict=True)]
    x = torch.cat(parts).view(-1, *shape)
    save_images((x * 0.5 + 0.5 if signed else x).clamp(0, 1), options.out, math.ceil(math.sqrt(options.count)))
    print(f"{options.out}: {options.count} samples")


def draw_sounds(model: nn.Module, latent: int, spectrum: Spectrum) -> None:
    """The command line of a model that makes log-mel spectrograms of latents: sounds, one after the other."""
    parser = argparse.ArgumentParser(description="Draw samples.")
    parser.add_argument("--count", type=int, default=16, help="how many; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.wav"),
        help="a WAV file, or a .pt file of spectrograms [N, mels, frames] in [-1, 1]; default: %(default)s",
    )
    options = parser.parse_args()
    z = torch.randn(options.count, latent, generator=torch.Generator().manual_seed(options.seed))
    with torch.no_grad():
        features = torch.cat([model.decode(part) for part in z.split(100)])
    if options.out.suffix == ".pt":
        torch.save(features, options.out)
    else:
        with wave.open(str(options.out), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(spectrum.rate)
            for part in features.split(100):
                for x in nn.functional.pad(to_sound(part, spectrum), (0, spectrum.rate // 5)):
                    file.writeframes(struct.pack(f"<{len(x)}h", *(x * 32767).round().int().tolist()))
    print(f"{options.out}: {options.count} samples")


def draw_waves(model: nn.Module, rate: int, classes: tuple[str, ...]) -> None:
    """The command line of a model that makes mu-law codes one after the other: sounds in a WAV file."""
    parser = argparse.ArgumentParser(description="Draw samples; each code takes the whole network.")
    parser.add_argument("--count", type=int, default=4, help="how many; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.25, help="of each; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    if classes:
        parser.add_argument("--class", dest="label", metavar="NAME", choices=classes, help="default: each in turn")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.wav"),
        help="a WAV file, or a .pt file of codes [N, T] int64; default: %(default)s",
    )
    options = parser.parse_args()
    labels = None
    if classes:
        labels = torch.arange(options.count) % len(classes)
        labels = labels if options.label is None else torch.full_like(labels, classes.index(options.label))
    generator = torch.Generator().manual_seed(options.seed)
    steps = max(round(options.seconds * rate), 1)
    codes = torch.stack([*model.generate(options.count, steps, labels, generator=generator)], 1)
    if options.out.suffix == ".pt":
        torch.save(codes, options.out)
    else:
        with wave.open(str(options.out), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            for x in nn.functional.pad(mu_law_decode(codes), (0, rate // 5)):
                file.writeframes(struct.pack(f"<{len(x)}h", *(x * 32767).round().int().tolist()))
    print(f"{options.out}: {options.count} samples")


def reconstruct(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """The command line of an autoencoder of images [C, H, W] in [-1, 1]: pictures, and below what it makes of them."""
    parser = argparse.ArgumentParser(description="Reconstruct pictures.")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="its centre square is taken")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reconstructions.png"),
        help="a picture, or a .pt file of [2 N, C, H, W] in [0, 1]; default: %(default)s",
    )
    options = parser.parse_args()
    x = torch.stack([read_image(path, shape[0], shape[1:]) for path in options.pictures])
    with torch.no_grad():
        x = torch.cat([x, model(x)])
    save_images((x * 0.5 + 0.5).clamp(0, 1), options.out, len(options.pictures))
    print(f"{options.out}: {len(options.pictures)} pictures and their reconstructions")


def translate(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """The command line of a network from images [C, H, W] in [-1, 1] to such images: each becomes a file."""
    parser = argparse.ArgumentParser(description="Translate pictures.")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="its centre square is taken")
    parser.add_argument(
        "--out", type=Path, default=Path("translated"), help="folder for the pictures; default: %(default)s"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.pictures:
        with torch.no_grad():
            made = model(read_image(path, shape[0], shape[1:])[None])
        save_images((made * 0.5 + 0.5).clamp(0, 1), options.out / f"{path.stem}.png", 1)
    print(f"{options.out}: {len(options.pictures)} pictures")


def upscale(model: nn.Module, channels: int) -> None:
    """The command line of a network that enlarges images [C, H, W] in [-1, 1] of any size: each becomes a file."""
    parser = argparse.ArgumentParser(description="Enlarge pictures.")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--out", type=Path, default=Path("enlarged"), help="folder for them; default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.pictures:
        with torch.no_grad():
            made = model(read_image(path, channels)[None])
        save_images((made * 0.5 + 0.5).clamp(0, 1), options.out / f"{path.stem}.png", 1)
    print(f"{options.out}: {len(options.pictures)} pictures")


def tokenizers_of() -> ModuleType:
    """Package tokenizers."""
    try:
        import tokenizers
    except ImportError:
        raise SystemExit("a prompt in BPE needs package tokenizers; remedy: pip install tokenizers") from None
    return tokenizers


class Tokenizer:
    """Text to ids and back, as tokenizer.json says; `end` separates texts. Encoding by BPE needs package tokenizers,
    and so does decoding by one of Hugging Face's."""

    def __init__(self, path: Path) -> None:
        self.saved = json.loads(path.read_text(encoding="utf-8"))
        kind = self.saved["kind"]
        if kind == "byte":
            self.table = [bytes([value]) for value in range(256)]
        elif kind == "char":
            self.table = [character.encode() for character in [*self.saved["characters"], "\ufffd"]]
        elif kind == "hugging-face":
            self.encoder = tokenizers_of().Tokenizer.from_str(json.dumps(self.saved["contents"]))
            self.end = self.saved["end"]
            self.encoder.encode_special_tokens = True
            return
        else:
            values = {character: value for value, character in enumerate(byte_alphabet())}
            self.table = [bytes(values[character] for character in token) for token in self.saved["tokens"]]
        self.end = len(self.table)

    def encode(self, text: str) -> list[int]:
        kind = self.saved["kind"]
        if kind == "byte":
            return list(text.encode())
        if kind == "char":
            ids = {character: k for k, character in enumerate(self.saved["characters"])}
            return [ids.get(character, len(ids)) for character in text]
        if kind == "hugging-face":
            return self.encoder.encode(text).ids
        if not text:
            return []
        tokenizers = tokenizers_of()
        vocabulary = {token: k for k, token in enumerate(self.saved["tokens"])}
        merges = [(a, b) for a, b in self.saved["merges"]]
        encoder = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return encoder.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        if self.saved["kind"] == "hugging-face":
            return self.encoder.decode(ids, skip_special_tokens=True)
        return b"".join(self.table[k] for k in ids if k != self.end).decode("utf-8", "replace")


def picker(temperature: float, top_k: int, top_p: float, seed: int) -> Callable[[torch.Tensor], int]:
    """logits [V] -> a token: at temperature 0 the likeliest; else drawn among the top_k likeliest (0: all), and of
    these the likeliest that make up top_p of the probability."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits: torch.Tensor) -> int:
        x = logits.double()
        if temperature == 0:
            return int(x.argmax())
        x = (x - x.max()) / temperature
        best = x.topk(min(top_k, len(x))).values if top_k else x.sort(descending=True).values
        weights = best.exp()
        inside = weights.cumsum(0) - weights < top_p * weights.sum()
        weights = x.masked_fill(x < best[inside.sum() - 1], -math.inf).exp()
        sums = weights.cumsum(0)
        drawn = torch.searchsorted(sums, torch.rand(1, dtype=torch.float64, generator=generator) * sums[-1], right=True)
        return min(int(drawn), int(weights.nonzero()[-1]))

    return pick


def write(model: nn.Module, tokenizer: Tokenizer, continues: bool) -> None:
    """The command line of a model of text; continues: its text continues the prompt rather than answering it."""
    parser = argparse.ArgumentParser(description="Write text.")
    parser.add_argument("--prompt", default="", help="default: the model begins by itself")
    parser.add_argument("--max-tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest; default: %(default)s")
    parser.add_argument("--top-k", type=int, default=50, help="the k most likely tokens, 0: all; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus probability; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    pick = picker(options.temperature, options.top_k, options.top_p, options.seed)
    noise = torch.Generator().manual_seed(options.seed)
    tokens = model.generate(tokenizer.encode(options.prompt), pick, tokenizer.end, noise)
    ends = {tokenizer.end, *tokenizer.saved.get("others", ())}
    written = itertools.takewhile(lambda token: token not in ends, itertools.islice(tokens, options.max_tokens))
    print((options.prompt if continues else "") + tokenizer.decode(list(written)))
