"""Write docs/planner.md from the results of ``step_time_forecast.py``.

python benchmarks/step_time_page.py
"""

import json
import sys
from pathlib import Path
from typing import Any

from moesaic.core.markdown import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "step_time_forecast.json"


def page(found: dict[str, Any]) -> str:
    """Return the page as Markdown."""
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
    failed = "".join(f"- {run['model']}, {run['plan']}: {run['why']}\n" for run in found["failed"])
    return f"""# Forecasts and measured steps

*Written by `benchmarks/step_time_page.py` from `benchmarks/results/step_time_forecast.json`.*

The machine was calibrated, all forecasts were written to a file (sha256
`{found["forecasts_sha256"][:16]}...`), and then every plan ran: {machine["processor"]},
{machine["cores"]} cores, torch {machine["torch"]}, load {machine["load_before"]:.1f} at the end,
{found["date"]}, commit {found["commit"]}. With a load above 1 the times are those of a busy
machine, and errors are mostly its.

Error of a step's time: {found["error_median"]:.0%} in the median, {found["error_worst"]:.0%} at
worst; {len(found["misses"])} of {len(runs)} are off by more than 15 %. "Skewed" sends 45 % of a
layer's rows to one expert.

{markdown_table(("model", "ranks", "rows", "plan", "forecast s", "measured s", "error"), runs)}

## Policy regret

For each model, number of ranks, rows of a step and limit of a rank's memory: the plan that the
forecast chose, the fastest that was measured, and how much longer the chosen one takes. The worst
is {found["regret_worst"]:.0%}.

{markdown_table(("model", "ranks", "rows", "limit", "chosen", "fastest", "regret"), cells)}

## Not run

{failed or "Every plan ran."}
"""


if __name__ == "__main__":
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    (ROOT / "docs" / "planner.md").write_text(page(json.loads(results.read_text())).rstrip() + "\n")
