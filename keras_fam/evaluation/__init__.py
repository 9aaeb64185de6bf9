"""Evaluation that cannot fool us, and what a memory looks like from outside."""

from keras_fam.evaluation.knock_outs import KNOCK_OUTS, knock_out
from keras_fam.evaluation.memory import MemoryMonitor, memory_statistics
from keras_fam.evaluation.report import evaluate, summary
from keras_fam.evaluation.scorer import StreamScorer

__all__ = ["KNOCK_OUTS", "MemoryMonitor", "StreamScorer", "evaluate", "knock_out", "memory_statistics", "summary"]
