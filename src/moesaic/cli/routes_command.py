"""``moesaic routes``: look into files of recorded routing."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.checkpoint.routes_file import RoutesFile
from moesaic.cli.shared_options import JsonOption, command_app, print_result
from moesaic.core.errors import UserError
from moesaic.core.units import show_bytes
from moesaic.data.tokenizer import Tokenizer
from moesaic.evaluate.routing_analysis import RoutingAnalysis, describe_usage
from moesaic.moe.routing_agreement import RoutingAgreement, compare_routes
from moesaic.monitor.expert_usage import LayerUsage, summarize_load

app = command_app()
RoutesPath = Annotated[Path, typer.Argument(metavar="FILE", help="A routes file.")]


@app.command()
def show(
    path: RoutesPath,
    *,
    batch: Annotated[int, typer.Option(min=0, help="Which batch, from 0.")] = 0,
    row: Annotated[int, typer.Option(min=0, help="Which row of it.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json: ids as text.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a file holds, and the experts of each token of one row.

    Example: [cyan]moesaic routes show out.routes --row 3[/]
    """
    file = RoutesFile(path)
    value: dict[str, Any] = {
        "languages": list(file.languages),
        "about": file.about,
        "batches": len(file),
        "bytes": path.stat().st_size,
        "layers": [
            {
                "layer": h.layer,
                "experts": h.experts,
                "null_experts": h.null_experts,
                "per_token": h.per_token,
            }
            for h in file.layers
        ],
        "sides": _row_experts(file, batch=batch, row=row, tokenizer=tokenizer),
    }
    print_result(value, as_json=as_json, show=lambda console: _show(value, console))


@app.command()
def stats(
    path: RoutesPath,
    *,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json: ids as text.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Count: load, drops by position, and what the routers read (language, token, position).

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
    print_result(value, as_json=as_json, show=lambda console: _show_stats(value, console))


@app.command("compare")
def compare_files(path: RoutesPath, other: RoutesPath, *, as_json: JsonOption = False) -> None:
    """Compare the routing of the same text by two models, or by two checkpoints.

    Example: [cyan]moesaic routes compare early.routes late.routes[/]
    """
    found = compare_routes(RoutesFile(path), RoutesFile(other))
    value = {
        "edges": found.edges,
        "tokens": found.tokens,
        "layers": {x.layer: {"edges": x.edges, "tokens": x.tokens} for x in found.layers},
    }
    print_result(value, as_json=as_json, show=lambda console: _show_agreement(found, console))


def _token_decoder(tokenizer: Path | None) -> Any:
    if tokenizer is None:
        return str
    known = Tokenizer.load(tokenizer)

    def text(index: int) -> str:
        said = known.decode([index])
        return said if said and "\ufffd" not in said else known.id_to_token(index)

    return text


def _row_experts(
    file: RoutesFile, *, batch: int, row: int, tokenizer: Path | None
) -> dict[str, Any]:
    """Tokens of one row, and per layer the kept [expert, weight] of each."""
    text, sides = _token_decoder(tokenizer), {}
    found = next((routes for number, routes in enumerate(file) if number == batch), None)
    if found is None:
        raise UserError(f"--batch {batch}: {file.path} has {len(file)}, numbered from 0")
    for routes in found:
        tokens, routing = routes.tokens, routes.routing
        mine = (tokens.row == row).nonzero()[:, 0].tolist()
        side = sides.setdefault(
            routes.side, {"tokens": [text(int(tokens.token[i])) for i in mine], "layers": {}}
        )
        edges: dict[int, list[list[float]]] = {i: [] for i in mine}
        columns = (routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist())
        for token, expert, weight in zip(*columns, strict=True):
            if token in edges and expert < routing.num_experts:
                edges[token].append([expert, round(weight, 4)])
        side["layers"][routes.layer] = [edges[i] for i in mine]
    return sides


def _load_numbers(layer: LayerUsage) -> dict[str, float]:
    return {
        "edges": layer.edges,
        "load_entropy": layer.load_entropy,
        "max_vio": layer.max_vio,
        "min_load": layer.min_load,
        "dead_experts": layer.dead_experts,
        "drop_frac": layer.drop_frac,
        "null_expert_frac": layer.null_expert_frac,
    }


def _show(value: dict[str, Any], console: Console) -> None:
    told = ", ".join(f"{name} {what}" for name, what in value["about"].items())
    console.print(
        f"{value['batches']} batches, {show_bytes(value['bytes'])}; {escape(told)}", highlight=False
    )
    for name, side in value["sides"].items():
        table = Table(box=None, title=f"\n{name}", title_justify="left")
        for column in ("token", *side["layers"]):
            table.add_column(column, style="bold" if column == "token" else "cyan")
        for i, token in enumerate(side["tokens"]):
            edges = (rows[i] for rows in side["layers"].values())
            shown = (
                " ".join(f"{e}\u00d7{weight:.2f}" for e, weight in row) or "-" for row in edges
            )
            table.add_row(escape(token), *shown)
        console.print(table)


def _show_stats(value: dict[str, Any], console: Console) -> None:
    table = Table(box=None, title="load", title_justify="left")
    table.add_column("layer", style="cyan")
    for name in next(iter(value["layers"].values()), {}):
        table.add_column(name.replace("_", " "), justify="right")
    for layer, numbers in value["layers"].items():
        table.add_row(layer, *(f"{n:,}" if n == int(n) else f"{n:.3f}" for n in numbers.values()))
    console.print(table)
    table = Table(box=None, title="\nuncertainty of the expert, of 1", title_justify="left")
    for name in ("layer", "given language", "given token", "by chance", "given position"):
        table.add_column(name, justify="right" if name != "layer" else "left")
    for layer, found in value["insight"].items():
        known = found["uncertainty"]
        language = value["languages"][layer]["language_entropy"]
        shares = (language, known["token"], known["token_by_chance"], known["position"])
        table.add_row(f"[cyan]{layer}[/]", *(f"{share:.3f}" for share in shares))
    console.print(table)
    table = Table(box=None, title="\ndropped by position", title_justify="left")
    for name in ("layer", "first half", "second half"):
        table.add_column(name, justify="right" if name != "layer" else "left")
    for layer, found in value["insight"].items():
        halves = _drop_rates_by_half(found["positions"])
        table.add_row(f"[cyan]{layer}[/]", *(f"{share:.2%}" for share in halves))
    console.print(table)


def _drop_rates_by_half(positions: dict[str, list[int]]) -> tuple[float, float]:
    """Drop rates before and after the position that half of the edges come before."""
    asked, dropped = np.array(positions["asked"]), np.array(positions["dropped"])
    middle = int(np.searchsorted(asked.cumsum(), asked.sum() / 2)) + 1 if asked.size else 0
    parts = [(dropped[:middle], asked[:middle]), (dropped[middle:], asked[middle:])]
    first, second = (float(d.sum() / max(a.sum(), 1)) for d, a in parts)
    return first, second


def _show_agreement(found: RoutingAgreement, console: Console) -> None:
    table = Table(box=None)
    for name in ("layer", "edges alike", "tokens alike"):
        table.add_column(name, justify="right" if name != "layer" else "left")
    for layer in found.layers:
        table.add_row(f"[cyan]{layer.layer}[/]", f"{layer.edges:.1%}", f"{layer.tokens:.1%}")
    table.add_row("mean / every layer", f"{found.edges:.1%}", f"{found.tokens:.1%}")
    console.print(table)
