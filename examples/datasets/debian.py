"""Texts that Debian packages ship: fetched and unpacked, never installed."""

import pathlib
import shutil
import subprocess
import tempfile


def unpack(packages, folder):
    """Downloads Debian packages with `apt-get download` and unpacks them into a folder.

    Args:
        packages: names.
        folder: a path; it is made.

    Raises:
        RuntimeError: where a package cannot be fetched; the message says how to get it by hand.
    """
    names, folder = " ".join(packages), pathlib.Path(folder)
    hint = f"Get the Debian package {names}, for example with `apt-get install {names}`, and try again."
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise RuntimeError(f"This text comes from a Debian package, and there is no apt-get here. {hint}")
    with tempfile.TemporaryDirectory() as place:
        for attempt in range(2):
            done = subprocess.run(["apt-get", "download", "-qq", *packages], cwd=place, capture_output=True, text=True)
            found = sorted(pathlib.Path(place).glob("*.deb"))
            if len(found) == len(packages) or attempt:
                break
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True)  # a fresh machine has no lists
        if len(found) < len(packages):
            raise RuntimeError(f"`apt-get download {names}` failed: {done.stderr.strip()[-300:]} {hint}")
        folder.mkdir(parents=True, exist_ok=True)
        for package in found:
            subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
