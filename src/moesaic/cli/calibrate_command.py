"""``moesaic calibrate``: measure this machine and write its machine file and receipts."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, print_table, show_progress

with deferred():
    from moesaic.core.files import atomic_write, write_json
    from moesaic.core.units import show_bytes, show_flops, show_seconds
    from moesaic.planner.calibrate import Calibration, calibrate
    from moesaic.planner.machine import find_machine

app = command_app()


@app.command("calibrate")
def calibrate_machine(
    *,
    out: Annotated[
        Path, typer.Option(metavar="FILE.yaml", help="Where the machine file is written.")
    ] = Path("machine.yaml"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats, for a trial.")] = False,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The disk to measure; default: of --out.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A machine for what cannot be measured here."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The machine's name in the file.")] = None,
) -> Result:
    """Measure products, memory, collectives, copies, disk and what slows down beside what.

    It takes less than a minute on a machine that does nothing else. The raw timings are written
    beside the machine file, as FILE.receipts.json.

    Example: [cyan]moesaic calibrate --out machine.yaml[/]
    """
    found = calibrate(
        quick=quick,
        folder=folder or out.absolute().parent,
        like=find_machine(like) if like else None,
        name=name,
        notify=lambda what: show_progress(f"measured {what}"),
    )
    receipts = out.with_suffix(".receipts.json")
    atomic_write(out, found.machine.to_yaml())
    write_json(receipts, found.receipts())
    result = {"machine": str(out), "receipts": str(receipts), "seconds": found.seconds}
    return Result(
        result | {"numbers": found.machine.to_dict()}, lambda console: _show(found, result, console)
    )


def _show(found: Calibration, result: dict[str, Any], console: Console) -> None:
    machine = found.machine
    rows = [
        (f"{kind} products, {dtype}", show_flops(max(r for _, r in curve.points)) + "/s")
        for dtype, rates in sorted(machine.products.items())
        for kind, curve in (("dense", rates.dense), ("grouped", rates.grouped))
    ]
    links = ("within_node", "host_to_device", "device_to_host", "disk_read", "disk_write")
    numbers = machine.to_dict()
    for name in links:
        rate: Any = numbers[name]
        rows.append((name.replace("_", " "), show_bytes(rate["bytes_per_s"]["value"]) + "/s"))
    rows.append(("update on the host", show_bytes(machine.update.value) + "/s"))
    pairs: Any = numbers["contended"]
    for name, pair in pairs.items():
        both = name.replace("_", " " if name == "all_devices" else " + ")
        rows.append((f"{both} together", f"{pair['value']:.2f}x"))
    print_table(console, (machine.name, "highest rate"), rows)
    spread = max(found.measurements, key=lambda m: m.spread)
    console.print(
        f"\n{result['machine']} and {result['receipts']} written in "
        f"{show_seconds(result['seconds'])}; the widest spread is {spread.spread:.0%} of the "
        f"median, of {spread.what}"
    )
