"""The models that are compared, with their tokenizer and novels to hide facts in."""

import keras

import keras_fam
from examples.datasets.austen import austen, chapters
from examples.datasets.python_docs import topics_text
from examples.long_context.systems import FAM
from examples.smollm2.books import HELD_OUT, plain

BASE, FULL = "BSWA, sinks", "full attention"
TINY = {"vocabulary_size": 258, "num_layers": 2, "hidden_dim": 32, "num_query_heads": 4, "intermediate_dim": 64}


class Bytes:
    """Bytes as tokens, with an end token: a tokenizer that every model can have."""

    end_token_id = 257

    def __call__(self, text):
        return list(text.encode())

    def detokenize(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Built:
    """What the command compares.

    Args:
        fam: the `TransformerFAMCausalLM` with memory.
        base: the same without memory, before any training.
        full: function of a number of tokens that returns a model that sees all of them, or None.
        tokenizer: see `keras_fam.evaluation.TextScorer`.
        texts: list of str, the documents in which facts are hidden.
        longest: int, tokens up to which there is full attention.
    """

    def __init__(self, fam, base, full, tokenizer, texts, longest=0):
        self.fam, self.base, self._full, self.longest = fam, base, full, longest
        self.tokenizer, self.encode = tokenizer, keras_fam.tasks.encoder(tokenizer)
        self.prose = keras_fam.tasks.Prose.from_texts(texts, tokenizer)
        self._wide = {}

    def models(self, length):
        """dict from names to models for texts of so many tokens."""
        models = {BASE: self.base}
        if length <= self.longest and self._full is not None:
            if length not in self._wide:
                self._wide = {length: self._full(length)}  # one at a time: its state is large
            models[FULL] = self._wide[length]
        return {**models, FAM: self.fam}

    def tokenizer_file(self, folder):
        """The tokenizer as a `tokenizer.json` in a folder; ValueError for one that cannot be written."""
        inner = getattr(self.tokenizer, "_tokenizer", self.tokenizer)
        if not hasattr(inner, "to_str"):
            raise ValueError(
                f"RULER's package needs a byte-pair tokenizer. Received: {type(self.tokenizer).__name__}. Pass "
                "`--source own`."
            )
        path = folder / "tokenizer.json"
        path.write_text(inner.to_str())
        return path


def build(args):
    """The models of a command."""
    return (_tiny if args.tiny else _from_preset if args.preset else _smollm2)(args)


def _settings(args, length=None):
    """Settings of blocks and memory; with a length, of a window that holds all of it, without memory."""
    if length is not None:
        past = -(-(length + args.new_tokens) // args.block)
        return {"block_size": args.block, "memory_segments": past, "fam_length": 0}
    return {"block_size": args.block, "memory_segments": args.segments, "fam_length": args.fam}


def _tiny(args):
    memory = {"fam_query": args.fam_query, "memory_update": "hard_gate", "fam_gate": -1.0, "initial_fam": "summary"}

    def make(settings, **options):
        keras.utils.set_random_seed(args.seed)
        backbone = keras_fam.TransformerFAMBackbone(
            **TINY, **settings, attention_sinks=args.sinks, dtype=args.dtype, **options
        )
        lm = keras_fam.TransformerFAMCausalLM(backbone)
        lm.build()
        return lm

    base = make({**_settings(args), "fam_length": 0})
    return Built(
        make(_settings(args), **memory),
        base,
        lambda length: make(_settings(args, length)),
        Bytes(),
        list(topics_text()),
        args.full,
    )


def _from_preset(args):
    load = keras_fam.TransformerFAMCausalLM.from_preset
    fam = load(args.preset, dtype=args.dtype)
    if fam.preprocessor is None:
        raise ValueError(f"{args.preset} has no tokenizer: save a model with a preprocessor.")
    if args.lora:
        fam.load_lora_weights(args.lora)
    before, config = load(args.preset, dtype=args.dtype), fam.backbone.get_config()
    window = {name: config[name] for name in ("memory_segments", "attention_sinks")}
    base = keras_fam.training.full_attention(before, 0, **window)

    def full(length):
        return keras_fam.training.full_attention(before, length + args.new_tokens)

    return Built(fam, base, full, fam.preprocessor.tokenizer, _novels(args), args.full)


def _smollm2(args):
    from examples.smollm2.model import load

    source = load(dtype=args.dtype)
    options = {"attention_sinks": args.sinks, "seed": args.seed, "weights": "share", "dtype": args.dtype}
    base = keras_fam.hub.convert(source, **{**_settings(args), "fam_length": 0}, **options)
    if args.lora:
        options["weights"] = "copy"  # LoRA is merged into it
    fam = keras_fam.hub.convert(source, **_settings(args), fam_query=args.fam_query, **options)
    if args.lora:
        fam.load_lora_weights(args.lora)
    tokenizer = source.preprocessor.tokenizer

    def full(length):
        return keras_fam.hub.convert(source, **_settings(args, length), **{**options, "weights": "share"})

    return Built(fam, base, full, tokenizer, _novels(args), args.full)


def _novels(args):
    """The two novels that no training here sees."""
    novels = austen(args.novels)
    return ["\n\n".join(plain(chapter) for chapter in chapters(novels[title])) for title in HELD_OUT]
