"""The snippets of CONTRIBUTING.md run as they stand, in order, in a process of their own."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_snippets_of_contributing_run(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S)
    (tmp_path / "pairs.csv").write_text('"Open, now",Öffnen\n', encoding="utf-8")
    use = (
        'pairs = list(read_csv(Path("pairs.csv"), source="eng_Latn", target="deu_Latn"))\n'
        'assert [(p.source, p.target) for p in pairs] == [("Open, now", "Öffnen")]\n'
    )
    script = tmp_path / "snippets.py"
    script.write_text("\n".join([*blocks, use]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert len(blocks) == 5
    assert done.returncode == 0, done.stderr
