"""torch: small steps run from recorded graphs, with the same numbers. Elsewhere they are compiled like any others."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_fam
from keras_fam.ops import backend
from keras_fam.ops.backend import compiled
from keras_fam.ops.torch_graph import WARMUP_CALLS, TracedFunction
from keras_fam.ops.torch_loop import TokenLoop
from keras_fam.ops.torch_passes import DIRECT

S, V = 4, 13
pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="graphs are recorded on torch alone")


def make_model(**settings):
    keras.utils.set_random_seed(3)
    backbone = keras_fam.TransformerFAMBackbone(
        V, 2, 16, 2, 32, block_size=S, memory_segments=1, fam_length=2, **settings
    )
    model = keras_fam.TransformerFAMCausalLM(backbone)
    model.build()
    return model


@pytest.fixture
def recorded(monkeypatch):
    """What was recorded, () where a function could not be."""
    found, record = [], TracedFunction._record

    def noted(self, *args):
        found.append(record(self, *args))
        return found[-1]

    monkeypatch.setattr(TracedFunction, "_record", noted)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"initial_fam": "summary"},
        {"num_visible_memories": 2, "fam_query": "anchored"},
        {"dtype": "mixed_bfloat16", "fam_gate": 0.0},
    ],
    ids=str,
)
def test_token_by_token_past_several_blocks(settings, recorded):
    """Outputs and states of a graph are those of the operations one by one, to the bit, also with other weights."""
    import torch

    model = make_model(**settings)
    ids = np.random.default_rng(0).integers(0, V, (2, WARMUP_CALLS + 5 * S + 1)).astype("int32")
    run = compiled(lambda x, state: model.advance(x, state), lambda: model.variables, record="anywhere")
    ours = theirs = model.get_initial_state(2)
    for i in range(ids.shape[1]):
        if i == WARMUP_CALLS + 2 * S:
            for variable in model.trainable_variables:
                variable.assign(variable.value * 1.5 + 0.01)
        token = ops.convert_to_tensor(ids[:, i : i + 1])
        a, ours = run(token, ours)
        with torch.no_grad():
            b, theirs = model.advance(token, theirs)
        pairs = zip(keras.tree.flatten((a, ours)), keras.tree.flatten((b, theirs)), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    assert ops.convert_to_numpy(ours.position.block_index).tolist() == [ids.shape[1] // S] * 2
    assert len(recorded) == 1 and recorded[0]


@pytest.mark.parametrize("device, graphs", [("gpu", 1), ("cpu", 0)])
def test_many_blocks_on_a_gpu(device, graphs, recorded, monkeypatch):
    """There a program of whole blocks is recorded too, after more calls; outputs and states are the same to the bit."""
    import torch

    monkeypatch.setattr(backend, "platform", lambda: device)
    monkeypatch.setattr(backend, "WARMUP_CALLS_LARGE", 3)
    model = make_model(num_visible_memories=2)
    ids = np.random.default_rng(0).integers(0, V, (2, 6 * 4 * S)).astype("int32")
    stream, theirs = keras_fam.StreamingModel(model, batch_size=2), model.get_initial_state(2)
    for i in range(0, ids.shape[1], 4 * S):
        found = stream.predict(ids[:, i : i + 4 * S], verbose=0)
        with torch.no_grad():
            expected, theirs = model.advance(ops.convert_to_tensor(ids[:, i : i + 4 * S]), theirs, aligned=True)
        assert np.array_equal(found, ops.convert_to_numpy(expected))
        pairs = zip(keras.tree.flatten(stream.state), keras.tree.flatten(theirs), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    assert len(recorded) == graphs and all(recorded)


@pytest.mark.parametrize("sampler", ["greedy", "top_k"])
def test_generation_goes_on_from_graphs(sampler, recorded):
    """With the sampler and its random numbers in them: one graph within blocks, one for tokens that complete one."""
    model, count = make_model(), 6 * WARMUP_CALLS
    stream, other = (keras_fam.StreamingModel(model, batch_size=2) for _ in range(2))
    tokens = stream.generate([[1, 2, 3], [4]], sampler=sampler, seed=5, max_new_tokens=count)
    assert len(recorded) == 2 and all(recorded)
    first = other.generate([[1, 2, 3], [4]], sampler=sampler, seed=5, max_new_tokens=3)  # now from the graphs
    assert first == [row[:3] for row in tokens] and len(recorded) == 2
    ids, lengths = keras_fam.streaming.generation.pad_rows([[1, 2, 3, *tokens[0]], [4, *tokens[1]]])
    logits, _ = model.advance(ids, model.get_initial_state(2), lengths=lengths)
    last = ops.convert_to_numpy(logits)[np.arange(2), lengths - 1]
    assert np.abs(ops.convert_to_numpy(stream.next_logits) - last).max() <= 1e-5


def test_graphs_follow_the_weights(recorded):
    """Assigned weights are read by the graph that there is; LoRA has a new one recorded."""
    model = make_model()
    stream = keras_fam.StreamingModel(model, batch_size=1)

    def check(graphs):
        for _ in range(WARMUP_CALLS + 2):
            stream.predict(np.array([[5]]), verbose=0)
        stream.reset_state()
        given = np.array([[3, 1, 4]])
        found = np.concatenate([stream.predict(given[:, i : i + 1], verbose=0) for i in range(3)], axis=1)
        assert np.abs(found - ops.convert_to_numpy(model(given))).max() <= 1e-6
        assert len(recorded) == graphs and all(recorded)

    check(graphs=1)
    for variable in model.trainable_variables:
        variable.assign(variable.value * 1.5 + 0.01)
    check(graphs=1)
    model.backbone.enable_lora(2)
    for variable in model.trainable_variables:
        variable.assign(variable.value + 0.1)
    check(graphs=2)


@pytest.mark.parametrize("per_launch", [1, 4])
def test_launches_of_several_steps(per_launch, monkeypatch):
    """What a GPU captures: steps whose tensors stay in their places, several at a time, past blocks and stop tokens."""
    import torch

    model, launched = make_model(), []
    stream = keras_fam.StreamingModel(model, batch_size=2)
    prompt = [[1, 2, 3], [4, 5, 6]]
    options = {"sampler": keras_fam.samplers.TopKSampler(4, temperature=3.0), "seed": 3, "max_new_tokens": 40}
    expected = stream.generate(prompt, **options)
    stops = [expected[0][9]]
    stream.reset_state()
    stopped = stream.generate(prompt, stop_token_ids=stops, **options)
    state = keras.tree.flatten((stream.state, stream.next_logits))

    def capture(run):
        outputs = run()  # a graph has outputs of its own, and steps run without effect before it is captured

        def replay():
            launched.append(len(outputs))
            for output, new in zip(outputs, run(), strict=True):
                output.copy_(new)
            return outputs

        return replay

    class Captured(TokenLoop):
        def __init__(self, step_of, **options):
            super().__init__(step_of, capture=capture, tokens_per_launch=per_launch)

    monkeypatch.setattr(backend, "TokenLoop", Captured)
    vars(model).pop("_programs_of_streams")
    stream.reset_state()
    assert stream.generate(prompt, **options) == expected
    assert launched and (max(launched) > 1) == (per_launch > 1)
    stream.reset_state()
    assert stream.generate(prompt, stop_token_ids=stops, **options) == stopped
    pairs = zip(keras.tree.flatten((stream.state, stream.next_logits)), state, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_states_that_were_handed_out_stay_as_they_are():
    import torch

    stream = keras_fam.StreamingModel(make_model(), batch_size=2)
    stream.generate([[1, 2, 3], [4]], max_new_tokens=3 * WARMUP_CALLS)
    state = keras.tree.flatten(stream.state)
    before = [x.clone() for x in state]
    stream.generate(max_new_tokens=2 * S)
    for _ in stream.generate_stream(max_new_tokens=2 * S):
        pass
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_keys_lie_heads_first_while_tokens_are_decoded(monkeypatch):
    """On a CPU products with them are faster so. Other programs are handed one layout, for which they are recorded."""
    if backend.platform() != "cpu":  # other layouts were measured on a CPU alone: elsewhere none is chosen
        pytest.skip("on a GPU tensors stay in order")
    calls = []
    kind_of = TracedFunction._kind_of_flat

    def noted(leaves):
        calls.append(kind_of(leaves))
        return calls[-1]

    monkeypatch.setattr(TracedFunction, "_kind_of_flat", staticmethod(noted))
    stream = keras_fam.StreamingModel(make_model(), batch_size=2)
    stream.predict(np.array([[1, 2, 3], [4, 5, 6]]), verbose=0)
    stream.predict(np.array([[7], [8]]), verbose=0)
    before = calls[-1]
    stream.generate(max_new_tokens=3)
    keys = [x for x in keras.tree.flatten(stream.state) if x.ndim == 4]
    assert keys and all(x.stride(2) >= x.shape[1] * x.stride(1) for x in keys)
    stream.predict(np.array([[7], [8]]), verbose=0)
    assert calls[-1] == before


def branches_on_values(x):
    return x * 2 if float(x.sum()) > 0 else x


def reads_values_with_numpy(x):
    return x + float(x.detach().cpu().numpy().sum())


@pytest.mark.parametrize("reads_values", [branches_on_values, reads_values_with_numpy])
def test_what_cannot_be_recorded_goes_on(reads_values):
    import torch

    run = TracedFunction(reads_values, [])
    for sign in (1.0, -1.0) * WARMUP_CALLS:
        x = torch.full((2,), sign)
        assert torch.equal(run(x), reads_values(x))
    assert list(run.graphs.values()) == [()]


def test_simplified_graph():
    """Constants are computed once, equal ones kept once; what is written in place is left alone."""
    import torch

    weight = keras.Variable(np.array([1.0, 2.0]), trainable=False)

    device = weight.value.device

    def function(x):
        count = torch.arange(2, device=device) + 1
        held = torch.zeros(2, device=device)
        held.add_(x)
        return held + count, (x + weight.value) * (torch.arange(2, device=device) + 1), x + weight.value

    run = TracedFunction(function, [weight])
    for i in range(WARMUP_CALLS + 3):
        x = torch.tensor([float(i), 1.0], device=device)
        for a, b in zip(run(x), function(x), strict=True):
            assert torch.equal(a, b)
    ((graph, _),) = run.graphs.values()
    targets = [node.target for node in graph.graph.nodes]
    assert "arange" not in str(targets) and targets.count(torch.add) == 2
    assert len(dict(graph.named_buffers())) <= 2  # 1 and 2; zeros are made for each write
    weight.assign([5.0, 6.0])
    assert torch.equal(run(x)[2], x + torch.tensor([5.0, 6.0], device=device))


def test_operations_called_directly():
    """Every operation that is called by another function, with scalars and options as they come, to the bit."""
    import torch
    from torch.nn.functional import embedding, silu

    rows = torch.arange(6) % 3

    def function(x, y):
        a = torch.add(x, y, alpha=3) - 2 * y + torch.sub(1.0, x) + 2.0**x + torch.pow(x, 2) + x**y
        b = torch.div(x, y, rounding_mode="floor") + (-x) / 3 + x.clamp(-0.5, 0.5) + x.clamp(min=y) + x.exp() + silu(x)
        c = x @ y.T + torch.addmm(x, x, y, beta=2)
        d = torch.bmm(x[None], y.T[None]) + x.mean() + x.sum() + x.mean(1, keepdim=True) + x.sum(0, keepdim=True)[:, :6]
        held = torch.zeros_like(x)
        held.add_(x, alpha=2).mul_(y).div_(3.0).add_(1)
        held.index_put_((rows,), x, accumulate=True)
        masks = [
            x < y,
            x <= 0,
            x > y,
            x >= 0.5,
            x == y,
            torch.logical_not(x > 0) & (y > 0),
            torch.logical_and(x > 0, y > 0),
        ]
        chosen = [torch.where(mask, x, y) for mask in masks] + [torch.where(masks[0], x, 0.0)]
        e = torch.softmax(x, -1) + torch.cat([x, y])[:6] + torch.stack([x, y], 1)[:, 1] + x.roll([2, 1], [0, 1])
        f = embedding(torch.argmax(x, -1), y), torch.argmax(x), x.clone(), torch.rsqrt(x.abs() + 1), -x
        return a, b, c, d, held, *chosen, e, *f, x.T.as_strided((2, 3), (1, 2), 1)

    generator, device = torch.Generator().manual_seed(0), keras.ops.zeros(1).device
    x, y = (torch.rand((6, 6), generator=generator).to(device) for _ in range(2))
    rows = rows.to(device)
    run = TracedFunction(function, [], calls_before=1)
    run(x, y)
    ((graph, _),) = run.graphs.values()
    for a, b in zip(run(x, y), function(x, y), strict=True):
        assert torch.equal(a, b)
    left = {getattr(node.target, "overloadpacket", None) for node in graph.graph.nodes}
    assert not {packet.__name__ for packet in left if packet} & DIRECT
