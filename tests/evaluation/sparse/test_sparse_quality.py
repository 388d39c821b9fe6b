"""Measures of patterns on prompts, the search, and the benchmark, on tiny models."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from support.tiny_models import tiny_lm, tiny_vlm
from unclipped.attention.config import SparseConfig
from unclipped.attention.mass import PAIRS
from unclipped.attention.parts import PerHead, PerLayer
from unclipped.attention.patterns import Full
from unclipped.attention.syntax import parse_pattern
from unclipped.core.documents import read_jsonl
from unclipped.core.errors import DataError, UsageError
from unclipped.evaluation.sparse import quality as quality_module
from unclipped.evaluation.sparse.bench import in_turns, measure_speed
from unclipped.evaluation.sparse.combinations import Combination, Measured, combine, pattern_for
from unclipped.evaluation.sparse.config import BenchConfig, QualityConfig, SearchConfig
from unclipped.evaluation.sparse.measures import divergence
from unclipped.evaluation.sparse.quality import measure_quality
from unclipped.evaluation.sparse.rows import MeasuredRows
from unclipped.evaluation.sparse.scaling import amdahl, attention_share, exponent
from unclipped.evaluation.sparse.search import SearchFailed, doubt_of, read_candidates, search_pattern
from unclipped.inference.engine import Engine
from unclipped.studies.prefill_report import write_search_report

BLOCKS = {"key_block": 8, "query_block": 16}
QUIET = Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sparse")
    tiny_vlm(base, seed=4, output=base / "vlm", image={"max_tokens": 160})
    return base / "vlm"


def task(limit: int) -> dict[str, Any]:
    source = {"source": "generated:characters", "split": "val", "options": {"size": [64, 128]}}
    return {"name": "t", "source": source, "limit": limit, "max_new_tokens": 2}


def quality_config(folder: Path, *patterns: str, **fields: Any) -> QualityConfig:
    arms = [{"pattern": text, **BLOCKS} for text in patterns]
    return QualityConfig.model_validate(
        {"model": str(folder), "task": task(3), "patterns": arms, "bootstrap_samples": 100, **fields}
    )


def search_config(folder: Path, **fields: Any) -> SearchConfig:
    candidates = ("topk(1)", "topk(4)", "sink(8) + window(16)")
    settings = {"model": str(folder), "task": task(4), "candidates": candidates, "steps": 2, **BLOCKS}
    return SearchConfig.model_validate(settings | fields)


def test_divergence_is_that_of_the_definition() -> None:
    one, two = torch.randn(2, 40, dtype=torch.float64) * 3
    p, q = np.exp(one.numpy()), np.exp(two.numpy())
    p, q = p / p.sum(), q / q.sum()
    assert divergence(one, two) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-12)
    assert divergence(one, one) == 0.0
    never = torch.tensor([float("-inf")], dtype=torch.float64)
    assert divergence(torch.cat([one, never]), torch.cat([two, never])) == pytest.approx(divergence(one, two))


def test_quality_of_a_full_pattern_is_that_of_dense(folder: Path, tmp_path: Path) -> None:
    found = measure_quality(
        quality_config(folder, "full", "topk(2)", "random(2)"), tmp_path, device="cpu", console=QUIET
    )
    full, chosen = found["patterns"]["full"], found["patterns"]["topk(2)"]
    assert full["kl"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert full["agreement"]["value"] == 1.0
    assert full["density"] == pytest.approx(1.0)
    assert list(full["mass"].values()) == pytest.approx([1.0] * 3, abs=1e-5)
    assert full["difference"]["value"] == 0.0
    assert sum(found["attention"].values()) == pytest.approx(1.0, abs=1e-5)
    assert set(found["attention"]) == set(PAIRS)
    assert chosen["density"] < 1.0
    assert chosen["kl"]["value"] > 0.0
    assert chosen["mass"]["oracle"] >= chosen["mass"]["pattern"]
    drawn = found["patterns"]["random(2)"]["mass"]
    assert drawn["pattern"] == pytest.approx(drawn["random"], abs=0.05)
    assert np.array(chosen["by_head"]).shape == (2, 4)
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_an_interrupted_measurement_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quality_config(folder, "topk(2)", score=False)
    whole = measure_quality(config, tmp_path / "whole", device="cpu", console=QUIET)
    measure, done = quality_module.prompt_mass, []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return measure(*arguments)

    monkeypatch.setattr(quality_module, "prompt_mass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_quality(config, tmp_path / "cut", device="cpu", console=QUIET)
    assert len(list(read_jsonl(tmp_path / "cut" / "prompts.jsonl"))) == 2
    done[:] = []
    assert measure_quality(config, tmp_path / "cut", resume=True, device="cpu", console=QUIET) == whole
    assert len(done) == 1
    tiny_vlm(tmp_path / "other", seed=5, output=tmp_path / "model", image={"max_tokens": 160})
    other = config.model_copy(update={"model": str(tmp_path / "model")})
    with pytest.raises(UsageError, match="another model"):
        measure_quality(other, tmp_path / "cut", resume=True, device="cpu", console=QUIET)


def measured() -> Measured:
    """Two layers of two key heads; `full` is the last candidate."""
    mass = np.array([[[0.5, 0.9], [0.8, 0.8]], [[0.8, 0.95], [0.9, 0.97]], [[1.0, 1.0], [1.0, 1.0]]])
    density = np.array([[[0.1] * 2] * 2, [[0.3] * 2] * 2, [[1.0] * 2] * 2])
    patterns = read_candidates(["topk(1)", "topk(4)"])
    return Measured(patterns, (0, 2), mass, mass, mass, density)


def test_each_place_takes_the_cheapest_that_keeps_enough() -> None:
    assert combine(measured(), 0.0, per_head=False).choice == ((0,), (0,))
    assert combine(measured(), 0.75, per_head=False).choice == ((1,), (0,))
    assert combine(measured(), 0.9, per_head=True).choice == ((2, 0), (1, 1))
    assert combine(measured(), 1.0, per_head=True).choice == ((2, 2), (2, 2))
    pattern = pattern_for(Combination(0.9, ((2, 0), (1, 1))), measured(), depth=4)
    few, some = read_candidates(["topk(1)", "topk(4)"])[:2]
    assert pattern == PerLayer((PerHead((Full(), few)), Full(), some, Full()))
    assert parse_pattern(str(pattern)) == pattern


def test_a_search_keeps_its_bound_and_its_file_runs(folder: Path, tmp_path: Path) -> None:
    config = search_config(folder, per_head=True, kl=0.05)
    found = search_pattern(config, tmp_path / "one", device="cpu", console=QUIET)
    chosen = found["chosen"]
    assert chosen["kl"] <= 0.05
    assert chosen["density"] < 1.0
    holding = [row for row in [*found["frontier"], *found["candidates"]] if row["kl"] <= 0.05]
    assert chosen["density"] == min(row["density"] for row in holding)
    for row in found["frontier"]:
        assert row["oracle"]["mass"] >= row["mass"] - 1e-6
        assert row["oracle"]["density"] == pytest.approx(row["density"], abs=0.02)
        assert row["random"]["density"] == pytest.approx(row["density"], abs=0.02)
    again = search_pattern(config, tmp_path / "two", device="cpu", console=QUIET)
    assert again == found, "deterministic"
    resumed = search_pattern(config, tmp_path / "two", resume=True, device="cpu", console=QUIET)
    assert resumed == found
    taken = SparseConfig(pattern=str(tmp_path / "one" / "pattern.yaml"), fallback="never")
    assert taken.pattern == chosen["pattern"]
    assert (taken.key_block, taken.query_block) == (8, 16)
    assert Engine(folder, device="cpu", sparse=taken).sparse is not None


def test_the_kl_of_a_search_comes_with_its_interval_over_prompts(folder: Path, tmp_path: Path) -> None:
    config = search_config(folder, rulers=False, kl=5.0, task=task(12))
    said = io.StringIO()
    found = search_pattern(config, tmp_path, device="cpu", console=Console(file=said, width=160))
    chosen, rows = found["chosen"], [row for _, row in read_jsonl(tmp_path / "tokens.jsonl")]
    own = [row["measured"]["kl"] for row in rows if row["key"].split(" ", 1)[1] == chosen["pattern"]]
    assert len(own) == 6
    drawn = np.random.default_rng(11).choice(own, size=(4000, 6)).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    spread = high - low
    assert chosen["kl"] == pytest.approx(np.mean(own))
    assert chosen["kl_low"] == pytest.approx(low, abs=0.1 * spread)
    assert chosen["kl_high"] == pytest.approx(high, abs=0.1 * spread)
    shown = f"{chosen['kl']:.4f} [{chosen['kl_low']:.4f}, {chosen['kl_high']:.4f}]"
    page = write_search_report(tmp_path, found).read_text()
    kept = (tmp_path / "pattern.yaml").read_text()
    assert f"kl_high: {chosen['kl_high']:.6f}".rstrip("0") in kept
    for text in (said.getvalue(), page):
        assert shown in text
        assert "Only 6 prompts verify" in text


@pytest.mark.parametrize(
    ("prompts", "high", "says"),
    [(40, 0.049, ""), (40, 0.06, "40 prompts do not show that the bound holds"), (12, 0.04, "Only 12 prompts verify")],
)
def test_a_search_says_when_its_prompts_are_too_few(prompts: int, high: float, says: str) -> None:
    results = {"chosen": {"kl_high": high}, "bounds": {"kl": 0.05}, "prompts": {"verify": prompts}}
    assert doubt_of(results).startswith(says)
    assert bool(doubt_of(results)) == bool(says)


def test_a_search_scores_its_frontier(folder: Path, tmp_path: Path) -> None:
    config = search_config(folder, kl=5.0, rulers=False, score=True)
    found = search_pattern(config, tmp_path, device="cpu", console=QUIET)
    assert found["dense"]["count"] == 4
    for row in found["frontier"]:
        assert row["score"]["count"] == 4
        assert row["difference"]["value"] == pytest.approx(row["score"]["accuracy"] - found["dense"]["accuracy"])


def test_a_bound_on_mass_holds_in_every_layer(folder: Path, tmp_path: Path) -> None:
    found = search_pattern(search_config(folder, mass=0.6, kl=5.0, rulers=False), tmp_path, device="cpu", console=QUIET)
    assert all(row["mass"] >= 0.6 - 1e-6 for row in found["chosen"]["places"])


def test_a_search_that_fails_says_what_was_reached(folder: Path, tmp_path: Path) -> None:
    config = search_config(folder, kl=1e-7, density=0.3, rulers=False)
    with pytest.raises(SearchFailed) as caught:
        search_pattern(config, tmp_path, device="cpu", console=QUIET)
    said = str(caught.value)
    assert "KL at most 1e-07, density at most 0.3" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["chosen"] is None
    points = [*results["frontier"], *results["candidates"]]
    nearest = min((row["kl"] for row in points if row["density"] <= 0.3), default=None)
    assert nearest is None or f"KL {nearest:.4f} was reached" in said
    assert "density 1.000 was reached" in said, "full keeps everything"
    assert not (tmp_path / "pattern.yaml").exists()


def test_a_failed_search_names_the_nearest_candidate_where_no_threshold_leads_to_it(
    folder: Path, tmp_path: Path
) -> None:
    candidates = ("sink(8)", "topk(1)", "topk(2)", "topk(3)")
    config = search_config(folder, kl=1e-7, density=0.3, rulers=False, candidates=candidates)
    with pytest.raises(SearchFailed) as caught:
        search_pattern(config, tmp_path, device="cpu", console=QUIET)
    results = json.loads((tmp_path / "results.json").read_text())
    alone, combined = (
        min(row["kl"] for row in results[name] if row["density"] <= 0.3) for name in ("candidates", "frontier")
    )
    assert alone < combined
    assert f"KL {alone:.4f} was reached" in str(caught.value)


def test_candidates_are_plain_patterns() -> None:
    with pytest.raises(UsageError, match="makes the lists itself"):
        read_candidates(["per_layer(full | topk(2))"])
    assert read_candidates(["full", "topk(2)", "topk(k=2)"]) == (parse_pattern("topk(2)"), Full())


@pytest.mark.parametrize(
    ("heads", "linear", "tokens", "share"),
    [  # the table of the reference, from layer shapes: query, key, value, output and three maps of the feed-forward
        (16, 1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072, 4096, 0.35),
        (16, 1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072, 16384, 0.68),
        (32, 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 12288, 8192, 0.15),
    ],
)
def test_share_of_attention_by_shape(heads: int, linear: int, tokens: int, share: float) -> None:
    found = attention_share(tokens, heads=heads, head_dim=128, linear_parameters=linear)
    assert found == pytest.approx(share, abs=0.006)
    assert amdahl(found) == pytest.approx(1 / (1 - found))
    assert amdahl(found, density=1.0) == 1.0


def test_fitted_exponents() -> None:
    assert exponent([1, 2, 4], [3 * n**1.5 for n in (1, 2, 4)]) == pytest.approx(1.5)
    assert exponent([8], [1.0]) is None


def test_sides_take_turns() -> None:
    order: list[str] = []
    found = in_turns({name: lambda name=name: order.append(name) or name for name in "abc"}, 3)
    assert found == {name: [name] * 3 for name in "abc"}
    rounds = ["".join(order[start : start + 3]) for start in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]


def bench_config(model: Path | str, tokens: tuple[int, ...], **fields: Any) -> BenchConfig:
    arms = [{"pattern": "topk(1)", **BLOCKS}, {"pattern": "window(16)", **BLOCKS, "fallback": "auto"}]
    settings = {"model": str(model), "tokens": tokens, "patterns": arms, "repeats": 2, "device": "cpu"}
    return BenchConfig.model_validate(settings | fields)


def test_bench_of_a_model_with_an_image(folder: Path, tmp_path: Path) -> None:
    found = measure_speed(bench_config(folder, (60, 240)), tmp_path, console=QUIET)
    assert [row["visual_tokens"] for row in found["lengths"]] == [56, 240]
    row = found["lengths"][1]
    sparse, fallen = row["patterns"]["topk(1)"], row["patterns"]["window(16)"]
    assert set(row["dense"]["prefill"]["parts"]) == {"decode", "encoder", "connector", "prefill", "first step"}
    assert all(part["least"] <= part["median"] <= part["most"] for part in sparse["prefill"]["parts"].values())
    assert sparse["prefill"]["first_token_seconds"] == pytest.approx(
        sum(part["median"] for part in sparse["prefill"]["parts"].values())
    )
    assert sparse["prefill"]["sparse_layers"] == 2
    assert 0.0 < sparse["prefill"]["density"] < 1.0
    assert sparse["kernel"]["efficiency"] == pytest.approx(
        sparse["kernel"]["speed_up"]["median"] * sparse["kernel"]["density"]
    )
    assert 0.0 < sparse["prefill"]["plan_share"]["least"] <= sparse["prefill"]["plan_share"]["most"] < 1.0
    assert sparse["bound_at_density"] <= row["bound"]
    assert fallen["prefill"]["sparse_layers"] == 0
    assert fallen["prefill"]["plan_share"]["most"] == 0.0  # too short to be planned at all
    assert any("fewer than" in reason for reason in fallen["prefill"]["dense_because"])
    assert math.isfinite(found["exponents"]["topk(1)"]["prefill"])
    assert measure_speed(bench_config(folder, (60, 240)), tmp_path, resume=True, console=QUIET) == found


def test_bench_of_a_decoder_with_random_tokens(tmp_path: Path) -> None:
    tiny_lm(tmp_path / "lm")
    found = measure_speed(bench_config(tmp_path / "lm", (96,)), tmp_path / "out", console=QUIET)
    row = found["lengths"][0]
    assert set(row["dense"]["prefill"]["parts"]) == {"prefill", "first step"}
    assert row["tokens"] == 96
    assert found["shape"] == {
        "heads": 4, "key_heads": 2, "head_dim": 8, "layers": 2,
        "linear_parameters": 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 64,
    }  # fmt: skip


def test_bench_beyond_the_positions_of_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"longer than the model's 512 positions"):
        measure_speed(bench_config(folder, (1024,)), tmp_path, console=QUIET)


@pytest.mark.parametrize(
    "line",
    ['{"model": "a", "key": "2"}', '{"model": "a", "key": "1", "measured": {"kl": 2.0}, "digest": "b"}', "[1]", "{"],
)
def test_a_damaged_measured_row_is_named_and_a_cut_one_is_measured_again(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tokens.jsonl"
    MeasuredRows(path, "a", resume=False).add("1", {"kl": 1.0, "layers": (0, 1)})
    whole = path.read_text()
    path.write_text(whole + whole[:-9])
    assert "1" in MeasuredRows(path, "a", resume=True)
    assert path.read_text() == whole
    path.write_text(whole + line + "\n")
    with pytest.raises(DataError, match=r"tokens\.jsonl, line 2.*measured again"):
        MeasuredRows(path, "a", resume=True)
    path.write_text(whole)
    with pytest.raises(UsageError, match="another model"):
        MeasuredRows(path, "b", resume=True)
