"""Sequence mixers on a CPU beside PyTorch's own attention and public implementations, in turns.

Each implementation is a whole mixer: input projections, mixing, output projection, forward and
backward over a few rows without padding, or one step of decoding. transformers' Mamba-2 runs its
torch path; flash-linear-attention has no CPU kernels, so of GLA there is its plain recurrence
inside of the same projections. Packages that are not installed are left out and named.

    python benchmarks/mixers_cpu.py
"""

import argparse
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support import write_result
from torch import nn

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_parts import SlidingWindow
from moesaic.nn.decode_slots import DecodeSlots
from moesaic.nn.gated_linear_attention import GatedLinearAttention
from moesaic.nn.mamba2 import Mamba2
from moesaic.nn.packing import Packing
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer

ROWS, DIM, HEADS, WINDOW, KV_HEADS, STATE = 4, 256, 8, 64, 2, 64
DECODED_ROWS, DECODED = 32, 256  # rows of a decoding step, and tokens that they have already
SHAPE = MixerShape(DIM, causal=True, attention=AttentionConfig(heads=HEADS))
Run = Callable[[], object]


def whole_rows(mixer: SequenceMixer, *, length: int) -> Run:
    """Return a forward and backward pass of one of our mixers."""
    module = mixer.build(SHAPE)
    packing = Packing.from_mask(torch.ones(ROWS, length, dtype=torch.bool))
    x = torch.randn(ROWS * length, DIM, requires_grad=True)

    def run() -> None:
        module(x, context=MixerContext.of_rows(packing, causal=True)).sum().backward()

    return run


def step(mixer: SequenceMixer) -> Run:
    """Return one step of decoding of one of our mixers, always from the same state."""
    module, packing = mixer.build(SHAPE), Packing.from_mask(torch.ones(DECODED_ROWS, DECODED) > 0)
    single = Packing.single(DECODED_ROWS, device=torch.device("cpu"))
    x = torch.randn(DECODED_ROWS, DIM)

    def context(slots: DecodeSlots, now: Packing, start: int) -> MixerContext:
        slots.append(torch.full((DECODED_ROWS,), start), now)
        return MixerContext(now, start + now.position, causal=True, slots=slots)

    @torch.inference_mode()
    def run() -> None:
        state, slots = (
            module.init_state(DECODED_ROWS, like=x),
            DecodeSlots.empty(DECODED_ROWS, device=x.device),
        )
        prompt = torch.randn(DECODED_ROWS * DECODED, DIM)
        module(prompt, context=context(slots, packing, 0), state=state)
        for place in range(8):
            module(x, context=context(slots, single, DECODED + place), state=state)

    return run


