"""A program: the definitions of a text and of the files it uses, ready to be bound and compiled."""

from __future__ import annotations

import functools
import gc
import inspect
import math
import re
import reprlib
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attndsl import expr as ir
from attndsl import syntax
from attndsl.attention import Attention
from attndsl.bound import Bound, Parameters, Unbound
from attndsl.errors import AttnError, Diagnostic, Source, Span, brief, fail, suggest
from attndsl.keywords import by_name, missing
from attndsl.language.arguments import bind_arguments, name_span, signature
from attndsl.language.assertions import Assertion, prove, typed
from attndsl.language.elaborate import STEP_LIMIT, Elaborator, inputs_of
from attndsl.language.mistakes import out_of_place
from attndsl.language.values import (
    TOKENS,
    K,
    Num,
    Pattern,
    Q,
    Scope,
    SetOf,
    Space,
    Value,
    Vec,
    attention_named,
)
from attndsl.language.vocabulary import BUILT_IN, RESERVED
from attndsl.pictures import notebook
from attndsl.selection import Selection
from attndsl.shipped import elsewhere, located, nearby
from attndsl.stacks.reading import masks, read
from attndsl.stacks.reading import warnings as stacked
from attndsl.stacks.tree import Stack
from attndsl.syntax import nodes as ast
from attndsl.syntax.format import render

if TYPE_CHECKING:
    from attndsl.relations.proofs import Verdict

Definition = ast.Definition | ast.AttentionDef
Named = Definition | ast.StackDef
FILE_LIMIT = 64
BOUND_AFTER = 'parameters are bound after: `attndsl.parse(text)["NAME"](w=8)`'
LISTED, PICTURED = 20, 8
"""Names and masks that are shown of a program."""
DEFINITION_LIMIT = 20_000


IN_SIGHT = {"pattern": ("q", "k"), "score": ("s", "q", "k", "Q", "K")}
MASK_MOD = (["q_idx", "kv_idx"], ["q_idx", "k_idx"])
"""How the parameters of a function of positions end elsewhere."""
HEADS_OF = {
    "pattern": "write `pattern {} = {{ q, k : ... }}`",
    "score": "leave it out: a score sees it as it is",
}
"""What is written in place of parameters that are in sight anyway."""


@functools.cache
def prelude() -> Mapping[str, Definition]:
    """The definitions that every program starts with, in the language itself; each is parsed on first use."""
    text = files("attndsl.grammar").joinpath("prelude.attn").read_text(encoding="utf-8")
    return syntax.Definitions(Source("prelude.attn", text))


@by_name
def parse(text: str, name: str = "<text>") -> Program:
    """The program of a text; `name` stands for it in messages. Raises AttnError with everything that is wrong
    in it."""
    if not isinstance(text, str):
        raise fail(f"a program is a text, not {type(text).__name__}", help="a file is read by attndsl.load")
    if not isinstance(name, str):
        raise fail(f"`name` is a text, not {type(name).__name__}", help=BOUND_AFTER)
    if re.fullmatch(r"\S+\.attn|example:\S+", text):
        raise fail(f"`{text}` is the name of a file, and no text", help="it is read by attndsl.load")
    return _program(Source(name, text), None)


def load(path: str | Path) -> Program:
    """The program of the file at `path` and of the files that it uses, which lie in its folder or below, or
    in a library. `load("example:longformer")` is an example that comes with attndsl. Raises AttnError for a
    file that cannot be read, and with everything that is wrong in it."""
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise fail(f"a path is expected, not {path!r}")
    place = located(path) if isinstance(path, str) else path
    return _program(_read(place, str(path), None), place.resolve())


@dataclass(frozen=True)
class Shelf:
    """The files that a `use` without a library's name may read: those in `root` and below it.

    library: "" for the folder of the first file.
    """

    library: str
    root: Path


def _read(path: Path, shown: str, span: Span | None) -> Source:
    try:
        return Source(shown, path.read_text(encoding="utf-8"))
    except OSError as error:
        help = elsewhere(shown) if span is None else nearby(shown, path.parent)
        raise fail(f"cannot read `{shown}`: {(error.strerror or str(error)).lower()}", span, help) from None
    except UnicodeDecodeError:
        raise fail(f"`{shown}` is not UTF-8 text", span) from None


