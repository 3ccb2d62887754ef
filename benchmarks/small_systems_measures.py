"""What is measured of a trained small system: each function returns numbers by name."""

from collections.abc import Iterator

import numpy as np
import torch

from moesaic.data.batch import TARGET_LANGUAGE, TASK, Batch, InputRows
from moesaic.data.preferences import Preferences
from moesaic.data.ragged import Ragged
from moesaic.evaluate.forecasting import forecast, seasonal_naive
from moesaic.evaluate.ranking_metrics import best_of_n_curve, recall_at_1
from moesaic.model.transformer import Transformer
from moesaic.train.text_data import require_text
from moesaic.train.trainer import Trainer

HORIZONS = (8, 20, 32)
TIMES = 10  # bins of the time of diffusion
CANDIDATES = 64
COUNTS = (1, 4, 16, 64)
RETRIEVED = 100  # queries of a language


def forecasting(trainer: Trainer) -> dict[str, float]:
    """Mean squared errors of held-out windows at several horizons, and the naive forecasts'."""
    head, rows = trainer.run.model.head, trainer.run.data.source
    errors: dict[str, list[torch.Tensor]] = {}

    def predict(known: torch.Tensor, horizon: int) -> torch.Tensor:
        labels = torch.full(known.shape, torch.nan)
        labels[:, -1] = 0  # the head reads the last state alone
        inputs = InputRows.full(known[..., None])
        key = torch.zeros(len(known), dtype=torch.long)
        batch = Batch(InputRows.empty(len(known)), inputs, labels, {"domain": key}, key)
        points = trainer.model.predict(trainer.model(batch).hidden)
        start = sum(h for h in head.horizons if h < horizon)
        return points[:, start : start + horizon]

    for batch in trainer.data.held_out_batches("valid", rows=32):
        whole = batch.target.lengths == rows.positions
        batch = batch.select(whole)
        if not batch.rows:
            continue
        context = batch.target.values[:, : rows.context, 0]
        future = batch.labels[:, rows.context - 1 :]
        for horizon in HORIZONS:
            wanted = future[:, :horizon]
            found = forecast(context, predict=predict, horizon=horizon, horizons=head.horizons)
            naive = seasonal_naive(context, horizon=horizon, period=1)
            errors.setdefault(f"MSE at {horizon}", []).append((found - wanted).square().mean(1))
            errors.setdefault(f"last point's at {horizon}", []).append(
                (naive - wanted).square().mean(1)
            )
    found = {name: float(torch.cat(each).mean()) for name, each in errors.items()}
    return {"Huber": _held_out_loss(trainer), **found}


def diffusion(trainer: Trainer) -> dict[str, float]:
    """The held-out loss, and the bits that a patch's experts tell of its time, place and class."""
    found = {"MSE of the velocity": _held_out_loss(trainer)}
    counts: dict[str, dict[str, np.ndarray]] = {}
    for batch in _training_batches(trainer):
        time = (batch.target.values[:, 0, -2] * TIMES).long().clamp(max=TIMES - 1)
        for record in trainer.model(batch).records:
            routing, context = record.routing, record.context
            token, expert = routing.token, routing.expert
            row = context.row[token]
            labels = {
                "time": time[row],
                "position": context.position[token],
                "class": batch.groups["class"][row],
            }
            layer = counts.setdefault(record.layer, {})
            for name, label in labels.items():
                pair = (label * routing.num_experts + expert).numpy()
                size = {"time": TIMES, "position": batch.target.width, "class": 10}[name]
                table = np.bincount(pair, minlength=size * routing.num_experts)
                layer[name] = layer.get(name, 0) + table.reshape(size, -1)
    for name in ("time", "position", "class") if counts else ():
        each = [_mutual_information(tables[name]) for tables in counts.values()]
        found[f"bits of {name}"] = float(np.mean(each))
    return found


