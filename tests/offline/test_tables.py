"""The paper's tables on a tiny model, and what they are made of."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests import tiny
from vllm_requant.cli import app
from vllm_requant.cli.tables import _markdown
from vllm_requant.offline.models import find_layers, load_causal_lm
from vllm_requant.offline.paper import PUBLISHED, published
from vllm_requant.offline.pqi import Objective
from vllm_requant.offline.second_order import expand
from vllm_requant.offline.sweep import read_runs
from vllm_requant.offline.tables import TABLES, Table


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_expansion_is_that_of_finite_differences(tmp_path: Path, architecture: str) -> None:
    lm = load_causal_lm(str(tiny.save(tmp_path, architecture)))
    layers = find_layers(lm.model)
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    objective = Objective(lm.model, layers, tokens)
    start = {name: weight.float() for name, weight in objective.start.items()}
    generator = torch.Generator().manual_seed(1)
    end = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in start.items()}
    names = list(layers)
    groups = [names[:3], names[3:4]]

    def loss(moved: list[str], part: float) -> float:
        for name, layer in layers.items():
            layer.weight.data = torch.lerp(start[name], end[name], part) if name in moved else start[name]
        rows = [torch.nn.functional.cross_entropy(lm.model(row[None]).logits[0, :-1], row[1:]) for row in tokens]
        return float(sum(row.double() for row in rows)) / len(rows)

    alone, together = expand(objective, end, groups)
    step = 0.05  # norms are computed in float32: less drowns, more bends
    for group, terms in [(groups[0], alone[0]), (groups[1], alone[1]), (groups[0] + groups[1], together)]:
        ahead, here, behind = (loss(group, part) for part in (step, 0.0, -step))
        assert terms.first == pytest.approx((ahead - behind) / (2 * step), rel=1e-2)
        assert terms.second == pytest.approx((ahead - 2 * here + behind) / (2 * step**2), rel=3e-2)


def test_all_tables_of_a_model(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "Llama-3.2-1B")  # its name; what is beside is the paper's
    arguments = [
        "--num-samples",
        "2",
        "--seq-len",
        "24",
        "--max-tokens",
        "48",
        "--bits",
        "2",
        "-o",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, ["tables", str(source), *arguments])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "tables.json").read_text())
    tables = {table["number"]: table for table in content["tables"]}
    assert set(tables) == set(TABLES)
    by_block = {row[0]: row[1:] for row in tables[1]["rows"]}
    assert sum(by_block[block][0] for block in (0, 1)) == pytest.approx(by_block["all"][0], rel=1e-4)
    by_step = {row[0]: row[1:] for row in tables[2]["rows"]}
    assert by_step[0.1][0] == pytest.approx(by_block["all"][0] / 10)
    assert by_step[0.1][1] == pytest.approx(by_block["all"][1] / 100)
    # near the original weights the expansion holds
    assert by_step[0.01][2] == pytest.approx(by_step[0.01][0] + by_step[0.01][1], rel=0.1, abs=1e-6)
    error = {tuple(row[:2]): row[3] for row in tables[3]["rows"]}
    assert error["gauss", 8] < error["uniform", 8] < error["uniform", 4]
    assert [row[0] for row in tables[4]["rows"]] == [row[0] for row in PUBLISHED[4]]
    assert tables[5]["rows"][-1] == [1.0, pytest.approx(1.0)]
    calibration = {row[0]: row[1] for row in tables[8]["rows"]}
    assert calibration["original"] < calibration["outliers and significant"] < calibration["dense"]
    assert "paper: actual ΔF" in done.stdout
    assert "0.1" in done.stdout


def test_tables_of_a_sweep(tmp_path: Path) -> None:
    source, results = tiny.save(tmp_path / "Llama-3.2-3B"), tmp_path / "results.jsonl"
    runs = Path(__file__).parents[2] / "offline" / "recipes" / "table-7.toml"
    small = [f"--set={choice}" for choice in ("num_samples=4", "seq_len=24", "nodes=2")]
    arguments = ["--only", "awq-3*", "--seq-len", "24", "--max-tokens", "48", *small, "-o", str(results)]
    done = CliRunner().invoke(app, ["sweep", str(source), "--runs", str(runs), *arguments])
    assert done.exit_code == 0, done.output
    arguments = ["--results", str(results), "--only", "", "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, ["tables", str(source), *arguments])
    assert done.exit_code == 0, done.output
    tables = {table["number"]: table for table in json.loads(done.stdout)["tables"]}
    assert set(tables) == {7, 10, 11}
    assert [row[0] for row in tables[7]["rows"]] == ["awq-3", "awq-3-requant"]
    assert tables[10]["rows"][0][3:5] == [4, 24]
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "paper: MATH, 4-shot" in text
    assert "| 3.24 | 1.8 | 9.98 | 35.08 |" in text


def test_times_of_servers_stand_beside_the_paper_s(tmp_path: Path) -> None:
    measured = tmp_path / "bench.json"
    rates = {"prefill": 2000.0, "decode": 50.0, "batch": 400.0}
    results = [
        {"name": "ReQuant", "median": rates | {"decode": 40.0}},
        {"name": "awq-4-requant", "median": rates},
        {"name": "gone", "error": "no file"},
    ]
    load = {"prompt_tokens": 500, "new_tokens": 100}
    measured.write_text(json.dumps({"checkpoint": "awq-4", "load": load, "results": results}))
    arguments = ["tables", "Llama-3.2-1B", "--only", "", "--speed", str(measured), "-o", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "500 tokens of a prompt, 100 decoded" in done.stdout
    assert "| awq-4 | 250 | 2500 | 13 | 23768 |" in done.stdout
    assert "| awq-4-requant | 250 | 2000 | 18 | 35204 |" in done.stdout
    assert "| squeezellm-3 |  |  | 85 | 33657 |" in done.stdout, "what only the paper has"
    assert "gone" not in done.stdout
    second = tmp_path / "second.json"
    results = [{"name": "ReQuant", "median": rates}, {"name": "awq-4", "median": rates}]
    second.write_text(json.dumps({"checkpoint": "squeezellm-3", "load": load, "results": results}))
    done = CliRunner().invoke(app, [*arguments, "--speed", str(second)])
    assert "| squeezellm-3 | 250 | 2000 | 85 | 33657 |" in done.stdout
    assert "| awq-4 | 250 | 2500 | 13 | 23768 |" in done.stdout, "the first counts"
    second.write_text(json.dumps({"checkpoint": "awq-4", "load": load | {"new_tokens": 64}, "results": results}))
    done = CliRunner().invoke(app, [*arguments, "--speed", str(second)])
    assert done.exit_code == 1
    assert "prompt and decoded tokens are (500, 64)" in done.stderr.replace("\n", " ")
    measured.write_text("{}")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "is not what requant bench --json prints ('load' is missing)" in done.stderr.replace("\n", " ")


def test_every_recipe_of_the_paper_can_be_run() -> None:
    for path in (Path(__file__).parents[2] / "offline" / "recipes").glob("*.toml"):
        names = set(read_runs(path))
        assert names | {"original"} == {row[0] for row in PUBLISHED[int(path.stem.removeprefix("table-"))]}


def test_numbers_of_the_paper_stand_beside_those_of_its_model_alone() -> None:
    assert published(1, "meta-llama/Llama-3.2-1B") == PUBLISHED[1]
    assert published(1, "SmolLM2-135M") is None
    text = _markdown(Table(5, "title", ("of weights", "of PQI"), [(0.0015, 0.05), (0.5, 0.9)], 1, PUBLISHED[5]))
    assert "| 0.0015 | 0.05 | 0.0453 |" in text
    assert "| 0.5 | 0.9 |  |" in text


def test_unknown_tables_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tables", "model", "--only", "1,6", "-o", str(tmp_path)])
    assert done.exit_code == 2
    assert "--only 1,6: write numbers of 1, 2, 3, 4, 5, 8" in done.stderr
