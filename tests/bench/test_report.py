"""What README.md and docs/ say of the measurements is what the committed JSON says."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]

from bench import (  # noqa: E402
    charts,
    cost,
    figures,
    pages,
    report,
    results,
    table,
)

# ---- this tree


def test_every_block_and_figure_is_as_the_committed_json_says():
    assert report.Report().problems() == []


@pytest.mark.parametrize("page", ["README.md", "docs/numbers.md"])
def test_measured_numbers_stand_in_generated_blocks_alone(page):
    by_hand = report.BLOCK.sub("", (ROOT / page).read_text())
    assert not re.findall(r"\d+\.\d+x|\d[\d.]* ?(?:MB|ms|GB/s|TFLOP/s)\b", by_hand)


def test_the_first_screen_shows_a_figure_and_a_table():
    page = (ROOT / "README.md").read_text()
    assert page.index("figures/hero.svg") < page.index("## Use") < page.index("suite step")


def test_figures_are_small_enough_for_a_page():
    written = list((ROOT / report.FIGURES).glob("*.*"))
    assert written and all(path.stat().st_size < 150e3 for path in written)


# ---- blocks and figures, with a source of one number


def draw_line(value):
    drawn, axes = figures.figure(2, 1)
    axes.plot([0, value])
    return drawn


@pytest.fixture
def tree(tmp_path):
    """A report of a small tree, whose one source says n and draws it; `write_page` adds pages."""
    source = SimpleNamespace(
        blocks=lambda numbers: {"toy number": f"{numbers['n']}x", "toy table": "| a |\n| - |"},
        figures=lambda numbers: {"toy_line": lambda: draw_line(numbers["n"])},
    )
    sources = ((source, "science/toy.json"),)
    numbers = tmp_path / report.RESULTS / "science" / "toy.json"
    numbers.parent.mkdir(parents=True)
    (tmp_path / "docs" / "deep").mkdir(parents=True)

    def write_page(text, name="README.md"):
        (tmp_path / name).write_text(text)

    def measure(n):
        numbers.write_text(json.dumps({"n": n}))

    measure(3)
    write_page("no block")
    made = report.Report
    return SimpleNamespace(
        root=tmp_path,
        measure=measure,
        write_page=write_page,
        report=lambda: made(tmp_path, sources),
        read=lambda name="README.md": (tmp_path / name).read_text(),
    )


def block(name, text):
    return f"<!-- generated: {name} -->{text}<!-- end: {name} -->"


def test_blocks_are_rewritten_and_nothing_else(tree):
    tree.write_page(f"It is {block('toy number', '9x')} so.\n\n{block('toy table', chr(10))}\n")
    tree.write_page(f"a {block('toy number', '')}", "docs/deep/page.md")
    assert len(tree.report().write()) == 4  # two pages, a figure in two formats
    assert tree.read() == (
        f"It is {block('toy number', '3x')} so.\n\n"
        f"{block('toy table', chr(10) * 2 + '| a |' + chr(10) + '| - |' + chr(10) * 2)}\n"
    )
    assert tree.read("docs/deep/page.md") == f"a {block('toy number', '3x')}"
    assert tree.report().write() == [] == tree.report().problems()


def test_a_stale_block_and_a_stale_figure_are_found(tree):
    tree.write_page(f"a {block('toy number', '3x')}")
    tree.report().write()
    tree.measure(4)
    assert tree.report().problems() == [
        "README.md: block 'toy number' is not what the numbers say",
        "docs/figures/toy_line.svg: drawn from other numbers",
    ]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_missing_figure_is_found(tree, suffix):
    tree.report().write()
    (tree.root / "docs" / "figures" / f"toy_line.{suffix}").unlink()
    assert tree.report().problems() == [f"docs/figures/toy_line.{suffix}: missing"]


@pytest.mark.parametrize(
    "page, problem",
    [
        (f"a {block('nobody', '1x')}", "no source knows block 'nobody'"),
        ("<!-- generated: toy table -->\ntext", "<!-- generated: toy table --> has no partner"),
        ("text <!-- end: toy table -->", "<!-- end: toy table --> has no partner"),
    ],
)
def test_a_block_that_cannot_be_written_is_found(tree, page, problem):
    tree.write_page(page)
    tree.report().write()
    problems = tree.report().problems()
    assert len(problems) == 1 and problem in problems[0]
    assert tree.read() == page


def test_check_writes_nothing_and_fails(tree, monkeypatch, capsys):
    page = f"a {block('toy number', '9x')}"
    tree.write_page(page)
    monkeypatch.setattr(report, "Report", tree.report)
    assert report.main(["--check"]) == 1
    assert "toy number" in capsys.readouterr().err and tree.read() == page
    assert not (tree.root / "docs" / "figures").exists()
    assert report.main([]) == 0 == report.main(["--check"])


# ---- how figures are written


def test_a_figure_has_the_same_bytes_whatever_the_reader_has_set(tmp_path):
    def written(name):
        with figures.style():
            drawn = draw_line(1)
        return [path.read_bytes() for path in figures.save(drawn, tmp_path / name, "of 1")]

    first = written("a")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "svg.fonttype": "none"}):
        assert written("b") == first
    assert b"of 1" in first[0] and first[1].startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]


def test_colours_of_one_comparison_differ():
    lines = [figures.COLOURS[role] for _, role in charts.LINES.values()]
    assert len(set(lines)) == len(lines)


# ---- the benchmark suite


def bench(group, provider, seconds, baselines=("official-style",), clock="process", **columns):
    return {
        "group": group,
        "stats": {"data": seconds},
        "extra_info": {
            "provider": provider,
            "clock": clock,
            "unit": "step",
            "baselines": list(baselines),
            "columns": columns,
        },
    }


def run_of(*benchmarks, date="2026-01-01", left_out=(), **machine):
    machine = {"device": "Processor", "threads": 1, "torch": "2", "commit": "abc"} | machine
    return {
        "machine_info": {"summary": machine},
        "datetime": date,
        "benchmarks": list(benchmarks),
        "left_out": {"groups": {}, "providers": list(left_out)},
    }


STEP = "step/vit_base_patch16_224/"


def step(prompts=50, times=(2.0, 1.0, 1.5), dtype="fp32", batch=4, **options):
    """A group of the step: official-style, pae keep, pae recompute8; times in rounds."""
    group = f"{STEP}P{prompts}/{dtype}/B{batch}"
    return [
        bench(group, name, [t, 1.1 * t, 0.9 * t], saved_mb_per_image=100 * t, **options)
        for name, t in zip(("official-style", "pae keep", "pae recompute8"), times)
    ]


def test_readme_table():
    text = pages.blocks({"cpu.json": run_of(*step(50), *step(100, (3.0, 1.0, 0.5)))})["suite step"]
    assert text == (
        "| training step, ViT-B/16 224, batch 4 | official-style | pae "
        '| pae, `memory="recompute8"` |\n'
        "| --- | --- | --- | --- |\n"
        "| fp32, 50 prompts: time | 2.00x | **1x** | 1.50x |\n"
        "| fp32, 100 prompts: time | 3.00x | **1x** | 0.50x |\n"
        "| fp32, 50 prompts: saved, MB/image | 200.0 | **100.0** | **150.0** |\n"
        "| fp32, 100 prompts: saved, MB/image | 300.0 | **100.0** | **50.0** |\n\n"
        "Processor, 1 thread, process time, medians over interleaved rounds; torch 2, commit abc."
    )


def test_ratios_are_taken_within_rounds():
    """Round 2 is ten times slower for both: no ratio shows it."""
    slow = [
        bench(f"{STEP}P50/fp32/B4", "official-style", [2.0, 20.0, 4.0]),
        bench(f"{STEP}P50/fp32/B4", "pae keep", [1.0, 10.0, 1.0]),
    ]
    assert pages.blocks({"cpu.json": run_of(*slow)})["suite step"].count("2.00x") == 1


def test_the_canonical_file_is_shown_then_the_newest():
    numbers = {
        "cpu.json": run_of(*step(50), date="2026-01-01"),
        "cpu_new.json": run_of(*step(50, (7.0, 1.0, 1.0)), date="2026-03-01", device="Other"),
        "cpu_old.json": run_of(*step(50, (8.0, 1.0, 1.0)), *step(200), date="2026-02-01"),
    }
    names = [run.name for run in results.runs(numbers)]
    assert names == ["cpu.json", "cpu_new.json", "cpu_old.json"]
    assert "2.00x" in pages.blocks(numbers)["suite section step"]
    other = pages.blocks(numbers)["suite other"]
    assert "7.00x" in other and "Other" in other  # another processor
    assert "200 prompts" in other and "8.00x" not in other  # a new case, not an old time
    del numbers["cpu.json"]
    assert "7.00x" in pages.blocks(numbers)["suite section step"]


def test_other_json_in_the_folder_is_no_run():
    assert results.runs({"guard.json": {"flops": 1}}) == []


def test_where_we_lose():
    rows = [
        bench("kld/a", "official-style", [1.0] * 5),
        bench("kld/a", "pae", [0.5] * 5),
        bench("kld/a", "pae slow", [4.0] * 5),
        bench("kld/b", "official-style", [1.0, 1.0, 1.0, 2.0, 2.0]),
        bench("kld/b", "pae", [1.1, 1.1, 1.1, 1.0, 1.0]),
    ]
    text = pages.blocks({"cpu.json": run_of(*rows)})["suite losses"]
    default, others = text.split("**Other versions of pae's**")
    assert default.startswith("**What pae runs by itself**: the peer is faster in 1 of 2 pairs.")
    assert "0.91x, within the spread" in default and "pae slow" not in default
    assert others.startswith(": the peer is faster in 1 of 1 pairs.") and "0.25x |" in others
    won = pages.blocks({"cpu.json": run_of(*rows[:2])})["suite losses"]
    assert won == "**What pae runs by itself**: the peer is faster in 0 of 1 pairs."


def test_where_ours_takes_more_memory():
    peaks = {"official-style": 20.0, "timm + SDPA": 10.0, "pae": 30.0, "pae low": 10.05}
    rows = [bench("kld/a", name, [1.0] * 3, peak_mb=peak) for name, peak in peaks.items()]
    text = pages.blocks({"cpu.json": run_of(*rows)})["suite losses"]
    assert text.endswith(
        "**Peak memory**: ours is higher in 2 of 4 pairs.\n\n"
        "| case | ours, MB | peers with less, MB (ours / its) |\n| --- | --- | --- |\n"
        "| regulariser, a | pae: 30 | timm + SDPA: 10 (3.00x); official-style: 20 (1.50x) |"
    )


def test_bf16_has_a_section_of_its_own_or_a_reason():
    missing = [{"group": f"{STEP}P50/bf16/B4", "provider": "pae keep", "reason": "no bf16"}]
    blocks = pages.blocks({"cpu.json": run_of(*step(50), left_out=missing)})
    assert blocks["suite section bf16"] == "*Not measured: no bf16.*"
    machine = {"bf16 instructions": "avx512_bf16", "fp32 product TFLOP/s": 2}
    machine["bf16 product TFLOP/s"] = 1
    both = run_of(*step(50), *step(50, dtype="bf16"), **machine)
    blocks = pages.blocks({"cpu.json": both})
    assert "bf16, batch 4" in blocks["suite section bf16"]
    said = "bf16 by avx512_bf16 without AMX, a large product at 0.50x fp32's rate, 1 thread"
    assert said in blocks["suite section bf16"]
    assert "bf16, batch" not in blocks["suite section step"]


def test_what_counts_as_ours():
    def rows(*names):
        raw = [bench("g", name, [1.0], baselines=("eager", "pae images, conv")) for name in names]
        return results.runs({"cpu.json": run_of(*raw)})[0].groups["g"]

    mine = rows("pae", "pae keep", "pae, Triton graph", "reference", "Triton", "CUDA")
    assert all(row.is_ours for row in mine)
    peers = rows("eager", "pae images, conv", "SDPA", "timm + SDPA")
    assert not any(row.is_ours for row in peers)


def test_memory_of_a_lost_pair_is_beside_it():
    text = pages.blocks({"cpu.json": run_of(*step(50, (1.0, 2.0, 0.5)))})["suite losses"]
    assert "200.0 and 100.0 saved MB/image" in text


def test_a_row_without_times_is_left_out_with_its_reason():
    missing = [{"group": f"{STEP}P50/fp32/B4", "provider": "timm + SDPA", "reason": "no such"}]
    text = pages.blocks({"cpu.json": run_of(*step(50), left_out=missing)})["suite section step"]
    assert "| timm + SDPA |" not in text
    assert "Left out: timm + SDPA (no such)." in text


def test_section_has_time_memory_and_errors_of_every_row():
    rows = step(50, peak_mb=12.34, value_error=1e-6, weight_copies_mb=0.0)
    text = pages.blocks({"cpu.json": run_of(*rows)})["suite section step"]
    head, _, first, second, *_ = text.splitlines()
    assert head == (
        "| case | version | time | ms | p20-p80 | saved MB/image | peak MB | value error |"
    )
    assert first == (
        "| ViT-B/16 224, 50 prompts, fp32, batch 4 | official-style | 2.00x | 2000 | 1880-2120 "
        "| 200.0 | 12.3 | 1e-06 |"
    )
    assert second.startswith("|  | **pae keep** | **1x** | 1000 |")


def test_gpu_section_waits_for_a_gpu():
    blocks = pages.blocks({"cpu.json": run_of(*step(50))})
    assert blocks["suite gpu"] == pages.UNMEASURED
    assert blocks["suite gpu first screen"] == "No GPU figure is published yet."


def test_gpu_section_fills_itself():
    gpu = {"device": "GPU 9000", "CUDA": "13.2", "build": "passed", "tests-engine": "passed"}
    old = run_of(*step(50, (9.0, 1.0, 1.0), dtype="bf16"), date="2025", **gpu)
    new = run_of(*step(50, dtype="bf16", clock="device", peak_mb=7.0), **gpu)
    numbers = {"cpu.json": run_of(*step(50)), "gpu-a.json": old, "gpu-b.json": new}
    blocks = pages.blocks(numbers)
    page = blocks["suite gpu"]
    assert page.startswith("### GPU 9000") and "9.00x" not in page and "2.00x" in page
    assert "| tests-engine | passed |" in page and "#### Where we lose" in page
    assert "| peak MB |" in page and "device time" in page
    assert "bf16 autocast, 50 prompts: time | 2.00x" in blocks["suite gpu first screen"]
    assert "GPU 9000" not in blocks["suite section step"] + blocks["suite other"]


@pytest.mark.parametrize(
    "group, words",
    [
        ("step/vit_base_patch16_224/P50/fp32/B4", "ViT-B/16 224, 50 prompts, fp32, batch 4"),
        ("kld/global/k256/P50", "global, k = 256, 50 prompts"),
        ("attention/both/H6d64/N197/P0", "attention, both, 6 heads of 64, 197 tokens, 0 prompts"),
        ("scaling/prompts/P1", "scaling, prompts, 1 prompt"),
        ("coded gelu/forward/788x3072", "coded gelu, forward, 788x3072"),
    ],
)  # fmt: skip
def test_labels(group, words):
    assert table.label(group) == words


def test_hero_draws_what_was_measured():
    numbers = {"cpu.json": run_of(*step(50), *step(100, (3.0, 1.2, 1.6)))}
    with figures.style():
        drawn = pages.figures(numbers)["hero"]()
    time, memory, _ = drawn.axes
    assert [line.get_ydata().tolist() for line in time.lines] == [[2, 3], [1.5, 1.6], [1, 1.2]]
    assert [line.get_ydata().tolist() for line in memory.lines] == [
        [200, 300],
        [150, 160],
        [100, 120],
    ]
    assert {text.get_text() for text in time.texts} == {
        "official-style  2.50x pae",
        "pae recompute8  1.33x pae",
        "pae",
    }


def scale(axis, value, times, **columns):
    """A group of the suite that scales; the model is right but for pae's memory."""
    names = ("official-style", "timm + SDPA", "pae keep", "pae recompute8")
    return [
        bench(
            f"scaling/{axis}/{value}",
            name,
            [t] * 3,
            saved_mb_per_image=10 * t,
            model_saved_mb_per_image=10 * t * (0.9 if name == "pae keep" else 1),
            model_gflop=400 * t,
            peak_tflops=0.5,
            images=2.0,
            depth=12.0,
            **columns,
        )
        for name, t in zip(names, times)
    ]


