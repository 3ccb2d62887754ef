"""A larger vocabulary: old ids keep their logits, new rows begin as stated, on any plan."""

import pytest
import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.checkpoint.stored_weights import open_weights
from moesaic.checkpoint.tensor_reader import TensorReader
from moesaic.core.errors import CheckpointError, ConfigError, DataError
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.sources.synthetic import SyntheticLanguages
from moesaic.data.tokenizer import Tokenizer
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.optim.lr_schedule import WSD
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.trainable_parameters import AllParameters
from moesaic.recipes.lookup import warm_start
from moesaic.testing.tiny_models import (
    change_text,
    random_batch,
    synthetic_run,
    text_of,
    tiny_model_config,
)
from moesaic.train import new_rows
from moesaic.train.corpus_source import BuiltCorpus
from moesaic.train.new_rows import CopyOfLanguage, DrawnRows, MeanOfRows
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress
from moesaic.train.warm_start import WeightsOfRun
from moesaic.verify.record_run import gather_full_tensors

GROWN, SHARED = 5, ParallelPlan(data=1, tensor=2)


@pytest.fixture(scope="module")
def init(data_home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "init"
    train(synthetic_run(steps=1, schedule=WSD()), out, progress=no_progress)
    return RunDir(out)


def filled(start, config, plan=None, world=None):
    """Return the weights of a larger model, whole on every rank."""
    parallel = ParallelConfig(plan=plan or ParallelPlan())
    model = Transformer.without_values(config)
    part = parallelize(model, parallel=parallel, world=world or SingleProcess())
    start.fill(part, seed=3)
    shapes = {name: placement.shape for name, placement in part.sharding_plan.items()}
    named = dict(model.named_parameters())
    return gather_full_tensors(named, parallel_model=part, shapes=shapes)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_old_ids_keep_their_logits_and_new_rows_begin_as_stated(init, tmp_path, tied):
    run = RunDir(tmp_path)
    small = tiny_model_config().replace(embedding=EmbeddingConfig(tied=tied))
    large = small.replace(vocab_size=small.vocab_size + GROWN)
    torch.manual_seed(0)
    old = Transformer(small).eval()
    for name in ("config.yaml", "tokenizer.json"):
        (tmp_path / name).write_bytes((init.path / name).read_bytes())
    write_tensors(run.model, tensors=dict(old.named_parameters()))
    table, rows = old.embedding.weight.detach(), small.vocab_size
    tag = Tokenizer.load(init.tokenizer).vocabulary.tag("qaa_Latn")
    wanted = {MeanOfRows(): table.mean(0), CopyOfLanguage(language="qaa"): table[tag]}
    for choice in (*wanted, DrawnRows()):
        start = WeightsOfRun(path=str(tmp_path), new_rows=choice)
        weights = filled(start, large)
        new = Transformer(large).eval()
        new.load_state_dict(weights, strict=False)
        batch = random_batch(3, seed=2)
        first, second = (model.predict(model(batch).hidden) for model in (old, new))
        torch.testing.assert_close(second[:, :rows], first, rtol=0, atol=1e-6)
        added = weights["embedding.weight"][rows:]
        if choice in wanted:
            torch.testing.assert_close(added, wanted[choice].expand_as(added))
        else:
            assert len(added.unique()) == added.numel()
        assert tied == ("embedding.output" not in weights)


def test_ranks_that_share_the_table_begin_its_new_rows_alike(init):
    config = synthetic_run().model
    large = config.replace(vocab_size=config.vocab_size + 8)
    for choice in (MeanOfRows(), DrawnRows()):
        start = WeightsOfRun(path=str(init.path), new_rows=choice)
        one = filled(start, large)
        for ranks in run_on_ranks(2, lambda s=start: filled(s, large, SHARED, ProcessGroupWorld())):
            assert all(map(torch.equal, one.values(), ranks.values()))


def test_a_run_adds_a_language_with_a_tag_of_its_own(init, tmp_path):
    recipe = CorpusRecipe(
        name="one-more",
        source=SyntheticLanguages(phrases=300, languages=("qaa_Latn", "qad_Latn")),
    )
    run = warm_start(str(init.path), changes=["steps=1", "schedule.warmup=0"])
    added = run.initial_weights.replace(added_languages=("qad_Latn",))
    size = run.model.vocab_size + 1
    run = change_text(
        run,
        corpus=BuiltCorpus(recipe=recipe),
        initial_weights=added,
        model=run.model.replace(vocab_size=size),
        tokenizer=text_of(run).tokenizer.replace(vocab_size=size),
    )
    out = RunDir(tmp_path / "out")
    train(run, out.path, progress=no_progress)
    tokenizer = Tokenizer.load(out.tokenizer)
    assert tokenizer.vocabulary.tag("qad_Latn") == size - 1
    assert read_tensors(out.model)["embedding.weight"].shape[0] == size
    with pytest.raises(DataError, match="a tag for qad_Latn already"):
        tokenizer.with_languages(["qad_Latn"])
    smaller = run.replace(model=run.model.replace(vocab_size=size - 2))
    with pytest.raises(CheckpointError, match=r"embedding\.weight has shape"):
        smaller.initial_weights.prepare(out, model=smaller.model, trainable=AllParameters())


def test_new_rows_beside_an_adapter_are_refused_before_any_work(init, tmp_path):
    run = warm_start(str(init.path), changes=["steps=1", "schedule.warmup=0"])
    larger = run.replace(
        trainable=LoRA(rank=2), model=run.model.replace(vocab_size=run.model.vocab_size + GROWN)
    )
    with pytest.raises(ConfigError, match=r"new rows are neither trained nor saved .*=LoRA"):
        train(larger, tmp_path / "out", progress=no_progress)
    assert not (tmp_path / "out").exists()


def test_the_value_of_new_rows_is_read_without_the_other_rows(init, monkeypatch):
    table = read_tensors(init.model)["embedding.weight"]
    monkeypatch.setattr(new_rows, "ROWS_AT_ONCE", 100)  # the last block is shorter
    read, read_slice = [], TensorReader.read_slice

    def counted(self, stored, **where):
        read.append(where["shape"][0])
        return read_slice(self, stored, **where)

    monkeypatch.setattr(TensorReader, "read_slice", counted)
    for choice, most in (
        (DrawnRows(), 0),
        (CopyOfLanguage(language="qaa"), 1),
        (MeanOfRows(), 100),
    ):
        read.clear()
        with open_weights(init.model) as stored:
            row = choice.row(stored, "embedding.weight", tokenizer=init.tokenizer)
        assert max(read, default=0) == most
    torch.testing.assert_close(row, table.mean(0))
    assert sum(read) == len(table) > 100
