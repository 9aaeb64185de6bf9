"""Runs the tests that compare numbers as other processors would compute them, and prints one table.

    python -m examples.verification.processors --backends jax torch tensorflow --out out/processors.json

Each setting narrows the vector instructions that the kernels may use, turns oneDNN off, or changes the number of
threads, so that sums come in another order. A setting that a processor lacks (AVX-512) falls back to what it has:
read the table beside the machine it names.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]

# Quick compilation, as in `make test`.
XLA = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

SETTINGS = {
    "jax": {
        "AVX2, 1 thread": {"XLA_FLAGS": f"{XLA} --xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false"},
        "AVX-512, 2 threads": {"XLA_FLAGS": f"{XLA} --xla_cpu_max_isa=AVX512", "OMP_NUM_THREADS": "2"},
        "SSE4.2, 1 thread": {"XLA_FLAGS": f"{XLA} --xla_cpu_max_isa=SSE4_2 --xla_cpu_multi_thread_eigen=false"},
        "optimized code": {"XLA_FLAGS": "", "OMP_NUM_THREADS": "2"},
    },
    "torch": {
        "AVX2, 1 thread": {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
        "AVX-512, 2 threads": {"OMP_NUM_THREADS": "2"},
        "no vectors, 1 thread": {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        },
    },
    "tensorflow": {
        "oneDNN off, 1 thread": {"TF_ENABLE_ONEDNN_OPTS": "0"},
        "oneDNN off, 2 threads": {"TF_ENABLE_ONEDNN_OPTS": "0", "OMP_NUM_THREADS": "2", "TF_NUM_INTRAOP_THREADS": "2"},
        "oneDNN AVX2, 2 threads": {
            "TF_ENABLE_ONEDNN_OPTS": "1",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "OMP_NUM_THREADS": "2",
            "TF_NUM_INTRAOP_THREADS": "2",
        },
        "oneDNN AVX-512, 1 thread": {"TF_ENABLE_ONEDNN_OPTS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    },
}

# What trains, streams, or is compared with the NumPy loop; the others look at files, errors and documentation.
TESTS = [
    *(
        "attention",
        "compiled",
        "contracts",
        "copies",
        "data",
        "distribution",
        "evaluation",
        "generation",
        "hub",
        "layers",
    ),
    *("memory_options", "model", "oracle", "progress", "properties", "quantized", "samplers", "sessions", "stateful"),
    *("stateful_training", "steps", "systems", "tasks", "texts", "threads", "torch_graph", "training"),
]


def run(backend, settings, tests):
    """`(counts, names of failed tests, seconds)` of one pytest run under some environment variables."""
    environment = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **settings, "KERAS_BACKEND": backend}
    files = [f"tests/test_{name}.py" for name in tests]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *files],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    failed = [line.split(" - ")[0].split(" ", 1)[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1] if lines else "")
    }
    if done.returncode not in (0, 1) or "passed" not in counts:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    if failed:
        print(done.stdout[-6000:], flush=True)
    return counts, failed, round(time.perf_counter() - began)


def processor():
    """The processor's name, where the system tells it."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="BACKEND")
    parser.add_argument("--settings", nargs="+", help="only these, by name")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="test files, without test_ and .py")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file, written after every run; merged if it exists")
    args = parser.parse_args(argv)
    record = {"runs": {}}
    if args.out and args.out.exists():
        record = json.loads(args.out.read_text())
    record |= {"processor": processor(), "tests": args.tests}
    print("| backend | setting | passed | skipped | failed | s |\n| --- | --- | --- | --- | --- | --- |")
    failures = 0
    for backend in args.backends:
        for name, environment in SETTINGS[backend].items():
            if args.settings and name not in args.settings:
                continue
            counts, failed, seconds = run(backend, environment, args.tests)
            failures += len(failed)
            record["runs"][f"{backend}, {name}"] = {
                "environment": environment, **counts, "failed_tests": failed, "seconds": seconds
            }  # fmt: skip
            cells = (backend, name, counts["passed"], counts.get("skipped", 0), len(failed), seconds)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
