"""The page and its files, from a real conversion and from results that are written by hand."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests import tiny
from vllm_requant.cli import app
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.report.drawing import write_svg
from vllm_requant.offline.report.evidence import Evidence, EvidenceError, place
from vllm_requant.offline.report.figures import conversion_figures, result_figures
from vllm_requant.offline.save import REPORT_NAME, convert_and_save, record_evaluation

VOID = {"meta", "br", "link"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    lm = load_causal_lm(str(tiny.save(folder / "in", "qwen3_moe")))
    recipe = Recipe(bits=3, num_samples=4, seq_len=24, nodes=2, outliers=0.01, significant=0.004, tune_epochs=0)
    convert_and_save(lm, folder / "converted", recipe)
    return folder / "converted"


def results(folder: Path) -> Path:
    def row(name: str, bits: float, perplexity: float) -> dict[str, Any]:
        score = {"perplexity": perplexity, "reference_perplexity": 20.0, "kl_divergence": perplexity / 100}
        return {"name": name, "bits_per_weight": bits, "nnz": 5, "scores": {"text <1>": score}}

    rows = [row("rtn-3", 3.3, 900.0), row("rtn-3-requant", 3.3, 25.0), row("rtn-3-by-random", 3.3, 30.0)]
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def tables(folder: Path) -> Path:
    rows = {
        1: [[0, 1e-4, -1e-6, 1e-2], [1, -2e-4, 1e-6, 2e-2], ["all", -1e-4, 0.0, 3e-2]],
        2: [[0.1, 1e-5, 1e-8, 1e-3], [0.01, 1e-6, 1e-10, 1e-5]],
        3: [["gauss", 2, 0.1, 0.5], ["gauss", 4, 0.1, 0.25], ["uniform", 4, 0.1, 0.3]],
        5: [[0.5, 0.9]],
        8: [["original", 20.0, 21.0], ["dense", 30.0, 31.0]],
    }
    path = folder / "tables.json"
    entries = [
        {"number": number, "columns": [f"column {at}" for at in range(len(lines[0]))], "rows": lines}
        for number, lines in rows.items()
    ]
    path.write_text(json.dumps({"tables": entries}))
    return path


class Page(HTMLParser):
    """What matters of a page: that its tags match, what it loads, names that its parts refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and not value.startswith("data:"):
                (self.references.add(value[1:]) if value.startswith("#") else self.loads.append(value))
            self.references |= set(re.findall(r"url\(#([^)]*)\)", value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_of_everything(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--results", str(results(tmp_path)), "--tables", str(tables(tmp_path)), "-o", str(out)]
    done = CliRunner().invoke(app, ["report", str(checkpoint), *arguments])
    assert done.exit_code == 0, done.output
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not page.loads
    assert "<script" not in text
    assert page.references <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "two pictures share a name"
    words = " ".join(page.words)
    for part in ("text <1>", "Off the scale: rtn-3 (900)", "ReQuant", "converted", "Mean PQI by layer", "codes"):
        assert part in words, part
    assert re.search(r"converted\s+\d\.\d{3} bits a weight, \d+\.\d MiB", words)
    # colours are the page's: it may be light or dark
    assert "#1f2328" not in text.partition("</style>")[2]
    names = {"pareto-kl-text-1", "pareto-perplexity-text-1", "ablation"}
    names |= {f"delta-f-by-{what}" for what in ("block", "step", "rule")}
    assert names == {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.csv")}
    own = {path.stem for path in (out / "converted").glob("*.png")}
    assert own >= {"delta-f", "coverage", "sensitivity", "outlier-ratio", "residual-share", "residual-density", "sizes"}
    assert "stages" in own


def test_numbers_are_those_of_the_conversion(checkpoint: Path) -> None:
    evidence = Evidence.read([checkpoint], [], None)
    figures = {figure.name: figure for figure in conversion_figures(evidence.conversions[0])}
    report = json.loads((checkpoint / REPORT_NAME).read_text())
    config = evidence.conversions[0].checkpoint.config
    first = report["integrals"][0]
    assert figures["delta-f"].rows[0] == (first["stage"], first["predicted"], first["actual"], first["relative_error"])
    assert figures["coverage"].rows[-1] == (1.0, pytest.approx(1.0))
    q = next(row[2] for row in figures["sensitivity"].rows if row[:2] == (1, "q_proj"))
    name = "model.layers.1.self_attn.q_proj"
    assert q == pytest.approx(first["pqi_by_layer"][name] / config.layers[name].numel)
    assert sum(row[3] for row in figures["residual-density"].rows) == config.nnz
    stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert sum(row[1] for row in figures["sizes"].rows) == pytest.approx(stored, rel=0.2)
    assert sum(row[1] for row in figures["sizes"].rows) < stored  # less the header


def test_predictions_of_a_sweep_stand_against_what_was_measured() -> None:
    def row(name: str, *integrals: tuple[float, float | None]) -> dict[str, Any]:
        entries = [{"stage": f"round {at}", "predicted": p, "actual": a} for at, (p, a) in enumerate(integrals, 1)]
        return {"name": name, "scores": {}, "report": {"integrals": entries}}

    rows = [row("rtn-4-requant", (0.12, 0.1), (0.09, None)), row("qtip-2-requant", (2.0, 2.5)), row("awq-4")]
    (figure,) = result_figures(Evidence(results=rows))
    assert list(figure.rows) == [
        ("rtn-4-requant", "round 1", 0.12, 0.1, pytest.approx(0.2)),
        ("qtip-2-requant", "round 1", 2.0, 2.5, pytest.approx(-0.2)),
    ]
    assert "largest error is 20.0%" in figure.caption
    assert write_svg(figure).count("<svg") == 1
    assert not list(result_figures(Evidence(results=rows[2:])))


def test_recorded_evaluations_stand_side_by_side_if_they_compare(tmp_path: Path, checkpoint: Path) -> None:
    folders = [Path(shutil.copytree(checkpoint, tmp_path / name)) for name in ("three", "four")]
    for number, folder in enumerate(folders):
        scores = {"perplexity": 20.0 + number, "acc": 0.5, "acc_stderr": 0.1}
        record_evaluation(folder, {"dataset": "text", "conditions": {"seq_len": 24}, "scores": scores})
    other = {"dataset": "text", "conditions": {"seq_len": 48}, "scores": {"perplexity": 19.0}}
    record_evaluation(folders[0], other)
    figures = list(result_figures(Evidence.read(folders, [], None)))
    rows = [(figure.title, figure.caption, figure.rows) for figure in figures]
    assert rows == [
        ("text: perplexity", "seq len 24.", [("three", 20.0, None), ("four", 21.0, None)]),
        ("text: acc", "seq len 24. Bars are standard errors.", [("three", 0.5, 0.1), ("four", 0.5, 0.1)]),
        ("text: perplexity", "seq len 48.", [("three", 19.0, None)]),
    ]
    assert len({figure.name for figure in figures}) == 3
    assert all("<svg" in write_svg(figure) for figure in figures)


def test_inspect_tells_what_the_figures_show(checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(checkpoint), "--layers", "--json"])
    layers = json.loads(done.stdout)["per_layer"]
    (conversion,) = Evidence.read([checkpoint], [], None).conversions
    figures = {figure.name: figure.rows for figure in conversion_figures(conversion)}
    layer = layers["model.layers.1.self_attn.q_proj"]
    assert (1, "q_proj", layer["mean_pqi"]) in figures["sensitivity"]
    assert (1, "q_proj", 100 * layer["outlier_share"]) in figures["outlier-ratio"]
    total = sum(each["predicted_delta_f"] for each in layers.values())
    assert total == pytest.approx(conversion.report["integrals"][0]["predicted"])


@pytest.mark.parametrize("integrals", [[{"pqi_by_layer": [1]}], [1], 1, []])
def test_a_report_that_somebody_has_spoilt_tells_nothing(tmp_path: Path, checkpoint: Path, integrals: Any) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "spoilt"))
    spoilt = {"outliers": {"model.layers.1.self_attn.q_proj": "many"}, "integrals": integrals}
    (folder / REPORT_NAME).write_text(json.dumps(spoilt))
    done = CliRunner().invoke(app, ["inspect", str(folder), "--layers"])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith("  model.layers.")]
    assert lines and not any("outliers" in line or "PQI" in line for line in lines)


