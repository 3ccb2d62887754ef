"""Terminal output of evaluations: score tables, sentences that compare systems, and samples."""

from typing import Any

from rich.console import Console
from rich.text import Text

from moesaic.cli.shared_options import print_table
from moesaic.cli.styled_text import styled
from moesaic.evaluate.evaluation_summary import EvaluationSummary

SYSTEM_TITLES = {"model": "model", "copy": "copying", "memory": "memory"}


def show_scores(summary: EvaluationSummary, console: Console) -> None:
    """Print chrF++ (with its 95 % interval) and BLEU of every system per language."""
    found = summary.to_dict()
    tests = ", ".join(dict.fromkeys(result["test"] for result in found["languages"].values()))
    title = styled("chrF++ [dim]± half of the 95 % interval[/] and BLEU on {tests}", tests=tests)
    columns: list[str | Text] = ["language", "strings"]
    for system in summary.systems:
        columns += [f"{SYSTEM_TITLES.get(system, system)} chrF++", styled("[dim]BLEU[/]")]
    rows = []
    for result in found["languages"].values():
        best = max(summary.systems, key=lambda s: result[s]["chrf"]["score"])
        cells = [c for s in summary.systems for c in _score_cells(result[s], bold=s == best)]
        rows.append((result["name"], str(result["count"]), *cells))
    cells = [c for s in summary.systems for c in _score_cells(found["mean"][s], bold=False)]
    rows.append((styled("[bold]mean[/]"), "", *cells))
    print_table(console, columns, rows, title=title)
    for other, verdicts in found["verdicts"].items():
        difference = found["mean_differences"][other]
        console.print(_comparison_sentence(other, difference, verdicts))
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
    other: str, difference: dict[str, Any], verdicts: dict[str, list[str]]
) -> Text:
    chrf = difference["chrf"]
    counts = ", ".join(f"{word} in {len(keys)}" for word, keys in verdicts.items() if keys)
    sign = "above" if chrf["difference"] >= 0 else "below"
    return styled(
        "against {other}: {size:.1f} chrF++ {sign} [dim](95 %: {low:.1f} to {high:.1f})[/]; "
        "{counts} language(s)",
        other=SYSTEM_TITLES.get(other, other),
        size=abs(chrf["difference"]),
        sign=sign,
        low=chrf["low"],
        high=chrf["high"],
        counts=counts,
    )


def _experts_used(experts: dict[str, Any] | None) -> str:
    layers = (experts or {}).get("target", {}).get("layers", {})
    if not layers:
        return ""
    rows = list(layers.values())[-1]
    used = [str(pairs[0][0]) for pairs in rows if pairs]
    return "experts " + " ".join(used)