def rewards(trainer: Trainer) -> dict[str, float]:
    """Accuracy against the gold order, and the gold reward of the best of n by the model."""
    scores, golds, tasks, right = [], [], [], []
    weighted = require_text(trainer.run.data, what="this").mixture.tasks
    for batch in trainer.data.held_out_batches("valid", rows=None):
        score = trainer.model.predict(trainer.model(batch).hidden)
        task = batch.groups[TASK]
        right.append((score[::2] > score[1::2]).double())
        scores.append(score)
        tasks.append(task)
        golds.append(torch.from_numpy(_gold_rewards(batch, [w.task for w in weighted])))
    score, gold, task = torch.cat(scores), torch.cat(golds), torch.cat(tasks)
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(0))
    sets = [order[task[order] == t] for t in range(len(weighted))]
    chosen = torch.cat([s[: len(s) // CANDIDATES * CANDIDATES].view(-1, CANDIDATES) for s in sets])
    curve = best_of_n_curve(score[chosen], gold=gold[chosen], counts=COUNTS)
    found = {"accuracy": float(torch.cat(right).mean())}
    return found | {f"gold, best of {n}": value for n, value in zip(COUNTS, curve, strict=True)}


def retrieval(trainer: Trainer) -> dict[str, float]:
    """Recall at 1 over languages, of the trained model, of random weights, and of shared pieces."""
    untrained = Transformer(trainer.run.model)
    found: dict[int, list[list[torch.Tensor]]] = {}
    size = trainer.run.model.vocab_size
    for batch in trainer.data.held_out_batches("valid", rows=RETRIEVED):
        pieces = torch.zeros(batch.rows, size).scatter_add_(
            1, batch.target.values, batch.target.real.float()
        )
        language = batch.groups[TARGET_LANGUAGE]
        vectors = [m.predict(m(batch).hidden) for m in (trainer.model, untrained)]
        for code in language.unique().tolist():
            rows = language == code
            found.setdefault(code, []).append([v[rows] for v in (*vectors, pieces)])
    names = ("recall@1", "untrained", "shared pieces")
    recalls = {name: [] for name in names}
    for parts in found.values():
        for name, vectors in zip(names, zip(*parts, strict=True), strict=True):
            both = torch.cat(vectors)
            recalls[name].append(recall_at_1(both[::2], candidates=both[1::2]))
    means = {name: float(np.mean(each)) for name, each in recalls.items()}
    worst = {"lowest of a language": min(recalls["recall@1"]), "languages": len(found)}
    return means | worst


def loss_by_task(trainer: Trainer) -> dict[str, float]:
    """The held-out negative log-likelihood of a token, by task, and their mean."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for batch in _training_batches(trainer):
        output = trainer.model(batch)
        each = trainer.model.loss(output).each
        task = batch.groups[TASK][output.row]
        for t in task.unique().tolist():
            sums[t] = sums.get(t, 0.0) + float(each[task == t].sum())
            counts[t] = counts.get(t, 0) + int((task == t).sum())
    names = trainer.data.labels["task"]
    found = {names[t]: sums[t] / counts[t] for t in sorted(sums)}
    return found | ({"mean": float(np.mean(list(found.values())))} if len(found) > 1 else {})


def _training_batches(trainer: Trainer) -> Iterator[Batch]:
    head = trainer.run.model.head
    rows = trainer.run.validation.rows
    return (head.training_batch(b) for b in trainer.data.held_out_batches("valid", rows=rows))


def _held_out_loss(trainer: Trainer) -> float:
    total, count = 0.0, 0
    for batch in _training_batches(trainer):
        each = trainer.model.loss(trainer.model(batch)).each
        total, count = total + float(each.sum()), count + len(each)
    return total / count


def _gold_rewards(batch: Batch, tasks: list[Preferences]) -> np.ndarray:
    """Return the gold reward of each row under its task; a row is a prompt, a text and an end."""
    gold = np.zeros(batch.rows)
    for number, task in enumerate(tasks):
        rows = np.flatnonzero(batch.groups[TASK].numpy() == number)
        texts = [_text(batch, row) for row in rows.tolist()]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        tokens = np.concatenate(texts) if texts else np.zeros(0, dtype=np.int64)
        gold[rows] = task.gold_reward(Ragged(tokens, lengths))
    return gold


def _text(batch: Batch, row: int, *, prompt: int = 2) -> np.ndarray:
    length = int(batch.target.lengths[row])
    return batch.target.values[row, prompt : length - 1].numpy()


def _mutual_information(table: np.ndarray) -> float:
    """Return the mutual information in bits, less what a table of this size has by chance."""
    total = table.sum()
    joint = table / total
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    present = joint > 0
    bits = float((joint[present] * np.log2(joint[present] / product[present])).sum())
    # Miller and Madow: (rows - 1) (columns - 1) / (2 N ln 2)
    rows, columns = (table.sum(1) > 0).sum(), (table.sum(0) > 0).sum()
    return bits - (rows - 1) * (columns - 1) / (2 * total * np.log(2))
