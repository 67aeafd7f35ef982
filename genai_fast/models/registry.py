"""What the command line can train: a name, its settings, and how its model is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from genai_fast import models
from genai_fast.config import Config
from genai_fast.errors import UsageError
from genai_fast.models import settings

Shape = tuple[int, int, int]  # (C, H, W) of an image


@dataclass(frozen=True)
class Recipe:
    """A kind of model and its settings.

    build(settings, shape, classes) makes a model for images of that shape; it has `training_step` or `turns` as
    `Step` takes them, and of `sample`, `reconstruct` and `decode` what makes sense for it. For text it is
    build(settings, vocabulary, end), and `feed` says how the text comes: windows, streams, sequences or pairs.
    """

    summary: str
    config: type[Config]
    build: Callable[..., nn.Module]
    labelled: bool = False  # needs labels
    feed: str = ""


def _vae(config: settings.VAEConfig, shape: Shape, classes: int) -> nn.Module:
    size = shape[0] * shape[1] * shape[2]
    return models.MLPVAE(size, config.hidden, config.latent, beta=config.beta, likelihood=config.likelihood)


def _autoencoder(config: settings.AutoencoderConfig, shape: Shape, classes: int) -> nn.Module:
    return _channels_last(models.Autoencoder(_side(shape), channels=shape[0], latent=config.latent))


def _conv_vae(config: settings.ConvVAEConfig, shape: Shape, classes: int) -> nn.Module:
    return _channels_last(models.ConvVAE(_side(shape), channels=shape[0], latent=config.latent, beta=config.beta))


def _cvae(config: settings.ConvVAEConfig, shape: Shape, classes: int) -> nn.Module:
    size = {"channels": shape[0], "latent": config.latent}
    return _channels_last(models.ConditionalVAE(classes, _side(shape), beta=config.beta, **size))


def _mlp_gan(config: settings.GANConfig, shape: Shape, classes: int) -> nn.Module:
    return _pair(config, models.MLPGenerator(shape, latent=config.latent), models.MLPDiscriminator(shape))


def _dcgan(config: settings.DCGANConfig, shape: Shape, classes: int) -> nn.Module:
    side, channels, latent = _side(shape), shape[0], config.latent
    if config.network == "dcgan":
        generator = models.DCGANGenerator(side, latent=latent, width=config.width, channels=channels)
        discriminator = models.DCGANDiscriminator(
            side,
            width=config.width,
            channels=channels,
            dropout=max(config.dropout, 0.0),
            norm="none" if config.spectral else "batch",
            spectral=config.spectral,
        )
        return _channels_last(_pair(config, models.dcgan_init(generator), models.dcgan_init(discriminator)))
    if config.spectral:
        raise UsageError(f"--spectral: expected --network dcgan, got {config.network}; remedy: leave one of them out")
    if side % 4:
        raise UsageError(f"--network {config.network}: expected a side of a multiple of 4, got {side}; remedy: --size")
    kind = models.DenseGenerator if config.network == "dense" else models.DenseGeneratorK4
    dropout = {"dropout": config.dropout} if config.dropout >= 0 else {}
    return _pair(
        config,
        kind(latent, channels=channels, side=side // 4),
        models.DenseDiscriminator(side, channels=channels, **dropout),
    )


def _cgan(config: settings.ConditionalGANConfig, shape: Shape, classes: int) -> nn.Module:
    size = {"width": config.width, "channels": shape[0]}
    generator = models.ConditionalGenerator(classes, _side(shape), latent=config.latent, **size)
    discriminator = models.ConditionalDiscriminator(classes, _side(shape), **size)
    pair = _pair(config, models.dcgan_init(generator), models.dcgan_init(discriminator), classes=classes)
    return _channels_last(pair)


def _wgan_gp(config: settings.WGANGPConfig, shape: Shape, classes: int) -> nn.Module:
    side, size = _side(shape), {"width": config.width, "channels": shape[0]}
    generator = models.DCGANGenerator(side, latent=config.latent, **size)
    critic = models.DCGANDiscriminator(side, norm=config.norm, **size)
    options = {"ema": config.ema, "n_critic": config.n_critic, "penalty": config.penalty}
    return _channels_last(models.WGANGP(models.dcgan_init(generator), models.dcgan_init(critic), **options))


def _channels_last(model: nn.Module) -> nn.Module:
    """Weights in the memory layout in which most convolutions are fastest; not those of kernel 5 and few channels."""
    return model.to(memory_format=torch.channels_last)


def _pair(config: settings.GANConfig, generator: nn.Module, discriminator: nn.Module, classes: int = 0) -> models.GAN:
    return models.GAN(generator, discriminator, classes=classes, smoothing=config.smoothing, ema=config.ema)


def _side(shape: Shape) -> int:
    if shape[1] != shape[2]:
        raise UsageError(f"expected square images, got {shape[1]} x {shape[2]}; remedy: --size PIXELS")
    return shape[1]


def _gpt(config: settings.GPTConfig, vocabulary: int, end: int) -> nn.Module:
    size = {"layers": config.layers, "heads": config.heads, "width": config.width}
    return models.GPT(vocabulary, config.block, dropout=config.dropout, **size)


def _lstm(config: settings.LSTMConfig, vocabulary: int, end: int) -> nn.Module:
    size = {"embedding": config.embedding, "hidden": config.hidden, "layers": config.layers}
    return models.LSTMLanguageModel(vocabulary, dropout=config.dropout, **size)


def _seq2seq(config: settings.Seq2SeqConfig, vocabulary: int, end: int) -> nn.Module:
    size = {"layers": config.layers, "heads": config.heads, "width": config.width}
    return models.Seq2Seq(vocabulary, end, config.block, dropout=config.dropout, **size)


def _text_vae(config: settings.TextVAEConfig, vocabulary: int, end: int) -> nn.Module:
    size = {"embedding": config.embedding, "hidden": config.hidden, "latent": config.latent}
    kl = {"beta": config.beta, "annealing": config.annealing, "word_dropout": config.word_dropout}
    return models.TextVAE(vocabulary, end, **size, **kl)


def _vrnn(config: settings.VRNNConfig, vocabulary: int, end: int) -> nn.Module:
    size = {"embedding": config.embedding, "hidden": config.hidden, "latent": config.latent}
    return models.VRNN(vocabulary, beta=config.beta, **size)


RECIPES = {
    "vae": Recipe("variational autoencoder of one hidden layer", settings.VAEConfig, _vae),
    "conv-vae": Recipe("convolutional variational autoencoder", settings.ConvVAEConfig, _conv_vae),
    "cvae": Recipe("conditional variational autoencoder, for labelled images", settings.ConvVAEConfig, _cvae, True),
    "autoencoder": Recipe("convolutional autoencoder", settings.AutoencoderConfig, _autoencoder),
    "mlp-gan": Recipe("generative adversarial network of dense layers", settings.GANConfig, _mlp_gan),
    "dcgan": Recipe("deep convolutional GAN", settings.DCGANConfig, _dcgan),
    "cgan": Recipe("conditional DCGAN, for labelled images", settings.ConditionalGANConfig, _cgan, True),
    "wgan-gp": Recipe("Wasserstein GAN with gradient penalty", settings.WGANGPConfig, _wgan_gp),
    "gpt": Recipe("decoder-only Transformer that writes text", settings.GPTConfig, _gpt, feed="windows"),
    "lstm": Recipe("LSTM language model", settings.LSTMConfig, _lstm, feed="streams"),
    "seq2seq": Recipe("encoder-decoder Transformer: text in, text out", settings.Seq2SeqConfig, _seq2seq, feed="pairs"),
    "text-vae": Recipe("variational autoencoder of sentences", settings.TextVAEConfig, _text_vae, feed="sequences"),
    "vrnn": Recipe("variational recurrent network over text", settings.VRNNConfig, _vrnn, feed="windows"),
}


def make(name: str, config: Config, shape: Shape, classes: int) -> nn.Module:
    """The model of recipe `name` for images of that shape.

    Raises:
        UsageError: the settings and the images do not go together.
    """
    recipe = RECIPES[name]
    if recipe.labelled and classes < 1:
        raise UsageError(
            f"{name}: expected images with labels, got none; remedy: a folder with one subfolder for each class, or"
            f" labels beside the images"
        )
    try:
        return recipe.build(config, shape, classes)
    except ValueError as error:
        raise UsageError(f"{name}: {error}; the images' size is set by --size") from error
