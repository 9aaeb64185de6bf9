"""Datasets for training: long documents as contiguous rows, packed examples, batches of a task."""

from keras_fam.data.document_rows import Document as Document
from keras_fam.data.document_rows import DocumentRows as DocumentRows
from keras_fam.data.long_context import long_context_weights as long_context_weights
from keras_fam.data.packing import example as example
from keras_fam.data.packing import pack as pack
from keras_fam.data.packing import repeat_segment as repeat_segment
from keras_fam.data.resumable import ResumableDataset as ResumableDataset
from keras_fam.data.task_batches import TaskBatches as TaskBatches
from keras_fam.data.task_documents import TaskDocuments as TaskDocuments
