"""Config upgrade: rewrite the keys and kinds of configs written by an earlier version.

``RENAMED_KINDS`` maps old names of choices to new ones. ``RENAMED_KEYS`` maps old keys to new ones,
by the (new) name of the config class or choice that holds them; ``MOVED_KEYS`` those that are now
in another part of the config.
"""

import re
from collections.abc import Mapping

KIND_CALL = re.compile(r"(\w+)(\(.*\))?", re.DOTALL)  # LayerNorm, or SwitchBalance(weight=0.01)

RENAMED_KINDS = {
    "AsStored": "StoredDirections",
    "At": "SplitAt",
    "AtRandom": "RandomPriority",
    "BestGroups": "TopGroups",
    "BlankTokens": "MaskTokens",
    "Blocks": "CheckpointBlocks",
    "BothWays": "BothDirections",
    "ByCost": "BalancedSplit",
    "ByPosition": "PositionPriority",
    "ByWeight": "WeightPriority",
    "Catalogue": "NamedCorpus",
    "Catalogues": "PyPICatalogues",
    "DataRow": "DataParallelRank",
    "Debian": "DebianCatalogues",
    "DecoderOnly": "DecoderOnlyCollator",
    "Decoupled": "DecoupledRouting",
    "Descriptions": "DebianDescriptions",
    "DropNear": "DropNearDuplicates",
    "DropTokens": "DeleteTokens",
    "EncoderDecoder": "EncoderDecoderCollator",
    "Extract": "PresplitFolder",
    "Files": "LocalFiles",
    "Firefox": "FirefoxMessages",
    "Importance": "ImportanceBalance",
    "InChunks": "ChunkedAllToAll",
    "Joined": "PivotDirections",
    "Keep": "KeepNearDuplicates",
    "KeepAll": "NoActivationCheckpointing",
    "KeptFraction": "TargetLoadBalance",
    "Learned": "LearnedPositions",
    "Lend": "AdaptiveExperts",
    "Linear": "LinearDecay",
    "MatchAdamW": "MatchRMSAdamW",
    "MutualInformation": "MutualInformationBalance",
    "Narrow": "DownProjection",
    "NoNoise": "NoRouterNoise",
    "NoPosition": "NoPositionalEncoding",
    "NoSpare": "NoNullExperts",
    "NothingBeside": "NoSharedExperts",
    "OfficeHelp": "LibreOfficeHelp",
    "OnTag": "HiddenStateAndTag",
    "OnToken": "HiddenStateAndToken",
    "OneMinusSqrt": "OneMinusSqrtDecay",
    "Only": "ListedDirections",
    "OnlyTag": "TagOnly",
    "OnlyToken": "TokenOnly",
    "Parallel": "ParallelResidual",
    "PreGated": "PreGatedRouting",
    "Recurrent": "RecurrentRouting",
    "Residual": "ResidualExpert",
    "RingReach": "Ring",
    "RouterZ": "RouterZLoss",
    "Rows": "RowCount",
    "Serial": "SequentialResidual",
    "ShuffleNearby": "ShuffleTokens",
    "SoftMixture": "SoftMoE",
    "StochasticWarmUp": "StochasticWarmup",
    "Straight": "AllToAll",
    "Synthetic": "SyntheticLanguages",
    "TakeSpikes": "IgnoreSpikes",
    "Together": "CombinedSources",
    "Tokens": "TokenCount",
    "TwoHops": "HierarchicalAllToAll",
    "UlyssesReach": "Ulysses",
    "Unconditioned": "HiddenState",
    "Unlinked": "IndependentRouters",
    "Whole": "NoDispatchProjection",
    "WholeBatch": "GlobalBatch",
}
RENAMED_KEYS = {
    "AdamW": {"decayed": "decayed_kinds"},
    "AdaptiveBalance": {"most": "max_dropped", "least": "min_dropped", "memory": "ema_weight"},
    "BPE": {"min_count": "min_frequency", "max_piece": "max_piece_length"},
    "DeviceBalance": {"groups": "num_groups"},
    "ExpertChoice": {"factor": "capacity_factor"},
    "LearnedPositions": {"max": "max_length"},
    "LoaderConfig": {"window": "bucket_window", "layout": "collator"},
    "LogConfig": {
        "routes_every": "routing_stats_every",
        "record_every": "routing_trace_every",
        "probe_every": "routing_probe_every",
        "also": "sinks",
    },
    "MixtureConfig": {"unit": "size_unit", "cap": "size_limit", "boost": "language_weights"},
    "MixtureOfAttention": {"keys": "key_values"},
    "MoE": {
        "beside": "shared_experts",
        "spare": "null_experts",
        "exchange": "dispatch_projection",
        "condition": "router_input",
        "link": "cross_layer",
    },
    "ModelConfig": {"block": "block_layout"},
    "Muon": {"steps": "ns_steps"},
    "NullBalance": {"final": "final_weight", "steps": "decay_steps"},
    "ParallelConfig": {
        "reach": "context_parallel",
        "journey": "dispatch",
        "room": "capacity_scope",
        "schedule": "pipeline_schedule",
        "stages": "pipeline_split",
        "recompute": "activation_checkpointing",
    },
    "ProductKeyMemory": {"side": "keys_per_side"},
    "Run": {"accumulate": "gradient_accumulation_steps", "patience_s": "collective_timeout_s"},
    "SigmoidTopK": {"among": "expert_groups"},
    "SkipSpikes": {"lasting": "patience", "lower": "lr_factor"},
    "Slurm": {"more": "extra_options"},
    "SoftMoE": {"length": "assumed_length"},
    "SplitConfig": {"near": "near_duplicates"},
    "Stack": {"dense": "first_dense_layers", "experts": "experts_per_layer"},
    "StochasticWarmup": {"steps": "warmup_steps"},
    "Threshold": {"expected": "expected_fraction"},
    "TrainedTokenizer": {
        "lines": "sample_lines",
        "coverage": "character_coverage",
        "max_alphabet": "max_alphabet_share",
    },
    "TopGroups": {"groups": "num_groups", "kept": "top_groups", "best": "experts_per_score"},
    "TopK": {"among": "expert_groups"},
    "TopP": {"most": "max_experts"},
    "Unigram": {"max_piece": "max_piece_length"},
}
# Config classes that are no choices (and so have no kind), by the key that holds them.
SECTIONS = {
    "decoder": "Stack",
    "encoder": "Stack",
    "loader": "LoaderConfig",
    "log": "LogConfig",
    "mixture": "MixtureConfig",
    "model": "ModelConfig",
    "parallel": "ParallelConfig",
    "split": "SplitConfig",
    "tokenizer": "TrainedTokenizer",
}

