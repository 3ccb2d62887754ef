"""A model in the shape of NLLB-MoE, from text to transformers, and one of transformers tuned here.

    python benchmarks/nllb_end_to_end.py --corpus FOLDER

FOLDER has ``LANGUAGE.train.tsv`` and ``.valid.tsv`` files (or .xz), with the columns domain,
English, text. Every step is a command of a user, in a process of its own. ``nllb-shaped`` is
trained on five languages, exported, loaded by transformers, and held-out sentences are translated
by both programs. Then a random model of transformers, with that tokenizer, is imported, tuned on
two languages on two ranks, exported, and compared as the first. Minutes; needs the extra [hf].
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support import write_result

from moesaic.corpus.corpus import Corpus
from moesaic.corpus.languages import resolve_language
from moesaic.exchange.compare_with_transformers import compare_with_transformers
from moesaic.exchange.transformers_repairs import repair_forward
from moesaic.model.beam_search import Beam, Greedy
from moesaic.serve.translator import Translator

LANGUAGES, TUNED = ("de", "fr", "es", "ru", "el"), ("de", "fr")
PAIRS = (("en", "de"), ("fr", "en"), ("en", "ru"), ("el", "en"))
BEAMS = 4
TRANSLATION = "data.mixture.tasks.0"


def main() -> None:
    options = _options()
    place = options.runs.resolve()
    os.environ["MOESAIC_HOME"] = str(place / "home")
    record = place / "made.json"
    if not options.again:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        record.write_text(json.dumps(_make(place, options)))
    found = {
        "trained here": _compare(place / "first", place / "theirs", rows=options.rows),
        "made there, tuned here": _compare(place / "tuned", place / "back", rows=options.rows),
    }
    question = "are translations the same in transformers?"
    made = json.loads(record.read_text())
    write_result(options.out, {"question": question, **found, **made})


def _make(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train and export one model, import, tune and export the other. Returns steps and seconds."""
    text = {"name": "text", "languages": ["en", *LANGUAGES]}
    source = {"kind": "PresplitFolder", "folder": str(options.corpus.resolve())}
    (place / "text.yaml").write_text(json.dumps(text | {"source": source}))
    seconds = {"corpus": _moesaic("data", "build", str(place / "text.yaml"))}
    corpus = f'data.corpus=CorpusFolder(path="{place / "home/corpora/text"}")'
    first, theirs = place / "first", place / "theirs"
    settings = ["--set", corpus, "--set", "validation.every=0"]
    settings += ["--set", f"{TRANSLATION}.task.directions=BothDirections()"]
    seconds["train"] = _moesaic(
        *("train", "nllb-shaped", "--out", str(first), *settings),
        *("--set", f"steps={options.steps}", "--set", "data.loader.batch_tokens=2048"),
        *("--set", f"data.languages=[en,{','.join(LANGUAGES)}]"),
    )
    seconds["export"] = _moesaic("export", str(first), "--to", "hf", "--out", str(theirs))
    _random_model(place / "random", tokenizer=theirs)
    imported, tuned, back = place / "imported", place / "tuned", place / "back"
    seconds["import"] = _moesaic("import", str(place / "random"), "--out", str(imported))
    seconds["tune"] = _moesaic(
        *("train", "--init", str(imported), "--out", str(tuned), *settings),
        *("--set", f"steps={options.tuning_steps}", "--set", "parallel.plan.expert=2"),
        *("--set", "data.loader.max_source=40", "--set", "data.loader.max_target=48"),
        *("--set", f"data.languages=[en,{','.join(TUNED)}]"),
        ranks=2,
    )
    seconds["export again"] = _moesaic("export", str(tuned), "--to", "hf", "--out", str(back))
    return {"steps": options.steps, "tuning_steps": options.tuning_steps, "seconds": seconds}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="LANGUAGE.train.tsv, .valid.tsv")
    parser.add_argument("--runs", type=Path, default=Path("build/nllb-end-to-end"), help="emptied")
    parser.add_argument("--again", action="store_true", help="compare what --runs has")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tuning-steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=60, help="held-out sentences of a direction")
    default = Path(__file__).parent / "results" / "nllb_end_to_end.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


