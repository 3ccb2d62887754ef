"""Bytes that autograd keeps between forward and backward, measured."""

import torch

from moesaic.bench.problem import Implementation


def saved_bytes(implementation: Implementation) -> int:
    """Bytes of the distinct storages that a forward pass saves, weights left out, x included."""
    weights = {weight.untyped_storage().data_ptr() for weight in implementation.weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        implementation.forward()
    return sum(s.nbytes() for address, s in kept.items() if address not in weights)
