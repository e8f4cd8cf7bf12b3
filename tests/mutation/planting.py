"""Planting a mutant in a process: in the functions that are loaded already, or in a module that is still to be loaded.

No file is changed, so processes that a test starts have no fault.
"""

from __future__ import annotations

import functools
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType

Functions = dict[tuple[str, str, int], list[FunctionType]]

_resolved = functools.cache(lambda name: str(Path(name).resolve()))


def functions_below(folder: Path) -> Functions:
    """Every function of the modules in a folder that is loaded, by file, qualified name and first line."""
    found: Functions = defaultdict(list)
    gc.unfreeze()  # what is frozen would not be listed
    for one in gc.get_objects():
        if type(one) is FunctionType and _resolved(one.__code__.co_filename).startswith(f"{folder}/"):
            found[_key(one.__code__)].append(one)
    gc.freeze()
    return found


def plant_in(functions: Functions, file: Path, source: str, mutated: str) -> bool:
    """Give the functions that differ the code of the mutated module.

    Returns:
        False, and nothing is changed, where the fault is not in functions that are loaded, or changes what they close
        over.
    """
    pairs = list(_differing(_compiled(file, source), _compiled(file, mutated)))
    if not pairs:
        return False
    found = [(functions.get(_key(old), []), new) for old, new in pairs]
    if not _is_function(pairs[0][0]) or not found[0][0]:
        return False
    if any(one.__code__.co_freevars != new.co_freevars for several, new in found for one in several):
        return False
    for several, new in found:
        for one in several:
            one.__code__ = new
    return True


def plant_before_import(file: Path, mutated: str, loaded: Callable[[], None]) -> None:
    """Have the module that lies in `file` loaded with the fault, by whatever name; `loaded` is called when it is."""
    before = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        if _resolved(self.path) != str(file):
            return before(self, fullname)
        loaded()
        return compile(mutated, self.path, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]


def _compiled(file: Path, source: str) -> CodeType:
    return compile(source, str(file), "exec", dont_inherit=True)


def _key(code: CodeType) -> tuple[str, str, int]:
    return _resolved(code.co_filename), code.co_qualname, code.co_firstlineno


def _is_function(code: CodeType) -> bool:
    return bool(code.co_flags & 0x2)  # CO_NEWLOCALS: not of a module, and not of a class's body


def _differing(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """The outermost functions that differ, each followed by the functions in it that differ.

    A module or a body of a class that itself differs comes first, where there is one.
    """
    seen = _whole if _is_function(old) else _own
    if seen(old) != seen(new):
        yield old, new
    for inner, other in zip(_nested(old), _nested(new), strict=False):
        if inner.co_qualname == other.co_qualname:
            yield from _differing(inner, other)


def _nested(code: CodeType) -> Sequence[CodeType]:
    return [one for one in code.co_consts if isinstance(one, CodeType)]


def _own(code: CodeType) -> tuple[object, ...]:
    """What makes a piece of code, without the pieces in it, and without the numbers of its lines."""
    constants = tuple((type(one), repr(one)) for one in code.co_consts if not isinstance(one, CodeType))
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, len(_nested(code)))
    return (code.co_code, constants, *names)


def _whole(code: CodeType) -> tuple[object, ...]:
    return (*_own(code), *(_whole(inner) for inner in _nested(code)))
