"""Runs from Python, what looks on meanwhile, and what is shared on the hub."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch

import pae
from pae.train import hub, using
from pae.train.callbacks import Tracker
from pae.train.cli import main
from pae.train.runfolder import RunFolder
from tests.train.helpers import (
    BACKBONE,
    BACKBONE_FLAGS,
    CPU_FLAGS,
    assert_same_run,
    error_line,
    save_shades,
)

HOW = {**BACKBONE, "device": "cpu", "workers": 1, "epochs": 2, "batch_size": 16, "num_tokens": 2}


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("fit") / "shades")


@pytest.fixture(scope="module")
def run(shades):
    return pae.fit("vpt-deep", shades, output=shades.parent / "first", amp="no", quiet=True, **HOW)


# ---- fit


def test_fit_is_the_command_line(run, shades, tmp_path):
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", "vpt-deep"]
    flags += ["--epochs", "2", "--batch-size", "16", "--num-tokens", "2", "--quiet"]
    assert main([*flags, "--output", str(tmp_path / "line")]) == 0
    assert_same_run(run.folder, tmp_path / "line")
    assert run.result == RunFolder(run.folder).results()[0] and len(run.metrics) == 2
    assert run.options == RunFolder(tmp_path / "line").read_config()
    assert run.model.classes == ("dark", "light", "middle") and run.model is run.model
    said = next(using.predictions(run.model, [shades / "test" / "dark" / "00.png"]))
    assert abs(float(said.probabilities.sum()) - 1) < 1e-5


def test_again_in_the_same_process(run, shades, tmp_path):
    """With another precision in between, which accelerate keeps for a whole process."""
    pae.fit("linear", shades, output=tmp_path / "a", amp="bf16", quiet=True, **BACKBONE,
            device="cpu", workers=1, epochs=1)  # fmt: skip
    again = pae.fit("vpt-deep", str(shades), output=tmp_path / "b", amp="no", quiet=True, **HOW)
    assert_same_run(run.folder, again.folder)


def test_callbacks_hear_of_a_run_and_of_one_that_goes_on(run, shades, tmp_path):
    heard = []

    class Hears(pae.Callback):
        def on_train_begin(self, module, config, folder):
            heard.append(("begin", type(module).__name__, config["num_tokens"], folder))

        def on_epoch_end(self, module, row):
            heard.append(("epoch", row["epoch"], row["val_accuracy"]))

        def on_train_end(self, module, result):
            heard.append(("end", result["test_accuracy"]))

        def close(self):
            heard.append(("close",))

    class Stops(pae.Callback):
        def on_epoch_end(self, module, row):
            raise ValueError("enough")

    how = {**HOW, "output": tmp_path / "run", "amp": "no", "quiet": True}
    with pytest.raises(ValueError, match="enough"):
        pae.fit("vpt-deep", shades, callbacks=[Hears(), Stops()], **how)
    first = run.metrics
    begin = ("begin", "PromptedViT", 2, tmp_path / "run")
    assert heard == [begin, ("epoch", 1, first[0]["val_accuracy"]), ("close",)]
    heard.clear()
    with pytest.raises(ValueError, match="is not empty"):
        pae.fit("vpt-deep", shades, **how)
    again = pae.fit("vpt-deep", shades, resume=True, callbacks=[Hears()], **how)
    assert_same_run(run.folder, again.folder)
    rest = [("epoch", 2, first[1]["val_accuracy"]), ("end", run.result["test_accuracy"])]
    assert heard == [begin, *rest, ("close",)]
    assert pae.fit("vpt-deep", shades, resume=True, **how) == again  # it has finished
    with pytest.raises(ValueError, match="holds another run: num_tokens 2, now 3"):
        pae.fit("vpt-deep", shades, resume=True, **{**how, "num_tokens": 3})


def test_wrong_options_of_fit_cost_one_line(shades, tmp_path):
    for more, words in (
        ({"num_token": 3}, "there is no option num_token; did you mean num_tokens"),
        ({"num_tokens": "many"}, "expected an integer"),
        ({"num_tokens": True}, "expected an integer"),
        ({"method": "compare"}, "runs one method"),
        ({"resume": True}, "needs output"),
        ({"data": tmp_path / "gone"}, "gone: no such folder"),
        ({"log_with": "tensorbord"}, "expected one of tensorboard"),
    ):
        with pytest.raises(ValueError) as caught:
            pae.fit(**{"data": shades, "quiet": True, **HOW, **more})
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_reach_a_tracker(run, shades, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    how = {**HOW, "output": tmp_path / "run", "amp": "no", "quiet": True}
    logged = pae.fit("vpt-deep", shades, log_with="tensorboard", **how)
    assert_same_run(run.folder, logged.folder)
    scalars = {}
    for place in {path.parent for path in logged.folder.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(place))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    losses = [(row["epoch"], pytest.approx(row["train_loss"])) for row in logged.metrics]
    assert scalars["train_loss"] == losses
    assert scalars["final_test_accuracy"][0][1] == pytest.approx(logged.result["test_accuracy"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="--log-with wandb: its package is missing: pip install"):
        Tracker("wandb")
    line = error_line(capsys, ["train", "--data", str(shades), "--log-with", "wandb"])
    assert "pip install wandb" in line


# ---- hub


class Hub:
    """The part of the hub's interface that is used, on a folder."""

    def __init__(self, root):
        self.root, self.failing, self.private = root, False, {}

    def api(self, token=None):
        assert token in (None, "mine")
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        self.private[repo_id] = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def file_exists(self, repo_id, filename):
        return (self.root / repo_id / filename).is_file()

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.failing:
            raise RuntimeError("503: the hub\nis asleep")
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return types.SimpleNamespace(repo_url=f"hub/{repo_id}")

    def download(self, repo_id, filename, revision=None, token=None):
        file = self.root / repo_id / filename
        if not file.is_file():
            raise RuntimeError(f"404: no {repo_id}")
        return str(file)


