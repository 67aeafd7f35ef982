"""What tests/training/test_distributed.py runs in two processes and in one."""

import contextlib
import json
import math
import os
import pydoc_data.topics
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from genai_fast import data
from genai_fast.fusion import thresholds
from genai_fast.models import MLPVAE
from genai_fast.models.registry import RECIPES
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.runs import run
from genai_fast.training import TrainingInterrupted, distributed, fit, make_optimizer
from genai_fast.training.batches import ImageFeed

COMMON = {"log_every": 1, "threads": 1, "epochs": 1}
IMAGES = {**COMMON, "data": "small.npz", "validation": 0.05, "grid_every": 0, "quality_every": 0}
WIDE = {**IMAGES, "data": "wide.npz", "batch_size": 32, "sync_bn": True}
BOTH = {**IMAGES, "data": "wide.npz", "data_b": "wide.npz", "batch_size": 32, "width": 4}
TEXT = {
    **COMMON, "data": "words.txt", "tokenizer": "byte", "block": 16, "batch_size": 32, "sample_every": 0,
    "warmup": 0, "validation": 0.4,
}  # fmt: skip
GPT = {**TEXT, "layers": 2, "heads": 2, "width": 16, "dropout": 0.2, "decay": "none"}
LSTM = {**TEXT, "layers": 2, "embedding": 8, "hidden": 16, "block": 8}
RESUMED = {"checkpoint_every": 2}

# Name -> recipe and settings of a run that must be the same in one process and in two.
SAME = {
    "vae": ("vae", {**IMAGES, "hidden": 16, "latent": 4, "batch_size": 256, "rotate": 10, "crop": 1, "flip": 0.5,
                    "jitter": 0.1, "epochs": 2, "checkpoint_every": 4}),
    "conv-vae": ("conv-vae", {**WIDE, "latent": 4}),
    "vq-vae": ("vq-vae", {**WIDE, "codebook": 16, "embedding": 4, "hidden": 8, "blocks": 1}),
    "mlp-gan": ("mlp-gan", {**IMAGES, "batch_size": 128, "latent": 8, "ema": 0.5}),
    "dcgan": ("dcgan", {**WIDE, "latent": 8, "width": 4, "clip": 1.0}),
    "cgan": ("cgan", {**WIDE, "latent": 8, "width": 4}),
    "wgan-gp": ("wgan-gp", {**WIDE, "latent": 8, "width": 4, "n_critic": 2, "batch_size": 16}),
    "cyclegan": ("cyclegan", {**BOTH, "blocks": 1, "pool": 96}),  # which is not full before the end
    "pix2pix": ("pix2pix", {**BOTH, "dropout": 0.0}),
    "gpt": ("gpt", {**GPT, **RESUMED}),
    "lstm": ("lstm", {**LSTM, **RESUMED}),
    "seq2seq": ("seq2seq", {**TEXT, "layers": 1, "heads": 2, "width": 16, "dropout": 0.0, "batch_size": 4}),
    "text-vae": ("text-vae", {**TEXT, "embedding": 8, "hidden": 16, "latent": 4, "batch_size": 4, "block": 32}),
}  # fmt: skip
# Name -> the run in SAME that it must equal.
SHARDED = {"sharded": "gpt"}
# Those that need not be the same: other noise, or other arithmetic.
OTHER = {
    "vrnn": ("vrnn", {**TEXT, "embedding": 8, "hidden": 16, "latent": 4}),
    "history": ("cyclegan", {**BOTH, "blocks": 1, "pool": 20}),
    "local-bn": ("dcgan", {**WIDE, "latent": 8, "width": 4, "sync_bn": False}),
    "bfloat16": ("gpt", {**GPT, "precision": "bfloat16", "shard": True}),
}
RUNS = {**SAME, **OTHER, **{name: (SAME[of][0], {**SAME[of][1], "shard": True}) for name, of in SHARDED.items()}}
GO_ON = ("vae", "gpt", "sharded", "lstm")


def prepare(folder):
    topics = pydoc_data.topics.topics
    words = "\n\n".join(topics[k] for k in ("assert", "if", "while", "pass", "break", "continue", "del"))
    (folder / "words.txt").write_text(words, encoding="utf-8")
    digits = data.load("digits")
    small, wide = digits.subset(torch.arange(601)), digits.resized(28).subset(torch.arange(120))
    for name, images in (("small", small), ("wide", wide)):  # 571 and 114 to train on: last batches of 59 and 18
        np.savez(folder / f"{name}.npz", images=images.pixels.numpy(), labels=images.labels.numpy())


def train(name, folder, resume=False):
    recipe, settings = RUNS[name]
    with without_kinks() if name == "conv-vae" else contextlib.nullcontext():
        return run.train(recipe, RECIPES[recipe].config(**settings), folder / name, resume=resume)


@contextlib.contextmanager
def without_kinks():
    """LeakyReLUs made inside have slope 1. The biases before its batch norms move by the rounding of their gradients,
    so that an activation next to 0 may change its sign, and a gradient by some 1e-3 with it, in one run of two."""
    first = nn.LeakyReLU.__init__

    def init(self, negative_slope=0.01, inplace=False):
        first(self, 1.0, inplace)

    nn.LeakyReLU.__init__ = init
    try:
        yield
    finally:
        nn.LeakyReLU.__init__ = first


def without_the_last(run, to):
    """A copy of a run that stopped at the checkpoint before its newest."""
    shutil.copytree(run, to)
    shutil.rmtree(max(to.glob("checkpoint-*")))


class Breaks(MLPVAE):
    """In the second process the loss of steps 2 and 3 is NaN, and a signal comes in step 5."""

    steps = 0

    def training_step(self, x):
        losses = super().training_step(x)
        self.steps += self.training
        if not self.training or int(os.environ["RANK"]) != 1:
            return losses
        if self.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses._replace(loss=losses.loss * math.nan) if self.steps in (2, 3) else losses


def interrupted(folder):
    """(updates skipped, what the interrupt said, weights) of a run in which one process alone is disturbed."""
    config = VAEConfig(**{**IMAGES, "hidden": 8, "latent": 2, "batch_size": 64})
    torch.manual_seed(0)
    model = Breaks(64, 8, 2)
    feeds = [ImageFeed(model, images, config) for images in data.load("small.npz").split(0.1, seed=0)]
    folder.mkdir(exist_ok=True)
    try:
        fit(model, make_optimizer(model, config), *feeds, config, folder)
        said = "nothing"
    except TrainingInterrupted as stop:
        said = str(stop)
    (saved,) = folder.glob("checkpoint-*")
    skipped = json.loads((saved / "state.json").read_text())["progress"]["skipped"]
    return skipped, said, {name: x.clone() for name, x in model.state_dict().items()}


def in_a_process(rank, folder, port):
    """One of two: all runs, those that go on from one process, and the disturbed one."""
    os.chdir(folder)
    thresholds._ignored.set(True)
    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    folder = Path(folder)
    with distributed.processes(VAEConfig(**IMAGES)):
        models = {name: train(name, folder / "two").model for name in RUNS}
        for name in GO_ON:
            train(name, folder / "one-then-two", resume=True)
        found = interrupted(folder / "interrupted")
        weights = {name: m.state_dict() for name, m in models.items() if not RUNS[name][1].get("shard")}
    torch.save((weights, found), folder / f"{rank}.pt")
