"""``moesaic report``: one self-contained HTML file about a run, written from its files."""

from rich.console import Console

from moesaic.cli.common import Json, RunPath, answer, verb_app
from moesaic.report.write import write_report

app = verb_app()


@app.command()
def report(run: RunPath, *, as_json: Json = False) -> None:
    """Write report.html anew: losses, scores, routing, health. Open it in any browser, offline.

    Example: [cyan]moesaic report runs/demo[/]
    """
    path = write_report(run)

    def show(console: Console) -> None:
        console.print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)", highlight=False)

    answer({"report": str(path)}, as_json=as_json, show=show)