SCALED = run_of(
    *scale("prompts", "P10", (1.2, 1.1, 1.0, 1.3), prompts=10.0),
    *scale("prompts", "P2", (1.1, 1.0, 0.9, 1.2), prompts=2.0),
    *scale("model", "vit_tiny_patch16_224", (0.5, 0.4, 0.3, 0.35)),
    *scale("model", "vit_base_patch16_224", (5.0, 4.0, 3.0, 3.5)),
)


def test_scaling_tables():
    text = pages.blocks({"cpu.json": SCALED})["suite scaling"]
    assert "**By prompts per block** (12 blocks, batch 2)" in text
    assert "![Step time and saved memory by prompts per block" in text
    assert "](figures/scaling_prompts.svg)" in text
    assert (
        "| 10 prompts | 1.20x (1.20x) | 1.10x (1.10x) | **1x** | 1.30x (1.30x) "
        "| 12.0 | 11.0 | 10.0 | 13.0 |"
    ) in text
    assert "in 16 rows: the cost model is off by at most 10.0% of what was measured" in text


def test_scaling_figures_draw_measurement_and_model():
    drawn = pages.figures({"cpu.json": SCALED})
    assert set(drawn) == {"scaling_prompts", "scaling_model"}
    with figures.style():
        time, memory = drawn["scaling_prompts"]().axes
        names = drawn["scaling_model"]().axes[0]
    official, predicted = time.lines[:2]
    assert official.get_xdata().tolist() == [2, 10]
    assert official.get_ydata().tolist() == pytest.approx([550, 600])  # ms an image
    assert predicted.get_ydata().tolist() == pytest.approx([440, 480])  # 440 GFLOP at 0.5 TFLOP/s
    assert memory.lines[0].get_linestyle() == "None"  # dots on the model's dashes
    assert memory.lines[6].get_ydata().tolist() == pytest.approx([9, 10])
    assert memory.lines[7].get_ydata().tolist() == pytest.approx([8.1, 9])
    assert names.get_yscale() == "log"
    assert [label.get_text() for label in names.get_xticklabels()] == [
        "ViT-Ti/16 224",
        "ViT-B/16 224",
    ]


