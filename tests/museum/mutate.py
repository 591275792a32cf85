"""Small wrong changes of a module's source, enumerated from its syntax tree.

A mutant's id names its module, its function and what stands there before and after, so that it
survives edits of anything else: `xfv1.kernels.paged.device:_attend: n < hi -> n <= hi`, with `#2`
for the second of the same in one function.
"""

import ast
import copy
import fnmatch
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Characters of an id's each side; the whole is in what says how it differs.
SHOWN = 64

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
# By operator: which it is taken for, and which operands may be lost. Of a difference, the order.
LEFT, RIGHT = "left", "right"
REPLACED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
LOST: dict[type[ast.operator], tuple[str, ...]] = {
    ast.Add: (RIGHT,),
    ast.Mult: (LEFT, RIGHT),
    ast.FloorDiv: (RIGHT,),
    ast.Mod: (RIGHT,),
    ast.BitAnd: (LEFT, RIGHT),
    ast.BitOr: (LEFT, RIGHT),
}
# Names taken for each other, both ways.
CONFUSED = (
    ("key", "value"),
    ("key_cache", "value_cache"),
    ("k_scale", "v_scale"),
    ("_k_scale", "_v_scale"),
    ("key_ptr", "value_ptr"),
    ("k_offs", "v_offs"),
    ("first_pos", "last_pos"),
    ("lo", "hi"),
    ("full_lo", "full_hi"),
    ("begin", "end"),
    ("full_begin", "full_end"),
    ("start", "stop"),
    ("first", "last"),
    ("minimum", "maximum"),
    ("min", "max"),
    ("amin", "amax"),
    ("DECODE", "PREFILL"),
    ("starts", "prefill_starts"),
    ("bound", "prefill_bound"),
    ("max_query_len", "max_seq_len"),
    ("query_start_loc", "seq_lens"),
    ("num_heads", "num_kv_heads"),
    ("m", "l"),
    ("acc1", "acc2"),
)
OTHER = dict(CONFUSED) | {b: a for a, b in CONFUSED}
# Calls that can be lost, leaving their first argument, or what a method is called on.
UNWRAPPED = {"_finite", "abs", "sqrt", "tanh", "_tanh", "masked_fill", "log", "log2", "cdiv"}
# Keywords whose argument can be forgotten, where None means without.
OPTIONAL = {
    "sliding_window",
    "softcap",
    "alibi_slopes",
    "sinks",
    "k_scale",
    "v_scale",
    "seq_lens_cpu",
}
LOADS = {"load", "store"}
# What keys and values, lengths and starts have in common.
COMMON = {"device", "dtype", "shape"}


class MutantError(Exception):
    """An exclusion that excludes nothing, or an id that is no mutant's; the message names it."""


@dataclass(frozen=True)
class Without:
    """What is not changed. function, part: shell patterns, of the qualified name and of the source
    of anything that a change would be in: a statement, an expression, an argument."""

    module: str
    function: str
    reason: str
    part: str = "*"


@dataclass(frozen=True)
class Mutant:
    """One change. function: its qualified name. before, after: the source of the part changed.
    source: the whole module's."""

    id: str
    module: str
    function: str
    before: str
    after: str
    source: str = field(repr=False)


@dataclass(frozen=True)
class _Slot:
    """Where a node hangs in the tree. within: the nodes it is in, from its statement on."""

    parent: ast.AST
    name: str
    index: int | None
    within: tuple[ast.AST, ...] = ()

    def get(self) -> Any:
        held = getattr(self.parent, self.name)
        return held if self.index is None else held[self.index]

    def put(self, node: Any) -> None:
        if self.index is None:
            setattr(self.parent, self.name, node)
        else:
            getattr(self.parent, self.name)[self.index] = node


