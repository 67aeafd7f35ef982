"""A run's model for use without genai_fast: its weights, a plain PyTorch script around them, an ONNX graph."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import pprint
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from genai_fast import __version__
from genai_fast.errors import UsageError, require
from genai_fast.models import peers, peers_conditional, peers_sequences, peers_text
from genai_fast import atomic_files
from genai_fast.training import checkpoint
from genai_fast.runs import export_template, text_generation
from genai_fast.runs.run import Opened
from genai_fast.runs.text_task import TOKENIZER

WEIGHTS, SCRIPT, GRAPH = "weights.safetensors", "model.py", "model.onnx"
_LARGEST = 2**31 - 2**20  # bytes of weights that an ONNX file holds; more lie beside it

Peer = tuple[type[nn.Module], dict[str, Any]]  # a class in plain PyTorch and its arguments


def network_of(run: Opened) -> nn.Module:
    """What is exported: of a GAN the network that draws the samples, else the whole model."""
    return getattr(run.model, "sampler", run.model)


def write_weights(run: Opened, path: Path) -> None:
    """The network's state dict as a safetensors file, whole or not at all."""
    hidden = path.with_name(f".{path.name}.new")
    try:
        atomic_files.write_tensors(hidden, checkpoint.plain(network_of(run).state_dict()))
        os.replace(hidden, path)
    except BaseException:
        atomic_files.discard(hidden)
        raise


