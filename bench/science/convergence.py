"""What PAE's parts do to VPT-deep, on several real tasks, from several seeds.

    python -m bench.science.convergence run --output runs/science [--datasets ...] [--seeds ...]
    python -m bench.science.convergence report --output runs/science --to bench/results/science

Arms: VPT-deep; with the Koopman-Lyapunov regulariser; with the regulariser on normalised prompts
("gauge"); with Modal Pre-Alignment under the fresh head, and under a linear probe's head; with
both, which is PAE; and PAE on normalised prompts. All share data cut, order and first head per
seed, so differences are taken seed by seed. One recipe for all arms.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import runs

# names agree with `bench.science.families`, so that both studies share their runs
ARMS = {
    "vpt-deep-plain": {},
    "vpt-deep-kld": {"kld": True},
    "vpt-deep-mpa": {"mpa": True},
    "vpt-deep-pae": {"kld": True, "mpa": True},
    "vpt-deep-pae-gauge": {"kld": True, "mpa": True, "kld_gauge": "layernorm"},
    "vpt-deep-mpa-probe": {"mpa": True, "mpa_head": "linear_probe"},
}
DATASETS = ("pneumonia", "elpv-defect", "fashion-mnist")


def cells(datasets, seeds, arms=tuple(ARMS)):
    """All runs, seeds outermost: an early stop leaves whole seeds."""
    for seed in seeds:
        for dataset in datasets:
            for name in arms:
                yield runs.Cell(name, dataset, seed, ARMS[name])


def run(arguments) -> None:
    chosen = cells(arguments.datasets, arguments.seeds, arguments.arms)
    runs.run(chosen, Path(arguments.output), arguments.test_size, **runs.sizes(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.science.convergence")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run")
    command.set_defaults(work=run)
    command.add_argument("--output", required=True, help="folder of the runs")
    command.add_argument("--datasets", nargs="+", default=list(DATASETS))
    command.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    runs.add_arguments(command)
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    main()
