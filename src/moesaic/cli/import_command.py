"""``moesaic import``: a Hugging Face directory becomes a model directory like any other."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, show_progress
from moesaic.cli.styled_text import cyan

with deferred():
    from moesaic.checkpoint.model_card import add_to_card
    from moesaic.core.errors import UserError
    from moesaic.core.files import removed_on_error
    from moesaic.core.units import show_bytes, show_count
    from moesaic.data.tokenizer_source import TokenizerSource
    from moesaic.exchange.compare_with_transformers import (
        compare_with_transformers,
        require_transformers,
    )
    from moesaic.exchange.import_model import import_model
    from moesaic.exchange.peft_format import import_adapter
    from moesaic.model.parameter_flop_count import count_parameters

app = command_app()
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify", help="Compute 50 prompts in both programs; keep nothing if they differ."
    ),
]
BaseOption = Annotated[
    Path | None, typer.Option(metavar="MODEL", help="DIR is an adapter of PEFT, for this model.")
]


@app.command("import")
def import_(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory of transformers, or of DCP.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="MODEL", help="The new directory.")],
    layout: Annotated[
        str, typer.Option(metavar="NAME", help="Names of experts: auto, fused or per-expert.")
    ] = "auto",
    languages: Annotated[
        str, typer.Option(metavar="CODES", help="Languages that the tokenizer has tags of: deu,fra")
    ] = "",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help='Another tokenizer: "FromFile(path=..., eos=...)".'),
    ] = None,
    base: BaseOption = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help='Tensors to leave out: "model.layers.61.*" (MTP).'),
    ] = None,
    verify: VerifyOption = False,
) -> Result:
    """Read config, weights and tokenizer of a model of transformers, some rows at a time.

    Every tensor is accounted for, or nothing is written. Fine-tune it with `moesaic train --init`.

    Example: [cyan]moesaic import Qwen3-30B-A3B --out models/qwen3[/]
    """
    if base is not None:
        if verify or drop or languages or tokenizer is not None or layout != "auto":
            raise UserError("--base takes --out alone: the model has tokenizer and languages")
        return _import_adapter(directory, base=base, out=out)
    if verify:
        require_transformers()
    found = import_model(
        directory,
        out=out,
        layout=layout,
        tokenizer=None if tokenizer is None else TokenizerSource.from_dict(tokenizer),
        languages=[code.strip() for code in languages.split(",") if code.strip()],
        drop=drop or (),
    )
    for note in found.notes:
        show_progress(note)
    counted = count_parameters(found.model)
    value = {
        "model": str(out),
        "family": found.family,
        "layout": found.layout,
        "tensors": found.tensors,
        "bytes": found.bytes,
        "parameters": {"total": counted.total, "active": counted.active},
        "notes": list(found.notes),
    }
    if verify:
        value["verify"] = _compared(directory, out=out)
    return Result(value, partial(_show, value))


def _compared(directory: Path, *, out: Path) -> dict[str, Any]:
    """Compare an imported model with the one in transformers; one that differs is not kept."""
    with removed_on_error(out):
        agreement = compare_with_transformers(directory, ours=out)
    add_to_card(out, "comparison", agreement.text())
    return asdict(agreement) | {"text": agreement.text()}


def _import_adapter(directory: Path, *, base: Path, out: Path) -> Result:
    value = {"run": str(out), "matrices": import_adapter(directory, base=base, out=out)}
    text = f"{out}: an adapter of {value['matrices']} matrices, read beside {base}"
    return Result(value, lambda console: console.print(text))


def _show(value: dict[str, Any], console: Console) -> None:
    total, active = (show_count(value["parameters"][name]) for name in ("total", "active"))
    size = f"{total} parameters, {active} active, {show_bytes(value['bytes'])}"
    layout = f"{value['family']}, {value['layout']}, {value['tensors']} tensors"
    console.print(cyan(value["model"]), f"{layout}: {size}")
    if "verify" in value:
        console.print(value["verify"]["text"])
