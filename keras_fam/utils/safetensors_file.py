"""The file of a session: safetensors with a digest over every byte, replaced in one step. Knows arrays, no models."""

import hashlib
import json
import os
import re
import stat

import numpy as np

from keras_fam.utils.atomic import replace_file

FORMAT = "keras_fam.session"
FORMAT_VERSION = 1
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
# The digest is hashed as zeros. Quotes inside JSON strings are escaped, so nothing else in a header looks like this.
_DIGEST = re.compile(rb'"digest":"([^"\\]{64})"')
_ZEROS = b"0" * 64
_BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def encode(arrays, fields, name="a session"):
    """The bytes of a session file, as three pieces that follow one another.

    Args:
        arrays: dict of names to NumPy arrays of the dtypes in `DTYPES`.
        fields: dict of str to str, kept in the header beside format, versions and digest.
        name: what errors call it.

    Raises:
        ImportError: without the safetensors package.
    """
    own = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "keras_fam_version": _package_version(),
        "digest": _ZEROS.decode(),
    }
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    data = _safetensors().numpy.save(arrays, {**fields, **own})
    place = _digest_place(data, name)
    view = memoryview(data)
    return view[: place.start(1)], _digest(data, place), view[place.end(1) :]


def decode(data, name):
    """`(fields, arrays)` of the bytes of a session file.

    Args:
        data: bytes.
        name: what errors call it.

    Raises:
        ValueError: for bytes that are truncated, changed, no session, or of another version of the format.
        ImportError: without the safetensors package.
    """
    safetensors = _safetensors()
    place = _digest_place(data, name)
    if _digest(data, place) != place.group(1):
        raise ValueError(
            f"A session file is as it was written; the bytes of {name} do not give its digest, so it was damaged or "
            "changed. Restore a copy, or reset the streams."
        )
    fields, _ = decode_header(data, name)
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"A session is a safetensors file; {name} is not ({error}). Restore a copy.") from error
    return fields, {key: _array(tensor, key, name) for key, tensor in tensors}


def write(path, arrays, fields):
    """Puts a session file in the place of `path`.

    Args:
        path: str or path; its folder exists.
        arrays, fields: see `encode`.

    Raises:
        OSError: if it cannot be written; an existing file is left unchanged.
        ImportError: without the safetensors package.
    """
    pieces = encode(arrays, fields, path)
    with replace_file(path) as file:
        for piece in pieces:
            file.write(piece)


def read(path):
    """Reads a session file.

    Returns:
        `(fields, arrays)`, as given to `write`.

    Raises:
        ValueError: for a file that is truncated, changed, no session, or of another version of the format.
        FileNotFoundError: without a file.
        ImportError: without the safetensors package.
    """
    _safetensors()
    with _open(path) as file:
        data = file.read()
    return decode(data, path)


def read_header(path):
    """Reads the header alone; the digest is not checked.

    Returns:
        `(fields, tensors)`: the str fields, and a dict of names to `(dtype, shape)`.

    Raises:
        ValueError: for a file without a whole header, no session, or of another version of the format.
        FileNotFoundError: without a file.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(_header_size(file.read(8), size, path))
    return _parse(header, path)


def decode_header(data, name):
    """`read_header` of the bytes of a file, or of as many as its header has."""
    return _parse(data[8 : 8 + _header_size(data, len(data), name)], name)


def _safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("Sessions on disk need safetensors: pip install 'keras-fam[sessions]'.") from error
    return safetensors


def _package_version():
    from keras_fam import __version__

    return __version__


# Bytes ----------------------------------------------------------------------------------------------------------


def _open(path):
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"A session is a file; {path} is a folder or a device. Name the file.")
    return open(path, "rb")


def _header_size(start, size, path):
    """Length of the header of a file of `size` bytes, told by its first 8."""
    header = int.from_bytes(start[:8], "little")
    if size < 8 or header > min(size - 8, _LARGEST_HEADER):
        raise ValueError(
            f"A session file holds its whole header; {path} has {size} bytes and ends before, or is no safetensors "
            "file. Restore a copy."
        )
    return header


def _digest_place(data, path):
    found = list(_DIGEST.finditer(data, 8, 8 + _header_size(data, len(data), path)))
    if len(found) != 1:
        raise ValueError(
            f"A session file has one digest in its header; {path} has {len(found)}. It is damaged, or no session of "
            "keras_fam: name a file that `save_state` wrote."
        )
    return found[0]


def _digest(data, place):
    view = memoryview(data)
    digest = hashlib.blake2b(digest_size=32)
    for piece in (view[: place.start(1)], _ZEROS, view[place.end(1) :]):
        digest.update(piece)
    return digest.hexdigest().encode()


def _parse(header, path):
    """`(fields, tensors)` of a header in bytes."""
    try:
        tensors = json.loads(header)
        fields = {str(name): str(value) for name, value in tensors.pop("__metadata__").items()}
        version, written_by = int(fields["format_version"]), fields["keras_fam_version"]
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        tensors = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in tensors.items()}
    except _BAD_JSON as error:
        raise ValueError(
            f"The header of a session says so, as safetensors does; that of {path} does not ({error!r:.100}). Name a "
            "file that `save_state` wrote."
        ) from error
    if version != FORMAT_VERSION:
        newer = version > FORMAT_VERSION
        raise ValueError(
            f"keras_fam {_package_version()} reads version {FORMAT_VERSION} of the session format; {path} has the "
            f"{'newer' if newer else 'unknown'} version {version}, written by keras_fam {written_by:.20}. "
            f"{'Upgrade keras_fam.' if newer else 'Restore a copy.'}"
        )
    return fields, tensors


def _array(tensor, name, path):
    dtype = DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise ValueError(f"Tensors of a session are {', '.join(DTYPES)}; {name} in {path} is {tensor['dtype']}.")
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    if dtype == "bool":
        return (np.frombuffer(tensor["data"], "uint8") != 0).reshape(tensor["shape"])
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
