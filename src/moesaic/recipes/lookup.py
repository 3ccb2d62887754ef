"""Recipe lookup: the Run of a recipe's name, of a config file or of a run directory."""

from collections.abc import Sequence
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import require_plugins
from moesaic.core.errors import ConfigError, UserError, did_you_mean
from moesaic.core.registry import Registry
from moesaic.core.yaml_reader import read_yaml_file
from moesaic.model.config import ModelConfig
from moesaic.model.presets import PRESETS
from moesaic.moe.auxiliary_losses import LoadBalancingLoss, SwitchBalance, TargetLoadBalance
from moesaic.moe.config import MoE, SparseLayer
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.recipes.demo_recipe import demo
from moesaic.recipes.dit_moe_recipe import dit_moe, dit_moe_dense
from moesaic.recipes.dmoerm_recipe import dmoerm, dmoerm_single
from moesaic.recipes.hybrid_recipes import hunyuan_hybrid, spikingbrain_inter, spikingbrain_intra
from moesaic.recipes.jiuzhang_recipe import jiuzhang, jiuzhang_plain_gate
from moesaic.recipes.language_model_recipes import language_model, language_model_demo
from moesaic.recipes.multilingual_recipes import multilingual_50, multilingual_50_laptop
from moesaic.recipes.shaped_recipes import mixtral_shaped, nllb_shaped, qwen3_shaped
from moesaic.recipes.time_moe_recipe import time_moe, time_moe_dense
from moesaic.recipes.tiny_recipes import tiny, tiny_lm
from moesaic.recipes.vlm2vec_recipe import vlm2vec, vlm2vec_dense
from moesaic.train.run import Run
from moesaic.train.text_data import TextData
from moesaic.train.warm_start import WeightsOfRun

RECIPES: Registry[Run] = Registry("recipe")
_TEXT = (demo, tiny, tiny_lm, multilingual_50, multilingual_50_laptop)
_DOCUMENTS = (language_model_demo, language_model)
_SYSTEMS = (time_moe, dit_moe, dmoerm, vlm2vec, jiuzhang)
_CONTROLS = (time_moe_dense, dit_moe_dense, dmoerm_single, vlm2vec_dense, jiuzhang_plain_gate)
_HYBRIDS = (hunyuan_hybrid, spikingbrain_inter, spikingbrain_intra)
_SHAPED = (mixtral_shaped, qwen3_shaped, nllb_shaped)
for _recipe in (*_TEXT, *_DOCUMENTS, *_SHAPED, *_SYSTEMS, *_CONTROLS, *_HYBRIDS):
    RECIPES.register()(_recipe)


def find_recipe(which: str, *, changes: list[str] | None = None) -> Run:
    """Return the Run of a recipe, a config file, or a run directory, with ``changes`` applied.

    Raises UserError: no recipe or file of that name, or a config that is wrong (each key named).
    """
    run = _read_run(which)
    return run.override(changes) if changes else run


def warm_start(init: str, *, which: str | None = None, changes: Sequence[str] = ()) -> Run:
    """Return a Run that starts from the weights and the tokenizer of the run directory ``init``.

    It is the Run of ``which`` (see ``find_recipe``), or that of ``init`` under another name, with
    ``changes`` applied. Its languages are all of the corpus if the corpus is changed and they are
    not. Routed layers that nothing balances get ``SwitchBalance``. Raises UserError.
    """
    init_run = str(RunDir.open(Path(init)).path)
    given = {change.partition("=")[0].strip() for change in changes}
    run = _read_run(which or init_run)
    if which is None:
        run = run.replace(name=f"{run.name}-warm-start")
        corpus = any(path.startswith("data.corpus") for path in given)
        if corpus and isinstance(run.data, TextData) and "data.languages" not in given:
            run = run.replace(data=run.data.replace(languages=()))
        run = run.replace(model=_balanced(run.model))
    run = run.replace(initial_weights=WeightsOfRun(path=init_run))
    return run.override(list(changes)) if changes else run


def _balanced(model: ModelConfig) -> ModelConfig:
    """Return a model whose routed layers have a balance term, unless a rule balances otherwise."""
    encoder, decoder = (
        stack if stack.moe is None else stack.replace(moe=_balanced_layer(stack.moe))
        for stack in (model.encoder, model.decoder)
    )
    return model.replace(moe=_balanced_layer(model.moe), encoder=encoder, decoder=decoder)


def _balanced_layer(moe: SparseLayer) -> SparseLayer:
    if not isinstance(moe, MoE) or moe.experts == 1 or moe.select.balances_load:
        return moe
    if any(
        isinstance(term, LoadBalancingLoss | TargetLoadBalance | BiasUpdate) for term in moe.balance
    ):
        return moe
    return moe.replace(balance=(*moe.balance, SwitchBalance()))


def _read_run(which: str) -> Run:
    path = Path(which)
    if path.is_dir():
        path = path / "config.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise ConfigError([f"{path}: there is no such config file"])
        require_plugins(RunDir(path.parent))
        value = read_yaml_file(path)
        try:
            return Run.from_dict(value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {problem}" for problem in error.problems) from error
    if which in RECIPES:
        return RECIPES(which)
    if which in PRESETS:
        raise UserError(
            f'"{which}" is a preset of a model, not a whole run: `moesaic explain {which}` and '
            f"`moesaic scale {which}` take it"
        )
    raise UserError(
        f'there is no recipe "{which}"{did_you_mean(which, [*RECIPES, *PRESETS])} (known: '
        f"{', '.join(RECIPES)}; `moesaic config recipes` lists the presets too)"
    )