def test_same_evidence_same_bytes(checkpoint: Path) -> None:
    (conversion,) = Evidence.read([checkpoint], [], None).conversions
    figures = {figure.name: figure for figure in conversion_figures(conversion)}
    for name in ("coverage", "residual-density"):
        assert write_svg(figures[name]) == write_svg(figures[name])


def test_plot_draws_what_is_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["plot", str(checkpoint), "-o", str(tmp_path), "--only", "sizes"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"sizes.png", "sizes.csv", "sizes.json"}
    with (tmp_path / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} >= {"codes", "tables", "sparse: values", "not quantized"}
    refused = CliRunner().invoke(app, ["plot", str(checkpoint), "-o", str(tmp_path), "--only", "size"])
    assert refused.exit_code != 0
    assert "choose one of delta-f" in refused.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "JSON object a line"), ('{"name": "a"}\n', "bits_per_weight"), ("", "bits_per_weight"), ("[1]\n", "bits")],
)
def test_results_of_another_kind_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(EvidenceError, match=reason):
        Evidence.read([], [path], None)


def test_tables_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"tables": [{"number": 1}]}')
    with pytest.raises(EvidenceError, match=r"is not a tables\.json"):
        Evidence.read([], [], path)


def test_a_model_is_converted_first(tmp_path: Path) -> None:
    source, out = tiny.save(tmp_path / "in"), tmp_path / "out"
    runs = tmp_path / "runs.toml"
    shared = "[all]\nnum_samples = 4\nseq_len = 99\nnodes = 2\ntune_epochs = 0\n"
    runs.write_text(shared + '[runs.rtn-4]\nbase = "rtn"\n[runs.awq-4]\nbase = "awq"\n')
    arguments = ["report", str(source), "--runs", str(runs), "--only", "rtn-*", "--max-tokens", "1024", "-o", str(out)]
    arguments += ["--set", "seq_len=24"]
    for _ in range(2):  # the second time there is nothing left to convert
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert {path.name for path in (out / "checkpoints").iterdir()} == {"rtn-4"}
        (line,) = (out / "results.jsonl").read_text().splitlines()
        assert json.loads(line)["recipe"]["seq_len"] == 24
    assert (out / "rtn-4" / "sizes.png").exists()
    assert (out / "pareto-kl-python-docs.png").exists()
    two = CliRunner().invoke(app, ["report", str(source), str(tmp_path), "-o", str(out)])
    assert two.exit_code == 1
    assert "a report is about one" in two.stderr


def test_places() -> None:
    assert place("model.layers.11.self_attn.q_proj") == (11, "q_proj")
    assert place("model.layers.3.mlp.experts.17.up_proj") == (3, "up_proj")
    assert place("model.layers.0.mlp.shared_expert.up_proj") == (0, "up_proj")
    assert place("lm_head") is None


def test_nothing_to_report(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", "-o", str(tmp_path / "out")])
    assert done.exit_code != 0 and not (tmp_path / "out").exists()
    assert "name checkpoints or a model, or --results" in done.stderr
