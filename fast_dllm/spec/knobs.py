"""An experiment's knobs, read from its generation_functions.py without running it: that would need torch.

A knob is an annotated field of `class Options` with a default that stands for one value: a number, a word, True, False,
None, arithmetic on numbers (`1 / 2`), a constant of the file, or `field(default=...)` of these.
"""

from __future__ import annotations

import ast
import operator
from pathlib import Path

from fast_dllm.errors import UsageError, line_of

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def read_knobs(path: Path) -> dict[str, object] | None:
    """The knobs of the file's `class Options` with their defaults; None where there is no such file or class.

    Raises UsageError for a file that is not Python, and for a knob whose default only a run of the file could tell.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{_short(path)} cannot be read: {error}") from None
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UsageError(f"{_short(path)}, line {error.lineno}: this is not Python: {error.msg}") from None
    except ValueError as error:  # a null byte
        raise UsageError(f"{_short(path)} is not Python: {line_of(error)}") from None
    constants: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            return _knobs_of(node, constants, path)
        _note_constant(node, constants)
    return None


def _knobs_of(options: ast.ClassDef, constants: dict[str, object], path: Path) -> dict[str, object]:
    """constants: of the file, before the class; those of the class are added."""
    knobs: dict[str, object] = {}
    for node in options.body:
        if not isinstance(node, ast.AnnAssign) or _is_class_variable(node.annotation):
            _note_constant(node, constants)
            continue
        default = _default_of_field(node.value)
        if default is None or not isinstance(node.target, ast.Name):
            continue  # a field without a default: loading the experiment refuses it
        name = node.target.id
        try:
            knobs[name] = constants[name] = _value(default, constants)
        except (ValueError, ArithmeticError):
            raise UsageError(
                f"{_short(path)}, line {node.lineno}: the default of the knob {name} cannot be read without running "
                "the file; write a number, a word, True, False, None, or arithmetic on numbers and the file's constants"
            ) from None
    return knobs


def _default_of_field(value: ast.expr | None) -> ast.expr | None:
    """The expression of the default: `X` of `field(default=X)`, the value itself if it is no call of field()."""
    if not isinstance(value, ast.Call) or _last_name(value.func) != "field":
        return value
    arguments = {keyword.arg: keyword.value for keyword in value.keywords}
    return arguments.get("default", arguments.get("default_factory"))


def _is_class_variable(annotation: ast.expr) -> bool:
    if isinstance(annotation, ast.Constant):  # the annotation is a string
        return "ClassVar" in str(annotation.value)
    return any(_last_name(node) == "ClassVar" for node in ast.walk(annotation))


def _last_name(node: ast.AST) -> str | None:
    """`field` of `field` and of `dataclasses.field`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _note_constant(node: ast.stmt, constants: dict[str, object]) -> None:
    """Add what `NAME = value` says; forget a name that gets a value that cannot be read."""
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        targets, value = [node.target], node.value
    else:
        return
    for target in targets:
        if isinstance(target, ast.Name):
            constants.pop(target.id, None)
            try:
                constants[target.id] = _value(value, constants)
            except (ValueError, ArithmeticError):
                continue


def _value(node: ast.expr, constants: dict[str, object]) -> object:
    """The single value of an expression. Raises ValueError for any other expression, ArithmeticError as 1 / 0 does."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _number(node.operand, constants)
        return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_number(node.left, constants), _number(node.right, constants))
    raise ValueError("not a constant expression")


def _number(node: ast.expr, constants: dict[str, object]) -> float:
    value = _value(node, constants)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("arithmetic is for numbers")
    return value


def _short(path: Path) -> str:
    return "/".join(Path(path).parts[-3:])
