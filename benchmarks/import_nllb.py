"""Names, shapes and a plan of NLLB-MoE-54B, and the import of a part of it.

The whole checkpoint is generated as holes (``sparse_checkpoint.py``), 109 GB in bfloat16 that take
some megabytes of disk: its config is read, every tensor accounted for, and the run that an import
writes is given to ``moesaic explain`` and ``moesaic plan``. ``--layers N`` of each stack (4 have
one layer of experts, ``--experts`` of the 128) are then imported, in a
process whose data may take 2 GiB:

    python benchmarks/import_nllb.py --folder /tmp/nllb --layers 4
"""

import argparse
import json
import shutil
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from import_large import GIB, Gauge, measure
from sparse_checkpoint import write_sparse_checkpoint
from support import write_result

from moesaic.cli.main import main as moesaic
from moesaic.exchange.families import family_of
from moesaic.exchange.hf_directory import (
    read_hf_config,
    require_same_tensors,
    weight_files,
)
from moesaic.exchange.import_model import find_pieces, imported_run
from moesaic.exchange.tensor_files import PutTogether, TensorFiles
from moesaic.exchange.tensor_table import source_shapes
from moesaic.model.parameter_flop_count import count_parameters

NLLB_54B = {
    "model_type": "nllb-moe",
    "vocab_size": 256206,
    "d_model": 2048,
    "encoder_layers": 24,
    "decoder_layers": 24,
    "encoder_ffn_dim": 8192,
    "decoder_ffn_dim": 8192,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_sparse_step": 4,
    "decoder_sparse_step": 4,
    "num_experts": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
LAYOUT = "per-expert"
DEVICES = 32  # of the plan
BATCH = "1024x256+256"


def account(directory: Path) -> dict[str, Any]:
    """Return seconds and memory of reading names and shapes, and what the model has."""
    gauge, start = Gauge(), time.perf_counter()
    gauge.start()
    theirs = read_hf_config(directory)
    family = family_of(theirs["model_type"])
    model = family.mapping.read(theirs)
    files = TensorFiles(weight_files(directory))
    layout, pieces = find_pieces(family, model, files, layout="auto")
    require_same_tensors(family, files, expected=source_shapes(pieces), where=directory)
    targets = PutTogether(pieces, files).targets
    seconds = time.perf_counter() - start
    return {
        "layout": layout,
        "pieces": len(pieces),
        "our_tensors": len(targets),
        "parameters": count_parameters(model).total,
        "seconds": seconds,
        "peak_bytes": gauge.stop(),
    }


def explain_and_plan(folder: Path) -> dict[str, Any]:
    """Return what ``moesaic explain`` and ``moesaic plan`` say of the run of the whole model."""
    folder.mkdir()
    config = folder / "config.yaml"
    model = family_of("nllb-moe").mapping.read(NLLB_54B)
    languages = ("eng_Latn", "fra_Latn")
    config.write_text(imported_run(folder, model, theirs=NLLB_54B, languages=languages).to_yaml())
    explained = ask("explain", str(config), "--machine", "h100")
    plan = ask("plan", str(config), "--gpus", str(DEVICES), "--batch", BATCH, "--keep", "1")
    best = plan["plans"][0]
    return {
        "explain": {key: explained[key] for key in ("parameters", "flops_per_token", "bytes")},
        "plan": {
            "machine": plan["machine"],
            "devices": DEVICES,
            "batch": BATCH,
            **{key: best[key] for key in ("plan", "zero", "memory", "bytes", "tokens_per_second")},
            "seconds_per_step": best["seconds"]["step"],
            "searched": plan["certificate"]["plans"],
        },
    }


def ask(*command: str) -> dict[str, Any]:
    """Return the JSON of a command, run in this process."""
    stream = StringIO()
    try:
        with redirect_stdout(stream):
            moesaic([*command, "--json"])
    except SystemExit as end:  # the end of each command
        if end.code:
            raise
    return json.loads(stream.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="is emptied and removed")
    parser.add_argument("--layers", type=int, default=4, help="of each stack, imported whole")
    parser.add_argument("--experts", type=int, default=128, help="of the part that is imported")
    default = Path(__file__).parent / "results" / "import_nllb.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        whole = write_sparse_checkpoint(folder / "whole", NLLB_54B, layout=LAYOUT)
        blocks = sum(path.stat().st_blocks for path in (folder / "whole").iterdir())
        found = {**whole, "disk_bytes": 512 * blocks, **account(folder / "whole")}
        found |= explain_and_plan(folder / "run")
        layers = {f"{side}_layers": options.layers for side in ("encoder", "decoder")}
        config = NLLB_54B | layers | {"num_experts": options.experts}
        part = write_sparse_checkpoint(folder / "part", config, layout=LAYOUT)
        done = measure("import", folder / "part", folder / "ours", layout=LAYOUT, limit=2 * GIB)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    part |= layers | {"num_experts": options.experts, "limit_bytes": 2 * GIB, **done}
    part["peak_over_largest_tensor"] = done["peak_bytes"] / part["largest_tensor"]
    result = {"question": "import of NLLB-MoE-54B: the whole accounted for, a part imported"}
    write_result(options.out, result | {"whole": found, "part": part})


if __name__ == "__main__":
    main()
