"""Every built-in rule has a name in configs without an import by the user."""

import pkgutil
import subprocess
import sys

import moesaic.moe

LIST_MODULES = """
import sys, moesaic.moe.builtin_rules
from moesaic.core.config import Choice
print(*(name for name in sys.modules if name.startswith("moesaic.moe.")))
"""


def test_every_module_of_rules_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES], capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.split())
    for module in pkgutil.iter_modules(moesaic.moe.__path__, "moesaic.moe."):
        source = module.module_finder.find_spec(module.name).loader.get_source(module.name)
        if "(Choice" in source or "(SparseLayer)" in source or "(Balance)" in source:
            assert module.name in imported, module.name
