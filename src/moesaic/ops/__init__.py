"""Tensor functions and kernels; imports ``core`` only.

``kernel_selection.py`` selects the implementation for a device. Start at ``permute.py`` (edges
sorted by expert), ``grouped_gemm.py`` (the feed-forward of all experts) and ``moe_kernel.py``.
"""
