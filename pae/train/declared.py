"""One declaration per option: a dataclass field says type, choices, bounds, help.

From it come the command line, the reader of files, every check and the table of the documentation;
a value of the wrong kind is one line that names option, value, what was expected, and the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pae.errors import one_line
from pae.files import check_nesting, from_json

Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]


def option(
    group: str,
    default: Any,
    help: str,
    *,
    choices: Choices | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    unset: str = "",
    negated: bool = True,
) -> Any:
    """A dataclass field that is an option; its annotation is the type.

    Args:
        group: heading of the help that it stands under.
        default: its value when nobody gives one. If None, None may be given too.
        help: one sentence for people.
        choices: the words it takes, or a function that gives them, called when they are needed. If
            there is a metavar too, they stand in the help's text.
        low, high: inclusive bounds of a number. above, below: exclusive ones.
        metavar: what stands for the value in the help. FOLDER and FILE are paths.
        unset: what None stands for.
        negated: whether there is a --no- form too, for a switch that a file can turn on.
    """
    facts = {k: v for k, v in locals().items() if k != "default"}
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


class Refused(ValueError):
    """A value that an option does not take; the text says what was expected."""


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the declaration of one option says; see `option`."""

    name: str
    kind: type
    optional: bool
    default: Any
    group: str
    help: str
    choices: Choices | None
    low: float | None
    high: float | None
    above: float | None
    below: float | None
    metavar: str | None
    unset: str
    negated: bool

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_path(self) -> bool:
        """Whether it names a file or a folder."""
        return self.metavar in ("FILE", "FOLDER")

    def words(self) -> tuple[str, ...]:
        """The choices; () when there are none."""
        if self.choices is None:
            return ()
        return self.choices() if callable(self.choices) else self.choices

    def expected(self) -> str:
        """What it takes, in words."""
        if self.choices is not None:
            return f"one of {', '.join(self.words())}"
        if self.kind is bool:
            return "true or false"
        if self.kind is dict:
            return "a table of names and values"
        if self.kind is str:
            return f"a {(self.metavar or 'text').lower()}"
        what = "an integer" if self.kind is int else "a number"
        if self.low is not None and self.below is not None:
            return f"{what} in [{self.low:g}, {self.below:g})"
        if self.above is not None and self.below is not None:
            return f"{what} between {self.above:g} and {self.below:g}"
        if self.low is not None and self.high is not None:
            return f"{what} from {self.low} to {self.high}"
        if self.low is not None:
            return f"{what} of at least {self.low:g}"
        if self.above is not None:
            return f"{what} above {self.above:g}"
        return what

    def checked(self, value: Any) -> Any:
        """`value` as the option holds it.

        Raises:
            Refused: another type, another word, a number that is not finite or out of bounds, an
                empty text.
        """
        if value is self.default:
            return value
        if value is None and self.optional:
            return None
        if not fits(value, self.kind):
            raise Refused(self.expected())
        if self.choices is not None and value not in self.words():
            raise Refused(self.expected())
        if self.kind is str and (not value.strip() or "\0" in value):
            raise Refused(self.expected())
        if self.kind is dict and not _is_plain(value):
            raise Refused(f"{self.expected()}, none of them a date, NaN or infinity")
        if self.kind in (int, float):
            number = self.kind(value)
            inside = (
                (self.low is None or number >= self.low)
                and (self.high is None or number <= self.high)
                and (self.above is None or number > self.above)
                and (self.below is None or number < self.below)
            )
            if not inside:
                raise Refused(self.expected())
            return number
        return value

    def read(self, given: Any) -> Any:
        """The checked value of what the command line gave: a text, True or False, or a list of
        NAME=VALUE.
        """
        if self.kind is dict:
            return self.checked(dict(name_and_value(text, self.flag) for text in given))
        if self.kind in (int, float) and isinstance(given, str):
            try:
                given = self.kind(given)
            except ValueError:
                raise Refused(self.expected()) from None
        return self.checked(given)


