"""The cost of an explanation, relative to the forward pass of the same model and next to alternatives.

    pip install -e ".[bench]"
    python benchmarks/cost.py

Times are ratios: all contenders run in turn, round after round in rotating order, and each time is divided
by that of the forward pass in the same round. Tables show the median and the quartiles. Memory is the peak of
one call beyond what its process held before, minus the same for the forward pass. On a CPU, each call runs in
a fresh process. Weights are random. A peer that is missing or fails is shown with its error.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import (
    BACKWARD,
    CLOSE,
    CPU_CASES,
    CUDA_CASES,
    DEPTHS,
    FOR_A_CLASS,
    FORWARD,
    KEPT,
    LARGE,
    PLOTTED,
    QUICK,
    RUNS,
    TIMED,
    VARIANTS,
    VITX,
    Case,
    explain_by,
)
from measuring import first_line, fresh_process, growth, import_seconds, interleaved, resident_peak
from other_version import explain_of
from peers import PACKAGES, PEERS
from showing import Panel, Row, case_table, draw, megabytes, memory_panel, table, time_panel

ALONE = "_alone"  # the hidden command that runs in a fresh process
PROCESSES = 5
ROLLOUT, GRAD_ROLLOUT, EVIDENCE = VITX
BESIDE: dict[str, tuple[str, Path]] = {}  # methods of another version: the name in this one, its folder


def set_beside(folder: Path) -> None:
    """Add the methods of another version of vitx to the contenders."""
    explain = explain_of(folder)
    for name in VITX:
        title = f"{name}, {folder.name}"
        BESIDE[title] = name, folder
        RUNS[title] = partial(explain_by, explain, name.removeprefix("vitx "))


def alone(case: dict[str, Any], run: str, threads: int) -> dict[str, Any]:
    """Make one call in this fresh process, and return the memory and the time that it takes."""
    torch.set_num_threads(threads)
    with suppress(Exception):  # a warm-up, so that the measured call imports nothing
        RUNS[run](*Case("test_vit", 1, 160).build("cpu"))
    model, images = Case(**case).build("cpu")
    begin = time.perf_counter()
    try:
        grown = growth(lambda: RUNS[run](model, images), "cpu")
    except Exception as error:
        return {"error": first_line(error)}
    return {"growth": grown, "peak": resident_peak(), "seconds": time.perf_counter() - begin}


def in_fresh_process(case: Case, run: str) -> dict[str, Any]:
    """Run `alone` in a fresh process, and return its result."""
    name, folder = BESIDE.get(run, (run, None))
    spec = {"case": asdict(case), "run": name, "threads": torch.get_num_threads()}
    return fresh_process(str(Path(__file__).resolve()), ALONE, json.dumps(spec), path=folder)


def in_fresh_processes(case: Case, run: str) -> int | str:
    """Return the bytes that a call needs, or its error; the median of runs if a few megabytes matter."""
    grown = []
    for _ in range(PROCESSES if run in CLOSE | set(BESIDE) else 1):
        found = in_fresh_process(case, run)
        if "error" in found:
            return str(found["error"])
        grown.append(int(found["growth"]))
    return int(median(grown))


def growths(case: Case, runs: Iterable[str], device: str) -> dict[str, int | str]:
    """Return the bytes that each call needs, or its error."""
    if device == "cpu":
        return {run: in_fresh_processes(case, run) for run in runs}
    model, images = case.build(device)
    needs: dict[str, int | str] = {}
    for run in runs:
        try:
            needs[run] = growth(partial(RUNS[run], model, images), device)
        except Exception as error:
            needs[run] = first_line(error)
    return needs


def over(value: int | str, base: int | str) -> int | str:
    """Return the difference, or the error if there is one."""
    if isinstance(value, int) and isinstance(base, int):
        return value - base
    return value if isinstance(value, str) else base


def measure(case: Case, rounds: int, device: str) -> tuple[float, dict[str, Row]]:
    """Return the seconds of the forward pass, and the measurements of each contender."""
    model, images = case.build(device)
    runs = {FORWARD: RUNS[FORWARD], **VITX, **(VARIANTS if case.variants else {}), **TIMED}
    runs |= {name: RUNS[name] for name in BESIDE}
    calls = {name: partial(run, model, images) for name, run in runs.items()}
    timings = interleaved(calls, FORWARD, max(rounds // case.every, 1), device)
    plain = timings.pop(FORWARD)
    rows = {name: Row(timing) for name, timing in timings.items()}
    del model, images, calls
    if case.memory:
        working = [name for name, row in rows.items() if not row.timing.error]
        needs = growths(case, [FORWARD, *working], device)
        for name in working:
            rows[name].over_forward = over(needs[name], needs[FORWARD])
            if BESIDE.get(name, (name,))[0] in FOR_A_CLASS and name != BACKWARD:
                rows[name].over_backward = over(needs[name], needs[BACKWARD])
    return median(plain.seconds), rows


def case_part(case: Case, rounds: int, device: str, panels: list[Panel] | None) -> str:
    """Return the section of a case, and add its panels to the plot."""
    plain, rows = measure(case, rounds, device)
    if panels is not None:
        panels.append(time_panel(case.title, rows))
        if case.memory:
            panels.append(memory_panel(case.title, rows))
    return f"## {case.title}\n\nThe forward pass takes {plain:.3f} s.\n\n{case_table(rows)}"


def depth_part(depths: Iterable[int]) -> str:
    """Return the section on peak memory by the number of layers."""
    pairs = {
        "rollout over forward": (ROLLOUT, FORWARD),
        "rollout over forward kept by autograd": (ROLLOUT, KEPT),
        "grad_rollout over forward": (GRAD_ROLLOUT, FORWARD),
        "grad_rollout over forward kept by autograd": (GRAD_ROLLOUT, KEPT),
        "grad_rollout over forward + backward": (GRAD_ROLLOUT, BACKWARD),
        "evidence over forward + backward": (EVIDENCE, BACKWARD),
    }
    lines = []
    for depth in depths:
        case = Case("deit_tiny_patch16_224", 1, 512, {"depth": depth})
        needs = growths(case, [FORWARD, KEPT, BACKWARD, *VITX], "cpu")
        cells = [megabytes(over(needs[one], needs[other])) for one, other in pairs.values()]
        lines.append([str(depth), *cells])
    title = "## Peak memory with depth: deit_tiny, 1 × 512 px"
    return f"{title}\n\n{table(['layers', *pairs], lines)}"


def large_part() -> str:
    """Return the section on a model with many tokens."""
    lines = []
    for run in (FORWARD, ROLLOUT):
        found = in_fresh_process(LARGE, run)
        if "error" in found:
            lines.append([run, f"fails: {found['error']}", "", ""])
        else:
            peak, grown = (f"{found[key] / 1e9:.2f} GB" for key in ("peak", "growth"))
            lines.append([run, peak, grown, f"{found['seconds']:.0f} s"])
    head = ["", "peak memory of the process", "of it by the call", "time"]
    return f"## {LARGE.title}\n\n{table(head, lines)}"


def import_part(rounds: int) -> str:
    """Return the section on `import vitx`."""
    found = import_seconds(["torch", "vitx"], rounds)
    ratio = found["vitx"] / found["torch"]
    lines = [[f"`import {name}`", f"{value:.2f} s"] for name, value in found.items()]
    return f"## Import\n\n{table(['', 'time'], [*lines, ['ratio', f'{ratio:.3f}']])}"


def machine(device: str) -> str:
    """Return versions and hardware in one line."""
    if device == "cuda":
        where = str(torch.cuda.get_device_name())
    else:
        where = f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    versions = ["python " + platform.python_version()]
    for package in ("torch", "timm", *PACKAGES):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return f"{where}; {', '.join(versions)}"


def processor() -> str:
    """Return the name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def parts(options: argparse.Namespace, panels: list[Panel]) -> dict[str, Callable[[], str]]:
    """Return the functions that measure each section on the device, by name."""
    device, rounds = options.device, options.rounds
    cases = CPU_CASES if device == "cpu" else CUDA_CASES
    plotted = (QUICK if options.quick else PLOTTED)[device]
    found: dict[str, Callable[[], str]] = {
        name: partial(case_part, case, rounds, device, panels if name in plotted else None)
        for name, case in cases.items()
    }
    if device == "cpu":
        found["depth"] = partial(depth_part, DEPTHS)
        found["large"] = large_part
        found["import"] = partial(import_part, rounds)
    return found


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--rounds", type=int, help="rounds of timing (default: 15); large cases take fewer")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all; a wrong name lists them")
    parser.add_argument("--quick", action="store_true", help="3 rounds of three small cases")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another version of vitx")
    parser.add_argument("--only-vitx", action="store_true", help="leave the peers out")
    parser.add_argument("--output", type=Path, default=Path("logs/cost"), help="folder of cost.md, cost.png")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 15)
    known = parts(options, [])
    options.cases = options.cases or (list(QUICK[options.device]) if options.quick else list(known))
    if wrong := set(options.cases) - set(known):
        parser.error(f"no case {', '.join(sorted(wrong))}: choose from {', '.join(known)}")
    return options


def main() -> None:
    """Measure, and write the tables and the plot after each part."""
    options = read_options()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.beside:
        set_beside(options.beside)
    if options.only_vitx:
        for name in PEERS:
            del TIMED[name]
    panels: list[Panel] = []
    where = machine(options.device)
    sections = [f"# What an explanation costs\n\n{where}."]
    available = parts(options, panels)
    for name in options.cases:
        print(f"measuring {name}", file=sys.stderr)
        sections.append(available[name]())
        (options.output / "cost.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
        if panels:
            draw(panels, groups(), options.output / "cost.png", where)
    print("\n\n".join(sections))


def groups() -> dict[str, dict[str, str]]:
    """Return the kind of each contender in the plot, by heading and name."""
    kinds = {name: "vitx" if name in VITX else "reference" if name == BACKWARD else "peer" for name in TIMED}
    return {
        "without a class": {name: kind for name, kind in kinds.items() if name not in FOR_A_CLASS},
        "for a class, with gradients": {name: kinds[name] for name in kinds if name in FOR_A_CLASS},
    }


if __name__ == "__main__":
    if sys.argv[1:2] == [ALONE]:
        print(json.dumps(alone(**json.loads(sys.argv[2]))))
    else:
        main()
