"""``moesaic export``: write a model in the files of another program."""

from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.import_command import VerifyOption
from moesaic.cli.shared_options import JsonOption, RunArgument, command_app, print_result
from moesaic.cli.styled_text import cyan

with deferred():
    from moesaic.core.units import show_bytes
    from moesaic.exchange.compare_with_transformers import compare_with_transformers
    from moesaic.exchange.export_model import export_model
    from moesaic.exchange.peft_format import export_adapter

app = command_app()


class ExportFormat(StrEnum):
    """Whose files are written."""

    HF = "hf"
    PEFT = "peft"


@app.command()
def export(
    run: RunArgument,
    *,
    to: Annotated[
        ExportFormat, typer.Option("--to", help="hf: a model of transformers; peft: an adapter.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new directory.")],
    layout: Annotated[
        str | None, typer.Option(metavar="NAME", help="Names of experts: per-expert or fused.")
    ] = None,
    verify: VerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the directory that from_pretrained of transformers loads.

    With peft: the adapter of a run of LoRA, for PeftModel.from_pretrained.

    Example: [cyan]moesaic export models/qwen3-tuned --to hf --out exported[/]
    """
    value: dict[str, Any] = {"directory": str(out), "format": to.value}
    if to is ExportFormat.PEFT:
        value["tensors"] = export_adapter(run, out=out)
        text = f"{out}: {value['tensors']} tensors of an adapter"
        print_result(value, as_json=as_json, show=lambda console: console.print(text))
        return
    value |= asdict(export_model(run, out=out, layout=layout))
    if verify:
        agreement = compare_with_transformers(out, ours=run)
        value["verify"] = asdict(agreement) | {"text": agreement.text()}
    print_result(value, as_json=as_json, show=partial(_show, value))


def _show(value: dict[str, Any], console: Console) -> None:
    about = f"{value['family']}, {value['layout']}, {value['tensors']} tensors"
    console.print(cyan(value["directory"]), f"{about}, {show_bytes(value['bytes'])}")
    if "verify" in value:
        console.print(value["verify"]["text"])
