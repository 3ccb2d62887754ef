"""Copies to a device that the host does not wait for."""

import torch

from moesaic.core.shapes import Tensor


def copy_without_waiting(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on ``device``; a copy from host memory follows the work queued there.

    Out of memory that is not pinned, CUDA copies while the host waits for all of that work.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
