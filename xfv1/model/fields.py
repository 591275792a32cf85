"""Read the attention layers of a few model types from the fields of a config.json.

This is for machines without vLLM. The names and defaults of fields are those of Transformers'
configuration classes. A field that this module does not know is an error, because it might change
the attention. Only the standard library is used.
"""

import json
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xfv1.model.facts import LayerKind, Model, NotAsked

DTYPES = ("float16", "bfloat16", "float32")
LAYER_TYPES = ("full_attention", "sliding_attention")
# Bounds that a typing error exceeds and no model does.
MAX_LAYERS = 1000
MAX_HEADS = 1024
MAX_HEAD_SIZE = 512
MAX_LENGTH = 2**31 - 1


_MISSING = object()


@dataclass(frozen=True)
class _Fields:
    """The fields of one JSON object, read with their types. An error names the field.

    values: the object. prefix: of field names in errors ("text_config."). defaults: the values of
    fields that are not there.
    """

    values: Mapping[str, Any]
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def error(self, name: str, accepted: str) -> ValueError:
        """An error that names a field; several names are "this or that"."""
        shown = " or ".join(self.prefix + part for part in name.split(" or "))
        value = self.get(name)
        found = f"{shown} is missing" if value is _MISSING else f"{shown}={reprlib.repr(value)}"
        return ValueError(f"{found}: expected {accepted}")

    def get(self, name: str) -> Any:
        """The field's value, its default, or `_MISSING`."""
        return self.values.get(name, self.defaults.get(name, _MISSING))

    def present(self, name: str) -> bool:
        """Whether the field has a value other than null."""
        return self.get(name) not in (_MISSING, None)

    def name_of(self, *names: str) -> str:
        """The first of the names that has a value; if none has one, all of them, for an error."""
        return next((name for name in names if self.present(name)), " or ".join(names))

    def integer(self, *names: str, least: int = 1, most: int | None = None) -> int:
        """A whole number that must be there, under the first of its names that is."""
        name = self.name_of(*names)
        value = self.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            span = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise self.error(name, f"an integer {span}")
        return int(value)

    def number(self, name: str) -> float:
        """A finite number above 0 that must be there."""
        value = self.get(name)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be larger than any float.
        if not numeric or not 0 < value <= sys.float_info.max:
            raise self.error(name, "null or a finite number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where the field is null or not there."""
        if self.present(name) and not isinstance(self.get(name), bool):
            raise self.error(name, "true or false")
        return self.get(name) is True

    def word(self, name: str, accepted: Mapping[str, Any] | tuple[str, ...]) -> str:
        """One of the accepted strings."""
        value = self.get(name)
        if not isinstance(value, str) or value not in accepted:
            raise self.error(name, ", ".join(accepted))
        return value

    def nested(self, name: str) -> "_Fields | None":
        """The object in a field; None where the field is null or not there."""
        if not self.present(name):
            return None
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return _Fields(value, f"{self.prefix}{name}.")


def read(config: dict[str, Any], ranks: int, dtype: str, missing: str) -> Model:
    """The attention layers of a model.

    Args:
        config: the object in a config.json.
        ranks: the number of tensor parallel ranks.
        dtype: "auto", or the dtype to serve with.
        missing: why vLLM cannot be imported.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    outer = _Fields(config)
    text = outer.nested("text_config") or outer
    named = text if text.present("model_type") else outer
    model_type = named.word("model_type", tuple(_FAMILIES))
    family = _FAMILIES[model_type]
    fields = _Fields(text.values, text.prefix, family.defaults)
    _check_known(fields, family)
    not_asked: tuple[NotAsked, ...] = ()
    if model_type == "whisper":
        kinds, not_asked = _whisper(fields, ranks)
    else:
        kinds = _decoder(fields, family, ranks)
    return Model(
        reader=f"the config's fields ({missing})",
        architecture=model_type,
        dtype=_dtype(outer, text) if dtype == "auto" else dtype,
        kinds=kinds,
        not_asked=not_asked,
    )


def _dtype(outer: _Fields, text: _Fields) -> str:
    """The model's dtype; bfloat16 where none is named."""
    places = [(at, name) for at in (outer, text) for name in ("dtype", "torch_dtype")]
    return next((at.word(name, DTYPES) for at, name in places if at.present(name)), "bfloat16")


def _check_known(fields: _Fields, family: "_Family") -> None:
    """Every field is read, or is known not to change the attention."""
    read = {*family.num_heads, *family.hidden_size, *family.num_layers, *family.reads, *_READ}
    for name in fields.values:
        if name not in read | _FIXED.keys() | _HARMLESS:
            raise fields.error(name, "no field that only vLLM can read; install vLLM")
    _check_fixed(fields, _FIXED)


# From fields to kinds.


def _every_layer(fields: _Fields, layers: int) -> list[bool]:
    return [True] * layers


def _alternating(fields: _Fields, layers: int) -> list[bool]:
    return [i % 2 == 0 for i in range(layers)]


def _all_but_each_nth(fields: _Fields, layers: int) -> list[bool]:
    # Transformers writes the name with an underscore, and old files without.
    own = fields.present("_sliding_window_pattern")
    pattern = fields.integer("_sliding_window_pattern" if own else "sliding_window_pattern")
    return [(i + 1) % pattern != 0 for i in range(layers)]


def _upper_layers(fields: _Fields, layers: int) -> list[bool]:
    first = fields.integer("max_window_layers", least=0)
    return [i >= first for i in range(layers)]


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Where a model_type's config says what.

    num_heads, hidden_size, num_layers: names of these fields, the first that is there counts.
    kv_heads_optional: no num_key_value_heads means as many as query heads.
    alibi, sinks: what all layers of such models have; MPT's `attn_config` can say otherwise.
    windowed: which layers have the window, where no `layer_types` say so.
    window_flag: the field that turns the window on, or None where it is always on.
    reads: further fields that are read.
    scalar: the layers' scale is `query_pre_attn_scalar`^-0.5.
    defaults: values of fields that files leave out, from Transformers' configuration class.
    """

    num_heads: tuple[str, ...] = ("num_attention_heads",)
    hidden_size: tuple[str, ...] = ("hidden_size",)
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    kv_heads_optional: bool = False
    alibi: bool = False
    sinks: bool = False
    windowed: Callable[[_Fields, int], list[bool]] = _every_layer
    window_flag: str | None = None
    reads: tuple[str, ...] = ()
    scalar: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA3 = _Family(
    windowed=_all_but_each_nth,
    reads=("sliding_window_pattern", "_sliding_window_pattern"),
    scalar=True,
    defaults={
        "query_pre_attn_scalar": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
)
_QWEN: dict[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}
_QWEN_READS = ("use_sliding_window", "max_window_layers")

_FAMILIES: dict[str, _Family] = {
    "llama": _Family(kv_heads_optional=True),
    "mistral": _Family(defaults={"sliding_window": 4096}),
    "gemma2": _Family(
        windowed=_alternating,
        scalar=True,
        defaults={
            "query_pre_attn_scalar": 256,
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi": _Family(kv_heads_optional=True),
    "phi3": _Family(kv_heads_optional=True),
    "stablelm": _Family(),
    "qwen2": _Family(
        windowed=_upper_layers,
        window_flag="use_sliding_window",
        reads=_QWEN_READS,
        defaults=_QWEN,
    ),
    "qwen3": _Family(
        windowed=_upper_layers,
        reads=_QWEN_READS,
        window_flag="use_sliding_window",
        defaults=_QWEN | {"head_dim": 128},
    ),
    "gpt_oss": _Family(
        sinks=True, windowed=_alternating, defaults={"head_dim": 64, "sliding_window": 128}
    ),
    "bloom": _Family(
        num_heads=("n_head", "num_attention_heads"),
        hidden_size=("n_embed", "hidden_size"),
        num_layers=("n_layer", "num_hidden_layers"),
        kv_heads_optional=True,
        alibi=True,
    ),
    "mpt": _Family(
        num_heads=("n_heads", "num_attention_heads"),
        hidden_size=("d_model", "hidden_size"),
        num_layers=("n_layers", "num_hidden_layers"),
        kv_heads_optional=True,
        alibi=True,
        reads=("attn_config",),
    ),
    "whisper": _Family(
        num_heads=("decoder_attention_heads",),
        hidden_size=("d_model",),
        num_layers=("decoder_layers",),
        reads=("encoder_attention_heads", "encoder_layers", "num_hidden_layers"),
    ),
}

# Fields that every family may have, and that are read.
_READ = frozenset(
    (
        *("model_type", "dtype", "torch_dtype", "head_dim", "num_key_value_heads"),
        *("sliding_window", "layer_types", "attn_logit_softcapping", "query_pre_attn_scalar"),
    )
)
# Fields that change the attention beyond what a kind of layer says, and their values that do not.
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "dual_chunk_attention_config": (None,),
    "quantization_config": (None,),
}
_FIXED_MPT: dict[str, tuple[Any, ...]] = {
    "prefix_lm": (None, False),
    "alibi_bias_max": (None, 8),
    "attn_uses_sequence_id": (None, False),
}
_READ_MPT = frozenset(("alibi", "attn_type", "kv_n_heads", "softmax_scale"))
_HARMLESS_MPT = frozenset(("attn_impl", "attn_pdrop", "clip_qkv", "model_type", "qk_ln", "rope"))
# Fields of Transformers' configuration classes that do not change an attention layer's arguments:
# sizes of other parts, positions, tokens, and how to train, generate or initialize.
_HARMLESS_WORDS = """
    _name_or_path activation_dropout activation_function apply_residual_connection_post_layernorm
    apply_spec_augment architectures attention_bias attention_dropout begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_proj_size decoder_ffn_dim decoder_layerdrop
    decoder_start_token_id dropout embd_pdrop emb_pdrop encoder_ffn_dim encoder_layerdrop
    eos_token_id expansion_ratio experts_per_token final_logit_softcapping forced_decoder_ids
    hidden_act hidden_activation hidden_dropout id2label init_config init_device init_std
    initial_context_length initializer_range intermediate_size is_encoder_decoder label2id
    layer_norm_epsilon layer_norm_eps learned_pos_emb logit_scale mask_feature_length
    mask_feature_min_masks mask_feature_prob mask_time_length mask_time_min_masks mask_time_prob
    max_length max_position_embeddings max_seq_len max_source_positions max_target_positions
    median_filter_width mlp_bias no_bias norm_type num_experts_per_tok num_local_experts
    num_mel_bins offset_alibi original_max_position_embeddings output_attentions
    output_hidden_states output_router_logits pad_token_id partial_rotary_factor pretraining_tp
    problem_type qk_layernorm qk_norm resid_pdrop return_dict rms_norm_eps rope_local_base_freq
    rope_parameters rope_scaling rope_theta router_aux_loss_coef scale_embedding seq_length
    slow_but_exact suppress_tokens swiglu_alpha swiglu_limit tie_word_embeddings
    transformers_version unk_index use_cache use_parallel_residual use_qkv_bias
    use_weighted_layer_sum verbose vocab_size
"""
_HARMLESS = frozenset(_HARMLESS_WORDS.split())


def _check_fixed(fields: _Fields, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in fixed.items():
        if fields.get(name) not in (_MISSING, *values):
            raise fields.error(name, " or ".join(json.dumps(value) for value in values))


def _decoder(fields: _Fields, family: _Family, ranks: int) -> tuple[LayerKind, ...]:
    """The kinds of a model's causal layers."""
    num_heads = fields.integer(*family.num_heads, most=MAX_HEADS)
    head_size = _head_size(fields, family.hidden_size, num_heads)
    alibi, scale = family.alibi, head_size**-0.5
    if family.scalar:
        scale = fields.number("query_pre_attn_scalar") ** -0.5
    elif fields.present("query_pre_attn_scalar"):
        raise fields.error("query_pre_attn_scalar", "no such field in this model_type")
    if attn_config := fields.nested("attn_config"):
        _check_mpt(attn_config)
        num_kv_heads = _mpt_kv_heads(attn_config, num_heads)
        alibi = attn_config.flag("alibi") if attn_config.present("alibi") else alibi
        if attn_config.present("softmax_scale"):
            scale = attn_config.number("softmax_scale")
    else:
        num_kv_heads = _kv_heads(fields, family, num_heads)
    own_heads, own_kv_heads = _rank(num_heads, num_kv_heads, ranks)
    softcap = "attn_logit_softcapping"
    layers = fields.integer(*family.num_layers, most=MAX_LAYERS)
    indices: dict[int | None, list[int]] = {}
    for index, window in enumerate(_windows(fields, family, layers)):
        indices.setdefault(window, []).append(index)
    return tuple(
        LayerKind(
            layers=tuple(at),
            num_heads=own_heads,
            num_kv_heads=own_kv_heads,
            head_size=head_size,
            scale=scale,
            sliding_window=window,
            softcap=fields.number(softcap) if fields.present(softcap) else None,
            alibi=alibi,
            sinks=family.sinks,
        )
        for window, at in indices.items()
    )


def _rank(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    """Query heads and KV heads of one tensor parallel rank. Ranks may have copies of a KV head.

    Raises:
        ValueError: the ranks cannot share the heads.
    """
    fits = num_kv_heads % ranks == 0 or ranks % num_kv_heads == 0
    if num_heads % ranks or not fits:
        raise ValueError(
            f"tensor_parallel_size={ranks}: expected a divisor of the {num_heads} attention heads"
            f" that divides, or is a multiple of, the {num_kv_heads} KV heads"
        )
    return num_heads // ranks, max(1, num_kv_heads // ranks)


def _check_mpt(attn_config: _Fields) -> None:
    for name in attn_config.values:
        if name not in _READ_MPT | _FIXED_MPT.keys() | _HARMLESS_MPT:
            raise attn_config.error(name, "no field that only vLLM can read; install vLLM")
    _check_fixed(attn_config, _FIXED_MPT)


def _kv_heads(fields: _Fields, family: _Family, num_heads: int) -> int:
    """KV heads, of which the query heads are a multiple; null means as many as query heads."""
    name = "num_key_value_heads"
    value = fields.get(name)
    if value is None or (value is _MISSING and family.kv_heads_optional):
        return num_heads
    return _divisor(fields, name, num_heads)


def _mpt_kv_heads(attn_config: _Fields, num_heads: int) -> int:
    """KV heads of MPT's three types of attention."""
    if not attn_config.present("attn_type"):
        return num_heads
    types = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
    attn_type = attn_config.word("attn_type", types)
    if attn_type == "grouped_query_attention":
        return _divisor(attn_config, "kv_n_heads", num_heads)
    return num_heads if attn_type == "multihead_attention" else 1


def _divisor(fields: _Fields, name: str, num_heads: int) -> int:
    num_kv_heads = fields.integer(name, most=MAX_HEADS)
    if num_heads % num_kv_heads:
        raise fields.error(name, f"a divisor of the {num_heads} attention heads")
    return num_kv_heads


def _head_size(fields: _Fields, hidden_size: tuple[str, ...], num_heads: int) -> int:
    """`head_dim`, else the hidden size's share of a head."""
    if fields.present("head_dim"):
        return fields.integer("head_dim", most=MAX_HEAD_SIZE)
    hidden = fields.integer(*hidden_size)
    if hidden % num_heads or hidden > MAX_HEAD_SIZE * num_heads:
        raise fields.error(
            fields.name_of(*hidden_size),
            f"head_dim, or a multiple of the {num_heads} attention heads with at most"
            f" {MAX_HEAD_SIZE} elements for each",
        )
    return hidden // num_heads


def _windows(fields: _Fields, family: _Family, layers: int) -> list[int | None]:
    """The window of each layer."""
    sliding = _layer_types(fields, layers)
    used = family.window_flag is None or fields.flag(family.window_flag)
    window = None
    if used and (fields.present("sliding_window") or any(sliding or ())):
        # 0 is how some files turn the window off, and vLLM takes it so.
        window = fields.integer("sliding_window", least=0, most=MAX_LENGTH) or None
    if window is None:
        return [None] * layers
    if sliding is None:
        sliding = family.windowed(fields, layers)
    return [window if slides else None for slides in sliding]


def _layer_types(fields: _Fields, layers: int) -> list[bool] | None:
    """Which layers `layer_types` gives the window; None where there are no `layer_types`."""
    name = "layer_types"
    if not fields.present(name):
        return None
    value = fields.get(name)
    if not isinstance(value, list) or len(value) != layers:
        raise fields.error(name, f"a list of {layers} layer types, one for each layer")
    for layer_type in value:
        if layer_type not in LAYER_TYPES:
            accepted = " or ".join(LAYER_TYPES)
            raise fields.error(name, f"only {accepted}, not {layer_type!r}")
    return [layer_type == "sliding_attention" for layer_type in value]


def _whisper(fields: _Fields, ranks: int) -> tuple[tuple[LayerKind, ...], tuple[NotAsked, ...]]:
    """The self and cross attention of the decoder's layers, and the encoder's layers."""
    num_heads = fields.integer("decoder_attention_heads", most=MAX_HEADS)
    head_size = _head_size(fields, ("d_model",), num_heads)
    own_heads, _ = _rank(num_heads, num_heads, ranks)
    encoder = fields.integer("encoder_layers", most=MAX_LAYERS)
    kinds = tuple(
        LayerKind(
            layers=tuple(range(fields.integer("decoder_layers", most=MAX_LAYERS))),
            attention=attention,
            num_heads=own_heads,
            num_kv_heads=own_heads,
            head_size=head_size,
            scale=head_size**-0.5,
        )
        for attention in ("decoder", "cross")
    )
    reason = "attention of an encoder of sound, for which vLLM has other backends"
    return kinds, (NotAsked(layer="WhisperEncoder", reason=reason, layers=tuple(range(encoder))),)
