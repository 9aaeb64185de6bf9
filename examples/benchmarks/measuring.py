"""Shared by the benchmarks: alternating timing, peak memory, child processes, the machine, JSON."""

import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
from importlib import metadata
from statistics import median
from time import perf_counter

ROOT = pathlib.Path(__file__).resolve().parents[2]


def seconds(function):
    """Seconds of one call of a function without arguments."""
    start = perf_counter()
    function()
    return perf_counter() - start


def take_turns(functions, repeats, *, warm=True, timer=seconds):
    """Times functions without arguments alternately, so that other load on the machine affects all of them.

    Args:
        functions: `{name: function}`.
        repeats: int, rounds; every second round runs in reverse order.
        warm: bool, whether each is first called once without timing.
        timer: function of a function that returns what is recorded; its seconds by default.

    Returns:
        `{name: {"median", "min", "all"}}`.
    """
    times = {name: [] for name in functions}
    if warm:
        for function in functions.values():
            function()
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(timer(functions[name]))
    return {name: {"median": median(t), "min": min(t), "all": t} for name, t in times.items()}


def peak_mib():
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_name():
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(threads=None):
    """The machine of a measurement: processor, cores, threads used, platform."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "platform": platform.platform()}


def versions(*packages):
    return {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}


def use_cores(threads):
    """Pins this process to its first `threads` cores; call it before a backend is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def run_child(module, argv, backend, threads):
    """Runs `module argv --child FILE` in a new process under `backend`; returns the JSON that it writes to FILE."""
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        subprocess.run([sys.executable, "-m", module, *argv, "--child", str(out)], env=env, check=True, cwd=ROOT)
        return json.loads(out.read_text())


def write(result, out):
    """Writes a result as JSON to the file `out`, unless that is None."""
    if out:
        pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(out).write_text(json.dumps(result, indent=1) + "\n")
