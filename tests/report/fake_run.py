"""A run directory that looks like a finished demo: for the report's tests and for looking at it."""

import json
import math
from pathlib import Path

import numpy as np

LANGUAGES = (
    "deu_Latn", "nld_Latn", "swe_Latn", "dan_Latn", "fra_Latn", "spa_Latn", "por_Latn",
    "ita_Latn", "pol_Latn", "rus_Cyrl", "ukr_Cyrl", "jpn_Jpan",
)  # fmt: skip
NAMES = (
    "German", "Dutch", "Swedish", "Danish", "French", "Spanish", "Portuguese", "Italian",
    "Polish", "Russian", "Ukrainian", "Japanese",
)  # fmt: skip
FAMILY = (0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4)
SAMPLES = {
    "deu_Latn": [
        ("Unable to open the file.", "Die Datei kann nicht geöffnet werden.",
         "Die Datei konnte nicht geöffnet werden.", "Die Datei konnte nicht gelesen werden."),
        ("Select all", "Alles auswählen", "Alle auswählen", "Alles auswählen"),
        ("Enter a valid date.", "Bitte ein gültiges Datum eingeben.",
         "Geben Sie ein gültiges Datum ein.", "Bitte eine gültige Uhrzeit eingeben."),
    ],
    "rus_Cyrl": [
        ("Delete selected items", "Удалить выбранные элементы", "Удалить выбранные объекты",
         "Удалить выбранные файлы"),
        ("Password changed", "Пароль изменен", "Пароль изменён", "Изменить пароль"),
    ],
    "jpn_Jpan": [
        ("Save changes?", "変更を保存しますか?", "変更を保存しますか？", "変更を破棄しますか？"),
        ("New user", "新しいユーザー", "新規ユーザー", "ユーザー"),
    ],
}  # fmt: skip


def write_fake_run(path: Path, *, experts: int = 8, seed: int = 0) -> Path:
    """Write config, metrics, usage and summary of a plausible run and return its path."""
    random = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(_CONFIG, encoding="utf-8")
    rows = "".join(json.dumps(row) + "\n" for row in _metrics(random))
    (path / "metrics.jsonl").write_text(rows, encoding="utf-8")
    (path / "usage.json").write_text(json.dumps(_usage(random, experts)), encoding="utf-8")
    (path / "insight.json").write_text(json.dumps(_insight(random, experts)), encoding="utf-8")
    (path / "summary.json").write_text(json.dumps(_summary(random)), encoding="utf-8")
    return path


def _metrics(random, steps=3000):
    for step in range(10, steps + 1, 10):
        down = 5.9 * math.exp(-step / 420) + 2.3 * math.exp(-step / 2600) + 1.2
        noise = random.normal(0, 0.05, 6)
        row = {
            "step": step,
            "train/loss": down + noise[0],
            "train/loss/translation": down + 0.2 + noise[1],
            "train/loss/denoising": down * 0.82 + noise[2],
            "train/loss_balance": 0.011 + 0.02 * math.exp(-step / 150) + 0.0004 * noise[3],
            "train/loss_z": 0.004 + 0.003 * math.exp(-step / 300),
            "train/grad_norm": 0.6 + 2.5 * math.exp(-step / 120) + abs(noise[4]) * 2,
            "train/lr": 0.004 * min(step / 200, 1, (steps + 10 - step) / 900),
            "train/tokens": step * 3300,
            "perf/tokens_per_s": 33000 + 900 * noise[5] * 10,
            "perf/step_ms": 99 + 10 * noise[5],
            "time/data_ms": 0.4,
            "moe/max_vio": 0.35 + 2.2 * math.exp(-step / 200) + abs(noise[0]),
            "moe/load_entropy": 0.985 - 0.3 * math.exp(-step / 180) - 0.02 * abs(noise[1]),
            "moe/dead_experts": 2.0 if step < 40 else 0.0,
            "moe/drop_frac": 0.0,
        }
        if step % 250 == 0:
            row |= {"valid/loss": down + 0.14, "valid/loss/translation": down + 0.33}
            row |= {f"valid/loss/{c}": down + 0.1 + 0.07 * i for i, c in enumerate(LANGUAGES)}
        yield row


def _usage(random, experts):
    """Related languages prefer the same experts, more so in later layers."""
    layers = []
    taste = random.dirichlet(np.ones(experts) * 0.6, size=max(FAMILY) + 1)
    for layer, strength in (("encoder.1", 0.15), ("encoder.3", 0.4), ("decoder.1", 0.85)):
        taste = taste[:, random.permutation(experts)]
        counts = np.zeros((experts, len(LANGUAGES)), dtype=int)
        for g, family in enumerate(FAMILY):
            own = random.dirichlet(np.ones(experts) * 3)
            share = strength * (0.75 * taste[family] + 0.25 * own) + (1 - strength) / experts
            counts[:, g] = random.multinomial(40_000 + 3000 * g, share / share.sum())
        layers.append({
            "layer": layer, "counts": counts.tolist(), "dropped": [0] * len(LANGUAGES),
            "dropped_late": 0, "router_entropy": 0.62, "logit_rms": 3.1,
        })  # fmt: skip
    return {"format": 1, "languages": list(LANGUAGES), "layers": layers}


