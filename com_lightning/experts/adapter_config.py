"""Read the configuration of a PEFT adapter. What it may name is listed here; all else is refused.

PEFT reads some settings as names of files, models on the Hub or Python modules, others as regular expressions, of which
a hostile one never ends.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from com_lightning.errors import MergeError, reason
from com_lightning.experts.adapters import peft_warnings
from com_lightning.experts.state_dicts import some

ADAPTER_CONFIG = "adapter_config.json"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TYPES = _words("""
    ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS
    OFT OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
""")
"""Types that PEFT merges into weights, and for which it reads nothing but the adapter's own folder."""
_INPUTS = _words("""
    ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING
""")
_UNREAD = _words("""
    auto_mapping corda_config eva_config loftq_config lora_ga_config megatron_core progressbar revision
    runtime_config
""")
"""Settings that stand for training and for loading the base. They are left out."""
_DESCRIPTION = _words("""
    base_model_name_or_path inference_mode peft_type peft_version task_type
""")
_NUMBERS = _words("""
    alpha alpha_pattern asa_importance_beta asa_schedule_exponent asa_target_subspaces asa_uncertainty_beta beta1
    beta2 d_initial delora_lambda deltaT eps final_warmup generator_seed init_scale init_theta_d_bound init_v_bound
    init_warmup lambda_pattern lora_alpha mask_interval orth_reg_weight proj_seed projection_prng_key
    projection_seed psoft_alpha randlora_alpha random_loc_seed random_seed regularization_alpha scaling target_r
    tfinal tinit token_indices total_step trainable_token_indices
""")
"""Settings that are numbers of any size: no memory or time depends on them."""
_SIZES = _words("""
    block_size block_size_pattern boft_block_num boft_block_size boft_n_butterfly_factor decompose_factor depth
    effective_rank gralora_k group_size hybrid_r init_r kasa_config layers_to_transform mini_r n_frequency
    n_frequency_pattern num_A num_B num_cayley_neumann_terms num_subspaces num_vectors oft_block_size
    psoft_svd_lowrank_niter qalora_group_size r rank_pattern sparse_rate subspace_rank svd_threshold
    target_svd_config theta_d_length topk u vector_length velora_config
""")
"""Settings that are sizes, and numbers of repetitions."""
_CHOICES = _words("""
    ab_svd_init act_fn apply_GS bias block_share cayley_neumann_eps coft config_A_B config_C config_D_E
    decompose_both decomposition_method ensure_weight_tying fan_in_fan_out init_ia3_weights init_logits_std
    init_lora_weights init_vector_bank_bound init_weights lora_bias mask_type para proportional_parameters
    psoft_mag_a psoft_mag_b psoft_orth psoft_svd rank_dropout_scale runtime_offload_base_weight sample_at_inference
    save_indices save_only_topk_weights save_precomputed_indices save_projection select_top sparse sparsity stride_A
    use_asa use_bdlora use_cayley_neumann use_dora use_dynamic_rank use_effective_conv2d use_idwt use_qalora
    use_rslora variant very_sparse wavelet_family weight_tying
""")
_LAYERS = ["target_modules", "exclude_modules", "feedforward_modules"]
"""Names of layers, or a regular expression for them."""
_NAMES = ["layers_pattern", "modules_to_save", "target_parameters"]
_PATTERNS = ["rank_pattern", "alpha_pattern", "lambda_pattern"]
_TYPES_OF_PATTERNS = ["DELORA", "HIRA", "LOHA", "LOKR", "LORA"]
"""Those that understand a pattern as `_exact` does."""
_KNOWN = {*_UNREAD, *_DESCRIPTION, *_NUMBERS, *_SIZES, *_CHOICES, *_LAYERS, *_NAMES, *_PATTERNS}

TRAINING = ("_dropout", "dropout_p")
"""Ends of names of settings that do nothing to a model in eval mode."""
_CHANGED_BASE = ["corda", "loftq", "lora_ga"]
"""Ways to start from a changed base that PEFT cannot repeat from the configuration."""
_LONGEST = 1000
"""Characters of a name."""
_MOST = 4096
"""Names in a list that are not in the model."""
_SECONDS = 2.0
"""For all regular expressions of a configuration, which take milliseconds."""


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """The settings of an adapter, of which each is known to be harmless.

    Args:
        folder: of the adapter.
        label: names it in messages.

    Returns:
        The settings, without those that are for training only.

    Raises:
        MergeError: if it cannot be read, its type or a setting is not among those that are known, or nothing would be
            merged.
    """
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError([f"{label}: {ADAPTER_CONFIG} cannot be read ({reason(error)})"]) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise MergeError([f"{label}: {ADAPTER_CONFIG} is no configuration of PEFT: it has no peft_type"])
    kind = settings["peft_type"]
    if kind in _INPUTS:
        raise MergeError([f"{label}: {kind} changes a model's inputs, not its weights: there is nothing to merge"])
    if kind not in _TYPES:
        raise MergeError(
            [
                f"{label}: adapters of type {kind[:50]} are not merged: PEFT may read what is not in the folder, or "
                f"cannot merge them. Those that are: {', '.join(sorted(_TYPES))}"
            ]
        )
    if settings.get("init_lora_weights") == "eva":  # it leaves the base as it is, and its first values are replaced
        settings["init_lora_weights"] = True
    known = {name: value for name, value in settings.items() if name in _KNOWN and name not in _UNREAD}
    problems = [
        f"sets {name[:50]}, which cannot be merged or is not known to be harmless"
        for name, value in settings.items()
        if name not in _KNOWN and not name.endswith(TRAINING) and value not in (None, False, "", [], {})
    ]
    for name, value in known.items():
        problems += _value_problems(name, value)
    if problems:
        advice = "If you trust it, call PEFT's merge_and_unload() and give the model"
        raise MergeError([f"{label}: {ADAPTER_CONFIG} {some(problems, '; ', 3)}. {advice}"])
    return known


