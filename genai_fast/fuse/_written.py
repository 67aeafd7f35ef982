"""Forward methods that somebody wrote: read, traced once with the children as leaves, and generated again with runs.

A trace silently freezes whatever is not a tensor: a flag, a branch, a drawn number. So the source is read first, and
refused unless every call takes a tensor, every attribute of self is a child that is called, and there is one way
through. What remains is the same for every call, in training and in evaluation.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import operator
import textwrap
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from genai_fast.layers._run import run
from genai_fast.layers._stock import letter, runs

_SHAPES = ("shape", "dtype", "device", "ndim", "T", "mT")
_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)


class Refused(Exception):
    """Why a forward method is left alone."""


class Chain(NamedTuple):
    """Steps that follow each other: a path of a child, or an activation that forward calls as a function."""

    steps: tuple[str | nn.Module, ...]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(step) if isinstance(step, str) else step for step in self.steps]


@functools.cache
def _overridable() -> frozenset[int]:
    return frozenset(id(f) for functions in torch.overrides.get_overridable_functions().values() for f in functions)


class _Reader:
    """Reads a forward method; raises Refused with the first thing that a trace would freeze."""

    def __init__(self, model: nn.Module, function: types.FunctionType) -> None:
        self.model, self.globals, self.calls = model, function.__globals__, 0
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            raise Refused("its source cannot be read") from None
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or hasattr(function, "__wrapped__"):
            raise Refused("it is decorated or no plain function")
        given = definition.args
        if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs:
            raise Refused("its arguments are not plain ones")
        if not all(isinstance(default, ast.Constant) for default in given.defaults):
            raise Refused("a default argument is no constant")
        self.self, *names = [a.arg for a in given.args]
        self.locals, self.tensors = set(names), set(names)
        for statement in definition.body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Expr, ast.Return)):
            self._reads_tensor(node.value)
        elif isinstance(node, ast.Assign):
            tensor = self._reads_tensor(node.value)
            for target in node.targets:
                self._bind(target, tensor)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            before = self._reads_tensor(ast.Name(node.target.id, ast.Load()))
            self._bind(node.target, self._reads_tensor(node.value) or before)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            self._bind(node.target, False if node.value is None else self._reads_tensor(node.value))
        else:
            raise Refused(f"it has {_words(node)}")

    def _bind(self, target: ast.expr, tensor: bool) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self._bind(element, tensor)
        elif isinstance(target, ast.Name) and target.id != self.self:
            self.locals.add(target.id)
            (self.tensors.add if tensor else self.tensors.discard)(target.id)
        elif isinstance(target, ast.Attribute):
            raise Refused(f"it assigns to {ast.unparse(target)}")
        else:
            raise Refused(f"it assigns to an element ({ast.unparse(target)})")

    def _reads_tensor(self, node: ast.expr | None) -> bool:
        """Whether the value comes from a tensor, so that a trace records what is done with it."""
        if node is None or isinstance(node, ast.Constant):
            return False
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Name):
            if node.id not in self.locals:
                raise Refused(f"it reads {node.id}, which is neither an argument nor a variable")
            return node.id in self.tensors
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, (ast.Tuple, ast.List)):
            parts = node.elts
        elif isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            parts = [node.operand]
        elif isinstance(node, ast.Subscript):
            parts = [node.value, node.slice]
        elif isinstance(node, ast.Slice):
            parts = [node.lower, node.upper, node.step]
        else:
            raise Refused(f"it has {_words(node)}")
        return any([self._reads_tensor(part) for part in parts])

    def _attribute(self, node: ast.Attribute) -> bool:
        if self._of_self(node):
            child = node.attr in self.model._modules and isinstance(node.value, ast.Name)
            what = "other than to call it" if child else "which is not a child module"
            raise Refused(f"it reads {ast.unparse(node)}, {what}")
        if isinstance(self._global(node), _CONSTANTS):
            return False
        if self._reads_tensor(node.value) and node.attr in _SHAPES:
            return True
        raise Refused(f"it reads {ast.unparse(node)}")

    def _of_self(self, node: ast.expr) -> bool:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return isinstance(node, ast.Name) and node.id == self.self

    def _global(self, node: ast.expr) -> Any:
        """What a dotted name means in the module of forward; None if it is no such name."""
        if isinstance(node, ast.Name):
            return None if node.id in self.locals else self.globals.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
        return None

    def _child(self, node: ast.expr) -> Any:
        """The module that self.a, self.a[0] or self.a.b is; None if it is none."""
        if isinstance(node, ast.Name):
            return self.model
        owner = self._child(node.value)
        if isinstance(node, ast.Attribute):
            return owner._modules.get(node.attr) if isinstance(owner, nn.Module) else None
        if isinstance(node.slice, ast.Constant) and isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return owner[node.slice.value]
        return None

    def _call(self, node: ast.Call) -> bool:
        self.calls += 1
        called, name = node.func, ast.unparse(node.func)
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise Refused(f"it calls {name} with * or **")
        given = [self._reads_tensor(a) for a in (*node.args, *(k.value for k in node.keywords))]
        if self._of_self(called):
            if not isinstance(called, ast.Name) and isinstance(self._child(called), nn.Module):
                return True
            raise Refused(f"it calls {name}, which is not a child module")
        function = self._global(called)
        if function is not None:
            if id(function) not in _overridable():
                raise Refused(f"it calls {name}, which is no function of tensors in torch or torch.nn.functional")
            if not any(given):
                raise Refused(f"it calls {name} without a tensor")
            return True
        if isinstance(called, ast.Attribute) and self._reads_tensor(called.value):
            if hasattr(torch.Tensor, called.attr) and not called.attr.startswith("_"):
                return True
            raise Refused(f"it calls {name}, which is no method of a tensor")
        raise Refused(f"it calls {name}")


def _words(node: ast.AST) -> str:
    control = {
        ast.If: "an if", ast.For: "a for loop", ast.While: "a while loop", ast.Try: "a try", ast.With: "a with",
        ast.IfExp: "a conditional expression", ast.BoolOp: "and / or", ast.Compare: "a comparison",
        ast.Assert: "an assert", ast.Delete: "a del", ast.Lambda: "a lambda", ast.FunctionDef: "a function inside",
        ast.ListComp: "a comprehension", ast.GeneratorExp: "a comprehension", ast.DictComp: "a comprehension",
        ast.SetComp: "a comprehension", ast.Yield: "a yield", ast.Await: "an await",
    }  # fmt: skip
    return control.get(type(node), f"{ast.unparse(node)}, which is not supported")


class _Proxy(fx.Proxy):
    """fx.Proxy turns `x += y` into x = x + y, which others who hold x would notice."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target is getattr or node.target.__module__ == "_operator")


