"""The doors of the package: for each kind of file, a valid one and the function that reads it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

import torch
import torch.distributed.checkpoint as dcp
from checkpoint_samples import snapshot
from fake_run import write_fake_run

from moesaic.checkpoint.block_index import INDEX_KIND
from moesaic.checkpoint.checkpoint_directory import POINTER_FILE
from moesaic.checkpoint.full_checkpoint import (
    STATE_KIND,
    find_latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from moesaic.checkpoint.manifest import MANIFEST_KIND
from moesaic.checkpoint.plugins import PLUGIN_FILE, Plugin, require_loaded
from moesaic.checkpoint.reshard import ShardedForm, reshard
from moesaic.checkpoint.routes_file import ROUTES_FILE, RoutesFile
from moesaic.checkpoint.run_directory import (
    HEAD_SCORES_FILE,
    INSIGHT_FILE,
    PERPLEXITY_FILE,
    RUN_FILE,
    SCORE_CURVE_FILE,
    SUMMARY_FILE,
    RunDir,
)
from moesaic.checkpoint.run_lock import LOCK_FILE, RunLock
from moesaic.checkpoint.run_record import RUN_RECORD_FILE, require_plugins, run_problems
from moesaic.checkpoint.safetensors_io import TENSOR_FILE, read_tensors
from moesaic.checkpoint.trained_directions import DIRECTIONS_FILE, read_trained_directions
from moesaic.core.file_reader import FileKind
from moesaic.core.yaml_reader import CONFIG_FILE, read_yaml_file
from moesaic.corpus.corpus_manifest import CORPUS_MANIFEST_FILE, read_corpus_manifest
from moesaic.corpus.text_rules import TEXT_RULES_FILE, read_text_rules
from moesaic.data.id_map import ID_MAP_FILE, FairseqIds, MappedIds
from moesaic.data.imported_tokenizer import TOKEN_NAMES_FILE, FromFile
from moesaic.data.sentencepiece_file import SENTENCEPIECE_FILE, read_sentencepiece
from moesaic.data.shards_manifest import SHARDS_FILE
from moesaic.data.token_shard_writer import write_shards
from moesaic.data.token_shards import TokenShards
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokenizer_file import TOKENIZER_FILE
from moesaic.data.vocabulary_file import VOCABULARY_FILE
from moesaic.evaluate.head_scores import HeadScore, HeadScores
from moesaic.evaluate.perplexity import DocumentLoss, PerplexitySummary, group_perplexities
from moesaic.exchange.dcp_files import METADATA_FILE, read_metadata
from moesaic.exchange.hf_directory import (
    HF_CONFIG_FILE,
    HF_INDEX_FILE,
    read_hf_config,
    weight_files,
)
from moesaic.exchange.peft_format import ADAPTER_CONFIG_FILE, read_adapter_config
from moesaic.moe.routing_agreement import compare_routes
from moesaic.monitor.expert_usage import USAGE_FILE, read_usage, summarize_load
from moesaic.monitor.health_record import (
    HEALTH_FILE,
    RecordedFinding,
    read_findings,
    write_findings,
)
from moesaic.monitor.health_rules import HealthFinding, HealthState
from moesaic.monitor.metric_writers import METRICS_FILE, read_metrics
from moesaic.ops.triton.tiles import TABLE, TILES_FILE, load_table
from moesaic.planner.machine import MACHINE_FILE, find_machine, read_machine
from moesaic.report.html_report import write_report
from moesaic.serve.imported_generation import GENERATION_FILE, read_imported_generation
from moesaic.serve.open_run import open_run
from moesaic.testing.tiny_models import synthetic_run, text_of
from moesaic.train.resume import learning_rate_jump
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.run_training import load_saved_state, train
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook
from pipeline_cases import read_every_row
from tokenizer_files import byte_level, write_sentencepiece

STEP = "step-00000006"


class _KeepTrainer(Hook):
    def after_step(self, trainer: Trainer, report: StepReport) -> None:  # noqa: ARG002
        self.trainer = trainer


@dataclass(frozen=True)
class Made:
    """A folder with a valid file of every kind, and the trainer that wrote the checkpoint."""

    folder: Path
    trainer: Trainer


def make_files(folder: Path) -> Made:
    """Train a tiny run of 6 steps, and write what training does not."""
    keep, run = _KeepTrainer(), folder / "run"
    config = synthetic_run(
        steps=6,
        checkpoint=CheckpointConfig(every=6),
        validation=ValidationConfig(every=6, rows=4),
        log=LogConfig(every=2, routing_stats_every=2, routing_trace_every=6),
    )
    train(config, run, hooks=[keep])
    fake = write_fake_run(folder / "fake")
    for name in ("summary.json", "insight.json"):
        shutil.copy(fake / name, run / name)
    point = {"step": 5, "tokens": 9.0, "chrf": {"score": 2.0}}
    curve = {"format": 1, "points": [point], "baselines": {"copy": {"score": 1.0}}}
    (run / "curve.json").write_text(json.dumps(curve))
    losses = [DocumentLoss(9.0, 5, 7, "eng_Latn", domain) for domain in ("a", "b")]
    PerplexitySummary("run", "test", 8, 4, group_perplexities(losses, resamples=10)).write(
        run / "perplexity.json"
    )
    score = HeadScore(0.5, 0.4, 0.6, 7)
    HeadScores("test", {"loss": {"all": score, "class/a": score}}).write(run / "head-scores.json")
    lock = {"host": gethostname(), "boot": "b", "pid": 7, "start": "1", "since": "2026"}
    (folder / "run.lock").write_text(json.dumps(lock))
    finding = HealthFinding("encoder.0", "load", HealthState.SKEWED, "a", "b", "c")
    write_findings(run / "health.json", [RecordedFinding(finding, 2)])
    for name, text in (("plugins/gate.py", "class Gate: ...\n"), ("root/best", "step-00000006\n")):
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    shutil.copy(TABLE, folder / "tiles.json")
    (folder / "machine.yaml").write_text(find_machine("gh200").to_yaml())
    reshard(run / "checkpoints" / STEP, root=folder / "sharded", form=ShardedForm(2))
    corpus = text_of(config).corpus.open()
    shutil.copytree(corpus.path, folder / "corpus")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    write_shards(corpus, tokenizer, out=folder / "shards")
    shutil.copy(next(run.glob("routes/*.routes")), folder / "a.routes")
    for name in ("foreign", "imported"):
        (folder / name).mkdir()
    byte_level(folder / "foreign" / "tokenizer.json", specials=("</s>",))
    path = write_sentencepiece(folder / "foreign" / "a.model")
    source = FromFile(path=str(path), id_map=FairseqIds())
    imported = source.make({}, languages=("deu_Latn",), notify=str)
    imported.save(folder / "imported" / "tokenizer.json")
    rows = list(reversed(range(len(read_sentencepiece(path).pieces))))
    (folder / "foreign" / "rows.json").write_text(json.dumps(rows))
    theirs = folder / "theirs"
    theirs.mkdir()
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "use_rslora": False}
    (theirs / "adapter_config.json").write_text(json.dumps(adapter))
    (theirs / "generation_config.json").write_text(json.dumps({"num_beams": 2}))
    (theirs / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    dcp.save({"a": torch.ones(2, 3)}, checkpoint_id=theirs / "dcp", no_dist=True)
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    return Made(folder, keep.trainer)


@dataclass(frozen=True)
class Door:
    """How a kind of file is read: ``read(made)`` does what the package does with ``file``.

    ``form`` is what a damage may keep: ``json``, ``lines`` of JSON, ``yaml``, ``safetensors`` or
    ``bytes``.
    """

    kind: FileKind
    file: str
    form: str
    read: Callable[[Made], object]


def _read_tokenizer(made: Made) -> None:
    tokenizer = Tokenizer.load(made.folder / "run" / "tokenizer.json")
    for found in tokenizer.encode_with_copies(["a b", "\u00e9 %s\u4e2d \U0001f600", ""]):
        assert max(found.ids, default=0) < tokenizer.vocab_size
        tokenizer.decode(found.ids, found.slotted)


def _read_vocabulary(made: Made) -> None:
    tokenizer = Tokenizer.load(made.folder / "imported" / "tokenizer.json")
    ids = tokenizer.encode("the end")
    assert max((*ids, *tokenizer.vocabulary.suppressed), default=0) < tokenizer.vocab_size
    tokenizer.decode(ids)


def _import(made: Made, name: str, **settings: object) -> None:
    source = FromFile(path=str(made.folder / "foreign" / name), eos="</s>", **settings)
    tokenizer = source.make({}, languages=("deu_Latn",), notify=str)
    tokenizer.decode(tokenizer.encode("the end"))


def _import_mapped(made: Made) -> None:
    _import(made, "a.model", id_map=MappedIds(path=str(made.folder / "foreign" / "rows.json")))


def _read_shards(made: Made) -> None:
    read_every_row(TokenShards.open(made.folder / "shards"))


def _read_config(made: Made) -> None:
    run = RunDir.open(made.folder / "run")
    run_problems(run)
    open_run(run.path)


def _read_recipe(made: Made) -> None:
    Run.from_dict(read_yaml_file(made.folder / "run" / "config.yaml"))


def _read_record(made: Made) -> None:
    run = RunDir.open(made.folder / "run")
    require_plugins(run)
    run_problems(run)


def _read_usage(made: Made) -> None:
    found = read_usage(made.folder / "run" / "usage.json")
    summarize_load(found.layers)
    _report(made)


def _read_lock(made: Made) -> None:
    RunLock.acquire(made.folder / "run.lock").release()


def _read_pointer(made: Made) -> None:
    root = made.folder / "root"
    for step in (6, 7):
        save_checkpoint(root, snapshot(step=step), keep=1)
    assert find_latest_checkpoint(root).path == root / "step-00000007"
    for path in root.glob("step-*"):
        shutil.rmtree(path)


def _rehash(checkpoint: Path, name: str) -> None:
    """Make the manifest agree with a file, as somebody who forges a checkpoint would."""
    path = checkpoint / "manifest.json"
    if (checkpoint / name).is_symlink() or not (checkpoint / name).is_file():
        return
    written = json.loads(path.read_text())
    content = (checkpoint / name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    written["files"][name] = {"bytes": len(content), "sha256": digest}
    path.write_text(json.dumps(written))


def _read_state(made: Made) -> None:
    checkpoint = made.folder / "run" / "checkpoints" / STEP
    _rehash(checkpoint, "state.json")
    load_saved_state(made.trainer, checkpoint)
    try:
        next(made.trainer.data)
    finally:
        made.trainer.data.close()
    made.trainer.snapshot()
    list(learning_rate_jump(read_state(checkpoint)["config"], run=made.trainer.run, step=6))


def _read_index(made: Made) -> None:
    checkpoint = made.folder / "sharded" / STEP
    _rehash(checkpoint, "index.json")
    load_checkpoint(checkpoint)


def _read_plugin(made: Made) -> None:  # text that is stored, and never parsed
    plugin = Plugin(name="gate.py", sha256="0" * 64, choices=("Gate",), stored=True)
    require_loaded((plugin,), run=made.folder, folder=made.folder / "plugins")


def _read_routes(made: Made) -> None:
    file = RoutesFile(made.folder / "a.routes")
    batches = list(file)
    compare_routes(file, batches)


def _report(made: Made) -> None:
    page = write_report(made.folder / "run").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")


# parts of state.json with a declared kind of their own
PARTS_OF_STATE = {"data position", "event log", "history of losses"}

# the kind, its file, what a damage keeps (``as_json`` in test_every_file_kind.py), how it is read
DOORS = (
    Door(CONFIG_FILE, "run/config.yaml", "yaml", _read_config),
    Door(CONFIG_FILE, "run/config.yaml", "yaml", _read_recipe),
    Door(CORPUS_MANIFEST_FILE, "corpus/corpus.json", "json",
         lambda made: read_corpus_manifest(made.folder / "corpus")),
    Door(DIRECTIONS_FILE, "run/directions.json", "json",
         lambda made: read_trained_directions(made.folder / "run" / "directions.json")),
    Door(HEALTH_FILE, "run/health.json", "json",
         lambda made: (read_findings(made.folder / "run" / "health.json"), _report(made))),
    Door(HEAD_SCORES_FILE, "run/head-scores.json", "json", _report),
    Door(ADAPTER_CONFIG_FILE, "theirs/adapter_config.json", "json",
         lambda made: read_adapter_config(made.folder / "theirs")),
    Door(GENERATION_FILE, "theirs/generation_config.json", "json",
         lambda made: read_imported_generation(made.folder / "theirs")),
    Door(HF_CONFIG_FILE, "theirs/config.json", "json",
         lambda made: read_hf_config(made.folder / "theirs")),
    Door(HF_INDEX_FILE, "theirs/model.safetensors.index.json", "json",
         lambda made: weight_files(made.folder / "theirs")),
    Door(ID_MAP_FILE, "foreign/rows.json", "json", _import_mapped),
    Door(INDEX_KIND, f"sharded/{STEP}/index.json", "json", _read_index),
    Door(INSIGHT_FILE, "run/insight.json", "json", _report),
    Door(LOCK_FILE, "run.lock", "json", _read_lock),
    Door(METADATA_FILE, "theirs/dcp/.metadata", "bytes",
         lambda made: read_metadata(made.folder / "theirs/dcp")),
    Door(MACHINE_FILE, "machine.yaml", "yaml",
         lambda made: read_machine(made.folder / "machine.yaml")),
    Door(MANIFEST_KIND, f"run/checkpoints/{STEP}/manifest.json", "json",
         lambda made: load_checkpoint(made.folder / "run" / "checkpoints" / STEP)),
    Door(MANIFEST_KIND, f"sharded/{STEP}/manifest.json", "json",
         lambda made: load_checkpoint(made.folder / "sharded" / STEP)),
    Door(PERPLEXITY_FILE, "run/perplexity.json", "json", _report),
    Door(METRICS_FILE, "run/metrics.jsonl", "lines",
         lambda made: (list(read_metrics(made.folder / "run" / "metrics.jsonl")), _report(made))),
    Door(PLUGIN_FILE, "plugins/gate.py", "bytes", _read_plugin),
    Door(POINTER_FILE, "root/best", "bytes", _read_pointer),
    Door(ROUTES_FILE, "a.routes", "safetensors", _read_routes),
    Door(RUN_FILE, "run/README.md", "bytes", lambda made: RunDir.open(made.folder / "run")),
    Door(RUN_RECORD_FILE, "run/run.json", "json", _read_record),
    Door(SCORE_CURVE_FILE, "run/curve.json", "json", _report),
    Door(SHARDS_FILE, "shards/shards.json", "json", _read_shards),
    Door(SHARDS_FILE, "shards/offsets.bin", "bytes", _read_shards),
    Door(SHARDS_FILE, "shards/pairs.bin", "bytes", _read_shards),
    Door(SHARDS_FILE, "shards/tokens.bin", "bytes", _read_shards),
    Door(STATE_KIND, f"run/checkpoints/{STEP}/state.json", "json", _read_state),
    Door(SUMMARY_FILE, "run/summary.json", "json", _report),
    Door(TENSOR_FILE, "run/model.safetensors", "safetensors",
         lambda made: read_tensors(made.folder / "run" / "model.safetensors")),
    Door(TEXT_RULES_FILE, "run/text_rules.json", "json",
         lambda made: read_text_rules(made.folder / "run" / "text_rules.json")),
    Door(TILES_FILE, "tiles.json", "json",
         lambda made: load_table.__wrapped__(made.folder / "tiles.json")),
    Door(TOKENIZER_FILE, "run/tokenizer.json", "json", _read_tokenizer),
    Door(TOKENIZER_FILE, "foreign/tokenizer.json", "json",
         lambda made: _import(made, "tokenizer.json")),
    Door(TOKEN_NAMES_FILE, "foreign/tokenizer_config.json", "json",
         lambda made: _import(made, "tokenizer.json")),
    Door(SENTENCEPIECE_FILE, "foreign/a.model", "bytes", lambda made: _import(made, "a.model")),
    Door(VOCABULARY_FILE, "imported/vocabulary.json", "json", _read_vocabulary),
    Door(USAGE_FILE, "run/usage.json", "json", _read_usage),
)  # fmt: skip
