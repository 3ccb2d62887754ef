"""How scores are shown: one table, its honest reading in a sentence, a few translations."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.evaluate.summary import EvaluationSummary

SYSTEM_TITLES = {"model": "model", "copy": "copying", "memory": "memory"}


def show_scores(summary: EvaluationSummary, console: Console) -> None:
    """Print chrF++ (with its 95 % interval) and BLEU of every system per language."""
    found = summary.to_dict()
    tests = ", ".join(dict.fromkeys(result["test"] for result in found["languages"].values()))
    title = f"chrF++ [dim]± half of the 95 % interval[/] and BLEU on {escape(tests)}"
    table = Table(box=None, title=title, title_justify="left", padding=(0, 1))
    table.add_column("language")
    table.add_column("strings", justify="right")
    for system in summary.systems:
        table.add_column(f"{SYSTEM_TITLES.get(system, system)} chrF++", justify="right")
        table.add_column("BLEU", justify="right", style="dim")
    for result in found["languages"].values():
        best = max(summary.systems, key=lambda s: result[s]["chrf"]["score"])
        cells = [c for s in summary.systems for c in _score_cells(result[s], bold=s == best)]
        table.add_row(result["name"], str(result["count"]), *cells)
    cells = [c for s in summary.systems for c in _score_cells(found["mean"][s], bold=False)]
    table.add_row("[bold]mean[/]", "", *cells)
    console.print(table)
    for other, verdicts in found["verdicts"].items():
        console.print(_comparison_sentence(other, found["mean_differences"][other], verdicts), highlight=False)
    for note in found["notes"]:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)


def show_samples(summary: EvaluationSummary, console: Console, *, each: int = 2) -> None:
    """Print a few translations, taken at even distances, and the experts that wrote them."""
    console.print("\n[bold]translations[/] [dim](not chosen; experts of the last MoE layer)[/]")
    for result in summary.languages.values():
        for sample in result.samples[:each]:
            said = escape(sample.outputs["model"])
            console.print(
                f"  [dim]{result.test.target}[/]  {escape(sample.source)} [dim]→[/] [bold]{said}[/]"
                f"  [dim]{_experts_used(sample.experts)}[/]",
                highlight=False,
            )


def _score_cells(scores: dict[str, Any], *, bold: bool) -> list[str]:
    chrf, bleu = scores["chrf"], scores["bleu"]
    half = (chrf["high"] - chrf["low"]) / 2
    text = f"{chrf['score']:.1f}"
    return [f"{f'[bold]{text}[/]' if bold else text} [dim]±{half:.1f}[/]", f"{bleu['score']:.1f}"]


def _comparison_sentence(other: str, lead: dict[str, Any], verdicts: dict[str, list[str]]) -> str:
    chrf = lead["chrf"]
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
    used = [str(visits[0][0]) for visits in rows if visits]
    return "experts " + " ".join(used)
