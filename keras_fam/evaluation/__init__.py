"""Evaluation that cannot fool us, and what a memory looks like from outside."""

from keras_fam.evaluation.ablation import ABLATIONS, ablate_memory
from keras_fam.evaluation.evaluator import evaluate, summary
from keras_fam.evaluation.memory_monitor import MemoryMonitor, memory_statistics
from keras_fam.evaluation.ragged_reader import RaggedReader
from keras_fam.evaluation.scorer import StreamScorer
from keras_fam.evaluation.text_scorer import TextScorer

__all__ = [
    "ABLATIONS",
    "MemoryMonitor",
    "RaggedReader",
    "StreamScorer",
    "TextScorer",
    "ablate_memory",
    "evaluate",
    "memory_statistics",
    "summary",
]