@lru_cache
def declared(options: type[Any]) -> Mapping[str, Declared]:
    """The options that dataclass `options` declares, by name, in order."""
    hints = typing.get_type_hints(options)
    found = {}
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        parts = set(typing.get_args(hint)) if is_union else {hint}
        (kind,) = (typing.get_origin(part) or part for part in parts - {types.NoneType})
        default = field.default
        optional = types.NoneType in parts or default is None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Declared(field.name, kind, optional, default, **field.metadata)
    return types.MappingProxyType(found)


def fits(value: Any, hint: Any) -> bool:
    """Whether `value`, as TOML and JSON have it, is of type `hint`.

    An integer is a number too; true and false are no integers, 8.0 is none, and nan and infinity
    are no numbers.
    """
    if hint is int:
        return type(value) is int
    if hint is float:
        try:
            return type(value) in (int, float) and math.isfinite(value)
        except OverflowError:
            return False
    if hint in (str, bool):  # before the questions to typing, which take longest
        return isinstance(value, hint)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if hint is Any:
        return True
    if hint in (None, types.NoneType):
        return value is None
    if hint is dict or origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if isinstance(origin, type) and issubclass(origin, Iterable):  # Sequence[int], list[str], ...
        return isinstance(value, (list, tuple)) and all(fits(v, parts[0]) for v in value)
    return isinstance(value, hint)


def _is_plain(value: Any) -> bool:
    """Whether JSON has such a value, so that config.json gives it again."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def name_of(hint: Any) -> str:
    """`hint` in words."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(name_of(part) for part in parts)
    if parts:
        return f"a list, each {name_of(parts[0])}"
    words = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        types.NoneType: "None",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def name_and_value(text: str, flag: str) -> tuple[str, Any]:
    """("rank", 16) of "rank=16": values are JSON where they can be, else text.

    Raises:
        ValueError: no name, or no value.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{flag} {text}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        words = {"True": True, "False": False, "None": None}
        return name, words.get(value, value)


def near(name: str, known: Collection[str]) -> str:
    """ "; did you mean ...?", or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# ---- where an option came from


class Given:
    """Who gave which option, and so what a message calls it.

    Args:
        files: {option: file} of those that came from a file; all others are called as on the
            command line.
    """

    def __init__(self, files: Mapping[str, str] = types.MappingProxyType({})) -> None:
        self.files = files

    def call(self, option: Declared, value: Any) -> str:
        """ "--num-tokens 3", or "a.toml: num_tokens = 3"."""
        if option.name in self.files:
            return f"{self.files[option.name]}: {option.name} = {_shortened(_json(value))}"
        if option.kind is bool and isinstance(value, bool):
            return option.flag if value else f"--no-{option.flag[2:]}"
        if option.kind is dict and isinstance(value, dict):
            value = " ".join(f"{name}={_plain(part)}" for name, part in value.items())
        return f"{option.flag} {_shortened(_plain(value))}"

    def refuse(self, option: Declared, value: Any, expected: str) -> ValueError:
        """The error that names option, value, what was expected, and where it stands."""
        return ValueError(f"{self.call(option, value)}: expected {expected}")