@contextmanager
def _keeping() -> Iterator[None]:
    """All that is made here stays: the collector would go through it again and again, a quarter of the time
    that a program of 10,000 parts takes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_keeping()
def _program(source: Source, path: Path | None) -> Program:
    problems: list[Diagnostic] = []
    shelf = Shelf("", path.parent) if path else None
    unread: set[str] = set()
    items = list(_items(source, shelf, (path,) if path else (), set(), problems, unread))
    named: dict[str, Named] = {}
    assertions: list[ast.Assert] = []
    for item in items:
        if isinstance(item, ast.Assert):
            assertions.append(item)
        elif isinstance(item, Named):
            problems += _declare(item, named)
    definitions = {name: item for name, item in named.items() if not isinstance(item, ast.StackDef)}
    stacks = {name: item for name, item in named.items() if isinstance(item, ast.StackDef)}
    if len(named) > DEFINITION_LIMIT:
        raise fail(f"more than {DEFINITION_LIMIT:,} definitions in a program")
    program = Program(source.name, definitions, stacks)
    program.elaborator.broken |= unread
    program.elaborator.whole = "use" not in unread and not any(isinstance(item, ast.Use) for item in items)
    problems += program._check_definitions()
    for assertion in assertions:
        try:
            program.assertions.append(typed(assertion.expr, program.elaborator))
        except AttnError as error:
            problems += error.diagnostics
    if problems:
        raise AttnError(*_in_order(problems))
    return program


def _in_order(problems: list[Diagnostic]) -> list[Diagnostic]:
    """By place, each once."""
    unique = {(d.message, d.span): d for d in problems}
    return sorted(unique.values(), key=lambda d: (d.span.source.name, d.span.start) if d.span else ("", 0))


def _items(
    source: Source,
    shelf: Shelf | None,
    chain: tuple[Path, ...],
    seen: set[Path],
    problems: list[Diagnostic],
    unread: set[str],
) -> Iterator[ast.Item]:
    """The definitions and assertions of a text and of the files that it uses, and the `use` of those that
    cannot be read; chain: the files that lead to it, itself last."""
    module, found = syntax.parse_partial(source)
    unread.update(module.unread)
    problems += found
    for item in module.items:
        if not isinstance(item, ast.Use):
            yield item
            continue
        try:
            path, shown, place = _used(item, chain[-1].parent if chain else None, shelf)
            if path in chain:
                raise fail(f"`{item.path}` uses itself in the end", item.span)
            if path in seen:
                continue
            if len(seen) >= FILE_LIMIT:
                raise fail(f"a program uses more than {FILE_LIMIT} files", item.span)
            seen.add(path)
            used = _read(path, shown, item.span)
        except AttnError as error:
            problems += error.diagnostics
            yield item
            continue
        yield from _items(used, place, (*chain, path), seen, problems, unread)


def _used(item: ast.Use, folder: Path | None, shelf: Shelf | None) -> tuple[Path, str, Shelf]:
    """The file that is meant, links followed, its name in messages, and the shelf that it stands on."""
    library, colon, inside = item.path.rpartition(":")
    if colon:
        shelf = _library(library, item.span)
        folder = shelf.root
    if folder is None or shelf is None:
        raise fail("a text without a file cannot use another", item.span, "load it from a file")
    path = (folder / inside).resolve()
    if Path(inside).is_absolute() or not path.is_relative_to(shelf.root):
        where = "the folder of the first file or below it" if not shelf.library else f"`{shelf.library}`"
        raise fail(f"`use` reaches files in {where} alone", item.span)
    if not shelf.library:
        return path, inside, shelf
    name = path.relative_to(shelf.root).as_posix() if inside else ""
    if not path.is_file():
        held = sorted(file.relative_to(shelf.root).as_posix() for file in shelf.root.rglob("*.attn"))
        help = suggest(name, held) or f"it has {', '.join(held) or 'none'}"
        has = f"has no file `{name}`" if name else "is named, and none of its files"
        raise fail(f"the library `{shelf.library}` {has}", item.span, help)
    return path, f"{shelf.library}:{name}", shelf


def _library(name: str, span: Span) -> Shelf:
    from attndsl.execution import registry

    try:
        installed = registry.names("libraries")
        if name in installed:
            return Shelf(name, registry.plugin("libraries", name).resolve())
    except AttnError as error:
        (told,) = error.diagnostics
        raise fail(told.message, span, told.help) from None
    known = suggest(name, installed) or f"there are {', '.join(sorted(installed)) or 'none'}"
    raise fail(f"no library `{name}` is installed", span, known)


def _declare(item: Named, definitions: dict[str, Named]) -> list[Diagnostic]:
    problems = []
    name, earlier = item.name, definitions.get(item.name)
    if earlier is not None:
        line, _ = earlier.name_span.source.position(earlier.name_span.start)
        where = f"{earlier.name_span.source.name}:{line}"
        problems.append(
            Diagnostic(f"`{name}` is defined twice", item.name_span, f"the first definition is at {where}")
        )
    if name in RESERVED or name in BUILT_IN:
        what = "reserved" if name in RESERVED else "built in"
        problems.append(Diagnostic(f"`{name}` is {what}", item.name_span, "choose another name"))
    seen: set[str] = set()
    for param in item.params:
        if param.name in seen:
            problems.append(Diagnostic(f"the parameter `{param.name}` is given twice", name_span(param)))
        # `slope(h)` hands the head on, and the number of sinks is `s`: where no score reads the logit
        score = isinstance(item, ast.Definition) and item.word == "score"
        allowed = {"h"} if score else {"h", "s"}
        if param.name in RESERVED - allowed or param.name in BUILT_IN:
            what = "reserved" if param.name in RESERVED else "built in"
            help = "choose another name"
            if isinstance(item, ast.Definition) and param.name in IN_SIGHT.get(item.word, ()):
                help = HEADS_OF[item.word].format(item.name)
            problems.append(Diagnostic(f"`{param.name}` is {what}", name_span(param), help))
        seen.add(param.name)
    names = [param.name for param in item.params]
    if isinstance(item, ast.Definition) and names == ["q", "k"]:
        problems.pop()
    if isinstance(item, ast.Definition) and names[-2:] in MASK_MOD:
        here = item.params[0].span.to(item.params[-1].span)
        help = (
            f"write `{item.word} {item.name} = {{ {', '.join(names[-2:])} : ... }}`, which reads `h` as well"
        )
        problems.append(Diagnostic("positions are no parameters", here, help))
    definitions.setdefault(name, item)
    return problems


@functools.cache
def _selection(name: str) -> Selection | None:
    from attndsl.execution import registry

    return registry.plugin("selections", name) if name in _selections() else None


def _selections() -> tuple[str, ...]:
    from attndsl.execution import registry

    return registry.names("selections")


class Program:
    """Definitions by name. `program["longformer"]` is a Bound with the defaults bound.

    assertions  its `assert`s, typed, for `prove`
    stacks      those of its definitions that are layers of attentions
    """

    def __init__(
        self, name: str, definitions: Mapping[str, Definition], stacks: Mapping[str, ast.StackDef]
    ) -> None:
        self.name, self.own, self.stacks = name, definitions, stacks
        self.assertions: list[Assertion] = []
        both: ChainMap[str, Definition] = ChainMap(definitions, prelude())  # type: ignore[arg-type]  # read only
        self.elaborator = Elaborator(both, _selection, _selections)
        self.elaborator.layers_of, self.elaborator.stacks = self._layers_of, stacks.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.stacks

    def __len__(self) -> int:
        return len(self.names)

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            if name in vars(self).get("own", ()):
                raise AttributeError(f'a program has no attribute `{name}`: write `program["{name}"]`')
            raise missing("a program", name, dir(Program))

    def __repr__(self) -> str:
        named = [*self.names, *(f"stack {name}" for name in self.stacks)]
        listed = [*named[:LISTED], *["..."] * (len(named) > LISTED)]
        return f"<program {self.name}: {', '.join(listed) or 'no attention or pattern'}>"

    def _repr_html_(self) -> str:
        bound = [self[name] for name in self.names[:PICTURED]]
        parts = [notebook.text(repr(b)) if isinstance(b, Unbound) else b.pictured() for b in bound]
        more = len(self.names) - PICTURED
        return notebook.shown([*parts, *[notebook.text(f"and {more:,} more")] * (more > 0)])

    def _ipython_key_completions_(self) -> list[str]:
        return [*self.names]

    @property
    def names(self) -> tuple[str, ...]:
        """Its own attentions and patterns, in the order of the text."""
        return tuple(name for name, item in self.own.items() if _compilable(item))

    @property
    def attentions(self) -> tuple[str, ...]:
        """Its own attentions alone."""
        return tuple(name for name, item in self.own.items() if isinstance(item, ast.AttentionDef))

    def __getitem__(self, name: str) -> Bound:
        """An attention or pattern, of this program or of the prelude, with its defaults bound; or a Stack.

        One without a default is an Unbound: call it with its parameters. Raises AttnError for an unknown
        `name`, and for that of a score, a number or a function.
        """
        item: Named | None = self.stacks.get(name) or self.elaborator.definitions.get(name)
        if item is None:
            known = suggest(str(name), [*self.own, *self.stacks])
            there = [*self.names, *self.stacks]
            known = known or f"it defines {', '.join(f'`{own}`' for own in there) or 'nothing'}"
            raise fail(f"`{self.name}` defines no `{name}`", help=known)
        if not _compilable(item):
            raise fail(f"`{name}` is a {item.word}, neither an attention nor a pattern", item.name_span)  # type: ignore[union-attr]
        if any(param.default is None for param in item.params):
            unbound = Unbound(item.name, signature(item), lambda *a, **kw: self._bind(item, a, kw))
            return cast(Bound, unbound)
        return self._bind(item, (), {})

    if not TYPE_CHECKING:  # a type checker is to tell that it is none

        def __call__(self, *names, **params):
            """A program is no function: raises AttnError with how `names` are read; `params` come after."""
            name = names[0] if names and isinstance(names[0], str) else "NAME"
            raise fail("a program is no function", help=f'write `program["{name}"]`')

    def default(self) -> str:
        """The name meant where none is given: the only attention, or the one named like the file."""
        stem = Path(self.name).stem.rpartition(":")[2]
        for names in (self.attentions, self.names):
            if len(names) == 1:
                return names[0]
            if stem in names:
                return stem
        listed = ", ".join(self.names) or "nothing that can be compiled"
        help = f"give the name of one: `{self.name}:{self.names[0]}`" if self.names else ""
        raise fail(f"`{self.name}` defines {listed}", help=help)

    def _bind(self, item: Named, args: tuple[Any, ...], params: Mapping[str, Any]) -> Bound:
        """An attention, or a pattern as an attention of its own, with parameters from Python."""
        names = [param.name for param in item.params]
        if len(args) > len(names):
            takes = f"{len(names)} parameter{'s' * (len(names) > 1)}, not {len(args)}" if names else "none"
            raise fail(f"`{item.name}` takes {takes}", help=f"write `{signature(item)}`")
        given = dict(zip(names, args, strict=False))
        for name in params:
            if name in given:
                raise fail(f"`{name}` is given twice")
            if name not in names:
                help = suggest(name, names) or f"write `{signature(item)}`"
                if not isinstance(item, ast.StackDef) and name in inputs_of(item):
                    given_by = f"`plan(q, k, v, {name}=...)`, on the command line `--input {name}=FILE.npy`"
                    help = f"it is a table: {given_by}"
                raise fail(f"`{item.name}` has no parameter `{name}`", help=help)
        given |= params
        self.elaborator.steps = 0
        texts = {
            name: syntax.parse_expression(Source(f"<{name}>", value))
            for name, value in given.items()
            if isinstance(value, str)
        }
        values = {name: self._argument(name, texts.get(name, value)) for name, value in given.items()}
        defaults = {param.name: param.default for param in item.params if param.default is not None}
        written = {name: _shown(given[name]) if name in given else render(defaults[name]) for name in names}
        if isinstance(item, ast.StackDef):
            stages = read(self.elaborator, item, self._scope(item, values))

            def again(*args: Any, **params: Any) -> Stack:
                kept = {name: value for name, value in given.items() if name not in names[: len(args)]}
                return cast(Stack, self._bind(item, args, kept | params))

            return cast(Bound, Stack(item.name, stages, item.span, written, again))
        value = self.elaborator.instance(item, values, Scope({}), item.name_span, given=texts)
        attention = replace(attention_named(item.name, value), written=item.span, parameters=tuple(names))
        self._tell_empty(attention, values)

        def rebind(*args: Any, **params: Any) -> Bound:
            kept = {name: value for name, value in given.items() if name not in names[: len(args)]}
            return self._bind(item, args, kept | params)

        return Bound(attention, Parameters(written), rebind)

    def _scope(self, item: ast.StackDef, values: Mapping[str, Value]) -> Scope:
        """The parameters of a stack, those that are not given by their defaults."""
        scope = Scope({}, integral=False, calls=(item.name,))
        for param in item.params:
            at = replace(scope, binding=param.name)
            value = values.get(param.name)
            if value is None and param.default is not None:
                value = self.elaborator.value(param.default, at, TOKENS)
            scope = scope.bind(**{param.name: value or Num(ir.ZERO)})
        return scope

    def _layers_of(self, e: ast.Call) -> tuple[ir.Expr, ...] | None:
        of = e.args[0].value if e.args else e
        called = of if isinstance(of, ast.Call) else ast.Call(of, (), span=of.span)
        item = self.stacks.get(called.func.id) if isinstance(called.func, ast.Name) else None
        if item is None:
            return None
        if len(e.args) > 1:
            raise fail("a stack says itself how many layers it has", e.args[1].span)
        env = Scope({}, integral=False)
        given = bind_arguments(item, called.args)
        values = {name: self.elaborator.value(value, env, TOKENS) for name, value in given.items()}
        return masks(read(self.elaborator, item, self._scope(item, values)))

    def _tell_empty(self, attention: Attention, values: Mapping[str, Value]) -> None:
        """Warns of numbers with which nothing is related, on the line that binds them."""
        numbers = {name: ir.number(value.expr) for name, value in values.items() if isinstance(value, Num)}
        told = ", ".join(f"{name} = {value}" for name, value in numbers.items() if value is not None)
        if not told:
            return
        from attndsl.language.idle import relates_nothing

        if relates_nothing(attention):
            said = f"`{attention.name}({told})` relates no pair at any length: its output is 0"
            warnings.warn(said, stacklevel=5)

    def _argument(self, name: str, value: Any) -> Value:
        """A Python number, a list or range of integers, a text of the language as it was parsed, or a number
        left open."""
        if isinstance(value, ir.Expr):
            return Num(value)
        if isinstance(value, ast.Expression):
            return self.elaborator.value(value, Scope({}, integral=False, binding=name), TOKENS)
        if getattr(value, "is_meta", False):
            raise fail(f"`{name}` is a tensor without data, on the device meta")
        if isinstance(value, Bound | Unbound):
            raise fail(f"`{name}` is given as a text of the language", help=f'write `{name}="{value.name}"`')
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, range | list | tuple | set):
            return _listed(name, value, self.elaborator)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fail(f"`{name}` is a number, a list of numbers or a text, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise fail(f"`{name}` is {value}, and must be a finite number")
        return Num(ir.const(value))

    def _check_definitions(self) -> list[Diagnostic]:
        """Everything wrong in the program's own definitions, each definition tried on its own."""
        problems: list[Diagnostic] = []
        for name, item in self.own.items():
            # one that was read in part is looked at itself, and stays silent at its uses
            partly = name in self.elaborator.broken
            self.elaborator.broken.discard(name)
            try:
                self._check(item)
            except AttnError as error:
                problems += error.diagnostics
                partly = True
            if partly:
                self.elaborator.broken.add(name)
            if self.elaborator.steps > STEP_LIMIT:
                break
        for stack in self.stacks.values():
            if stack.name in self.elaborator.broken or any(param.default is None for param in stack.params):
                continue
            try:
                read(self.elaborator, stack, self._scope(stack, {}))
            except AttnError as error:
                problems += error.diagnostics
        return problems

    def check(self) -> tuple[tuple[Assertion, Verdict], ...]:
        """Each assertion with its verdict, all of them proved now."""
        return tuple([(assertion, prove(assertion)) for assertion in self.assertions])

    @functools.cached_property
    def warnings(self) -> list[Diagnostic]:
        """What is legal and probably not meant, in the order of the text. Which selections look ahead is not
        in it: `attndsl check` asks them."""
        from attndsl.language import lint

        whole = (s for s in self.stacks.values() if all(param.default is not None for param in s.params))
        stages = [(stack, read(self.elaborator, stack, self._scope(stack, {}))) for stack in whole]
        found = lint.warnings(list(self.own.values()), self.elaborator)
        return _in_order([*found, *(told for stack in stages for told in stacked(*stack))])

    def _check(self, item: Definition) -> None:
        """All its names, and where it needs no parameters its types as well."""
        problems = _name_problems(item, self.elaborator)
        if all(param.default is not None for param in item.params):
            try:
                self._check_types(item)
            except AttnError as error:
                told = {d.message for d in error.diagnostics}
                raise AttnError(*(d for d in problems if d.message not in told), *error.diagnostics) from None
        if problems:
            raise AttnError(*problems)

    def _check_types(self, item: Definition) -> None:
        integral = isinstance(item, ast.Definition) and item.word == "pattern"
        extra: dict[str, Value] = {}
        if isinstance(item, ast.Definition) and item.word == "score":
            extra |= {"s": Num(ir.var("s")), "q": Num(Q), "k": Num(K)}
            extra |= {name: Vec(ir.var(name)) for name in ("Q", "K")}
        value = self.elaborator.instance(item, {}, Scope({}, integral), item.name_span, extra)
        if isinstance(value, Pattern):
            value.at(Q, K, TOKENS)


