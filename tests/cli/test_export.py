"""Models taken elsewhere: the exported script, where genai_fast cannot be imported, and the ONNX graph."""

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch
from alike import assert_close, with_statistics
from commands import call
from PIL import Image

from genai_fast import config
from genai_fast.data import audio, text
from genai_fast.errors import UsageError
from genai_fast.models.common import latents
from genai_fast.models.common.sequences import delayed
from genai_fast.models.registry import RECIPES
from genai_fast.models.vrnn import VRNNDecoder
from genai_fast.runs import (
    audio_evaluation,
    export,
    export_template,
    image_evaluation,
    run,
    text_generation,
    translation_evaluation,
)
from genai_fast.runs.audio_task import spectrum_of
from genai_fast.training import checkpoint
from genai_fast.training.optimizer import make_optimizer

WORDS = "While it is so, nothing else is; if it were not, all would be as before. "
SMALL = {"layers": 1, "heads": 2, "width": 16}
RUNS = {  # name -> recipe, settings, and (shape, number of classes) or the kind of tokens
    "vae": ("vae", {"hidden": 16, "latent": 4}, ((1, 8, 8), 0)),
    "vae-gaussian": ("vae", {"hidden": 16, "latent": 4, "likelihood": "gaussian"}, ((3, 4, 4), 0)),
    "conv-vae": ("conv-vae", {"latent": 4}, ((3, 28, 28), 0)),
    "cvae": ("cvae", {"latent": 4}, ((1, 28, 28), 3)),
    "autoencoder": ("autoencoder", {"latent": 4}, ((3, 16, 16), 0)),
    "vq-vae": ("vq-vae", {"codebook": 16, "embedding": 4, "hidden": 8, "blocks": 1}, ((3, 16, 16), 0)),
    "vq-gpt": ("vq-gpt", {**SMALL, "codebook": 16, "embedding": 4, "hidden": 8, "blocks": 1}, ((1, 8, 8), 3)),
    "mlp-gan": ("mlp-gan", {"latent": 4}, ((1, 6, 5), 0)),
    "dcgan-28": ("dcgan", {"latent": 4, "width": 4, "ema": 0.9}, ((1, 28, 28), 0)),
    "dcgan-128": ("dcgan", {"latent": 4, "width": 2}, ((3, 128, 128), 0)),
    "dense": ("dcgan", {"latent": 4, "network": "dense"}, ((1, 8, 8), 0)),
    "dense-k4": ("dcgan", {"latent": 4, "network": "dense-k4"}, ((3, 8, 8), 0)),
    "keras": ("dcgan", {"latent": 4, "network": "keras"}, ((1, 8, 8), 0)),
    "keras-k4": ("dcgan", {"latent": 4, "network": "keras-k4"}, ((3, 8, 8), 0)),
    "cgan": ("cgan", {"latent": 4, "width": 4}, ((1, 32, 32), 3)),
    "wgan-gp": ("wgan-gp", {"latent": 4, "width": 4}, ((3, 64, 64), 0)),
    "stylegan2": ("stylegan2", {"latent": 4, "width": 2, "layers": 2}, ((3, 16, 16), 0)),
    "cyclegan": ("cyclegan", {"width": 4, "blocks": 1}, ((3, 32, 32), 0)),
    "pix2pix": ("pix2pix", {"width": 4}, ((1, 32, 32), 0)),
    "srresnet": ("srresnet", {"width": 4, "blocks": 1, "scale": 4}, ((3, 32, 32), 0)),
    "srgan": ("srgan", {"width": 4, "blocks": 1, "scale": 2}, ((1, 32, 32), 0)),
    "audio-vae": ("audio-vae", {"latent": 4, "width": 8, "layers": 2, "mels": 20, "seconds": 0.3}, ((20, 13), 0)),
    "wavenet": (
        "wavenet",
        {"width": 8, "skip": 8, "layers": 3, "cycles": 1, "rate": 1000, "conditional": True},
        ((2048,), 3),
    ),
    "gpt": ("gpt", {**SMALL, "layers": 2, "block": 16}, "bpe"),
    "llama": (
        "llama",
        {**SMALL, "layers": 2, "block": 16, "window": 5, "bias": "qkv", "qk_norm": True, "rope_scaling": "linear:2"},
        "byte",
    ),
    "lstm": ("lstm", {"layers": 2, "embedding": 8, "hidden": 16}, "char"),
    "seq2seq": ("seq2seq", {**SMALL, "block": 32}, "byte"),
    "text-vae": ("text-vae", {"embedding": 8, "hidden": 16, "latent": 4}, "char"),
    "vrnn": ("vrnn", {"embedding": 8, "hidden": 16, "latent": 4}, "byte"),
}
TEXT = [name for name, (recipe, *_) in RUNS.items() if RECIPES[recipe].feed]
TRANSLATING = [name for name, (recipe, *_) in RUNS.items() if RECIPES[recipe].translates]
ENLARGING = ["srresnet", "srgan"]
OTHERS = (*TEXT, *TRANSLATING, *ENLARGING, "autoencoder", "vq-vae", "audio-vae", "wavenet")
DRAWING = [name for name in RUNS if name not in OTHERS]


