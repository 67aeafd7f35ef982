"""The house: layering, packaging, what importing costs, and that op table and registry agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import genai_fast
from genai_fast.registry import FOLDERS, LIBRARIES, OPS
from genai_fast.table import op_table

ROOT = Path(__file__).resolve().parents[1]
# Each layer may import itself and what stands before it.
LAYERS = [
    (
        "genai_fast.errors",
        "genai_fast.imports",
        "genai_fast.terminal",
        "genai_fast.scoped",
        "genai_fast.spelling",
        "genai_fast.versions",
        "genai_fast._moved",
    ),
    ("genai_fast.kernels.common", "genai_fast.atomic_files"),
    ("genai_fast.kernels",),
    ("genai_fast.registry",),
    ("genai_fast.backends", "genai_fast.autotune", "genai_fast.capture", "genai_fast.precision"),
    ("genai_fast.config", "genai_fast.contract", "genai_fast.emulator"),
    ("genai_fast.ops",),
    ("genai_fast.fusion", "genai_fast.optim", "genai_fast.testing", "genai_fast.table", "genai_fast.sdpa"),
    ("genai_fast.layers", "genai_fast.cpu"),
    ("genai_fast.planning",),
    ("genai_fast.swap", "genai_fast.lazy", "genai_fast.hugging_face"),
    ("genai_fast.acceleration",),
    ("genai_fast.models", "genai_fast.data", "genai_fast.evaluation"),
    ("genai_fast.training",),
    ("genai_fast.runs",),
    ("genai_fast.profiling",),
    ("genai_fast.cli", "genai_fast.__main__"),
]


def _sources():
    for folder, package in ((ROOT / "kernels", "genai_fast.kernels"), (ROOT / "genai_fast", "genai_fast")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield path, ".".join((package, *parts)).removesuffix(".__init__")


def _layer(module):
    layered = [(len(name), k, name) for k, names in enumerate(LAYERS) for name in names]
    matches = [place for place in layered if f"{module}.".startswith(f"{place[2]}.")]
    return max(matches)[1] if matches else None


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_go_one_way():
    wrong = []
    for path, module in _sources():
        if module == "genai_fast":
            continue
        mine = _layer(module)
        assert mine is not None or module == "genai_fast.kernels", f"{module} has no layer in LAYERS"
        for target in _imports(path):
            theirs = _layer(target)
            if theirs is not None and mine is not None and theirs > mine:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_kernels_import_no_other_op():
    for path, module in _sources():
        parts = module.split(".")
        if parts[:2] == ["genai_fast", "kernels"] and len(parts) > 3 and parts[2] != "common":
            for target in _imports(path):
                if target.startswith("genai_fast.kernels."):
                    assert target.split(".")[2] in ("common", parts[2]), f"{module} imports {target}"


def test_triton_is_imported_only_by_triton_files():
    for path, module in _sources():
        if any(target.split(".")[0] == "triton" for target in _imports(path)):
            assert path.stem.endswith(("triton_kernel", "_triton")), module


def test_no_top_level_kernels_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_op_folder_is_complete():
    for op in OPS.values():
        folder = ROOT / "kernels" / op.folder
        stems = {"reference": "reference.py", "cpu": "cpu_kernel.cpp", "triton": "triton_kernel.py"}
        for name in ("schema.py", "spec.py", "README.md", *(stems[backend] for backend in op.backends)):
            assert (folder / name).exists(), f"{op}: kernels/{op.folder}/{name} is missing"


def test_the_op_table_is_the_registry():
    assert op_table() in (ROOT / "kernels/README.md").read_text(), "run: python -m genai_fast.table kernels/README.md"


def test_the_tests_that_the_design_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "DESIGN.md").read_text()))
    there = {name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 100 and named <= there


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_bare_pytest_imports_the_checkout():
    """`python -m pytest` adds the folder that it is called in, `pytest` does not; bench is never installed."""
    code = "import sys, pytest; sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', sys.argv[1]]))"
    command = [sys.executable, "-P", "-c", code, "tests/bench/test_clock.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "test_clock.py::" in done.stdout, done.stdout + done.stderr


def test_import_loads_no_spec():
    """Cases, peers and costs are for tests and benchmarks; run time needs schemas alone."""
    done = _python("import sys, torch, genai_fast; print(*(m for m in sys.modules if m.startswith('genai_fast.')))")
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "genai_fast.kernels.vae_loss.schema" in modules
    assert [m for m in modules if m.endswith(("spec", "_kernel", "_triton"))] == []


def test_every_op_is_what_the_registry_says():
    for name, op in OPS.items():
        assert op.name == name
        assert {FOLDERS[library.name] for library in op.library} == {op.folder}
        assert all(LIBRARIES[library.name] is library for library in op.library)


def test_import_is_light_and_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; before = set(sys.modules); import genai_fast\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new & {'triton', 'matplotlib', 'PIL', 'rich', 'mlxtend', 'sklearn', 'safetensors'}))"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "how", [("-m", "genai_fast", "--version"), ("-c", "from genai_fast.cli import main; main(['--version'])")]
)
def test_the_version_does_not_wait_for_torch(how):
    done = subprocess.run([sys.executable, "-X", "importtime", *how], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"genai-fast {genai_fast.__version__}\n"
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "genai_fast.versions" in loaded
    assert not loaded & {"torch", "numpy", "genai_fast.ops"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "vae", "--help"], 0, "variational autoencoder of one hidden layer"),
        (["train", "vea"], 2, "invalid choice: 'vea'"),
        (["train", "gpt", "--vocabulry", "3"], 2, "did you mean --vocabulary?"),
        (["train", "vae", "--validation", "5"], 2, "validation: expected a number > 0 and <= 0.9, got 5.0"),
        (["train", "vae", "--precision", "bf61"], 2, "precision: expected float32 or bfloat16 or float16, got 'bf61'"),
        (["train", "vae", "--config", "none.toml"], 2, "none.toml: expected a TOML file, got No such file"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(words, code, said):
    script = (
        "import sys; from genai_fast.cli import main\n"
        f"try: code = main({words})\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('torch' in sys.modules, code)"
    )
    done = _python(script)
    assert done.stdout.splitlines()[-1] == f"False {code}", done.stderr
    assert said in done.stdout + done.stderr


def test_the_version_has_one_place():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "genai_fast/versions.py"
    provider = pytest.importorskip("scikit_build_core.metadata.regex")
    found = provider.dynamic_metadata("version", {"input": str(ROOT / "genai_fast/versions.py")})
    assert found == genai_fast.__version__


def test_the_package_imports_on_demand():
    code = (
        "import sys, genai_fast\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(genai_fast.__all__) <= set(dir(genai_fast)) and 'torch' not in sys.modules\n"
        "assert not hasattr(genai_fast, 'nothing_of_this_name')\n"
        "for name in genai_fast.__all__: getattr(genai_fast, name)\n"
        "from genai_fast import models, swap, backends\n"
        "assert genai_fast.models.GPT is models.GPT and genai_fast.fuse is swap.fuse\n"
        "import torch; torch.ops.genai_fast.layer_norm"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_importing_after_torch_registers_the_operators():
    done = _python("import torch, genai_fast; torch.ops.genai_fast.layer_norm")
    assert done.returncode == 0, done.stderr


def test_former_module_names_warn_and_name_the_new_place():
    code = (
        "import warnings, inspect, importlib, sys, genai_fast\n"
        "from genai_fast._moved import MOVED\n"
        "warnings.simplefilter('error')\n"
        "inspect.getmodule(inspect.currentframe())\n"  # looks at all modules, and must not wake these
        "assert 'torch' not in sys.modules\n"
        "for old, new in MOVED.items():\n"
        "    module = importlib.import_module('genai_fast.' + new)\n"
        "    name = next(n for n in reversed(vars(module)) if not n.startswith('_'))\n"
        "    with warnings.catch_warnings(record=True) as said:\n"
        "        warnings.simplefilter('always')\n"
        "        exec(f'from genai_fast.{old} import {name} as found')\n"
        "    assert found is getattr(module, name), (old, name)\n"
        "    assert [w.category for w in said] == [DeprecationWarning], (old, said)\n"
        "    assert f'import {name} from genai_fast.{new}' in str(said[0].message)\n"
        "warnings.simplefilter('ignore')\n"
        "from genai_fast.fuse import explain\n"
        "from genai_fast.training import runs\n"
        "assert explain is genai_fast.explain and genai_fast.fuse.__name__ == 'fuse' and runs.train\n"
        "assert genai_fast.paths.folder is genai_fast.autotune.folder"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr


LIGHT = {  # a statement, and what it must not import
    "from genai_fast.training import Step": "data config models runs training.checkpoint training.loop",
    "import genai_fast.cli": "data models evaluation training runs profiling cli.commands",
    "from genai_fast.cli.parser import parser_of; parser_of()": (
        "data models.common models.registry models.gan.model training runs"
    ),
}


@pytest.mark.parametrize("statement", LIGHT)
def test_rooms_that_are_not_needed_are_not_imported(statement):
    done = _python(f"import sys, genai_fast; moved = {{*sys.modules}}; {statement}; print(*{{*sys.modules}} - moved)")
    assert done.returncode == 0, done.stderr
    loaded = [m.removeprefix("genai_fast.") for m in done.stdout.split() if m.startswith("genai_fast.")]
    assert not [m for m in loaded if any(f"{m}.".startswith(f"{room}.") for room in LIGHT[statement].split())]


def test_what_training_offers_is_there_under_its_names():
    code = (
        "from genai_fast import training; from genai_fast.training import *\n"
        "assert fit is training.fit and CheckpointError is training.checkpoint.CheckpointError\n"
        "assert {name for name in training.__all__} <= {*globals()}\n"
        "print(training.nothing)"
    )
    done = _python(code)
    assert "AttributeError: module 'genai_fast.training' has no attribute 'nothing'" in done.stderr


def test_without_the_extension_the_reference_serves_and_says_so():
    code = (
        "import sys; sys.modules['genai_fast._cpu'] = None\n"
        "import warnings, torch, genai_fast\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    x = torch.zeros(2, 3)\n"
        "    for _ in range(2): genai_fast.ops.reparameterize(x, x, seed=1)\n"
        "assert [w.category for w in said] == [genai_fast.FallbackWarning], said\n"
        "print(said[0].message)\n"
        "try:\n"
        "    with genai_fast.use_backend('cpu'): genai_fast.ops.reparameterize(x, x, seed=1)\n"
        "except RuntimeError as error: print(error)\n"
        "else: raise SystemExit('an explicit choice must raise')"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    said, error = done.stdout.splitlines()
    assert "extension does not load" in said
    assert "remedy" in error


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_each_instruction_set_passes_the_numerics_gate(isa):
    """Half of the runs with each, as it is one source; `make asan` and the fuzzer take all."""
    from genai_fast.backends import cpu_kernels
    from genai_fast.kernels.common.extension import extension

    module, reason = extension()
    if module is None:
        pytest.skip(reason)
    if not module.instruction_sets().get(isa):
        pytest.skip(f"this processor has no {isa}")
    if isa == cpu_kernels()[1]:
        pytest.skip("tests/ops/test_ops.py runs these")
    code = (
        "from genai_fast.backends import cpu_kernels\n"
        "from genai_fast.testing import assert_matches_reference, every_run\n"
        f"runs = [run for run in every_run(('cpu',)) if run.backend == 'cpu'][{isa == 'portable':d}::2]\n"
        "for run in runs: assert_matches_reference(run)\n"
        "print(cpu_kernels()[1], len(runs) > 0)"
    )
    done = _python(code, GENAI_FAST_ISA=isa)
    assert done.stdout.split() == [isa, "True"], done.stdout + done.stderr


def test_half_precision_needs_no_type_of_newer_compilers():
    """GCC 11 on x86-64 and GCC 12 on ARM have no _Float16 in C++."""
    sources = [*ROOT.glob("kernels/*/*.cpp"), *ROOT.glob("kernels/*/*.h")]
    assert len(sources) > 20 and not [path for path in sources if "_Float16" in path.read_text()]


def test_the_extension_is_hardened():
    """Its table of addresses is read-only, and functions with arrays check their stack."""
    from genai_fast.kernels.common.extension import extension

    module, reason = extension()
    if module is None or not sys.platform.startswith("linux") or shutil.which("readelf") is None:
        pytest.skip(reason or "needs Linux and readelf")
    shown = subprocess.run(["readelf", "-dlW", "--dyn-syms", module.__file__], capture_output=True, text=True).stdout
    assert "BIND_NOW" in shown and "GNU_RELRO" in shown and "__stack_chk_fail" in shown


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_on_one_thread():
    """As a DataLoader's worker does; on several threads OpenMP waits for ever there, in PyTorch's own operators too."""
    script = (
        "import os, torch; from genai_fast import ops\n"
        "torch.set_num_threads(1); x = torch.randn(64, 512); w = torch.ones(512)\n"
        "expected = ops.rms_norm(x, w)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(ops.rms_norm(x, w), expected) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0"], done.stderr


def test_an_unknown_instruction_set_is_refused():
    code = "import torch, genai_fast; x = torch.zeros(1, 1); genai_fast.ops.reparameterize(x, x)"
    done = _python(code, GENAI_FAST_ISA="avx9")
    assert done.returncode != 0
    assert "GENAI_FAST_ISA: expected one of portable" in done.stderr


def test_one_openmp_runtime():
    done = _python(
        "import genai_fast, torch; x = torch.zeros(64, 512); genai_fast.ops.reparameterize(x, x)\n"
        "from genai_fast.backends import mapped_openmp; print(len(mapped_openmp()))"
    )
    assert done.stdout.strip() == ("1" if sys.platform.startswith("linux") else "0"), done.stderr


def test_the_wheel_has_one_top_level_package(tmp_path):
    # In the checkout's own build folder, where only what has changed is compiled.
    command = ["pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"genai_fast"}
    needed = ("kernels/__init__.py", "kernels/vae_loss/triton_kernel.py", "py.typed")
    assert {f"genai_fast/{name}" for name in needed} <= {*names}
    assert any(name.startswith("genai_fast/_cpu") for name in names)
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    about = zipfile.ZipFile(wheel).read(about).decode().splitlines()
    assert "License-Expression: Apache-2.0" in about and "Classifier: Typing :: Typed" in about
