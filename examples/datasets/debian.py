"""Texts in Debian packages: downloaded and unpacked, never installed."""

import pathlib
import shutil
import subprocess
import tempfile


def unpack(packages, folder):
    """Downloads Debian packages with `apt-get download` and unpacks them into a folder.

    Args:
        packages: list of str, names.
        folder: a path; it is created.

    Raises:
        RuntimeError: if a package cannot be downloaded; the message says how to get it manually.
    """
    names, folder = " ".join(packages), pathlib.Path(folder)
    hint = f"Get the Debian package {names}, for example with `apt-get install {names}`, and try again."
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise RuntimeError(f"This text comes from a Debian package, and this system has no apt-get. {hint}")
    with tempfile.TemporaryDirectory() as place:
        for attempt in range(2):
            done = subprocess.run(["apt-get", "download", "-qq", *packages], cwd=place, capture_output=True, text=True)
            found = sorted(pathlib.Path(place).glob("*.deb"))
            if len(found) == len(packages) or attempt:
                break
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True)  # a fresh system has no package lists
        if len(found) < len(packages):
            raise RuntimeError(f"`apt-get download {names}` failed: {done.stderr.strip()[-300:]} {hint}")
        folder.mkdir(parents=True, exist_ok=True)
        for package in found:
            subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
