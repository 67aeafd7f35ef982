"""The op table of kernels/README.md, made from the registry.

python -m genai_fast.table                    print it
python -m genai_fast.table kernels/README.md  write it between the marks there
"""

import sys
from pathlib import Path

from genai_fast.kernels.common.spec import OpSpec
from genai_fast.registry import OPS

_NAMES = ("reference", "cpu", "triton")
BEGIN, END = "<!-- ops: begin -->", "<!-- ops: end -->"


def op_table() -> str:
    """One Markdown row an op."""
    lines = [
        "| op | computes | backends | dtypes | double backward | source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op in OPS.values():
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in op.dtypes)
        formula = op.formula.replace("|", "\\|")
        lines.append(
            f"| `{op.name}` | {formula} | {backends_of(op)} | {dtypes} |"
            f" {'yes' if op.double_backward else 'no gradient'} | {op.source} |"
        )
    return "\n".join(lines)


def backends_of(op: OpSpec) -> str:
    """Those that serve the op, and those that serve a part of it."""
    partly = {backend for library in op.library for backend in library.kernels} - set(op.backends)
    found = (f"{name} (some shapes)" if name in partly else name for name in _NAMES if name in {*op.backends, *partly})
    return ", ".join(found)


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Put text between two marks of a file, in place of what stands there."""
    content = path.read_text()
    if begin not in content or end not in content:
        raise SystemExit(f"{path}: expected the marks {begin} and {end} around the table")
    head, rest = content.split(begin, 1)
    _, tail = rest.split(end, 1)
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def main() -> None:
    if len(sys.argv) == 1:
        print(op_table())
    else:
        write_between(Path(sys.argv[1]), BEGIN, END, op_table())


if __name__ == "__main__":
    main()
