"""Tasks that need a memory: synthetic data for training and evaluation, made with NumPy and the standard library.

Every task has `batch(batch_size, ...)`, which returns token ids, targets, loss weights and the positions of the
answers; `keras_fam.data.TaskBatches` turns any of them into a dataset for `fit`, `accuracy` scores the answers.
"""

from keras_fam.tasks.accuracy import PassKeyAccuracy as PassKeyAccuracy
from keras_fam.tasks.accuracy import accuracy as accuracy
from keras_fam.tasks.associative_recall import AssociativeRecall as AssociativeRecall
from keras_fam.tasks.copy import Copy as Copy
from keras_fam.tasks.documents import split_documents as split_documents
from keras_fam.tasks.facts import Exercise as Exercise
from keras_fam.tasks.facts import Facts as Facts
from keras_fam.tasks.facts import KeyValue as KeyValue
from keras_fam.tasks.facts import Needle as Needle
from keras_fam.tasks.facts import Question as Question
from keras_fam.tasks.layout import Answer as Answer
from keras_fam.tasks.layout import TaskText as TaskText
from keras_fam.tasks.passkey import PassKey as PassKey
from keras_fam.tasks.prose import Prose as Prose
from keras_fam.tasks.prose import encoder as encoder
from keras_fam.tasks.prose_task import ProseTask as ProseTask
from keras_fam.tasks.prose_task import standard_mixture as standard_mixture
from keras_fam.tasks.segments import Book as Book
from keras_fam.tasks.segments import RepeatedSegment as RepeatedSegment
from keras_fam.tasks.several_keys import SeveralKeys as SeveralKeys
from keras_fam.tasks.tokenizer import WordTokenizer as WordTokenizer
from keras_fam.tasks.who_is_where import WhoIsWhere as WhoIsWhere
