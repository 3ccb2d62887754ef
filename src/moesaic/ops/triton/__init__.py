"""Kernels of our own for an MoE layer on a GPU, in Triton.

Only ``ops/kernel_selection.py`` brings this room in, and only where there is a device for it: everything
else works without Triton. Start at ``mixer.py`` (what is computed, and what is kept), then
``forward.py`` and ``backward.py`` (the kernels). ``tiles.json`` holds the tile sizes, in the form
that the tuner of ``benchmarks/layer_gpu.py`` writes.
"""
