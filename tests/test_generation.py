"""Generation against plain loops over whole sequences, and streams that stand where `predict` would have left them."""

import functools

import keras
import numpy as np
import pytest
import support
from keras import ops

import keras_fam
from keras_fam.ops.backend import compiled
from keras_fam.ops.programs import programs_of

samplers = pytest.importorskip("keras_hub").samplers

VOCABULARY, LONGEST, BLOCK = 11, 24, 4
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]


class Case:
    """A model with F memory rows, two streams, and the model's whole-sequence logits compiled once."""

    def __init__(self, fam_length, preprocessor=None):
        keras.utils.set_random_seed(1)
        backbone = keras_fam.TransformerFAMBackbone(
            VOCABULARY, 1, 16, 2, 24, block_size=BLOCK, memory_segments=1, fam_length=fam_length,
            tie_weights=False,
        )  # fmt: skip
        self.lm = keras_fam.TransformerFAMCausalLM(backbone, preprocessor)
        self.lm.build()
        rng = np.random.default_rng(3)
        for weight in self.lm.weights:
            weight.assign(rng.normal(size=weight.shape) * (0.8 if len(weight.shape) > 1 else 0.2))
        self.stream = keras_fam.StreamingModel(self.lm, 2, blocks_per_step=1)
        self.whole = compiled(lambda ids: self.lm(ids), lambda: self.lm.variables)

    def fresh(self, prompts=None):
        self.stream.reset_state()
        if prompts is not None:
            ids = np.zeros((2, max(map(len, prompts))), "int32")
            for row, prompt in zip(ids, prompts, strict=True):
                row[: len(prompt)] = prompt
            self.stream.predict(ids, lengths=np.array([len(prompt) for prompt in prompts]))
        return self.stream

    def logits(self, texts):
        """Logits after the last token of each text, from the whole sequences; a causal model ignores the padding."""
        ids = np.zeros((4, LONGEST), "int32")
        for row, text in zip(ids, texts, strict=False):
            row[: len(text)] = text
        found = support.numpy(self.whole(ops.convert_to_tensor(ids)))
        return np.array([found[i, len(text) - 1] for i, text in enumerate(texts)])

    def greedy(self, prompts, count, stops=()):
        """Argmax of the whole sequence, again for every token."""
        texts, alive = [list(prompt) for prompt in prompts], [True] * len(prompts)
        for _ in range(count):
            for i, logits in enumerate(self.logits(texts)):
                if alive[i]:
                    texts[i].append(int(logits.argmax()))
                    alive[i] = texts[i][-1] not in stops
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


TOKENS = ["<|endoftext|>", *"abcdefghi", "ab"]


@functools.cache
def make_case(name):
    """`"fam"` has memory and a character tokenizer of KerasHub's, `"bswa"` has neither."""
    if name == "bswa":
        return Case(0)
    import keras_hub

    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=["a b"])
    return Case(2, keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=14))


@pytest.fixture(params=["fam", "bswa"])
def case(request):
    return make_case(request.param)


@pytest.fixture
def fam():
    return make_case("fam")


def held(stream):
    """All that a stream holds, as NumPy copies."""
    parts = [*keras.tree.flatten(stream.state), stream.next_logits, stream.position]
    return [np.array(ops.convert_to_numpy(x)) for x in parts]


def same(first, second):
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(first, second, strict=True))


def read_so(case, texts, stream):
    """Asserts that the stream stands where a reading of `texts` ends."""
    state, logits, position = stream.state, support.numpy(stream.next_logits), stream.position
    other = case.fresh(texts)
    assert position.tolist() == other.position.tolist() == [len(text) for text in texts]
    support.states_close(state, other.state, support.SPLIT)
    support.close(logits, other.next_logits, support.SPLIT)
    support.close(logits, case.logits(texts), support.SPLIT)


