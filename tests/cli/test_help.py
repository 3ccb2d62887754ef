"""Help and wrong options: quick, because nothing above the command line is imported for them."""

import json
import subprocess
import sys

from moesaic.cli.main import COMMANDS

ASK_EVERY_COMMAND = """
import contextlib, io, json, sys
from moesaic.cli.main import main

found = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["moesaic", *words]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main()
    found[" ".join(words)] = output.getvalue()
print(json.dumps({"texts": found, "imported": sorted(sys.modules)}))
"""
GROUPS = {
    "ckpt": ("inspect", "diff", "verify", "reshard"),
    "routes": ("show", "stats", "compare"),
    "data": ("build", "stats", "show"),
    "config": ("recipes", "show", "diff", "schema", "upgrade"),
    "bench": ("layer",),
}


def test_help_of_every_command_has_an_example_and_imports_no_torch() -> None:
    asked = [[command, "--help"] for command in COMMANDS]
    asked += [[group, inner, "--help"] for group, names in GROUPS.items() for inner in names]
    wrong = ["explain", "tiny", "--no-such-option", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", ASK_EVERY_COMMAND, json.dumps([*asked, wrong])],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    for words in asked:
        text = found["texts"][" ".join(words)]
        assert "Usage:" in text, words
        assert "Example" in text or words[0] in GROUPS, words
    assert "no such option" in json.loads(found["texts"][" ".join(wrong)])["error"]
    heavy = {"torch", "numpy", "moesaic.train.run", "moesaic.recipes.lookup"}
    assert not heavy & set(found["imported"])


def test_a_command_runs_once_its_imports_are_made() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moesaic", "explain", "tiny", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["name"] == "tiny"
