"""Options: whatever is wrong with one costs a line that names it, and nothing is loaded for it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pae
from docs import options as documented
from pae.train import cli, loop, methods, options, runfolder
from pae.train.declared import Refused, declared
from pae.train.options import Options, combine, find_config, read_config, shipped
from pae.train.runfolder import RunFolder
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, save_shades

OPTIONS = declared(Options)
FAMILIES = tuple(pae.prompts.METHODS)


class Reached(BaseException):
    """The images are about to be loaded: every check has passed. Nobody may catch this."""


@contextlib.contextmanager
def nothing_loaded():
    """An empty folder to be in; whoever reads images or weights, or starts a run, is stopped."""
    stop = mock.Mock(side_effect=Reached)
    before = os.getcwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(loop, "load_task", stop),
        mock.patch.object(loop, "make_accelerator", stop),
        mock.patch.object(methods.embedded, "load_backbone", stop),
        mock.patch.object(runfolder, "write_atomically", stop),
    ):
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def refusal(*arguments):
    """The one line on stderr of `pae train ARGUMENTS`, which must be refused, leaving nothing."""
    out, err = io.StringIO(), io.StringIO()
    present = sorted(os.listdir())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(["train", *map(str, arguments)])
        except SystemExit as stop:  # argparse's own way out
            status = stop.code
    assert status == 2 and not out.getvalue()
    assert sorted(os.listdir()) == present
    (line,) = err.getvalue().splitlines()
    assert "error: " in line
    return line


# ---- wrong kinds, from everywhere

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
EDGES = (True, False, 0, -1, 1, 2.0, 0.5, -0.5, 1e400, float("nan"), 10**12, 10**400)
EDGES += ("", " ", "1", "10", "1e-3", "true", "false", "no", "None", "\0", [], [1], {}, {"a": 1})


def wrong(option):
    """Values that `option` does not take; numbers around its bounds come up often."""

    ends = [end for end in (option.low, option.high, option.above, option.below) if end is not None]
    near = [number for end in ends for number in (end - 1, end, end + 1, float(end))]
    edges = [value for value in (*EDGES, *near) if not takes(option.checked, value)]
    return st.sampled_from(edges) | ANYTHING.filter(lambda v: not takes(option.checked, v))


def takes(check, value):
    try:
        check(value)
    except Refused:
        return False
    return True


def toml(value):
    """`value` as TOML writes it, or None where it cannot."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)  # nan and inf included
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        parts = [toml(part) for part in value]
        return None if None in parts else f"[{', '.join(parts)}]"
    if isinstance(value, dict):
        parts = {toml(name): toml(part) for name, part in value.items()}
        inner = ", ".join(f"{name} = {part}" for name, part in parts.items())
        return None if None in parts.values() else f"{{{inner}}}"
    return None


