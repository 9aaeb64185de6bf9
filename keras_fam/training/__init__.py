"""Callbacks, schedules and distillation for training on long documents."""

from keras_fam.training.curriculum import Curriculum as Curriculum
from keras_fam.training.dataset_position import DatasetPosition as DatasetPosition
from keras_fam.training.distillation import ForwardKL as ForwardKL
from keras_fam.training.distillation import forward_kl as forward_kl
from keras_fam.training.distillation import full_attention as full_attention
from keras_fam.training.distillation import top_probabilities as top_probabilities
from keras_fam.training.noise import NoiseRamp as NoiseRamp
from keras_fam.training.noise import NoiseScale as NoiseScale
from keras_fam.training.progress import SaveProgress as SaveProgress
from keras_fam.training.schedules import Ramp as Ramp
