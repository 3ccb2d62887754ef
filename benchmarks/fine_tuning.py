"""Fine-tuning side by side: LoRA, SpIEL, random places and all parameters, with forgetting.

python benchmarks/fine_tuning.py --corpus FOLDER            three seeds of every choice
python benchmarks/fine_tuning.py --corpus FOLDER --quick    one seed of a few steps
python benchmarks/fine_tuning.py --draw                     write the table in the docs alone

FOLDER has ``LANGUAGE.train.tsv`` and ``.valid.tsv`` files with the columns domain, English, text.
A base is trained on several languages, with a few pairs of the one that is tuned afterwards. SpIEL
and random places train as many values as LoRA. Losses are of held-out rows: of the tuned language,
and of the others before and after. Results go to ``results/fine_tuning.json``.
"""

import argparse
import json
import lzma
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fine_tuning_page import write_page
from seed_statistics import by_metric, differences
from support import stamped

from moesaic.checkpoint.run_directory import RunDir
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.sources.local_files import PresplitFolder
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.distributed.world import SingleProcess
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.lr_schedule import WSD
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.adapter_choice import adaptable_matrices
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.sparse_adaptation import RandomSparse, SpIEL
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters
from moesaic.train.corpus_source import BuiltCorpus
from moesaic.train.merge_adapter import merge_adapter
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.run_training import make_trainer, train
from moesaic.train.text_data import TextData
from moesaic.train.training_data import Preparation
from moesaic.train.training_hooks import ValidationHook, no_progress
from moesaic.train.warm_start import WeightsOfRun

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fine_tuning.json"
OTHERS, TUNED = ("de", "fr", "it", "es"), "ca"
VOCABULARY, RANK, FEW_PAIRS = 4096, 4, 64


def main() -> None:
    options = _options()
    if not options.draw:
        RESULTS.write_text(json.dumps(stamped(_measure(options)), indent=1) + "\n")
    write_page(
        json.loads(RESULTS.read_text()), path=HERE.parent / "docs" / "fine-tuning-choices.md"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Choices of what is fine-tuned, side by side.")
    parser.add_argument("--corpus", type=Path, help="files LANGUAGE.train.tsv and .valid.tsv")
    parser.add_argument("--pairs", type=int, default=8000, help="of each language")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--quick", action="store_true", help="one seed of a few steps")
    parser.add_argument("--runs", type=Path, default=Path("build/fine-tuning"))
    parser.add_argument("--draw", action="store_true", help="train nothing")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.base_steps, options.steps, options.pairs = 1, 12, 12, 500
    return options


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    shutil.rmtree(options.runs, ignore_errors=True)
    few = _corpus(options, "few", pairs=FEW_PAIRS)
    many = _corpus(options, "many", pairs=options.pairs)
    base, began = _base(few, steps=options.base_steps), time.perf_counter()
    train(base, options.runs / "base", progress=no_progress)
    print(f"base: {time.perf_counter() - began:.0f} s", flush=True)
    whole = base.replace(data=_data(many, (*OTHERS, TUNED)))
    before = _losses(whole, options.runs / "base")
    found: dict[str, Any] = {"before": before, "steps": options.steps, "seeds": {}}
    for name, (choice, lr) in _choices(base.model).items():
        found["seeds"][name] = {}
        for seed in range(1, options.seeds + 1):
            run = base.replace(
                name=f"{name}-{seed}",
                seed=seed,
                steps=options.steps,
                data=_data(many, (TUNED,)),
                optimizer=AdamW(lr=lr),
                trainable=choice,
                initial_weights=WeightsOfRun(path=str(options.runs / "base")),
            )
            found["seeds"][name][str(seed)] = _one(run, options.runs / run.name, whole, before)
    rows = {name: list(seeds.values()) for name, seeds in found["seeds"].items()}
    found["choices"] = {name: by_metric(seeds) for name, seeds in rows.items()}
    found["differences"] = {
        f"{name} - lora": differences(seeds, rows["lora"])
        for name, seeds in rows.items()
        if name != "lora"
    }
    return found


def _corpus(options: argparse.Namespace, name: str, *, pairs: int) -> BuiltCorpus:
    """Return a corpus of all languages, with at most ``pairs`` rows of the tuned one."""
    folder = options.runs / f"text-{name}"
    folder.mkdir(parents=True)
    for language in (*OTHERS, TUNED):
        for split in ("train", "valid"):
            most = pairs if language == TUNED else options.pairs
            lines = "".join(islice(_lines(options.corpus / f"{language}.{split}.tsv"), most))
            (folder / f"{language}.{split}.tsv").write_text(lines, encoding="utf-8")
    source = PresplitFolder(folder=str(folder))
    return BuiltCorpus(recipe=CorpusRecipe(name=f"fine-tuning-{name}", source=source))


def _lines(path: Path) -> Iterator[str]:
    packed = path.with_name(f"{path.name}.xz")
    with lzma.open(packed, "rt") if packed.exists() else path.open() as stream:
        yield from stream


def _data(corpus: BuiltCorpus, languages: tuple[str, ...]) -> TextData:
    return TextData(
        corpus=corpus,
        languages=("en", *languages),
        tokenizer=TrainedTokenizer(vocab_size=VOCABULARY),
        mixture=MixtureConfig(tasks=(WeightedTask(task=Translation()),)),
        loader=LoaderConfig(batch_tokens=2048, max_source=64, max_target=64),
    )


def _base(corpus: BuiltCorpus, *, steps: int) -> Run:
    model = ModelConfig(
        vocab_size=VOCABULARY,
        dim=128,
        encoder=Stack(layers=2, moe_every=2),
        decoder=Stack(layers=2, moe_every=2),
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=256),
        moe=MoE(experts=8, select=TopK(k=2)),
    )
    return Run(
        name="base",
        data=_data(corpus, (*OTHERS, TUNED)),
        model=model,
        optimizer=AdamW(lr=3e-3),
        schedule=WSD(warmup=0.05, decay=0.4),
        steps=steps,
        checkpoint=CheckpointConfig(every=0),
        validation=ValidationConfig(every=0, rows=64),
        log=LogConfig(every=50, routing_probe_every=0),
    )


