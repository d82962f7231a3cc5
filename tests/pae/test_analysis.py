"""pae.analysis: spectra, modes and angles against known operators; figures; the command."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import pae
from pae import analysis
from pae.errors import CheckpointError
from pae.train import cli

DEPTH, WIDTH = 5, 6


def regulariser(K=None, L=None, dim=4, **options) -> pae.KLD:
    """Bound to 5 blocks; its lift takes the first `dim` entries of a prompt."""
    kld = pae.KLD(dim=dim, **options)
    kld.bind(DEPTH, WIDTH)
    kld.double()
    with torch.no_grad():
        kld.lift.weight.copy_(torch.eye(dim, WIDTH))
        for own, given in ((kld.K, K), (kld.L, L)):
            if given is not None:
                own.copy_(torch.as_tensor(given, dtype=torch.float64))
    return kld


def prompts(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(DEPTH, count, WIDTH, generator=generator, dtype=torch.float64)


def random_operator(*shape, seed=1):
    return torch.randn(*shape, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


def rotation(angle):
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


# ---- spectra


def test_diagonal():
    found = analysis.analyse(
        regulariser(torch.diag(torch.tensor([0.5, -2.0, 1.0, 0.1]))), prompts()
    )
    moduli = torch.tensor([[2.0, 1.0, 0.5, 0.1]]).double()
    torch.testing.assert_close(found.eigenvalues, torch.tensor([[-2, 1, 0.5, 0.1]]).cdouble())
    torch.testing.assert_close(found.singular_values, moduli)
    assert found.spectral_radius.tolist() == [2.0]
    assert found.departure.tolist() == [0.0] and found.condition.tolist() == [1.0]
    # each entry of a state is the amplitude of its own mode
    expected = prompts()[1:-1, :, :4].square().mean(1)[:, [1, 2, 0, 3]]
    torch.testing.assert_close(found.energies, expected)


def test_rotation():
    K = torch.block_diag(0.9 * rotation(0.3), 0.5 * rotation(1.2))
    found = analysis.analyse(regulariser(K), prompts())
    expected = torch.polar(
        torch.tensor([0.9, 0.9, 0.5, 0.5]).double(), torch.tensor([0.3, -0.3, 1.2, -1.2]).double()
    )
    assert {(round(v.real, 6), round(v.imag, 6)) for v in found.eigenvalues[0].tolist()} == {
        (round(v.real, 6), round(v.imag, 6)) for v in expected.tolist()
    }
    assert found.departure.item() < 1e-6 and found.condition.item() == pytest.approx(1)
    # the two modes of a real rotation share its energy
    torch.testing.assert_close(found.energies[:, 0::2], found.energies[:, 1::2])


def test_random_operators_against_numpy():
    K = random_operator(DEPTH - 1)
    found = analysis.analyse(regulariser(K, mode="layerwise"), prompts())
    assert found.eigenvalues.shape == (DEPTH - 2, 4)  # the last slice belongs to no pair
    for own, operator in zip(found.eigenvalues.numpy(), K[:-1].numpy()):
        assert (np.diff(np.abs(own)) <= 0).all()
        np.testing.assert_allclose(
            np.sort_complex(own), np.sort_complex(np.linalg.eigvals(operator)), rtol=1e-10
        )
    sizes = np.linalg.svd(K[:-1].numpy(), compute_uv=False)
    np.testing.assert_allclose(found.singular_values.numpy(), sizes, rtol=1e-12)
    whole = (K[:-1] ** 2).sum((1, 2)).numpy()
    expected = np.sqrt(1 - (np.abs(found.eigenvalues.numpy()) ** 2).sum(1) / whole)
    np.testing.assert_allclose(found.departure.numpy(), expected, rtol=1e-10)


def test_nilpotent_departs_from_normality_wholly():
    found = analysis.analyse(regulariser(torch.diag(torch.ones(3), 1)), prompts())
    assert found.departure.item() == 1.0 and found.condition.item() > 1e8


# ---- energies


def test_energies_of_normal_operators_sum_to_that_of_the_states():
    symmetric = random_operator()
    symmetric = symmetric + symmetric.T
    for K in (symmetric, torch.block_diag(rotation(0.3), 2 * rotation(1.2))):
        found = analysis.analyse(regulariser(K), prompts())
        assert found.basis == ("modes",)
        torch.testing.assert_close(found.energies.sum(1), found.state_energies)
        shares = found.energy_shares.sum(1)
        torch.testing.assert_close(shares, torch.ones_like(shares))


def test_a_prompt_on_one_mode_has_its_energy_there_alone():
    """Rows move by z K: modes are left eigenvectors. A product with the right ones would smear."""
    K = random_operator()
    values, left = np.linalg.eig(K.numpy().T)
    real = int(np.argmax(np.abs(values.imag) < 1e-12))  # a real mode: this K has two
    row = torch.from_numpy(left[:, real].real.copy())
    states = torch.zeros(DEPTH, 1, WIDTH).double()
    states[:, 0, :4] = 3 * row
    found = analysis.analyse(regulariser(K), states)
    energies = found.energies[0]
    mode = int(energies.argmax())
    assert abs(found.eigenvalues[0, mode].item() - values[real]) < 1e-10
    assert energies[mode].item() == pytest.approx(9)  # unit modes
    assert energies.sum().item() == pytest.approx(9)


def test_one_step_of_k_multiplies_amplitudes_by_eigenvalues():
    """Energies of z K are those of z times |lambda|^2, for an operator that is not normal."""
    K, start = random_operator(), prompts()
    moved = start.clone()
    moved[..., :4] = start[..., :4] @ K
    before = analysis.analyse(regulariser(K), start)
    after = analysis.analyse(regulariser(K), moved)
    assert before.departure.item() > 0.1
    scale = before.eigenvalues.abs().square()
    torch.testing.assert_close(after.energies, before.energies * scale)


@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-9])
def test_nearly_parallel_modes_fall_back_to_an_orthonormal_basis(gap):
    jordan = torch.eye(4).double() + torch.diag(torch.ones(3), 1).double()
    jordan += torch.diag(gap * torch.arange(4)).double()
    found = analysis.analyse(regulariser(jordan), prompts())
    assert found.condition.item() > 1e8 and found.basis == ("orthonormal",)
    assert found.energies.isfinite().all()
    torch.testing.assert_close(found.energies.sum(1), found.state_energies)


def test_the_fallback_is_per_operator():
    K = torch.eye(4).repeat(DEPTH - 1, 1, 1)
    K[1] += torch.diag(torch.ones(3), 1)
    found = analysis.analyse(regulariser(K, mode="layerwise"), prompts())
    assert found.basis == ("modes", "orthonormal", "modes")
    torch.testing.assert_close(found.energies.sum(1), found.state_energies)


# ---- V over the blocks


@pytest.mark.parametrize("mode", ["global", "layerwise"])
@pytest.mark.parametrize("formulation", ["code", "paper"])
@pytest.mark.parametrize("options", [{}, {"gauge": "layernorm"}, {"first_block": True}], ids=str)
def test_v_is_the_one_that_is_trained(formulation, mode, options):
    """The Lyapunov term again, from the analysis."""
    layers = () if mode == "global" else (DEPTH - (not options.get("first_block")),)
    kld = regulariser(
        random_operator(*layers),
        random_operator(*layers, seed=2),
        mode=mode,
        formulation=formulation,
        consistency_weight=0.0,
        lyapunov_weight=1.0,
        **options,
    )
    found = analysis.analyse(kld, prompts())
    if formulation == "code":
        rise = found.lyapunov_predicted - found.lyapunov_now
        per_pair = torch.nn.functional.softplus(rise).mean(1)
        expected = (10 * torch.tanh(per_pair / 10)).sum()
        assert found.lyapunov_now.max() <= 1
    else:
        expected = (found.lyapunov_next - found.lyapunov_now).sum(1).relu().sum()
    torch.testing.assert_close(kld.terms(prompts())[1].detach(), expected, rtol=1e-7, atol=1e-9)
    first = 0 if options.get("first_block") else 1
    assert found.blocks == tuple(range(first, DEPTH))
    assert found.lyapunov_now.shape == (DEPTH - first - 1, 3)
    if mode == "global":
        torch.testing.assert_close(found.lyapunov_next[:-1], found.lyapunov_now[1:])


# ---- angles


def test_principal_angles_are_those_of_a_turned_plane():
    for angle in (0.0, 1e-9, 1e-4, 0.7, 1.5, math.pi / 2):
        axes = torch.eye(4).double()
        a = axes[:2]
        b = torch.stack([axes[0], math.cos(angle) * axes[1] + math.sin(angle) * axes[2]])
        mixed = torch.tensor([[2.0, 1.0], [0.5, -3.0]]).double() @ b  # another basis of the plane
        found = analysis.principal_angles(a, mixed)
        torch.testing.assert_close(found, torch.tensor([0, angle]).double(), rtol=1e-6, atol=1e-14)


def test_principal_angles_of_unequal_and_deficient_spans():
    a = torch.eye(5)[:3]
    assert analysis.principal_angles(a, torch.eye(5)[2:3]).tolist() == [0.0]
    repeated = torch.eye(5)[[2, 2, 3]]  # rank 2
    found = analysis.principal_angles(a, repeated)
    torch.testing.assert_close(found[:2], torch.tensor([0.0, math.pi / 2]).double())
    assert found[2].isnan()
    assert analysis.principal_angles(a, torch.zeros(2, 5)).isnan().all()
    with pytest.raises(ValueError, match=r"b must be like a \(3, 5\) but for rows, got \(3, 4\)"):
        analysis.principal_angles(a, torch.eye(4)[:3])


def test_angles_of_operators_and_prompts():
    K = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])).repeat(DEPTH - 1, 1, 1)
    K[1] = K[1][[0, 2, 1, 3]][:, [0, 2, 1, 3]]  # stretches entries 0 and 2 most, not 0 and 1
    found = analysis.analyse(regulariser(K, mode="layerwise"), prompts(2), rank=2)
    expected = torch.tensor([[0, math.pi / 2]] * 2).double()
    torch.testing.assert_close(found.operator_angles, expected)
    assert found.prompt_angles.shape == (DEPTH - 2, 2)
    steady = prompts(2)[:1].expand(DEPTH, -1, -1) * torch.arange(1, DEPTH + 1)[:, None, None]
    assert analysis.analyse(regulariser(), steady).prompt_angles.max() < 1e-12
    assert analysis.analyse(regulariser(), prompts()).operator_angles.shape == (0, 4)


# ---- what is asked of the arguments


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="KLD is not bound"):
        analysis.analyse(pae.KLD(4), prompts())
    with pytest.raises(ValueError, match=r"rank must be in \[1, 4\], got 5"):
        analysis.analyse(regulariser(), prompts(), rank=5)
    with pytest.raises(ValueError, match="prompts must hold 5 blocks, got 3"):
        analysis.analyse(regulariser(), prompts()[:3])
    with pytest.raises(ValueError, match=r"kld\.K must be finite"):
        analysis.analyse(regulariser(torch.full((4, 4), math.nan)), prompts())
    short = pae.KLD(4)
    short.bind(2, WIDTH)
    with pytest.raises(ValueError, match="two blocks that take part in kld, got 1"):
        analysis.analyse(short, prompts()[:2])


def test_the_model_is_left_alone():
    kld, given = regulariser(random_operator()), prompts().requires_grad_()
    found = analysis.analyse(kld, given)
    assert not found.energies.requires_grad
    assert all(p.grad is None for p in kld.parameters())


# ---- figures


def written(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def labels(ax):
    return ax.get_xlabel(), ax.get_ylabel()


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_eigenvalues_are_drawn_beside_the_unit_circle(mode):
    K = random_operator(*(() if mode == "global" else (DEPTH - 1,)))
    found = analysis.analyse(regulariser(K, mode=mode), prompts())
    figure = analysis.draw_eigenvalues(found)
    assert written(figure).startswith(b"\x89PNG")
    whole, close = figure.axes[:2]
    assert labels(whole) == ("Re λ", "Im λ")
    circle = np.hypot(*whole.lines[0].get_data())
    np.testing.assert_allclose(circle, 1)
    values = found.eigenvalues.numpy().ravel()
    for ax in (whole, close):
        dots = ax.collections[0].get_offsets().data
        np.testing.assert_allclose(dots[:, 0] + 1j * dots[:, 1], values)
    if mode == "global":
        outside = (np.abs(values) > 1).sum()
        assert f"{outside} of 4 outside" in whole.get_title(loc="left")
    else:
        assert figure.axes[2].get_ylabel() == "from block"


def test_energies_are_bars():
    found = analysis.analyse(regulariser(random_operator()), prompts())
    figure = analysis.draw_energies(found, modes=3)
    upper, lower = figure.axes
    assert lower.get_ylabel() == "share of energy (%)" and upper.get_ylabel() == "|λ|"
    heights = [bar.get_height() for bar in lower.patches]
    expected = 100 * found.energy_shares.mean(0)[:3]
    np.testing.assert_allclose(heights, expected)
    assert f"3 of 4 modes hold {expected.sum():.0f} %" in upper.get_title(loc="left")
    assert "Schur" not in upper.get_title(loc="left")
    defective = analysis.analyse(regulariser(torch.diag(torch.ones(3), 1)), prompts())
    upper = analysis.draw_energies(defective).axes[0]
    assert "nearly parallel" in upper.get_title(loc="left")
    assert written(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("formulation", ["code", "paper"])
@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_v_is_drawn_over_the_blocks(mode, formulation):
    found = analysis.analyse(regulariser(mode=mode, formulation=formulation), prompts())
    figure = analysis.draw_lyapunov(found)
    (ax,) = figure.axes
    assert ax.get_xlabel() == "block" and ax.get_ylabel().startswith("V(z)")
    solid = [line for line in ax.lines if line.get_linestyle() == "-"]
    assert [line.get_xdata().tolist() for line in solid] == [[1, 2], [2, 3], [3, 4]]
    for line, now, after in zip(solid, found.lyapunov_now, found.lyapunov_next):
        np.testing.assert_allclose(line.get_ydata(), [now.mean(), after.mean()])
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ("80 % of the prompts" in names) == (mode == "global")
    assert written(figure).startswith(b"\x89PNG")


def windows(size=224, window=16, stride=8, count=5):
    starts = torch.arange(0, size - window + 1, stride)
    origins = torch.cartesian_prod(starts, starts)
    losses = torch.linspace(1, 3, len(origins))
    return pae.MPAResult(losses, origins, losses.argsort()[:count], window, stride, "as_is")


def test_window_losses_lie_at_their_frequencies():
    result = windows()
    figure = analysis.draw_window_losses(result)
    ax, bar = figure.axes
    assert labels(ax)[0].startswith("horizontal frequency") and "nats" in bar.get_ylabel()
    (picture,) = ax.images
    assert picture.get_array().shape == (27, 27)
    np.testing.assert_allclose(picture.get_array().ravel(), result.losses, rtol=1e-6)
    # corners 104 and 112 hold DC (bin 112): their cells meet it from -0.5 and 7.5 cycles
    left, right, bottom, top = picture.get_extent()
    centres = left + (np.arange(27) + 0.5) * (right - left) / 27
    np.testing.assert_allclose(centres[[13, 14]], [-0.5, 7.5])
    assert (left, right) == (top, bottom)  # rows grow downwards
    assert len(ax.patches) == 5
    assert ax.patches[0].get_xy() == (left, top)  # the best window is the first
    assert ax.lines[0].get_xydata().tolist() == [[0, 0]] and ax.texts[0].get_text() == "DC"
    assert written(figure).startswith(b"\x89PNG")
    larger = analysis.draw_window_losses(result, (230, 230)).axes[0].images[0].get_extent()
    assert larger[0] == left - 3


def test_drawing_changes_no_setting():
    import matplotlib

    found = analysis.analyse(regulariser(random_operator()), prompts())
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "figure.facecolor": "black"}):
        figure = analysis.draw_energies(found)  # nor does the user's reach the figure
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert dict(matplotlib.rcParams) == before


# ---- a checkpoint


def checkpoint_of(path, family=None, kld=None):
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=4, num_heads=2)
    family = pae.prompts.VPTDeep(3) if family is None else family
    model = pae.PromptedViT(vit, family, kld, num_classes=4)
    model.save(path)
    return model


def test_pae_analyse_writes_figures_and_numbers(tmp_path, capsys):
    path = tmp_path / "best.safetensors"
    model = checkpoint_of(path, kld=pae.KLD(8))
    assert cli.main(["analyse", str(path)]) == 0
    folder = tmp_path / "best-analysis"
    names = ["eigenvalues.png", "energies.png", "koopman.json", "lyapunov.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert len(capsys.readouterr().out.splitlines()) == 4
    numbers = json.loads((folder / "koopman.json").read_text())
    assert numbers["eigenvalues"] == [[[1.0, 0.0]] * 8] and numbers["blocks"] == [1, 2, 3]
    found = analysis.analyse(model.kld, model.prompts.raw_prompts())
    np.testing.assert_allclose(numbers["energies"], found.energies, rtol=1e-12)


def test_infinite_numbers_are_null(tmp_path):
    path = tmp_path / "best.safetensors"
    kld = pae.KLD(2)
    model = checkpoint_of(path, kld=kld)
    with torch.no_grad():
        kld.K.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    model.save(path)
    analysis.write_report(path, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "koopman.json").read_text())
    assert numbers["condition"] == [None] or numbers["condition"][0] > 1e15


def test_checkpoints_that_cannot_be_analysed(tmp_path, capsys):
    path = tmp_path / "plain.safetensors"
    checkpoint_of(path)
    assert cli.main(["analyse", str(path)]) == 2
    assert "has no KLD to analyse" in capsys.readouterr().err
    checkpoint_of(path, pae.prompts.BPTDeep(3, rank=2), pae.KLD(8))
    with pytest.raises(CheckpointError, match="holds prompts of BPTDeep, not"):
        analysis.write_report(path)
