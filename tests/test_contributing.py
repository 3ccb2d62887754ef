"""The snippets of CONTRIBUTING.md run as they stand, in order, in a fork: they define members."""

import os
import re
from pathlib import Path

from moesaic.distributed.forked_ranks import run_on_ranks

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_snippets_of_contributing_run(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S)
    (tmp_path / "pairs.csv").write_text('"Open, now",Öffnen\n', encoding="utf-8")
    use = (
        'pairs = list(read_csv(Path("pairs.csv"), source="eng_Latn", target="deu_Latn"))\n'
        'assert [(p.source, p.target) for p in pairs] == [("Open, now", "Öffnen")]\n'
    )
    assert len(blocks) == 5
    run_on_ranks(1, run_in, tmp_path, "\n".join([*blocks, use]))


def run_in(folder: Path, text: str) -> None:
    os.chdir(folder)
    exec(compile(text, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
