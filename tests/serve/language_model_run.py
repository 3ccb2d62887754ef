"""A run directory of a decoder-only model with random weights: two languages, byte-like pieces."""

from pathlib import Path

import torch
import yaml

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.checkpoint.trained_directions import TrainedDirections, TrainedStream
from moesaic.corpus.text_rules import DocumentText, write_text_rules
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig

LINES = ["the end of the text\n", "an end of lines\n", "ten lines and a tent\n"]
CONFIG = ModelConfig(
    vocab_size=300,
    dim=16,
    encoder=Stack(layers=0),
    decoder=Stack(layers=1, moe_every=0),
    attention=AttentionConfig(heads=2),
    feed_forward=FeedForwardConfig(hidden=16),
)


def write_language_model_run(folder: Path, *, config: ModelConfig = CONFIG) -> RunDir:
    """Write what is read to generate text."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    torch.manual_seed(1)
    loader = {"max_target": 16, "collator": {"kind": "DecoderOnlyCollator"}}
    run.config.write_text(yaml.safe_dump({"model": config.to_dict(), "data": {"loader": loader}}))
    write_tensors(run.model, tensors=export_weights(Transformer(config)))
    languages = ("deu_Latn", "eng_Latn")
    sizes = TrainedTokenizer(vocab_size=config.vocab_size)
    train_tokenizer({"eng_Latn": LINES}, languages, sizes).save(run.tokenizer)
    write_text_rules(run.text_rules, DocumentText())
    stream = TrainedStream(
        task="causal-lm",
        source="eng_Latn",
        target="eng_Latn",
        rows=3,
        valid_rows=0,
        test_rows=0,
        share=1.0,
    )
    TrainedDirections(corpus="c", fingerprint="f", streams=(stream,)).write(run.directions)
    return run
