"""TransformerFAM for Keras 3: feedback attention as working memory (arXiv 2404.09173), on three backends."""

from keras_fam import baselines, data, hub, serve, tasks, training
from keras_fam.distribution.layout_map import layout_map
from keras_fam.evaluation import MemoryMonitor, StreamScorer, ablate_memory, evaluate, memory_statistics
from keras_fam.export import export_serving, export_step
from keras_fam.layers.feedback_attention import FeedbackAttention
from keras_fam.layers.memory_update import Average, HardGate, MemoryUpdate, Normalized, Residual
from keras_fam.layers.mixture_of_experts import MixtureOfExperts
from keras_fam.layers.random_state_passing import RandomStatePassing
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.models.configs import model_config
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM
from keras_fam.state import LayerState, StreamPosition, StreamState
from keras_fam.streaming import samplers
from keras_fam.streaming.streaming_model import StreamingModel
from keras_fam.testing import check_streaming

__version__ = "0.1.0"
__all__ = [
    "Average",
    "FeedbackAttention",
    "HardGate",
    "LayerState",
    "MemoryMonitor",
    "MemoryUpdate",
    "MixtureOfExperts",
    "Normalized",
    "RandomStatePassing",
    "Residual",
    "StreamPosition",
    "StreamScorer",
    "StreamState",
    "StreamingModel",
    "TransformerFAMBackbone",
    "TransformerFAMBlock",
    "TransformerFAMCausalLM",
    "ablate_memory",
    "baselines",
    "check_streaming",
    "data",
    "evaluate",
    "export_serving",
    "export_step",
    "hub",
    "layout_map",
    "memory_statistics",
    "model_config",
    "samplers",
    "serve",
    "tasks",
    "training",
]