class TorchAttention(nn.Module):
    """Attention as one writes it with ``F.scaled_dot_product_attention``."""

    def __init__(self, *, kv_heads: int = HEADS, window: int | None = None) -> None:
        super().__init__()
        self.kv_heads, self.window, self.width = kv_heads, window, DIM // HEADS
        self.qkv = nn.Linear(DIM, (HEADS + 2 * kv_heads) * self.width, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        query, key, value = heads.split([HEADS, self.kv_heads, self.kv_heads], 1)
        mask = None
        if self.window is not None:
            place = torch.arange(x.shape[1])
            distance = place[:, None] - place
            mask = (distance >= 0) & (distance < self.window)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.kv_heads != HEADS,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class PlainGLA(nn.Module):
    """GLA's projections around the plain recurrence of flash-linear-attention."""

    def __init__(self, recurrence: Callable[..., Any]) -> None:
        super().__init__()
        self.recurrence, self.keys = recurrence, DIM // 2
        self.qkvr = nn.Linear(DIM, 2 * self.keys + 2 * DIM, bias=False)
        self.gate = nn.Sequential(nn.Linear(DIM, 16, bias=False), nn.Linear(16, self.keys))
        self.norm, self.out = nn.RMSNorm(DIM // 4), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value, gate = self.qkvr(x).split([self.keys, self.keys, DIM, DIM], -1)
        decay = F.logsigmoid(self.gate(x)) / 16
        heads = (each.unflatten(-1, (4, -1)) for each in (query, key, value, decay))
        out, _ = self.recurrence(*heads)
        return self.out(self.norm(out).flatten(2) * F.silu(gate))


def of_module(module: nn.Module, *, length: int) -> Run:
    """Return a forward and backward pass of a module on [B, S, D]."""
    x = torch.randn(ROWS, length, DIM, requires_grad=True)

    def run() -> None:
        found = module(x)
        (found[0] if isinstance(found, tuple) else found).sum().backward()

    return run


def others(length: int) -> tuple[dict[str, Run], list[str]]:
    """Return the public implementations that are installed, and what is missing."""
    found: dict[str, Run] = {}
    missing = ["mamba-ssm (needs CUDA to build)"]
    try:
        mamba = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
        config = importlib.import_module("transformers").Mamba2Config(
            hidden_size=DIM, num_heads=8, head_dim=64, expand=2, state_size=STATE, n_groups=1,
            chunk_size=64,
        )  # fmt: skip
        mixer = mamba.Mamba2Mixer(config, layer_idx=0)
        found["transformers Mamba-2"] = of_module(mixer, length=length)
    except ImportError as error:
        missing.append(f"transformers ({error})")
    try:
        naive = importlib.import_module("fla.ops.gla.naive").naive_recurrent_gla
        found["flash-linear-attention GLA, plain recurrence"] = of_module(
            PlainGLA(naive), length=length
        )
    except ImportError as error:
        missing.append(f"flash-linear-attention ({error})")
    return found, missing


def summaries(runs: Mapping[str, Run], *, baseline: str, rounds: int) -> dict[str, Any]:
    """Return milliseconds, and ratios to the baseline, of implementations in turns."""
    for run in runs.values():
        run()
    times = measure_in_turns(runs, baseline=baseline, rounds=rounds)
    found = {}
    for name, spent in times.items():
        ratio = ratio_to_baseline(spent, times[baseline])
        found[name] = {
            "ms": round(1e3 * min(spent.seconds.values()), 2),
            "ratio": round(ratio.median, 2),
            "middle_half": [round(quartile, 2) for quartile in ratio.quartiles],
            "best_over_best": round(ratio.best_over_best, 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "mixers_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours = {
        "moesaic attention": Attention(),
        "moesaic attention, 2 key/value heads": Attention(kv_heads=KV_HEADS),
        "moesaic attention, window 64": Attention(window=SlidingWindow(size=WINDOW)),
        "moesaic GLA": GatedLinearAttention(),
        "moesaic Mamba-2": Mamba2(state=STATE),
    }
    result: dict[str, Any] = {
        "question": "time of a mixer over that of PyTorch's attention, same rows and dim",
        "dim": DIM,
        "rows": ROWS,
        "threads": options.threads,
    }
    baseline = "PyTorch attention"
    for length in (256, 1024):
        runs = {baseline: of_module(TorchAttention(), length=length)}
        grouped, windowed = (
            TorchAttention(kv_heads=KV_HEADS),
            TorchAttention(window=WINDOW),
        )
        runs["PyTorch attention, 2 key/value heads"] = of_module(grouped, length=length)
        runs["PyTorch attention, mask of window 64"] = of_module(windowed, length=length)
        runs |= {name: whole_rows(mixer, length=length) for name, mixer in ours.items()}
        public, result["missing"] = others(length)
        found = summaries(runs | public, baseline=baseline, rounds=options.rounds)
        result[f"forward and backward, {length} tokens"] = found
    steps = {name: step(mixer) for name, mixer in ours.items()}
    found = summaries(steps, baseline="moesaic attention", rounds=options.rounds)
    result[f"{DECODED} tokens and 8 steps of decoding, {DECODED_ROWS} rows"] = found
    write_result(options.out, result)


if __name__ == "__main__":
    main()
