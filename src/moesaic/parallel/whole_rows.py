"""Whole rows: which rules of a model compare the tokens of a row, and so cannot do with slices."""

from collections.abc import Iterator

from moesaic.model.config import ModelConfig
from moesaic.moe.config import MoE


def whole_row_problems(config: ModelConfig, *, ranks: int) -> Iterator[str]:
    """Yield a sentence for each stack whose rules need whole rows, if so many ranks share them."""
    if ranks == 1:
        return
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        sparse = config.moe_of_stack(stack)
        if stack.moe_layers and sparse.needs_whole_rows:
            rule = type(sparse.select if isinstance(sparse, MoE) else sparse).__name__
            yield (
                f"parallel.plan: {rule} of the {side} compares the tokens of a row, but "
                f"context x tensor = {ranks} ranks share each row: set context and tensor to 1 "
                "(data, expert and pipe are free), or choose another rule"
            )
