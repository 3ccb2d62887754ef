"""Triton kernels of an MoE layer on a GPU.

Only ``ops/kernel_selection.py`` imports this package, where there is a device for it. Start at
``triton_moe_kernel.py``. ``tiles.json`` holds the tile sizes as ``benchmarks/layer_gpu.py`` writes
them.
"""
