"""Small faults that can be planted in a module, each a replacement of a piece of its text.

What no test of behaviour should see is left alone. docs/testing.md lists the rules; `_is_left_alone` holds them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
# Arguments that change speed, layout or what the program checks of itself.
_KEYWORDS = frozenset({"copy", "daemon", "indent", "non_blocking", "stacklevel", "strict", "timeout", "timeout_s"})
# Constants that say how much is done at a time, how much memory is used, or how long is waited.
_SIZES = re.compile(
    r"_?([A-Z]+_)*(AT_ONCE|BLOCK|CHUNK|SECONDS|POLL_S|(BLOCK|BUFFER|CHUNK|COPIED|FOLDER|KEPT|MEMORY)_BYTES)"
)
# Statements whose effect shows in a log, after a power failure, or not at all: the interpreter closes what is left.
_CALLS = re.compile(r"_log\.\w+|click\.echo|(.+\.)?(close|dispose)|os\.fsync|sync_directory|gc\.\w+|warnings\.\w+")
_DESCRIPTIONS = ("__repr__", "__str__")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_EXACT = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        line: of the piece that is replaced, from 1.
        statement: first line of the statement that it is in.
        at_import: whether it runs when the module is imported: it is in no body of a function.
        begin: byte offset of the piece.
        end: byte offset after it.
        old: the piece.
        new: what stands there instead.
    """

    line: int
    statement: int
    at_import: bool
    begin: int
    end: int
    old: str
    new: str

    def applied(self, source: str) -> str:
        """The module with the fault."""
        data = source.encode()
        return (data[: self.begin] + self.new.encode() + data[self.end :]).decode()

    def __str__(self) -> str:
        """In one line."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.line}: {old}  ->  {new}"


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its text."""
    found = {(one.begin, one.end, one.new): one for one in _Finder(source).walk(ast.parse(source))}
    return sorted(found.values(), key=lambda one: (one.begin, one.end, one.new))


class _Finder:
    def __init__(self, source: str) -> None:
        self._data = source.encode()
        self._lines = [0]
        for line in self._data.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._statement = 1
        self._at_import = True

    def walk(self, node: ast.AST) -> Iterator[Mutant]:
        """Mutants of a node and of what is below it."""
        if _is_left_alone(node):
            return
        if isinstance(node, ast.stmt):
            self._statement = node.lineno
        yield from self._of(node)
        before = self._at_import
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
                continue
            self._at_import = before and not (name == "body" and isinstance(node, _FUNCTIONS))
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.walk(child)
        self._at_import = before

    def _of(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._text(node.left), self._text(node.comparators[0])
            yield self._made(node, f"{left} {_COMPARISONS[type(node.ops[0])]} {right}")
        elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            yield self._made(node, f"({self._text(node.left)}) {_ARITHMETIC[type(node.op)]} ({self._text(node.right)})")
        elif isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
            operator = _ARITHMETIC[type(node.op)]
            yield self._made(node, f"{self._text(node.target)} {operator}= {self._text(node.value)}")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield self._made(node, f"({self._text(node.operand)})")
        elif isinstance(node, ast.BoolOp):
            other = " or " if isinstance(node.op, ast.And) else " and "
            yield self._made(node, f"({other.join(f'({self._text(value)})' for value in node.values)})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            yield self._made(node, repr(not node.value if isinstance(node.value, bool) else node.value + 1))
        elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            yield self._made(node, "return None")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await):
            yield self._made(node, "pass")
        elif isinstance(node, ast.Continue):
            yield self._made(node, "break")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMES:
            if not (node.func.id == "sorted" and node.keywords):
                yield self._made(node.func, _NAMES[node.func.id])
        elif isinstance(node, ast.Slice):
            yield from self._shorter(node)
        yield from self._conditions(node)

    def _conditions(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            test = node.test
            plain = isinstance(test, ast.Compare) and isinstance(test.ops[0], _EXACT)
            if not plain and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
                yield self._made(test, f"(not ({self._text(test)}))")
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield self._made(test, "True")

    def _shorter(self, node: ast.Slice) -> Iterator[Mutant]:
        for bound in (node.lower, node.upper):
            if bound is not None:
                yield self._made(bound, "")

    def _text(self, node: ast.expr) -> str:
        return ast.unparse(node)

    def _made(self, node: ast.expr | ast.stmt, new: str) -> Mutant:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = self._lines[node.lineno - 1] + node.col_offset
        end = self._lines[node.end_lineno - 1] + node.end_col_offset
        line, statement = node.lineno, self._statement
        return Mutant(line, statement, self._at_import, begin, end, self._data[begin:end].decode(), new)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            left = True
        case ast.FunctionDef(name=name):
            left = name in _DESCRIPTIONS
        case ast.ClassDef(bases=bases):
            left = any(ast.unparse(base) == "Protocol" for base in bases)
        case ast.keyword(arg=name):
            left = name in _KEYWORDS
        case ast.Assign(targets=names):
            left = all(isinstance(name, ast.Name) and _SIZES.fullmatch(name.id) for name in names)
        case ast.If(test=test):
            left = "TYPE_CHECKING" in ast.unparse(test)
        case ast.Expr(value=ast.Call(func=function)):
            left = _CALLS.fullmatch(ast.unparse(function)) is not None
        case ast.Expr(value=ast.Constant()):
            left = True
        case _:
            left = False
    return left