def test_greedy_is_argmax_of_the_whole_sequence(case):
    stream = case.fresh()
    specs = [(x.shape, x.dtype) for x in keras.tree.flatten(stream.state)]
    expected = case.greedy(PROMPTS, 15)
    first = stream.generate(PROMPTS, max_new_tokens=6)
    assert first == [row[:6] for row in expected]
    assert stream.generate(max_new_tokens=9) == [row[6:] for row in expected]  # goes on, over block borders
    assert len({token for row in expected for token in row}) > 3  # no constant text
    assert [(x.shape, x.dtype) for x in keras.tree.flatten(stream.state)] == specs
    read_so(case, [a + b for a, b in zip(PROMPTS, expected, strict=True)], stream)


def test_goes_on_after_predict_and_with_further_prompts(case):
    stream = case.fresh([PROMPTS[0][:4], PROMPTS[1]])
    first = stream.generate(max_new_tokens=3)
    texts = [a + b for a, b in zip([PROMPTS[0][:4], PROMPTS[1]], first, strict=True)]
    assert first == case.greedy([PROMPTS[0][:4], PROMPTS[1]], 3)
    more = [[], [3, 1, 4]]  # row 0 reads nothing
    second = stream.generate(more, max_new_tokens=4)
    texts = [a + b for a, b in zip(texts, more, strict=True)]
    assert second == case.greedy(texts, 4)
    third = stream.generate(np.array([[5, 6], [7, 0]]), lengths=[2, 1], max_new_tokens=2)
    texts = [a + b + c for a, b, c in zip(texts, second, [[5, 6], [7]], strict=True)]
    assert third == case.greedy(texts, 2)
    read_so(case, [a + b for a, b in zip(texts, third, strict=True)], stream)


def test_rows_stop_at_their_own_stop_tokens(case):
    free = case.greedy(PROMPTS, 9)
    stops = [free[0][2], free[1][5]]
    expected = case.greedy(PROMPTS, 9, stops)
    stream = case.fresh()
    assert stream.generate(PROMPTS, max_new_tokens=9, stop_token_ids=stops) == expected
    assert any(len(row) < 9 for row in expected) and all(row[-1] in stops or len(row) == 9 for row in expected)
    read_so(case, [a + b for a, b in zip(PROMPTS, expected, strict=True)], stream)


def test_tokens_one_by_one_are_the_same(case):
    free = case.greedy(PROMPTS, 9)
    stops = [free[0][3]] if free[0][3] not in free[1] else [free[0][0]]
    expected = case.greedy(PROMPTS, 9, stops)
    stream = case.fresh()
    found = [[], []]
    for step, tokens in enumerate(stream.generate_stream(PROMPTS, max_new_tokens=9, stop_token_ids=stops)):
        assert tokens.shape == (2,)
        for row, token, whole in zip(found, tokens.tolist(), expected, strict=True):
            assert token == (whole[step] if step < len(whole) else -1)
            row.extend([token] if token >= 0 else [])
    assert found == expected
    read_so(case, [a + b for a, b in zip(PROMPTS, expected, strict=True)], stream)


def test_a_loop_that_ends_early_has_read_what_it_was_given(fam):
    stream = fam.fresh()
    for count, _ in enumerate(stream.generate_stream(PROMPTS, max_new_tokens=12), 1):
        if count == 3:
            break
    assert stream.generate(max_new_tokens=4) == [row[3:] for row in fam.greedy(PROMPTS, 7)]


@pytest.mark.parametrize("name", ["random", "top_k", "top_p"])
@pytest.mark.parametrize("module", [keras_fam.samplers, samplers], ids=["native", "hub"])
def test_random_samplers_follow_their_seed(fam, module, name):
    if module is samplers and name == "random":
        pytest.skip("KerasHub's top-k sampler shows the same")
    make = {
        "random": lambda seed: module.RandomSampler(seed=seed, temperature=2.0),
        "top_k": lambda seed: module.TopKSampler(k=4, seed=seed, temperature=5.0),
        "top_p": lambda seed: module.TopPSampler(p=0.9, seed=seed, temperature=5.0),
    }[name]

    def draw(sampler, **options):
        return fam.fresh().generate(PROMPTS, max_new_tokens=12, sampler=sampler, **options)

    sampler = make(7)
    first, second = draw(sampler), draw(sampler)
    assert first != second  # the sampler goes on drawing
    again = make(7)  # shares the program, not the draws
    assert draw(again) == first and draw(again) == second
    assert draw(sampler, seed=3) == draw(make(1), seed=3) == draw(make(None), seed=3) != first
    if name == "random":  # by name, every call draws its own
        assert draw(name) != draw(name)
    keys = [key for key in programs_of(fam.lm).keys("decode") if make(0).__class__ in key]
    assert len(keys) == 1 + (name == "random"), keys  # the object's settings and the name's defaults