def _shown(value: Any) -> str:
    """A parameter from Python, on one short line."""
    return " ".join((value if isinstance(value, str) else reprlib.repr(value)).split())


def _listed(
    name: str, value: range | list[Any] | tuple[Any, ...] | set[Any], elaborator: Elaborator
) -> SetOf:
    """A list from Python: a set, and a table unless it has no order."""
    members: ir.IntSet | None = None
    if isinstance(value, range) and value.step == 1:
        members = ir.IntSet.of([(value.start, value.stop - 1)])
    elif len(value) > ir.ENTRY_LIMIT:
        raise fail(f"`{name}` lists more than {ir.ENTRY_LIMIT:,} members")
    elif not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        raise fail(f"`{name}` is a list of numbers, and this is {brief(value)}")
    elif all(isinstance(v, int) for v in value):
        members = ir.IntSet.of((v, v) for v in value)

    def contains(p: ir.Expr, space: Space) -> ir.Expr:
        if members is None:
            raise fail(f"`{name}` is a set of integers, and this is {brief(value)}")
        for lo, hi in members.intervals:
            # a range may begin before 0, and each entry of a list is meant
            last = hi if isinstance(value, range) else min(hi, -1)
            elaborator.demand_position(p, ir.const(lo), ir.const(last))
        return ir.inset(p, members)

    return SetOf(
        contains, None if isinstance(value, set) else functools.cache(lambda: ir.Table.listed(value))
    )


