"""Documents in YAML or JSON, validated by pydantic; what is wrong becomes one line: `file:line: field: message`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lazydp.components.shared.errors import InputError, LazyDPError
from lazydp.components.shared.suggest import suggestion

# Problems that one message names, and characters of a value that it shows.
_SHOWN = 3
_VALUE_LENGTH = 60

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed document.

    Attributes:
        where: what errors begin with, most often the file's path.
        content: mappings, lists and scalars.
        root: the YAML tree that `content` came from, which knows the lines; None for JSON.
    """

    where: str
    content: Any
    root: yaml.Node | None = None

    def validated(self, model: type[_Model], *, raises: type[LazyDPError] = InputError) -> _Model:
        """The content as a `model`.

        Raises:
            `raises`: it does not fit; one line that names where, line and field.
        """
        if not isinstance(self.content, dict):
            some = ", ".join(list(model.model_fields)[:3])
            raise raises(f"{self.where}: expected a mapping of fields ({some}, ...), found {_kind(self.content)}")
        try:
            return model.model_validate(self.content)
        except ValidationError as error:
            raise raises(self._line(error, _known_fields(model))) from None

    def error(self, message: str, *location: int | str) -> InputError:
        """An error about the field at `location` (keys and indices from the top)."""
        return InputError(f"{self._place(location)}: {message}")

    def _line(self, error: ValidationError, known: set[str]) -> str:
        problems = error.errors(include_url=False)
        place = self._place(problems[0]["loc"])
        told = "; ".join(_told(problem, self.content, known) for problem in problems[:_SHOWN])
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        return f"{place}: {told}{more}"

    def _place(self, location: Sequence[int | str]) -> str:
        if self.root is None:
            return self.where
        return f"{self.where}:{_node_at(self.root, location).start_mark.line + 1}"


def read_text(path: Path, *, what: str) -> str:
    """The text of a file in UTF-8, without a byte-order mark; `what` names its kind in errors.

    Raises:
        InputError: it is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no {what} at {path}: the file does not exist") from None
    except OSError as error:
        raise InputError(f"the {what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise InputError(f"the {what} {path} is not UTF-8: {byte}") from None


def read_yaml(path: Path, *, what: str) -> Document:
    """Read a YAML file; see `read_text` and `parse_yaml` for what is refused."""
    return parse_yaml(read_text(path, what=what), where=str(path))


def parse_yaml(text: str, *, where: str) -> Document:
    """Parse YAML text.

    Raises:
        InputError: it is not YAML, or a mapping names a field twice; one line that names `where` and the line.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        content = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise InputError(f"{where}:{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets errors of a date such as 2024-13-01 pass as they are.
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{where}: the YAML is nested too deeply") from None
    finally:
        loader.dispose()
    if root is not None:
        _refuse_repeated_fields(root, where, set())
    return Document(where, content, root)


def first_problem(error: ValidationError, content: Any = None) -> str:
    """The first problem of a pydantic error as `field: message`."""
    return _told(error.errors(include_url=False)[0], content, set())


def _kind(content: object) -> str:
    return "nothing" if content is None else type(content).__name__


def _refuse_repeated_fields(node: yaml.Node, where: str, above: set[int]) -> None:
    """Refuse a key that stands in a mapping twice, of which YAML would silently keep the last."""
    if id(node) in above:
        raise InputError(f"{where}:{node.start_mark.line + 1}: the YAML contains itself")
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated_fields(child, where, above)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise InputError(f"{where}:{line}: the field {key.value!r} stands there twice")
                seen.add(key.value)
            _refuse_repeated_fields(value, where, above)


def _node_at(root: yaml.Node, location: Sequence[int | str]) -> yaml.Node:
    """The deepest node that exists on the way of `location`."""
    node = root
    for part in location:
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == part), node)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
    return node


def _steps(location: Sequence[int | str], content: Any) -> Iterator[int | str]:
    """The parts of a pydantic location that exist in the content; the names of a union's members do not."""
    for part in location:
        if content is None:
            yield part
        elif isinstance(content, Mapping):
            if part in content:
                content = content[part] if content[part] is not None else {}
                yield part
        elif isinstance(content, Sequence) and not isinstance(content, str) and isinstance(part, int):
            content = content[part]
            yield part


def _told(problem: ErrorDetails, content: Any, known: set[str]) -> str:
    field = ""
    parts = list(_steps(problem["loc"], content))
    if problem["type"] == "missing" and content is not None:
        parts.append(problem["loc"][-1])
    for part in parts:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
    message = _message(problem, known)
    return f"{field}: {message}" if field else message


def _message(problem: ErrorDetails, known: set[str]) -> str:
    found = f", found {problem['input']!r:.{_VALUE_LENGTH}}"
    match problem["type"]:
        case "extra_forbidden":
            message = "there is no such field" + suggestion(problem["loc"][-1], known)
        case "missing":
            message = "the field is missing"
        case "union_tag_invalid":
            message = f"there is no kind {problem['ctx']['tag']!r}; expected one of {problem['ctx']['expected_tags']}"
        case "union_tag_not_found":
            message = "the field kind is missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = "expected a mapping of fields" + found
        case "value_error":
            message = problem["msg"].removeprefix("Value error, ")
        case _:
            message = problem["msg"] + ("" if isinstance(problem["input"], (dict, list)) else found)
    return message


def _known_fields(model: type[BaseModel]) -> set[str]:
    """The names of the fields of a model and of the models in it."""
    schema = TypeAdapter(model).json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}