def _moesaic(*command: str, ranks: int = 1) -> float:
    """Run a command in a process, or on ranks. Returns its seconds."""
    start = time.perf_counter()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    subprocess.run([sys.executable, *launcher, "-m", "moesaic", *command], check=True)
    return round(time.perf_counter() - start, 1)


def _random_model(directory: Path, *, tokenizer: Path) -> None:
    """Save a small NLLB-MoE with random weights and a tokenizer, as a user of transformers does."""
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(tokenizer)
    layers = {f"{side}_layers": 2 for side in ("encoder", "decoder")}
    layers |= {f"{side}_sparse_step": 2 for side in ("encoder", "decoder")}
    layers |= {f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")}
    layers |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    ids = {
        f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    ids["decoder_start_token_id"] = tokens.eos_token_id
    config = transformers.NllbMoeConfig(
        vocab_size=len(tokens), d_model=64, num_experts=4, **layers, **ids
    )
    torch.manual_seed(0)
    transformers.NllbMoeForConditionalGeneration(config).save_pretrained(directory)
    tokens.save_pretrained(directory)


def _compare(ours: Path, theirs: Path, *, rows: int) -> dict[str, Any]:
    """Translate held-out sentences in both programs, greedily and with beams; count equal ones."""
    import transformers

    model, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        theirs, output_loading_info=True
    )
    repaired = repair_forward(model.eval())
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    translator = Translator.open(ours)
    result: dict[str, Any] = {
        "transformers": transformers.__version__,
        "repaired": repaired,
        "logit_difference": compare_with_transformers(theirs, ours=ours).logit_difference,
        **{name: sorted(loading[name]) for name in ("missing_keys", "unexpected_keys")},
        "directions": {},
    }
    for source, target in PAIRS:
        texts = _held_out(source, target, translator, rows=rows)
        row: dict[str, Any] = {"sentences": len(texts)}
        for name, beams, search in (
            ("greedy", 1, Greedy()),
            ("beam", BEAMS, Beam(size=BEAMS, length_penalty=1.0)),
        ):
            mine = translator.translate_texts(texts, source=source, target=target, search=search)
            wanted = [
                _in_transformers(model, tokenizer, text, translator, (source, target), beams=beams)
                for text in texts
            ]
            row[name] = sum(
                one.split() == two.split() for one, two in zip(mine, wanted, strict=True)
            )
            row[f"different {name} answers"] = len(set(mine))
        result["directions"][f"{source}-{target}"] = row
    return result


def _held_out(source: str, target: str, translator: Translator, *, rows: int) -> list[str]:
    """Return test sentences of a direction, of four words or more and not too long to be whole."""
    longest, encode = translator.limits.max_source - 2, translator.tokenizer.encode
    corpus = Corpus.open(Path(os.environ["MOESAIC_HOME"]) / "corpora/text")
    codes = resolve_language(source).code, resolve_language(target).code
    texts = (pair.source for pair in corpus.iter_pairs(*codes, split="test"))
    long_enough = (text for text in dict.fromkeys(texts) if len(text.split()) >= 4)
    return [text for text in long_enough if len(encode(text)) <= longest][:rows]


def _in_transformers(
    model: Any,
    tokenizer: Any,
    text: str,
    translator: Translator,
    languages: Sequence[str],
    *,
    beams: int,
) -> str:
    """Translate one text in transformers, with the limits and forbidden ids of ours."""
    tags = [tokenizer.convert_tokens_to_ids(f"<{resolve_language(c).code}>") for c in languages]
    ids = tokenizer.encode(translator.normalise(text), add_special_tokens=False)
    answer = model.generate(
        torch.tensor([[tags[0], *ids, tokenizer.eos_token_id]]),
        decoder_input_ids=torch.tensor([[tokenizer.eos_token_id, tags[1]]]),
        num_beams=beams,
        length_penalty=1.0,
        early_stopping=True,
        do_sample=False,
        max_new_tokens=translator.limits.new_tokens(len(ids) + 2, prompt=2),
        suppress_tokens=list(translator.tokenizer.vocabulary.suppressed),
    )
    return tokenizer.decode(answer[0, 2:], skip_special_tokens=True)


if __name__ == "__main__":
    main()