NEVER = {  # what no option of that kind takes
    int: (True, 1.0, "1", [1], float("nan")),
    float: (True, "1", [1.0], float("nan"), float("inf"), 10**400),
    bool: (0, 1, "true", "false", "no", []),
    str: (1, True, ["none"], "", " ", "a\0b"),
    dict: ([], "a", 3, True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_kinds_are_not_confused(name):
    option = OPTIONS[name]
    for value in NEVER[option.kind]:
        assert not takes(option.checked, value), value
    assert takes(option.checked, None) == (option.default is None)
    ends = {option.low: -1, option.high: 1, option.above: 0, option.below: 0}
    for end, outside in ends.items():
        assert end is None or not takes(option.checked, option.kind(end + outside))
    assert option.choices is None or not takes(option.checked, "another")


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_wrong_value_in_a_file_costs_one_line(name, data):
    value = data.draw(wrong(OPTIONS[name]))
    kind = data.draw(st.sampled_from(["toml", "json", "config.json"]))
    text = f"{name} = {toml(value)}\n"
    if kind != "toml":
        table = {name: value}
        text = json.dumps(table if kind == "json" else {"settings": table, "device": "a GPU"})
    assume(kind != "toml" or toml(value) is not None)
    with nothing_loaded() as folder:
        (folder / "mine").write_text(text, encoding="utf-8")
        line = refusal("--config", "mine", *(["--method", "vpt-deep"] if name != "method" else []))
    assert line.startswith(f"pae: error: mine: {name} = ") and "expected " in line
    assert OPTIONS[name].expected() in line


@pytest.mark.parametrize("name", [n for n, option in OPTIONS.items() if option.kind is not dict])
@settings(max_examples=25)
@given(data=st.data())
def test_a_wrong_value_on_the_command_line_costs_one_line(name, data):
    option = OPTIONS[name]
    edges = [
        text for text in map(str, EDGES) if option.kind is bool or not takes(option.read, text)
    ]
    texts = st.sampled_from(edges)
    if option.kind is not str or option.choices:
        texts |= TEXTS.filter(lambda text: option.kind is bool or not takes(option.read, text))
    text = data.draw(texts)
    with nothing_loaded():
        line = refusal(f"{option.flag}={text}")
    assert option.flag in line
    if option.kind is not bool:  # a switch takes no value, which is argparse's to say
        assert line.endswith(f": expected {option.expected()}")


@settings(max_examples=25)
@given(value=ANYTHING.filter(lambda value: not (type(value) is int and value > 0)))
def test_a_wrong_argument_of_a_family_costs_one_line(value):
    with nothing_loaded() as folder:
        record = {"method": "bpt", "method_args": {"rank": value}}
        (folder / "mine.json").write_text(json.dumps(record), encoding="utf-8")
        line = refusal("--config", "mine.json")
    assert line.startswith("pae: error: mine.json: method_args = ") and "rank" in line


@pytest.mark.parametrize(
    "line, message",
    [  # the right values of two of them: a text is no switch, and half an epoch is none
        ('kld = "no"', 'mine: kld = "no": expected true or false'),
        ("epochs = 2.5", "mine: epochs = 2.5: expected an integer from 1 to 1000000"),
        ("lr = true", "mine: lr = true: expected a number above 0"),
        ("workers = 0.5", "mine: workers = 0.5: expected an integer from 0 to 1024"),
        ('num_tokens = "10"', 'mine: num_tokens = "10": expected an integer from 0 to 100000'),
        ("seed = 1.5", "mine: seed = 1.5: expected an integer from 0 to 4294967295"),
        ("batch_size = 8.0", "mine: batch_size = 8.0: expected an integer"),
        ("method_args = 3", "mine: method_args = 3: expected a table of names and values"),
        ("family = 3", "mine: method_args = 3 (formerly family): expected a table"),
        ('kld_mode = "foo"', 'mine: kld_mode = "foo": expected one of global, layerwise'),
        ("mpa_window = 0", "mine: mpa_window = 0: expected an integer from 1 to 16384"),
        ("model = 1979-05-27", 'mine: model = "1979-05-27": expected a name'),
        ("num_tokens = 3\nkldd = true", "mine: there is no option kldd; did you mean kld"),
        ("mpa = true\nspt = 'random'", 'mine: mpa = true and mine: spt = "random" exclude each'),
        ("data = 'x'\ndataset = 'mnist'", 'mine: data = "x" and mine: dataset = "mnist" exclude'),
        ("weights = 'x'\npretrained = false", 'mine: weights = "x" and mine: pretrained = false'),
        ("weights = 'x'", '/x": no such file'),
        ("mpa = true\nmpa_window = 57", "mine: mpa_window = 57: expected at most 56, the side"),
        (
            "mpa = true\nmpa_stride = 99",
            "--num-tokens 10: 10 prompts, but --mpa-window 16 and mine",
        ),
        (
            "mpa = true\nmpa_head = 'linear_probe'\nmpa_images = 1",
            "mine: mpa_images = 1: expected ",
        ),
        ("optimizer = 'nosuch'", 'mine: optimizer = "nosuch": Optimizer nosuch not found'),
        ("img_size = 100", "--img-size 100: dinov2-s14-derived needs a multiple of 14"),
        ("method_args = {end = 99}", "mine: method_args"),
    ],
)
def test_each_is_refused_with_its_name(line, message):
    with nothing_loaded() as folder:
        (folder / "mine").write_text(line)
        assert message in refusal("--config", "mine", "--method", "vpt-deep")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"lr": 1, "lr": 2}', "mine: lr is given twice"),
        ("lr = 1\nlr = 2", "mine: "),
        ("{", "mine: "),
        ("[1]", "mine: "),
        ('{"settings": 3}', "mine: settings: expected a table"),
        ("\udcff", "mine: 'utf-8' codec"),
        ("lr = " + "[" * 9999, "mine: "),
        *((f"method_args = {{a = {'[' * n}{']' * n}}}", "nested too deeply") for n in (200, 975)),
        *((f'{{"a": {"[" * n}{"]" * n}}}', "mine: nested too deeply") for n in (200, 975)),
        ("", "mine: expected options, and there are none in it"),
        ("# nothing", "mine: expected options, and there are none in it"),
        ("{}", "mine: expected options, and there are none in it"),
    ],
)
def test_a_file_that_is_none_is_named(text, message):
    with nothing_loaded() as folder:
        (folder / "mine").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert message in refusal("--config", "mine")


