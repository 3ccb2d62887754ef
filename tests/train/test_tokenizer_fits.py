"""A run with a tokenizer that lacks an id, a tag or a role is refused before its first step."""

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.data.id_map import FairseqIds
from moesaic.data.imported_tokenizer import FromFile
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig
from moesaic.optim.lr_schedule import WSD
from moesaic.serve.translator import Translator
from moesaic.testing.tiny_models import change_text, synthetic_run, text_of
from moesaic.train.run_training import train
from tokenizer_files import write_sentencepiece


def test_what_a_tokenizer_lacks_is_named_with_the_way_out(tmp_path):
    path = write_sentencepiece(tmp_path / "a.model", byte_fallback=True)
    base = synthetic_run()
    codes = text_of(base).corpus.open().languages
    run = change_text(base, tokenizer=FromFile(path=str(path), added_tags=codes[:1]))
    small = run.replace(model=run.model.replace(vocab_size=64))
    with pytest.raises(ConfigError) as refused:
        train(small, tmp_path / "run")
    message = str(refused.value)
    assert "model.vocab_size=64: the tokenizer has" in message
    assert f"no tag for {', '.join(codes[1:])}: add them (data.tokenizer.added_tags=[" in message
    assert "no mask token, which the task denoising needs" in message
    collator = {"kind": "EncoderDecoderCollator", "tag": {"kind": "NoTag", "start": "pad"}}
    loader = LoaderConfig(batch_tokens=512, collator=collator)
    plain = change_text(run, loader=loader, mixture=MixtureConfig())
    with pytest.raises(ConfigError, match=r"no pad token, which data\.loader\.collator\.tag"):
        train(plain, tmp_path / "run")
    mapped = text_of(run).tokenizer.replace(added_tags=codes, id_map=FairseqIds())
    few_rows = change_text(run, tokenizer=mapped, mixture=MixtureConfig())
    few_rows = few_rows.replace(model=run.model.replace(vocab_size=64))
    expected = r"vocab_size=64: the tokenizer's id map has rows up to \d+, and each needs a row"
    with pytest.raises(ConfigError, match=expected):
        train(few_rows, tmp_path / "mapped")


def test_rows_beyond_a_trained_tokenizer_are_never_generated(tmp_path):
    run = synthetic_run(steps=2, schedule=WSD(warmup=1))
    size = text_of(run).tokenizer.vocab_size
    train(run.replace(model=run.model.replace(vocab_size=size + 24)), tmp_path / "run")
    translator = Translator.open(tmp_path / "run")
    settings = {"source": "eng_Latn", "target": "qaa_Latn"}
    before = translator.translate("a b", **settings).text
    with torch.no_grad():  # if they took part, they would win
        translator.model.embedding.weight[size:] *= 1000
    assert translator.translate("a b", **settings).text == before
