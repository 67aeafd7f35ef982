"""The source of a method, and its code again: equal to what runs, or refused."""

import ast
import functools
import inspect
import tokenize
import types
from collections.abc import Iterator
from typing import Any, NamedTuple


class Refused(Exception):
    """Why a method is left alone."""


class NothingFound(Refused):
    """There is nothing to run as one."""


class Source(NamedTuple):
    """Of a method: its definition, at its lines in its file, and the imports of that file's top level."""

    definition: ast.FunctionDef
    imports: list[ast.stmt]

    def compile(self, function: types.FunctionType, *names: str) -> types.CodeType:
        """In a scope that has the variables around the method and these names. The imports are never executed: the
        compiler makes other code of `F.relu` where it sees that F was imported."""
        around = [ast.arg(name) for name in (*function.__code__.co_freevars, *names)]
        outer = ast.FunctionDef("around", ast.arguments([], around, None, [], [], None, []), [self.definition], [])
        module = ast.Module([*self.imports, ast.copy_location(outer, self.definition)], [])
        code = compile(ast.fix_missing_locations(module), function.__code__.co_filename, "exec", dont_inherit=True)
        for name in ("around", self.definition.name):
            code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
        return code


def source_of(function: types.FunctionType) -> Source:
    """Raises Refused, with the reason, where there is none to be trusted."""
    found = _read(function, function.__code__)
    if isinstance(found, Refused):
        raise found
    return found


def unwrapped(function: types.FunctionType) -> tuple[types.FunctionType, list[types.FunctionType]]:
    """What a decorated function calls in the end, and the functions around it from inside out.

    Raises Refused: a decorator keeps what it wraps elsewhere than in one variable of its wrapper.
    """
    around: list[types.FunctionType] = []
    while hasattr(function, "__wrapped__"):
        inside = function.__wrapped__
        plain = isinstance(function, types.FunctionType) and isinstance(inside, types.FunctionType)
        if not plain or sum(_holds(cell, inside) for cell in function.__closure__ or ()) != 1:
            raise Refused("it is decorated")
        around.insert(0, function)
        function = inside
    return function, around


def wrapped(function: types.FunctionType, around: list[types.FunctionType]) -> types.FunctionType:
    """Another function in the same wrappers, which share what else they know with the first ones."""
    for old in around:
        closure = tuple(
            types.CellType(function) if _holds(cell, old.__wrapped__) else cell for cell in old.__closure__ or ()
        )
        function = remade(old, old.__code__, closure, __wrapped__=function)
    return function


def remade(old: types.FunctionType, code: types.CodeType, closure: tuple[types.CellType, ...], **more: Any) -> Any:
    """A function like another one, of other code or with other variables around it."""
    new = types.FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
    for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
        setattr(new, name, getattr(old, name))
    new.__dict__.update({**old.__dict__, **more})
    return new


def _holds(cell: types.CellType, function: types.FunctionType) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # it is empty yet
        return False


@functools.lru_cache(256)
def _read(function: types.FunctionType, code: types.CodeType) -> Source | Refused:
    """The source of a method that has this code now, or why there is none."""
    if hasattr(function, "__wrapped__"):
        return Refused("it is decorated")  # what it wraps may be read, by itself
    try:
        file, _ = inspect.findsource(function)
        lines, first = inspect.getsourcelines(function)
        indented = lines[0][:1].isspace()  # and stays so: what a string holds must not change
        tree = ast.parse("".join(["if True:\n"] * indented + lines))
        definition = (tree.body[0] if indented else tree).body[0]
        if not isinstance(definition, ast.FunctionDef):
            return Refused("it is no plain function")
        definition.decorator_list = []  # with none that wraps it: what they made of it is the code that is compared
        source = Source(ast.increment_lineno(definition, first - 1 - indented), _imports_of("".join(file)))
        same = _same(source.compile(function), code)
    except (OSError, TypeError, ValueError, SyntaxError, tokenize.TokenError, RecursionError, StopIteration):
        return Refused("its source cannot be read")
    return source if same else Refused("its source is not what runs")


@functools.lru_cache(64)
def _imports_of(text: str) -> list[ast.stmt]:
    return list(_imports(ast.parse(text)))


def _imports(node: ast.AST) -> Iterator[ast.stmt]:
    """The imports of a module's own scope, those under an if or a try too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            yield from _imports(child)


def _same(a: Any, b: Any) -> bool:
    """Whether two code objects do the same, wherever they stand."""
    if not isinstance(a, types.CodeType):
        return type(a) is type(b) and (a == b or a != a)
    if not isinstance(b, types.CodeType) or len(a.co_consts) != len(b.co_consts):
        return False
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    return all(getattr(a, p) == getattr(b, p) for p in parts) and all(map(_same, a.co_consts, b.co_consts))
