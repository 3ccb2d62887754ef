"""``moesaic routes``: show, count and compare files of recorded routing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, print_table
from moesaic.cli.styled_text import cyan, styled

with deferred():
    import numpy as np

    from moesaic.checkpoint.routes_file import RoutesFile
    from moesaic.core.errors import UserError
    from moesaic.core.units import show_bytes
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.evaluate.routing_analysis import RoutingAnalysis, describe_usage
    from moesaic.moe.routing_agreement import RoutingAgreement, compare_routes
    from moesaic.monitor.expert_usage import LayerUsage, summarize_load
    from moesaic.serve.translator import routed_experts, token_text

app = command_app()
RoutesPath = Annotated[Path, typer.Argument(metavar="FILE", help="A routes file.")]


@app.command()
def show(
    path: RoutesPath,
    *,
    batch: Annotated[int, typer.Option(min=0, max=2**62, help="Which batch, from 0.")] = 0,
    row: Annotated[int, typer.Option(min=0, max=2**62, help="Which row of it.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json: ids as text.")
    ] = None,
) -> Result:
    """Show the contents of a file, and the experts of each token of one row.

    Example: [cyan]moesaic routes show out.routes --row 3[/]
    """
    file = RoutesFile(path)
    value: dict[str, Any] = {
        "languages": list(file.languages),
        "about": file.about,
        "batches": len(file),
        "bytes": path.stat().st_size,
        "layers": [head.model_dump() for head in file.layers],
        "sides": _row_experts(file, batch=batch, row=row, tokenizer=tokenizer),
    }
    return Result(value, lambda console: _show(value, console))


@app.command()
def stats(
    path: RoutesPath,
    *,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json: ids as text.")
    ] = None,
) -> Result:
    """Count load and drops, and how far language, token and position determine the expert.

    Example: [cyan]moesaic routes stats out.routes[/]
    """
    file = RoutesFile(path)
    analysis = RoutingAnalysis(file.languages)
    for routes in file:
        analysis.add(routes)
    layers = analysis.usage.layers()
    text = _token_decoder(tokenizer)
    value = {
        "summary": summarize_load(layers),
        "layers": {layer.layer: _load_numbers(layer) for layer in layers},
        "languages": describe_usage(analysis.usage),
        "insight": analysis.to_dict(show=text)["layers"],
    }
    return Result(value, lambda console: _show_stats(value, console))


@app.command("compare")
def compare_files(path: RoutesPath, other: RoutesPath) -> Result:
    """Compare the routing of the same text by two models, or by two checkpoints.

    Example: [cyan]moesaic routes compare early.routes late.routes[/]
    """
    found = compare_routes(RoutesFile(path), RoutesFile(other))
    value = {
        "edges": found.edges,
        "tokens": found.tokens,
        "layers": {x.layer: {"edges": x.edges, "tokens": x.tokens} for x in found.layers},
    }
    return Result(value, lambda console: _show_agreement(found, console))


def _token_decoder(tokenizer: Path | None) -> Callable[[int], str]:
    return str if tokenizer is None else partial(token_text, Tokenizer.load(tokenizer))


def _row_experts(
    file: RoutesFile, *, batch: int, row: int, tokenizer: Path | None
) -> dict[str, Any]:
    """Return the tokens of one row, and per layer the [expert, weight] pairs of each token."""
    text, sides = _token_decoder(tokenizer), {}
    layers = next((layers for number, layers in enumerate(file) if number == batch), None)
    if layers is None:
        raise UserError(f"--batch {batch}: {file.path} has {len(file)}, numbered from 0")
    for layer in layers:
        tokens, experts = layer.tokens, routed_experts(layer.routing)
        in_row = (tokens.row == row).nonzero()[:, 0].tolist()
        side = sides.setdefault(
            layer.side, {"tokens": [text(int(tokens.token[i])) for i in in_row], "layers": {}}
        )
        side["layers"][layer.layer] = [
            [[expert, round(weight, 4)] for expert, weight in experts[i]] for i in in_row
        ]
    return sides


def _load_numbers(layer: LayerUsage) -> dict[str, float]:
    names = ("edges", "load_entropy", "max_vio", "min_load", "dead_experts", "drop_frac")
    return {name: getattr(layer, name) for name in (*names, "null_expert_frac")}


def _show(value: dict[str, Any], console: Console) -> None:
    about = ", ".join(f"{name} {what}" for name, what in value["about"].items())
    console.print(f"{value['batches']} batches, {show_bytes(value['bytes'])}; {about}")
    for name, side in value["sides"].items():
        rows = []
        for i, token in enumerate(side["tokens"]):
            cells = (
                " ".join(f"{expert}\u00d7{weight:.2f}" for expert, weight in tokens[i]) or "-"
                for tokens in side["layers"].values()
            )
            rows.append((styled("[bold]{token}[/]", token=token), *map(cyan, cells)))
        columns = ("token", *side["layers"])
        print_table(console, columns, rows, title=f"\n{name}", align="l" * len(columns))


def _show_stats(value: dict[str, Any], console: Console) -> None:
    columns = next(iter(value["layers"].values()), {})
    print_table(
        console,
        ("layer", *(name.replace("_", " ") for name in columns)),
        (
            (cyan(layer), *(f"{n:,}" if n == int(n) else f"{n:.3f}" for n in numbers.values()))
            for layer, numbers in value["layers"].items()
        ),
        title="load",
    )
    rows = []
    for layer, found in value["insight"].items():
        entropy = found["uncertainty"]
        language = value["languages"][layer]["language_entropy"]
        given = (language, entropy["token"], entropy["token_by_chance"], entropy["position"])
        rows.append((cyan(layer), *(f"{share:.3f}" for share in given)))
    print_table(
        console,
        ("layer", "given language", "given token", "by chance", "given position"),
        rows,
        title="\nconditional entropy of the expert (1: independent)",
    )
    print_table(
        console,
        ("layer", "first half", "second half"),
        (
            (cyan(layer), *(f"{rate:.2%}" for rate in _drop_rates_by_half(found["positions"])))
            for layer, found in value["insight"].items()
        ),
        title="\ndropped by position",
    )


def _drop_rates_by_half(positions: dict[str, list[int]]) -> tuple[float, float]:
    """Return the drop rates before and after the median position of edges."""
    asked, dropped = np.array(positions["asked"]), np.array(positions["dropped"])
    middle = int(np.searchsorted(asked.cumsum(), asked.sum() / 2)) + 1 if asked.size else 0
    parts = [(dropped[:middle], asked[:middle]), (dropped[middle:], asked[middle:])]
    first, second = (float(d.sum() / max(a.sum(), 1)) for d, a in parts)
    return first, second


def _show_agreement(found: RoutingAgreement, console: Console) -> None:
    rows: list[tuple[str | Text, ...]] = [
        (cyan(x.layer), f"{x.edges:.1%}", f"{x.tokens:.1%}") for x in found.layers
    ]
    rows.append(("mean / every layer", f"{found.edges:.1%}", f"{found.tokens:.1%}"))
    print_table(console, ("layer", "equal edges", "equal tokens"), rows)
