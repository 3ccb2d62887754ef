"""A model made by transformers is imported, tuned on two languages on two ranks, and exported."""

from dataclasses import replace

import pytest
import torch
from transformers_models import MODELS

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import adopt_files
from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM
from moesaic.data.vocabulary_file import copy_tokenizer
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.exchange.export_model import export_model
from moesaic.exchange.import_model import import_model
from moesaic.nn.adapter import is_of_adapter
from moesaic.optim.lr_schedule import WSD
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.recipes.lookup import warm_start
from moesaic.testing.tiny_models import change_text, synthetic_run, text_of
from moesaic.train.merge_adapter import merge_adapter
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")


def test_a_model_of_transformers_is_tuned_on_two_ranks_and_goes_back(data_home, tmp_path):
    first, base, out = (RunDir(tmp_path / name) for name in ("first", "base", "tuned"))
    train(synthetic_run(steps=1, schedule=WSD()), first.path, progress=no_progress)
    theirs = MODELS["qwen3_moe"]
    theirs = replace(theirs, changes={**theirs.changes, "vocab_size": 400}).build()
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=base.path)
    copy_tokenizer(first.tokenizer, to=base.tokenizer)
    adopt_files(base)
    text = text_of(synthetic_run())
    run = change_text(
        warm_start(str(base.path), changes=["steps=2", "checkpoint.every=0", "validation.every=0"]),
        corpus=text.corpus,
        languages=("eng_Latn", "qaa_Latn"),
        tokenizer=text.tokenizer,
        mixture=MixtureConfig(tasks=(WeightedTask(task=CausalLM()),)),
        loader=text.loader.replace(collator=DecoderOnlyCollator()),
        trainable=LoRA(rank=2, targets=("experts", "attention")),
        parallel=ParallelConfig(plan=ParallelPlan(data=2, expert=2, zero=2)),
    )
    run_on_ranks(2, lambda: train(run, out.path, progress=no_progress))
    assert merge_adapter(out) == 8
    export_model(out.path, out=tmp_path / "exported")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    changed = {
        name
        for name, tensor in theirs.state_dict().items()
        if not torch.equal(tensor, again.state_dict()[name])
    }
    assert any("experts" in name for name in changed)
    assert not any("norm" in name or "embed" in name or is_of_adapter(name) for name in changed)
