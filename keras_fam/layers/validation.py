"""What the settings of a layer may be, each rule in one place."""

FAM_POSITIONS = ("last", "float", "zero")
FAM_QUERY_POSITIONS = ("previous", "current")
FAM_QUERIES = ("feedback", "static")
FAM_FEEDBACKS = ("residual", "normalized", "binary")
FAM_RECURRENCES = ("layer", "stack")
SEGMENT_SOURCES = ("inputs", "outputs")
INITIAL_FAMS = ("prompt", "prefix", "summary")
NORMS = ("rms_norm", "offset_rms_norm", "layer_norm")
QUERY_KEY_NORMS = ("rms_norm", "offset_rms_norm")


def require_whole(name, value, least):
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` is a whole number of at least {least}; received {value!r}.")


def require_one_of(name, value, allowed):
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{name}` is one of {', '.join(map(repr, allowed))}; received {value!r}.")


def require_positive(name, value, zero=False):
    """Raises ValueError unless `value` is a positive number (or 0, if `zero`)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"`{name}` is a {'non-negative' if zero else 'positive'} number; received {value!r}.")


def check_attention_settings(layer):
    """Raises ValueError if the settings of a `FeedbackAttention` contradict each other."""
    for name in ("num_query_heads", "num_key_value_heads", "head_dim", "block_size", "num_visible_memories"):
        require_whole(name, getattr(layer, name), 1)
    for name in ("memory_segments", "fam_length"):
        require_whole(name, getattr(layer, name), 0)
    if layer.num_query_heads % layer.num_key_value_heads:
        raise ValueError(
            "`num_query_heads` is a multiple of `num_key_value_heads`, so that every key/value head serves equally "
            f"many queries; received {layer.num_query_heads} and {layer.num_key_value_heads}."
        )
    if layer.rope_wavelength is not None:
        require_positive("rope_wavelength", layer.rope_wavelength)
        if layer.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs: `head_dim` is even; received {layer.head_dim}.")
    if layer.fam_length > layer.block_size:
        raise ValueError(
            "`fam_length` is at most `block_size`: the memory compresses a block, and its rows stand at places of "
            f"that block; received {layer.fam_length} rows for blocks of {layer.block_size}. Shorten the memory or "
            "lengthen the block."
        )
    if layer.attention_window is not None:
        require_whole("attention_window", layer.attention_window, 1)
    require_one_of("initial_fam", layer.initial_fam, INITIAL_FAMS)
    require_one_of("fam_position", layer.fam_position, FAM_POSITIONS)
    require_one_of("fam_query_position", layer.fam_query_position, FAM_QUERY_POSITIONS)
    require_one_of("fam_query", layer.fam_query, FAM_QUERIES)
    require_one_of("fam_feedback", layer.fam_feedback, FAM_FEEDBACKS)
    require_one_of("fam_recurrence", layer.fam_recurrence, FAM_RECURRENCES)
    require_one_of("segment_source", layer.segment_source, SEGMENT_SOURCES)
    require_one_of("query_key_norm", layer.query_key_norm, QUERY_KEY_NORMS)
    require_positive("fam_noise", layer.fam_noise, zero=True)
    for name in ("attention_scale", "attention_softcap"):
        if getattr(layer, name) is not None:
            require_positive(name, getattr(layer, name))
    if layer.segment_source == "outputs" and not layer.memory_segments:
        raise ValueError(
            '`segment_source="outputs"` says what the memory segments hold, so there is at least one; received '
            "memory_segments=0. Take more segments, or leave the setting out."
        )
    if layer.fam_length and layer.fam_recurrence == "stack":
        _check_stack(layer)


def _check_stack(layer):
    """The memory of RMT belongs to a stack of layers, and has one form."""
    if layer.own_initial_fam:
        raise ValueError(
            '`fam_recurrence="stack"` feeds the top layer\'s memory to the bottom layer, so a model holds the layers; '
            "received a layer that stands alone. Use a `TransformerFAMBackbone` with this setting."
        )
    needed = {"initial_fam": "prompt", "fam_query": "feedback", "fam_position": "last", "num_visible_memories": 1}
    for name, value in needed.items():
        if getattr(layer, name) != value:
            raise ValueError(
                f'`fam_recurrence="stack"` (RMT) has `{name}={value!r}`; received {getattr(layer, name)!r}. Leave the '
                'setting out, or take `fam_recurrence="layer"`.'
            )
