"""Terminal output of evaluations: score tables, sentences that compare systems, and samples."""

from typing import Any

from rich.console import Console
from rich.text import Text

from moesaic.cli.shared_options import print_table
from moesaic.cli.styled_text import styled
from moesaic.evaluate.evaluation_summary import EvaluationSummary
from moesaic.evaluate.head_scores import HeadScores

METRIC_TITLES = {"chrf": "chrF++", "bleu": "BLEU"}
SYSTEM_TITLES = {"model": "model", "copy": "copying", "memory": "memory"}


def show_scores(summary: EvaluationSummary, console: Console) -> None:
    """Print chrF++ (with its 95 % interval) and BLEU of every system per language."""
    found = summary.to_dict()
    tests = ", ".join(dict.fromkeys(result["test"] for result in found["languages"].values()))
    title = styled("chrF++ [dim]± half of the 95 % interval[/] and BLEU on {tests}", tests=tests)
    columns: list[str | Text] = ["language", "strings"]
    for system in summary.systems:
        columns += [f"{_title(system)} chrF++", styled("[dim]BLEU[/]")]
    rows = []
    for result in found["languages"].values():
        best = max(summary.systems, key=lambda s: result[s]["chrf"]["score"])
        cells = [c for s in summary.systems for c in _score_cells(result[s], bold=s == best)]
        kept = _kept_cell(result[summary.systems[0]]["placeholders"])
        rows.append((result["name"], str(result["count"]), *cells, kept))
    cells = [c for s in summary.systems for c in _score_cells(found["mean"][s], bold=False)]
    kept = _kept_cell(found["placeholders"][summary.systems[0]])
    rows.append((styled("[bold]mean[/]"), "", *cells, kept))
    if any(kept):
        columns.append("placeholders kept")
    else:
        rows = [row[:-1] for row in rows]
    print_table(console, columns, rows, title=title)
    for other, difference in found["mean_differences"].items():
        for metric, verdicts in (("chrf", found["verdicts"]), ("bleu", found["verdicts_bleu"])):
            sentence = _comparison_sentence(difference[metric], verdicts[other], metric=metric)
            console.print(styled("against {other}: {rest}", other=_title(other), rest=sentence))
    for sentence in found["disagreements"]:
        console.print(sentence)
    for note in found["notes"]:
        console.print(styled("[dim]{note}[/]", note=note))


def show_samples(summary: EvaluationSummary, console: Console, *, each: int = 2) -> None:
    """Print a few evenly spaced translations with the experts of their tokens."""
    console.print(
        styled(
            "\n[bold]translations[/] [dim](evenly spaced samples; experts of the last MoE layer)[/]"
        )
    )
    for result in summary.languages.values():
        for sample in result.samples[:each]:
            console.print(
                styled(
                    "  [dim]{target}[/]  {source} [dim]→[/] [bold]{output}[/]  [dim]{experts}[/]",
                    target=result.test.target,
                    source=sample.source,
                    output=sample.outputs["model"],
                    experts=_experts_used(sample.experts),
                )
            )


def _score_cells(scores: dict[str, Any], *, bold: bool) -> list[Text]:
    chrf, bleu = scores["chrf"], scores["bleu"]
    half = (chrf["high"] - chrf["low"]) / 2
    score = Text(f"{chrf['score']:.1f}", style="bold" if bold else "")
    return [
        styled("{score} [dim]±{half:.1f}[/]", score=score, half=half),
        styled("[dim]{bleu:.1f}[/]", bleu=bleu["score"]),
    ]


def _comparison_sentence(
    difference: dict[str, float], verdicts: dict[str, list[str]], *, metric: str
) -> Text:
    counts = ", ".join(f"{word} in {len(keys)}" for word, keys in verdicts.items() if keys)
    return styled(
        "{size:.1f} {metric} {sign} [dim](95 %: {low:.1f} to {high:.1f})[/]; {counts} language(s)",
        size=abs(difference["difference"]),
        metric=METRIC_TITLES[metric],
        sign="above" if difference["difference"] >= 0 else "below",
        low=difference["low"],
        high=difference["high"],
        counts=counts,
    )


def _kept_cell(rate: dict[str, Any]) -> str:
    """Return the share of rows with placeholders, tags or URLs whose output keeps all of them."""
    return f"{rate['rate']:.0%} of {rate['of']}" if rate["of"] else ""


def _title(system: str) -> str:
    return SYSTEM_TITLES.get(system, system)


def _experts_used(experts: dict[str, Any] | None) -> str:
    layers = (experts or {}).get("target", {}).get("layers", {})
    if not layers:
        return ""
    rows = list(layers.values())[-1]
    used = [str(pairs[0][0]) for pairs in rows if pairs]
    return "experts " + " ".join(used)


def show_head_scores(found: HeadScores, console: Console) -> None:
    """Print the loss and the metrics of a head, of all rows and by label."""
    for name, by_label in found.scores.items():
        rows = (
            (label, f"{s.score:.4f}", f"{s.low:.4f} to {s.high:.4f}", f"{s.rows:,}")
            for label, s in by_label.items()
        )
        print_table(console, (name, "mean", "95 %", "rows"), rows, title=f"{name} ({found.split})")