def _graph(model: nn.Module, function: types.FunctionType) -> fx.Graph:
    reader = _Reader(model, function)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever forward or fx raises
        raise Refused(f"torch.fx does not trace it ({type(error).__name__}: {error})") from None
    made = [n for n in graph.nodes if n.op.startswith("call_") and not _is_operator(n)]
    if len(made) != reader.calls or any(n.op == "get_attr" for n in graph.nodes):
        raise Refused("a trace of it freezes a value")
    return graph


def _relu(x: Any, inplace: bool = False) -> nn.Module:
    return nn.ReLU(inplace)


def _leaky_relu(x: Any, negative_slope: float = 0.01, inplace: bool = False) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace)


def _silu(x: Any, inplace: bool = False) -> nn.Module:
    return nn.SiLU(inplace)


def _gelu(x: Any, approximate: str = "none") -> nn.Module:
    return nn.GELU(approximate)


_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: _relu, torch.relu: _relu, "relu": _relu, "relu_": lambda x: nn.ReLU(True), F.leaky_relu: _leaky_relu,
    F.silu: _silu, F.gelu: _gelu, **dict.fromkeys((F.tanh, torch.tanh, "tanh"), lambda x: nn.Tanh()),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), lambda x: nn.Sigmoid()),
}  # fmt: skip


def _step(node: fx.Node) -> tuple[fx.Node, str | nn.Module] | None:
    """(what it takes, what it is) of a node that is a call of one module or activation on one value."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        return (node.args[0], node.target) if len(node.args) == 1 and not node.kwargs else None
    make = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if make is None or len(node.all_input_nodes) != 1:
        return None
    return node.args[0], make(*node.args, **node.kwargs)


def _chains(graph: fx.Graph, model: nn.Module) -> list[tuple[list[fx.Node], Chain]]:
    """Nodes right after one another, each value used by the next alone, that hold something to run as one."""
    found, nodes, steps = [], [], []

    def close() -> None:
        chain = Chain(tuple(steps))
        cut = runs("".join(letter(m) for m in chain.modules(model)))
        if any(r.fused and r.letters.strip("CAa") for r in cut):  # for convolutions alone a forward is not replaced
            found.append((list(nodes), chain))

    for node in graph.nodes:
        step = _step(node)
        if not (nodes and step and step[0] is nodes[-1] and len(nodes[-1].users) == 1):
            close()
            nodes, steps = [], []
        if step:
            nodes.append(node)
            steps.append(step[1])
    return found


def _call(chain: Chain) -> Callable[..., Any]:
    """run on the chain, whose children come as arguments: they are looked up at every call."""
    functions = tuple(None if isinstance(step, str) else step for step in chain.steps)

    def run_chain(x: Any, *children: nn.Module) -> Any:
        given = iter(children)
        modules = [next(given) if function is None else function for function in functions]
        if isinstance(x, fx.Proxy):  # a tracer knows the children, but not the functions that became modules
            for module, function in zip(modules, functions, strict=True):
                x = module(x) if function is None else function.forward(x)
            return x
        return run(modules, x)

    return run_chain


class Written(NamedTuple):
    """A forward method made again: its source, the names in it, and the chains that run as one."""

    source: str
    names: dict[str, Any]
    chains: tuple[Chain, ...]

    def compile(self, where: str) -> Callable[..., Any]:
        file = f"<genai_fast.fuse {where} {len(linecache.cache)}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)
        names = dict(self.names)
        exec(compile(self.source, file, "exec"), names)
        return names["forward"]


def written(model: nn.Module) -> Written:
    """The model's forward method, generated with its chains.

    Raises:
        Refused: why it stays as it is.
    """
    function = type(model).forward
    if not isinstance(function, types.FunctionType):
        raise Refused("it is no plain function")
    graph = _graph(model, function)
    chains = _chains(graph, model)
    if not chains:
        raise Refused("it calls no batch norm or dropout itself, in a row of single uses")
    for nodes, chain in chains:
        with graph.inserting_before(nodes[0]):
            children = [graph.get_attr(step) for step in chain.steps if isinstance(step, str)]
            call = graph.call_function(_call(chain), (nodes[0].args[0], *children))
        nodes[-1].replace_all_uses_with(call)
        for node in reversed(nodes):
            graph.erase_node(node)
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    return Written(code.src, code.globals, tuple(chain for _, chain in chains))