def _choices(model: ModelConfig) -> dict[str, tuple[TrainableParameters, float]]:
    """Return the choices and their learning rates; the adapters have as many parameters."""
    lora, made = LoRA(rank=RANK, alpha=2 * RANK), Transformer.without_values(model)
    named = dict(made.named_parameters())
    targets = [named[name] for name in adaptable_matrices(made) if lora.is_target(name)]
    lora.attach(made)
    share = _trained(made, lora) / sum(weight.numel() for weight in targets)
    return {
        "lora": (lora, 5e-3),
        "spiel": (SpIEL(density=share, every=25, select_steps=3), 5e-3),
        "random-sparse": (RandomSparse(density=share), 5e-3),
        "full": (AllParameters(), 1e-3),
    }


def _trained(model: Transformer, choice: TrainableParameters) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if choice.includes(n))


def _one(run: Run, out: Path, whole: Run, before: dict[str, float]) -> dict[str, float]:
    """Tune with one seed; return losses, the change of the others, and what it took."""
    began = time.perf_counter()
    train(run, out, progress=no_progress)
    seconds = time.perf_counter() - began
    saved = RunDir(out).adapter if run.trainable.keeps_base else RunDir(out).model
    if run.trainable.keeps_base:
        merge_adapter(RunDir(out))
    after, model = _losses(whole, out), Transformer.without_values(run.model)
    run.trainable.attach(model)
    found = {
        "tuned": after["tuned"],
        "others": after["others"],
        "forgotten": after["others"] - before["others"],
        "parameters": _trained(model, run.trainable),
        "saved_bytes": saved.stat().st_size,
        "seconds": round(seconds, 1),
    }
    print(f"{run.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    return found


def _losses(whole: Run, weights: Path) -> dict[str, float]:
    """Return the held-out loss, nats per token, of the tuned language and of the mean other."""
    run = whole.replace(initial_weights=WeightsOfRun(path=str(weights)))
    place = Preparation(RunDir(weights), SingleProcess(), lambda _: None, "")
    trainer = make_trainer(run, prepared=run.data.prepare(place), world=SingleProcess())
    values = ValidationHook().validation_losses(trainer)
    trainer.data.close()
    by_language = {n.rpartition("/")[2]: v for n, v in values.items() if n.endswith("_Latn")}
    tuned = next(code for code in by_language if code.startswith("cat"))
    others = [loss for code, loss in by_language.items() if code != tuned]
    return {"tuned": by_language[tuned], "others": sum(others) / len(others)}


if __name__ == "__main__":
    main()
