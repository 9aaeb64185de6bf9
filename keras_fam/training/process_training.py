"""`ProcessTraining`: Keras' `fit` in several processes, where Keras itself lacks something for it."""

import keras
from keras import ops

from keras_fam.ops.processes import agree, first_batch, has_many_workers, mean_of_gradients, mean_of_metrics


class ProcessTraining:
    """A mixin for Keras models whose `fit` runs in several processes that each have rows of their own.

    PyTorch, with an initialized process group: all processes start from the weights of process 0, gradients are
    averaged before the optimizer applies them, and metrics are means over all processes. TensorFlow, in the scope of a
    `MultiWorkerMirroredStrategy`, averages gradients itself, but Keras 3.15 fails before the first step (it reduces a
    whole batch at once) and after it (it reduces metrics, which have no axis, along axis 0). JAX needs nothing.
    """

    def own_variables(self):
        """Variables that belong to the rows of this process, and need not be equal in all of them."""
        return []

    def make_train_function(self, force=False):
        first = self.train_function is None or force
        super().make_train_function(force)
        if first:
            own = {id(v) for v in self.own_variables()}
            agree([v for v in (*self.variables, *self.optimizer.variables) if id(v) not in own])

    def train_step(self, *args):
        with mean_of_gradients(self.optimizer):
            return self._with_axis(super().train_step(*args))

    def test_step(self, *args):
        return self._with_axis(super().test_step(*args))

    def get_metrics_result(self):
        return mean_of_metrics(super().get_metrics_result())

    def _with_axis(self, logs):
        """Several workers of TensorFlow: metrics `[1]`, which Keras can reduce along axis 0."""
        if not has_many_workers(self):
            return logs
        return keras.tree.map_structure(lambda x: ops.reshape(x, (1,)), logs)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """TensorFlow's: makes metrics and the like before the first step."""
        if iterator is not None and has_many_workers(self):
            iterator, data_batch = None, first_batch(iterator, self)
        super()._maybe_symbolic_build(iterator, data_batch)
