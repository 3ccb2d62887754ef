"""``moesaic bench``: benchmark an MoE layer beside dense layers and other libraries."""

from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, print_table
from moesaic.cli.styled_text import styled

with deferred():
    import torch

    from moesaic.bench.layer_benchmark import LayerBenchmark, run_layer_benchmark
    from moesaic.bench.layer_workload import parse_shape
    from moesaic.core.units import show_bytes

app = command_app(no_args_is_help=True, help="Benchmarks on this machine.")


@app.callback()
def group() -> None:
    """Typer drops the name of an only subcommand unless the app has a callback."""


@app.command()
def layer(
    *,
    shape: Annotated[str, typer.Option(help="A, B, C, D or tokens,dim,hidden,experts,k.")] = "A",
    against: Annotated[
        str,
        typer.Option(help="Other implementations, comma-separated; dense and moesaic always run."),
    ] = "dense-compiled,unfused,hf,deepspeed",
    threads: Annotated[
        int, typer.Option(min=0, max=4096, help="CPU threads; 0: the default of torch.")
    ] = 0,
    rounds: Annotated[
        int, typer.Option(min=1, max=100_000, help="Repetitions of each implementation.")
    ] = 9,
    backward: Annotated[bool, typer.Option("--backward/--forward-only")] = True,
    skew: Annotated[
        Literal["none", "zipf"], typer.Option(help="Expert load: equal, or 1/rank.")
    ] = "none",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of all tensors.")] = (
        "float32"
    ),
) -> Result:
    """Time an MoE layer, a dense layer with the same number of rows, and other libraries.

    Example: [cyan]moesaic bench layer --shape B --against hf,deepspeed --threads 2[/]
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    settings = LayerBenchmark(
        parse_shape(shape),
        passes="forward+backward" if backward else "forward",
        against=names,
        skew=skew,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype],
        threads=threads,
        rounds=rounds,
    )
    found = run_layer_benchmark(settings)
    return Result(found, lambda console: _show(found, console))


def _show(found: dict[str, Any], console: Console) -> None:
    settings, machine = found["settings"], found["machine"]
    shape = ",".join(str(n) for n in settings["shape"].values())
    console.print(
        styled(
            "[bold]{shape}[/] (tokens, dim, hidden, experts, k), {passes}, {dtype}, {threads} "
            "threads; largest load {load:.1f} times the mean",
            shape=shape,
            load=found["largest_load"],
            **{name: settings[name] for name in ("passes", "dtype", "threads")},
        )
    )
    rows = found["implementations"]
    names = sorted(rows, key=lambda name: rows[name]["of_dense"]["median"])
    print_table(
        console,
        ("", "ms", "of dense", "quartiles", "best/best", "of ours", "saved"),
        (_implementation_row(name, rows[name], dense=found["dense"]) for name in names),
    )
    if found["least_saved_bytes"]:
        least = show_bytes(found["least_saved_bytes"])
        console.print(
            f"ms: median; saved: for the backward pass (at least x and pre-activation: {least})",
        )
    for name, reason in found["unavailable"].items():
        console.print(styled("[yellow]{name}[/]: {reason}", name=name, reason=reason))
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_before']:.1f}, "
        f"torch {machine['torch']}, commit {found['commit'] or 'unknown'}",
        style="dim",
    )


def _implementation_row(name: str, row: dict[str, Any], *, dense: str) -> list[str | Text]:
    ratio, ours = row["of_dense"], row["of_moesaic"]
    low, high = ratio["quartiles"]
    saved = row["saved_bytes"]
    differs = row["differs_by"] is not None and row["differs_by"] > 0.02
    return [
        styled("[bold]{name}[/]", name=name)
        if name in ("moesaic", dense)
        else name + " (different result)" * differs,
        f"{row['median_ms']:.1f}",
        f"{ratio['median']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{ratio['best_over_best']:.2f}",
        f"{ours['median']:.2f}",
        show_bytes(saved) if saved is not None else "",
    ]
