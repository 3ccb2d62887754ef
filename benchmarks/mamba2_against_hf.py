"""Mamba-2 beside the PyTorch implementation of transformers, with the same weights.

python benchmarks/mamba2_against_hf.py    needs transformers

Two layers of one group (the norm of transformers is over all channels): the largest difference of
outputs and of gradients of the input, and the time of a forward and backward pass in turns.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from support import write_result
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from moesaic.core.shapes import Tensor
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.mamba2 import Mamba2, Mamba2Module
from moesaic.nn.packing import Packing
from moesaic.nn.sequence_mixer import MixerContext, MixerShape

DIM, STATE, HEAD_DIM, ROWS, LENGTHS, TURNS = 64, 32, 16, 4, (1, 50, 256), 9
RESULT = Path(__file__).parent / "results" / "mamba2_against_hf.json"


def main() -> None:
    torch.manual_seed(0)
    theirs = Mamba2Mixer(
        Mamba2Config(
            num_heads=2 * DIM // HEAD_DIM,
            head_dim=HEAD_DIM,
            hidden_size=DIM,
            state_size=STATE,
            expand=2,
            n_groups=1,
            chunk_size=64,
            use_bias=False,
        ),
        layer_idx=0,
    )
    ours = Mamba2(head_dim=HEAD_DIM, state=STATE).build(
        MixerShape(DIM, causal=True, attention=AttentionConfig(heads=4))
    )
    assert isinstance(ours, Mamba2Module)
    _copy_weights(ours, theirs)
    write_result(RESULT, {"lengths": {n: _at_length(ours, theirs, n) for n in LENGTHS}})


@torch.no_grad()
def _copy_weights(ours: Mamba2Module, theirs: Mamba2Mixer) -> None:
    theirs.in_proj.weight.copy_(ours.projection.weight)
    theirs.conv1d.weight.copy_(ours.convolution.weight[:, None])
    theirs.conv1d.bias.copy_(ours.convolution.bias.normal_())
    theirs.dt_bias.copy_(ours.step_bias)
    theirs.A_log.copy_(ours.log_rate)
    theirs.D.copy_(ours.skip)
    theirs.norm.weight.copy_(ours.norm_weight)
    theirs.out_proj.weight.copy_(ours.out.weight)


def _at_length(ours: Mamba2Module, theirs: Mamba2Mixer, length: int) -> dict[str, float]:
    x = torch.randn(ROWS, length, DIM)
    packing = Packing.from_lengths(torch.full((ROWS,), length), length=length)
    context = MixerContext.of_rows(packing, causal=True)

    def run_ours() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        out = ours(leaf.flatten(0, 1), context=context).view(x.shape)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]

    def run_theirs() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        out = theirs(leaf)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]

    (out, grad), (other_out, other_grad) = run_ours(), run_theirs()
    times: dict[Callable[[], object], list[float]] = {run_ours: [], run_theirs: []}
    for _ in range(TURNS):
        for run, found in times.items():
            began = time.process_time()
            run()
            found.append(time.process_time() - began)
    return {
        "output": float((out - other_out).abs().max()),
        "output_scale": float(other_out.abs().max()),
        "gradient": float((grad - other_grad).abs().max()),
        "gradient_scale": float(other_grad.abs().max()),
        "ours_cpu_ms": round(1e3 * statistics.median(times[run_ours]), 2),
        "theirs_cpu_ms": round(1e3 * statistics.median(times[run_theirs]), 2),
    }


if __name__ == "__main__":
    main()
