"""Export: a SavedModel for TF Serving, or one step of a stream as an ONNX, LiteRT or torch file."""

from keras_fam.export.saved_model.export_serving import export_serving as export_serving
from keras_fam.export.step.stream_step import export_step as export_step
