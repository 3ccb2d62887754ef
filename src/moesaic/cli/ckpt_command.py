"""``moesaic ckpt``: inspect, compare, verify and reshard checkpoints."""

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, print_table
from moesaic.cli.styled_text import cyan, styled

with deferred():
    from moesaic.checkpoint.block_index import INDEX_FILE, StoredTensor, read_index
    from moesaic.checkpoint.checkpoint_diff import TensorDifference, diff_checkpoints
    from moesaic.checkpoint.checkpoint_directory import list_checkpoints
    from moesaic.checkpoint.integrity import (
        IntegrityProblem,
        check_checkpoint,
        check_exported_weights,
    )
    from moesaic.checkpoint.manifest import MANIFEST_FILE, read_manifest
    from moesaic.checkpoint.model_card import add_to_card
    from moesaic.checkpoint.reshard import CheckpointForm, FullForm, ShardedForm, reshard
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.checkpoint.run_record import adopt_files, run_problems
    from moesaic.checkpoint.safetensors_io import DTYPE_NAMES
    from moesaic.core.errors import CheckpointError, UserError
    from moesaic.core.units import show_bytes, show_count
    from moesaic.train.merge_adapter import merge_adapter

app = command_app()
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A checkpoint, or the newest one of a directory or of a run."
    ),
]


@app.command()
def inspect(
    path: CheckpointPath,
    *,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> Result:
    """Show the contents of a checkpoint: step, parallel plan, tensors, experts, file sizes.

    Example: [cyan]moesaic ckpt inspect runs/demo[/]
    """
    directory = find_checkpoint(path)
    value = describe_checkpoint(directory, tensors=tensors)
    return Result(value, lambda console: _show(value, console))


@app.command("diff")
def diff(path: CheckpointPath, other: CheckpointPath) -> Result:
    """Compare two checkpoints tensor by tensor, of any form and parallel plan.

    Example: [cyan]moesaic ckpt diff runs/a runs/b[/]
    """
    found = list(diff_checkpoints(find_checkpoint(path), find_checkpoint(other)))
    differ = [d for d in found if not d.equal]
    value = {
        "tensors": len(found),
        "same": len(found) - len(differ),
        "differences": [asdict(d) for d in differ],
    }
    return Result(value, lambda console: _show_diff(differ, len(found), console))


@app.command()
def verify(
    path: CheckpointPath,
    *,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Do not fail on experts that are zero or identical.")
    ] = False,
) -> Result:
    """Check file hashes, that the shards cover every tensor and expert once, and all values.

    Of a run also what translation opens: that tokenizer, config and exported weights are those
    that were trained together. Reports each altered file, each gap, overlap or missing expert,
    each tensor with NaN or infinite values, and each expert that is zero or identical to another.
    Exit code 2 if anything is found.

    Example: [cyan]moesaic ckpt verify runs/demo/checkpoints/step-00000500[/]
    """
    checked, found = _check(path)
    wrong = [f for f in found if not (lenient and f.uncertain)]
    value = {"path": checked, "sound": not wrong, "findings": [asdict(f) for f in found]}
    return Result(value, lambda console: _show_findings(checked, found, console), 2 * bool(wrong))


