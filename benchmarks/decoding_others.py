"""The other sides of ``decoding.py``: transformers' ``generate``, and CTranslate2.

Both decode the same dense encoder-decoder (M2M-100's architecture); CTranslate2 reads it converted,
in float32.
"""

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from decoding_shape import (
    DECODER,
    DENSE_HIDDEN,
    DIM,
    ENCODER,
    END,
    HEADS,
    START,
    VOCAB,
    sources,
)
from decoding_worker import serve
from transformers import M2M100Config, M2M100ForConditionalGeneration


def build() -> M2M100ForConditionalGeneration:
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=VOCAB,
        d_model=DIM,
        encoder_layers=ENCODER,
        decoder_layers=DECODER,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=DENSE_HIDDEN,
        decoder_ffn_dim=DENSE_HIDDEN,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        max_position_embeddings=512,
        bos_token_id=START,
        pad_token_id=0,
        eos_token_id=END,
        decoder_start_token_id=START,
    )
    return M2M100ForConditionalGeneration(config).eval()


def transformers_side(model: M2M100ForConditionalGeneration, asked: dict[str, Any]) -> Any:
    """Return a run of ``generate`` of exactly so many tokens."""
    ids = torch.tensor(sources(asked["rows"]))
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_beams=asked["beam"],
                do_sample=False,
                min_new_tokens=asked["tokens"],
                max_new_tokens=asked["tokens"],
            )
        assert found.shape == (asked["rows"], asked["tokens"] + 1)

    return run


def converted(model: M2M100ForConditionalGeneration, *, threads: int) -> Any:
    """Return the model in CTranslate2; ids are their own names."""
    import ctranslate2
    from ctranslate2.converters.transformers import M2M100Loader

    spec = M2M100Loader().get_model_spec(model)
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"t{i}" for i in range(4, VOCAB))]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = names[1:4]
    spec.config.decoder_start_token = names[START]
    spec.config.add_source_eos = False
    folder = tempfile.mkdtemp()
    spec.validate()
    spec.optimize()
    spec.save(folder)
    return ctranslate2.Translator(folder, inter_threads=1, intra_threads=threads)


def ctranslate2_side(translator: Any, asked: dict[str, Any]) -> Callable[[], None]:
    """Return a run of ``translate_batch`` of exactly so many tokens."""
    words = [[f"t{i}" for i in row] for row in sources(asked["rows"])]

    def run() -> None:
        found = translator.translate_batch(
            words,
            beam_size=asked["beam"],
            min_decoding_length=asked["tokens"],
            max_decoding_length=asked["tokens"],
        )
        assert all(len(each.hypotheses[0]) == asked["tokens"] for each in found)

    return run


def main(kind: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = build()
    parameters = sum(p.numel() for p in model.parameters())
    if kind == "transformers":
        serve(lambda asked: transformers_side(model, asked), parameters=parameters)
    else:
        translator = converted(model, threads=threads)
        serve(lambda asked: ctranslate2_side(translator, asked), parameters=parameters)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
