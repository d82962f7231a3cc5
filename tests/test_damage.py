"""Every reader with damaged files: the documented error of one line comes out, or the right values.

An ordinary run damages each kind of file 40 times. `PAE_DAMAGES=500 pytest tests/test_damage.py`
does it 500 times, and prints with -s how many were refused; damage number n is always the same.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from safetensors.torch import save_file

import pae
from pae.prompts import VPTDeep
from pae.train import embedded, methods
from pae.train.data import read_folder
from pae.train.options import Options, combine, read_config, shipped
from pae.train.runfolder import RunFolder
from tests.tiny import backbone, counted_backbone
from tests.train import rows

NUMBER = int(os.environ.get("PAE_DAMAGES", "40"))


def damaged(content: bytes, seed: int) -> bytes:
    """Another content: bits, bytes and blocks changed, lost, moved, doubled or added."""
    rng = random.Random(seed)
    data = bytearray(content)

    def block() -> slice:
        start = rng.randrange(len(data))
        return slice(start, start + rng.choice((1, 2, 8, 64, 512, len(data))))

    def place() -> int:  # half of them where the header and the description are
        return rng.randrange(min(len(data), rng.choice((16, 1500, len(data)))))

    def flip() -> None:
        data[place()] ^= 1 << rng.randrange(8)

    def replace() -> None:
        data[place()] = rng.randrange(256)

    def replace_by_text() -> None:  # what a parser may take
        data[place()] = rng.choice(b'0123456789"{}[],:.-+eE tfn\n')

    def truncate() -> None:
        del data[rng.randrange(len(data)) :]

    def lose() -> None:
        del data[block()]

    def append() -> None:
        data.extend(rng.randbytes(rng.choice((1, 8, 1000))))

    def insert() -> None:
        at = place()
        data[at:at] = rng.randbytes(rng.choice((1, 8)))

    def swap() -> None:
        size = rng.choice((1, 4, 32, 256))
        one, other = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
        first, second = data[one : one + size], data[other : other + size]
        data[one : one + len(second)] = second
        data[other : other + len(first)] = first

    def zero() -> None:
        where = block()
        data[where] = bytes(len(data[where]))

    def double() -> None:
        where = block()
        data[where.start : where.start] = data[where]

    ways = (flip, replace, replace_by_text, truncate, lose, append, insert, swap, zero, double)
    while True:
        way = ways[seed % len(ways)] if len(data) == len(content) else rng.choice(ways)
        for _ in range(rng.choice((1, 1, 3))):
            if data:
                way()
        if data != content:
            return bytes(data)
        data = bytearray(content)


def try_all(
    path: Path,
    read: Callable[[], Any],
    errors: type[Exception] | tuple[type[Exception], ...],
    silent: Callable[[Any, Any], bool] = lambda before, after: before != after,
) -> int:
    """Damage `path` again and again; the number of refusals.

    Args:
        read: of the damaged file. Anything that it raises must be one of `errors`, on one line that
            names the file.
        silent: whether what was read is wrong, given what was written.
    """
    content, before, refused = path.read_bytes(), read(), 0
    for seed in range(NUMBER):
        path.write_bytes(damaged(content, seed))
        try:
            after = read()
        except errors as error:
            text = str(error)
            assert "\n" not in text and path.parent.name in text, f"damage {seed}: {text}"
            refused += 1
        except Exception as error:
            raise AssertionError(f"damage {seed}: {type(error).__name__}: {error}") from error
        else:
            assert not silent(before, after), f"damage {seed} of {path.name} went unseen"
    path.write_bytes(content)
    print(f"\n{path.name}: {refused} of {NUMBER} refused, none silent, no other error")
    return refused


def model_of(seed=0):
    torch.manual_seed(seed)
    vit = backbone("plain", torch.float32)
    return pae.PromptedViT(vit, VPTDeep(3), pae.KLD(4), num_classes=5)


def values(model):
    return {name: tensor.clone() for name, tensor in model.trained_state().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_checkpoints(tmp_path):
    """Every changed byte is refused, and neither model nor backbone change."""
    path, model, vit = tmp_path / "a.safetensors", model_of(1), backbone("plain", torch.float32)
    model_of().save(path, task=pae.TaskInfo(classes=tuple("abcde")))
    model.load(path)
    with torch.no_grad():
        model.prompts.tokens += 1
    before, head, turn = values(model), vit.head, 0

    def read():
        nonlocal turn
        turn += 1
        if turn == 1:  # of the file as it was written
            return pae.read_checkpoint(path)
        try:
            if turn % 2:
                model.load(path)
            else:
                pae.PromptedViT.from_file(path, vit)
        finally:
            assert equal(values(model), before)
            assert vit.head is head and vit.training
            assert all(parameter.requires_grad for parameter in vit.parameters())

    assert try_all(path, read, pae.CheckpointError) == NUMBER


@pytest.mark.filterwarnings("ignore:.*earlier version")
def test_checkpoints_without_a_digest(tmp_path):
    """Of version 0.1: damage of the values may go unseen, but nothing else than refusals come out,
    and what is loaded is finite and of the right shape.
    """
    path = tmp_path / "old.safetensors"
    old = Path(__file__).parent / "golden" / "checkpoint-pae-1.safetensors"
    path.write_bytes(old.read_bytes())

    def read():
        return values(pae.PromptedViT.from_file(path, counted_backbone("plain")))

    def wrong(before, after):
        shapes = [{name: t.shape for name, t in each.items()} for each in (before, after)]
        return shapes[0] != shapes[1] or not all(t.isfinite().all() for t in after.values())

    assert try_all(path, read, pae.CheckpointError, wrong) >= NUMBER // 3


def test_checkpoints_of_whole_models(tmp_path):
    path, model = tmp_path / "full.safetensors", methods.FullFineTuning(backbone(), 4)
    model.save(path)

    def read():
        model.load(path)
        return {name: t.clone() for name, t in model.state_dict().items()}

    assert try_all(path, read, pae.CheckpointError, lambda *both: not equal(*both)) == NUMBER


def test_weights_in_the_cache(tmp_path, monkeypatch):
    """None that was stored with a digest is another; without one there is at least no traceback."""
    path = tmp_path / f"{embedded.WEIGHTS_NAME}.safetensors"
    monkeypatch.setattr(embedded, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(embedded, "_architecture", lambda *_: backbone())
    monkeypatch.setattr(embedded, "_resized", lambda model, *_: model.state_dict())
    methods.write_tensors(path, backbone().state_dict(), {"source": "a wheel"})

    def read():
        return embedded.load_backbone(112)

    assert try_all(path, read, embedded.FetchError, lambda *both: not equal(*both)) > NUMBER * 0.9
    save_file(backbone().state_dict(), path)
    try_all(path, read, (embedded.FetchError, ValueError), lambda *_: False)


def test_states(tmp_path):
    run = RunFolder(tmp_path)
    state = {
        "module": {"a": torch.randn(50)},
        "rows": [{"epoch": 1, "loss": 0.5}],
        "best": (1.0, 2),
    }
    run.write_state(state)
    assert try_all(run.state, run.read_state, pae.CheckpointError) == NUMBER
    again = run.read_state()
    assert torch.equal(again["module"].pop("a"), state["module"].pop("a")) and again == state


def test_records_of_a_run(tmp_path):
    """config.json, metrics.json, results.json: what was written comes back, or nothing."""
    run = RunFolder(tmp_path)
    options = Options(method="bpt", method_args={"rank": 3}, data=str(tmp_path)).resolved()
    run.write_config(options, task={"name": "birds", "classes": ["a", "b"]}, seconds=12.25)
    assert try_all(run.config, run.read_config, pae.CheckpointError) > NUMBER * 0.8
    rows = [{"epoch": n, "train_loss": 0.1 * n, "val_accuracy": 0.75} for n in range(3)]
    run.write_metrics(rows, {"name": "bpt", "val_accuracy": 0.75, "test_accuracy": None})

    def read():
        return run.rows(), run.result()

    assert try_all(run.metrics_json, read, pae.CheckpointError) > NUMBER * 0.8
    run.write_comparison([{"name": "bpt", "val_accuracy": 0.75}, {"name": "vpt-deep"}])
    assert try_all(run.path / "results.json", run.results, pae.CheckpointError) > NUMBER * 0.8


def test_a_signed_table():
    table = pae.files.signed({"a": float("nan"), "b": [1, {"c": 0.1}]})
    again = pae.files.from_json(pae.files.to_json(table))
    assert pae.files.check_signature(again) == {"a": None, "b": [1, {"c": 0.1}]}
    digest = again.pop("digest")
    assert pae.files.check_signature(again) == again  # without it, it is taken as it is
    for changed in ({"digest": digest, **again, "b": 2}, {"digesT": digest, **again}):
        with pytest.raises(ValueError, match=r'damaged or changed .* without its line "digest"'):
            pae.files.check_signature(changed)


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_files_of_options(kind, tmp_path):
    """Written by hand, so a changed digit is another wish; no damage is a traceback."""
    path = tmp_path / f"mine.{kind}"
    text = shipped()["bpt"].read_text(encoding="utf-8")
    path.write_text(text if kind == "toml" else pae.files.to_json(tomllib.loads(text), 1))

    def read():
        options, given = combine(path, read_config(path), {})
        return options.resolved(given)

    assert try_all(path, read, ValueError, lambda *_: False) > NUMBER // 4


@pytest.mark.filterwarnings("ignore")  # of what is left out
def test_lists_of_images(tmp_path):
    """train800.txt, val200.txt, test.txt and train.json: a refusal, or images that exist."""
    for name in ("vtab", "fgvc"):
        root = tmp_path / name
        (root / "images").mkdir(parents=True)
        for n in range(8):
            (root / "images" / f"{n}.png").write_bytes(b"pixels")
    lines = [f"images/{n}.png {n % 2}\n" for n in range(8)]
    for name, part in (("train800", lines[:4]), ("val200", lines[4:6]), ("test", lines[6:])):
        (tmp_path / "vtab" / f"{name}.txt").write_text("".join(part))
    tables = {f"images/{n}.png": n % 2 for n in range(8)}
    for name, part in (("train", slice(4)), ("val", slice(4, 6)), ("test", slice(6, 8))):
        table = pae.files.to_json(dict(list(tables.items())[part]))
        (tmp_path / "fgvc" / f"{name}.json").write_text(table)
    for path in (tmp_path / "vtab" / "train800.txt", tmp_path / "fgvc" / "train.json"):

        def read(root=path.parent):
            return read_folder(str(root), train_size=None, val_size=None, seed=0)

        try_all(path, read, ValueError, lambda *_: False)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["records", "dataset_info.json", "features.json", "labels"])
def test_tensorflow_datasets(name, tmp_path):
    """No other image or label comes out of a damaged record; descriptions may say something else,
    but nothing that cannot be.
    """
    pytest.importorskip("google_crc32c", reason='needs pip install "pae[data]"')
    records = [rows.example(image=rows.encoded(i), label=i % 2) for i in range(6)]
    features = {"image": rows.IMAGE, "label": rows.of_classes(2)}
    splits = {"train": records, "test": records[:2]}
    folder = rows.write_tfds(tmp_path / "1.0.0", splits, features, {"label": ["a", "b"]})
    files = {
        "records": f"{tmp_path.name}-train.tfrecord-00000-of-00001",
        "labels": "label.labels.txt",
    }

    def read():
        task = read_folder(str(folder), val_size=2)
        images = (*task.train.items, *task.val.items, *(task.test.items if task.test else ()))
        return [(str(item), item.read()) for item in images], task.train.labels, task.val.labels

    never = lambda before, after: False
    changed = lambda before, after: before != after
    refused = try_all(
        folder / files.get(name, name), read, ValueError, changed if name == "records" else never
    )
    assert refused > (NUMBER // 2 if name == "records" else 0)
