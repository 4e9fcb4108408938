"""Bugs: one small edit of a function's syntax tree, and what a function gives for arguments. Pure.

Only functions of :mod:`actor.tasks.programs` and their mutants run here, never what a policy wrote:
a counter in every loop and call ends those that a bug makes endless.
"""

import ast
import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

TICKS = 3000  # turns of loops and calls for one call of a function; the correct ones need a tenth
NO_RESULT = "has no result within its time"

Edit = tuple[str, Callable[[], None]]  # what it does, and doing it

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,),
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Add,), ast.FloorDiv: (ast.Mod,), ast.Mod: (ast.FloorDiv,),
}  # fmt: skip


def mutants(source: str) -> list[tuple[str, str]]:
    """(kind of bug, source) for every single edit of ``source``."""
    tree = ast.parse(source)
    return [_changed(tree, place) for place in _places(tree)]


def mutant(source: str, rng: Random) -> str:
    """One of them."""
    tree = ast.parse(source)
    return _changed(tree, rng.choice(_places(tree)))[1]


def _places(tree: ast.Module) -> list[tuple[int, int]]:
    """(node, edit of it), by number."""
    return [(node, edit) for node, one in enumerate(ast.walk(tree)) for edit in range(len(_edits(one)))]


def _changed(tree: ast.Module, place: tuple[int, int]) -> tuple[str, str]:
    changed = copy.deepcopy(tree)
    kind, edit = _edits(list(ast.walk(changed))[place[0]])[place[1]]
    edit()
    return kind, ast.unparse(ast.fix_missing_locations(changed)) + "\n"


def _edits(node: ast.AST) -> list[Edit]:
    """Everything that can be done to one node, in place."""
    edits: list[Edit] = []
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            edits += [("comparison", _setter(node.ops, i, new())) for new in _COMPARISONS.get(type(op), ())]
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        edits += [("operator", _changer(node, "op", new())) for new in _OPERATORS.get(type(node.op), ())]
    elif isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        edits.append(("operator", _changer(node, "op", other)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        edits.append(("constant", _changer(node, "value", not node.value)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        edits += [("constant", _changer(node, "value", node.value + step)) for step in (1, -1)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        edits += [("off by one", _setter(node.args, -1, _plus(node.args[-1], step))) for step in (1, -1)]
    elif isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice | ast.Constant):
        edits.append(("off by one", _changer(node, "slice", _plus(node.slice, -1))))
    if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare):
        edits.append(("condition", _changer(node, "test", ast.UnaryOp(ast.Not(), node.test))))
    for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
        for i, statement in enumerate(body if isinstance(body, list) else []):
            assert isinstance(body, list)
            if isinstance(statement, ast.Return) and statement.value is not None:
                edits.append(("dropped return", _setter(body, i, ast.Expr(statement.value))))
            elif isinstance(statement, ast.AugAssign | ast.Break):
                edits.append(("dropped statement", _setter(body, i, ast.Pass())))
    return edits


def _setter(items: list[Any], at: int, value: Any) -> Callable[[], None]:
    return lambda: items.__setitem__(at, value)


def _changer(node: ast.AST, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def _plus(node: ast.expr, step: int) -> ast.expr:
    return ast.BinOp(node, ast.Add() if step > 0 else ast.Sub(), ast.Constant(abs(step)))


class _Endless(Exception):
    pass


class _Counting(ast.NodeTransformer):
    """A call of ``_tick`` at the start of each function and of each turn of a loop."""

    def _count(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(ast.Call(ast.Name("_tick", ast.Load()), [], [])))
        return node

    visit_FunctionDef = visit_While = visit_For = _count


def outcomes(source: str, name: str, cases: Sequence[list[Any]]) -> list[str]:
    """What ``name`` gives for each of ``cases``: its result as JSON, or words that are none: what it does."""
    left = 0

    def tick() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Endless

    tree = ast.fix_missing_locations(_Counting().visit(ast.parse(source)))
    space: dict[str, Any] = {"_tick": tick}
    exec(compile(tree, name, "exec"), space)
    given = []
    for case in cases:
        left = TICKS
        try:
            given.append(as_json(space[name](*copy.deepcopy(case))))
        except _Endless:
            given.append(NO_RESULT)
        except Exception as error:  # noqa: BLE001  # a bug raises what it likes
            given.append(f"raises {type(error).__name__}: {error}")
    return given


def as_json(value: Any) -> str:
    """In one spelling, so that 1, 1.0 and True differ. Raises TypeError or ValueError for what JSON does not have."""
    return json.dumps(value, sort_keys=True, allow_nan=False)
