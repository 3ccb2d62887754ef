"""Seconds of transformers' Mixtral and Qwen3-MoE with their experts backends and with ours.

All backends of a model take turns in one process; a ratio is theirs over ours, so above 1 ours is
faster. Each backend has its own copy of the weights, in the layout that it wants. Needs the extra
[hf]:

    python benchmarks/experts_backend.py

Five rounds of two models, three inputs and two dtypes take about a minute on two cores.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from support import write_result

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline
from moesaic.exchange.experts_backend import register_experts_backend

OURS, THEIRS = "moesaic", ("eager", "grouped_mm", "batched_mm")
LAYERS, VOCABULARY = 2, 1000
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral, 8 experts, top 2": (
        "Mixtral",
        {"hidden_size": 256, "intermediate_size": 896, "num_local_experts": 8},
    ),
    "qwen3_moe, 64 experts, top 8": (
        "Qwen3Moe",
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 96,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
}
INPUTS = {"training step": (4, 128), "prompt": (4, 128), "decoding step": (4, 1)}  # rows, tokens


def build(name: str, backend: str, dtype: torch.dtype) -> Any:
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes, num_key_value_heads=4)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    model.set_experts_implementation(backend)
    return model


def job(model: Any, what: str, ids: torch.Tensor) -> Callable[[], object]:
    def train() -> None:
        model.zero_grad()
        model(ids).logits.float().square().mean().backward()

    @torch.inference_mode()
    def read() -> torch.Tensor:
        return model(ids).logits

    return train if what == "training step" else read


def measure(name: str, what: str, *, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    ids = torch.randint(0, VOCABULARY, INPUTS[what], generator=torch.Generator().manual_seed(1))
    models = {backend: build(name, backend, dtype) for backend in (*THEIRS, OURS)}
    jobs = {backend: job(model, what, ids) for backend, model in models.items()}
    for run in jobs.values():
        run()
    with torch.inference_mode():
        logits = {backend: model(ids).logits.float() for backend, model in models.items()}
    times = measure_in_turns(jobs, baseline=OURS, rounds=rounds)
    return {
        "model": name,
        "what": what,
        "rows, tokens": INPUTS[what],
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {b: 1e3 * sorted(t.seconds.values())[0] for b, t in times.items()},
        "theirs over ours": {b: asdict(ratio_to_baseline(times[b], times[OURS])) for b in THEIRS},
        "greatest difference of logits from eager": {
            b: (logits[b] - logits["eager"]).abs().max().item() for b in logits
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", choices=INPUTS, nargs="+", default=list(INPUTS))
    default = Path(__file__).parent / "results" / "experts_backend.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register_experts_backend()
    found = [
        measure(name, what, dtype=dtype, rounds=options.rounds)
        for name in MODELS
        for what in options.what
        for dtype in (torch.float32, torch.bfloat16)
    ]
    result = {
        "question": "seconds of transformers' models, their experts backends over ours",
        "transformers": transformers.__version__,
        "layers": LAYERS,
        "threads": options.threads,
        "rounds": options.rounds,
        "measured": found,
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