def source_of(module: str) -> Path:
    """The file of a module, which is not imported for that."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)


def mutants_of(
    module: str,
    without: Iterable[Without] = (),
    rendered: Callable[[str], bool] = lambda name: True,
) -> list[Mutant]:
    """Every mutant of a module, in the order of its source.

    Args:
        rendered: by id, whether its source is wanted; others have none.

    Raises:
        MutantError: for a `Without` of the module that matches nothing.
    """
    tree = ast.parse(source_of(module).read_text())
    kept_out = [each for each in without if each.module == module]
    used: set[Without] = set()
    found: list[Mutant] = []
    for function, node in _functions(tree):
        seen: set[tuple[int, str]] = set()
        counts: Counter[str] = Counter()
        for slot, replacement in _changes(node):
            before = slot.get()
            parts = [ast.unparse(part) for part in (*slot.within, before)]
            hit = [w for w in kept_out if _matches(w, function, parts)]
            used.update(hit)
            if hit:
                continue
            shown = _shown(slot)
            was = ast.unparse(shown)
            slot.put(replacement)
            # Two changes may come to the same, within one statement.
            whole = id((*slot.within, before)[0]), ast.unparse((*slot.within, replacement)[0])
            if whole[1] != parts[0] and whole not in seen:
                seen.add(whole)
                now = ast.unparse(replacement if shown is before else shown)
                name = f"{module}:{function}: {_short(was)} -> {_short(now)}"
                counts[name] += 1
                name += f" #{counts[name]}" if counts[name] > 1 else ""
                source = ast.unparse(tree) if rendered(name) else ""
                found.append(Mutant(name, module, function, was, now, source))
            slot.put(before)
    if unused := [w for w in kept_out if w not in used]:
        raise MutantError(f"excludes nothing: {unused[0]}")
    return found


def _matches(without: Without, function: str, texts: list[str]) -> bool:
    return fnmatch.fnmatchcase(function, without.function) and any(
        fnmatch.fnmatchcase(text, without.part) for text in texts
    )


def _shown(slot: _Slot) -> ast.AST:
    """What a change is shown as: a number or a name with what it is in, if that is short."""
    node: ast.AST = slot.get()
    around = slot.parent
    small = isinstance(node, ast.Constant | ast.Name | ast.Attribute | ast.Slice)
    if small and around in slot.within and len(ast.unparse(around)) <= SHOWN:
        return around
    return node


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods; reasons for a refusal are words, and no answer."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _changes(function: ast.FunctionDef) -> Iterator[tuple[_Slot, ast.AST]]:
    """Where, and what stands there instead."""
    if function.name.endswith("reasons"):
        return
    bound = {arg.arg for arg in (*function.args.args, *function.args.kwonlyargs)}
    known = bound | _targets(function) | {"minimum", "maximum", "min", "max", "DECODE", "PREFILL"}
    for slot in _statements(function):
        statement = slot.get()
        yield from ((slot, other) for other in _of_statement(statement, bound))
        if isinstance(statement, ast.For):
            bound |= _targets(statement.target)
        elif not getattr(statement, "body", None):
            bound |= _targets(statement)
        for inner in _expressions(statement):
            if getattr(inner.parent, "attr", "") in COMMON:
                continue
            for other in _of_expression(inner.get(), inner):
                if not isinstance(other, ast.Name) or other.id in known:
                    yield inner, other


def _statements(node: ast.AST) -> Iterator[_Slot]:
    """The statements of a function that do something, outermost first; no guard's: what a wrong
    argument is answered with has its own tests."""
    for name in ("body", "orelse"):
        for index, statement in enumerate(getattr(node, name, None) or []):
            quiet = isinstance(statement, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom)
            guard = isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Raise)
            if quiet or guard or _says(statement):
                continue
            yield _Slot(node, name, index)
            yield from _statements(statement)


def _says(statement: ast.stmt) -> bool:
    """A docstring, or a call that checks or logs."""
    if not isinstance(statement, ast.Expr):
        return False
    text = ast.unparse(statement)
    return isinstance(statement.value, ast.Constant) or any(
        text.startswith(start) for start in ("debug.", "compat.log_once", "super().__init__")
    )


def _expressions(statement: ast.stmt) -> Iterator[_Slot]:
    """The parts of a statement, not of those within it, outermost first."""

    def below(node: ast.AST, within: tuple[ast.AST, ...]) -> Iterator[_Slot]:
        for name, held in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment", "ctx"):
                continue
            inside = held if isinstance(held, list) else [held]
            for index, child in enumerate(inside):
                if isinstance(child, ast.expr | ast.comprehension | ast.keyword | ast.Slice):
                    yield _Slot(node, name, index if isinstance(held, list) else None, within)
                    yield from below(child, (*within, child))

    if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield from below(statement, (statement,))


def _targets(statement: ast.AST) -> set[str]:
    """Names that a statement gives a value to."""
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _of_statement(statement: ast.stmt, bound: set[str]) -> Iterator[ast.AST]:
    """A statement that is lost, where what follows still has all its names."""
    if isinstance(statement, ast.Assign | ast.AugAssign):
        stores = _targets(statement)
        if stores <= bound:
            yield ast.Pass()
    elif isinstance(statement, ast.Continue | ast.Expr) or (
        isinstance(statement, ast.Return) and statement.value is None
    ):
        yield ast.Pass()


def _of_expression(node: ast.AST, slot: _Slot) -> Iterator[ast.AST]:
    if isinstance(node, ast.expr) and _is_text(node):
        return
    if slot.name == "test" and isinstance(node, ast.expr):
        yield from _of_test(node)
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            ops = list(node.ops)
            ops[at] = COMPARED[type(operator)]()
            yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
        for at in range(len(node.values)):
            rest = node.values[:at] + node.values[at + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.BinOp):
        yield from _of_operation(node)
    elif isinstance(node, ast.UnaryOp):
        yield from _of_sign(node)
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node.value, slot)
    elif isinstance(node, ast.Slice):
        yield from _of_slice(node)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.keyword):
        if node.arg in OPTIONAL and not _is_none(node.value):
            yield ast.keyword(node.arg, ast.Constant(None))
        if isinstance(node.value, ast.Dict) and not node.value.keys:
            # In dataclasses.replace: what there was stays.
            yield ast.keyword(None, ast.Dict([], []))
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in OTHER:
        yield ast.Name(OTHER[node.id], ast.Load())
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in OTHER:
        yield ast.Attribute(node.value, OTHER[node.attr], ast.Load())


def _of_test(node: ast.expr) -> Iterator[ast.AST]:
    """A condition the other way round, where that is not its comparison's other way round."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif not isinstance(node, ast.Compare) or isinstance(
        node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE
    ):
        yield ast.UnaryOp(ast.Not(), node)


