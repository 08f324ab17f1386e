"""Every measured figure in the README equals what docs/results says."""

import csv
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs/results"


def test_readme_figures_are_as_measured():
    measured = json.loads((RESULTS / "smollm2_32k.json").read_text())
    beyond = measured["perplexity_beyond_8192"]
    claim = re.search(r"falls from\s+([\d.]+) to ([\d.]+)", README)
    assert (float(claim[1]), float(claim[2])) == (beyond["before"], beyond["after"])
    with (RESULTS / "smollm2_32k_kv_bytes.csv").open() as file:
        rows = {int(row["length"]): float(row["saved_percent"]) for row in csv.DictReader(file)}
    saved = re.search(r"at ([\d,]+) tokens is ([\d.]+)% smaller", README)
    assert rows[int(saved[1].replace(",", ""))] == float(saved[2])
    assert measured["kv_bytes_saved_percent_at_32768"] == float(saved[2])
    needles = re.search(r"found in (\d+)% of the cases, before in none", README)
    scores = measured["niah_score"]
    assert (scores["final"]["32768"], scores["base"]["32768"]) == (float(needles[1]), 0)
    documents = re.search(r"On (\d+) held-out documents", README)
    assert measured["perplexity_documents"] == int(documents[1])
    millions = re.search(r"with (\d+)M tokens", README)
    assert round(measured["training_tokens"] / 1e6) == int(millions[1])


def test_a_checkpoints_cost_is_as_measured():
    text = " ".join((ROOT / "docs/several_gpus.md").read_text().split())
    measured = json.loads((RESULTS / "checkpoint_1b.json").read_text())["figures"]
    for pattern, key in (
        (r"stands still for ([\d.]+) s", "seconds_blocked"),
        (r"the first time ([\d.]+) s", "seconds_blocked_first_save"),
        (r"writing takes ([\d.]+) s", "seconds_in_the_background"),
        (r"([\d.]+) bytes per parameter", "bytes_per_parameter"),
    ):
        assert float(re.search(pattern, text)[1]) == round(
            measured[key], 4 if "bytes" in key else 2
        )
    assert re.search(r"model of ([\d.]+) billion", text)[1] == f"{measured['parameters'] / 1e9:.2f}"


def test_training_speed_is_as_measured():
    with (RESULTS / "train_step_h200.csv").open() as file:
        found = list(csv.DictReader(file))
    rows = {(row["arm"], row["length"]): row for row in found if row["documents"] == "one"}
    page = (ROOT / "docs/memory.md").read_text()
    table = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| ([\d,]*) ?\| ([\d.]*) ?\|", page, re.M)
    assert len(table) == len([key for key in rows if key[0] == "hybrid"])
    told = re.search(r"at ([\d,]+) tokens/s on one H200, ([\d.]+) times as fast", README)
    for length, *speeds, ratio in [*table, ("131,072", told[1], "3,560", told[2])]:
        length = length.replace(",", "")
        for arm, speed in zip(("hybrid", "full"), speeds, strict=True):
            measured = rows.get((arm, length), {}).get("tokens_per_second_per_gpu")
            assert speed == (f"{float(measured):,.0f}" if measured else "")
        measured = rows["hybrid", length]["hybrid_over_full"]
        assert ratio == (f"{float(measured):.2f}" if measured else "")
    steps = re.search(r"takes ([\d.]+) s \(([\d.]+)% MFU\) and ([\d.]+) s \(([\d.]+)%\)", page)
    for arm, seconds, share in (("hybrid", *steps.groups()[:2]), ("full", *steps.groups()[2:])):
        row = rows[arm, "131072"]
        assert seconds == f"{float(row['step_seconds']):.1f}"
        assert share == f"{100 * float(row['mfu']):.1f}"
    packed = {(row["arm"], row["document_mask"]): row for row in found if row["documents"] != "one"}
    for mask, words in (("True", "among themselves"), ("False", "the whole row")):
        told = re.search(
            rf"{words}: ([\d,]+) and ([\d,]+) tokens/s, ([\d.]+) times", " ".join(page.split())
        )
        rows = [packed[arm, mask] for arm in ("hybrid", "full")]
        speeds = [f"{float(row['tokens_per_second_per_gpu']):,.0f}" for row in rows]
        assert [*speeds, f"{float(rows[0]['hybrid_over_full']):.2f}"] == list(told.groups())


