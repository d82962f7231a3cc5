"""The documentation builds, its examples run, and its tables say what the library does."""

import ast
import io
import json
import posixpath
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import pae
import pae_kernels
from tests import processes, snippets, tiny

ROOT = Path(__file__).parent.parent

from bench.pages import UNMEASURED  # noqa: E402
from docs import docstrings, drawings, hooks  # noqa: E402

ARGUMENTS = {"BPTDeep": (4, 4), "BPTShallow": (4, 4), "DAVPT": (4, 4, 5)}


@pytest.fixture(autouse=True)
def registered():
    """What pages register is theirs alone."""
    before = dict(pae.prompts.METHODS)
    yield
    pae.prompts.METHODS.clear()
    pae.prompts.METHODS.update(before)


def rows():
    text = (ROOT / "docs" / "families.md").read_text()
    cells = [
        [c.strip() for c in line.strip("|\n").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_family_has_a_row():
    table = rows()
    assert {name: row[0].strip("`") for name, row in table.items()} == {
        family.__name__: method for method, family in pae.prompts.METHODS.items()
    }
    classes = {
        name
        for name in pae.prompts.__all__
        if isinstance(getattr(pae.prompts, name), type)
        and issubclass(getattr(pae.prompts, name), pae.prompts.PromptFamily)
    }
    assert classes - {"PromptFamily"} == set(table)


def test_every_pair_has_a_row():
    """In the table of pairs, whose rows begin otherwise."""
    text = (ROOT / "docs" / "families.md").read_text()
    found = dict(re.findall(r"^\| (\w+) \| `([a-z][a-z-]*)` \|", text, re.MULTILINE))
    assert found == {pair.__name__: method for method, pair in pae.prompts.PAIRS.items()}


def made(name, kld=None):
    family = getattr(pae.prompts, name)(*ARGUMENTS.get(name, (4,)))
    return pae.PromptedViT(tiny.backbone(dtype=torch.float32), family, kld).train()


@pytest.mark.parametrize("name", rows())
def test_kld_column(name):
    if rows()[name][3].startswith("yes"):
        model = made(name, pae.KLD(dim=4))
        pae.fast_forward(model, tiny.images(model.backbone))
        model.prompts.see_labels(torch.tensor([0, 1, 2]))
        model.kld.terms(model.prompts.raw_prompts())[0].backward()
        return
    with pytest.raises(ValueError, match="kld"):
        made(name, pae.KLD(dim=4))


@pytest.mark.parametrize("name", rows())
def test_mpa_and_spt_column(name):
    model = made(name)
    x, y = tiny.images(model.backbone), torch.tensor([0, 1, 2])
    before = [p.clone() for p in model.prompts.parameters()]
    starts = (
        lambda: pae.mpa_init(model, x, y, window=4, stride=3, progress=False),
        lambda: pae.spt_init(model, x),
    )
    for start in starts:
        if rows()[name][4].startswith("yes"):
            start()
            changed = [not torch.equal(a, b) for a, b in zip(before, model.prompts.parameters())]
            assert any(changed)
        else:
            with pytest.raises(ValueError, match=r"model\.prompts"):
                start()


@pytest.mark.parametrize("name", rows())
def test_column_of_numbers(name):
    """What is called proven is in a file of the released code's numbers, and a test that runs both
    engines reads it into this family; what is reconstructed says so itself.
    """
    said, _, files = rows()[name][5].partition(": ")
    if said == "reconstructed":
        assert "Reconstructed" in getattr(pae.prompts, name).__doc__
        return
    assert said.startswith("proven")
    tests = [path.read_text() for path in (ROOT / "tests" / "pae").glob("test_*.py")]
    tests = [text for text in tests if re.search(rf"\b{name}\b", text) and "engine" in text]
    for file in files.split(", "):
        assert (ROOT / "tests" / "golden" / f"{file}.npz").is_file()
        assert any(f'"{file}"' in text for text in tests), file


@pytest.mark.parametrize("name", rows())
def test_column_of_who_shares_prompts(name, monkeypatch):
    model = made(name)
    seen = {}
    view, family = model.view, model.prompts
    run_block = view.run_block

    def keep(index, x, *others):
        seen[index] = x
        return run_block(index, x, *others)

    monkeypatch.setattr(view, "run_block", keep)
    if name == "APT":  # in head space: no rows to look at
        assert family.head_keys_values(0, tiny.images(model.backbone)).dim() == 4
        assert rows()[name][2] == "batch"
        return
    if name == "ApproximatedPrompts":  # nor does anything of it stand in a sequence
        assert family.bypasses_attention and not any(family.prompt_counts)
        assert rows()[name][2] == "batch"
        return
    model.eval()
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model(tiny.images(model.backbone))
    # in the second block, so that what was made of an image's rows is seen; living rows are the
    # image's own from the first block on, whoever gave them
    index = 0 if family.enters_sequence and not family.rewrites_rows else 1
    prompts = seen[index][:, view.num_prefix_tokens :][:, :4]
    shared = torch.equal(prompts[0], prompts[1])
    assert shared == (rows()[name][2] == "batch")


def test_column_of_proofs():
    """Every file that it names is there and read by a test; what has none is called so."""
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "pae").glob("test_*.py"))
    for name, row in rows().items():
        said, _, files = row[5].partition(": ")
        assert said in ("proven", "proven on images") if files else said == "reconstructed", name
        for file in filter(None, files.split(", ")):
            assert (ROOT / "tests" / "golden" / f"{file}.npz").is_file(), (name, file)
            assert f'"{file}"' in tests, (name, file)


