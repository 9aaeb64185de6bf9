"""Examples, run as modules from the root of the repository: `KERAS_BACKEND=jax python -m examples.recall`.

README.md in this folder lists them. The backend is Keras' environment variable KERAS_BACKEND, and JAX without it.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages of TensorFlow and XLA