@pytest.mark.parametrize("sampler", ["greedy", keras_fam.samplers.TopKSampler(4, temperature=5.0)], ids=str)
def test_tokens_are_the_same_however_many_are_made_at_a_time(case, sampler):
    """One by one, in groups and all in one program: the same tokens, and the same state to the bit."""
    stream = case.fresh()
    free = stream.generate(PROMPTS, max_new_tokens=9, sampler=sampler, seed=11)
    stops = [free[0][2], free[1][5]]
    options = {"max_new_tokens": 9, "sampler": sampler, "seed": 11, "stop_token_ids": stops}
    whole = case.fresh().generate(PROMPTS, **options)
    assert whole == [row[: 1 + next((i for i, t in enumerate(row) if t in stops), 8)] for row in free]
    expected = held(stream)
    for size in (1, 4):
        steps = np.array(list(case.fresh().generate_stream(PROMPTS, group_size=size, **options)))
        assert [[t for t in row if t >= 0] for row in steps.T.tolist()] == whole
        assert same(held(stream), expected), size


@pytest.mark.parametrize("size", [3, 12])
def test_a_loop_that_ends_within_a_group(fam, size):
    """The stream stands behind the last token that came out, unless something else has moved it."""
    stream = fam.fresh()
    for count, _ in enumerate(stream.generate_stream(PROMPTS, max_new_tokens=12, group_size=size), 1):
        if count == 5:
            break
    expected = fam.greedy(PROMPTS, 9)
    assert stream.position.tolist() == [len(prompt) + 5 for prompt in PROMPTS]
    assert stream.generate(max_new_tokens=4) == [row[5:] for row in expected]
    steps = fam.fresh().generate_stream(PROMPTS, max_new_tokens=12, group_size=size)
    next(steps)
    stream.reset_state()
    steps.close()
    assert not stream.position.any()


def test_top_k_chooses_among_the_likeliest(fam):
    sampler = keras_fam.samplers.TopKSampler(k=2, temperature=50.0)
    chosen = fam.fresh().generate(PROMPTS, max_new_tokens=12, sampler=sampler)
    ranks = []
    for prompt, row in zip(PROMPTS, chosen, strict=True):
        for i, token in enumerate(row):
            logits = fam.logits([prompt + row[:i]])[0]
            ranks.append(int((logits > logits[token]).sum()))
    assert set(ranks) == {0, 1}


def test_random_tokens_one_by_one_are_reproducible(fam):
    def draw(**options):
        steps = fam.fresh().generate_stream(PROMPTS, max_new_tokens=6, **options)
        return np.array(list(steps)).tolist()

    sampler = keras_fam.samplers.RandomSampler(temperature=2.0)
    assert draw(sampler=sampler, seed=5) == draw(sampler=sampler, seed=5) != draw(sampler=sampler)


