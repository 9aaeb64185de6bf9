"""Tasks and text for training and evaluation. NumPy and the standard library only."""

from keras_fam.data.passkey import PassKey as PassKey
from keras_fam.data.passkey import PassKeyAccuracy as PassKeyAccuracy
from keras_fam.data.passkey import accuracy as accuracy
from keras_fam.data.prose import WordTokenizer as WordTokenizer
from keras_fam.data.prose import split as split
from keras_fam.data.prose import topics_text as topics_text
