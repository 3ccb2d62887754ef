"""Help and wrong options: quick, because nothing above the command line is imported for them."""

import importlib
import json
import subprocess
import sys

import typer

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


def words_of_every_command() -> list[list[str]]:
    """Each command, or its subcommands where it has some."""
    found = []
    for name in COMMANDS:
        app = importlib.import_module(f"moesaic.cli.{name}_command").app
        inner = vars(typer.main.get_command(app)).get("commands", {})
        found += [[name, word] for word in inner] or [[name]]
    return found


def test_help_of_every_command_has_an_example_and_imports_no_torch() -> None:
    asked = [[*words, "--help"] for words in words_of_every_command()]
    groups = [[command, "--help"] for command in COMMANDS]
    wrong = ["explain", "tiny", "--no-such-option", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", ASK_EVERY_COMMAND, json.dumps([*asked, *groups, wrong])],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    for words in (*asked, *groups):
        text = found["texts"][" ".join(words)]
        assert "Usage:" in text, words
        assert "Example" in text or words not in asked, words
    assert "no such option" in json.loads(found["texts"][" ".join(wrong)])["error"]
    heavy = {"torch", "numpy", "moesaic.train.run", "moesaic.recipes.lookup"}
    assert not heavy & set(found["imported"])


def test_a_command_runs_once_its_imports_are_made() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moesaic", "config", "recipes", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tiny" in json.loads(done.stdout)["recipes"]
