"""TransformerFAM for Keras 3: feedback attention as working memory (arXiv 2404.09173), on three backends."""

from keras_fam import hub
from keras_fam.checks import check_streaming
from keras_fam.export import export_serving
from keras_fam.layers.attention import FeedbackAttention
from keras_fam.layers.block import TransformerFAMBlock
from keras_fam.layers.random_state_passing import RandomStatePassing
from keras_fam.models.backbone import TransformerFAMBackbone
from keras_fam.models.causal_lm import TransformerFAMCausalLM
from keras_fam.models.presets import preset
from keras_fam.noise import NoiseRamp
from keras_fam.state import Cursor, LayerState, StreamState
from keras_fam.streaming import StreamingModel

__version__ = "0.1.0"
__all__ = [
    "Cursor",
    "FeedbackAttention",
    "LayerState",
    "NoiseRamp",
    "RandomStatePassing",
    "StreamState",
    "StreamingModel",
    "TransformerFAMBackbone",
    "TransformerFAMBlock",
    "TransformerFAMCausalLM",
    "check_streaming",
    "export_serving",
    "hub",
    "preset",
]
