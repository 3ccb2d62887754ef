"""TransformerConfig: a blueprint that can be built. The name users meet."""

from moesaic.model.blueprint import ModelConfig, InitConfig, Stack
from moesaic.model.transformer import Transformer

__all__ = ["InitConfig", "Stack", "ModelConfig"]


class ModelConfig(ModelConfig):
    """An encoder-decoder if ``encoder.layers > 0``, else decoder-only (see ``Blueprint``)."""

    def build(self) -> Transformer:
        """Make the model, its weights drawn from torch's global generator.

        Under ``with torch.device("meta")`` nothing is allocated.
        """
        return Transformer(self)
