"""Write docs/planner.md from ``step_time_forecast.py``, ``peak_forecast.py``, ``known_plans.py``.

The machine that the forecasts are of is written too, as the machine file of its name.

python benchmarks/step_time_page.py
"""

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from moesaic.core.markdown import markdown_table
from moesaic.planner.machine import Machine

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"
HEADER = ("model", "ranks", "rows", "plan", "forecast s", "measured s", "error", "others")
DISTURBED = 0.1
RESULTS = FOLDER / "step_time_forecast.json"
FORECASTS = FOLDER / "step_time_forecasts_before.json"
MACHINES = ROOT / "src" / "moesaic" / "planner" / "machines"


def peaks(found: dict[str, Any]) -> str:
    """Return the section on peak memory."""
    cases = [
        (
            case["case"],
            f"{case['forecast_bytes'] / 1e6:.2f}",
            f"{case['measured_bytes'] / 1e6:.2f}",
            f"{case['error']:+.2%}",
        )
        for case in found["cases"]
    ]
    misses = ", ".join(found["over_2_percent"]) or "none"
    return f"""## Peak memory

The most bytes of rank 0 at once in a step, forecast (sha256 `{found["forecast_sha256"][:16]}...`)
before the runs and measured on real ranks: off by {found["median_error"]:.2%} in the median and by
{found["worst_error"]:.2%} at worst over {len(cases)} cases; off by more than 2 %: {misses}.
P is a pipeline, D data, E expert, M tensor, C context parallelism, Z a ZeRO stage.

{markdown_table(("case", "forecast MB", "measured MB", "error"), cases)}
"""


def known_plans(found: dict[str, Any]) -> str:
    """Return the section on plans whose order others have measured."""
    folding = [
        (
            name,
            each["plan"],
            f"{each['tokens_per_second_and_device']:,.0f}",
            f"{each['mfu_active']:.1%}",
        )
        for name, each in found["folding"].items()
    ]
    rows = [
        (
            name,
            each["plan"],
            "yes" if each.get("fits", True) else "no",
            f"{each['tokens_per_second_and_device']:,.0f}",
            f"{each['theirs']:,}" if each.get("theirs") else "out of memory" * ("theirs" in each),
        )
        for name, each in found["streamed"].items()
    ]
    rates = {name: each["tokens_per_second_and_device"] for name, each in found["streamed"].items()}
    gain = rates["46B, expert 4, streamed"] / rates["46B, expert 8, resident"]
    kept = rates["27B, expert 4, streamed"] / rates["27B, expert 4, resident"]
    host = found["streamed"]["46B, expert 4, streamed"]["bytes"]["HostMemory"] / 1e9
    return f"""## Plans that others have measured

Asked for the order, which is reproduced, and not for the figures.

**Folding.** Mixtral 8x22B on 128 H100 with folded and unfolded expert parallelism, without ZeRO 2
and 3 and recomputation: 2504.14960 is quoted with 49.3 % and 46.3 % MFU.

{markdown_table(("plans", "fastest", "tokens/s per device", "MFU"), folding)}

**Small expert parallelism with streamed experts.** NVIDIA/Megatron-LM issue 6491 compares plans on
32 GH200 in nodes of four, 25 GB/s between nodes; its authors publish the shapes of both models
(four layers; 448 experts of which 28 are chosen, and 256 of which 16 are). With 46B parameters,
experts on four ranks do not fit, experts on eight exchange tokens between nodes, and experts on
four that stream from the host are {gain:.2f} times as fast (theirs 1.24); with 27B, which fit,
streaming leaves {kept:.0%} of the speed (theirs 94 %). "Fastest" is the search's answer over all
degrees of data, tensor and expert parallelism without ZeRO 2 and 3, in micro-batches of at most two
rows.

{markdown_table(("plan of", "plan", "fits", "tokens/s per device", "theirs"), rows)}

What differs: they keep the optimizer's states on the devices, sharded over the ranks with copies of
an expert. Here no rank has a part of a streamed expert, so states are on the host, whole, and are
updated there: {host:.0f} GB of host memory per device. The machine file's 480 GB hold that, the
120 GB of the nodes that were measured do not. With exchanges that overlap compute, which no plan
here has, experts on eight ranks reach 9,400 there, more than with streaming in bfloat16. Rows of a
step and the vocabulary are not published and our choice.
"""


def _others(run: dict[str, Any]) -> float:
    """Return what other processes computed in the pass that counts, as a share of all cores."""
    return min(run["passes"], key=lambda each: each["median"])["other_processes"]