# The sections that are choices now: what an earlier config without a kind means.
KINDS_OF_SECTIONS = ("TrainedTokenizer",)

# Keys that are now below another one: the new path, and the kind of each choice on the way.
MOVED_KEYS = {
    "Run": {
        **{key: ("data", key) for key in ("corpus", "languages", "tokenizer", "mixture", "loader")},
        "label_smoothing": ("model", "head", "label_smoothing"),
    }
}
KINDS_OF_MOVED_KEYS = {"data": "TextData", "model.head": "LanguageModelHead"}

EARLIER_BFLOAT16 = ({"kind": "BFloat16"}, "BFloat16", "BFloat16()")

MAX_SHOWN_RENAMES = 3

# parts of parameter names in checkpoints of format 1, and their present names
RENAMED_PARAMETER_PARTS = {
    "alike": "replicated",
    "all": "attention",
    "always": "feed_forward",
    "beside": "shared_experts",
    "condition": "router_input",
    "entry": "input_norm",
    "exchange": "dispatch_projection",
    "fixed": "feed_forward",
    "heard": "stats_sum",
    "into": "input_projection",
}
RENAMED_HEADS = re.compile(r"(?<![^/])head\.(classes|patch)\.")  # in formats 1 and 2


def upgrade_config(value: object, *, config: str = "Run") -> tuple[object, dict[str, str]]:
    """Return ``value`` (the plain data of a ``config``) with new names, and what was renamed.

    The second result maps each renamed path or kind to its new name; it is empty for a config of
    this version.
    """
    renamed: dict[str, str] = {}
    upgraded = _upgrade(value, config=config, path="", renamed=renamed)
    if isinstance(upgraded, dict):
        for old, path in MOVED_KEYS.get(config, {}).items():
            if old in upgraded:
                renamed[old] = ".".join(path)
                upgraded = _move(upgraded, old, path)
        # Until parameters could be in bfloat16, BFloat16 had products in it, and no field.
        if "parallel.plan.offload" in renamed and upgraded.get("precision") in EARLIER_BFLOAT16:
            renamed["precision=BFloat16"] = "BFloat16Autocast"
            upgraded["precision"] = {"kind": "BFloat16Autocast"}
    return upgraded, renamed


