"""FSDP of PyTorch for Keras models: each process keeps a part of every weight, of its gradient and of its moments."""

import contextlib
import functools

import keras

from keras_fam.ops.backend import refresh_torch_parameters


def fully_shard(model, forward=None, **options):
    """Divides the trainable weights of a Keras model over the processes of a torch training (FSDP2, ZeRO).

    ```python
    torch.distributed.init_process_group()
    lm.build()                                                # every process, with the same weights
    sharded = keras_fam.distribution.fully_shard(lm)
    optimizer = torch.optim.AdamW(sharded.parameters(), 1e-3)
    loss = loss_of(sharded(token_ids, training=True), targets)    # the mean over this process's rows
    loss.backward()
    optimizer.step()
    with sharded.whole_weights() as lm:                       # all processes
        if torch.distributed.get_rank() == 0:
            lm.save_weights("lm.weights.h5")
    ```

    torch's own `fully_shard(model)` has no effect on what a Keras model computes: Keras layers read variables, and keep
    the tensors that these had when they were made. Here the variables follow the tensors that FSDP swaps. All weights
    are gathered when the module is called and let go after the backward pass; in between each process holds a part of
    the weights, gradients and moments. Weights that are not trained lie whole in every process.

    Between calls the model cannot be used outside of `whole_weights`, and its weights are loaded before it is sharded.
    It is trained with an optimizer of torch in a loop of your own: Keras' `fit` and optimizers make variables of their
    own shapes.

    Args:
        model: a built Keras model, with the same weights in all processes.
        forward: the function that a call of the module runs: None (the model itself) or, for example, `lm.advance`, to
            train on carried state.
        **options: of `torch.distributed.fsdp.fully_shard`, such as `mesh`, `mp_policy` and `reshard_after_forward`.

    Returns:
        A `torch.nn.Module` with the parts as `parameters()`, and `whole_weights()`.

    Raises:
        ValueError: under another backend, for a model that is not built, and without a process group.
    """
    backend = keras.backend.backend()
    if backend != "torch":
        raise ValueError(
            f"FSDP belongs to torch; the backend is {backend}. On JAX, `keras_fam.layout_map` divides weights with "
            "`keras.distribution.ModelParallel`."
        )
    import torch
    from torch.distributed import fsdp

    if not torch.distributed.is_initialized():
        raise ValueError(
            "Weights are divided over a process group; received none. Call torch.distributed.init_process_group, or "
            "start with torchrun."
        )
    if not model.built:
        raise ValueError(f"A model is sharded with its weights; {model.name} has none yet. Call `build` first.")
    module = _module_class()(model, model if forward is None else forward)
    fsdp.fully_shard(module, **options)
    module.follow()
    refresh_torch_parameters(model)  # the whole weights, which it lists, would stay in memory
    return module


@functools.cache
def _module_class():
    import torch

    class FullySharded(torch.nn.Module):
        """A Keras model whose trainable weights lie in parts in the processes of a group; see `fully_shard`."""

        def __init__(self, model, function):
            super().__init__()
            self.parts = torch.nn.ParameterList([variable.value for variable in model.trainable_variables])
            # Past torch's tracking: the module's parameters are the parts alone.
            vars(self).update(model=model, function=function, variables=list(model.trainable_variables))

        def forward(self, *args, **kwargs):
            self.follow()  # before this, FSDP has put gathered weights in the place of the parts
            return self.function(*args, **kwargs)

        def follow(self):
            """Lets the model's variables have the tensors that FSDP has in place now."""
            for variable, part in zip(self.variables, self.parts, strict=True):
                variable._value = part

        @contextlib.contextmanager
        def whole_weights(self):
            """Within it, the model has its whole weights, to be saved or called; all processes enter it together.

            What is assigned to them there is lost.
            """
            for variable, part in zip(self.variables, self.parts, strict=True):
                whole = part.full_tensor() if hasattr(part, "full_tensor") else part
                variable._value = torch.nn.Parameter(whole.detach(), requires_grad=False)
            try:
                yield self.model
            finally:
                self.follow()

    return FullySharded