@pytest.mark.parametrize(
    "name", re.findall(r"`pae\.([\w.]+)`", (ROOT / "docs" / "families.md").read_text())
)
def test_names_exist(name):
    thing = pae
    for part in name.split("."):
        thing = getattr(thing, part)


def name_of(page):
    return str(page.relative_to(ROOT))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [page for page in PAGES if "```python" in page.read_text()]
# its kernel runs on a CPU in Triton's interpreter, which is chosen when Triton is imported
INTERPRETED = ROOT / "docs" / "add-an-op.md"


@pytest.mark.parametrize("page", EXAMPLES, ids=name_of)
def test_every_example_runs(page, tmp_path):
    found = snippets.snippets(page)
    assert len(found) == page.read_text().count("```python")
    if page != INTERPRETED:
        assert snippets.run(page, tmp_path) == len(found)
        return
    pytest.importorskip("triton")
    run = processes.run(
        [sys.executable, "-m", "tests.snippets", page],
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout == f"{len(found)} blocks\n", run.stderr


def test_a_broken_example_is_found_where_it_stands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n    ```python\n    a = images.shape\n    assert a == 1\n    ```\n")
    with pytest.raises(AssertionError) as caught:
        snippets.run(page, tmp_path)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno) == (page, 4)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; mkdocs is strict about links and anchors, and finds no network."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with mock.patch.object(socket.socket, "connect", side_effect=OSError("no network here")):
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    pages = [p for p in folder.rglob("*") if p.suffix in (".html", ".js")]
    return {p.relative_to(folder).as_posix(): p.read_text() for p in pages}


def test_search_works_without_a_server(site):
    """A page that is opened from a disk may fetch no index and start no worker: the index is a
    script, which holds all pages, and a stand-in for the worker stands before the theme's script.
    """
    script = site["search/search_index.js"]
    assert script.startswith("var __index = {")
    index = json.loads(script.removeprefix("var __index = "))
    found = {entry["location"].partition("#")[0] or "index.html" for entry in index["docs"]}
    pages = {name: page for name, page in site.items() if name.endswith(".html")}
    assert found == pages.keys() - {"404.html"} and len(found) > 15
    texts = " ".join(word for entry in index["docs"] for word in entry["text"].split())
    assert "fast_forward" in texts and "sets that attention picks per image" in texts
    assert "file:" in site["iframe-worker.js"]
    for name, page in pages.items():
        if name == "404.html":  # of a server alone, whose addresses are absolute
            continue
        scripts = re.findall(r"""<script src=["']?([^"'> ]+)""", page)
        local = [posixpath.normpath(posixpath.join(posixpath.dirname(name), s)) for s in scripts]
        theme = next(i for i, s in enumerate(local) if "/bundle." in s)
        assert local.index("iframe-worker.js") < theme, name
        worker = re.search(r'"search": ?"([^"]+)"', page)[1]
        assert posixpath.normpath(posixpath.join(posixpath.dirname(name), worker)) in site


