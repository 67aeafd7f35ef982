"""A run's model for use without genai_fast: its weights, a plain PyTorch script around them, an ONNX graph."""

import ast
import inspect
import json
import logging
import pprint
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from genai_fast import __version__, atomic_files
from genai_fast.contract import image_traits, offers
from genai_fast.data.text import hugging_face_tokenizer
from genai_fast.errors import UsageError, require
from genai_fast.models.common.protocol import Draws, Translates, Upscales
from genai_fast.models.common.recipe import Graph, Values
from genai_fast.models.registry import RECIPES
from genai_fast.runs import export_template
from genai_fast.runs.audio_task import spectrum_of
from genai_fast.runs.run import Opened
from genai_fast.runs.text_task import TOKENIZER
from genai_fast.training import checkpoint

WEIGHTS, SCRIPT, GRAPH = "weights.safetensors", "model.py", "model.onnx"
_LARGEST = 2**31 - 2**20  # bytes of weights that an ONNX file holds; more lie beside it


def network_of(run: Opened, to: str = "b") -> nn.Module:
    """What is exported: of a GAN the network that draws the samples, of a translation that to set `to`, else all.

    Raises UsageError: the model does not translate to that set.
    """
    if not offers(run.model, Translates):
        return RECIPES[run.recipe].network(run.model)
    if to not in run.model.targets:
        raise UsageError(f"--to: expected {' or '.join(run.model.targets)} for {run.recipe}, got {to}")
    return run.model.translator(to)


def _values(run: Opened) -> Values:
    text = run.tokenizer
    return RECIPES[run.recipe].values(run.config, *((text.size, text.end) if text else (run.shape, len(run.classes))))


def write_weights(run: Opened, path: Path, to: str = "b") -> None:
    """The network's state dict as a safetensors file, whole or not at all."""
    with atomic_files.whole(path) as hidden:
        atomic_files.write_tensors(hidden, checkpoint.plain(network_of(run, to).state_dict()))


def write_folder(run: Opened, folder: Path, *, onnx: bool = False, to: str = "b") -> None:
    """Make `folder`, whole or not at all: weights, model.py, the tokenizer of a model of text, and model.onnx.

    The folder may exist if it is empty.

    Raises UsageError: a package for ONNX is missing.
    """
    for package in ("onnx", "onnxscript") if onnx else ():
        require(package, "export")
    network, values = network_of(run, to), _values(run)
    kind, arguments = next(iter(RECIPES[run.recipe].twins(values).values()))
    text = script(run, kind, arguments)
    plain = kind(**arguments).eval()
    plain.load_state_dict(network.state_dict())
    with atomic_files.whole(folder) as hidden:
        hidden.mkdir()
        write_weights(run, hidden / WEIGHTS, to)
        (hidden / SCRIPT).write_text(text, encoding="utf-8")
        if run.tokenizer is not None:
            run.tokenizer.save(hidden / TOKENIZER)
        if onnx:
            _write_graph(run, plain, values, hidden / GRAPH)


def write_hugging_face(run: Opened, folder: Path) -> None:
    """Make `folder`, whole or not at all, as transformers reads it: settings, weights and tokenizer.

    The folder may exist if it is empty.

    Raises UsageError: transformers has no such model.
    """
    reader, tokenizer = RECIPES[run.recipe].pretrained, run.tokenizer
    if reader is None or tokenizer is None:
        names = ", ".join(name for name, recipe in RECIPES.items() if recipe.pretrained)
        raise UsageError(f"--format hf: expected a run of {names}, got one of {run.recipe}; remedy: leave it out")
    settings, tensors = reader.written(run.model)
    settings = {**settings, "bos_token_id": None, "eos_token_id": tokenizer.end, "dtype": "float32"}
    write_checkpoint(folder, settings, tensors, hugging_face_tokenizer.written(tokenizer, run.model.block))


