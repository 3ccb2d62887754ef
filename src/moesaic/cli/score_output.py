"""Terminal output of evaluations: score tables, sentences that compare systems, and samples."""

from typing import Any

from rich.console import Console
from rich.markup import escape

from moesaic.cli.shared_options import print_table
from moesaic.evaluate.evaluation_summary import EvaluationSummary

SYSTEM_TITLES = {"model": "model", "copy": "copying", "memory": "memory"}


def show_scores(summary: EvaluationSummary, console: Console) -> None:
    """Print chrF++ (with its 95 % interval) and BLEU of every system per language."""
    found = summary.to_dict()
    tests = ", ".join(dict.fromkeys(result["test"] for result in found["languages"].values()))
    title = f"chrF++ [dim]± half of the 95 % interval[/] and BLEU on {escape(tests)}"
    columns = ["language", "strings"]
    for system in summary.systems:
        columns += [f"{SYSTEM_TITLES.get(system, system)} chrF++", "[dim]BLEU[/]"]
    rows = []
    for result in found["languages"].values():
        best = max(summary.systems, key=lambda s: result[s]["chrf"]["score"])
        cells = [c for s in summary.systems for c in _score_cells(result[s], bold=s == best)]
        rows.append((result["name"], str(result["count"]), *cells))
    cells = [c for s in summary.systems for c in _score_cells(found["mean"][s], bold=False)]
    rows.append(("[bold]mean[/]", "", *cells))
    print_table(console, columns, rows, title=title)
    for other, verdicts in found["verdicts"].items():
        difference = found["mean_differences"][other]
        console.print(_comparison_sentence(other, difference, verdicts))
    for note in found["notes"]:
        console.print(f"[dim]{escape(note)}[/]")


def show_samples(summary: EvaluationSummary, console: Console, *, each: int = 2) -> None:
    """Print a few evenly spaced translations with the experts of their tokens."""
    console.print(
        "\n[bold]translations[/] [dim](evenly spaced samples; experts of the last MoE layer)[/]"
    )
    for result in summary.languages.values():
        for sample in result.samples[:each]:
            output = escape(sample.outputs["model"])
            console.print(
                f"  [dim]{result.test.target}[/]  {escape(sample.source)} [dim]→[/] "
                f"[bold]{output}[/]  [dim]{_experts_used(sample.experts)}[/]"
            )


def _score_cells(scores: dict[str, Any], *, bold: bool) -> list[str]:
    chrf, bleu = scores["chrf"], scores["bleu"]
    half = (chrf["high"] - chrf["low"]) / 2
    text = f"{chrf['score']:.1f}"
    score = f"[bold]{text}[/]" if bold else text
    return [f"{score} [dim]±{half:.1f}[/]", f"[dim]{bleu['score']:.1f}[/]"]


def _comparison_sentence(
    other: str, difference: dict[str, Any], verdicts: dict[str, list[str]]
) -> str:
    chrf = difference["chrf"]
    counts = ", ".join(f"{word} in {len(keys)}" for word, keys in verdicts.items() if keys)
    sign = "above" if chrf["difference"] >= 0 else "below"
    return (
        f"against {SYSTEM_TITLES.get(other, other)}: {abs(chrf['difference']):.1f} chrF++ {sign} "
        f"[dim](95 %: {chrf['low']:.1f} to {chrf['high']:.1f})[/]; {counts} language(s)"
    )


def _experts_used(experts: dict[str, Any] | None) -> str:
    layers = (experts or {}).get("target", {}).get("layers", {})
    if not layers:
        return ""
    rows = list(layers.values())[-1]
    used = [str(pairs[0][0]) for pairs in rows if pairs]
    return "experts " + " ".join(used)
