"""What the settings of a `TransformerFAMBackbone` may be, and how they are handed to its layers."""

from keras_fam.layers import feed_forward as feed_forwards
from keras_fam.layers import memory_update as memory_updates
from keras_fam.layers.feedback_attention import FeedbackAttention
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.layers.validation import require_layer_below, require_positive, require_positive_integer

# Settings that every layer of a backbone takes.
BLOCK_SETTINGS = (*FeedbackAttention.SETTINGS, *TransformerFAMBlock.SETTINGS)
_EQUAL_IN_ALL_LAYERS = ("block_size", "fam_length", "initial_fam", "fam_query", "num_visible_memories")


def check_settings(settings):
    """Raises ValueError if arguments of a backbone, a dict of all of them, contradict each other."""
    for name in ("vocabulary_size", "num_layers", "hidden_dim", "num_query_heads"):
        require_positive_integer(name, settings[name])
    for name in ("blocks_per_step", "backpropagation_steps"):
        if settings[name] is not None:
            require_positive_integer(name, settings[name])
    if settings["logit_softcap"] is not None:
        require_positive("logit_softcap", settings["logit_softcap"])
    hidden_dim, num_query_heads = settings["hidden_dim"], settings["num_query_heads"]
    if settings["head_dim"] is None and hidden_dim % num_query_heads:
        raise ValueError(
            "`hidden_dim` must be a multiple of `num_query_heads` unless `head_dim` is given; received "
            f"{hidden_dim} and {num_query_heads}."
        )
    layer_settings, num_layers = settings["layer_settings"], settings["num_layers"]
    if layer_settings is not None and len(layer_settings) != num_layers:
        raise ValueError(
            f"`layer_settings` must have one dict per layer, {num_layers}; received {len(layer_settings)}."
        )
    if settings["remat"] not in (False, True, "layers"):
        raise ValueError(
            f'`remat` must be False, True (steps of blocks) or "layers" (and layers within them); received '
            f"{settings['remat']!r}."
        )
    if settings["scan_layers"] and layer_settings is not None:
        raise ValueError(
            "`scan_layers=True` runs all layers as one loop, so they must be equal; received `layer_settings` too. "
            "Leave one of them out."
        )
    if num_layers == 1 and settings["fam_length"]:
        require_layer_below(settings["fam_query"], "a model of one layer")


def for_blocks(settings, dtype):
    """Settings of every layer, from arguments of a backbone: in a form that can be saved, and made a layer of again.

    Args:
        settings: a dict of all arguments.
        dtype: dtype policy of the backbone.
    """
    found = {name: settings[name] for name in BLOCK_SETTINGS}
    heads = found["num_query_heads"]
    found["num_key_value_heads"] = heads if found["num_key_value_heads"] is None else found["num_key_value_heads"]
    found["head_dim"] = settings["hidden_dim"] // heads if found["head_dim"] is None else found["head_dim"]
    found["memory_update"] = memory_updates.serialize(memory_updates.get(found["memory_update"]))
    return _saved(found, dtype)


def for_single_blocks(layer_settings, dtype):
    """`layer_settings` in a form that can be saved; see `for_blocks`."""
    return None if layer_settings is None else [_saved(settings, dtype) for settings in layer_settings]


def _saved(settings, dtype):
    if settings.get("feed_forward") is None:
        return dict(settings)
    return {**settings, "feed_forward": feed_forwards.serialize(settings["feed_forward"], dtype, "feed_forward")}


def check_equal_settings(blocks):
    """Raises ValueError if settings that the layers of a model share differ between them."""
    for i, block in enumerate(blocks):
        for name in _EQUAL_IN_ALL_LAYERS:
            if getattr(block.attention, name) != getattr(blocks[0].attention, name):
                raise ValueError(f"`{name}` must be the same in all layers; layer_settings[{i}] changes it.")