def beam_search(case, prompt, width, count):
    beams = [(list(prompt), 0.0)]
    for _ in range(count):
        logits = case.logits([text for text, _ in beams]).astype("float64")
        logs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logs -= logits.max(1, keepdims=True)
        grown = [([*text, v], score + logs[i, v]) for i, (text, score) in enumerate(beams) for v in range(VOCABULARY)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return beams[0][0][len(prompt) :]


def test_beam_search_is_the_search_by_hand(fam):
    expected = [beam_search(fam, prompt, 3, 6) for prompt in PROMPTS]
    stream = fam.fresh()
    assert stream.generate(PROMPTS, max_new_tokens=6, sampler=samplers.BeamSampler(num_beams=3)) == expected
    read_so(fam, [a + b for a, b in zip(PROMPTS, expected, strict=True)], stream)


def test_contrastive_search(fam):
    greedy = fam.greedy(PROMPTS, 6)
    lone = samplers.ContrastiveSampler(k=3, alpha=0.0)  # nothing is penalised: the likeliest token
    assert fam.fresh().generate(PROMPTS, max_new_tokens=6, sampler=lone) == greedy
    strong = fam.fresh().generate(PROMPTS, max_new_tokens=6, sampler=samplers.ContrastiveSampler(k=3, alpha=0.9))
    assert strong != greedy
    assert [row[0] for row in strong] == [row[0] for row in greedy]  # nothing to compare with yet


def test_one_program_for_many_lengths(fam):
    stream = fam.fresh(PROMPTS)
    before = len(programs_of(fam.lm))
    expected = fam.greedy(PROMPTS, 15)
    found = [[], []]
    for count in (1, 2, 3, 4, 5):
        for row, new in zip(found, stream.generate(max_new_tokens=count), strict=True):
            row.extend(new)
    assert found == expected
    loops = [key for key in programs_of(fam.lm).keys("decode") if key[1:3] == (16, 0)]
    assert len(loops) >= (keras.backend.backend() != "torch")
    assert len(programs_of(fam.lm)) <= before + 3  # one loop, and the pieces of one and two tokens


class Broken(samplers.Sampler):
    """Fails after some draws, as an interrupt would."""

    def __init__(self, seed=3):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(seed)

    def get_next_token(self, probabilities):
        keras.random.uniform((2,), seed=self.seed_generator)
        raise RuntimeError("broken")


def test_errors_leave_the_stream_as_it_was():
    bswa = make_case("bswa")
    stream = bswa.fresh([[1, 2, 3, 4, 5], []])  # row 1 has read nothing
    before = held(stream)
    wrong = [
        ({}, "at least one token"),
        ({"prompt": [[1], []]}, "at least one token"),
        ({"prompt": [[1]]}, "batch size"),
        ({"prompt": [1, 2]}, "batch size"),
        ({"prompt": [[1], [VOCABULARY]]}, "Token ids must be from 0"),
        ({"prompt": [[1], [-1]]}, "Token ids must be from 0"),
        ({"prompt": [[1.5], [2.5]]}, "A prompt must be int"),
        ({"prompt": [[1], [2, 3]], "lengths": [1, 2]}, "several sizes"),
        ({"prompt": [[1, 2], [2, 3]], "lengths": [1, 3]}, "lengths"),
        ({"prompt": [[1, 2], [2, 3]], "lengths": [1, 2, 2]}, "lengths"),
        ({"lengths": [1, 2]}, "without one"),
        ({"prompt": ["a", "b"]}, "tokenizer"),
        ({"prompt": PROMPTS, "stop_token_ids": "auto"}, "tokenizer"),
        ({"prompt": PROMPTS, "stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
        ({"prompt": PROMPTS, "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": PROMPTS, "max_new_tokens": 2.5}, "max_new_tokens"),
        ({"prompt": PROMPTS, "sampler": "nonsense"}, "nonsense"),
        ({"prompt": PROMPTS, "sampler": 3}, "sampler"),
        ({"prompt": PROMPTS, "sampler": samplers.BeamSampler(2, return_all_beams=True)}, "return_all_beams"),
        ({"prompt": PROMPTS, "sampler": "speculative"}, "speculative"),
        ({"prompt": PROMPTS, "sampler": "top_k", "seed": -1}, "seed"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            stream.generate(**{"max_new_tokens": 3, **options})
        with pytest.raises(ValueError, match=message):
            stream.generate_stream(**{"max_new_tokens": 3, **options})
        assert same(held(stream), before), options
    with pytest.raises(ValueError, match="one by one"):
        stream.generate_stream(PROMPTS, max_new_tokens=3, sampler="beam")
    assert same(held(stream), before)
    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):  # the prompt was read by then
        stream.generate(PROMPTS, max_new_tokens=3, sampler=broken)
    assert same(held(stream), before)
    assert support.numpy(broken.seed_generator.state.value).tolist() == [3, 0]
    with pytest.raises(ValueError, match="without logits"):
        keras_fam.StreamingModel(bswa.lm.backbone, 2).generate(PROMPTS, max_new_tokens=1)


def test_logits_of_rows_come_and_go_with_their_state(fam):
    stream = fam.fresh(PROMPTS)
    logits = support.numpy(stream.next_logits).copy()
    stream.fork(0, [1])
    assert np.array_equal(support.numpy(stream.next_logits), logits[[0, 0]])
    kept = stream.get_state([1])
    stream.reset_state([1])
    assert np.isnan(support.numpy(stream.next_logits)).all(axis=1).tolist() == [False, True]
    stream.set_state(kept, [1])
    assert np.isnan(support.numpy(stream.next_logits)).all(axis=1).tolist() == [False, True]
    with pytest.raises(ValueError, match="next_logits"):
        stream.set_state(kept, [1], next_logits=logits)
    stream.set_state(kept, [1], next_logits=logits[:1])
    first, second = stream.generate(max_new_tokens=5)
    assert first == second == fam.greedy(PROMPTS[:1], 5)[0]


# Text and completion ------------------------------------------------------------------------------------------------


def spell(ids):
    return "".join(TOKENS[i] for i in ids if i)


def test_text_in_text_out(fam):
    stream = fam.fresh()
    expected = fam.greedy([[0, 1, 3], [0, 4]], 12)  # the start token first
    found = stream.generate(["ac", "d"], max_new_tokens=5)
    assert found == [spell(row[:5]) for row in expected]
    assert stream.generate(["", ""], max_new_tokens=7) == [spell(row[5:]) for row in expected]
    with pytest.raises(ValueError, match="batch size"):
        stream.generate(["a", "b", "c"], max_new_tokens=1)


def test_completion_in_the_manner_of_keras_hub(fam):
    lm = fam.lm
    lm.sampler = "greedy"
    ids = [[0, 1, 3, 5, 7], [0, 4]]
    whole = [prompt + row for prompt, row in zip(ids, fam.greedy(ids, 12), strict=True)]
    lists = lm.generate(ids, max_length=14, stop_token_ids=None)
    assert lists == [row[:14] for row in whole]
    assert lm.generate(ids, max_length=14, stop_token_ids=None, strip_prompt=True) == [
        row[len(prompt) : 14] for row, prompt in zip(whole, ids, strict=True)
    ]
    assert lm.generate(["aceg", "d"], stop_token_ids=None) == [spell(row[:14]) for row in whole]
    assert lm.generate(["aceg", "d"], max_length=8, stop_token_ids=None) == [spell(row[:8]) for row in whole]
    stops = (whole[0][6],)
    until = [prompt + row for prompt, row in zip(ids, fam.greedy(ids, 12, stops), strict=True)]
    batch = lm.preprocessor.generate_preprocess(["aceg", "d"], sequence_length=14)
    found = lm.generate(batch, stop_token_ids=stops)
    assert set(found) == {"token_ids", "padding_mask"} and found["token_ids"].shape == (2, 14)
    rows = [row[mask].tolist() for row, mask in zip(found["token_ids"], found["padding_mask"], strict=True)]
    assert rows == [row[:14] for row in until]
    single = lm.generate("d", strip_prompt=True)
    assert single == spell(fam.greedy([[0, 4]], 12, stops=[0])[0])
    until = fam.greedy([[0, 4]], 2, stops=[0])[0]  # one string in, one string out
    stream = keras_fam.StreamingModel(lm, 1)
    assert stream.generate("d", max_new_tokens=2, stop_token_ids="auto") == spell(until)
    with pytest.raises(ValueError, match="max_length"):
        lm.generate(ids, stop_token_ids=None)
    with pytest.raises(ValueError, match="1 to `max_length`"):
        lm.generate(ids, max_length=4, stop_token_ids=None)
    with pytest.raises(ValueError, match="1 to `max_length`"):
        lm.generate([[1], []], max_length=4, stop_token_ids=None)
