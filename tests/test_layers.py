"""The house itself: which layer imports which, what importing costs, which names are public."""

import ast
import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch

import pae
import pae_kernels
from pae_kernels import cpu
from tests import processes

ROOT = Path(__file__).parent.parent


def imports_of(file, for_types=True):
    """(module, name or None) of every import in a source file, at any depth of its code.

    Without `for_types`, those alone that Python runs: not below `if TYPE_CHECKING`.
    """
    package = ".".join(file.relative_to(ROOT).with_suffix("").parts[:-1])
    tree = ast.parse(file.read_text())
    checked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and not for_types]
    checked = [n.body for n in checked if ast.unparse(n.test).endswith("TYPE_CHECKING")]
    unread = {node for body in checked for line in body for node in ast.walk(line)}
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join(start) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            yield from ((base, alias.name) for alias in node.names)


def imported(file):
    """Absolute names of all modules that a source file imports, at any depth of its code."""
    found = set(imports_of(file))
    return {base for base, _ in found} | {f"{base}.{name}" for base, name in found if name}


def sources(*parts):
    files = sorted(ROOT.joinpath(*parts).rglob("*.py"))
    assert files
    return files


def within(name, package):
    return name == package or name.startswith(package + ".")


def test_kernels_never_import_pae():
    for file in sources("pae_kernels"):
        assert not [n for n in imported(file) if within(n, "pae")], file
    code = "import sys, pae_kernels, pae_kernels.__main__; print('pae' in sys.modules)"
    assert run(code) == "False"


def test_references_import_no_kernel():
    """The definition stands alone: torch and other references, no op, no backend, no library."""
    names = {"reference", "spectral"}  # the latter is part of the definition of koopman_losses
    files = [f for f in sources("pae_kernels") if f.stem in names]
    assert len(files) >= 3
    for file in files:
        for name in imported(file):
            if within(name, "pae_kernels"):
                rest = name.split(".")
                # `precision` is PyTorch's flags and a product under them
                assert (names | {"precision"}) & set(rest), f"{file} imports {name}"
                assert not {"op", "triton", "cuda", "native", "backends"} & set(rest)
            assert not within(name, "triton"), file


def test_families_know_no_engine():
    for file in sources("pae", "prompts"):
        inner = [n for n in imported(file) if within(n, "pae")]
        assert all(within(n, "pae.prompts") for n in inner), (file, inner)


def edges(packages):
    """Module -> modules of these packages that it imports, inside functions too: those named, and
    the packages around them that it is not in itself.
    """
    files = {f: f.relative_to(ROOT).with_suffix("").parts for p in packages for f in sources(p)}
    files = {f: ".".join(p[:-1] if p[-1] == "__init__" else p) for f, p in files.items()}
    modules, found = set(files.values()), {}
    for file, own in files.items():
        below = set()
        for base, name in imports_of(file, for_types=False):
            target = f"{base}.{name}" if f"{base}.{name}" in modules else base
            parts = target.split(".")
            around = {".".join(parts[:k]) for k in range(1, len(parts))}
            below |= {target} | {p for p in around if not within(own, p)}
        found[own] = below & modules - {own}
    return found


def circle(graph):
    """Modules that import each other, directly or through others; empty when there are none."""
    graph = dict(graph)
    while done := [m for m, below in graph.items() if not below & graph.keys()]:
        for module in done:
            del graph[module]
    path = list(graph)[:1]
    while path and path[-1] not in path[:-1]:  # what is left leads on for ever
        path.append(min(graph[path[-1]] & graph.keys()))
    return path[path.index(path[-1]) :] if path else []


@pytest.mark.parametrize("packages", [("pae_kernels", "pae"), ("pae_kernels", "pae", "bench")])
def test_no_module_imports_itself_through_others(packages):
    assert not circle(edges(packages))


def test_circles_are_found():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": set(), "e": {"a"}}
    assert sorted(circle(graph)[:-1]) == ["a", "b", "c"]
    assert circle({"a": {"b"}, "b": set()}) == []


def test_nothing_below_imports_the_training_loop():
    for file in [
        *(ROOT / "pae").glob("*.py"),
        *sources("pae", "prompts"),
        *sources("pae", "backbones"),
    ]:
        if file.name != "__main__.py":  # for type checkers a name of it may be known
            found = [base for base, _ in imports_of(file, for_types=False)]
            assert not [n for n in found if within(n, "pae.train") or within(n, "train")], file


def run(code, **environment):
    """Standard output of `python -c code` at the root of the repository."""
    return processes.run([sys.executable, "-c", code], env=environment).stdout.strip()


IMPORT = """
import json, sys, time
import torch
start = time.process_time()
import timm
between, before, state = time.process_time(), set(sys.modules), torch.get_rng_state()
import pae
pae.__all__  # what there is gets imported when it is first asked for
print(json.dumps({
    "added": (time.process_time() - between) / (between - start),
    "modules": sorted(set(sys.modules) - before),
    "state_kept": state.equal(torch.get_rng_state()),
}))
"""


