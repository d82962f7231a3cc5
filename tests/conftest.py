"""How the tests run (processes, threads), and shared fixtures: golden vectors, their backbone."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

GOLDEN = Path(__file__).parent / "golden"

# tiny tensors: a second thread only waits for the first, and badly when the machine is shared;
# other numbers of threads round differently, which a wider run asks for
torch.set_num_threads(int(os.environ.get("PAE_TEST_THREADS", "1")))

# under nohup it is ignored, by all that is started too; the tests that send it want it to arrive
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# ---- examples of property tests
#
# An ordinary run draws the same ones everywhere. `pytest --fresh`, or PAE_FRESH=1 for tests that
# start pytest themselves, draws others, and more of them; a failure prints its seed, and
# `pytest --fresh --hypothesis-seed=SEED FILE::TEST` draws them again.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile(
    "fresh", derandomize=False, database=None, deadline=None, print_blob=True
)


def pytest_addoption(parser):
    parser.addoption("--fresh", action="store_true", help="property tests draw new examples")


def _fresh(config: pytest.Config) -> bool:
    return config.getoption("--fresh") or os.environ.get("PAE_FRESH", "") not in ("", "0")


def pytest_configure(config):
    hypothesis.settings.load_profile("fresh" if _fresh(config) else "fixed")
    if _fresh(config) and config.getoption("--hypothesis-seed", None) is None:
        # every worker, and whoever goes through a failure again, draws with this one
        given = getattr(config, "workerinput", {}).get("pae_seed")
        config.option.hypothesis_seed = given or str(random.SystemRandom().randrange(2**32))
        hypothesis.core.global_force_seed = int(config.option.hypothesis_seed)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["pae_seed"] = str(node.config.option.hypothesis_seed)


def pytest_report_header(config):
    if _fresh(config):
        return f"fresh examples: --fresh --hypothesis-seed={config.option.hypothesis_seed}"
    return None


def pytest_terminal_summary(terminalreporter, config):
    if _fresh(config) and terminalreporter.stats.get("failed"):
        seed = config.option.hypothesis_seed
        failed = dict.fromkeys(r.nodeid for r in terminalreporter.stats["failed"])
        terminalreporter.section("the same examples again")
        for nodeid in failed:
            terminalreporter.write_line(f'pytest --fresh --hypothesis-seed={seed} "{nodeid}"')


# ---- processes
#
# `pytest` runs the files side by side, one process per core. A file stays in one process, with
# its fixtures, unless it is in APART: its tests are long, and are handed out one by one. What
# takes longest starts first, so that no core is left with it at the end.
APART = (
    "pae/test_random_models.py",
    "kernels/test_triton_compile.py",
    "kernels/test_triton_interpreter.py",
    "bench/test_bench_command.py",
    "bench/test_bench_clock.py",
    "test_dry_run.py",
)
FIRST = (
    "train/test_train_loop.py",
    "pae/test_engine.py",
    "train/test_train_cli.py",
    "kernels/",
    "test_docs.py",
)
MOST_PROCESSES = 8  # each holds PyTorch, about 0.5 GB


def _side_by_side(config: pytest.Config) -> bool:
    """Whether the tests go to several processes: unless told otherwise, and not for a few tests."""
    option = config.option
    if getattr(option, "numprocesses", "no such plug-in") is not None:
        return False
    if "PYTEST_CURRENT_TEST" in os.environ:  # started by a test
        return False
    if option.collectonly or option.usepdb or getattr(option, "benchmark_only", False):
        return False
    return not any("::" in argument for argument in config.args)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`-n auto` unless the command says otherwise; here, as bench/ must stay in one process."""
    if not hasattr(config, "workerinput") and _side_by_side(config):
        config.option.numprocesses = "auto"
        config.option.maxprocesses = config.option.maxprocesses or MOST_PROCESSES
        config.option.loadscopereorder = False


def _from_here(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("tests/")[2]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _from_here(nodeid)
            return nodeid if file in APART else file

    return ByFile(config, log)


def _turn(item: pytest.Item) -> int:
    file = _from_here(item.nodeid)
    if file in APART:
        return 0
    return next((i for i, start in enumerate(FIRST, 1) if file.startswith(start)), len(FIRST) + 1)


def pytest_collection_modifyitems(items):
    items.sort(key=_turn)


def pytest_collection_finish():
    """What imports and collection made stays: no search for garbage need go through it again."""
    gc.freeze()


# ---- fixtures


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def poisoned_memory():
    """Every tensor from torch.empty starts as NaN, so that an entry nobody writes cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """golden("vpt_deep") -> the arrays of that file; see tests/golden/README.md."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture
def tiny_vit(golden) -> Callable[..., VisionTransformer]:
    """tiny_vit(dtype) -> timm model with the frozen weights that the golden vectors belong to."""

    def build(dtype: torch.dtype = torch.float32) -> VisionTransformer:
        vit = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=64,
            depth=4,
            num_heads=4,
            mlp_ratio=2,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_classes=10,
        )
        weights = golden("backbone")
        names = [key for key in weights if key.startswith("timm/")]
        vit.load_state_dict({n.removeprefix("timm/"): torch.from_numpy(weights[n]) for n in names})
        return vit.to(dtype)

    return build
