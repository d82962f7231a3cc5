"""`python -m pae_kernels`: which version of every op runs here, and why."""

import torch

from . import attention, backends, koopman, pointwise, spectrum  # noqa: F401  (importing registers the ops)


def main() -> None:
    print(
        f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}, ", end=""
    )
    print(f"PAE_BACKEND={backends.forced() or 'auto'}")
    print(f"{'op':<20}{'device':<8}{'version':<12}not available")
    for op, device, chosen, why in backends.table():
        print(f"{op:<20}{device:<8}{chosen:<12}{why}")


if __name__ == "__main__":
    main()