def _move(tree: Mapping[str, object], old: str, path: tuple[str, ...]) -> dict[str, object]:
    """Return ``tree`` with the value of the key ``old`` at ``path``, in records as needed."""
    moved: dict[str, object] = {key: value for key, value in tree.items() if key != old}
    here = moved
    for depth, step in enumerate(path[:-1]):
        found = here.get(step)
        inner: dict[str, object] = {}
        if isinstance(found, Mapping):
            inner |= found
        elif kind := KINDS_OF_MOVED_KEYS.get(".".join(path[: depth + 1])):
            inner["kind"] = kind
        here[step] = inner
        here = inner
    here[path[-1]] = tree[old]
    return moved


def describe_renames(renamed: Mapping[str, str]) -> list[str]:
    """Return one sentence per renamed path or kind."""
    return [f"{old}: is now called {new}" for old, new in renamed.items()]


def earlier_version_problem(renamed: Mapping[str, str]) -> str:
    """Return the sentence that refuses a config of an earlier version and names the way out."""
    shown = [f"{old} is now called {new}" for old, new in renamed.items()][:MAX_SHOWN_RENAMES]
    more = f", and {len(renamed) - len(shown)} more" if len(renamed) > len(shown) else ""
    return (
        f"names of an earlier version: {', '.join(shown)}{more}; "
        "a config file or a run is rewritten by: moesaic config upgrade FILE|RUN"
    )


def _upgrade(value: object, *, config: str, path: str, renamed: dict[str, str]) -> object:
    if isinstance(value, str):
        return _upgrade_kind(value, path=path, renamed=renamed)
    if isinstance(value, list | tuple):
        return [
            _upgrade(item, config="", path=f"{path}.{number}".strip("."), renamed=renamed)
            for number, item in enumerate(value)
        ]
    if not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    owner = RENAMED_KINDS.get(kind, kind) if isinstance(kind, str) else config
    keys = RENAMED_KEYS.get(owner, {})
    upgraded: dict[str, object] = {}
    if kind is None and config in KINDS_OF_SECTIONS:
        upgraded["kind"] = config
        renamed[path] = f"{path}={config}"
    for key, item in value.items():
        old = str(key)
        new = keys.get(old, old)
        here = f"{path}.{old}".strip(".")
        if new != old:
            renamed[here] = f"{path}.{new}".strip(".")
        upgraded[new] = _upgrade(item, config=SECTIONS.get(new, ""), path=here, renamed=renamed)
    if owner == "ModelConfig" and "attention_experts" in upgraded:
        renamed[f"{path}.attention_experts".strip(".")] = f"{path}.mixers".strip(".")
        return _attention_experts_to_mixers(upgraded)
    plan = upgraded.get("plan")
    if owner == "ParallelConfig" and isinstance(plan, Mapping) and "offload" in plan:
        renamed[f"{path}.plan.offload".strip(".")] = f"{path}.memory".strip(".")
        return _offload_to_memory(upgraded, plan=plan)
    return upgraded


def _offload_to_memory(
    parallel: dict[str, object], *, plan: Mapping[object, object]
) -> dict[str, object]:
    """Offloading is a memory plan: gradients and optimizer states on the host."""
    rest = {key: value for key, value in plan.items() if key != "offload"}
    host = {"gradients": {"kind": "HostMemory"}, "optimizer_states": {"kind": "HostMemory"}}
    memory: dict[str, object] = {"memory": host} if plan["offload"] else {}
    return {**parallel, "plan": rest, **memory}


def _attention_experts_to_mixers(model: dict[str, object]) -> dict[str, object]:
    """Attention experts are a sequence mixer: it replaces the one called ``attention``."""
    rest = {key: value for key, value in model.items() if key != "attention_experts"}
    experts, mixers = model["attention_experts"], rest.get("mixers", {})
    kind = experts.get("kind") if isinstance(experts, Mapping) else experts
    if kind == "NoAttentionExperts" or not isinstance(mixers, Mapping):
        return rest
    return rest | {"mixers": {"attention": experts, **mixers}}


def _upgrade_kind(text: str, *, path: str, renamed: dict[str, str]) -> str:
    found = KIND_CALL.fullmatch(text)
    if (
        found is None
        or found[1] not in RENAMED_KINDS
        or path.rpartition(".")[2] in ("name", "path")
    ):
        return text
    renamed[f"{path}={found[1]}"] = new = RENAMED_KINDS[found[1]]
    return new + (found[2] or "")


def current_name(name: str, *, file_format: int) -> str:
    """Return the present name of a parameter, or of its optimizer state, in a file of a format."""
    if file_format < 2:
        name = re.sub(r"[^./]+", lambda p: RENAMED_PARAMETER_PARTS.get(p[0], p[0]), name)
    return RENAMED_HEADS.sub("head.projection.", name) if file_format < 3 else name
