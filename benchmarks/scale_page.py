"""Write docs/guide/scale.md from benchmarks/results/scale.json.

python benchmarks/scale_page.py
"""

import json
from pathlib import Path
from typing import Any

from moesaic.core.units import show_bytes, show_count
from moesaic.planner.cost_entries import Purpose

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "guide" / "scale.md"

HEAD = """# Memory and communication of a plan

*Written by `benchmarks/scale_page.py` from `benchmarks/results/scale.json`.*

`moesaic scale` forecasts a plan before there are any ranks: the memory of rank 0 by purpose, and
the bytes that it sends in a step, by collective and axis. Each kind of block is run once on fake
tensors, and the step is put together from them by arithmetic ([cost of a step](cost.md)). With
`--dry-run` the whole model is also parallelized and trained for a step on fake tensors in a fake
process group, without allocating memory for them.

```console
$ moesaic scale tiny --world-size 8 --micro-batch 2x8+8 --set parallel.plan.zero=3 \
--set 'optimizer=AdamW()' --dry-run
```

```sh
moesaic scale zcode-m3-64 --world-size 64 --set parallel.plan.expert=64 --set parallel.plan.zero=2
moesaic scale trillion-384 --world-size 1024 --micro-batch 1x0+384 --set parallel.plan.expert=128 \\
    --set parallel.plan.tensor=8 --set parallel.plan.zero=3 --dry-run
```

In Python: `step_cost(CostSettings(...))` (`planner/step_cost.py`).

Which numbers are exact:

- Weights, gradients, optimizer state and the bytes of every collective equal those of real and of
  simulated ranks to the byte (`tests/laws/test_memory_and_communication_equal_their_estimates.py`).
- Activations and what ZeRO gathers are measured on fake tensors, each kind of block once, and
  summed: [how, and how exact](cost.md).
- Routing is taken as even. A real router sends more tokens to some ranks.
- The table has one pipeline stage and float32: 16 bytes per parameter with AdamW's states. In
  bfloat16 with float32 masters it is 2 + 2 + 12, also 16 ([precision](precision.md)).
- The widths of `zcode-m3-64` and `zcode-200b`, and the attention of `trillion-384`, are our choice
  (`model/presets`); the papers do not have them.
"""


def main() -> None:
    found = json.loads((HERE / "results" / "scale.json").read_text())
    parts = [
        HEAD,
        _memory(found["cases"]),
        _communication(found["cases"]),
        _simulated(found["cases"]),
    ]
    PAGE.write_text("\n".join([*parts, _capacity(found["capacity"])]))


def _name(case: dict[str, Any]) -> str:
    degrees = ("data", "tensor", "expert", "zero")
    plan = ", ".join(f"{axis} {case['plan'][axis]}" for axis in degrees)
    size = show_count(case["parameters"])
    return f"| {case['preset']} ({size}) | {case['world']:,} | {case['words']} | {plan} |"


def _memory(cases: list[dict[str, Any]]) -> str:
    kinds = [*map(str, Purpose), "device", "host"]
    lines = [
        "## Memory of rank 0",
        "",
        "`device` is the peak of a step, `host` the part on the host. Ranks that share",
        "rows (context x tensor) have 16 rows of 128 + 128 tokens, those of trillion-384 one row",
        "of 6,144.",
        "",
        "| model | ranks | | plan | " + " | ".join(kinds) + " |",
        "|---|---:|---|---|" + "---:|" * len(kinds),
    ]
    for case in cases:
        cells = " | ".join(show_bytes(case["bytes"][kind]) for kind in kinds)
        lines.append(f"{_name(case)} {cells} |")
    return "\n".join([*lines, ""])


def _communication(cases: list[dict[str, Any]]) -> str:
    lines = [
        "## Communication of rank 0 in a step",
        "",
        "| model | ranks | | plan | by collective and axis |",
        "|---|---:|---|---|---|",
    ]
    for case in cases:
        sent = sorted(case["sent"], key=lambda line: -line["bytes"])
        cells = ", ".join(
            f"{line['kind']} over {line['axis']} {show_bytes(line['bytes'])}"
            for line in sent
            if line["bytes"] >= 2**20
        )
        lines.append(f"{_name(case)} {cells} |")
    return "\n".join([*lines, "", "Volumes below 1 MiB are left out.", ""])


def _simulated(cases: list[dict[str, Any]]) -> str:
    lines = [
        "## Simulated",
        "",
        "One step of rank 0 with few tokens on fake tensors: whether its weights, gradients,",
        "optimizer state and the bytes of each collective equal the forecast for those tokens; CPU",
        "time and memory of the simulation. `peak` is the most memory in use, optimizer state",
        "included.",
        "",
        "| model | ranks | | plan | equal | peak | forecast | CPU s | memory |",
        "|---|---:|---|---|---|---:|---:|---:|---:|",
    ]
    for case in cases:
        done = case["rehearsal"]
        if done is None:
            lines.append(f"{_name(case)} not simulated | | | | |")
            continue
        sizes = (done["peak"], done["forecast_peak"])
        peaks = " | ".join(show_bytes(size) for size in sizes)
        memory = show_bytes(done["peak_rss_bytes"])
        equal = "to the byte" if done["equal"] else "NO"
        lines.append(f"{_name(case)} {equal} | {peaks} | {done['cpu_seconds']} | {memory} |")
    return "\n".join([*lines, ""])


def _capacity(found: dict[str, Any]) -> str:
    lines = [
        "## The largest model on 512 GPUs of 40 GB",
        "",
        "2109.10465 is quoted with more than 3.5T parameters on 512 A100 of 40 GB with",
        "E+Z-Offload+M, against about 400B for systems that use GPU memory only: a factor of 8 or",
        "more (from secondary texts, not from the paper's table). These are forecasts at",
        "2 + 2 + 12 bytes per parameter, with experts added to a base model until a GPU or its",
        "share of the host is full (without fragmentation and buffers of a communication library):",
        "",
        "| plan | parameters | device | host |",
        "|---|---:|---:|---:|",
    ]
    for name, each in found.items():
        if each is None:
            lines.append(f"| {name} | none fits | | |")
            continue
        sizes = f"{show_bytes(each['device'])} | {show_bytes(each['host'])}"
        lines.append(f"| {name} | {show_count(each['parameters'])} | {sizes} |")
    return "\n".join([*lines, "", _verdict(found), ""])


def _verdict(found: dict[str, Any]) -> str:
    sizes = {name: each["parameters"] if each else 0 for name, each in found.items()}
    hosted = {name: size for name, size in sizes.items() if "Offload" in name}
    alone = max(size for name, size in sizes.items() if name not in hosted)
    factors = "; ".join(
        f"with {name.rpartition(', ')[2]} the factor is {size / alone:.1f}"
        for name, size in hosted.items()
    )
    least = min(hosted.values()) / alone
    verdict = "reproduced" if least >= 8 else "not reproduced"
    return (
        f"Against our own largest model without offloading ({show_count(alone)}) the factor of 8 "
        f"is {verdict}: {factors}. Against the quoted 400B the same models are "
        f"{', '.join(f'{size / 4e11:.1f}' for size in hosted.values())} times as large. Host "
        "memory is the limit: with offloading it has 16 bytes of every parameter, while a GPU has "
        "a few blocks at a time (ZeRO stage 3; the paper has stage 2)."
    )


if __name__ == "__main__":
    main()