def test_cost_model_table():
    text = pages.cost_model(("vit_base_patch16_224",), (50, 100), batch=8)
    head, _, fifty, hundred = (line.split(" | ") for line in text.splitlines())
    assert head[1:4] == ["FLOPs forward", "FLOPs of a step", "saved: official"]
    assert fifty[0] == "| ViT-B/16 224, 50 prompts"
    shape = cost.Shape.named("vit_base_patch16_224", num_classes=200)
    work = {m: cost.flops(shape, 100, 8, m).forward for m in ("pae", "official")}
    assert hundred[1] == f"{work['pae'] / work['official']:.2f}x"
    assert float(fifty[1][:-1]) <= 0.76 and float(hundred[1][:-1]) <= 0.63
    saved = [float(cell.strip(" |")) for cell in fifty[3:]]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] == round(cost.saved_bytes(shape, 50, 8, "official") / 8e6, 1)


def test_every_gpu_has_figures_of_its_own():
    rows = [*step(50, dtype="bf16"), *step(100, dtype="bf16")]
    numbers = {
        "cpu.json": SCALED,
        "a.json": run_of(*rows, *SCALED["benchmarks"], device="GPU A", CUDA="13"),
        "b.json": run_of(*rows, device="GPU B", CUDA="13"),
    }
    drawn = pages.figures(numbers)
    assert {"step_gpu-a", "step_gpu-b", "scaling_prompts_gpu-a", "scaling_prompts"} < set(drawn)
    page = pages.blocks(numbers)["suite gpu"]
    assert {f"{name}.svg" for name in drawn if "gpu" in name} == {
        link.removeprefix("figures/") for link in re.findall(r"figures/[\w-]+\.svg", page)
    }


def test_names_at_the_ends_of_lines_do_not_overlap():
    axes = figures.figure(4, 3)[1]
    axes.set_ylim(0, 10)
    charts.place_names(axes, [(1, y, str(y), "k") for y in (5.0, 5.1, 5.2, 1.0)])
    heights = sorted(text.xy[1] for text in axes.texts)
    assert heights[0] == pytest.approx(0.1) and heights[1] == pytest.approx(0.5)
    assert min(b - a for a, b in pairwise(heights)) > 0.99 * charts.LINE


def test_names_stay_beside_the_axes():
    axes = figures.figure(4, 3)[1]
    axes.set_ylim(0, 10)
    charts.place_names(axes, [(1, y, str(y), "k") for y in (9.8, 9.9, 10.0)])
    heights = sorted(text.xy[1] for text in axes.texts)
    assert heights[-1] <= 1
    assert min(b - a for a, b in pairwise(heights)) > 0.99 * charts.LINE


def test_ticks_have_room():
    assert charts.apart([1, 5, 20, 50, 100, 200]) == [5, 20, 50, 100, 200]
