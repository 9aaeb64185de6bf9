"""What the settings of a layer may be, each rule in one place."""

FAM_QUERIES = ("feedback", "anchored", "layer_inputs")
FAM_POSITIONS = ("last", "float")
FAM_QUERY_POSITIONS = ("previous", "current")
INITIAL_FAMS = ("prompt", "prefix", "summary")
QUERY_KEY_NORMS = (None, "rms_norm", "offset_rms_norm")


def require_positive_integer(name, value, *, zero=False):
    """Raises ValueError unless `value` is a positive integer (or 0, if `zero`)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < (0 if zero else 1):
        raise ValueError(f"`{name}` must be a {'non-negative' if zero else 'positive'} integer; received {value!r}.")


def require_one_of(name, value, allowed):
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}; received {value!r}.")


def require_positive(name, value, zero=False):
    """Raises ValueError unless `value` is a positive number (or 0, if `zero`)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"`{name}` must be a {'non-negative' if zero else 'positive'} number; received {value!r}.")


def require_feedback(kind, attention):
    """Raises ValueError unless a `FeedbackAttention` writes its memory in the paper's form, for systems of their own.

    Args:
        kind: name of the system.
        attention: a `FeedbackAttention`.
    """
    if attention.fam_query != "feedback":
        raise ValueError(
            f"{kind} has a write of its own, so `fam_query` must be 'feedback'; received {attention.fam_query!r}. "
            "Leave it out, or use TransformerFAMBackbone."
        )


def require_layer_below(fam_query, owner):
    """Raises ValueError for memories of layer inputs where there is no layer below, so that they would never change."""
    if fam_query == "layer_inputs":
        raise ValueError(
            "`fam_query='layer_inputs'` remembers what the layer below makes of the memory rows, so it needs a model "
            f"of two layers or more; {owner} has none below. Use TransformerFAMBackbone with num_layers ≥ 2, or "
            "`fam_query='anchored'`."
        )


def check_attention_settings(attention):
    """Raises ValueError if the settings of a `FeedbackAttention` contradict each other."""
    for name in ("num_query_heads", "num_key_value_heads", "head_dim", "block_size", "num_visible_memories"):
        require_positive_integer(name, getattr(attention, name))
    for name in ("memory_segments", "fam_length", "attention_sinks"):
        require_positive_integer(name, getattr(attention, name), zero=True)
    if attention.num_query_heads % attention.num_key_value_heads:
        raise ValueError(
            "`num_query_heads` must be a multiple of `num_key_value_heads`: every key/value head serves equally "
            f"many queries; received {attention.num_query_heads} and {attention.num_key_value_heads}."
        )
    if attention.rope_wavelength is not None:
        require_positive("rope_wavelength", attention.rope_wavelength)
        name = "head_dim" if attention.rotary_dim is None else "rotary_dim"
        require_positive_integer(name, getattr(attention, name))
        if getattr(attention, name) % 2:
            raise ValueError(f"RoPE rotates pairs, so `{name}` must be even; received {getattr(attention, name)}.")
    if attention.rotary_dim is not None and (
        attention.rope_wavelength is None or attention.rotary_dim > attention.head_dim
    ):
        raise ValueError(
            "`rotary_dim` features of each head are rotated, at most `head_dim`, with a `rope_wavelength`; received "
            f"rotary_dim={attention.rotary_dim}, head_dim={attention.head_dim} and "
            f"rope_wavelength={attention.rope_wavelength}. Leave it out to rotate all of them, or none."
        )
    if attention.fam_length > attention.block_size:
        raise ValueError(
            "`fam_length` must be at most `block_size`: the memory compresses a block, and its rows stand at positions "
            f"of that block; received {attention.fam_length} rows for blocks of {attention.block_size}. Shorten the "
            "memory or lengthen the block."
        )
    if attention.attention_sinks > attention.block_size:
        raise ValueError(
            "`attention_sinks` must be at most `block_size`, so that the first block holds them; received "
            f"{attention.attention_sinks} sinks and blocks of {attention.block_size}."
        )
    if attention.attention_window is not None:
        require_positive_integer("attention_window", attention.attention_window)
    require_one_of("initial_fam", attention.initial_fam, INITIAL_FAMS)
    require_one_of("fam_query", attention.fam_query, FAM_QUERIES)
    if attention.rows_come_from_below and attention.initial_fam == "prefix":
        raise ValueError(
            f"`fam_query={attention.fam_query!r}` sends one set of learned rows up the layers, so `initial_fam` must "
            "be 'prompt' or 'summary'; received 'prefix', which has a first memory per layer and no such rows."
        )
    gate = attention.fam_gate
    if gate is not None and (isinstance(gate, bool) or not isinstance(gate, int | float) or not gate < float("inf")):
        raise ValueError(
            f'`fam_gate` must be None, a finite number or float("-inf"), which closes the memory; received {gate!r}.'
        )
    require_one_of("fam_position", attention.fam_position, FAM_POSITIONS)
    require_one_of("fam_query_position", attention.fam_query_position, FAM_QUERY_POSITIONS)
    require_one_of("query_key_norm", attention.query_key_norm, QUERY_KEY_NORMS)
    for name in ("attention_scale", "attention_softcap"):
        if getattr(attention, name) is not None:
            require_positive(name, getattr(attention, name))
