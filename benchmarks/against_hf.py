"""Tokens per second of our trainer and of Hugging Face's Seq2SeqTrainer on an equal dense model.

Both train an encoder-decoder of the same layers, widths and vocabulary on the same batches of
random ids, with fused AdamW, label smoothing and clipping, in float32. The sides alternate, each
round in processes of their own; the median of the rounds counts. transformers is no dependency of
ours, so give a Python that has it:

    python benchmarks/against_hf.py --hf-python /path/to/venv/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from random_pairs import ROWS, SHAPE, STEPS
from support import write_result

HERE = Path(__file__).parent


def side(script: str, *, python: str, seed: int, threads: int) -> dict[str, float]:
    command = [python, str(HERE / script), str(seed), str(threads)]
    # threads that wait without spinning, on both sides: a busy machine then slows both alike
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hf-python", required=True, help="a Python that has transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "against_hf.json")
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "hf": []}
    sides = {"ours": ("our_side.py", sys.executable), "hf": ("hf_side.py", options.hf_python)}
    for seed in range(options.rounds):
        for name, (script, python) in sides.items():
            rounds[name].append(side(script, python=python, seed=seed, threads=options.threads))
            print(f"round {seed} {name}: {rounds[name][-1]['tokens_per_s']:,.0f} tokens/s")
    speed = {name: [found["tokens_per_s"] for found in all_] for name, all_ in rounds.items()}
    ratios = [ours / theirs for ours, theirs in zip(speed["ours"], speed["hf"], strict=True)]
    result = {
        "question": "tokens/s in training, ours over Seq2SeqTrainer, equal dense model",
        "shape": {**SHAPE, "rows": ROWS, "steps": STEPS, "threads": options.threads},
        "parameters": {name: all_[0]["parameters"] for name, all_ in rounds.items()},
        "tokens_per_s": {name: statistics.median(all_) for name, all_ in speed.items()},
        "ratio": {"median": statistics.median(ratios), "all": ratios},
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
