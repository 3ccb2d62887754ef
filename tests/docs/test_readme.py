"""The Python of README runs as it stands (its commands are those of the guide)."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_layer_and_the_step_of_readme_run(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    layer, step, use = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    space = {"__name__": "readme"}
    exec(compile(layer, "README.md", "exec"), space)
    assert "torch.Size([20, 16])" in capsys.readouterr().out
    exec(compile(step, "README.md", "exec"), space)
    assert space["loss"].isfinite()
    compile(use, "README.md", "exec")  # trains the demo