@pytest.fixture
def there(tmp_path, monkeypatch):
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", found.api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    return found


def test_prompts_go_to_the_hub_and_come_back(run, shades, there):
    url = pae.push_to_hub(run.folder, "me/shades", private=True, token="mine")
    assert url == "hub/me/shades" and there.private == {"me/shades": True}
    repo = there.root / "me" / "shades"
    assert sorted(p.name for p in repo.iterdir()) == ["README.md", "pae.safetensors"]
    assert (repo / "pae.safetensors").stat().st_size < 10_000  # prompts and head alone
    images = torch.randn(2, 3, 32, 32)
    for place in ("me/shades", repo):
        model = pae.from_pretrained(place, token="mine")
        assert torch.equal(model(images), run.model(images)) and model.classes == run.model.classes
    card = (repo / "README.md").read_text()
    accuracy = f"{run.result['test_accuracy']:.4f}, one run, seed 0"
    for words in ("test_vit", "VPTDeep(num_tokens=2", "dark, light, middle", accuracy, "29 train",
                  '"me/shades"', "library_name: pae", "# license: to be filled in"):  # fmt: skip
        assert words in card, words
    assert "\nlicense:" not in card and str(Path(shades).parent) not in card
    (repo / "README.md").write_text("my own words")
    pae.push_to_hub(run.folder / "best.safetensors", "me/shades")
    assert (repo / "README.md").read_text() == "my own words"
    pae.push_to_hub(run.folder, "me/shades", card="new words")
    assert (repo / "README.md").read_text() == "new words"


def test_what_fails_at_the_hub_costs_one_line_and_loses_nothing(run, there, tmp_path):
    before = (run.folder / "best.safetensors").read_bytes()
    there.failing = True
    with pytest.raises(OSError, match="me/a: the upload failed \\(503: the hub is asleep\\)"):
        pae.push_to_hub(run.folder, "me/a")
    assert (run.folder / "best.safetensors").read_bytes() == before
    with pytest.raises(OSError, match=r"me/b: pae\.safetensors cannot be had \(404"):
        pae.from_pretrained("me/b")
    with pytest.raises(OSError, match=r"no pae\.safetensors in it"):
        pae.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        pae.push_to_hub(tmp_path / "gone", "me/a")


def test_a_card_of_a_checkpoint_alone_invents_nothing(run, tmp_path):
    file = shutil.copy(run.folder / "best.safetensors", tmp_path / "a.safetensors")
    card = hub.model_card(file)
    assert "accuracy" not in card and "| data |" not in card and "VPTDeep" in card
