"""Feeds damaged files to every public loader: each must end in one line, quickly, and in bounded memory.

    python -m bench.fuzz_files --count 500 --seed 0      mutate and load 500 files
    python -m bench.fuzz_files --task png-17             load one again here, with its traceback

A loader may read a damaged file or raise a UsageError (DataError, CheckpointError, ConfigError are such). Anything else
is a finding: another exception, more than `SECONDS` of processor time, more than `BYTES` of memory, a signal, a hang.
Exit code: 0 none, 1 findings.
"""

import argparse
import gzip
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from bench.gpu_gate import processes, worker
from bench.report.records import failures
from genai_fast import atomic_files, config, data
from genai_fast.data import audio, text
from genai_fast.errors import UsageError, require
from genai_fast.training import checkpoint

SECONDS, BYTES = 1.0, 256 << 20  # of processor time, and of memory beyond what the process held before
HANGS = 60.0  # seconds of wall time after which a load is killed; starting a process takes some of them
_ROOM = 4 * BYTES  # of address space: what asks for more gets a MemoryError
_CHUNK = 200  # files for one process
_NESTED = (b"[" * 200_000, b'{"a":' * 100_000, b"<div>" * 100_000)
_NUMBERS = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"4294967297", b"null", b'"x"', b"[]", b"{}")


