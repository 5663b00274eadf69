"""The environment of chat templates: that of `transformers`, with bounds in time and size.

A thread cannot be stopped from outside, so each round of a loop, each call and each filter checks
the time. Operations whose result may be large estimate its size first.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import thread_time
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Bound of a template's output and of each value on the way to it: several of the largest bodies.
MAX_CHARS = 1 << 25
#: A number that a template passes to a filter or a method may be a width.
_MAX_WIDTH = 1 << 20
_MAX_BITS = 4096
#: A value in a list or object counts as this many more characters than its own.
_VALUE_CHARS = 64
_STEPS_A_LOOK = 32
_MAX_SIZES: Mapping[type, int] = {
    str: MAX_CHARS,
    list: MAX_CHARS // _VALUE_CHARS,
    tuple: MAX_CHARS // _VALUE_CHARS,
}
#: Filters and methods of texts whose result may be much longer than their arguments.
_GROWING = {"join", "replace", "format", "format_map", "translate", "indent", "wordwrap", "urlize"}
#: Filters that write their arguments.
_WRITING = {"tojson", "string", "pprint", "xmlattr", "urlencode", "join", "sum", "e", "escape"}
_WIDE = re.compile(r"[%:][^a-zA-Z%{}]*\d{6}|%[^a-zA-Z%]*\*")


class LimitError(ValueError):
    """A template that takes too long (`is_slow`), or would write too much."""

    def __init__(self, message: str, *, is_slow: bool = False) -> None:
        super().__init__(message)
        self.is_slow = is_slow


class _Clock(threading.local):
    """Processor time that a thread's render has taken, without other threads."""

    ends_at_s = float("inf")
    num_steps = 0

    def step(self) -> None:
        self.num_steps += 1
        if self.num_steps % _STEPS_A_LOOK == 0 and thread_time() > self.ends_at_s:
            raise LimitError("the chat template takes too long", is_slow=True)