def _of_operation(node: ast.BinOp) -> Iterator[ast.AST]:
    kind = type(node.op)
    if kind in REPLACED:
        yield ast.BinOp(node.left, REPLACED[kind](), node.right)
    if kind is ast.Sub:
        yield ast.BinOp(node.right, node.op, node.left)
    lost = LOST.get(kind, ())
    if LEFT in lost:
        yield node.right
    if RIGHT in lost:
        yield node.left


def _of_sign(node: ast.UnaryOp) -> Iterator[ast.AST]:
    inner = node.operand
    if isinstance(node.op, ast.USub) and isinstance(inner, ast.BinOp):
        left = inner.left
        if isinstance(inner.op, ast.FloorDiv) and isinstance(left, ast.UnaryOp):
            # Rounded down and not up.
            yield ast.BinOp(left.operand, ast.FloorDiv(), inner.right)
            return
    if isinstance(node.op, ast.USub) and isinstance(inner, ast.Constant):
        yield ast.UnaryOp(ast.USub(), ast.Constant(inner.value + 1))  # type: ignore[operator]
        return
    if isinstance(node.op, ast.USub | ast.Invert):
        yield inner


def _of_constant(value: object, slot: _Slot) -> Iterator[ast.AST]:
    parent = slot.parent
    # The sign of a number is changed with it, and a sum's operators and terms are by themselves.
    other = isinstance(parent, ast.UnaryOp) or (
        isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add | ast.Sub)
    )
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int) and not other:
        yield ast.Constant({0: 1, 1: 0}.get(value, value + 1))
    elif isinstance(value, float):
        yield ast.Constant(value * 2 if value else 1.0)


def _of_slice(node: ast.Slice) -> Iterator[ast.AST]:
    if node.lower is not None and not isinstance(node.lower, ast.Constant):
        yield ast.Slice(None, node.upper, node.step)
        yield ast.Slice(_plus(node.lower, 1), node.upper, node.step)
    if node.upper is not None and not isinstance(node.upper, ast.Constant):
        yield ast.Slice(node.lower, None, node.step)
        yield ast.Slice(node.lower, _plus(node.upper, -1), node.step)


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name == "range" and len(node.args) >= 2:
        first, last, *step = node.args
        yield ast.Call(node.func, [first, _plus(last, -1), *step], [])
        yield ast.Call(node.func, [_plus(first, 1), last, *step], [])
    elif name == "where" and len(node.args) == 3:
        condition, one, other = node.args
        yield ast.Call(node.func, [condition, other, one], [])
        yield one
    elif name in UNWRAPPED:
        library = isinstance(node.func, ast.Name) or ast.unparse(node.func).startswith(
            ("tl.", "torch.")
        )
        yield node.args[0] if library else node.func.value  # type: ignore[attr-defined]
    elif name == "float" and node.args and ast.unparse(node.args[0]) == "'-inf'":
        yield ast.Constant(0.0)
    elif name in LOADS and ast.unparse(node.func).startswith("tl."):
        yield from _unmasked(node, 1 if name == "load" else 2)


def _unmasked(node: ast.Call, pointers: int) -> Iterator[ast.AST]:
    """A load or a store of all lanes: the mask is its first argument after the pointers."""
    keywords = [k for k in node.keywords if k.arg not in ("mask", "other")]
    if len(node.args) > pointers or len(keywords) < len(node.keywords):
        yield ast.Call(node.func, node.args[:pointers], keywords)


def _plus(node: ast.expr, by: int) -> ast.expr:
    operator = ast.Add() if by > 0 else ast.Sub()
    return ast.BinOp(copy.deepcopy(node), operator, ast.Constant(abs(by)))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.expr) -> bool:
    """A string, or a sum of strings."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | None)
    )
