"""lm-eval (EleutherAI's evaluation harness) on models of this package; needs `pip install 'keras-fam[lm-eval]'`.

    python -m keras_fam.evaluation.lm_eval --model keras_fam --model_args preset=my_model --tasks lambada_openai

lm-eval's own command knows its own models alone, so this one registers `keras_fam` and then runs it: options, tasks and
reports are lm-eval's. From Python, importing this module registers the model, or hand one in:

    from keras_fam.evaluation.lm_eval import KerasFAM
    lm_eval.simple_evaluate(KerasFAM(model=lm, batch_size=8), tasks=["lambada_openai"])
"""

import sys

from keras_fam.evaluation.text_scorer import TextScorer
from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM
from keras_fam.streaming.samplers import GreedySampler, RandomSampler, TopKSampler, TopPSampler

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(
        f"Evaluation by lm-eval needs its package: pip install 'keras-fam[lm-eval]'. Missing: {error.name}"
    ) from error


class KerasFAM(TemplateLM):
    """A `TransformerFAMCausalLM` with lm-eval's model interface; what lm-eval asks is answered by a `TextScorer`.

    Texts are never truncated, whatever their length. Log-likelihoods, greedy completions, and sampling by
    `temperature`, `top_k` and `top_p` are supported; chat templates are not. Contexts get no start token unless
    `add_start_token=True`.

    Args:
        preset: str, a folder that `save_to_preset` wrote.
        model: a model, in place of a preset.
        lora: None, or str, a file of `save_lora_weights`.
        batch_size: int, or str of one; `"auto"` is 8.
        max_gen_toks: int, tokens of a completion at most, where a task does not say.
        tokenizer: see `TextScorer`; or str, a `tokenizer.json` for the package tokenizers.
        prefix_token_id, add_start_token, blocks_per_step: see `TextScorer`.
        device, max_batch_size: of lm-eval's command; ignored, the device is Keras' own.
        **settings: see `TransformerFAMCausalLM.from_preset`, for instance `dtype`.

    Raises:
        ValueError: unless there is either a preset or a model.
    """

    def __init__(
        self,
        preset=None,
        *,
        model=None,
        lora=None,
        batch_size=1,
        max_gen_toks=256,
        tokenizer=None,
        prefix_token_id=None,
        add_start_token=False,
        blocks_per_step=8,
        device=None,
        max_batch_size=None,
        **settings,
    ):
        super().__init__()
        if (preset is None) == (model is None):
            raise ValueError("Pass `preset`, or `model`, but not both: --model_args preset=FOLDER")
        if model is None:
            model = TransformerFAMCausalLM.from_preset(str(preset), **settings)
        if lora is not None:
            model.load_lora_weights(str(lora))
        if isinstance(tokenizer, str):
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(tokenizer)
        batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.scorer = TextScorer(
            model,
            batch_size,
            tokenizer=tokenizer,
            prefix_token_id=prefix_token_id,
            add_start_token=add_start_token,
            blocks_per_step=blocks_per_step,
        )
        self.batch_size, self.max_gen_toks = batch_size, int(max_gen_toks)
        self.max_length = sys.maxsize  # tasks that ask are not cut off

    @property
    def eot_token_id(self):
        """The token at which completions end; without one, the prefix token."""
        return next(iter(self.scorer.stop_token_ids), self.scorer.prefix_token_id)

    @property
    def prefix_token_id(self):
        """The token before texts without a context."""
        return self.scorer.prefix_token_id

    @property
    def tokenizer_name(self):
        """Names the tokenizer in lm-eval's caches."""
        return f"{type(self.scorer.tokenizer).__name__}_{self.scorer.model.output_width}"

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """A list of ids; see `TextScorer.encode`."""
        return self.scorer.encode(string, start=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        def keep(number, result):
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], result)

        return self.scorer.score_tokens([(context, ids) for _, context, ids in requests], keep)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts, each read as one stream."""
        texts = [request.args[0] for request in requests]
        results = self.scorer.loglikelihood_rolling(texts)
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests, disable_tqdm=False):
        """Completions; requests with the same options are read together."""
        groups, results = {}, [None] * len(requests)
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            options = requests[numbers[0]].args[1]
            given = normalize_gen_kwargs(options, self.max_gen_toks)

            def keep(i, text, numbers=numbers):
                results[numbers[i]] = text
                self.cache_hook.add_partial("generate_until", requests[numbers[i]].args, text)

            self.scorer.generate_until(
                [requests[i].args[0] for i in numbers],
                given["until"],
                max_new_tokens=given["max_gen_toks"],
                sampler=sampler_of(given),
                done=keep,
            )
        return results


def sampler_of(options):
    """A sampler from the options of lm-eval's requests, normalized."""
    if not options.get("do_sample"):
        return GreedySampler()
    temperature, k, p = options.get("temperature") or 1.0, options.get("top_k"), options.get("top_p")
    if p is not None:
        return TopPSampler(p=float(p), k=None if k is None else int(k), temperature=temperature)
    if k is not None:
        return TopKSampler(k=int(k), temperature=temperature)
    return RandomSampler(temperature=temperature)


def main():
    """lm-eval's command, with `keras_fam` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ != "__main__":
    register_model("keras_fam")(KerasFAM)
else:  # the class of the imported module is registered, not that of this copy
    from keras_fam.evaluation.lm_eval import main

    main()