class _Generator(CodeGenerator):
    """Compiles loops and concatenations to calls of the environment."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - the node's name
        rounds = nodes.EnvironmentAttribute("rounds")
        node.iter = nodes.Call(rounds, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Call(  # noqa: N802 - likewise
        self,
        node: nodes.Call,
        frame: Frame,
        forward_caller: bool = False,  # noqa: FBT001, FBT002 - the base class' own
    ) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self._visit_all("rounds", node.args, frame)
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:  # noqa: N802 - likewise
        self._visit_all("plus", [node.left, node.right], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - likewise
        self._visit_all("joined", node.nodes, frame)

    def _visit_all(self, method: str, parts: Iterable[nodes.Expr], frame: Frame) -> None:
        """Write a call of the environment's `method` with `parts`."""
        self.write(f"environment.{method}(")
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Raises `LimitError` from within a render."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - the base class' own
        super().__init__(**options, finalize=_weighed)
        self._clock = _Clock()
        self.globals.pop("lipsum")

    def guard_filters(self) -> None:
        """Bound the filters that are registered now."""
        for name, apply in self.filters.items():
            self.filters[name] = self._guarded(name, apply)

    @contextmanager
    def limited(self, limit_s: float) -> Iterator[None]:
        """Limit the processor time of this thread's render."""
        self._clock.ends_at_s = thread_time() + limit_s
        try:
            yield
        finally:
            self._clock.ends_at_s = float("inf")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - it calls anything
        """Call `obj` for a template."""
        self._clock.step()
        receiver = getattr(obj, "__self__", None)
        if isinstance(receiver, str | int):
            _require_small(obj.__name__, receiver, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: ANN401 - of a template
        """Return a bounded `format` if `value` is the `format` of a text."""
        fill = super().wrap_str_format(value)
        if fill is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:  # noqa: ANN401 - any value
            _require_small("format", value.__self__, (*args, *kwargs.values()))
            return fill(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401 - operands of any kind
        """Return `left operator right`, if it is not too large."""
        if operator == "%" and isinstance(left, str):
            _require_small("format", left, right if isinstance(right, tuple) else (right,))
        elif operator in {"*", "**"}:
            _require_small_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def rounds(self, values: Any) -> Iterator[object]:  # noqa: ANN401 - of a template
        """Yield the values of a loop."""
        for value in values:
            self._clock.step()
            yield value

    def plus(self, left: Any, right: Any) -> Any:  # noqa: ANN401 - likewise
        """Return the sum; neither operand is too large, so the size can be checked afterwards."""
        total = left + right
        most = _MAX_SIZES.get(type(total))
        if most is not None and len(total) > most:
            raise _too_much()
        return total

    def joined(self, *parts: object) -> str:
        """Return the operands of `~` as one text."""
        return self.concat(str(_weighed(part)) for part in parts)

    def concat(self, parts: Iterable[str]) -> str:
        """Return the parts of an output, a macro or a block as one text."""
        num_chars, kept = 0, []
        for part in parts:
            num_chars += len(part)
            if num_chars > MAX_CHARS:
                raise _too_much()
            kept.append(part)
        return "".join(kept)

    def _guarded(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(apply, "jinja_pass_arg") else 0

        @functools.wraps(apply)
        def guarded(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any filter
            self._clock.step()
            before, value, rest = args[:first], args[first], args[first + 1 :]
            if name in _WRITING and isinstance(value, Iterator):
                value = list(value)
            if name in _WRITING:
                _weighed(value)
            _require_small(name, value, (*rest, *kwargs.values()))
            return apply(*before, value, *rest, **kwargs)

        return guarded


def _require_small(name: str, value: Any, args: tuple[Any, ...]) -> None:  # noqa: ANN401 - of a template
    """Raise `LimitError` if a filter or method `name` of `value` might write too much."""
    if any(isinstance(arg, int) and abs(arg) > _MAX_WIDTH for arg in args):
        raise LimitError("the chat template passes a number that is too large")
    if name not in _GROWING:
        return
    if isinstance(value, str) and name.startswith("format") and _WIDE.search(value):
        raise LimitError("the chat template writes a field that is too wide")
    weights = [_weight(arg) for arg in args]
    if name == "replace" and isinstance(value, str) and len(args) >= 2:
        num_chars = len(value) + value.count(str(args[0])) * weights[1]
    elif isinstance(value, str):
        num_chars = (len(value) + 1) * (1 + sum(weights) // (_VALUE_CHARS if name == "join" else 1))
    else:
        num_chars = _weight(value) + (1 + sum(weights)) * (
            len(value) if hasattr(value, "__len__") else 1
        )
    if num_chars > MAX_CHARS:
        raise _too_much()


def _require_small_product(operator: str, left: Any, right: Any) -> None:  # noqa: ANN401 - of a template
    if isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * right
            if operator == "**"
            else left.bit_length() + right.bit_length()
        )
        if bits > _MAX_BITS:
            raise LimitError("the chat template computes a number that is too large")
    for times, value in ((left, right), (right, left)):
        is_repeated = isinstance(times, int) and isinstance(value, str | list | tuple)
        if is_repeated and times * _weight(value) > MAX_CHARS:
            raise _too_much()


def _weighed(value: Any) -> Any:  # noqa: ANN401 - any value of a template
    """Return `value`, if it is not too large to be written."""
    if isinstance(value, list | tuple | dict):
        _weight(value)
    return value


def _weight(value: object) -> int:
    """Return about how many characters it takes to write `value`. Raises `LimitError`."""
    weight, left = 0, [value]
    while left:
        one = left.pop()
        weight += len(one) if isinstance(one, str) else _VALUE_CHARS
        if isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            left += one
        if weight > MAX_CHARS:
            raise _too_much()
    return weight


def _too_much() -> LimitError:
    return LimitError(f"the chat template writes more than {MAX_CHARS} characters")
