"""A small real training run, killed (SIGKILL) at random moments and resumed each time.

The corpus, the tokenizer, the shards, the loader, a mixture-of-experts model, validation and
checkpoints every other step are real. The final state must equal that of a run without kills, bit
for bit: weights, optimizer, random states, data position, metrics, expert usage.

    python benchmarks/kill_campaign.py --kills 50
"""

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from kill_trials import kill_and_resume
from support import write_result

from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity, RandomPriority
from moesaic.moe.expert_selection import TopK
from moesaic.testing.tiny_models import synthetic_run, tiny_model_config
from moesaic.train.run import CheckpointConfig, Run

MOE = MoE(
    experts=4,
    select=TopK(k=2),
    limit=Capacity(factor=1.0, minimum=1, priority=RandomPriority()),
    balance=(SwitchBalance(),),
)


def make_run(steps: int) -> Run:
    """Return a run with dropout and random drops, whose result depends on random states."""
    model = tiny_model_config(moe=MOE, layers=2).replace(vocab_size=400, dropout=0.1)
    return synthetic_run(
        model=model,
        steps=steps,
        gradient_accumulation_steps=2,
        checkpoint=CheckpointConfig(every=2),
        name="killed",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "kill_campaign.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = make_run(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOESAIC_HOME"] = f"{folder}/home"
        campaign = kill_and_resume(run, folder=Path(folder), kills=options.kills, seed=options.seed)
    result = {"question": "does a killed and resumed run end like a run without kills?"}
    result |= {"steps": options.steps, "seed": options.seed, **asdict(campaign)}
    write_result(options.out, result)
    sys.exit(1 if campaign.differences else 0)


if __name__ == "__main__":
    main()
