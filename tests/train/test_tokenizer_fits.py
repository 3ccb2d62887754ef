"""A run with a tokenizer that lacks an id, a tag or a role is refused before its first step."""

import pytest

from moesaic.core.errors import ConfigError
from moesaic.data.imported_tokenizer import FromFile
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig
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
