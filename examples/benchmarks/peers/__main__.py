"""keras_fam against other packages for long texts: prefill and decoding per token, in one process, alternately.

    make peers          # sets up .venv-peers, then runs this script
    python -m examples.benchmarks.peers --tokens 4096 --new 32 --out out/peers.json

All on torch, float32, with the same threads, width, depth, heads, feed-forward width (gated where the package has it)
and vocabulary, random weights, one row. The window is that of keras_fam: blocks of S tokens and m segments show a token
(m+1)·S keys at most, so a sliding window has (m+1)·S keys, and packages with segments and a memory of one segment have
segments of S. Each system reads `--tokens` tokens in its own way, and then decodes greedily, token by token, with its
own cache; packages that only sample do so. The systems:

keras_fam, keras_fam JAX: `StreamingModel.predict` and `generate`; under JAX (a second process) compiled.
KerasHub Llama: full attention, its cache filled at once, then `generate`.
Mistral, RecurrentGemma (Hugging Face): sliding window (RecurrentGemma: in every third layer; the others are recurrent),
    prefill in chunks of the window (RecurrentGemma: at once; its recurrence restarts with each chunk).
x-transformers: segments with the memory of one segment (Transformer-XL), keys cached inside a segment.
titans: memory as context, a neural memory in every layer, which is trained during reading; cached sampling.
rmt: recurrent-memory-transformer-pytorch, F memory tokens, memory of one segment; it has no cache inside a segment, so
    decoding is measured from the middle of one.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from examples.benchmarks import measuring


class Peer:
    """A system: its number of parameters, and the functions `read()` and `go_on()`, which prefill and decode.

    `go_on` starts from the state that the last `read` or, where a system keeps it, `go_on` left.
    """

    def __init__(self, parameters, read, go_on):
        self.parameters, self.read, self.go_on = parameters, read, go_on


def count(module):
    return sum(p.numel() for p in module.parameters())


def fam(args, ids):
    import keras

    import keras_fam

    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        args.vocabulary,
        args.layers,
        args.width,
        args.heads,
        args.intermediate,
        block_size=args.block_size,
        memory_segments=args.memory_segments,
        fam_length=args.fam_length,
        memory_update="normalized",
    )
    stream = keras_fam.StreamingModel(keras_fam.TransformerFAMCausalLM(backbone), batch_size=1)

    def read():
        stream.reset_state()
        stream.predict(ids)

    return Peer(backbone.count_params(), read, lambda: stream.generate(max_new_tokens=args.new))


def hub_llama(args, ids):
    import keras_hub
    from keras import ops

    from keras_fam.ops.backend import compiled

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=args.vocabulary,
        num_layers=args.layers,
        num_query_heads=args.heads,
        num_key_value_heads=args.heads,
        hidden_dim=args.width,
        intermediate_dim=args.intermediate,
        tie_word_embeddings=True,
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")
    size = args.tokens + args.new
    inputs = {
        "token_ids": np.pad(ids, [(0, 0), (0, args.new)]).astype("int32"),
        "padding_mask": np.broadcast_to(np.arange(size) < args.tokens, (1, size)).astype("int32"),
    }
    fill = compiled(model._build_cache, lambda: model.variables)
    held, whole = {}, ops.convert_to_tensor(inputs["token_ids"])

    def read():
        held["cache"] = fill(whole)
        ops.convert_to_numpy(held["cache"][0][0, -1])

    model._build_cache = lambda token_ids: tuple(x * 1.0 for x in held["cache"])  # only decoding is timed
    return Peer(backbone.count_params(), read, lambda: model.generate(inputs, stop_token_ids=None))


def hugging_face(model, args, ids, chunk):
    import torch
    from transformers import DynamicCache

    ids, held = torch.tensor(ids), {}

    def read():
        held["cache"] = DynamicCache(config=model.config)  # updated in place
        for first in range(0, args.tokens, chunk):
            piece = ids[:, first : first + chunk]
            out = model(piece, past_key_values=held["cache"], use_cache=True, logits_to_keep=1)
        held["next"] = out.logits[:, -1:].argmax(-1)

    def go_on():
        for _ in range(args.new):
            out = model(held["next"], past_key_values=held["cache"], use_cache=True)
            held["next"] = out.logits[:, -1:].argmax(-1)

    return Peer(count(model), torch.no_grad()(read), torch.no_grad()(go_on))


def hugging_face_sizes(args):
    return {
        "vocab_size": args.vocabulary,
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def mistral(args, ids):
    import transformers

    config = transformers.MistralConfig(
        **hugging_face_sizes(args),
        intermediate_size=args.intermediate,
        sliding_window=args.window,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return hugging_face(transformers.MistralForCausalLM(config).eval(), args, ids, args.window)


def recurrent_gemma(args, ids):
    import transformers

    config = transformers.RecurrentGemmaConfig(
        **hugging_face_sizes(args), intermediate_size=2 * args.intermediate, attention_window_size=args.window
    )
    return hugging_face(transformers.RecurrentGemmaForCausalLM(config).eval(), args, ids, args.tokens)


def x_transformers(args, ids):
    import torch
    from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper

    S = args.block_size
    net = TransformerWrapper(
        num_tokens=args.vocabulary,
        max_seq_len=S,
        max_mem_len=args.memory_segments * S,
        use_abs_pos_emb=False,
        tie_embedding=True,
        attn_layers=Decoder(
            dim=args.width,
            depth=args.layers,
            heads=args.heads,
            attn_dim_head=args.width // args.heads,
            attn_flash=True,
            rotary_pos_emb=True,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=args.intermediate / args.width,
        ),
    ).eval()
    model, ids, held = XLAutoregressiveWrapper(net).eval(), torch.tensor(ids), {}

    def read():
        mems = None
        for segment in ids.split(S, dim=1):
            logits, mems = net(segment, mems=mems, return_mems=True)
        held["mems"], held["next"] = mems, logits[:, -1:].argmax(-1)

    def go_on():
        model.generate(held["next"], args.new, temperature=0.0, mems=held["mems"])

    return Peer(count(net), torch.no_grad()(read), torch.no_grad()(go_on))


def titans(args, ids):
    import torch
    from titans_pytorch import MemoryAsContextTransformer

    net = MemoryAsContextTransformer(
        num_tokens=args.vocabulary,
        dim=args.width,
        depth=args.layers,
        segment_len=args.block_size,
        num_longterm_mem_tokens=args.fam_length,
        num_persist_mem_tokens=4,
        dim_head=args.width // args.heads,
        heads=args.heads,
        ff_mult=args.intermediate / args.width,
    ).eval()
    ids, held = torch.tensor(ids), {}

    def step(out, cache):
        return net(out, disable_flex_attn=True, cache=cache, return_cache=True, factorized_pos_emb=held["places"])

    def read():
        length = net.seq_len_with_longterm_mem(args.tokens + args.new + 1)
        places = net.axial_pos_emb.maybe_derive_outer_dim(length, (net.neural_memory_segment_len,))
        held["places"] = net.axial_pos_emb(places, return_factorized=True)
        logits, held["cache"] = step(ids, None)
        while logits is None:  # it has just read a memory token
            logits, held["cache"] = step(ids, held["cache"])
        held["next"] = logits[:, -1:].argmax(-1)

    def go_on():  # its `sample`, greedily
        out, cache = torch.cat([ids, held["next"]], dim=1), held["cache"]
        while out.shape[1] < args.tokens + args.new + 1:
            logits, cache = step(out, cache)
            if logits is not None:
                out = torch.cat([out, logits[:, -1:].argmax(-1)], dim=1)

    return Peer(count(net), torch.no_grad()(read), torch.no_grad()(go_on))


def rmt(args, ids):
    import torch
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

    S = args.block_size
    net = RecurrentMemoryTransformer(
        num_tokens=args.vocabulary,
        dim=args.width,
        depth=args.layers,
        num_memory_tokens=args.fam_length,
        seq_len=S,
        dim_head=args.width // args.heads,
        heads=args.heads,
        ff_mult=args.intermediate / args.width,
        use_flash_attn=True,
        abs_pos_emb=False,
        rotary_pos_emb=True,
        use_xl_memories=args.memory_segments > 0,
    ).eval()
    model, ids, held = RecurrentMemoryTransformerWrapper(net).eval(), torch.tensor(ids), {}

    def read():
        memories = passed = None
        for segment in ids.split(S, dim=1):
            _, memories, passed = net(segment, memories, xl_memories=passed)
        held["memories"], held["passed"] = memories, passed

    def go_on():
        half = ids[:, : S // 2]
        length = half.shape[1] + args.new
        model.generate(half, length=length, memories=held["memories"], xl_memories=held["passed"])

    return Peer(count(net), torch.no_grad()(read), torch.no_grad()(go_on))


SYSTEMS = {
    "keras_fam": fam,
    "KerasHub Llama": hub_llama,
    "Mistral": mistral,
    "RecurrentGemma": recurrent_gemma,
    "x-transformers": x_transformers,
    "titans": titans,
    "rmt": rmt,
}
ON_JAX = ("keras_fam", "KerasHub Llama")


def child(args):
    import keras

    ids = np.random.default_rng(0).integers(1, args.vocabulary, (1, args.tokens)).astype("int64")
    suffix, names = "", args.systems
    if keras.backend.backend() == "jax":
        suffix, names = " JAX", [name for name in args.systems if name in ON_JAX]
    else:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(args.threads)
    peers = {name: SYSTEMS[name](args, ids) for name in names}
    result = {name + suffix: {"parameters": peer.parameters} for name, peer in peers.items()}

    def report(kind, functions, per):
        for name, t in measuring.take_turns(functions, args.repeats).items():
            result[name + suffix][f"{kind} ms per token"] = 1e3 * t["median"] / per
            result[name + suffix][f"{kind} seconds"] = t["all"]

    report("prefill", {name: peer.read for name, peer in peers.items()}, args.tokens)
    report("decode", {name: peer.go_on for name, peer in peers.items()}, args.new)
    return result


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv

    def words(text):
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", type=words, default=["torch", "jax"])
    parser.add_argument("--systems", type=words, default=list(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, help="default: width / 64")
    parser.add_argument("--intermediate", type=int, help="default: 2 * width")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--memory-segments", type=int, default=1)
    parser.add_argument("--fam-length", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new", type=int, default=32, help="tokens that are decoded")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", help="where to write a JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.heads = args.heads or max(1, args.width // 64)
    args.intermediate = args.intermediate or 2 * args.width
    args.window = (args.memory_segments + 1) * args.block_size
    if args.child:
        measuring.use_cores(args.threads)
        Path(args.child).write_text(json.dumps(child(args)))
        return
    started, systems = perf_counter(), {}
    for backend in args.backends:
        systems |= measuring.run_child("examples.benchmarks.peers", argv, backend, args.threads)
    print(f"{'':22}{'parameters':>12}{'prefill':>12}{'decode':>12}   ms per token (times keras_fam's)")
    base = next(iter(systems.values()))
    for name, found in systems.items():
        cells = [
            f"{found[f'{kind} ms per token']:8.3f} ({found[f'{kind} ms per token'] / base[f'{kind} ms per token']:.2f})"
            for kind in ("prefill", "decode")
        ]
        print(f"{name:22}{found['parameters']:12,d}  {'   '.join(cells)}")
    settings = {name: value for name, value in vars(args).items() if name not in ("child", "out")}
    packages = ("keras", "keras-hub", "torch", "transformers", "x-transformers", "titans-pytorch")
    packages = (*packages, "recurrent-memory-transformer-pytorch", *(["jax"] if "jax" in args.backends else []))
    result = {"settings": settings, "machine": measuring.machine(args.threads), "systems": systems}
    result["versions"] = measuring.versions(*packages)
    measuring.write(result, args.out)
    print(f"{perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