def test_the_plans_errors_are_as_measured():
    with (RESULTS / "plan_against_measured.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs/memory.md").read_text()
    span = r"([+-][\d.]+)% to ([+-][\d.]+)%"
    told = re.findall(rf"^\| (H\d+),[^|]*\| (\d+) \| {span} \| {span} \|", page, re.M)
    assert sum(int(count) for _, count, *_ in told) == len(rows)
    for gpu, count, *errors in told:
        of = [row for row in rows if row["gpu"] == f"NVIDIA {gpu}"]
        if len(of) != int(count):
            offload = str(int(count) == 2)
            of = [row for row in of if row["optimizer_offload"] == offload]
        assert len(of) == int(count)
        memory = sorted(100 * float(row["gpu_error"]) for row in of)
        times = sorted(100 * float(row["step_error"]) for row in of)
        ends = (memory[0], memory[-1], times[0], times[-1])
        assert [f"{end:+.1f}" for end in ends] == errors
        assert max(map(abs, memory)) < 10


def test_the_switches_figures_are_as_measured():
    with (RESULTS / "plan_against_measured.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["layers"] == "4"]
    page = (ROOT / "docs/memory.md").read_text()
    table = re.findall(r"^\| (`(?:none|attention|full)`.*) \|" + r" ([\d.]+) \|" * 4, page, re.M)
    assert len(table) == len(rows)
    keys = ("planned_gpu_gb", "measured_gpu_gb", "planned_step_seconds", "measured_step_seconds")
    for row, (switches, *figures) in zip(rows, table, strict=True):
        assert f"`{row['recompute']}`" in switches and (row["mlp_tile"] or "`") in switches
        for name in ("offload_activations", "optimizer_offload"):
            assert (f"`{name}`" in switches) == (row[name] == "True")
        assert figures == [row[key] for key in keys]


def test_the_128k_row_on_80_gb_is_as_measured():
    with (RESULTS / "train_step_h100.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["group"] == "offloaded")
    page = " ".join((ROOT / "docs/memory.md").read_text().split())
    told = re.search(
        r"([\d.]+) s a step, ([\d,]+) tokens/s, ([\d.]+)% MFU \(.*?\), ([\d.]+) GB of the GPU "
        r"and ([\d.]+) GB of the host's",
        page,
    )
    assert list(told.groups()) == [
        f"{float(row['step_seconds']):.1f}",
        f"{float(row['tokens_per_second_per_gpu']):,.0f}",
        f"{100 * float(row['mfu']):.1f}",
        f"{int(row['device_peak_allocated_bytes']) / 1e9:.1f}",
        f"{int(row['host_peak_bytes']) / 1e9:.1f}",
    ]


def test_before_and_after_is_as_measured():
    measured = json.loads((RESULTS / "smollm2_before_after.json").read_text())["runs"]
    before, after = measured["before"], measured["after"]
    page = (ROOT / "docs/memory.md").read_text()
    table = re.findall(r"^\| (\d) \| (1[\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page, re.M)
    assert table == [
        (str(step), f"{a:.6f}", f"{b:.6f}", f"{s:.1f}", f"{t:.1f}")
        for step, (a, b, s, t) in enumerate(
            zip(
                *(before["losses"], after["losses"]),
                *(before["step_seconds"], after["step_seconds"]),
                strict=True,
            ),
            start=1,
        )
    ]
    apart = max(abs(a - b) for a, b in zip(before["losses"], after["losses"], strict=True))
    told = re.search(r"differ by ([\d.e-]+) at most", page)
    assert float(told[1]) == float(f"{apart:.1e}")
    peaks = re.search(r"([\d.]+) GB of\s+the GPU became ([\d.]+) GB", page)
    key = "device_peak_allocated_bytes"
    assert list(peaks.groups()) == [f"{run[key] / 1e9:.1f}" for run in (before, after)]


def test_layouts_on_one_gpu_are_as_measured():
    with (RESULTS / "shared_gpu_h200.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    page = (ROOT / "docs/several_gpus.md").read_text()
    found = r"^\| ([\d,]+) \| (one|two).* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
    table = re.findall(found, page, re.M)
    of_7b = [row for name, row in rows.items() if name.startswith("7b")]
    peak = "device_peak_allocated_bytes"
    taken = {name: int(row[peak]) / 1e9 for name, row in rows.items()}
    assert table == [
        (
            f"{int(row['length']):,}",
            {"1": "one", "2": "two"}[row["world"]],
            row["first_loss"],
            row["planned_allocated_gb"],
            f"{taken[row['run']]:.1f}",
        )
        for row in of_7b
    ]
    for row in of_7b:
        same = [other for other in of_7b if other["length"] == row["length"]]
        assert abs(float(row["first_loss"]) - float(same[0]["first_loss"])) < 2e-3
    page = " ".join(page.split())
    assert f"took {taken['70b_tp2']:.1f} GB a rank" in page
    assert f"tokens, {rows['70b_tp2']['planned_allocated_gb']} planned" in page
    six, twelve = rows["70b_half_6"], rows["70b_half_12"]
    seconds = [float(row["step_seconds"]) for row in (twelve, six)]
    assert f"{seconds[0]:.2f} s a step with 12 layers and {seconds[1]:.2f} s with six" in page
    planned = [float(row["planned_step_seconds"]) for row in (twelve, six)]
    a_layer = [(of[0] - of[1]) / 6 for of in (seconds, planned)]
    assert "so {:.2f} s a layer ({:.2f} planned)".format(*a_layer) in page
    gb = [taken["70b_half_12"], taken["70b_half_6"]]
    wanted = [float(row["planned_allocated_gb"]) for row in (twelve, six)]
    a_layer = [(of[0] - of[1]) / 6 for of in (gb, wanted)]
    assert "{:.2f} GB a layer ({:.2f} planned)".format(*a_layer) in page


def test_the_soaks_figures_are_as_measured():
    text = " ".join((ROOT / "docs/slurm.md").read_text().split())
    measured = json.loads((RESULTS / "slurm_soak.json").read_text())
    claim = re.search(
        r"killed (\d+) times, on average ([\d.]+) s apart, where a restart took ([\d.]+) s. "
        r"Effective training time was ([\d.]+)%, ([\d.]+)% as simulated",
        text,
    )
    keys = ("kills", "seconds_between_kills", "seconds_of_a_restart")
    assert [float(number) for number in claim.groups()[:3]] == [measured[key] for key in keys]
    shares = [measured[f"effective_{how}"] for how in ("measured", "simulated")]
    assert [claim[4], claim[5]] == [f"{100 * share:.1f}" for share in shares]
    assert abs(shares[0] - shares[1]) < 0.03


def test_data_preps_figures_are_as_measured():
    text = " ".join((ROOT / "docs/data.md").read_text().split())
    with (RESULTS / "data_prep.csv").open() as file:
        rows = {(row["tokenizer"], row["engine"]): row for row in csv.DictReader(file)}
    for kind, name in (("byte_level", "byte-level BPE"), ("sentencepiece", "SentencePiece")):
        told = re.search(rf"\| {name} \([^)]*\) \| ([\d.]+) times \| ([\d.]+) times", text)
        found = [rows[kind, peer]["ours_over_it"] for peer in ("datatrove", "datasets")]
        assert [told[1], told[2]] == found
        for peer in ("datatrove", "datasets"):
            ratio = int(rows[kind, "data_prep"]["tokens_per_cpu_second"]) / int(
                rows[kind, peer]["tokens_per_cpu_second"]
            )
            assert abs(ratio - float(rows[kind, peer]["ours_over_it"])) < 0.01
            assert (
                f"{peer} {re.search(rf'against {peer} ([0-9.]+)', text)[1]}"
                in rows[kind, peer]["version"]
            )
    measured = json.loads((RESULTS / "data_prep.json").read_text())
    real, memory = measured["real_corpus"], measured["peak_memory"]
    line = memory["json_line_of_1_gb"]
    for pattern, value in (
        (r"([\d,]+) tokens into", f"{real['tokens_read']:,}"),
        (r"into ([\d,]+) rows", f"{real['rows']:,}"),
        (r"took ([\d.]+) CPU seconds", str(real["cpu_seconds"])),
        (r"seconds: ([\d.]+)M tokens a CPU", f"{real['tokens_per_cpu_second'] / 1e6:.2f}"),
        (r"([\d.]+)% full", str(real["fill_percent"])),
        (r"([\d.]+)% of the tokens", str(real["all_sources"]["percent_in_documents_over_32k"])),
        (r"over 32K, ([\d.]+)%", str(real["all_sources"]["percent_in_documents_over_128k"])),
        (r"takes (\d+) MiB in one", str(memory["plain_text_of_1_gb"]["workers_1_mib"])),
        (r"which (\d+) are there", str(memory["two_texts_of_a_few_words"]["workers_1_mib"])),
        (r"document; (\d+) MiB in", str(memory["plain_text_of_1_gb"]["workers_2_mib_together"])),
        (r"line of 1 GB takes (\d+) MiB", str(line["workers_1_mib"])),
        (r"one process, (\d+) in three", str(line["workers_2_mib_together_at_most"])),
    ):
        assert re.search(pattern, text)[1] == value


def test_kv_bytes_are_the_patterns():
    """The measured cache is what the pattern's definition says, to the byte."""
    with (RESULTS / "smollm2_32k_kv_bytes.csv").open() as file:
        for row in csv.DictReader(file):
            length = int(row["length"])
            token = 2 * 3 * 64 * 2
            assert int(row["full_bytes"]) == 30 * length * token
            live = 12 * length + 18 * min(length, 64 + 2047)
            assert int(row["allocated_bytes"]) == live * token


def test_files_the_readme_names_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
            assert (page.parent / name.split("#")[0]).exists(), name
    for line in re.findall(r"(?<=```\nconf/)(.*?)```", README, flags=re.S)[0].splitlines():
        folder = line.split("/")[0] if re.match(r"\w+/", line) else None
        if folder:
            assert (ROOT / folder).is_dir(), folder


def test_servings_figures_are_as_measured():
    with (RESULTS / "serving_h200.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["decode_ms"]]
    page = " ".join((ROOT / "docs/serving.md").read_text().split())
    single = {
        (row["arm"], f"{int(row['length']):,}"): row
        for row in rows
        if row["batch"] == "1" and row["group"] in ("prompt_128k", "lengths", "longer")
    }

    def told(row, key, unit=1):
        return f"{float(row[key]) / unit:.2f}"

    for length in {length for _, length in single}:
        measured = [single.get((arm, length)) for arm in ("hybrid", "full", "stock")]
        present = [row for row in measured if row]
        over = [
            f" {float(measured[0][key]):.2f} " if measured[1] else " "
            for key in ("prefill_over", "decode_over")
        ]
        cells = [
            ", ".join(told(row, "prefill_seconds") for row in present),
            over[0].strip(),
            ", ".join(told(row, "decode_ms") for row in present),
            over[1].strip(),
            ", ".join(told(row, "cache_live_bytes", 1e9) for row in present[:2]),
        ]
        assert " ".join(f"| {length} | {' | '.join(cells)} |".split()) in page
    for row in rows:
        if row["arm"] != "stock":
            assert row["cache_live_bytes"] == row["cache_live_bytes_by_pattern"]
    full = single["full", "131,072"]
    strided = next(row for row in rows if row["group"] == "strided")
    for pattern, row in (("cache is", single["hybrid", "131,072"]), ("=strided`\\)", strided)):
        saved = 100 * (1 - int(row["cache_live_bytes"]) / int(full["cache_live_bytes"]))
        assert re.search(rf"{pattern} ([\d.]+)%", page)[1] == f"{saved:.1f}"
    four = next(row for row in rows if (row["batch"], row["length"]) == ("4", "131072"))
    speeds = [float(row["decode_tokens_per_second"]) for row in (four, full)]
    claim = re.search(r"row does: ([\d.]+) tokens/s beside ([\d.]+), ([\d.]+) times", page)
    assert list(claim.groups()) == [
        f"{speeds[0]:.1f}",
        f"{speeds[1]:.1f}",
        f"{speeds[0] / speeds[1]:.2f}",
    ]


def test_evaluations_figures_are_as_measured():
    measured = json.loads((RESULTS / "evaluation_h100.json").read_text())
    seconds = measured["suite_32k"]["seconds_with_start"]
    assert sum(measured["suite_32k"]["seconds"].values()) < seconds
    minutes = re.search(r"`suite_32k` of 135M in ([\d.]+) minutes", README)[1]
    assert minutes == f"{seconds / 60:.1f}"
    with (RESULTS / measured["stock_8k"]["scores"]).open() as file:
        rows = list(csv.DictReader(file))
    ruler = [row for row in rows if row["task"] == "ruler"]
    assert len(ruler) == 13 * 3 and {int(row["samples"]) for row in ruler} == {50}
    assert {row["subtask"] for row in rows if row["task"] == "niah"} == {"1 needle", "4 needles"}


def test_the_plan_of_eight_gpus_is_as_recorded():
    with (RESULTS / "eight_gpus_planned.csv").open() as file:
        rows = {(row["layout"], row["arm"]): row for row in csv.DictReader(file)}
    page = (ROOT / "docs/several_gpus.md").read_text()
    for layout in {name for name, _ in rows}:
        pair = [rows[layout, arm] for arm in ("hybrid", "full")]
        cells = [
            ", ".join(f"{float(row['step_seconds']):.2f}" for row in pair),
            ", ".join(f"{int(row['tokens_per_second_per_gpu']):,}" for row in pair),
            ", ".join(f"{row['mfu_percent']}%" for row in pair),
            ", ".join(f"{row['communication_percent']}%" for row in pair),
            pair[0]["gpu_gb"],
        ]
        assert f"| {layout} | {' | '.join(cells)} |" in page


def test_the_demos_figures_are_as_measured():
    measured = json.loads((RESULTS / "demo.json").read_text())
    text = " ".join(README.split())
    claim = re.search(
        r"at 4 to 8 times the old length falls from ([\d.]+) to ([\d.]+) \(within it: ([\d.]+)\), "
        r"and of the needles further back than the window the hybrid finds ([\d.]+)%, "
        r"the control ([\d.]+)%, after (\d+) seconds",
        text,
    )
    first = measured["make_demo"]
    told = [first["perplexity_far"][model] for model in ("base", "final")]
    told += [first["perplexity_near"]["final"], first["needles"]["final"]]
    assert [float(number) for number in claim.groups()[:4]] == told
    assert float(claim[5]) == first["needles"]["demo_window"]
    assert int(claim[6]) == first["seconds"] < 300
    for run in [first, *measured["seeds"]]:
        far, near = run["perplexity_far"], run["perplexity_near"]
        assert far["base"] >= 5 * near["base"] and far["final"] <= 1.15 * near["final"]
        assert run["needles"]["final"] >= 90 and run["needles"].get("demo_window", 0) <= 30
