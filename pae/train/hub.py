"""Sharing what was trained on the Hugging Face hub: the checkpoint alone, and a card that says what
it is. The backbone stays where it is, and is built again when the checkpoint is loaded.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from pae.errors import one_line
from pae.train import using
from pae.train.runfolder import write_bytes

FILE = "pae.safetensors"  # in a repository


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload prompts trained with pae",
    card: str | None = None,
) -> str:
    """Upload a run's best checkpoint, or a checkpoint, with a model card; nothing here changes.

    Args:
        run: a run's folder, or a checkpoint, as of `pae.load`.
        repo_id: "owner/name"; made where it is not there.
        private, token: as of `huggingface_hub.HfApi`.
        commit_message: of the upload.
        card: the text of README.md; None: `model_card`'s. An own README.md that is there already
            is kept, unless a card is given.

    Returns:
        Where it lies.

    Raises:
        CheckpointError, ValueError: the checkpoint cannot be read; a whole model, which has no
            prompts to share.
        OSError: the upload failed, in one line; what is here is as it was.
    """
    place = using.find(run)
    text = model_card(place.file, repo_id) if card is None else card
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(place.file, Path(scratch, FILE))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if card is not None or not api.file_exists(repo_id, "README.md"):
                write_bytes(Path(scratch, "README.md"), text.encode())
            found = api.upload_folder(
                repo_id=repo_id, folder_path=scratch, commit_message=commit_message
            )
        except Exception as error:  # the hub's client raises whatever its parts raise
            raise OSError(
                f"{repo_id}: the upload failed ({one_line(error)}); {place.file} is as it was"
            ) from error
    return str(getattr(found, "repo_url", None) or repo_id)


def from_pretrained(
    repo_id: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> using.Loaded:
    """A model that `push_to_hub` shared, as `pae.load` gives it.

    Args:
        repo_id: "owner/name" on the hub, or a folder with the repository's files.
        revision, token: as of `huggingface_hub.hf_hub_download`.
        options: as of `pae.load`.

    Raises:
        OSError: it cannot be had, in one line.
        CheckpointError, ValueError: as `pae.load`.
    """
    folder = Path(repo_id)
    if folder.is_dir():
        file = folder / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no {FILE} in it")
    else:
        import huggingface_hub

        try:
            file = Path(
                huggingface_hub.hf_hub_download(str(repo_id), FILE, revision=revision, token=token)
            )
        except Exception as error:  # as above
            raise OSError(f"{repo_id}: {FILE} cannot be had ({one_line(error)})") from error
    return using.load(file, **options)


def model_card(run: str | Path, repo_id: str = "OWNER/NAME") -> str:
    """What a checkpoint and its run say of themselves, as a card of the hub. Nothing is invented:
    licence and intended use are left to be filled in.

    Args:
        run: as of `push_to_hub`.
        repo_id: for the lines that show how it is loaded.

    Raises:
        CheckpointError, ValueError: as `push_to_hub`.
    """
    place = using.find(run)
    table = using.describe(place)
    if "prompts" not in table:
        raise ValueError(f"{place.file} holds a whole model, and no prompts to share")
    recipe, images = table.get("built by") or {}, table.get("images") or {}
    classes = table.get("classes") or []
    name = recipe.get("model", table["backbone"])
    source, _, inner = name.partition(":")
    if inner:  # a folder's name, which travels without the folder around it, is none of the hub
        base = inner if source in ("hf", "hf-hub", "hf_hub") and "/" in inner else None
    else:
        base = f"timm/{name}" if "." in name else None
    head = ["library_name: pae", "pipeline_tag: image-classification"]
    head += ["tags: [pae, visual-prompt-tuning]"]
    head += [f"base_model: {base}"] if base else []
    arguments = ", ".join(f"{k}={v}" for k, v in table["arguments"].items())
    lines = ["---", *head, "# license: to be filled in; the backbone and the images have their own"]
    lines += ["---", "", f"# {repo_id}", ""]
    what = "Prompts and head for a frozen vision transformer"
    if "text tower" in table:
        what = "Prompts for the two frozen towers of a CLIP"
    lines += [f"{what}, trained with pae.", ""]
    lines += ["| | |", "|---|---|"]
    rows: dict[str, Any] = {
        "backbone": f"{name} (fingerprint {table['fingerprint']})",
        "prompts": f"{table['prompts']}({arguments})",
        "regulariser": "KLD" if table["kld"] else None,
        "parameters in the file": f"{table['parameters']:,}",
        "classes": f"{len(classes)}: " + ", ".join(classes[:20]) + ", ..." * (len(classes) > 20)
        if classes
        else None,
        "images": ", ".join(f"{k} {v}" for k, v in images.items()) or None,
        "versions": ", ".join(f"{k} {v}" for k, v in table["versions"].items()),
    }
    facts = {} if place.run is None else place.run.facts()
    task, result = facts.get("task") or {}, table.get("result") or {}
    if task:
        sizes = ", ".join(f"{task[k]} {k}" for k in ("train", "val", "test") if task.get(k))
        rows["data"] = f"{task.get('name')} ({sizes} images)"
    for split in ("val", "test"):
        accuracy = result.get(f"{split}_accuracy")
        if accuracy is not None:
            rows[f"{split} accuracy"] = f"{accuracy:.4f}, one run, seed {_seed(facts)}"
    lines += [f"| {k} | {_cell(v)} |" for k, v in rows.items() if v is not None]
    lines += ["", "```python", "import pae", "", f'model = pae.from_pretrained("{repo_id}")']
    lines += ["logits = model(model.transform(image)[None])  # an image of PIL, or a path", "```"]
    lines += ["", "Licence, intended use and limits: to be filled in.", ""]
    return "\n".join(lines)


def _seed(facts: dict[str, Any]) -> Any:
    return (facts.get("settings") or {}).get("seed")


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