def remaining(runs: list[dict[str, Any]]) -> list[str]:
    """Return the error that is left by group of plans: in the median, at worst, and its sign."""
    zero, found = [run for run in runs if "zero" in run["plan"]], []
    disturbed = [run for run in runs if _others(run) > DISTURBED]
    quiet = [run for run in runs if run not in disturbed]
    groups = {
        "one rank": [run for run in quiet if run["world"] == 1],
        "two ranks without ZeRO": [r for r in quiet if r["world"] == 2 and r not in zero],
        "ZeRO 3 (hooks, copies and collectives of its units)": [r for r in zero if r in quiet],
        f"disturbed by others (over {DISTURBED:.0%} of the cores)": disturbed,
    }
    for name, group in groups.items():
        errors = sorted(run["error"] for run in group)
        if errors:
            middle, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
            bias = statistics.median(errors)
            found.append(
                f"{name}, {len(errors)} plans: {middle:.0%} in the median, {worst:+.0%} at worst; "
                f"forecasts are {abs(bias):.0%} too {'short' if bias < 0 else 'long'} in the median"
            )
    return found


def page(found: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    others = ((peaks, "peak_forecast.json"), (known_plans, "known_plans.json"))
    sections = "\n".join(
        write(json.loads((FOLDER / name).read_text()))
        for write, name in others
        if (FOLDER / name).exists()
    )
    machine = found["machine"]
    runs = [
        (
            run["model"],
            run["world"],
            run["rows"],
            run["plan"],
            f"{run['seconds']:.3f}",
            f"{run['measured']:.3f}",
            f"{run['error']:+.0%}",
            f"{_others(run):.0%}",
        )
        for run in found["runs"]
    ]
    cells = [
        (
            cell["model"],
            cell["world"],
            cell["rows"],
            cell["limit"] if cell["limit"] == "none" else f"{cell['limit'] / 1e6:.0f} MB",
            cell["chosen"],
            cell["fastest"],
            f"{cell['regret']:.0%}",
        )
        for cell in found["cells"]
    ]
    drift = ""
    if "slow_down" in found:
        drift = f"\nA product took {found['slow_down']:.2f} times as long at the end as at first."
    causes = "\n".join(f"- {cause}" for cause in remaining(found["runs"]))
    failed = "".join(f"- {run['model']}, {run['plan']}: {run['why']}\n" for run in found["failed"])
    return f"""# Forecasts and measured steps

*Written by `benchmarks/step_time_page.py` from `step_time_forecast.json`, `peak_forecast.json` and
`known_plans.json` in `benchmarks/results`.*

The machine was calibrated in {found["calibration_seconds"]:.0f} seconds, all forecasts were written
to a file (sha256 `{found["forecasts_sha256"][:16]}...`), and then every plan ran:
{machine["processor"]}, {machine["cores"]} cores, torch {machine["torch"]}, {found["date"]}, commit
{found["commit"]}.{drift} "Others" is the share of both cores that other processes had meanwhile: a
step that they disturb is longer than any forecast. Passes over all plans: {found["passes"]}; the
fastest counts.

Error of a step's time: {found["error_median"]:.1%} in the median, {found["error_worst"]:.0%} at
worst; {len(found["misses"])} of {len(runs)} are off by more than 15 %. "Skewed" sends 45 % of a
layer's rows to one expert. The goals are 10 % in the median and 15 % at worst: the first is
{"met" if found["error_median"] <= 0.1 else "missed"}, the second
{"met" if found["error_worst"] <= 0.15 else "missed"}.

{causes}

{markdown_table(HEADER, runs)}

## Policy regret

For each model, number of ranks, rows of a step and limit of a rank's memory: the plan that the
forecast chose, the fastest that was measured, and how much longer the chosen one takes. The worst
is {found["regret_worst"]:.0%}; in {sum(cell["regret"] <= 0.1 for cell in found["cells"])} of
{len(cells)} cells it is at most 10 %, the goal.

{markdown_table(("model", "ranks", "rows", "limit", "chosen", "fastest", "regret"), cells)}

## Not run

{failed or "Every plan ran."}

{sections}"""


def write_machine(digest: str) -> None:
    """Write the machine file of the forecasts that were compared, whose sha256 is ``digest``."""
    before = FORECASTS.read_bytes()
    if hashlib.sha256(before).hexdigest() != digest:
        raise SystemExit(f"{FORECASTS.name} is not what {RESULTS.name} compares: run it again")
    machine = Machine.from_dict(json.loads(before)["machine"])
    (MACHINES / f"{machine.name}.yaml").write_text(machine.to_yaml())


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text())
    (ROOT / "docs" / "planner.md").write_text(page(results).rstrip() + "\n")
    write_machine(results["forecasts_sha256"])