def _value_problems(name: str, value: Any) -> list[str]:
    texts = list(_texts(value))
    if too_long := [text for text in texts if len(text) > _LONGEST and not (name in _LAYERS and text is value)]:
        return [f"has a name of {len(too_long[0]):,} characters in {name}; at most {_LONGEST:,} are read"]
    if name in _LAYERS and isinstance(value, str) and len(value) > 10 * _LONGEST:
        return [f"has a regular expression of {len(value):,} characters as {name}"]
    names = name in _NAMES or (isinstance(value, dict) and name not in _PATTERNS)
    if names and (odd := [text for text in texts if not _is_plain(text)]):
        return [f"has {odd[0][:50]!r} in {name}, which is no name of a layer"]
    if name in _PATTERNS and not isinstance(value, dict | None):
        return [f"has {str(value)[:50]!r} as {name}, which is no mapping"]
    if len(texts) > _MOST and name not in _LAYERS:
        return [f"has {len(texts):,} names in {name}"]
    if name == "init_lora_weights":
        if value in _CHANGED_BASE:
            return [
                f"sets {name} to '{value}', so the adapter belongs to a changed base, which PEFT cannot make again: "
                "save it with path_initial_model_for_weight_conversion"
            ]
        if isinstance(value, str) and not re.fullmatch(r"[a-z]+(_niter_\d{1,2})?", value):
            return [f"has {value[:50]!r} as {name}"]
    return []


def _texts(value: Any) -> Iterator[str]:
    """All text in a setting, keys of mappings included."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            stack += value


def _numbers(value: Any) -> Iterable[float]:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield value
        elif isinstance(value, (dict, list)):
            stack += value.values() if isinstance(value, dict) else value


def _is_plain(text: str) -> bool:
    """Whether a text, taken for a regular expression, matches in no time."""
    return re.fullmatch(r"\^?\w[\w.-]*\$?", text) is not None


def make_config(
    settings: Mapping[str, Any], modules: Iterable[str], layers: Iterable[str], largest: int, label: str
) -> Any:
    """PEFT's configuration, in which names stand for regular expressions, and no size is beyond those of the weights.

    Args:
        settings: of the adapter, as :func:`read_config` gives them.
        modules: the names of all modules of the part that it is for.
        layers: the names of layers in the adapter's weights, which may be those of an older transformers.
        largest: the largest size of any tensor of the adapter and the part.
        label: names the source in messages.

    Returns:
        The configuration.

    Raises:
        MergeError: if a size is too large, a regular expression takes too long, or PEFT refuses the settings.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    settings, names = dict(settings), list(dict.fromkeys([*modules, *layers]))
    deadline, limit = time.monotonic() + _SECONDS, max(largest, 1000)
    problems = [
        f"sets {name} to {size}, and the largest size of the adapter's and the model's weights is {largest}"
        for name in sorted(_SIZES)
        for size in _numbers(settings.get(name))
        if abs(size) > limit
    ]
    suffixes = {".".join(parts[cut:]) for parts in (n.split(".") for n in names) for cut in range(len(parts))}
    try:
        for name in (name for name in _LAYERS if name in settings):
            value = settings[name]
            if isinstance(value, str) and value.lower() != "all-linear" and not _is_plain(value):
                settings[name] = _matching(value, names, deadline)
                if name == "target_modules" and not (settings[name] or settings.get("target_parameters")):
                    problems.append(f"has {value[:50]!r} as {name}, which matches no layer of the model")
            elif isinstance(value, list) and len(value) > _MOST:
                settings[name] = [entry for entry in value if entry in suffixes]
        for name in (name for name in _PATTERNS if not all(map(_is_plain, settings.get(name) or {}))):
            if settings["peft_type"] not in _TYPES_OF_PATTERNS:
                problems.append(f"has a regular expression in {name}, which is not read for {settings['peft_type']}")
            else:
                settings[name] = _exact(settings[name], names, deadline)
    except TimeoutError:
        problems.append(
            f"has a regular expression in {name} that takes too long: {next(_texts(settings[name]))[:50]!r}"
        )
    except Exception as error:
        problems.append(f"has an invalid regular expression in {name} ({reason(error)})")
    if problems:
        raise MergeError([f"{label}: {ADAPTER_CONFIG} {some(problems, '; ', 3)}"])
    try:
        config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
        with peft_warnings(label):
            return config_class.from_peft_type(**config_class.check_kwargs(**settings))
    except Exception as error:
        raise MergeError([f"{label}: {ADAPTER_CONFIG} cannot be read ({reason(error)})"]) from error


def _matching(pattern: str, names: Iterable[str], deadline: float) -> list[str]:
    """The names that a regular expression matches as a whole, as PEFT would find them.

    Returns:
        The names, in their order.

    Raises:
        TimeoutError: if that takes longer than until the deadline.
    """
    import regex  # it can stop, which Python's `re` cannot; transformers needs it, and PEFT needs transformers

    compiled = regex.compile(pattern)
    found = []
    for name in names:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        if compiled.fullmatch(name, timeout=left):
            found.append(name)
    return found


def _exact(patterns: Mapping[str, Any], names: Iterable[str], deadline: float) -> dict[str, Any]:
    """The same mapping with the names that its patterns match, the first pattern first, as PEFT's `get_pattern_key`."""
    exact: dict[str, Any] = {}
    rest = list(names)
    for pattern, value in patterns.items():
        found = _matching(rf"(.*\.)?({pattern})", rest, deadline)
        exact.update({f"^{re.escape(name)}": value for name in found})
        rest = [name for name in rest if name not in found]
    return exact
