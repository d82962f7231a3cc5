"""What training left in the Koopman-Lyapunov regulariser and what Modal Pre-Alignment saw.

    koopman     spectra of the operators, energies of their modes, V over the blocks, angles
    figures     the same as pictures, and the map of window losses over frequency
    report      a checkpoint's figures and numbers in a folder (`pae analyse`)

Numbers come first, as tensors; matplotlib is imported when a figure is drawn.
"""

from .figures import draw_eigenvalues, draw_energies, draw_lyapunov, draw_window_losses
from .koopman import KoopmanAnalysis, analyse, principal_angles
from .report import write_report

__all__ = [
    "KoopmanAnalysis",
    "analyse",
    "draw_eigenvalues",
    "draw_energies",
    "draw_lyapunov",
    "draw_window_losses",
    "principal_angles",
    "write_report",
]