def write_folder(run: Opened, folder: Path, *, onnx: bool = False) -> None:
    """Make `folder`, whole or not at all: weights, model.py, the tokenizer of a model of text, and model.onnx.

    The folder may exist if it is empty.

    Raises:
        UsageError: the recipe has no plain form, or a package for ONNX is missing.
    """
    for package in ("onnx", "onnxscript") if onnx else ():
        require(package, "export")
    network, (kind, arguments) = network_of(run), peer_of(run)
    text = script(run, kind, arguments)
    plain = kind(**arguments).eval()
    plain.load_state_dict(network.state_dict())
    hidden = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(hidden, ignore_errors=True)  # left by a process that was killed
    hidden.mkdir()
    try:
        write_weights(run, hidden / WEIGHTS)
        (hidden / SCRIPT).write_text(text, encoding="utf-8")
        if run.tokenizer is not None:
            run.tokenizer.save(hidden / TOKENIZER)
        if onnx:
            _write_graph(run, plain, hidden / GRAPH)
        if folder.exists():
            folder.rmdir()
        os.rename(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def peer_of(run: Opened) -> Peer:
    """The plain class whose keys are those of the run's network, and the run's sizes as its arguments."""
    s = run.config
    if run.tokenizer is not None:
        end, vocabulary = run.tokenizer.end, run.tokenizer.size
        return _peer_of_text(run.recipe, s, {"vocabulary": vocabulary}, {"vocabulary": vocabulary, "end": end})
    channels, size, _ = run.shape
    dcgan = {"nz": s.latent, "ngf": getattr(s, "width", 0), "nc": channels, "size": size}
    match run.recipe, getattr(s, "network", ""):
        case "vae", _:
            pixels = channels * size * run.shape[2]
            sizes = {"input_size": pixels, "hidden": s.hidden, "latent": s.latent, "likelihood": s.likelihood}
            return peers.EagerMLPVAE, sizes
        case ("conv-vae" | "cvae" | "autoencoder") as name, _:
            widths = tuple(block[0].out_channels for block in run.model.encoder)
            sizes = {"size": size, "channels": channels, "latent": s.latent, "widths": widths}
            if name == "cvae":
                return peers_conditional.EagerConditionalVAE, {"classes": len(run.classes), **sizes}
            return peers.EagerConvVAE if name == "conv-vae" else peers.EagerAutoencoder, sizes
        case "mlp-gan", _:
            return peers.EagerMLPGenerator, {"shape": run.shape, "latent": s.latent}
        case ("dcgan", "dcgan") | ("wgan-gp", _):
            return peers.EagerDCGANGenerator, dcgan
        case "dcgan", network:
            kind = peers.EagerDenseGenerator if network == "dense" else peers.EagerDenseGeneratorK4
            return kind, {"latent": s.latent, "channels": channels, "side": size // 4}
        case "cgan", _:
            return peers_conditional.EagerConditionalGenerator, {"classes": len(run.classes), **dcgan}
    raise _no_plain_form(run.recipe)


def _peer_of_text(name: str, s: Any, reads: dict[str, int], writes: dict[str, int]) -> Peer:
    match name:
        case "gpt":
            sizes = {"block": s.block, "layers": s.layers, "heads": s.heads, "width": s.width, "dropout": s.dropout}
            return peers_text.EagerGPT, reads | sizes
        case "lstm":
            sizes = {"embedding": s.embedding, "hidden": s.hidden, "layers": s.layers, "dropout": s.dropout}
            return peers_text.EagerLSTMLanguageModel, reads | sizes
        case "seq2seq":
            sizes = {"block": s.block, "layers": s.layers, "heads": s.heads, "width": s.width, "dropout": s.dropout}
            return peers_sequences.EagerSeq2Seq, writes | sizes
        case "text-vae" | "vrnn":
            sizes = {"embedding": s.embedding, "hidden": s.hidden, "latent": s.latent, "beta": s.beta}
            if name == "vrnn":
                return peers_sequences.EagerVRNN, reads | sizes
            training = {"annealing": s.annealing, "word_dropout": s.word_dropout}
            return peers_sequences.EagerTextVAE, writes | sizes | training
    raise _no_plain_form(name)


def _no_plain_form(recipe: str) -> UsageError:
    return UsageError(f"{recipe}: expected a recipe with a plain PyTorch form; remedy: --out FILE.safetensors, weights")


def script(run: Opened, kind: type[nn.Module], arguments: dict[str, Any]) -> str:
    """A Python file that makes the network in plain PyTorch, loads the weights beside it, and draws from it."""
    if run.tokenizer is not None:
        command, use = export_template.write, {"continues": text_generation.continues(run.model)}
        call = f'write(load(), Tokenizer(FOLDER / "{TOKENIZER}"), {_arguments(use)})'
    elif run.recipe == "autoencoder":
        command, use = export_template.reconstruct, {"shape": run.shape}
        call = f"reconstruct(load(), {_arguments(use)})"
    else:
        signed = bool(getattr(run.model, "signed", False))
        command = export_template.draw
        use = {"shape": run.shape, "latent": run.model.latent, "classes": run.classes, "signed": signed}
        call = f"draw(load(), {_arguments(use)})"
    roots = [kind, *([export_template.Tokenizer, export_template.picker] if run.tokenizer is not None else []), command]
    imports, definitions = _copied(roots)
    name, definitions = (re.sub(r"\bEager(?=[A-Z])", "", x) for x in (kind.__name__, definitions))
    needs = "torch and safetensors" + ("" if run.tokenizer is not None else "; pictures need pillow")
    return f'''"""{name}, trained by `genai-fast train {run.recipe}` (version {__version__}), in plain PyTorch.

    python {SCRIPT} --help

Needs {needs}. To use the network elsewhere: `from model import load`.
"""

{imports}

FOLDER = Path(__file__).resolve().parent


{definitions}


def load() -> {name}:
    """The network with the weights beside this file, in evaluation mode."""
    model = {name}({_arguments(arguments)})
    model.load_state_dict(load_file(FOLDER / "{WEIGHTS}"))
    return model.eval()


if __name__ == "__main__":
    {call}
'''


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={pprint.pformat(value, width=10**6, compact=True)}" for name, value in values.items())


def _copied(roots: list[Any]) -> tuple[str, str]:
    """What classes and functions import from elsewhere; and their source, behind that of all of ours that they use."""
    bodies: dict[Any, str] = {}
    imports = {"__future__": {"annotations"}, "pathlib": {"Path"}, "safetensors.torch": {"load_file"}}

    def take(thing: Any) -> None:
        if (thing := inspect.unwrap(thing)) in bodies:
            return
        source, home = inspect.getsource(thing), sys.modules[thing.__module__]
        used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)} - {thing.__name__}
        for name in sorted(used):
            other = getattr(home, name, None)
            if not isinstance(other, ModuleType) and getattr(other, "__module__", "").startswith("genai_fast."):
                take(other)
        bodies[thing] = source.rstrip()
        for node in ast.parse(inspect.getsource(home)).body:
            if isinstance(node, ast.Import):  # kept under "": import <name> [as <alias>]
                names = {ast.unparse(ast.Import([a])): (a.asname or a.name) for a in node.names}
                imports.setdefault("", set()).update(line for line, name in names.items() if name in used)
            elif isinstance(node, ast.ImportFrom) and not node.module.startswith(("genai_fast", "__future__")):
                imports.setdefault(node.module, set()).update({a.name for a in node.names} & used)

    for root in roots:
        take(root)
    lines = sorted(imports.pop(""))
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items()) if names]
    groups: list[list[str]] = [[], [], []]  # __future__, the standard library, others
    for line in lines:
        root = line.split()[1].partition(".")[0]
        groups[0 if root == "__future__" else 1 if root in sys.stdlib_module_names else 2].append(line)
    return "\n\n".join("\n".join(group) for group in groups), "\n\n\n".join(bodies.values())


