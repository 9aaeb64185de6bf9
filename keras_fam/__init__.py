"""TransformerFAM for Keras 3: feedback attention as working memory (arXiv 2404.09173), on three backends."""

from keras_fam import data, hub, training
from keras_fam.checks import check_streaming
from keras_fam.evaluation import MemoryMonitor, StreamScorer, evaluate, knock_out, memory_statistics
from keras_fam.export import export_serving
from keras_fam.layers.attention import FeedbackAttention
from keras_fam.layers.block import TransformerFAMBlock
from keras_fam.layers.random_state_passing import Ramp, RandomStatePassing
from keras_fam.models.backbone import TransformerFAMBackbone
from keras_fam.models.causal_lm import TransformerFAMCausalLM
from keras_fam.models.layout import layout_map
from keras_fam.models.presets import preset
from keras_fam.noise import NoiseRamp, NoiseScale
from keras_fam.state import Cursor, LayerState, StreamState
from keras_fam.streaming import StreamingModel

__version__ = "0.1.0"
__all__ = [
    "Cursor",
    "FeedbackAttention",
    "LayerState",
    "MemoryMonitor",
    "NoiseRamp",
    "NoiseScale",
    "Ramp",
    "RandomStatePassing",
    "StreamScorer",
    "StreamState",
    "StreamingModel",
    "TransformerFAMBackbone",
    "TransformerFAMBlock",
    "TransformerFAMCausalLM",
    "check_streaming",
    "data",
    "evaluate",
    "export_serving",
    "hub",
    "knock_out",
    "layout_map",
    "memory_statistics",
    "preset",
    "training",
]
