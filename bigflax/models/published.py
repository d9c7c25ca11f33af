"""What a published config.json says, as the arguments of a family's `build`.

A field is an argument, or one of HARMLESS (and of the family's IGNORED), which change nothing that we compute, or fixed to the one value that we
do compute (FIXED, and the family's own); anything else is refused. Configs inside of configs (`PARTS`) are read just as strictly.

Left out on purpose: guessing.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from bigflax import trees
from bigflax.models import FAMILIES, family, fields, part_fields

# What a config.json may say that changes nothing that we compute.
HARMLESS = (
    "architectures model_type transformers_version _name_or_path _commit_hash torch_dtype dtype use_cache auto_map task_specific_params "
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id tokenizer_class "
    "id2label label2id num_labels problem_type finetuning_task output_attentions output_hidden_states return_dict return_dict_in_generate "
    "gradient_checkpointing attn_implementation _attn_implementation prefix max_length "
    # how to generate, and with which library: older versions wrote all of it into every config, those inside of others included
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty min_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty suppress_tokens temperature tf_legacy_loss "
    "top_k top_p torchscript typical_p use_bfloat16"
).split()
# What it may say only like this: anything else is another function.
FIXED = {
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
# arguments of a family that are no fields of its config
OURS = ("dtype", "remat", "unroll", "dispatch", "capacity_factor", "head", "num_labels")


def understand(said: Mapping[str, Any], folder: str) -> tuple[str, dict[str, Any]]:
    """(family, arguments of its `build`) of a config. Raises ValueError for a type, a field, or a value of one that we do not compute."""
    kind = said.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{folder!r} has model_type {kind!r}; {trees.did_you_mean(str(kind), FAMILIES, 'the families are')}")
    home = family(kind)
    renamed = getattr(home, "RENAMED", {})
    said = {renamed.get(field, field): value for field, value in _modern_rope(said).items()}
    parts = {part: part_fields(build) for part, build in getattr(home, "PARTS", {}).items()}
    for part, known in parts.items():
        older = said.pop(f"{part}_dict", None)  # of CLIP's first configs: what it says holds, and what it does not say has its default
        said[part] = {**(said.get(part) or {}), **({**known, **older} if older else {})}
    config = _known(said, [name for name in inspect.signature(home.build).parameters if name not in OURS], kind, folder)
    for part, known in parts.items():
        config[part] = _known(said[part], list(known), kind, folder, f"{part}.")
    if config.get("rope_scaling"):
        config["rope_scaling"] = _trained_length(config["rope_scaling"], {**fields(home.build), **config})
    labels = len(said.get("id2label") or ()) or said.get("num_labels")
    if labels and "num_labels" in inspect.signature(home.build).parameters:
        config["num_labels"] = labels
    return kind, config


def _known(said: Mapping[str, Any], known: list[str], kind: str, folder: str, path: str = "") -> dict[str, Any]:
    """The fields of a config, or of that at `path` inside of it, that are arguments. Raises ValueError for what we do not compute."""
    home = family(kind)
    for field, value in said.items():
        name = path + field
        harmless = field in HARMLESS or any(re.fullmatch(pattern, name) for pattern in home.IGNORED)
        fixed = home.FIXED if harmless else {**{path + f: v for f, v in FIXED.items()}, **home.FIXED}
        if name in fixed and value not in (fixed[name], None):
            raise ValueError(f"{folder!r} says {name} = {value!r}, and {kind} is supported with {fixed[name]!r} only")
        if field not in known and name not in fixed and not harmless:
            raise ValueError(
                f"{folder!r} has the field {name!r} ({value!r}), which {kind} does not support; {trees.did_you_mean(field, known)}"
            )
    return {field: value for field, value in said.items() if field in known}


def _trained_length(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling with the length that it starts from: where a config does not say it, its own longest; in the dynamic kind in any case."""
    longest = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    dynamic = scaling.get("rope_type", scaling.get("type")) == "dynamic"
    return {**longest, **scaling, **(longest if dynamic else {})}


def _modern_rope(said: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`: here as the latter."""
    said = dict(said)
    rope = said.pop("rope_parameters", None)
    if rope is not None:
        if "full_attention" in rope:  # one for each kind of layer
            local, rope = rope.get("sliding_attention", {}), rope["full_attention"]
            if local.get("rope_type", "default") != "default":
                raise ValueError(
                    f"rope_parameters of sliding_attention have rope_type {local['rope_type']!r}; only 'default' is supported there"
                )
            said |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        said |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        said["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return said


def head_of(said: Mapping[str, Any], home: Any) -> str | None:
    """The head of the architecture that the config names; the family's own default where it names none."""
    heads = {architecture: head for head, (architecture, _) in reversed(home.HEADS.items())}
    wrote = (said.get("architectures") or [None])[0]
    if wrote is None:
        return inspect.signature(home.build).parameters["head"].default
    if wrote not in heads:
        raise ValueError(
            f"architecture {wrote!r} is not known; {trees.did_you_mean(wrote, heads, 'there are')}; or name one: load(..., head=)"
        )
    return heads[wrote]
