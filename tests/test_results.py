"""The pages of results: links and commands point at something, and tables say what the recorded files say."""

import collections
import json
import pathlib
import re

import numpy as np
import pytest
from support import on_one_backend

pytestmark = on_one_backend
ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"
PAGES = sorted(RESULTS.glob("*.md"))


def recorded(name):
    return json.loads((RESULTS / "json" / f"{name}.json").read_text())


def rows(page, *starts):
    """Cells of the first table row of a page that begins with each of `starts`, without Markdown's marks."""
    lines = [re.sub(r"[*ᵃᵇ]", "", line) for line in (RESULTS / f"{page}.md").read_text().splitlines()]
    for start in starts:
        line = next((line for line in lines if line.startswith(f"| {start}")), None)
        assert line, f"{page}.md has no row that begins with {start!r}"
        yield [cell.strip() for cell in line.strip("|").split("|")][1:]


def says(cells, expected, digits=1):
    """The numbers in the cells are the expected ones, rounded to as many digits as they show, at most `digits`."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join(cells))
    expected = list(expected)
    assert len(found) == len(expected), (cells, expected)
    for number, value in zip(found, expected, strict=True):
        places = len(number.partition(".")[2])
        assert places <= digits, number
        assert abs(float(number.replace(",", "")) - value) <= 0.5 * 10**-places + 1e-9, (number, value)


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_and_commands_point_at_something(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link
    commands, scripts = text.split("## Older names")[0], r"(?:examples|tests)/[\w/]+\.py"
    for script in re.findall(scripts, commands):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m (examples[\w.]+)", commands):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_recorded_file_and_plot_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    files = [path for kind in ("json", "png", "gif") for path in RESULTS.rglob(f"*.{kind}")]
    assert len(files) > 50
    assert not [path.name for path in files if path.name not in text]


def test_every_page_is_in_the_index():
    index = (RESULTS / "README.md").read_text()
    assert not [page.name for page in PAGES if page.name != "README.md" and f"({page.name}" not in index]


def test_plots_are_drawn_from_the_recorded_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    from examples.figures import redraw

    redraw.main(["--out", str(tmp_path)])
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(f"{name}.png" for name in redraw.PLOTS)
    assert all((RESULTS / "png" / name).exists() for name in drawn)


def percent(values):
    return [100 * value for value in values]


def test_passkey():
    exact = recorded("passkey")["exact"]
    titles = ['FAM, `memory_update="hard_gate"`', "the same, memory zeroed", "the same, memory shuffled"]
    recipe, ablated, shuffled, paper, bswa = rows("passkey", *titles, "FAM, the paper's form |", "BSWA with")
    says(recipe, percent(exact["FAM (hard gate)"]))
    assert not any(exact[f"FAM (hard gate), memory {how}"][i] for how in ("zeroed", "frozen") for i in range(3))
    says(ablated[:3], [0, 0, 0])
    says(shuffled[:3], percent(exact["FAM (hard gate), memory shuffled"][:3]))
    says(paper, percent(exact["FAM (paper)"]))
    says(bswa, percent(exact["BSWA"]))


def test_passkey_at_length():
    found, before = recorded("passkey_length"), recorded("passkey_length_binary")
    exact, earlier = found["exact"][found["drawn"]], before["exact"][before["drawn"]]
    gate = exact["FAM (hard gate)"]
    assert list(gate) == ["1", "4", "16", "64", "256", "1000"]
    for seed, cells in zip("012", rows("passkey", "seed 0", "seed 1", "seed 2"), strict=True):
        says(cells, percent(gate[factor][seed] for factor in gate))
    (mean,) = rows("passkey", "mean |")
    says(mean, percent(sum(of_seed.values()) / 3 for of_seed in gate.values()))
    right = round(64 * sum(gate["1000"].values()))
    assert f"{right} of 192 keys" in (ROOT / "README.md").read_text()
    (paper,) = rows("passkey", "FAM, the paper's form, seed 0")
    says(paper[:4], percent(of_seed["0"] for of_seed in earlier["FAM (paper)"].values()))
    ablated = [line for name, line in exact.items() if "memory" in name]
    assert len(ablated) == 3 and not any(
        value for line in ablated for of_seed in line.values() for value in of_seed.values()
    )


def test_passkey_of_the_systems():
    found = recorded("passkey_systems")
    shown = [found["filler_tokens"].index(n) for n in (44, 108, 364, 748, 1516, 3052)]
    titles = {"M0": "BSWA M0", "M1": "BSWA M1 (", "M1_SG": "BSWA M1, stop", "M2": "BSWA M2 |", "M4": "BSWA M4 |",
              "FM1": "FM 1", "FM2": "FM 2 |", "SUM": "SUM FAM", "RMT": "RMT",
              "FAM": "FAM, the paper's form | 100 | 98.4",
              "FAM_N": "FAM, `keras_fam.Normalized(noise=0.3)`",
              "HG": 'FAM, `memory_update="hard_gate"`' + 6 * " | 100",
              "HG_A": '`fam_query="anchored"`, hard', "HG_L": '`fam_query="layer_inputs"`, hard'}  # fmt: skip
    assert set(titles) == set(found["systems"])
    for name, cells in zip(titles, rows("passkey", *titles.values()), strict=True):
        says(cells, [100 * found["systems"][name]["exact"][i] for i in shown])


def test_recall():
    runs = recorded("recall")["runs"]
    lines = (RESULTS / "recall.md").read_text().splitlines()
    names = {"FAM, normalized": "FAM, normalized", "FAM, paper's form": "FAM (paper)", "RMT": "RMT",
             "BSWA, one segment": "BSWA, one segment"}  # fmt: skip
    for task in ("remember", "rewrite"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"| {task} |"))
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 6]]
        for (title, recorded_name), (name, *cells) in zip(names.items(), table, strict=True):
            run = runs[f"{task}, {recorded_name}, seed 0"]
            assert name == f"{title} ({run['steps']:,}; {run['state_numbers']:,})"
            says(cells, percent(run["exact"]))
    ablated = [value for run in runs.values() for line in run.get("knock_outs", {}).values() for value in line]
    assert max(ablated) < 0.095


def test_laboratory():
    systems, text = ("memory", "closed", "zeroed", "other", "ago"), (RESULTS / "laboratory.md").read_text()
    for name, start in (("laboratory_city", ""), ("laboratory_city_and_books", "with books: ")):
        (run,) = recorded(name)["runs"].values()
        titles = [f"{start}{times} times, {measured['tokens']:,}" for times, measured in run["needles"].items()]
        for measured, cells in zip(run["needles"].values(), rows("laboratory", *titles), strict=True):
            says(cells, [100 * measured["exact"]["Needle"][system] for system in systems])
        assert all(f"{run['text']['nats'][system]['mean']:.2f}" in text for system in ("memory", "base"))
    run = recorded("laboratory_city")["runs"]["anchored, seed 0"]
    assert all(f"{count}" in text for count in run["steps by blocks"].values()) and f"{run['steps']:,} steps" in text
    (shares,) = recorded("laboratory_attention")["shares"].values()
    for (_, values), cells in zip(shares.items(), rows("laboratory", *shares), strict=True):
        says(cells, [100 * value for value in values])


def test_books():
    lines = (RESULTS / "books.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| Austen: BSWA"))
    systems = ["BSWA", "FAM, normalized"]
    systems += [f"FAM, normalized, memory {how}" for how in ("shuffled", "frozen", "zeroed")]
    sources = [recorded("books")["report"][source]["systems"] for source in ("Austen", "King James")]
    found = [source[name]["bits_per_byte"] for source in sources for name in systems]
    for line, bits in zip(lines[start:], found, strict=False):
        pairs = zip(bits["mean"], bits["spread"], strict=True)
        says(line.strip("|").split("|")[1:], [value for pair in pairs for value in pair], digits=3)


def test_smollm2():
    found = recorded("smollm2_perplexity")
    names = {"full attention, before": "full attention", "sliding window of 256, before": "sliding window 256",
             "BSWA, before": "BSWA", "FAM, before": "FAM", "BSWA + LoRA": "BSWA + LoRA", "FAM + LoRA |": "FAM + LoRA",
             "FAM + LoRA, memory zeroed": "FAM + LoRA, zeroed", "FAM + LoRA, memory shuffled": "FAM + LoRA, shuffled",
             }  # fmt: skip
    for name, cells in zip(names.values(), rows("smollm2", *names), strict=True):
        says(cells, [*found[name]["by position"].values(), found[name]["beyond"]])
    lines = (RESULTS / "smollm2.md").read_text().replace("*", "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| sliding window of 256, before | 73.6"))
    for line, name in zip(lines[start:], ("window", "BSWA", "FAM", "BSWA_lora", "FAM_lora"), strict=False):
        found = recorded(f"smollm2_stream_{name}")["perplexity by ten thousand tokens"]
        says(line.strip("|").split("|")[1:], found)


def test_speed():
    backends = recorded("speed")["backends"]
    names = {"JAX forward": ("jax", "forward"), "JAX train step": ("jax", "train"),
             "torch forward": ("torch", "forward"), "torch train step": ("torch", "train")}  # fmt: skip
    for (backend, what), cells in zip(names.values(), rows("speed", *names), strict=True):
        ours, by_hand = (backends[backend][what][name] for name in ("keras_fam", "by hand"))
        times = [value for of in (ours, by_hand) for value in (of["median"], min(of["all"]), max(of["all"]))]
        says(cells, [*times, ours["median"] / by_hand["median"]], digits=3)
    peers = recorded("peers")["systems"]
    names = ["keras_fam |", "KerasHub Llama", "Mistral", "RecurrentGemma", "x-transformers", "titans-pytorch",
             "recurrent-memory-transformer-pytorch", "JAX: keras_fam", "JAX: KerasHub Llama"]  # fmt: skip
    keys = ("prefill ms per token", "decode ms per token")
    for peer, cells in zip(peers.values(), rows("speed", *names), strict=True):
        times = [(peer[key], peer[key] / peers["keras_fam"][key]) for key in keys]
        says(cells, [peer["parameters"] / 1e6, *times[0], *times[1]], digits=3)
    lines = (RESULTS / "speed.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| JAX, plain"))
    for line, row in zip(lines[start:], recorded("backpropagation")["rows"], strict=False):
        _, memory, temporary, seconds, gradients = [cell.strip() for cell in line.strip("|").split("|")]
        says([memory], [row["peak_mib"], row["added_mib"]])
        says([temporary], [row["compiled_temp_mib"]] if "compiled_temp_mib" in row else [])
        says([seconds], [row["step_seconds"], row["time_ratio"]], digits=2)
        assert float(gradients or 0) == pytest.approx(row["gradient_difference"], rel=0.06, abs=0)


def test_operations_of_a_decoded_token():
    names = {"before": "operations per layer, before", "": "operations per layer, now"}
    for kind, cells in zip(names, rows("speed", *names.values()), strict=True):
        found = [recorded(f"kernels_{kind}_{b}" if kind else f"kernels_{b}") for b in ("jax", "torch")]
        says(cells[:1], [found[0]["operations_per_token_and_layer"]])
        says(cells[1:2], [found[1]["operations_per_token_and_layer"], found[1]["per_token_and_layer"]["views"]])
    beside = {"before": "beside the layers, before", "": "beside the layers, now"}
    for kind, cells in zip(beside, rows("speed", *beside.values()), strict=True):
        found = [recorded(f"kernels_{kind}_{b}" if kind else f"kernels_{b}") for b in ("jax", "torch")]
        says(cells, [each["operations_per_token_beside"] for each in found])
    jax, torch = (recorded(f"kernels_update_{b}") for b in ("jax", "torch"))
    (cells,) = rows("speed", "a memory update, per block")
    says(cells[:1], [jax["operations_per_update_and_layer"]])
    says(cells[1:2], [torch["operations_per_update_and_layer"], torch["per_update_and_layer"]["views"]])


def test_untrained_smollm2():
    found = recorded("smollm2_untrained")
    titles = {"BSWA, no sinks": "BSWA", "BSWA, 1 sink": "BSWA, 1 sink", "BSWA, 4 sinks": "BSWA, 4 sinks",
              "FAM, as": "FAM", "FAM, `fam_query": "FAM, the paper's form"}  # fmt: skip
    for name, cells in zip(titles.values(), rows("smollm2", *titles), strict=True):
        says(cells, found[name]["perplexity by ten thousand tokens"][:9])
    pairs = zip(*(found[name]["perplexity by ten thousand tokens"] for name in ("FAM", "BSWA, 4 sinks")), strict=False)
    assert all(fam <= 1.01 * plain for fam, plain in pairs)
    assert sum(cosine < 0.95 for cosine in found["cosines"]["cosines"]) == 18


def test_exactness():
    """Every recorded backend has its column, and nothing recorded is above what a test allows."""
    titles = {"float32: outputs": "float32 outputs", "float64: outputs": "float64 outputs",
              "chunks against the whole": "contract chunks", "gradients through": "contract gradients"}  # fmt: skip
    table = list(zip(titles.values(), rows("exactness", *titles), strict=True))
    paths = sorted((RESULTS / "json").glob("exactness_*.json"))
    assert paths
    for path in paths:
        column = ["jax", "torch", "tensorflow"].index(path.stem.removeprefix("exactness_"))
        found = {name: entry["difference"] for name, entry in json.loads(path.read_text())["largest"].items()}
        for name, cells in table:
            assert float(cells[column]) == pytest.approx(found[name], rel=0.06, abs=0), name
        for name in ("future", "padding", "rows"):
            assert found[f"contract {name}"] == 0
        for name, difference in found.items():
            assert difference <= (1e-10 if name.startswith("float64") else 1e-5), name


def test_several_processes():
    """The table has what was recorded of each engine and variant, all of it equal to 5 decimals."""
    names = {
        "JAX, `ModelParallel`": ("jax", "model"),
        "JAX, float64: `Model": ("jax_float64", "model"),
        "JAX, float64: `Data": ("jax_float64", "data"),
        "PyTorch, Keras": ("torch", "fit"),
        "PyTorch, `Dist": ("torch", "ddp"),
        "PyTorch, FSDP": ("torch", "fsdp"),
        "TensorFlow, `Multi": ("tensorflow", "fit"),
    }
    for (engine, variant), cells in zip(names.values(), rows("exactness", *names), strict=True):
        record = recorded(f"processes_{engine}")
        found, one = record["largest_difference"][variant], record["losses"]["one process"]
        expected = [found[name] for name in ("training, RSP 0.5", "training, carried state", "resumed")]
        assert [float(cell) for cell in cells] == pytest.approx(expected, rel=0.06, abs=0), (engine, variant)
        assert max(expected) <= 0.5e-5
        # Memories have a bound of their own: a record beyond it is kept as it is, and the page says so.
        assert record["same"] or (engine == "jax" and "NOT the same" in (RESULTS / "exactness.md").read_text())
        resumed = np.asarray(record["losses"][variant]["resumed"])
        assert np.abs(resumed - one["training, carried state"]).max() == pytest.approx(found["resumed"], abs=1e-9)


def test_accelerators():
    names = ["JAX prefill, tokens/s (share) | 8k", "| 32k", "| 131k"]
    gpu = {(r["backend"], r["task"], r["system"], r["length"]): r for r in recorded("gpu_h200")["results"]}
    for length, cells in zip((8192, 32768, 131072), rows("gpu", *names), strict=True):
        fam, bswa = (gpu["jax", "prefill", system, length] for system in ("fam", "bswa"))
        values = [(r["tokens_per_second"] / 1000, 100 * r["share"]) for r in (fam, bswa)]
        says([cell.replace("k", "") for cell in cells[1:3]], [*values[0], *values[1]])
    table = re.findall(r"^\| [18]B (?:train|stream|decode)\b.*$", (RESULTS / "tpu.md").read_text(), re.MULTILINE)
    for line, program in zip(table, recorded("tpu_compile")["programs"].values(), strict=True):
        cells = line.strip("|").split("|")
        sizes = [program[f"{part}_bytes"] / 1e9 for part in ("argument", "output", "temp", "total")]
        says(cells[3:7], sizes, digits=2)
        says([cells[8]], [program["compile_seconds"]])
        assert ("does not fit" in line) == (sizes[3] > 16 and "16 GB" in cells[7])


def test_server():
    drill, faults = recorded("server_drill"), recorded("server_store_faults")
    assert not drill["errors"] and drill["wrong_turns"] == drill["wrong_sessions"] == faults["wrong"] == 0
    assert drill["sessions"] == drill["sessions_stored"] == drill["arguments"]["sessions"]
    losses = collections.Counter(kill["kind"] for kill in drill["kills"])
    busy = sum(kill.get("running", 0) > 0 for kill in drill["kills"])
    attempts, recovery, took = faults["attempts"], drill["recovery_seconds"], drill["request_seconds"]
    kinds = ("guessed names", "stale owners", "damaged sessions")
    expected = {
        "turns, tokens": (drill["turns"], drill["tokens"]),
        "sessions, of these in": (drill["sessions"], drill["sessions_stored"]),
        "nodes killed; replicas": [losses[kind] for kind in ("node killed", "replica killed", "server resized")],
        "replicas killed while": (busy,),
        "turns without an answer": (len(drill["errors"]), len(drill["sent_again"])),
        "turns with other tokens": (drill["wrong_turns"],),
        "until all requests": (recovery["median"], recovery["largest"]),
        "requests per second": drill["requests_per_second"].values(),
        "calls of the store": (faults["store_calls"], faults["store_failures"]),
        "turns, of these": (faults["turns"], faults["wrong"]),
        "turns refused": (sum(faults["refused_turns"].values()),),
        "of these, answered": (faults["replayed"], faults["resumed"]),
        **{kind: (attempts[f"{kind}, tried"], attempts[f"{kind}, refused"]) for kind in kinds},
    }
    for cells, values in zip(rows("server", *expected), expected.values(), strict=True):
        says(cells, values)
    says(next(rows("server", "a request, seconds: median"))[:1], [took["median"], took["p99"]], digits=2)
    assert all(attempts[f"{kind}, tried"] == attempts[f"{kind}, refused"] for kind in kinds)
    found = [recorded(f"server_batching_{backend}") for backend in ("jax", "torch")]
    for i, sessions in enumerate(found[0]["arguments"]["sessions"]):
        values = []
        for record in found:
            one = record["throughput"][i]
            assert one["equal"] and one["sessions"] == sessions
            values += [one["tokens_per_second"]["engine"], one["tokens_per_second"]["private"], one["ratio"]]
            assert sessions < 8 or one["ratio"] > 1, "batching wins"
        says(next(rows("server", f"{sessions} sessions")), values, digits=2)
    assert max(record["long_prompt"]["largest_steps"] for record in found) == 1


def test_long_context():
    found = recorded("long_context")
    lines = (RESULTS / "long_context.md").read_text().splitlines()
    for cell in found["cells"]:
        start = f"| {cell['task']} | {cell['length']:,} |"
        (line,) = (line for line in lines if line.startswith(start))
        says(line.removeprefix(start).strip("|").split("|"), [100 * sum(x) / len(x) for x in cell["scores"].values()])