@app.command()
def adopt(path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> Result:
    """Accept the present files of a run: tokenizer, config and weights that you exchanged.

    Writes their hashes to run.json. A run whose files differ from that record is not opened.

    Example: [cyan]moesaic ckpt adopt runs/demo[/]
    """
    record = adopt_files(RunDir.open(path))
    value = {"path": str(path), "files": sorted(record.files)}
    text = f"{path}: recorded {', '.join(value['files'])} and config.yaml as they are now"
    return Result(value, lambda console: console.print(text))


@app.command()
def merge(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run that trained an adapter.")],
) -> Result:
    """Write the weights of a run that trained an adapter: those it began with, and the adapter.

    The run that it began with is only read. Use needs no merging; a merged run needs no other.

    Example: [cyan]moesaic ckpt merge runs/tuned[/]
    """
    run = RunDir.open(path)
    value = {"path": str(run.model), "matrices": merge_adapter(run)}
    add_to_card(path, "merged", "model.safetensors has the adapter added, and needs no other run")
    text = f"{run.model}: {value['matrices']} matrices have their adapter added"
    return Result(value, lambda console: console.print(text))


@app.command("reshard")
def reshard_checkpoint(
    path: CheckpointPath,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where step-N is written.")],
    shards: Annotated[int | None, typer.Option(min=1, max=65_536, help="Number of shards.")] = None,
    unsharded: Annotated[
        bool, typer.Option("--full", help="One file for model, one for optimizer, ...")
    ] = False,
) -> Result:
    """Rewrite a checkpoint in another form, with one tensor in memory at a time.

    Resuming does not need it: any number of ranks loads any form. It is for other tools
    (--full writes plain safetensors files) and for fewer or more files.

    Example: [cyan]moesaic ckpt reshard runs/demo --full --out exported[/]
    """
    if unsharded == (shards is not None):
        raise UserError("expected one of --shards N and --full: the form to write")
    form: CheckpointForm = FullForm() if shards is None else ShardedForm(shards)
    written = reshard(find_checkpoint(path), root=out, form=form)
    value = {"path": str(written), "files": sorted(p.name for p in written.iterdir())}
    return Result(value, lambda console: console.print(str(written)))


def _check(path: Path) -> tuple[str, list[IntegrityProblem]]:
    """Return what was checked and the problems: of a checkpoint, or of a run with its newest."""
    run = RunDir(path)
    if not run.config.is_file():
        directory = find_checkpoint(path)
        return str(directory), check_checkpoint(directory)
    # a directory, a pipe or a dangling link in the place of the weights is a problem, too
    found = check_exported_weights(run.weights) if os.path.lexists(run.weights) else []
    if run.record.exists() or run.weights.is_file():
        found += [IntegrityProblem(str(path), problem) for problem in run_problems(run)]
    if not run.weights.is_file() or any(list_checkpoints(run.checkpoints)):
        directory = find_checkpoint(path)
        return f"{path} and {directory}", [*found, *check_checkpoint(directory)]
    return str(path), found


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the newest one of a directory or run."""
    if (path / MANIFEST_FILE).is_file():
        return path
    for root in (path, RunDir(path).checkpoints):
        found = list_checkpoints(root) if root.is_dir() else []
        if found:
            return found[0]
    raise CheckpointError(
        f"{path}: no checkpoint found; expected a directory step-N with its {MANIFEST_FILE}, the "
        "directory of several, or a run"
    )


def describe_checkpoint(directory: Path, *, tensors: bool = False) -> dict[str, Any]:
    """Return the contents of a checkpoint as JSON data."""
    manifest = read_manifest(directory)
    index = read_index(directory, manifest=manifest)
    blocks = Counter(block.file for _, _, stored in index for block in stored.blocks)
    return {
        "path": str(directory),
        "form": "shards" if INDEX_FILE in manifest.files else "full",
        "step": manifest.step,
        "serial": manifest.serial,
        "versions": manifest.versions,
        "plan": manifest.plan,
        "files": [
            {"file": name, "bytes": entry.bytes, "blocks": blocks.get(name, 0)}
            for name, entry in sorted(manifest.files.items())
        ],
        "kinds": {kind: _totals(list(stored.values())) for kind, stored in index.files.items()},
        "expert_parameters": {
            f"{kind}/{name}": stored.num_experts
            for kind, name, stored in index
            if stored.num_experts
        },
        "tensors": [
            {
                "name": f"{kind}/{name}",
                "dtype": DTYPE_NAMES[stored.dtype],
                "shape": list(stored.shape),
                "experts": stored.num_experts,
                "blocks": len(stored.blocks),
            }
            for kind, name, stored in index
            if tensors
        ],
    }


def _totals(tensors: list[StoredTensor]) -> dict[str, int]:
    return {
        "tensors": len(tensors),
        "values": sum(s.numel for s in tensors),
        "bytes": sum(s.bytes for s in tensors),
    }


def _show(value: dict[str, Any], console: Console) -> None:
    plan = ", ".join(f"{name} {size}" for name, size in value["plan"].items()) or "not recorded"
    versions = ", ".join(f"{name} {number}" for name, number in value["versions"].items())
    console.print(
        styled(
            "[bold]{path}[/]: step {step:,}, {form}",
            **{name: value[name] for name in ("path", "step", "form")},
        )
    )
    console.print(f"plan: {plan}; written by {versions}")
    counts = Counter(value["expert_parameters"].values())
    experts = ", ".join(f"{count} with {number} experts" for number, count in counts.items())
    console.print(f"expert parameters: {experts or 'none'}")
    print_table(
        console,
        ("kind", "tensors", "values", "bytes"),
        (
            (cyan(kind), f"{s['tensors']:,}", show_count(s["values"]), show_bytes(s["bytes"]))
            for kind, s in value["kinds"].items()
        ),
        title="\ntensors",
    )
    print_table(
        console,
        ("file", "blocks", "bytes"),
        ((cyan(f["file"]), f"{f['blocks']:,}", show_bytes(f["bytes"])) for f in value["files"]),
        title="\nfiles",
    )
    if value["tensors"]:
        print_table(
            console,
            ("name", "type", "shape", "blocks"),
            (
                (
                    cyan(t["name"]),
                    t["dtype"],
                    " x ".join(map(str, t["shape"])) or "-",
                    str(t["blocks"]),
                )
                for t in value["tensors"]
            ),
            title="\nevery tensor",
        )


def _show_diff(differ: list[TensorDifference], count: int, console: Console) -> None:
    console.print(f"{count - len(differ):,} of {count:,} tensors are the same")
    rows = []
    for found in differ:
        where = "" if found.expert is None else f" (most: expert {found.expert})"
        numbers = ("", "") if found.note else (f"{found.largest:.3g}", f"{found.relative:.3g}")
        rows.append((cyan(found.name + where), *numbers, found.note))
    if rows:
        print_table(console, ("tensor", "largest", "relative", ""), rows)


def _show_findings(checked: str, found: list[IntegrityProblem], console: Console) -> None:
    if not found:
        console.print(f"{checked}: sound")
    for finding in found:
        template = "[yellow]{where}[/]: {why}" if finding.uncertain else "[red]{where}[/]: {why}"
        console.print(styled(template, where=finding.location, why=finding.message))
