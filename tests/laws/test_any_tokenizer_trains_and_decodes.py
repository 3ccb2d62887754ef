"""Law: every kind of tokenizer trains, resumes and decodes under every rule of language tags."""

from dataclasses import replace

import pytest
import torch

from moesaic.checkpoint.full_checkpoint import read_weights
from moesaic.data.collators import DecoderOnlyCollator, EncoderDecoderCollator
from moesaic.data.id_map import FairseqIds, SameIds
from moesaic.data.imported_tokenizer import FromFile
from moesaic.data.language_tag import FirstSourceToken, FirstTargetToken, NoTag, TwoTokenPrompt
from moesaic.data.mixture import MixtureConfig
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import Stack
from moesaic.optim.lr_schedule import WSD
from moesaic.serve.translator import Translator
from moesaic.testing.tiny_models import change_text, synthetic_run
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.run_training import train
from tokenizer_files import byte_level, word_piece, write_sentencepiece

CODES = ("eng_Latn", "qaa_Latn", "qab_Cyrl", "qac_Grek")
FILES = {
    "byte-level": ("tokenizer.json", byte_level),
    "word-piece": ("tokenizer.json", word_piece),
    "sentencepiece": ("a.model", write_sentencepiece),
    "fairseq": ("a.model", write_sentencepiece),
}
ID_MAPS = {"fairseq": FairseqIds()}
# a tokenizer with tags and one without; that of moesaic is in every other law of resuming
RESUMED = ("fairseq", "word-piece")
TAGS = {
    "first-source": FirstSourceToken(),
    "first-target": FirstTargetToken(),
    "two-tokens": TwoTokenPrompt(),
    "none": NoTag(),
}
# every kind and every rule, in both layouts of rows
CASES = [
    ("trained", "first-target", EncoderDecoderCollator),
    ("byte-level", "first-source", DecoderOnlyCollator),
    ("byte-level", "first-target", DecoderOnlyCollator),
    ("byte-level", "none", EncoderDecoderCollator),
    ("word-piece", "none", DecoderOnlyCollator),
    ("sentencepiece", "two-tokens", EncoderDecoderCollator),
    ("fairseq", "first-target", EncoderDecoderCollator),
]


def run_of(kind: str, tag: str, *, folder, collator) -> Run:
    """A run of four steps."""
    if kind == "trained":
        tokenizer = TrainedTokenizer(vocab_size=400, sample_lines=500)
    else:
        name, write = FILES[kind]
        added = () if tag == "none" else CODES
        id_map = ID_MAPS.get(kind, SameIds())
        tokenizer = FromFile(path=str(write(folder / name)), added_tags=added, id_map=id_map)
    base = synthetic_run(
        steps=4,
        schedule=WSD(warmup=1),
        checkpoint=CheckpointConfig(every=2 if kind in RESUMED else 4),
        validation=ValidationConfig(every=4, rows=2),
        log=LogConfig(every=2),
    )
    loader = base.data.loader.replace(
        collator=collator(tag=TAGS[tag]), batch_tokens=400, max_source=200, max_target=200
    )
    data = change_text(base, tokenizer=tokenizer, loader=loader, mixture=MixtureConfig())
    if collator is EncoderDecoderCollator:
        return data
    return data.replace(model=data.model.replace(encoder=Stack(layers=0)))


def require_resumed_is_whole(run: Run, folder) -> None:
    train(run, folder / "part", until=2)
    train(run, folder / "part", resume=ResumeLatest())
    whole, part = (read_weights(folder / n / "model.safetensors") for n in ("whole", "part"))
    assert all(torch.equal(tensor, part[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(("kind", "tag", "collator"), CASES)
def test_any_tokenizer_trains_resumes_and_decodes(kind, tag, collator, tmp_path):
    run = run_of(kind, tag, folder=tmp_path, collator=collator)
    train(run, tmp_path / "whole")
    if kind in RESUMED:
        require_resumed_is_whole(run, tmp_path)
    for name in FILES.values():
        (tmp_path / name[0]).unlink(missing_ok=True)  # a run has all that it needs
    translator = Translator.open(tmp_path / "whole")
    texts = ["a b", "c d e a b c", "e"]
    settings = {"source": "eng_Latn", "target": "qaa_Latn"}
    translator.limits = replace(translator.limits, max_target=24)
    together = translator.translate(texts, **settings)
    alone = [translator.translate(text, **settings) for text in texts]
    assert [t.text for t in together] == [t.text for t in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
    batch = translator.batch(texts, targets=texts, **settings)
    assert batch.num_predicted > 0
    assert bool(torch.isfinite(translator.model.loss(translator.model(batch)).total))
