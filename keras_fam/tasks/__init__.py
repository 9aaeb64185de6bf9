"""Tasks that need a memory: synthetic data for training and evaluation, made with NumPy and the standard library.

Every task has `batch(batch_size, ...)`, which returns token ids, targets, loss weights and the positions of the
answers; `keras_fam.data.TaskBatches` turns any of them into a dataset for `fit`, `accuracy` scores the answers.
"""

from keras_fam.tasks.accuracy import PassKeyAccuracy as PassKeyAccuracy
from keras_fam.tasks.accuracy import accuracy as accuracy
from keras_fam.tasks.associative_recall import AssociativeRecall as AssociativeRecall
from keras_fam.tasks.copy import Copy as Copy
from keras_fam.tasks.documents import split_documents as split_documents
from keras_fam.tasks.passkey import PassKey as PassKey
from keras_fam.tasks.several_keys import SeveralKeys as SeveralKeys
from keras_fam.tasks.tokenizer import WordTokenizer as WordTokenizer
