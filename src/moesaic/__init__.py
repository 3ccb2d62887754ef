"""moesaic: train, verify and serve multilingual Mixture-of-Experts models with PyTorch.

Train, then translate::

    import moesaic
    result = moesaic.fit(moesaic.recipe("demo"), "runs/demo")
    translator = moesaic.Translator.open("runs/demo")
    print(translator.translate(["Save changes"], source="en", target="es")[0].text)

One MoE layer in a model of your own (``moe/moe_module.py``)::

    layer = moesaic.MoE(dim=512, hidden=1024, experts=8, router="top2")
    loss = my_loss(layer(x)) + layer.aux_loss

The names below are imported on first use, so ``import moesaic`` does not import torch. ``fit`` is
``train`` of the command line; ``moesaic.train`` is the package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moesaic.core.thread_waiting import wait_asleep
from moesaic.core.version import __version__

wait_asleep()  # before anything imports torch

if TYPE_CHECKING:
    from moesaic.corpus.build_corpus import build_corpus as build_corpus
    from moesaic.corpus.corpus import Corpus
    from moesaic.model.parameter_flop_count import count_parameters
    from moesaic.moe.moe_module import MoEModule as MoE
    from moesaic.moe.moe_module import aux_loss as aux_loss
    from moesaic.moe.moe_module import update_rules as update_rules
    from moesaic.recipes.lookup import find_recipe as recipe
    from moesaic.recipes.lookup import warm_start as warm_start
    from moesaic.report.html_report import write_report
    from moesaic.serve.load_model import load as load
    from moesaic.serve.score import score_run
    from moesaic.serve.text_generator import TextGenerator
    from moesaic.serve.translator import Translator
    from moesaic.train.run import Run
    from moesaic.train.run_training import train as fit

# public name: module, name in that module
_LAZY_IMPORTS = {
    "Corpus": ("moesaic.corpus.corpus", "Corpus"),
    "MoE": ("moesaic.moe.moe_module", "MoEModule"),
    "Run": ("moesaic.train.run", "Run"),
    "TextGenerator": ("moesaic.serve.text_generator", "TextGenerator"),
    "Translator": ("moesaic.serve.translator", "Translator"),
    "aux_loss": ("moesaic.moe.moe_module", "aux_loss"),
    "build_corpus": ("moesaic.corpus.build_corpus", "build_corpus"),
    "count_parameters": ("moesaic.model.parameter_flop_count", "count_parameters"),
    "fit": ("moesaic.train.run_training", "train"),
    "load": ("moesaic.serve.load_model", "load"),
    "recipe": ("moesaic.recipes.lookup", "find_recipe"),
    "score_run": ("moesaic.serve.score", "score_run"),
    "update_rules": ("moesaic.moe.moe_module", "update_rules"),
    "warm_start": ("moesaic.recipes.lookup", "warm_start"),
    "write_report": ("moesaic.report.html_report", "write_report"),
}

__all__ = [
    "Corpus",
    "MoE",
    "Run",
    "TextGenerator",
    "Translator",
    "__version__",
    "aux_loss",
    "build_corpus",
    "count_parameters",
    "fit",
    "load",
    "recipe",
    "score_run",
    "update_rules",
    "warm_start",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    module, attribute = _LAZY_IMPORTS[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*_LAZY_IMPORTS, "__version__"])
