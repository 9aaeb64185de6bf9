"""Starts the processes of one training on this machine, and ends them if one fails or takes too long."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

# Compiling takes longer than running here: XLA leaves out what makes long runs fast.
QUICK_TO_COMPILE = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
ROOT = pathlib.Path(__file__).parents[2]


def free_ports(count):
    """Ports of localhost that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for found in sockets:
            found.bind(("localhost", 0))
        return [found.getsockname()[1] for found in sockets]
    finally:
        for found in sockets:
            found.close()


def start(module, processes, options, folder, timeout=300):
    """Runs `module` in so many processes of one training.

    Each gets the options `--addresses`, `--process`, `--folder` and those in `options`; process 0 writes
    `result.json` into the folder.

    Args:
        module: str, a module of `examples.distributed`.
        processes: int.
        options: list of str.
        folder: `pathlib.Path`, for logs and results.
        timeout: seconds, after which all of them are killed.

    Returns:
        What process 0 wrote.

    Raises:
        RuntimeError: if one fails or time is over, with the end of its log. No process is left then.
    """
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    addresses = ",".join(f"localhost:{port}" for port in free_ports(processes))
    command = [sys.executable, "-m", f"examples.distributed.{module}", "--addresses", addresses]
    command += ["--folder", str(folder), *options]
    started, logs = [], []
    try:
        for i in range(processes):
            log = (folder / f"process_{i}.log").open("w+")
            logs.append(log)
            started.append(
                subprocess.Popen([*command, "--process", str(i)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            )
        _wait(started, time.monotonic() + timeout)
        codes = [process.poll() for process in started]
        if any(code != 0 for code in codes):
            failed = next((i for i, code in enumerate(codes) if code not in (0, None)), 0)
            raise RuntimeError(f"{module}: exit codes {codes} (None: out of time).\n{_tail(logs[failed])}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for log in logs:
            log.close()
    return json.loads(result.read_text())


def _wait(processes, deadline):
    """Until all have ended, one has failed, or the deadline has come."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(code not in (0, None) for code in codes):
            return
        time.sleep(0.05)


def _tail(log):
    log.flush()
    return pathlib.Path(log.name).read_text()[-3000:]


def environment(backend, folder, devices=1):
    """Sets what an engine reads when it is imported; for JAX, so many simulated devices of the CPU, unless 0."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if backend != "tensorflow":
        sys.modules.setdefault("tensorflow", None)  # `keras.utils.set_random_seed` imports it otherwise, for seconds
    if backend == "jax" and devices:
        flags = [f"--xla_force_host_platform_device_count={devices}", *QUICK_TO_COMPILE]
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Each phase makes a model of its own, whose programs are those of the one before.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