def check(options: Any, given: Given) -> dict[str, Any]:
    """The checked values of all options of a dataclass instance.

    Raises:
        ValueError: the first that is not what its declaration says.
    """
    values = {}
    for name, option in declared(options.__class__).items():
        value = getattr(options, name)
        try:
            values[name] = option.checked(value)
        except Refused as error:
            raise given.refuse(option, value, str(error)) from None
    return values


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _shortened(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# ---- the command line


def add_arguments(parser: argparse.ArgumentParser, *options: type) -> None:
    """One argument per option of the dataclasses `options`; `from_arguments` reads them."""
    groups: dict[str, Any] = {}
    for option in (option for each in options for option in declared(each).values()):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        words = "" if option.kind is bool else _default(option)
        text = (f"{option.help} (default: {words})" if words else option.help).replace("%", "%%")
        arguments: dict[str, Any] = {"dest": option.name, "help": text}
        if option.metavar and option.choices is not None:
            arguments.update(help=f"{text}; one of %(choices)s", choices=_Listed(option))
        if option.kind is bool:
            arguments["action"] = _Switch if option.negated else "store_true"
        else:
            arguments["metavar"] = _metavar(option)
        if option.kind is dict:
            arguments.update(action="extend", nargs="+")
        # an option that was not given must be told apart from one given at its default value
        groups[option.group].add_argument(option.flag, default=argparse.SUPPRESS, **arguments)


def from_arguments(options: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """The checked values of the options that the command line gave.

    Raises:
        ValueError: the first that is not what its declaration says.
    """
    values = {}
    for name, option in declared(options).items():
        if hasattr(arguments, name):
            text = getattr(arguments, name)
            try:
                values[name] = option.read(text)
            except Refused as error:
                raise Given().refuse(option, text, str(error)) from None
    return values


class _Listed:
    """The choices of an option for the help, asked for when it is shown; checks are ours."""

    def __init__(self, option: Declared) -> None:
        self.option = option

    def __iter__(self) -> Iterator[str]:
        return iter(self.option.words())

    def __contains__(self, word: object) -> bool:
        return True


class _Switch(argparse.Action):
    """--kld and --no-kld; the help names the one that changes something."""

    def __init__(self, option_strings: list[str], dest: str, **more: Any) -> None:
        (flag,) = option_strings
        super().__init__([flag, f"--no-{flag[2:]}"], dest, nargs=0, **more)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


def _metavar(option: Declared) -> str:
    if option.metavar or option.choices is not None:
        return option.metavar or f"{{{','.join(option.words())}}}"
    return {int: "N", float: "X", str: "TEXT", dict: "NAME=VALUE"}[option.kind]


def _default(option: Declared) -> str:
    if option.default is None:
        return option.unset
    if option.kind is bool:
        return "on" if option.default else "off"
    return "" if option.kind is dict else str(option.default)


# ---- files

_LONGEST = 10_000_000  # bytes of a file of options: weights, given by mistake, are not read


def read_table(
    path: Path,
    table: Mapping[str, Any],
    options: type,
    former_names: Mapping[str, str],
    former_words: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    """The checked options of a table that came from a file.

    Args:
        path: the file, for the messages.
        table: what stands in it.
        options: the dataclass that declares them.
        former_names: {former name: name} of options that were renamed.
        former_words: {(name, former choice): choice}.
    Returns:
        {name: value}, of those that the file gives.
    Raises:
        ValueError: an unknown name, or a value that an option does not take.
    """
    known = declared(options)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = former_names.get(key, key)
        if name not in known:
            hint = near(key, known) or "; pae train --help lists them"
            raise ValueError(f"{path}: there is no option {key}{hint}")
        if name in values:
            raise ValueError(f"{path}: {name} is given twice, once by its former name")
        if isinstance(value, str):
            value = former_words.get((name, value), value)
        try:
            values[name] = known[name].checked(value)
        except Refused as error:
            was = f" (formerly {key})" if key != name else ""
            shown = Given({name: str(path)}).call(known[name], value)
            raise ValueError(f"{shown}{was}: expected {error}") from None
    return values


def parsed(path: Path) -> dict[str, Any]:
    """The table in a TOML or a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or holds no table, or a name twice.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError("expected a file of options, got one of more than 10 MB")
        text = content.decode("utf-8-sig")  # some editors mark UTF-8
        if path.suffix == ".json" or text.lstrip().startswith("{"):
            table = from_json(text)
        else:
            table = _toml(text)
            check_nesting(table)
        if table in ({}, []):
            raise ValueError("expected options, and there are none in it")
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:  # of the encoding, of JSON and of TOML
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a table of options, got {_shortened(repr(table))}")
    return table


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


# ---- documentation


def table(options: type) -> str:
    """The options as Markdown tables, one per group."""
    lines: list[str] = []
    group = None
    for option in declared(options).values():
        if option.group != group:
            group = option.group
            lines += ["", f"**{group[0].upper()}{group[1:]}**", ""]
            lines += ["| option | takes | default | |", "|---|---|---|---|"]
        default = option.unset if option.default is None else f"`{_json(option.default)}`"
        lines.append(f"| `{option.name}` | {option.expected()} | {default} | {option.help} |")
    return "\n".join(lines).strip() + "\n"
