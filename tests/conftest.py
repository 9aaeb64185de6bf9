import contextlib
import ctypes
import gc
import os
import tempfile

import keras
import pytest

gc.set_threshold(100_000)  # compilers make millions of short-lived objects; looking through them takes up to a tenth

# `make test` runs three workers, and there may be two cores: the one that compiles takes longest and goes first.
if "PYTEST_XDIST_WORKER" in os.environ and keras.backend.backend() != "jax" and hasattr(os, "nice"):
    os.nice(5)


# With one core TensorFlow has one thread for calls, and a call that takes long blocks all others.
if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")


@pytest.fixture(scope="session", autouse=True)
def share_programs():
    """JAX compiles a program once per run: tests, and the processes that they start, find it in one folder."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in (("compilation_cache_dir", folder), ("persistent_cache_min_compile_time_secs", 0.0)):
            jax.config.update(f"jax_{name}", value)
            patch.setenv(f"JAX_{name.upper()}", str(value))  # of processes
        yield


@pytest.fixture(scope="module", autouse=True)
def free_memory():
    """Compiled programs go with their module, and what stays is left out of later collections.

    Keras collects garbage at every variable that `quantize` removes: among everything that three frameworks import,
    that takes most of a second each time.
    """
    yield
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    elif keras.backend.backend() == "tensorflow":
        from tensorflow.python.framework import ops as tf_ops

        registry = tf_ops.gradient_registry._registry  # keeps every graph that has a custom gradient
        for name in [name for name in registry if name.startswith("CustomGradient-")]:
            registry.pop(name)
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def pytest_report_header():
    return f"backend: {keras.backend.backend()}, keras {keras.__version__}"