def _insight(random, experts):
    """A router that reads the token, hardly the position, and fills its experts unevenly."""
    layers = {}
    for layer, left in (("encoder.1", 0.71), ("encoder.3", 0.52), ("decoder.1", 0.63)):
        asked = (40_000 * np.exp(-np.arange(40) / 14)).astype(int)
        rate = 0.4 / (1 + np.exp(6 - np.arange(40) / 3))
        layers[layer] = {
            "experts": experts, "null_experts": 0,
            "uncertainty": {
                "token": left, "position": 0.95, "token_by_chance": 0.984,
                "position_by_chance": 0.991,
            },
            "typical": [[f"word{e}", " of", "</s>"] for e in range(experts)],
            "positions": {
                "asked": asked.tolist(), "dropped": [0] * 40,
                "first_come": (asked * rate).astype(int).tolist(),
                "at_random": random.binomial(asked, 0.11).tolist(),
            },
        }  # fmt: skip
    return {"format": 1, "layers": layers}


def _score(value, width):
    return {
        "score": round(value, 2),
        "low": round(value - width, 2),
        "high": round(value + width, 2),
    }


def _difference(value, width):
    verdict = "better" if value > width else "worse" if value < -width else "unclear"
    chrf = {
        "difference": round(value, 2), "low": round(value - width, 2),
        "high": round(value + width, 2), "p": 0.001 if abs(value) > width else 0.31,
    }  # fmt: skip
    return {"chrf": chrf, "verdict": verdict}


def _languages(random):
    found = {}
    for i, (code, name) in enumerate(zip(LANGUAGES, NAMES, strict=True)):
        latin = code.endswith("Latn")
        copy = 24 - 0.6 * i if latin else 12.0
        model, memory = 43 - 1.6 * i + random.normal(0, 2.5), 41 - 0.9 * i
        rate = {"rate": 0.0, "off": 0, "counted": 190, "note": ""}
        result = {
            "name": name, "source": "eng_Latn", "target": code, "test": "catalogues-small test",
            "count": 200, "of": 900 - 40 * i,
            "signatures": {
                "chrf": "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0",
                "bleu": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
            },
        }  # fmt: skip
        for system, value in (("model", model), ("copy", copy), ("memory", memory)):
            lid = {"rate": 0.03, "off": 3, "counted": 88, "note": ""}
            result[system] = {
                "chrf": _score(value, 2.4), "bleu": _score(value * 0.55, 3.1),
                "off_target": {"script": rate, "identified": lid}, "empty": 0, "seconds": 1.4,
            }  # fmt: skip
        result["differences"] = {
            "copy": _difference(model - copy, 2.2), "memory": _difference(model - memory, 2.6)
        }  # fmt: skip
        result["samples"] = [_sample(random, *texts) for texts in SAMPLES.get(code, ())]
        found[code] = result
    return found


def _sample(random, source, reference, model, memory):
    def side(text, layers):
        tokens = ["<tag>", *(piece for word in text.split() for piece in _pieces(word)), "</s>"]
        visits = {name: [[[int(random.integers(8)), 0.71]] for _ in tokens] for name in layers}
        return {"tokens": tokens, "layers": visits}

    experts = {
        "source": side(source, ["encoder.1", "encoder.3"]),
        "target": side(model, ["decoder.1"]),
    }
    return {
        "source": source, "reference": reference, "model": model, "copy": source,
        "memory": memory, "experts": experts,
    }  # fmt: skip


def _pieces(word):
    return [word] if len(word) < 6 else [word[:4], word[4:]]


def _summary(random):
    languages = _languages(random)
    systems = ["model", "copy", "memory"]
    mean, verdicts = {}, {}
    for system in systems:
        values = [r[system]["chrf"]["score"] for r in languages.values()]
        bleu = [r[system]["bleu"]["score"] for r in languages.values()]
        mean[system] = {
            "chrf": _score(float(np.mean(values)), 0.8), "bleu": _score(float(np.mean(bleu)), 1.0)
        }  # fmt: skip
    for other in systems[1:]:
        verdicts[other] = {
            kind: [k for k, r in languages.items() if r["differences"][other]["verdict"] == kind]
            for kind in ("better", "worse", "unclear")
        }
    leads = {
        other: _difference(mean["model"]["chrf"]["score"] - mean[other]["chrf"]["score"], 0.9)
        for other in systems[1:]
    }
    return {
        "format": 1, "run": "demo", "created": "2026-11-22T10:31:00+00:00", "systems": systems,
        "languages": languages, "mean": mean, "mean_differences": leads, "verdicts": verdicts,
        "notes": ["spBLEU not computed: its model is not at hand"],
        "counts": {
            "parameters": 2_640_000, "active_parameters": 910_000, "train_tokens": 9_900_000,
            "train_pairs": 21_444, "steps": 3000,
        },
        "seconds": {"corpus": 21.0, "tokenizer": 4.2, "train": 301.4, "evaluate": 38.9},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "moesaic": "0.1.0"},
    }  # fmt: skip


_CONFIG = """\
name: demo
seed: 1
model:
  vocab_size: 4096
  dim: 128
  encoder: {layers: 4, moe_every: 2}
  decoder: {layers: 2, moe_every: 2}
  moe:
    kind: MoE
    experts: 8
    select: {kind: SwitchTop1}
    limit: {kind: Dropless}
    balance:
    - {kind: SwitchBalance, weight: 0.01}
    - {kind: RouterZLoss, weight: 0.001}
optimizer: {kind: Muon, lr: 0.02}
schedule: {kind: WSD}
steps: 3000
"""
