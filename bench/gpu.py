"""The GPU day: tests and benchmarks by value, for a machine that may be gone in minutes.

    bench/gpu.sh                     # stages a, b and c, as far as ten minutes go
    bench/gpu.sh a                   # one stage; `a b`, `c`
    bench/gpu.sh --have FILE.jsonl   # an earlier call's lines: what is in it is not done again
    bench/gpu.sh --list              # what would run, and how long at most

a   within four minutes: the device and its two ceilings; attention in bf16 with its class row and
    bitwise repetition, norm, GELU, the engine against the reference; attention and step at the main
    shape, beside SDPA and official-style code. nvcc compiles meanwhile.
b   the other tests, compute-sanitizer, the other shapes, the regulariser, MPA
c   torch.compile's rows, and a search for better tiles

Everything lies in $OUT, or in bench/results/, as DEVICE-COMMIT: .jsonl, a line for every test, row,
round and step as it comes; .log, what the programs said; and at the end .json and .md, the tables
with what was predicted. Every step has a limit of its own, and none starts when time is up.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import lines
from .merge import merge
from .results import DESCRIBED, Run

ROOT = Path(__file__).parents[1]
STAGES = ("a", "b", "c")
SLACK = 15  # seconds kept for what comes last: files and tables
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
# the tests of a stage that is cut short begin with these
FIRST = "bf16,bfloat16,class,bitwise,same_bits,repeat"
LIMIT = "LIMIT"  # in a command: its seconds but for the last quarter, in which no group starts
ENGINE = ("1/2", "2/2")  # processes that share these tests: repetitions take turns on the host
# tests of models as wholes whose steps are captured
GRAPHS = (
    *("tests/pae/test_gpu_mpa.py", "tests/pae/test_graphs.py", "tests/pae/test_pro_vpt.py"),
    "tests/pae/test_da_vpt.py",
)
CAPTURED = "test_gpu or replays_follow or captured_step"
LIBRARY = "build"  # the step that compiles csrc/: those of it wait for it


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        seconds: it is killed after as many.
        beside: it runs beside the steps around it that are so, too; one that is timed runs alone.
        tests: of its outcome: something must have passed.
    """

    stage: str
    name: str
    seconds: int
    command: Sequence[str]
    beside: bool = False
    tests: bool = False
    env: tuple[tuple[str, str], ...] = ()


def steps() -> Iterator[Step]:
    """All of them, by value."""
    with_lines = (*PYTEST, "-p", "bench.lines")
    yield Step("a", "ceilings", 40, (sys.executable, "-m", "bench.gpu", "--ceilings"))
    yield _build()
    by_name, compiled = suites()
    for name in ("attention", "pointwise"):
        yield _tests("a", name, 75, *with_lines, by_name.pop(name), "-k", "gpu-triton")
    for part in ENGINE:
        name, engine = f"engine {part}", (*with_lines, "tests/pae/test_gpu.py")
        yield _tests("a", name, 75, *engine, env=(("PAE_PART", part),))
    yield _benchmark("a", "attention", 45, "--quick", "-k", "not ompiled")
    yield _benchmark("a", "step", 60, "--quick", "-k", "B128 and not ompiled")

    for name, place in by_name.items():
        yield _tests("b", name, 150, *with_lines, place, "-k", "gpu")
    yield _tests("b", "native", 150, *with_lines, "tests/kernels/test_native.py", "-k", "gpu")
    yield _tests("b", "graphs", 150, *with_lines, *GRAPHS, "-k", CAPTURED)
    clock = ["tests/bench/test_bench.py", "tests/bench/test_bench_clock.py"]
    yield _tests("b", "clock", 60, *with_lines, *clock, "-k", "device_clock")
    for tool in ("memcheck", "racecheck", "initcheck"):
        yield _sanitizer(tool, compiled)
    limits = {"step": 60, "attention": 60, "pointwise": 40, "product": 60, "kld": 50}
    for name, seconds in limits.items():
        yield _benchmark("b", name, seconds, "-k", "not ompiled")
    yield _benchmark("b", "mpa", 60, "-k", "not ompiled")

    yield _benchmark("c", "step", 150, "--quick", "-k", "B128")
    yield _benchmark("c", "attention", 60, "--quick")
    yield _benchmark("c", "pointwise", 60)
    yield _benchmark("c", "product", 150)
    tune = (sys.executable, "-m", "bench.studies.tune_attention", "--seconds", "240")
    yield Step("c", "tune", 270, tune)
    for name in ("scaling", "spectrum"):
        yield _benchmark("c", name, 600)


def _build() -> Step:
    # -lineinfo, three times the size, is for the sanitizers: they name lines
    env = ("NVCC_APPEND_FLAGS", "-lineinfo"), ("PAE_CUDA", "require")
    command = (sys.executable, "csrc/native_build.py")
    return Step("a", LIBRARY, 150, command, beside=True, env=env)


