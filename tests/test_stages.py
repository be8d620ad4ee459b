"""A run in stages: what it tells of score against ranks kept, as table, picture and JSON."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import jsonl, told
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from lorakit import plots, prepare
from lorakit import recipe as recipes
from lorakit.display import stage_table
from lorakit.report import StageEnd

STAGES = "adapter.sparsity={xi: 0.4, schedule: linear, levels: 3, dense: 0.5, gate_init: normal}"
ENDS = [
    StageEnd(0, 50, 80, "accuracy", 0.9, 1.0),
    StageEnd(1, 75, 40, "accuracy", 0.81, 0.5),
]


def test_every_stage_tells_ranks_kept_what_is_remembered_and_what_is_learnt(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """Its scores are those of the checkpoint at its end, on either side."""
    unseen = jsonl(Path(), [{"text": f"a dull film {i}", "label": "bad"} for i in range(6)])
    rows = ("~data.held_out", f"data.validation={unseen}")
    ran = told(lorakit, "train", recipe, "adapter.variant=sora", STAGES, "train.steps=12", *rows)
    ends = ran["stages"]
    assert [end["step"] for end in ends] == [6, 9, 12]
    ranks = [end["ranks"] for end in ends]
    assert ranks[0] == ran["start"] > ranks[1] >= ranks[2] == ran["live"]
    for end in ends:
        path = f"runs/tiny/checkpoints/step-{end['step']:06}"
        for split in ("validation", "train"):  # fewer rows than the sample: it is all of them
            scores = told(lorakit, "eval", path, "--split", split)["scores"]
            assert end[split] == pytest.approx(scores[end["metric"]], abs=1e-6)
        assert end["train"] != end["validation"]
    picture = imread("runs/tiny/stages.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0


def test_a_run_in_one_stage_has_none_of_it(recipe: Path, lorakit: Callable[..., Any]) -> None:
    assert told(lorakit, "train", recipe, "adapter.variant=sora")["stages"] == []
    assert not Path("runs/tiny/stages.png").exists()


def test_the_table_has_shares_of_the_ranks_and_of_the_dense_stages_scores() -> None:
    shown = StringIO()
    Console(file=shown, width=160).print(stage_table(ENDS, 80))
    dense, sparse = (line.split() for line in shown.getvalue().splitlines()[-2:])
    assert dense[:4] == ["0", "50", "80/80", "100%"]
    assert [cell for cell in dense[4:] if "%" in cell] == ["100.0%", "100.0%"]
    assert sparse[:4] == ["1", "75", "40/80", "50%"]
    assert [cell for cell in sparse[4:] if "%" in cell] == ["50.0%", "90.0%"]


def test_the_picture_has_a_point_for_each_stage_from_dense_to_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, out: drawn.append(figure))
    plots.stage_curve(ENDS, 80, tmp_path / "stages.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["memorisation: training sample"] == [[100.0, 100.0], [50.0, 50.0]]
    assert lines["generalisation: validation"] == [[100.0, 100.0], [50.0, pytest.approx(90.0)]]
    left, right = axes.get_xlim()
    assert left > right


def test_the_sample_of_training_rows_is_drawn_and_the_same_at_every_stage(recipe: Path) -> None:
    task = prepare.prepare(recipes.load(recipe)).task

    def rows() -> list[tuple[int, ...]]:
        (batch,) = task.sample("train", 10).batches("train", 10)
        return sorted(tuple(ids.tolist()) for ids in batch.inputs["input_ids"])

    assert len(rows()) == 10
    assert rows() == rows()
    (first,) = task.limited("train", 10).batches("train", 10)
    assert rows() != sorted(tuple(ids.tolist()) for ids in first.inputs["input_ids"])


def test_the_curve_is_read_from_the_runs_own_log(tmp_path: Path) -> None:
    from lorakit.report import stage_ends

    log = [
        {"step": 4, "loss": 1.0, "ranks": {"a": 2, "b": 1}},
        {"step": 4, "accuracy": 0.5, "loss": 0.9, "stage": 0, "train": {"accuracy": 0.75}},
        {"step": 6, "accuracy": 0.25, "loss": 1.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    assert stage_ends(tmp_path) == [StageEnd(0, 4, 3, "accuracy", 0.5, 0.75)]