def import_measured():
    """A fresh process that imports timm and then pae: what the second import adds."""
    return json.loads(run(IMPORT, OMP_NUM_THREADS="1"))


@pytest.fixture(scope="module")
def imports():
    return import_measured()


def test_import_costs_little_more_than_timm(imports):
    """At most 1.3 times, torch itself not counted on either side, which only makes it harder."""
    added = imports["added"]
    if added > 0.3:  # the process may have been disturbed
        added = min(added, import_measured()["added"])
    assert added <= 0.3, f"import pae costs {1 + added:.2f} times import timm"


HEAVY = {"accelerate", "matplotlib", "onnx", "open_clip", "pandas", "pytest", "rich", "scipy"}
HEAVY |= {"tqdm", "transformers", "triton"}


def test_import_brings_no_heavy_package(imports):
    packages = {name.split(".")[0] for name in imports["modules"]}
    assert {"pae", "pae_kernels"} <= packages
    assert packages.isdisjoint(HEAVY)
    assert "pae.train" not in imports["modules"]


def test_import_draws_no_random_number(imports):
    assert imports["state_kept"]


# ---- names


def test_public_names():
    assert set(pae.__all__) == {
        "KLD",
        "SETRPUP",
        "Callback",
        "Checkpoint",
        "CheckpointError",
        "LinearHead",
        "MPAResult",
        "NullSpace",
        "OfficialParts",
        "PromptedCLIP",
        "PromptedSegmenter",
        "PromptedText",
        "PromptedViT",
        "Run",
        "TaskInfo",
        "UnsupportedBackbone",
        "__version__",
        "adopt",
        "analysis",
        "condense",
        "fast_forward",
        "fit",
        "from_pretrained",
        "graphed_step",
        "load",
        "load_official",
        "mpa_init",
        "prompted_clip",
        "prompts",
        "push_to_hub",
        "read_checkpoint",
        "serve_many",
        "spt_init",
        "whiten_init",
    }
    assert all(hasattr(pae, name) for name in pae.__all__)
    assert {"VPTDeep", "VPTShallow", "PromptFamily", "BackboneShape"} <= set(pae.prompts.__all__)
    assert {"class_attention", "prompt_attention"} <= set(pae_kernels.__all__)
    assert issubclass(pae.UnsupportedBackbone, ValueError)
    assert issubclass(pae.CheckpointError, RuntimeError)


SIGNATURES = {
    "PromptedViT": "backbone, prompts, kld=None, num_classes=None",
    "fast_forward": "model, images, memory='keep'",
    "mpa_init": "model, images, labels=None, window=16, stride=8, head='as_is'",
    "KLD": (
        "dim=256, mode='global', consistency_weight=0.5, lyapunov_weight=0.2, formulation='code'"
    ),
    "prompts.VPTDeep": "num_tokens, dropout=0.0, dropout_scope='batch'",
    "prompts.VPTShallow": "num_tokens, dropout=0.0, dropout_scope='batch'",
    "PromptedViT.parameter_groups": "self, lr, weight_decay",
    "PromptedViT.penalty": "self",
    "PromptedViT.save": "self, path",
    "PromptedViT.load": "self, path",
    "PromptedViT.from_file": "path, backbone",
    "KLD.terms": "self, prompts",
    "KLD.clip_gradients": "self, max_norm=10.0",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name):
    """In this order and with these defaults; further optional arguments may follow."""
    thing = pae
    for part in name.split("."):
        thing = getattr(thing, part)
    parameters = inspect.signature(thing).parameters.values()
    given = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    expected = SIGNATURES[name].split(", ")
    assert given[: len(expected)] == expected
    assert all("=" in rest for rest in given[len(expected) :])


def public_functions():
    for name in pae.__all__:
        thing = getattr(pae, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            yield name, thing
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function


@pytest.mark.parametrize("name, thing", list(public_functions()))
def test_everything_public_has_a_docstring(name, thing):
    assert inspect.getdoc(thing), name


def test_packages_are_typed():
    for package in (pae, pae_kernels):
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_versions_agree():
    from pae.version import __version__

    assert pae.__version__ == __version__


def test_ops_are_registered_under_one_namespace():
    import pae_kernels.__main__  # noqa: F401  (imports every op)

    names = "prompt_attention_fwd prompt_attention_bwd layer_norm_fwd layer_norm_bwd"
    for name in f"{names} activation_fwd activation_coded_fwd activation_bwd".split():
        assert hasattr(torch.ops.pae, name)


def test_table_of_versions(capsys):
    importlib.import_module("pae_kernels.__main__").main([])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:3] for line in lines[2:]]
    chosen = "reference" if cpu.unavailable() else "cpu"
    for op in ("prompt_attention", "pointwise", "koopman_losses"):
        assert [op, "cpu", chosen] in rows
    assert ["shortcut_tokens", "cpu", "reference"] in rows


def test_references_differentiate_by_themselves():
    """A reference is the definition: plain autograd through it, no custom function inside."""
    for file in sources("pae_kernels"):
        if file.name == "reference.py":
            text = file.read_text()
            assert "autograd.Function" not in text, file
            assert "torch.ops.pae" not in text, file
