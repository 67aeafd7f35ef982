"""A page for each op, from its spec, its public function and the predicted figures."""

from __future__ import annotations

from site_examples import example
from site_links import ROOT

from genai_fast import ops
from genai_fast.kernels.common.spec import OpSpec, Tensors
from genai_fast.registry import OPS
from genai_fast.table import backends_of

PREDICTED = "bench/results/predicted.md"
FILES = {"reference": "reference.py", "cpu": "cpu_kernel.cpp", "triton": "triton_kernel.py"}


def pages() -> dict[str, str]:
    """Path in the site -> Markdown, with links from the root of the repository."""
    return {"ops/index.md": _index(), **{f"ops/{op.name}.md": _page(op) for op in OPS.values()}}


def _index() -> str:
    rows = "\n".join(
        f"| [`{op.name}`](/docs/ops/{op.name}.md) | {_cell(op.formula)} | {backends_of(op)} |"
        f" {'yes' if op.double_backward else 'no gradient'} |"
        for op in OPS.values()
    )
    return f"""# Ops

The public functions of `genai_fast.ops`. Each is tested on every backend against float64, in forward and backward. A
backend that serves "some shapes" leaves the others to the reference.

| op | computes | backends | second derivative |
| --- | --- | --- | --- |
{rows}

## Backends

::: genai_fast.backends.use_backend

::: genai_fast.backends.FallbackWarning
"""


def _page(op: OpSpec) -> str:
    function = getattr(ops, op.name)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in op.dtypes)
    code = example(op)
    called = f"## Example\n\nFrom the op's test cases.\n\n```python\n{code}\n```\n" if code else ""
    return f"""# {op.name}

```text
{op.formula}
```

| | |
| --- | --- |
| backends | {backends_of(op)} |
| dtypes of the kernels | {dtypes} |
| second derivative | {"yes" if op.double_backward else "the op has no gradient"} |
| source | {op.source} |
| tests | {len(op.cases)} cases, {len(op.error_cases)} refused calls |
| how the kernels work | [kernels/{op.folder}](/kernels/{op.folder}/README.md) |

::: {function.__module__}.{function.__name__}
    options:
      heading: Call

{called}
## Operators and source

{_operators(op)}

Cases, costs and what people write in plain PyTorch: [spec.py](/kernels/{op.folder}/spec.py). Schemas and shapes for
`torch.compile`: [schema.py](/kernels/{op.folder}/schema.py).

## Errors

What the op refuses before it allocates anything. The messages are those that its tests provoke.

{_errors(op)}
{_limits(op)}
## Predicted figures

{_predicted(op.name)}
"""


def _operators(op: OpSpec) -> str:
    """Each operator of torch.ops.genai_fast, with a link to the file of each backend that has a kernel of it."""
    lines = ["| backends | operator of `torch.ops.genai_fast` |", "| --- | --- |"]
    for library in op.library:
        folder = ROOT / "kernels" / op.folder
        there = [b for b in FILES if b == "reference" or (b in library.kernels and (folder / FILES[b]).exists())]
        links = ", ".join(f"[{backend}](/kernels/{op.folder}/{FILES[backend]})" for backend in there)
        lines.append(f"| {links} | `{library.schema}` |")
    return "\n".join(lines)


def _errors(op: OpSpec) -> str:
    lines = ["| case | error |", "| --- | --- |"]
    for case in op.error_cases:
        try:
            getattr(ops, op.name)(**case.inputs(Tensors()))
        except case.error as error:
            said = _cell(" ".join(str(error).split())).replace("`", "'")
            lines.append(f"| {case.name.replace('_', ' ')} | `{type(error).__name__}: {said}` |")
        else:
            raise AssertionError(f"{op.name}, {case.name}: expected {case.error.__name__}, got a result")
    return "\n".join(lines)


def _limits(op: OpSpec) -> str:
    if op.limits is None:
        return ""
    inputs = op.limits.inputs(Tensors())
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items() if hasattr(x, "shape") and x.dim())
    counts = ", ".join(f"{n:g}" for n in op.limits.instructions)
    return f"""
## Limits of the compiled kernels

A test runs forward and backward on an [emulated H100](/docs/emulator.md) in bfloat16 ({shapes}). Launch by launch, in
order, the instructions per element may be at most {counts}. Memory sectors may be at most {op.limits.sectors:g} times
those that the bytes fill, and shared-memory wavefronts at most {op.limits.conflicts:g} times those without bank
conflicts.
"""


def _predicted(name: str) -> str:
    """The rows of this op in each table, without the op's column."""
    found, title, header = [], "Forward and backward, bfloat16", []
    for line in (ROOT / PREDICTED).read_text().splitlines():
        if line.startswith("## "):
            title, header = line.removeprefix("## "), []
        elif line.startswith("| op |"):
            header = [line]
        elif header and line.startswith("| ---"):
            header.append(line)
        elif line.startswith(f"| {name} |"):
            if len(header) == 2:
                found += ["", f"{title}:", "", *map(_without_first, header)]
                header = []
            found.append(_without_first(line))
    if not found:
        return f"No Triton kernel of this op is in [the predicted figures](/{PREDICTED})."
    text = "Computed from the counters of an emulated GPU and data sheets, not measured: "
    return f"{text}[what that means](/{PREDICTED}).\n" + "\n".join(found)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _without_first(row: str) -> str:
    return "|" + row.split("|", 2)[2]