def bound_of(value: object) -> Bound:
    """An attention as `Program` gives it out, or a bare one. Raises AttnError for anything else."""
    if isinstance(value, Bound):
        return value
    if isinstance(value, Attention):
        return Bound(value)
    if isinstance(value, Unbound):
        raise value.refusal
    if isinstance(value, Stack):
        raise fail(
            f"`{value.name}` is a stack, and no attention",
            help="`attndsl.build` makes its module, and `attndsl.depth` says what it costs",
        )
    if isinstance(value, Program):
        names = ", ".join(value.names)
        raise fail("a program is taken one attention at a time", help=f'write program["..."]: {names}')
    help = ""
    if isinstance(value, str | Path):
        help = 'write `attndsl.load(...)["NAME"]`, or `attndsl.parse(text)["NAME"]`'
    elif inspect.isfunction(value):
        help = "a mod of FlexAttention is read by `attndsl.from_mask_mod` or `attndsl.from_score_mod`"
    elif isinstance(getattr(value, "attention", None), Attention):
        help = "give that of the plan: `plan.attention`"
    elif type(value).__name__ == "BlockMask":
        help = "its function is read: `attndsl.from_mask_mod(block_mask.mask_mod)`"
    elif hasattr(value, "tolist"):
        help = "as a mask it is a table: `inputs m : bool[n, n]  mask { q, k : m[q, k] }`, given at a call"
    raise fail(f"expected an attention, not {type(value).__name__}", help=help)