def suites() -> tuple[dict[str, str], list[str]]:
    """Suites of kernels by name, a file or a folder of them; those with cases for sanitizers."""
    by_name, compiled = {}, []
    for place in sorted((ROOT / "tests" / "kernels").iterdir()):
        files = place.glob("test_*.py") if place.is_dir() else [place]
        text = "".join(f.read_text() for f in files if f.name.startswith("test_"))
        if re.search(r"^@each\(", text, re.M):
            by_name[place.stem.removeprefix("test_")] = str(place.relative_to(ROOT))
        if re.search(r"mark\.sanitize|sanitized\(", text):
            compiled.append(str(place.relative_to(ROOT)))
    return by_name, compiled


def _tests(
    stage: str, name: str, seconds: int, *command: str, env: tuple[tuple[str, str], ...] = ()
) -> Step:
    env = ("PAE_FIRST", FIRST), *env
    return Step(stage, f"tests-{name}", seconds, command, True, True, env)


def _sanitizer(tool: str, files: list[str]) -> Step:
    """Each tensor an allocation of its own: an access past its end is then one past an allocation.
    initcheck must see what other kernels write, data races are looked for in ours alone.
    """
    only = ("--kernel-name", "kns=pae") if tool == "racecheck" else ()
    command = ("compute-sanitizer", "--tool", tool, *only, "--report-api-errors", "no")
    command += ("--error-exitcode", "3", *PYTEST, "-m", "sanitize", "-k", "gpu", *files)
    env = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("PAE_LINES", "")
    return Step("b", f"sanitizer-{tool}", 150, command, True, True, env)


def _benchmark(stage: str, name: str, seconds: int, *options: str) -> Step:
    command = (*PYTEST, f"bench/bench_{name}.py", "--benchmark-only", "--device=cuda", *options)
    return Step(stage, f"{name} ({stage})", seconds, (*command, f"--seconds={LIMIT}"))


class Day:
    """A run of steps, and where its lines go."""

    def __init__(self, stem: Path, seconds: float, slow: float = 1.0) -> None:
        self.lines, self.log = stem.with_suffix(".jsonl"), stem.with_suffix(".log")
        self.stem, self.end, self.slow = stem, time.monotonic() + seconds, slow
        self.running: list[tuple[Step, subprocess.Popen, Path, float, float]] = []
        self.failed = False

    def left(self) -> float:
        return self.end - time.monotonic() - SLACK

    def run(self, chosen: list[Step]) -> None:
        """Those that may run beside each other do; the library is waited for by stage b."""
        for step in chosen:
            if not step.beside:
                self._join(but=LIBRARY)
            elif step.stage != "a":
                self._join(only=LIBRARY)
            self._start(step)
            if not step.beside:
                self._join(only=step.name)
        self._join()

    def _start(self, step: Step) -> None:
        if self.left() < 10:
            self._ended(step, "no time left", 0, "")
            return
        if shutil.which(step.command[0]) is None:
            self._ended(step, f"{step.command[0]} is not installed", 0, "")
            return
        log = self.stem.parent / f".{re.sub('[ /]', '', step.name)}.log"
        limit = min(step.seconds * self.slow, self.left())
        command = [word.replace(LIMIT, f"{0.75 * limit:.0f}") for word in step.command]
        env = os.environ | {"PAE_LINES": str(self.lines)} | dict(step.env)
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, preexec_fn=_dies_with_us,
            )  # fmt: skip
        now = time.monotonic()
        self.running.append((step, process, log, now, now + limit))

    def _join(self, only: str = "", but: str = "") -> None:
        """Until those have ended, by themselves or because their time is up."""
        waiting = [e for e in self.running if e[0].name != but and only in ("", e[0].name)]
        while waiting:
            for entry in list(waiting):
                step, process, log, began, until = entry
                late = time.monotonic() > until
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                waiting.remove(entry)
                self.running.remove(entry)
                text = log.read_text(errors="replace")
                log.unlink()
                outcome = "out of time" if late else self._outcome(step, process.returncode, text)
                self._ended(step, outcome, time.monotonic() - began, text)
            time.sleep(0.1)

    def _outcome(self, step: Step, code: int, text: str) -> str:
        if code == 0 and step.tests and not re.search(r"\b[1-9]\d* passed", text):
            return "failed"  # all skipped: nothing was tested
        if code == 5 and re.search(r"[1-9]\d* deselected", text):
            return "passed"  # in an earlier call
        return "passed" if code == 0 else "failed"

    def _ended(self, step: Step, outcome: str, seconds: float, text: str) -> None:
        lines.append(self.lines, "step", name=step.name, outcome=outcome, seconds=round(seconds, 1))
        with open(self.log, "a") as log:
            log.write(f"\n===== {step.name}: {outcome} after {seconds:.0f} s\n{text}")
        said = re.findall(r"^.*(?:passed|failed|skipped|error).* in \d.*$", text, re.M)
        print(f"== {step.name}: {outcome} after {seconds:.0f} s {said[-1] if said else ''}")
        if outcome == "failed":
            self.failed = True
            wrong = re.findall(r"^(?:FAILED|ERROR|E  ).*$", text, re.M)
            print("\n".join(line[:160] for line in wrong[:20]), flush=True)
        if step.name == "tune":
            print(text, flush=True)

    def write(self) -> None:
        """Tables and the JSON that the report reads, from all lines."""
        from . import predictions, table

        try:
            whole = as_run(lines.read(self.lines))
        except ValueError as error:
            print(f"no tables: {error}", file=sys.stderr)
            return
        self.stem.with_suffix(".json").write_text(json.dumps(whole) + "\n")
        run = Run.of(whole)
        text = f"{table.render(run)}\n{predictions.beside(run)}\n"
        self.stem.with_suffix(".md").write_text(text)
        print(text)


