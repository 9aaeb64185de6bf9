"""Other systems that the paper compares with: subclasses that import the core, never the reverse."""

from keras_fam.baselines.feedback_memory import FeedbackMemoryBackbone as FeedbackMemoryBackbone
from keras_fam.baselines.feedback_memory import FeedbackMemoryBlock as FeedbackMemoryBlock
from keras_fam.baselines.rmt import RMTBackbone as RMTBackbone
from keras_fam.baselines.summary_tokens import SummaryFAMBackbone as SummaryFAMBackbone
from keras_fam.baselines.summary_tokens import SummaryFAMBlock as SummaryFAMBlock