def _name_problems(item: Definition, elaborator: Elaborator) -> list[Diagnostic]:
    """What can be known of a definition whose parameters are open: its names mean something, and calls
    of definitions fit their parameters."""
    score = isinstance(item, ast.Definition) and item.word == "score"
    names = {param.name for param in item.params} | {"n", "nq", "h", "H", "D"}
    if score or isinstance(item, ast.AttentionDef):
        names |= {"s", "q", "k", "Q", "K"}
    if isinstance(item, ast.AttentionDef) and any(isinstance(c, ast.Keys) for c in item.clauses):
        names |= {"stream"}
    problems: list[Diagnostic] = []

    def visit(node: object, names: frozenset[str]) -> None:
        if isinstance(node, tuple):
            for part in node:
                visit(part, names)
        if not isinstance(node, ast.Node):
            return
        if isinstance(node, ast.Inputs):
            return
        if isinstance(node, ast.Clause) and node.word in ("norm", "approx"):
            visit(node.value.args if isinstance(node.value, ast.Call) else (), names)
            return
        if isinstance(node, ast.Keys):
            # words that are none of streams are told where they are read
            for e in ast.walk(node):
                if isinstance(e, ast.Argument):
                    visit(e.value, names | {"tokens", "mem", "pool", "proj", "mean", "max"})
            return
        if isinstance(node, ast.Builder):
            names = names | {name.id for group in node.vars for name in group}
            visit(node.pred, names)
            return
        if isinstance(node, ast.Index):
            # `t[B, k]` is told where it is looked up
            indices = (i for i in node.indices if not (isinstance(i, ast.Name) and i.id == "B"))
            visit((node.base, *indices), names)
            return
        if isinstance(node, ast.Name):
            known = BUILT_IN | elaborator.definitions.keys() | elaborator.broken
            if node.id not in names and node.id not in known and not elaborator.selection(node):
                hidden = node.id in RESERVED
                env = Scope(dict.fromkeys(names, Num(ir.ZERO)), calls=(item.name,))
                problems.extend((out_of_place(node) if hidden else elaborator.unknown(node, env)).diagnostics)
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in names:
            called = elaborator.definitions.get(node.func.id)
            if called is not None:
                try:
                    bind_arguments(called, node.args)
                except AttnError as error:
                    problems.extend(error.diagnostics)
            elif node.func.id not in BUILT_IN and elaborator.selection(node.func):
                # what is no expression but a word is told where it is read
                written = tuple(arg.value for arg in node.args if not isinstance(arg.value, ast.Name))
                visit(written, names | {"Q", "K", "q", "k"})
                return
        for child in fields(node):
            visit(getattr(node, child.name), names)

    inputs = {
        decl.name
        for clause in (item.clauses if isinstance(item, ast.AttentionDef) else ())
        if isinstance(clause, ast.Inputs)
        for decl in clause.decls
    }
    inside = (item.body,) if isinstance(item, ast.Definition) else (*item.clauses, item.sum)
    visit((*item.params, *inside), frozenset(names | inputs))
    return list({d.message: d for d in reversed(problems)}.values())


def _compilable(item: Named) -> bool:
    return isinstance(item, ast.AttentionDef | ast.StackDef) or item.word == "pattern"