def _dies_with_us() -> None:
    """A group of its own, so that all of it can be killed; and killed with the caller."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def as_run(entries: list[dict]) -> dict:
    """The lines as --benchmark-json would have written them. Of a group the newest session counts
    that has all its rounds; where none has, the one with most of them, and `cut short` names it.

    Raises:
        ValueError: no row has been measured, or rows are of different machines or commits.
    """
    sessions = {e["id"]: e for e in entries if e["kind"] == "session"}  # the last of each
    chosen: dict[str, tuple[tuple, str, dict]] = {}
    for (session, group), rows in lines.rows(entries).items():
        whole, done = all(map(lines.is_whole, rows.values())), _rounds(rows)
        value = (True, 0) if whole else (False, done)
        if group not in chosen or value >= chosen[group][0]:
            chosen[group] = value, session, rows
    runs, cut = [], []
    for name, session in sessions.items():
        here = {g: rows for g, (_, owner, rows) in chosen.items() if owner == name}
        if here:
            runs.append(_as_json(session, [row for rows in here.values() for row in rows.values()]))
        cut += [
            f"{group} ({_rounds(rows)} of {max(row['rounds'] for row in rows.values())} rounds)"
            for group, rows in here.items()
            if not all(map(lines.is_whole, rows.values()))
        ]
    gates = {e["name"]: e["outcome"] for e in entries if e["kind"] == "step"}
    said = {name: gate for name, gate in gates.items() if " (" not in name}
    return merge(runs, said | ({"cut short": "; ".join(cut)} if cut else {}))


def _rounds(rows: dict[str, dict]) -> int:
    return max(len(row["seconds"]) for row in rows.values())


def _as_json(session: dict, rows: list[dict]) -> dict:
    left_out = [
        {"group": row["group"], "provider": row["provider"], "reason": row["reason"] or "cut short"}
        for row in rows
        if not row["seconds"]
    ]
    return {
        "datetime": session["date"],
        "machine_info": {"summary": session["machine"]},
        "benchmarks": [
            {
                "group": row["group"],
                "stats": {"data": row["seconds"]},
                "extra_info": {name: row[name] for name in DESCRIBED},
            }
            for row in rows
            if row["seconds"]
        ],
        "left_out": {"groups": {}, "providers": left_out},
    }


def ceilings() -> None:
    """The device, and what it was seen to do: floors are of these two numbers."""
    import torch

    from . import roofline, timing

    device = torch.device("cuda", 0)
    with timing.one_stream(device):
        copy = roofline.copy_gbps(device, "device")
        product = roofline.product_tflops("bf16", device, "device")
    found = {"device": torch.cuda.get_device_name(), "copy_gbps": copy, "bf16_tflops": product}
    lines.append(Path(os.environ["PAE_LINES"]), "ceilings", **found)
    print(found)


def stem_here(have: Path | None) -> Path:
    """Where this call's files go, an earlier call's lines among them.

    Raises:
        SystemExit: no GPU, or these lines are of another device or commit.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here")
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    asked = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = os.environ.setdefault("PAE_COMMIT", asked or "unknown")
    device = re.sub("[^a-z0-9-]", "", torch.cuda.get_device_name().lower().replace(" ", "-"))
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{device}-{commit}"
    if have is not None:
        if have.name != f"{stem.name}.jsonl":
            raise SystemExit(f"--have must be {stem.name}.jsonl, got {have.name}: another day's")
        if not stem.with_suffix(".jsonl").exists():
            shutil.copyfile(have, stem.with_suffix(".jsonl"))
    return stem


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__, formatter_class=raw)
    parser.add_argument("stages", nargs="*", help="a, b, c; all of them when none is named")
    parser.add_argument("--seconds", type=float, default=570, help="for all steps together")
    parser.add_argument("--slow", type=float, default=1, help="times every limit of a step")
    parser.add_argument("--have", type=Path, help="lines of an earlier call")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := {*options.stages} - {*STAGES}:
        parser.error(f"stages are {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if options.ceilings:
        ceilings()
        return 0
    chosen = [step for step in steps() if step.stage in (options.stages or STAGES)]
    if options.list:
        for step in chosen:
            print(f"{step.stage} {step.name} ({step.seconds}s): {' '.join(step.command)}")
        return 0
    day = Day(stem_here(options.have), options.seconds, options.slow)
    known = {e["kind"] for e in lines.read(day.lines)}
    if options.stages and "a" not in options.stages:
        chosen.insert(0, _build())  # what stage b tests
    day.run([step for step in chosen if step.name not in known])
    day.write()
    return int(day.failed)


if __name__ == "__main__":
    sys.exit(main())
