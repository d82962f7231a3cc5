"""`python -m pae_kernels`: which version of every op runs here, and why. With `--compile` instead:
registers, shared memory and spills of every Triton tile that ships, without a GPU.
"""

import argparse

import torch

from . import (  # noqa: F401  (importing registers the ops)
    adaptive,
    ahead_of_time,
    attention,
    backends,
    koopman,
    native,
    pointwise,
    spectrum,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pae_kernels", description=__doc__)
    parser.add_argument(
        "--compile", action="store_true", help="compile the Triton tiles and print what they take"
    )
    if parser.parse_args(arguments).compile:
        for line in ahead_of_time.table():
            print(line, flush=True)
        return
    print(
        f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}, ", end=""
    )
    print(f"PAE_BACKEND={backends.forced() or 'auto'}")
    print(f"compiled CUDA kernels: {native.describe()}")
    print(f"{'op':<20}{'device':<8}{'version':<12}not available")
    for op, device, chosen, why in backends.table():
        print(f"{op:<20}{device:<8}{chosen:<12}{why}")


if __name__ == "__main__":
    main()