def test_a_figure_may_only_be_missing_where_nothing_is_measured():
    assert hooks.UNMEASURED == UNMEASURED
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/page.md"))
    files = SimpleNamespace(get_file_from_path={"figures/a.svg": "a file"}.get)
    text = "words\n\n![a](../figures/a.svg)\n\n![b](../figures/b.svg)\n"
    assert hooks.on_page_markdown(text, page, None, files) == text
    text += hooks.UNMEASURED
    left = hooks.on_page_markdown(text, page, None, files)
    assert left == text.replace("![b](../figures/b.svg)", "")


def test_site_loads_nothing_from_elsewhere(site):
    for name, page in site.items():
        if not name.endswith(".html"):
            continue
        tags = re.findall(r"<(?:script|link|img|iframe)[^>]*>", page)
        assert not [tag for tag in tags if re.search(r"""(src|href)=["']?(https?:)?//""", tag)], (
            name
        )


def test_links_of_pages_outside_the_site(site):
    """Inside, mkdocs has looked: a site with a broken link or anchor is not built."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", prose):
            path = (page.parent / target).resolve()
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                built = path.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
                assert f'id="{anchor}"' in site[built], f"{page.name}: {target}#{anchor}"


def test_every_public_name_is_in_the_api(site):
    pages = "".join(page for name, page in site.items() if name.startswith("api/"))
    for module in (pae, pae.prompts, pae.analysis, pae_kernels):
        for name in module.__all__:
            full = f"{module.__name__}.{name}"
            if isinstance(getattr(module, name), type(pae)) or name == "__version__":
                assert f"<code>{full}</code>" in pages
            else:
                assert f'id="{full}"' in pages, full


def test_docstrings_become_markdown():
    got = docstrings.as_markdown(
        "Numerics: a first line stays.\n\n"
        "Args:\n    a: (B,). b, c: as `a<b`.\n\n"
        "Attributes:\n    d, e: both.\n\n"
        "Returns:\n    (B,), as a <- b. Note: <x, y>.\n\n"
        "Raises:\n    ValueError: naming what it\n    was.\n\n"
        "Numerics: sums in\n    fp32.\nSource: us.\n\n    code <x>",
        "Tensor",
    )
    assert got == (
        "Numerics: a first line stays.\n\n"
        "Args:\n    a: (B,).\n    b, c: as `a<b`.\n\n"
        "Attributes:\n    d,\N{NO-BREAK SPACE}e: both.\n\n"
        "Returns:\n    Tensor: (B,), as a <- b. Note: &lt;x, y>.\n\n"
        "Raises:\n    ValueError: naming what it\n        was.\n\n"
        "\n**Numerics:** sums in\nfp32.\n\n**Source:** us.\n\n    code <x>"
    )


def test_drawings(tmp_path):
    shown = re.findall(r"\]\(figures/([\w-]+)\.svg\)", (ROOT / "docs/how-it-works.md").read_text())
    assert sorted(shown) == sorted(drawings.DRAWINGS)
    for name, draw in drawings.DRAWINGS.items():
        for suffix in ("svg", "png"):
            committed = ROOT / "docs" / "figures" / f"{name}.{suffix}"
            assert 5_000 < committed.stat().st_size < 150_000, committed
        drawn = io.StringIO()
        draw().savefig(drawn, format="svg")
        assert "</svg>" in drawn.getvalue()


def words_of(path):
    """Every constant part of a string in a Python file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def test_messages_in_troubleshooting_exist():
    sources = [*(ROOT / "pae").rglob("*.py"), *(ROOT / "pae_kernels").rglob("*.py")]
    words = [w for path in (*sources, *(ROOT / "csrc").glob("*.py")) for w in words_of(path)]
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL)).splitlines()
    assert len(messages) > 30
    for message in messages:
        for part in filter(None, (p.strip() for p in message.split("…"))):
            assert any(part in w for w in words), f"{message}: {part!r}"
