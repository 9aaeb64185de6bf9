"""Callbacks and schedules for training on long documents."""

from keras_fam.training.curriculum import Curriculum as Curriculum
from keras_fam.training.dataset_position import DatasetPosition as DatasetPosition
from keras_fam.training.noise import NoiseRamp as NoiseRamp
from keras_fam.training.noise import NoiseScale as NoiseScale
from keras_fam.training.progress import SaveProgress as SaveProgress
from keras_fam.training.schedules import Ramp as Ramp
