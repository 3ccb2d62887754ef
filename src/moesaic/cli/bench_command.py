"""``moesaic bench``: how fast it is on this machine, beside what it is compared with."""

from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.bench.layer_benchmark import LayerBenchmark, run_layer_benchmark
from moesaic.bench.layer_workload import Skew, parse_shape
from moesaic.cli.shared_options import JsonOption, command_app, print_result
from moesaic.core.units import show_bytes

app = command_app(
    no_args_is_help=True, help="Measure on this machine, beside others in the same run."
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@app.callback()
def group() -> None:
    """Keep ``layer`` a verb of its own: an app of one command would swallow its name."""


@app.command()
def layer(
    *,
    shape: Annotated[str, typer.Option(help="A, B, C, D or tokens,dim,hidden,experts,k.")] = "A",
    against: Annotated[
        str, typer.Option(help="Contenders, by commas; dense and moesaic always run.")
    ] = "dense-compiled,unfused,hf,deepspeed",
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch takes.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 9,
    backward: Annotated[bool, typer.Option("--backward/--forward-only")] = True,
    skew: Annotated[Skew, typer.Option(help="Load of the experts: equal, or 1/rank.")] = "none",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of all tensors.")] = (
        "float32"
    ),
    as_json: JsonOption = False,
) -> None:
    """An MoE layer beside a dense layer of as many rows, and beside other libraries.

    Example: [cyan]moesaic bench layer --shape B --against hf,deepspeed --threads 2[/]
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    question = LayerBenchmark(
        parse_shape(shape),
        passes="forward+backward" if backward else "forward",
        against=names,
        skew=skew,
        dtype=DTYPES[dtype],
        threads=threads,
        rounds=rounds,
    )
    found = run_layer_benchmark(question)
    print_result(found, as_json=as_json, show=lambda console: _show(found, console))


def _show(found: dict[str, Any], console: Console) -> None:
    asked, about = found["question"], found["machine"]
    shape = ",".join(str(n) for n in asked["shape"].values())
    console.print(
        f"[bold]{shape}[/] (tokens, dim, hidden, experts, k), {asked['passes']}, {asked['dtype']}, "
        f"{asked['threads']} threads; fullest expert {found['largest_load']:.1f} times its share",
        highlight=False,
    )
    table = Table(box=None)
    table.add_column("")
    for column in ("ms", "of dense", "quartiles", "best/best", "of ours", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = found["contenders"]
    for name in sorted(rows, key=lambda name: rows[name]["of_dense"]["median"]):
        table.add_row(*_contender_row(name, rows[name], dense=found["dense"]))
    console.print(table)
    if found["least_saved_bytes"]:
        least = show_bytes(found["least_saved_bytes"])
        console.print(
            f"ms: median; kept: for backward (x and the pre-activation alone are {least})",
            highlight=False,
        )
    for name, reason in found["absent"].items():
        console.print(f"[yellow]{name}[/]: {escape(reason)}", highlight=False)
    console.print(
        f"[dim]{about['processor']}, {about['cores']} cores, load {about['load_before']:.1f}, "
        f"torch {about['torch']}, commit {found['commit'] or 'unknown'}[/]",
        highlight=False,
    )


def _contender_row(name: str, row: dict[str, Any], *, dense: str) -> list[str]:
    ratio, ours = row["of_dense"], row["of_moesaic"]
    low, high = ratio["quartiles"]
    kept = row["saved_bytes"]
    differs = row["differs_by"] is not None and row["differs_by"] > 0.02
    return [
        f"[bold]{name}[/]" if name in ("moesaic", dense) else name + " (another answer)" * differs,
        f"{row['median_ms']:.1f}",
        f"{ratio['median']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{ratio['best_over_best']:.2f}",
        f"{ours['median']:.2f}",
        show_bytes(kept) if kept is not None else "",
    ]