@pytest.mark.parametrize("flag", ["--config", "--output", "--resume", "--data", "--model"])
def test_an_empty_text_is_no_name(flag):
    with nothing_loaded():
        assert f"{flag} : expected a " in refusal(flag, "")


# ---- methods


@pytest.mark.parametrize("method", ["linear", "full", *FAMILIES])
def test_every_method_alone_passes_all_checks(method):
    with nothing_loaded(), pytest.raises(Reached):
        cli.main(["train", "--method", method])


# that of clips wants a model of clips: test_named
IMAGES = [path for path in shipped().values() if path.stem != "apt-video"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_published_settings_alone_pass_all_checks(path):
    two_towers = 'task = "clip"' in path.read_text(encoding="utf-8")
    model = "open_clip:ViT-B-16/openai" if two_towers else "vit_base_patch16_224.augreg_in21k"
    with nothing_loaded(), pytest.raises(Reached):
        cli.main(["train", "--config", path.stem, "--model", model])


def test_a_default_that_does_not_fit_says_how_to_give_another():
    with nothing_loaded():
        line = refusal("--method", "bpt-shallow", *BACKBONE_FLAGS)
    assert "--method bpt-shallow: rank must be at most the backbone's width 64, got 75" in line
    assert line.endswith("; --method-args rank=... sets it")


def test_the_options_of_a_method_are_no_family():
    for word in ("compare", "linear", "full"):
        with pytest.raises(ValueError, match="no families"):
            pae.prompts.register(word)


# ---- files


def test_published_settings_are_found_by_name(monkeypatch, tmp_path):
    assert find_config("vpt-deep") == shipped()["vpt-deep"]
    with pytest.raises(ValueError, match=r"apt, bpt.*vpt-shallow; did you mean vpt-deep"):
        find_config("configs/vpt-dep.toml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vpt-deep").write_text("lr = 1")  # a file of one's own comes first
    assert read_config(find_config("vpt-deep")) == {"lr": 1.0}


def right(option):
    """Values that `option` takes."""
    if option.name == "method":
        return st.sampled_from(FAMILIES)
    if option.choices is not None:
        return st.sampled_from(option.words())
    if option.kind is bool:
        return st.booleans()
    if option.kind is dict:
        return st.dictionaries(TEXTS, ANYTHING.filter(lambda v: v == v), max_size=2)
    if option.kind is int:
        return st.integers(option.low, option.high)
    if option.kind is float:
        number = st.floats(0, 0.99) | st.integers(1, 10)
        return number.filter(lambda v: takes(option.checked, v))
    return TEXTS.filter(lambda v: takes(option.checked, v))


@settings(max_examples=50)
@given(data=st.data())
def test_config_json_gives_the_options_again(data):
    names = data.draw(st.lists(st.sampled_from(list(OPTIONS)), unique=True))
    values = {name: data.draw(right(OPTIONS[name]), name) for name in names}
    try:
        options = Options(**{"method": "vpt-deep", "device": "cpu", **values}).resolved()
    except ValueError:  # they contradict one another
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        run.write_config(options, versions={"pae": pae.__version__})
        again, given = combine(run.config, read_config(run.config), {})
        assert run.read_config() == options
    assert again.resolved(given) == options
    assert {type(value) for value in dataclasses.astuple(again)} >= {str, int, float}


def test_the_command_line_wins_over_a_record(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config(Options(method="vpt-deep", kld=True, data=str(tmp_path), lr=0.5).resolved())
    line = {"kld": False, "dataset": "mnist", "lr": 0.25}
    options, given = combine(run.config, read_config(run.config), line)
    assert (options.kld, options.dataset, options.data, options.lr) == (False, "mnist", None, 0.25)
    assert given.files["epochs"] == str(run.config) and "lr" not in given.files


def test_records_with_former_names_are_read(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config(Options(method="bpt", method_args={"rank": 3}).resolved())
    record = json.loads(run.config.read_text())
    del record["digest"]  # an older run did not have it
    settings = record["settings"]
    settings["family"] = settings.pop("method_args")
    settings["engine"] = "textbook"
    del settings["mpa_precision"]  # an option that an older run did not have
    run.config.write_text(json.dumps(record))
    options = run.read_config()
    assert options.method_args == {"rank": 3} and options.engine == "reference"
    assert Options(**read_config(run.config)) == options
    settings.update(family={}, method="vpt-deep")
    run.config.write_text(json.dumps({**record, "comparison": True}))
    assert run.read_config().is_comparison


def test_a_run_of_an_older_version_goes_on(tmp_path, capsys):
    """A run that was started, under the names of then, before its first state was saved."""
    shades = save_shades(tmp_path / "shades")
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", "vpt-deep"]
    flags += ["--epochs", "1", "--num-tokens", "2", "--quiet", "--output", str(tmp_path / "run")]
    assert cli.main(flags) == 0
    run = RunFolder(tmp_path / "run")
    result = run.result()
    record = json.loads(run.config.read_text())
    del record["digest"]
    record["settings"]["family"] = record["settings"].pop("method_args")
    record["settings"]["engine"] = "textbook"
    run.config.write_text(json.dumps(record))
    for path in (run.state, run.metrics_json, run.metrics_csv):
        path.unlink()
    assert cli.main(["train", "--resume", str(run.path), "--quiet"]) == 0
    assert run.result()["val_accuracy"] == pytest.approx(result["val_accuracy"])
    again = ["train", "--config", str(run.config), "--quiet", "--output", str(tmp_path / "again")]
    assert cli.main(again) == 0
    assert RunFolder(tmp_path / "again").result()["val_accuracy"] == run.result()["val_accuracy"]


def test_the_table_of_the_documentation_is_current():
    assert documented.PAGE.read_text(encoding="utf-8") == documented.page()
    for name in OPTIONS:
        assert f"| `{name}` |" in documented.page()


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("faster", [False, True])
def test_bf16_is_chosen_where_it_is_faster(monkeypatch, has, faster):
    """Not where the processor has it and multiplies it more slowly than fp32, as some do."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has}, raising=False)
    slow = torch.float32 if faster else torch.bfloat16

    def timed(rows, weight):
        if rows.dtype == slow:
            time.sleep(0.02)
        return linear(rows, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", timed)
    options.bf16_gain.cache_clear()
    try:
        assert options._resolve_amp("auto", "cpu", str) == ("bf16" if has and faster else "no")
        assert options._resolve_amp("bf16", "cpu", str) == "bf16"  # whoever asks for it gets it
    finally:
        options.bf16_gain.cache_clear()


@pytest.mark.parametrize(
    ("gain", "amp", "asked", "got"),
    [
        (5.0, "auto", "auto", "bf16"),
        (2.0, "auto", "auto", "exact"),  # the second look in fp32 would eat it up
        (5.0, "no", "auto", "exact"),
        (0.5, "bf16", "auto", "exact"),
        (5.0, "auto", "exact", "exact"),
        (0.5, "no", "bf16", "bf16"),
    ],
)
def test_precision_of_mpa_follows_what_was_measured(monkeypatch, gain, amp, asked, got):
    monkeypatch.setattr(options, "bf16_gain", lambda: gain)
    found = Options(device="cpu", amp=amp, mpa_precision=asked).resolved()
    assert found.mpa_precision == got
