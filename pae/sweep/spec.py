"""A spec: one TOML file that says which runs a sweep has.

    seeds = 3
    tasks = ["digits", "my-images/"]
    methods = ["linear", "vpt-deep"]

    [options]
    epochs = 20
    [grid]
    lr = [0.003, 0.01, 0.03]

Every option is one of `pae train`, checked by its declaration there, and every run as a whole,
before the first one begins. docs/sweeps.md says what a spec may hold.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pae.sweep.plan import BEST_EPOCH, EPOCHS, EQUAL, LOSS, SELECT, TWO_STAGE, Cell, Group, Plan
from pae.sweep.records import key_of
from pae.train import hf_data, record
from pae.train.declared import Given, declared, near, parsed
from pae.train.embedded import DATASETS
from pae.train.options import (
    COMPARE,
    OF_PROMPTS,
    OF_STEPS,
    SWITCHES,
    Options,
    find_config,
    read_config,
    uses,
)
from pae.train.options import read_options as checked

ASHA = {"grace": 30, "reduction": 3}  # epochs before the first stop; the share that goes on
_TOP = (
    *("seeds", "tasks", "methods", "select", "epoch", "equal"),
    *("options", "grid", "random", "final", "asha"),
)
_TELL = 3.0  # seconds between two words about a long file
_VARY = ("grid", "random")  # of a method's own table, in place of the common ones
# what a method may have no use for, where a file speaks for others too: left out there, not refused
_OF_METHODS = (*OF_PROMPTS, *OF_STEPS, *SWITCHES)

Values = dict[str, Any]
Layer = tuple[str, Values]  # where it stands in the file, and its checked options


@dataclass(frozen=True)
class Sweep:
    """A spec, read and checked.

    Attributes:
        path: the file.
        plan: which runs there are.
        options: of every run that the plan can come to, by key; not resolved.
        given: {key: who gave what}, for messages.
        notes: what a reader should know: options that a method has no use for.
        asha: its settings, where runs may be stopped early.
    """

    path: Path
    plan: Plan
    options: Mapping[str, Options]
    given: Mapping[str, Given]
    notes: tuple[str, ...]
    asha: Mapping[str, int] | None = None


def read_spec(path: str | Path, tell: Callable[[int], None] = lambda count: None) -> Sweep:
    """The sweep that a file describes.

    Args:
        path: of the file.
        tell: called every few seconds with the number of runs that have been read.
    Raises:
        OSError: the file cannot be read.
        ValueError: naming the file and what in it is unknown, of another type, out of bounds, or
            contradicts something else.
    """
    return _Reader(Path(path).expanduser(), tell).sweep()


class _Reader:
    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        self.path = path
        self.tell, self.told = tell, time.monotonic()
        self.spec = parsed(path)
        for name in self.spec:
            if name not in _TOP:
                hint = near(name, _TOP)
                if not hint and name in declared(Options):
                    hint = f"; options stand in [options], so: [options] {name} = ..."
                self.refuse(f"there is no {name} in a sweep{hint}")
        self.options: dict[str, Options] = {}
        self.given: dict[str, Given] = {}
        self.notes: dict[str, None] = {}
        self.used: set[str] = set()  # options that some run has

    def refuse(self, text: str) -> NoReturn:
        raise ValueError(f"{self.path}: {text}")

    def sweep(self) -> Sweep:
        common = self.layer("options", self.table("options"))
        self.common_vary = {name: self.table(name) for name in _VARY}
        self.final = self.layer("final", self.table("final"))
        seeds = self.seeds()
        methods = list(self.methods(common))
        groups = [
            self.group(task, method, seeds, common)
            for task in self.tasks(common)
            for method in methods
        ]
        self.note_common(groups)
        self.check_used([common, self.final])
        asha = self.asha()
        plan = Plan(
            name=self.path.stem,
            seeds=seeds,
            select=self.word("select", SELECT, TWO_STAGE),
            epoch=self.word("epoch", EPOCHS, BEST_EPOCH),
            equal=self.word("equal", EQUAL, LOSS),
            groups=tuple(groups),
            scheduler=None if asha is None else "asha",
        )
        return Sweep(self.path, plan, self.options, self.given, tuple(self.notes), asha)

    # ---- the parts of the file

    def table(self, name: str, of: Mapping[str, Any] | None = None, where: str = "") -> Values:
        value = (self.spec if of is None else of).get(name, {})
        if not isinstance(value, dict):
            self.refuse(f"{where}{name} = {value!r}: expected a table, [{where}{name}]")
        return value

    def word(self, name: str, words: tuple[str, ...], default: str) -> str:
        value = self.spec.get(name, default)
        if value not in words:
            self.refuse(f"{name} = {value!r}: expected one of {', '.join(words)}")
        return value

    def seeds(self) -> tuple[int, ...]:
        value = self.spec.get("seeds", 1)
        seeds = list(range(value)) if type(value) is int and 0 < value <= 10_000 else value
        if not isinstance(seeds, list) or not seeds or len(set(map(repr, seeds))) < len(seeds):
            self.refuse(f"seeds = {value!r}: expected how many there are, or a list of different")
        for seed in seeds:
            self.layer("seeds", {"seed": seed}, free=("seed",))
        return tuple(seeds)

    def layer(self, where: str, table: Values, free: tuple[str, ...] = ()) -> Layer:
        """The checked options of a table; `config`, if it has one, underneath."""
        table = dict(table)
        place = f"{self.path}: [{where}]"
        for name, home in (("seed", "seeds"), ("save_every_steps", None), ("workers", None)):
            if home is not None and name in table and name not in free:
                self.refuse(f"[{where}] {name}: give {home} = ... at the top of the file")
        config, beneath = table.pop("config", None), {}
        if config is not None:
            if not isinstance(config, str):
                self.refuse(f"[{where}] config = {config!r}: expected a file, or a name")
            try:
                file = find_config(config)
            except ValueError as error:
                text = str(error).removeprefix(f"--config {config}: ")
                self.refuse(f"[{where}] config = {config!r}: {text}")
            beneath = read_config(file)
            beneath.pop("seed", None)
        own = checked(Path(place), table)
        if config is not None:
            method = own.get("method", beneath.get("method"))
            if beneath.get("method", method) != method:
                self.refuse(f"[{where}] config = {config!r}: it is for {beneath['method']}")
        return place, self.joined(beneath, own)

    @staticmethod
    def joined(*layers: Values) -> Values:
        """Later ones win; arguments of a family are joined name by name."""
        values: Values = {}
        for layer in layers:
            if {"data", "dataset"} & layer.keys():
                values.pop("data", None)
                values.pop("dataset", None)
            arguments = {**values.get("method_args", {}), **layer.get("method_args", {})}
            values.update(layer)
            if arguments:
                values["method_args"] = arguments
        return values

    def tasks(self, common: Layer) -> Iterator[tuple[str, Layer]]:
        given = self.spec.get("tasks")
        has_own = {"data", "dataset"} & common[1].keys()
        if given is None:
            data = common[1].get("data")
            name = self.title(data) if data else common[1].get("dataset")
            if name is None:
                self.refuse('expected tasks = ["digits", "folder/of/images", ...], or [tasks.NAME]')
            yield name, self.layer("tasks", {})
            return
        if has_own:
            self.refuse(f"tasks, and [options] {has_own.pop()}: give one of them")
        names: set[str] = set()
        for name, table in self.named("tasks", given):
            if table is None:
                folder = Path(name).expanduser()
                if name in DATASETS:
                    name, table = name, {"dataset": name}
                elif folder.is_dir() or hf_data.is_hf(name):
                    name, table = self.title(name), {"data": name}
                else:
                    self.refuse(
                        f"tasks: {name!r}: expected a folder, hf:NAME, or one of "
                        f"{', '.join(DATASETS)}{near(name, DATASETS)}"
                    )
            if name in names:
                self.refuse(f"tasks: {name} is there twice; name them by [tasks.NAME]")
            names.add(name)
            layer = self.layer(f"tasks.{name}", table)
            if not {"data", "dataset"} & layer[1].keys():
                self.refuse(f'[tasks.{name}]: expected data = "FOLDER" or dataset = "NAME"')
            yield name, layer

    @staticmethod
    def title(data: str) -> str:
        """What a task is called by its data."""
        if hf_data.is_hf(data):
            return hf_data.title(data)
        return Path(data).expanduser().resolve().name

    def methods(self, common: Layer) -> Iterator[tuple[str, Layer, dict[str, Values]]]:
        """Name, options, and what the method varies."""
        given = self.spec.get("methods")
        if given is None:
            method = common[1].get("method")
            if method is None and "method" not in self.common_vary["grid"]:
                self.refuse('expected methods = ["vpt-deep", ...], or [methods.NAME]')
            yield method or "all", self.layer("methods", {}), self.common_vary
            return
        if "method" in common[1]:
            self.refuse("methods, and [options] method: give one of them")
        for name, table in self.named("methods", given):
            if table is None:
                table = {"method": name}
            where = f"methods.{name}"
            vary = {word: self.table(word, table, f"{where}.") for word in _VARY}
            if not any(word in table for word in _VARY):
                vary = self.common_vary
            table = {word: value for word, value in table.items() if word not in _VARY}
            layer = self.layer(where, table)
            if "method" not in layer[1]:
                layer[1].update(checked(Path(f"{self.path}: [{where}]"), {"method": name}))
            yield name, layer, vary

    def named(self, what: str, given: Any) -> Iterator[tuple[str, Values | None]]:
        """(name, its table), or (name, None) of a list of names."""
        if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
            if len(set(given)) < len(given):
                self.refuse(f"{what} = {given!r}: one of them is there twice")
            yield from ((name, None) for name in given)
        elif isinstance(given, dict) and given:
            for name in given:
                yield name, self.table(name, given, f"{what}.")
        else:
            self.refuse(f"{what} = {given!r}: expected a list of names, or tables [{what}.NAME]")

    def asha(self) -> dict[str, int] | None:
        if "asha" not in self.spec:
            return None
        table = self.table("asha")
        for name, value in table.items():
            if name not in ASHA:
                self.refuse(f"[asha]: there is no {name}{near(name, ASHA)}")
            least = 2 if name == "reduction" else 1
            if type(value) is not int or value < least:
                self.refuse(f"[asha] {name} = {value!r}: expected an integer of at least {least}")
        return {**ASHA, **table}

    # ---- cells

    def varied(self, where: str, vary: dict[str, Values]) -> list[Values]:
        """What the cells of a grid and the draws beside it set, in order."""
        axes = list(self.axes(f"{where}grid", vary["grid"]))
        points = [self.joined(*point) for point in itertools.product(*axes)]
        draws = self.draws(f"{where}random", vary["random"])
        return [self.joined(point, draw) for point in points for draw in draws]

    def axes(self, where: str, grid: Values) -> Iterator[list[Values]]:
        for name, values in self.spread(grid):
            if not isinstance(values, list) or not values:
                self.refuse(f"[{where}] {name} = {values!r}: expected a list of one value or more")
            yield [self.one(where, name, value) for value in values]

    @staticmethod
    def spread(table: Values) -> Iterator[tuple[str, Any]]:
        """Names and values; those of arguments of a family as method_args.NAME."""
        for name, value in table.items():
            if name == "method_args" and isinstance(value, dict):
                yield from ((f"{name}.{inner}", part) for inner, part in value.items())
            else:
                yield name, value

    def one(self, where: str, name: str, value: Any) -> Values:
        """{name: value} of one option, checked."""
        if name in ("data", "dataset"):
            self.refuse(f"[{where}] {name}: give tasks = ... at the top of the file")
        outer, dot, inner = name.partition(".")
        return self.layer(where, {outer: {inner: value} if dot else value})[1]

    def draws(self, where: str, table: Values) -> list[Values]:
        table = dict(table)
        if not table:
            return [{}]
        count, seed = table.pop("draws", None), table.pop("seed", 0)
        if type(count) is not int or count < 1:
            self.refuse(f"[{where}] draws = {count!r}: expected how many, at least 1")
        if type(seed) is not int:
            self.refuse(f"[{where}] seed = {seed!r}: expected an integer")
        kinds = list(self.spread(table))
        if not kinds:
            self.refuse(f"[{where}]: expected options to draw beside draws")
        drawn = [{name: self.drawer(where, name, how) for name, how in kinds}] * count
        return [
            self.joined(
                *(
                    # a stream for each, so that more draws, or other options, change none
                    self.one(where, name, draw(random.Random(f"{seed}/{name}/{number}")))
                    for name, draw in one.items()
                )
            )
            for number, one in enumerate(drawn)
        ]

    def drawer(self, where: str, name: str, how: Any) -> Callable[[random.Random], Any]:
        expected = (
            "expected {uniform = [low, high]}, {log-uniform = [low, high]} or {choice = [..]}"
        )
        if not isinstance(how, dict) or len(how) != 1:
            self.refuse(f"[{where}] {name} = {how!r}: {expected}")
        ((kind, values),) = how.items()
        if kind == "choice" and isinstance(values, list) and values:
            for value in values:
                self.one(where, name, value)
            return lambda stream: stream.choice(values)
        numbers = (
            isinstance(values, list) and [type(v) in (int, float) for v in values] == [True] * 2
        )
        if kind not in ("uniform", "log-uniform") or not numbers or not values[0] < values[1]:
            self.refuse(f"[{where}] {name} = {how!r}: {expected}")
        low, high = values
        if kind == "log-uniform" and low <= 0:
            self.refuse(f"[{where}] {name} = {how!r}: expected a low above 0")
        option = declared(Options).get(name)
        whole = all(type(v) is int for v in values) if option is None else option.kind is int
        for value in values:
            self.one(where, name, int(value) if whole and value == int(value) else value)

        def draw(stream: random.Random) -> Any:
            if kind == "uniform":
                value = stream.uniform(low, high)
            else:
                value = math.exp(stream.uniform(math.log(low), math.log(high)))
            if whole:
                return min(max(round(value), math.ceil(low)), math.floor(high))
            return min(max(float(f"{value:.4g}"), low), high)  # four digits: people read them

        return draw

    # ---- runs

    def group(
        self,
        task: tuple[str, Layer],
        method: tuple[str, Layer, dict[str, Values]],
        seeds: tuple[int, ...],
        common: Layer,
    ) -> Group:
        name, layer, vary = method
        own = f"methods.{name}." if vary is not self.common_vary else ""
        cells: dict[tuple[str, ...], Cell] = {}
        for values in self.varied(own, vary):
            place = f"{self.path}: [{own}{'grid' if vary['grid'] else 'random'}]"
            layers = [common, task[1], (place, values), layer]
            if own:  # its own grid, or what is common
                layers = [common, task[1], layer, (place, values)]
            of_method = {**layer[1], **(values if own else {})}
            keys = tuple(self.run(layers, of_method, seed) for seed in seeds)
            finals = keys
            if self.final[1]:
                of_final = {**of_method, **self.final[1]}
                finals = tuple(self.run([*layers, self.final], of_final, seed) for seed in seeds)
            used = {k: v for k, v in values.items() if self.is_used(k, self.options[keys[0]])}
            # cells that a method cannot tell apart are one
            cells.setdefault(keys, Cell(_flat(used), keys, finals))
        return Group(task[0], name, tuple(cells.values()))

    def run(self, layers: list[Layer], of_method: Values, seed: int) -> str:
        """Keeps the options of one run; returns its key."""
        values = self.joined(*(values for _, values in layers))
        files = {option: place for place, values in layers for option in values}
        given = Given(files)
        for option in list(values):
            if option not in of_method and not self.applies(option, values):
                del values[option]
                if option in OF_PROMPTS + OF_STEPS:
                    self.notes[
                        f"{values['method']} has no use for {option}, so runs without it"
                    ] = None
            else:
                self.used.add(option)
        if values.get("method", COMPARE) == COMPARE:
            self.refuse("method compare is three runs; name them: methods = [...]")
        options = Options(**{**values, "seed": seed})
        settings = self.settings(options, values, given)
        key = key_of(settings)
        self.options.setdefault(key, options)
        self.given.setdefault(key, given)
        if time.monotonic() > self.told + _TELL:
            self.tell(len(self.options))
            self.told = time.monotonic()
        return key

    @staticmethod
    def applies(option: str, values: Values) -> bool:
        """Whether a run has a use for an option that was given for several methods."""
        of_methods = option in _OF_METHODS or option.partition("_")[0] in SWITCHES
        return not of_methods or uses(option, values)

    def is_used(self, option: str, options: Options) -> bool:
        return self.applies(option, vars(options))

    def settings(self, options: Options, values: Values, given: Given) -> Values:
        """What decides the numbers of a run, wherever it runs: its key is made of them.

        Options at their default are left out, so that a new one changes no key; what the machine
        chooses counts as chosen by it. Files count by their names as the spec gives them: that the
        images in a folder are still the same is seen from the records.
        """
        anywhere = dataclasses.replace(
            options, device="cpu", amp="no" if options.amp == "auto" else options.amp, workers=0
        )
        if options.amp == "fp16":  # of a GPU, which this machine need not have
            anywhere = dataclasses.replace(anywhere, amp="no")
        resolved = vars(anywhere.resolved(given))
        known = declared(Options)
        settings = {n: v for n, v in resolved.items() if known[n].default != v}
        for name in (*record.CHANGEABLE, *record.CHOSEN):
            settings.pop(name, None)
        for name in ("data", "weights", "model", *record.CHOSEN):
            if values.get(name) not in (None, "auto"):
                settings[name] = values[name]
        return settings

    def note_common(self, groups: list[Group]) -> None:
        """What of two groups is one, which may be a folder that was given twice."""
        owners: dict[str, Group] = {}
        shared: Counter[tuple[str, str]] = Counter()
        for group in groups:
            for key in {key for cell in group.cells for key in (*cell.keys, *cell.finals)}:
                owner = owners.setdefault(key, group)
                if owner is not group:
                    names = [f"{one.task}, {one.method}" for one in (owner, group)]
                    shared[names[0], names[1]] += 1
        for (one, other), count in shared.items():
            self.notes[f"{other}: {count} of its runs are also those of {one}, and run once"] = None

    def check_used(self, layers: list[Layer]) -> None:
        """What is said of KLD or MPA was meant for somebody."""
        layers = [*layers, *((f"{self.path}: [{w}]", self.common_vary[w]) for w in _VARY)]
        for place, values in layers:
            for option in values:
                switch, _, rest = option.partition("_")
                if switch in SWITCHES and rest and option not in self.used:
                    raise ValueError(f"{place}: {option}: no method has {switch} = true")


def _flat(values: Values) -> Values:
    """Arguments of a family under names of their own."""
    return dict(_Reader.spread(values))


def rehearse(sweep: Sweep, keys: set[str] | None = None) -> None:
    """Builds what the runs name, without weights and images, so that whatever is refused is refused
    before the first one begins.

    Raises:
        ValueError: naming file and option.
    """
    from pae.train import tasks

    seen = set()
    for key, options in sweep.options.items():
        if keys is not None and key not in keys:
            continue
        same = dict(vars(options))
        for name in ("seed", "lr", "weight_decay", "head_weight_decay", "epochs", "warmup_epochs"):
            same[name] = None
        mark = repr(same)
        if mark not in seen:
            seen.add(mark)
            tasks.kind_of(options.resolved(sweep.given[key])).rehearse(sweep.given[key])
