"""Tasks and text for training and evaluation. NumPy and the standard library only, and Keras for the datasets."""

from keras_fam.data.document_rows import Document as Document
from keras_fam.data.document_rows import DocumentRows as DocumentRows
from keras_fam.data.packing import example as example
from keras_fam.data.packing import pack as pack
from keras_fam.data.packing import repeat_segment as repeat_segment
from keras_fam.data.passkey import PassKey as PassKey
from keras_fam.data.passkey import PassKeyAccuracy as PassKeyAccuracy
from keras_fam.data.passkey import accuracy as accuracy
from keras_fam.data.prose import WordTokenizer as WordTokenizer
from keras_fam.data.prose import split as split
from keras_fam.data.prose import topics_text as topics_text
from keras_fam.data.recall import SeveralKeys as SeveralKeys
from keras_fam.data.resumable import ResumableDataset as ResumableDataset
from keras_fam.data.symbols import AssociativeRecall as AssociativeRecall
from keras_fam.data.symbols import Copy as Copy
from keras_fam.data.task_batches import TaskBatches as TaskBatches