def write_checkpoint(
    folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor], files: dict[str, dict[str, Any]]
) -> None:
    """A folder of Hugging Face's: config.json, model.safetensors and other files in JSON by name."""
    with atomic_files.whole(folder) as hidden:
        hidden.mkdir()
        atomic_files.write_tensors(hidden / "model.safetensors", checkpoint.plain(tensors))
        for name, contents in {"config.json": settings, **files}.items():
            (hidden / name).write_text(json.dumps(contents, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def script(run: Opened, kind: type[nn.Module], arguments: dict[str, Any]) -> str:
    """A Python file that makes the network in plain PyTorch, loads the weights beside it, and draws from it."""
    if run.tokenizer is not None:
        command, use = export_template.write, {"continues": run.model.continues}
        call = f'write(load(), Tokenizer(FOLDER / "{TOKENIZER}"), {_arguments(use)})'
    elif RECIPES[run.recipe].sounds:
        command, use = export_template.draw_sounds, {"latent": run.model.latent, "spectrum": spectrum_of(run.config)}
        call = f"draw_sounds(load(), {_arguments(use)})"
    elif RECIPES[run.recipe].waves:
        command, use = export_template.draw_waves, {"rate": run.config.rate, "classes": run.classes}
        call = f"draw_waves(load(), {_arguments(use)})"
    elif RECIPES[run.recipe].draws and offers(run.model, Draws):
        traits, command = image_traits(run.model), export_template.draw
        use = {"shape": run.shape, "latent": traits.latent, "classes": run.classes, "signed": traits.signed}
        call = f"draw(load(), {_arguments(use)})"
    elif offers(run.model, Translates):
        command, use = export_template.translate, {"shape": run.shape}
        call = f"translate(load(), {_arguments(use)})"
    elif offers(run.model, Upscales):
        command, use = export_template.upscale, {"channels": run.shape[0]}
        call = f"upscale(load(), {_arguments(use)})"
    else:
        command, use = export_template.reconstruct, {"shape": run.shape}
        call = f"reconstruct(load(), {_arguments(use)})"
    roots = [kind, *([export_template.Tokenizer, export_template.picker] if run.tokenizer is not None else []), command]
    imports, definitions = _copied(roots)
    name, definitions = (re.sub(r"\bPlain(?=[A-Z])", "", x) for x in (kind.__name__, definitions))
    sounds = (export_template.draw_sounds, export_template.draw_waves)
    pictures = run.tokenizer is None and command not in sounds
    needs = "torch and safetensors" + ("; pictures need pillow" if pictures else "")
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


def _write_graph(run: Opened, plain: nn.Module, values: Values, path: Path) -> None:
    """ONNX of what draws; batches may have any size, and texts any length up to the model's block."""
    graph = graph_of(run, plain)
    plain.forward = getattr(plain, graph.method)
    tensors, axes = zip(*(_input(axes.split(), values) for axes in graph.inputs.values()), strict=True)
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    try:
        chatter.setLevel(logging.ERROR)  # such as that torchvision is missing
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                plain, tensors, dynamo=True, verbose=False, input_names=[*graph.inputs],
                output_names=[*graph.outputs],
                dynamic_shapes=axes,
            )  # fmt: skip
    finally:
        chatter.setLevel(level)
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    program.save(path, external_data=size > _LARGEST)


def graph_of(run: Opened, plain: nn.Module) -> Graph:
    """What ONNX export traces of a run's plain network."""
    if (found := RECIPES[run.recipe].graph) is not None:
        return found
    labels = {"labels": "batch"} if run.classes else {}
    if RECIPES[run.recipe].waves:
        return Graph({"codes": "batch tokens", **labels}, ("logits",))
    if not (RECIPES[run.recipe].draws and offers(run.model, Draws)):
        return Graph({"images": "batch channels size size"}, ("reconstructions",))
    return Graph({"z": "batch latent", **labels}, ("images",), "decode" if hasattr(plain, "decode") else "forward")


def _input(axes: list[str], values: Values) -> tuple[torch.Tensor, dict[int, Any]]:
    """An example of an input, and its axes that may have any size."""
    free, shape = {}, []
    for k, name in enumerate(axes):
        if name == "batch":
            free[k] = torch.export.Dim(name)
        elif name.endswith("tokens"):
            free[k] = torch.export.Dim(name, max=values["block"])
        shape.append(2 if name == "batch" else min(3, values["block"]) if k in free else values[name])
    return torch.zeros(shape, dtype=torch.int64 if len(free) == len(axes) else torch.float32), free
