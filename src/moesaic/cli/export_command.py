"""``moesaic export``: write a model in the files of another program."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.import_command import VerifyOption
from moesaic.cli.shared_options import Result, RunArgument, command_app, show_progress
from moesaic.cli.styled_text import cyan

with deferred():
    import torch

    from moesaic.checkpoint.model_card import add_to_card
    from moesaic.core.errors import UserError
    from moesaic.core.files import removed_on_error
    from moesaic.core.units import show_bytes
    from moesaic.exchange.compare_with_llama_cpp import compare_with_llama_cpp, require_llama_cpp
    from moesaic.exchange.compare_with_transformers import (
        compare_with_transformers,
        require_transformers,
    )
    from moesaic.exchange.export_ctranslate2 import export_ctranslate2
    from moesaic.exchange.export_gguf import export_gguf
    from moesaic.exchange.export_model import export_model
    from moesaic.exchange.peft_format import export_adapter

app = command_app()


@app.command()
def export(
    run: RunArgument,
    *,
    to: Annotated[
        Literal["hf", "gguf", "ctranslate2", "peft"],
        typer.Option("--to", help="hf: transformers; gguf: llama.cpp; ctranslate2; peft: adapter."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new directory.")],
    layout: Annotated[
        str | None, typer.Option(metavar="NAME", help="Names of experts: per-expert or fused.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of matrices (gguf; default: as they are)."),
    ] = None,
    verify: VerifyOption = False,
) -> Result:
    """Write a model in the files of another program: transformers, llama.cpp or CTranslate2.

    With --to peft: the adapter of a run of LoRA, for PeftModel.from_pretrained.

    Example: [cyan]moesaic export models/qwen3-tuned --to hf --out exported[/]
    """
    if to == "peft":
        if verify or (layout, dtype) != (None, None):
            raise UserError("--to peft takes no --verify, --layout or --dtype")
        return _export_adapter(run, out=out)
    hf, gguf = to == "hf", to == "gguf"
    if (layout and not hf) or (dtype and not gguf):
        raise UserError("--layout belongs to --to hf, and --dtype to --to gguf")
    kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    agreement = None
    if verify and to != "ctranslate2":
        _ = require_transformers() if hf else require_llama_cpp()
    if to == "ctranslate2":
        found, agreement = export_ctranslate2(run, out=out, verify=verify)
    elif hf:
        found = export_model(run, out=out, layout=layout)
        with removed_on_error(out):
            agreement = compare_with_transformers(out, ours=run) if verify else None
    else:
        found = export_gguf(run, out=out, dtype=kind)
        with removed_on_error(out):
            agreement = compare_with_llama_cpp(out, ours=run, dtype=kind) if verify else None
    for note in found.notes:
        show_progress(note)
    value: dict[str, Any] = {"directory": str(out), "format": to, **asdict(found)}
    if agreement is not None:
        add_to_card(out, "comparison", agreement.text())
        value["verify"] = asdict(agreement) | {"text": agreement.text()}
    return Result(value, partial(_show, value))


def _export_adapter(run: Path, *, out: Path) -> Result:
    value = {"directory": str(out), "tensors": export_adapter(run, out=out)}
    text = f"{out}: {value['tensors']} tensors of an adapter"
    return Result(value, lambda console: console.print(text))


def _show(value: dict[str, Any], console: Console) -> None:
    about = f"{value['family']}, {value['layout']}, {value['tensors']} tensors"
    console.print(cyan(value["directory"]), f"{about}, {show_bytes(value['bytes'])}")
    if "verify" in value:
        console.print(value["verify"]["text"])