def _module() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def _saved(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        progress = {"epoch": 1, "loss": 0.5}
        return checkpoint.save(folder, *_module(), step=3, progress=progress, about={"recipe": "vae"}) / name

    return make


def _weights(folder: Path) -> Path:
    atomic_files.write_tensors(folder / "a.safetensors", checkpoint.plain(_module()[0].state_dict()))
    return folder / "a.safetensors"


def _picture(kind: str, seed: int = 0) -> bytes:
    pixels, buffer = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _sound(kind: str) -> bytes:
    buffer, noise = io.BytesIO(), np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
    require("soundfile", "audio").write(buffer, noise, 22050, format=kind)
    return buffer.getvalue()


def _zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


def _arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    return buffer.getvalue()


def _of(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return make


def _images(path: Path) -> Any:
    return data.load(path, cache=False)


def _folder(path: Path) -> Any:
    return data.load(path.parent, cache=False)


def _sounds(path: Path) -> Any:
    sounds = audio.load(path.parent, trim=40, cache=False)
    return audio.clips_of(sounds, audio.Spectrum(), 8, cache=False)


_IDX = b"\0\0\x08\x03" + struct.pack(">3I", 4, 8, 8) + bytes(256)
_LINES = "\n".join(json.dumps({"text": f"document {k} of some words"}) for k in range(5)).encode()
_HTML = b"<html><head><title>T</title></head><body><p>One &amp; two</p><ul><li>three</li></ul></body></html>"
_PO = b'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\nmsgid "one word"\nmsgstr "ein Wort"\n' * 3


def _tokenizer(folder: Path) -> Path:
    made = text.make_tokenizer("char", ["some words, and more"])
    made.save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


_CHECKPOINT = ("model.safetensors", "training.safetensors", "state.json")
# What makes an undamaged file (alone in a folder, or with those it needs), and what loads it.
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    **{
        f"checkpoint {n}": (_saved(n), lambda p: checkpoint.restore(p.parent, *_module(), threads=False))
        for n in _CHECKPOINT
    },
    "safetensors": (_weights, lambda path: checkpoint.load_matching(path, _module()[0])),
    **{k: (_of(f"a.{k}", lambda k=k: _picture(k)), _folder) for k in ("png", "jpeg", "webp", "gif", "bmp", "tiff")},
    **{k: (_of(f"a.{k}", lambda k=k: _sound(k)), _sounds) for k in ("wav", "flac", "ogg")},
    "picture zip": (_of("a.zip", lambda: _zipped(a_png=_picture("png"), b_jpeg=_picture("jpeg"))), _images),
    "npz": (_of("a.npz", _arrays), _images),
    "idx": (_of("a-images-idx3-ubyte", lambda: _IDX), _images),
    "idx gz": (_of("a-images-idx3-ubyte.gz", lambda: gzip.compress(_IDX)), _images),
    "cifar": (_of("data_batch_1.bin", lambda: bytes(3073 * 3)), _folder),
    "txt": (_of("a.txt", lambda: b"Some words.\n\nAnd more.\n" * 9), text.load),
    "jsonl": (_of("a.jsonl", lambda: _LINES), text.load),
    "html": (_of("a.html", lambda: _HTML), text.load),
    "text zip": (_of("a.zip", lambda: _zipped(a_txt=b"words " * 99, b_jsonl=_LINES)), text.load),
    "po": (_of("a.po", lambda: _PO), text.load_pairs),
    "config": (
        _of("config.toml", lambda: config.to_toml(config.ImageConfig(), "vae").encode()),
        lambda path: config.build(config.ImageConfig, config.read(path, "vae"), str(path)),
    ),
    "tokenizer": (_tokenizer, text.read_tokenizer),
}


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Some damage: flipped, lost, repeated and foreign bytes; false sizes and numbers; deep nesting."""
    content = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice((1, 4, 8, 64)))
        digits = [k for k, byte in enumerate(content[:4096]) if chr(byte).isdigit()]
        match draw.randrange(8):
            case 0:
                content[at:end] = bytes(byte ^ 1 << draw.randrange(8) for byte in content[at:end])
            case 1:
                del content[at : draw.choice((end, len(content)))]
            case 2:
                content[at:at] = content[at:end] * draw.choice((1, 1000))
            case 3:
                size = draw.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1))
                width = draw.choice((2, 4, 8))
                content[at : at + width] = (size % 256**width).to_bytes(width, draw.choice(("little", "big")))
            case 4:
                content[at:end] = draw.choice((b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"\n", b"\r")) * 4
            case 5:
                content[at:at] = draw.choice(_NESTED)
            case 6 if digits:
                first = draw.choice(digits)
                content[first : first + 1] = draw.choice(_NUMBERS)
            case _:
                content[at:end] = draw.randbytes(end - at)
    return bytes(content)


def damage(path: Path, draw: random.Random) -> None:
    """Mutate a file, or half the time a member of an archive."""
    if path.suffix in (".zip", ".npz", ".gz") and draw.random() < 0.5:
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(mutated(gzip.decompress(path.read_bytes()), draw)))
            return
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        name = draw.choice(list(members))
        members[name] = mutated(members[name], draw)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for member, content in members.items():
                file.writestr(member, content)
    else:
        path.write_bytes(mutated(path.read_bytes(), draw))


def load(task: str) -> Any:
    """What the file of a task, "<kind>-<seed>", holds; seed "sound": an undamaged one."""
    kind, _, seed = task.rpartition("-")
    make, read = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = make(Path(folder))
        if seed != "sound":
            damage(path, random.Random(task))
        return read(path)


def finding(task: str) -> str:
    """What is wrong with how a damaged file is handled; "" if nothing."""
    before, begun, wrong = _peak(), time.process_time(), ""
    try:
        load(task)
    except UsageError as error:
        wrong = "message of several lines" if "\n" in str(error).strip() else ""
    except Exception as error:
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        name = Path(where.tb_frame.f_code.co_filename).name
        wrong = f"{type(error).__name__} in {name}:{where.tb_lineno}: {str(error)[:100]}"
    if not wrong and (seconds := time.process_time() - begun) > SECONDS:
        wrong = f"took {seconds:.1f} s of processor time"
    if not wrong and (grown := _peak() - before) > BYTES:
        wrong = f"held {grown >> 20} MiB"
    return wrong


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _work(task: str) -> dict[str, Any]:
    wrong = finding(task)
    return {"failures": {"load": wrong} if wrong else {}}


def _serve() -> int:
    """The process that loads: sound files first, so that libraries are imported before memory is limited."""
    torch.set_num_threads(1)
    for kind in KINDS:
        load(f"{kind}-sound")
        print(f"{kind}: ready", flush=True)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ROOM, resource.RLIM_INFINITY))
    return worker.serve(_work)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_files", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the next ones count on")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--task", help="load this one file here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return _serve()
    if options.task:
        load(options.task)
        return 0
    kinds = list(KINDS)
    tasks = [f"{kinds[k % len(kinds)]}-{options.seed + k}" for k in range(options.count)]
    found: dict[str, str] = {}

    def done(task: str, result: dict[str, Any]) -> None:
        for why in failures(result).values():
            found[task] = why
            print(f"{task}: {why}", flush=True)

    batches = [tasks[k : k + _CHUNK] for k in range(0, len(tasks), _CHUNK)]
    command = [sys.executable, "-m", "bench.fuzz_files", "--serve"]
    processes.run(command, batches, done, jobs=options.jobs, deadline=float("inf"), silent=HANGS)
    by_kind = Counter(task.rpartition("-")[0] for task in found)
    counts = ", ".join(f"{n} {kind}" for kind, n in by_kind.most_common()) or "none"
    print(f"{len(tasks)} damaged files from seed {options.seed}, findings: {counts}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
