"""Fused MoE kernel for CPUs, in C, compiled on this machine when it is first used.

``cpu_moe_kernel.py`` is the operation, ``source/`` the C code, ``cpu_library.py`` compiles, caches
and checks it. Without a compiler the unfused kernel is used.
"""