def make_run(folder, name):
    """A run's folder as training leaves it, with weights and running statistics that are large and irregular."""
    recipe, settings, data = RUNS[name]
    settings, about = RECIPES[recipe].config(**settings), {"recipe": recipe}
    folder.mkdir()
    (folder / run.CONFIG).write_text(config.to_toml(settings, recipe))
    if isinstance(data, str):
        tokenizer = text.make_tokenizer(data, [WORDS * 3], 270 if data == "bpe" else None)
        tokenizer.save(folder / "tokenizer.json")
        about |= {"tokenizer": tokenizer.digest}
    else:
        shape, classes = data
        about |= {"shape": list(shape), "classes": [f"kind {k} 'Eager\\Beaver'" for k in range(classes)]}
    torch.manual_seed(len(name))
    model, _ = run.task_of(recipe).open(recipe, settings, about, folder)
    with_statistics(model)
    with torch.no_grad():
        for p in model.parameters():
            if isinstance(data, str):
                p.mul_(8)  # so that the likeliest token is so by far
            elif p.dim() > 1:
                p.div_(p.std() * p[0].numel() ** 0.5)
    checkpoint.save(folder, model, make_optimizer(model, settings), 1, {}, about)
    return run.open_run(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> run and the folder of its export."""
    place, made = tmp_path_factory.mktemp("exported"), {}
    for name in RUNS:
        run = make_run(place / f"run-{name}", name)
        export.write_folder(run, place / name)
        made[name] = run, place / name
    return made


# Loads each folder's script and saves what it computes; the outputs' names are the scripts'.
ELSEWHERE = """
import runpy, sys, torch
sys.modules["genai_fast"] = None
sys.dont_write_bytecode = True
prompt, *folders = sys.argv[1:]
for folder in folders:
    model_py = runpy.run_path(folder + "/model.py")
    net, out = model_py["load"](), folder + "/out.pt"
    assert not net.training
    if "Tokenizer" not in model_py:
        sys.argv = ["model.py", "--count", "5", "--seed", "3", "--out", out]
        if "reconstruct" in model_py:
            sys.argv[1:5] = [folder + "/../picture.png"]
        if not {"draw", "draw_sounds", "draw_waves", "reconstruct"} & model_py.keys():
            sys.argv[1:] = [folder + "/../wide.png", "--out", folder + "/made"]
        commands = ("draw", "draw_sounds", "draw_waves", "reconstruct", "translate", "upscale")
        command = next(model_py[k] for k in commands if k in model_py)
        runpy.run_path(folder + "/model.py", run_name="__main__")
        continue
    tokenizer = model_py["Tokenizer"](model_py["FOLDER"] / "tokenizer.json")
    written = {}
    for temperature in (0.0, 0.8):
        for p in (prompt, ""):
            pick = model_py["picker"](temperature, 20, 0.9, 7)
            tokens = net.generate(tokenizer.encode(p), pick, tokenizer.end, torch.Generator().manual_seed(7))
            ids = [token for token, _ in zip(tokens, range(24))]
            ids = ids[: ids.index(tokenizer.end)] if tokenizer.end in ids else ids
            written[temperature, p] = ids, tokenizer.decode(ids)
    torch.save(written, out)
"""


@pytest.fixture(scope="module")
def elsewhere(exported):
    """name -> what its script made in a process without genai_fast."""
    folders = [str(folder) for _, folder in exported.values()]
    place = exported["gpt"][1].parent
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(place / "picture.png")
    wide = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(wide).save(place / "wide.png")
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, WORDS[:20], *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        name: torch.load(folder / "out.pt") for name, (_, folder) in exported.items() if (folder / "out.pt").exists()
    }


def samples_of(path):
    with wave.open(str(path)) as file:
        return torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float()


@pytest.mark.parametrize("name", DRAWING)
def test_a_script_draws_what_the_run_draws(exported, elsewhere, name):
    run, _ = exported[name]
    expected = image_evaluation.generate(run.model, run.shape, 5, seed=3)
    assert expected.std() > 0.01
    assert_close(elsewhere[name], expected)


def test_a_script_draws_the_sounds_that_the_run_draws(exported, elsewhere, tmp_path):
    run, folder = exported["audio-vae"]
    expected = audio_evaluation.drawn(run.model, run.shape, 5, seed=3)
    assert expected.std() > 0.01
    assert_close(elsewhere["audio-vae"].clamp(-1, 1), expected)
    made = ["--count", "2", "--seed", "3", "--out"]
    assert call("sample", run.folder, *made, tmp_path / "ours.wav") == 0
    command = [sys.executable, "-I", str(folder / "model.py"), *made, str(tmp_path / "theirs.wav")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (samples_of(tmp_path / f"{name}.wav") for name in ("ours", "theirs"))
    assert ours.std() > 100 and len(ours) == len(theirs)
    # Samples may differ: Griffin-Lim's phases follow roundings.
    spectrum = spectrum_of(run.config)
    heard = (audio.to_features(audio.mel_power(x / 32767, spectrum), spectrum.scale) for x in (ours, theirs))
    assert audio.mel_error(*heard, spectrum.scale) < 0.3


def test_a_script_makes_sounds_sample_by_sample(exported, elsewhere):
    run, _ = exported["wavenet"]
    codes = elsewhere["wavenet"]
    assert codes.shape == (5, 250) and codes.dtype is torch.int64 and codes.min() >= 0 and codes.max() < 256
    assert len(codes.unique()) > 20
    with torch.no_grad():  # what was drawn is as likely as what the run draws
        nats = [run.model.training_step(x[:, :-1], x[:, 1:], torch.arange(5) % 3).loss
                for x in (codes, run.model.draw_codes(5, 250, seed=3))]  # fmt: skip
    assert abs(nats[0] - nats[1]) < 0.3


def test_an_autoencoders_script_reconstructs(exported, elsewhere):
    run, folder = exported["autoencoder"]
    pixels = torch.from_numpy(np.array(Image.open(folder.parent / "picture.png"))).permute(2, 0, 1)[None]
    assert_close(elsewhere["autoencoder"][:1], pixels / 255)
    expected = image_evaluation.shown(run.model, run.model.reconstruct(pixels / 127.5 - 1))
    assert_close(elsewhere["autoencoder"][1:], expected, 1e-4)


@pytest.mark.parametrize("name", TRANSLATING)
def test_a_script_translates_the_centre_square(exported, elsewhere, name):
    run, folder = exported[name]
    picture = Image.open(folder.parent / "wide.png").convert("RGB" if run.shape[0] == 3 else "L").crop((8, 0, 40, 32))
    x = torch.from_numpy(np.array(picture)).view(32, 32, -1).permute(2, 0, 1)[None] / 255
    made = np.array(Image.open(folder / "made" / "wide.png")).reshape(32, 32, -1)
    expected = translation_evaluation.translate(run.model, x, "b")[0].permute(1, 2, 0)
    assert expected.std() > 0.01 and (torch.from_numpy(made) - expected * 255).abs().max() <= 0.51


@pytest.mark.parametrize("name", ENLARGING)
def test_a_script_enlarges_the_whole_picture(exported, elsewhere, name):
    run, folder = exported[name]
    x = torch.from_numpy(np.array(Image.open(folder.parent / "wide.png").convert("RGB" if run.shape[0] == 3 else "L")))
    scale, x = run.model.scale, x.view(32, 48, -1).permute(2, 0, 1)[None] / 127.5 - 1
    made = np.array(Image.open(folder / "made" / "wide.png")).reshape(32 * scale, 48 * scale, -1)
    expected = image_evaluation.shown(run.model, run.model.upscale(x))[0].permute(1, 2, 0)
    assert expected.std() > 0.01 and (torch.from_numpy(made) - expected * 255).abs().max() <= 0.51


def test_of_a_cyclegan_either_generator_is_exported(exported, tmp_path):
    run, _ = exported["cyclegan"]
    for to in run.model.targets:
        export.write_folder(run, tmp_path / to, to=to)
        net, x = runpy.run_path(str(tmp_path / to / "model.py"))["load"](), torch.rand(1, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            assert_close(net(x), run.model.translate(x, to), 1e-4)
    with pytest.raises(UsageError, match="--to: expected b for pix2pix, got a"):
        export.write_folder(exported["pix2pix"][0], tmp_path / "none", to="a")
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_onnx_of_images_to_images(exported, tmp_path):
    for name in (*TRANSLATING, *ENLARGING):
        run, _ = exported[name]
        graph, x = graph_of(run, tmp_path / name), torch.rand(3, *run.shape) * 2 - 1
        x = run.model.lower(x) if name in ENLARGING else x
        expected = run.model.upscale(x) if name in ENLARGING else run.model.translate(x)
        assert_close(graph(images=x)[0], expected, 1e-4)


def test_a_script_starts_no_program_for_postscript(exported, tmp_path):
    (tmp_path / "evil.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    command = [sys.executable, "-I", str(exported["autoencoder"][1] / "model.py"), str(tmp_path / "evil.png")]
    done = subprocess.run([*command, "--out", str(tmp_path / "out.pt")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "evil.png: expected a picture, got" in done.stderr and "Ghostscript" not in done.stderr


@pytest.mark.parametrize("name", TEXT)
def test_a_script_writes_what_the_run_writes(exported, elsewhere, name):
    run, _ = exported[name]
    for (temperature, prompt), (ids, said) in elsewhere[name].items():
        style = text_generation.Style(24, temperature, 20, 0.9, 7)
        assert ids == list(text_generation._tokens(run.model, run.tokenizer, prompt, style)), (temperature, prompt)
        assert said == "".join(text_generation.write(run.model, run.tokenizer, prompt, style))
    assert len({tuple(ids) for ids, _ in elsewhere[name].values()}) > 1  # the prompt, or the draw, counts


@pytest.mark.parametrize("kind", text.tokenizers.KINDS)
def test_the_scripts_tokenizer_is_ours(tmp_path, kind):
    ours = text.make_tokenizer(kind, [WORDS * 3], 280 if kind == "bpe" else None)
    ours.save(tmp_path / "tokenizer.json")
    theirs = export_template.Tokenizer(tmp_path / "tokenizer.json")
    assert theirs.end == ours.end
    for said in ("", WORDS, "naïve — 水\n\t  x", "'ll 12"):
        assert theirs.encode(said) == ours.encode(said)
    ids = torch.randint(ours.size, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    assert theirs.decode(ids) == ours.decode(ids)


def test_a_script_by_itself(exported, tmp_path):
    """As its user runs it: in another folder, by its command line."""
    picture = ["--class", "kind 2 'Eager\\Beaver'", "--count", "3", "--out", str(tmp_path / "a.png")]
    for name, arguments, pattern in (
        ("cgan", picture, r"a\.png: 3 samples\n"),
        ("gpt", ["--prompt", "While", "--max-tokens", "5", "--temperature", "0"], "While.+"),
    ):
        command = [sys.executable, "-I", str(exported[name][1] / "model.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and re.search(pattern, done.stdout, re.DOTALL), done.stderr
    run = exported["cgan"][0]
    expected = image_evaluation.generate(run.model, run.shape, 3, seed=1, labels=torch.full((3,), 2))
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).float()
    assert sheet.shape == (64, 64)
    assert (sheet[:32, :32] - expected[0, 0] * 255).abs().max() <= 0.51
    assert (sheet[32:, :32] - expected[2, 0] * 255).abs().max() <= 0.51 and not sheet[32:, 32:].any()


def test_scripts_are_plain(exported):
    for name, (_, folder) in exported.items():
        source = (folder / "model.py").read_text()
        tree = ast.parse(source)
        roots = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert roots - {*sys.stdlib_module_names} <= {"torch", "safetensors", "PIL", "tokenizers"}, name
        assert not re.search(r"\bPlain", source) and str(folder.parent) not in source
        expected = {"model.py", "weights.safetensors"} | ({"tokenizer.json"} if name in TEXT else set())
        assert {p.name for p in folder.iterdir()} - {"out.pt", "made", "__pycache__"} == expected


def test_the_command(exported, tmp_path, capsys, monkeypatch):
    run, _ = exported["dense"]
    monkeypatch.chdir(tmp_path)
    assert call("export", run.folder, "--out", "there") == 0
    assert f"next: {shlex.join([sys.executable, 'there/model.py', '--help'])}\n" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"model.py", "weights.safetensors"}
    assert call("export", run.folder, "--out", "w.safetensors") == 0
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "there" / "weights.safetensors").read_bytes()
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setitem(sys.modules, "onnx", None)
    for arguments, message in (
        (["--out", "there"], "--out: expected a new or empty folder, got there"),
        (["--out", "a.onnx"], "--out: expected the name of a .safetensors file, or of a folder"),
        (["--out", "w.safetensors", "--onnx"], "remedy: --out FOLDER"),
        (["--out", "other", "--onnx"], 'remedy: pip install onnx, or pip install ".[export]"'),
    ):
        assert call("export", run.folder, *arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before  # nothing was written


def test_half_an_export_leaves_nothing(exported, tmp_path, monkeypatch):
    def break_down(run, path, to):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "write_weights", break_down)
    with pytest.raises(OSError, match="no space"):
        export.write_folder(exported["vae"][0], tmp_path / "a")
    assert not list(tmp_path.iterdir())


def graph_of(run, folder):
    """A function of named inputs that runs the exported graph."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            pytest.skip(f"{package} is not installed ({error})")
    import onnxruntime

    export.write_folder(run, folder, onnx=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [p.name for p in folder.iterdir() if "onnx" in p.name] == ["model.onnx"]

    def call(**inputs):
        found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        return [torch.from_numpy(x) for x in found]

    return call


@torch.no_grad()
def test_onnx_of_a_conditional_model(exported, tmp_path):
    run, _ = exported["cvae"]
    graph = graph_of(run, tmp_path / "a")
    for rows in (1, 5):
        z, labels = latents.normal(rows, 4, 0), torch.arange(rows) % 3
        assert_close(graph(z=z, labels=labels)[0], run.model.decode(z, labels))


@torch.no_grad()
def test_onnx_of_sounds(exported, tmp_path):
    run, _ = exported["audio-vae"]
    graph = graph_of(run, tmp_path / "a")
    for rows in (1, 5):
        z = latents.normal(rows, 4, 0)
        assert_close(graph(z=z)[0], run.model.decode(z))


@torch.no_grad()
def test_onnx_of_waves(exported, tmp_path):
    run, _ = exported["wavenet"]
    graph = graph_of(run, tmp_path / "a")
    for rows, steps in ((1, 20), (3, 9)):
        codes, labels = torch.randint(256, (rows, steps)), torch.arange(rows) % 3
        assert_close(graph(codes=codes, labels=labels)[0], run.model(codes, labels), 1e-4)


@torch.no_grad()
def test_onnx_of_a_gpt(exported, tmp_path):
    run, _ = exported["gpt"]
    graph = graph_of(run, tmp_path / "a")
    for rows, tokens in ((1, 1), (3, 16)):
        ids = torch.randint(run.tokenizer.size, (rows, tokens))
        assert_close(graph(ids=ids)[0], run.model(ids), 1e-4)


@torch.no_grad()
def test_onnx_of_a_seq2seq(exported, tmp_path):
    run, _ = exported["seq2seq"]
    graph = graph_of(run, tmp_path / "a")
    for rows, source_tokens, tokens in ((1, 1, 3), (3, 9, 1), (2, 2, 32)):
        source, ids = (torch.randint(run.tokenizer.size, (rows, n)) for n in (source_tokens, tokens))
        lengths = torch.arange(rows) % source_tokens + 1
        found = graph(source=source, source_lengths=lengths, ids=ids)[0]
        assert_close(found, run.model(source, lengths, ids), 1e-4)


@torch.no_grad()
def test_onnx_of_an_lstm(exported, tmp_path):
    run, _ = exported["lstm"]
    graph, ids = graph_of(run, tmp_path / "a"), torch.randint(run.tokenizer.size, (3, 6))
    h = c = torch.zeros(2, 3, 16)
    found = []
    for column in ids.t():
        logits, h, c = graph(ids=column, h=h, c=c)
        found.append(logits)
    assert_close(torch.stack(found, 1), run.model(ids)[0], 1e-4)


@torch.no_grad()
def test_onnx_of_a_text_vae(exported, tmp_path):
    run, _ = exported["text-vae"]
    graph, z, ids = graph_of(run, tmp_path / "a"), torch.randn(3, 4), torch.randint(run.tokenizer.end, (3, 6))
    given, h, found = delayed(ids, run.tokenizer.end), torch.full((3, 16), 9.0), []
    for column in given.t():
        logits, h = graph(z=z, ids=column, h=h)
        found.append(logits)
    assert_close(torch.stack(found), run.model.logits(z, given), 1e-4)


@torch.no_grad()
def test_onnx_of_a_vrnn(exported, tmp_path):
    run, _ = exported["vrnn"]
    graph, ids = graph_of(run, tmp_path / "a"), torch.randint(run.tokenizer.size, (5, 3))
    ours, noise = VRNNDecoder(run.model, 3, seed=2), torch.Generator().manual_seed(2)
    last, phi, h = torch.full((3,), -1), torch.zeros(3, 8), torch.zeros(3, 16)
    for column in ids:
        z = torch.randn(3, 4, generator=noise)
        logits, phi, h = graph(ids=last, phi_z=phi, h=h, noise=z)
        assert_close(logits, ours.step(None if last[0] < 0 else last), 1e-4)
        last = column