def _write_graph(run: Opened, plain: nn.Module, path: Path) -> None:
    """ONNX of what draws; batches may have any size, and texts any length up to the model's block."""
    inputs, outputs = _signature(run, plain)
    for name in ("step", "decode"):  # what draws, where it is not the forward pass
        if hasattr(plain, name) and run.recipe != "autoencoder":
            plain.forward = getattr(plain, name)
            break
    tensors, axes = zip(*inputs.values(), strict=True)
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    try:
        chatter.setLevel(logging.ERROR)  # that torchvision is not there, and the like
        with warnings.catch_warnings(action="ignore"):
            graph = torch.onnx.export(
                plain, tensors, dynamo=True, verbose=False, input_names=[*inputs], output_names=outputs,
                dynamic_shapes=axes,
            )  # fmt: skip
    finally:
        chatter.setLevel(level)
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    graph.save(path, external_data=size > _LARGEST)


def _signature(run: Opened, plain: nn.Module) -> tuple[dict[str, tuple[torch.Tensor, dict[int, Any]]], list[str]]:
    """Each input of the graph by name: an example, and its axes that may have any size; the outputs' names.

    A recurrent network's graph is one step, since a loop over tokens would have a fixed length in it.
    """
    s, rows = run.config, {0: torch.export.Dim("batch")}
    ids = torch.zeros(2, dtype=torch.int64)
    if run.tokenizer is None:
        if run.recipe == "autoencoder":
            return {"images": (torch.zeros(2, *run.shape), rows)}, ["reconstructions"]
        labels = {"labels": (ids, rows)} if run.classes else {}
        return {"z": (torch.zeros(2, s.latent), rows), **labels}, ["images"]

    def tokens(name: str) -> tuple[torch.Tensor, dict[int, Any]]:
        return torch.zeros(2, min(3, s.block), dtype=torch.int64), {**rows, 1: torch.export.Dim(name, max=s.block)}

    match run.recipe:
        case "gpt":
            return {"ids": tokens("tokens")}, ["logits"]
        case "seq2seq":
            lengths = torch.tensor([1, 2])
            inputs = {"source": tokens("source_tokens"), "source_lengths": (lengths, rows), "ids": tokens("tokens")}
            return inputs, ["logits"]
        case "lstm":
            h, c = ((torch.zeros(s.layers, 2, s.hidden), {1: rows[0]}) for _ in range(2))
            return {"ids": (ids, rows), "h": h, "c": c}, ["logits", "h_after", "c_after"]
        case "text-vae":
            z, h = (torch.zeros(2, width) for width in (s.latent, s.hidden))
            return {"z": (z, rows), "ids": (ids, rows), "h": (h, rows)}, ["logits", "h_after"]
        case "vrnn":
            phi, h, noise = ((torch.zeros(2, width), rows) for width in (s.embedding, s.hidden, s.latent))
            inputs = {"ids": (ids, rows), "phi_z": phi, "h": h, "noise": noise}
            return inputs, ["logits", "phi_z_after", "h_after"]
    raise _no_plain_form(run.recipe)
