"""What the loop promises, seen by spies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Notes, Planted, Poisoned, net, planted, pupil, section, taught
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import optim
from lorakit.adapter import Controller, Kept, Stage, Step
from lorakit.errors import LorakitError, NotFiniteError
from lorakit.timetable import Timetable
from lorakit.train import headline
from lorakit.trainee import Progress, Trainee
from lorakit.variants import lora
from lorakit.variants.lora import LoRAConfig, LoRALinear

LORA = LoRAConfig(variant="lora", rank=4, alpha=8.0)


class Spy(Controller[Any, Any]):
    """Writes down what it is told, and what gradients it finds."""

    def __init__(self, steps: int) -> None:
        super().__init__({}, LORA, steps)
        self.seen: list[tuple[int, int, float]] = []
        self.gradients = True
        self.rests = True

    def after_step(self, ctx: Step) -> Kept:
        self.seen.append((ctx.step, ctx.steps, ctx.rate(self.parameter)))
        self.gradients &= self.parameter.grad is not None
        return {}

    def settled(self) -> bool:
        return self.rests


def spied(settings: Any) -> tuple[Spy, Any]:
    spy, trainee = Spy(settings.steps), pupil(LORA, settings)
    spy.parameter = trainee.layers["up"].B
    return spy, type(trainee)(
        trainee.model, trainee.layers, spy, trainee.optimizer, trainee.progress
    )


def test_the_variant_is_called_once_a_step_with_the_groups_rate_and_gradients_still_there() -> None:
    settings = section(steps=4)
    spy, trainee = spied(settings)
    taught(trainee, settings)
    want = [(step, 4, 3e-2 * optim.factor(step, 4, settings)) for step in (1, 2, 3, 4)]
    assert spy.seen == want
    assert spy.gradients


@pytest.mark.parametrize("rows", [64, 56])  # 56: the last step of an epoch has fewer rows
def test_accumulating_takes_the_step_of_the_big_batch(rows: int) -> None:
    task = planted(rows)
    ended = {}
    for batch_size, accumulate in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        settings = section(steps=6, batch_size=batch_size, accumulate=accumulate)
        trainee = pupil(LORA, settings)
        taught(trainee, settings, task)
        ended[accumulate] = {name: layer.own_state() for name, layer in trainee.layers.items()}
    assert_close(ended[4], ended[1], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_the_items_of_the_whole_step() -> None:
    """Seven rows in batches of 4 and 3: a mean of the batches' means would be off."""
    task = planted(7)
    settings = section(steps=1, batch_size=4, accumulate=2, log_every=1)
    trainee = pupil(LORA, settings)
    with torch.no_grad():
        whole = (net()(task.x[:7]) - task.y[:7]).square().mean()
    notes = taught(trainee, settings, task)
    assert notes.rows[0]["loss"] == pytest.approx(float(whole), rel=1e-5)


def test_gradients_are_clipped_to_their_joint_norm() -> None:
    settings = section(steps=1, clip=1e-3, log_every=1)
    norms: list[float] = []

    class Watch(Spy):
        def after_step(self, ctx: Step) -> Kept:
            norms.append(float(torch.cat([p.grad.flatten() for p in self.trained]).norm()))
            return {}

    trainee = pupil(LORA, settings)
    watch = Watch(settings.steps)
    watch.trained = [p for p in trainee.model.parameters() if p.requires_grad]
    notes = taught(type(trainee)(trainee.model, trainee.layers, watch, trainee.optimizer), settings)
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert notes.rows[0]["norm"] > 1e-3  # the log tells the norm before


def test_the_last_step_is_logged_scored_and_saved_whatever_the_intervals() -> None:
    settings = section(steps=7, log_every=3, eval_every=4, save_every=5)
    notes = taught(pupil(LORA, settings), settings)
    logged = [row["step"] for row in notes.rows if "ranks" in row]
    scored = [row["step"] for row in notes.rows if "ranks" not in row]
    assert (logged, scored) == ([3, 6, 7], [4, 7])
    assert {5, 7} <= set(notes.saved)
    assert notes.ticks == [1, 2, 3, 4, 5, 6, 7]


def test_a_logged_row_has_what_the_readme_says() -> None:
    settings = section(steps=2, log_every=1)
    row = taught(pupil(LORA, settings), settings).rows[0]
    assert set(row) == {"step", "loss", "norm", "lr", "samples_per_s", "ranks"}
    assert row["ranks"] == {"up": 4, "down": 4}


def test_a_checkpoint_is_saved_at_every_best_score() -> None:
    settings = section(steps=30, eval_every=5, save_every=None)
    notes = taught(pupil(LORA, settings), settings)
    best = [min(notes.scores()[: i + 1]) == s for i, s in enumerate(notes.scores())]
    assert notes.saved == sorted({5 * (i + 1) for i, is_best in enumerate(best) if is_best} | {30})


def test_patience_ends_a_run_that_gets_no_better() -> None:
    settings = section(steps=50, lr=1e-9, eval_every=5, patience=2)
    notes = taught(pupil(LORA, settings), settings, Stubborn(planted().x, planted().y))
    assert notes.ticks[-1] == 15  # best at 5, then two more
    assert notes.saved[-1] == 15


def test_best_and_patience_wait_until_ranks_have_settled() -> None:
    settings = section(steps=40, eval_every=5, patience=2)
    spy, trainee = spied(settings)
    spy.rests = False
    notes = taught(trainee, settings, Stubborn(planted().x, planted().y))
    assert notes.ticks[-1] == 40
    assert trainee.progress.best_step is None


def test_ranks_that_move_between_two_evaluations_make_the_best_forgotten() -> None:
    """The worse score of the ranks that stay counts, not the better one of those that went."""
    settings = section(steps=12, lr=1e-2, eval_every=4)

    class Restless(Spy):
        def settled(self) -> bool:
            return not self.seen or self.seen[-1][0] != 10

    class Worse(Planted):
        def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
            given.append(float(len(given)))
            return {"loss": given[-1]}

    given: list[float] = []
    trainee = pupil(LORA, settings)
    spy = Restless(settings.steps)
    spy.parameter = trainee.layers["up"].B
    trainee = type(trainee)(trainee.model, trainee.layers, spy, trainee.optimizer)
    taught(trainee, settings, Worse(planted().x, planted().y))
    assert given == [0.0, 1.0, 2.0]
    assert trainee.progress.best_step == 12


def test_scores_are_ranked_and_of_equal_ones_the_earlier_is_the_better() -> None:
    progress = Progress()
    for step, (score, among) in enumerate(
        [(1.0, True), (float("nan"), True), (3.0, True), (1.0, True), (0.5, False), (3.0, True)], 1
    ):
        progress.step = step
        assert progress.judge(score, places=3) == among, step
    assert progress.best == [(3, 3.0), (6, 3.0), (1, 1.0)]
    assert (progress.best_step, progress.stale) == (3, 3)


def test_no_number_is_no_best_score_to_keep_up_with() -> None:
    progress = Progress(step=1)
    progress.judge(float("nan"))
    progress.step = 2
    assert progress.judge(-100.0)
    assert progress.best_step == 2


def test_a_loss_is_better_when_lower_and_a_metric_when_higher() -> None:
    assert headline({"accuracy": 90.0, "loss": 0.3}, None) == 90.0
    assert headline({"accuracy": 90.0, "loss": 0.3}, "loss") == -0.3


class Stubborn(Planted):
    """Scores that never change."""

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": 1.0}


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step_and_names_the_rows() -> None:
    task = planted()
    settings = section(steps=60, batch_size=8)
    trainee, notes = pupil(LORA, settings), Notes()
    with pytest.raises(NotFiniteError, match=r"the loss is nan") as error:
        taught(trainee, settings, Poisoned(task.x, task.y))
    rows = str(error.value).split("training split: ")[1].split("\n")[0].split(", ")
    assert "7" in rows
    assert len(rows) == 8
    assert not notes.saved
    assert all(p.isfinite().all() for p in trainee.model.parameters())


def test_a_step_without_a_finite_loss_is_left_out_where_the_recipe_says_so() -> None:
    task = planted()
    settings = section(steps=2 * task.rows("train") // 16, batch_size=16, non_finite="skip")
    trainee = pupil(LORA, settings)
    notes = taught(trainee, settings, Poisoned(task.x, task.y))
    assert trainee.progress.skipped == 2  # row 7 comes once in each of two epochs
    assert notes.rows[-2]["skipped"] == 2
    assert all(p.isfinite().all() for p in trainee.model.parameters())
    assert json.loads(json.dumps(notes.rows, allow_nan=False)) == notes.rows


def test_where_every_step_would_be_left_out_the_run_stops() -> None:
    task, settings = planted(), section(steps=60, lr=1e-3, non_finite="skip")
    hopeless = Poisoned(task.x * float("inf"), task.y)
    trainee = pupil(LORA, settings)
    with pytest.raises(NotFiniteError, match=r"step 10: .*as in the 9 steps before"):
        taught(trainee, settings, hopeless)


def test_scoring_leaves_the_model_in_training() -> None:
    settings = section(steps=4, eval_every=2)
    trainee = pupil(LORA, settings)
    taught(trainee, settings)
    assert trainee.model.training


# what a variant may ask of the loop


def under(controller: type[Controller[Any, Any]], settings: Any) -> Trainee:
    """A pupil whose controller is of that kind."""
    trainee = pupil(LORA, settings)
    return replace(trainee, controller=controller(trainee.layers, LORA, settings.steps))


class Staged(Controller[Any, Any]):
    """Three stages, the last of which freezes the weights."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: list[tuple[int, float]] = []

    def stages(self) -> tuple[Stage, ...]:
        return Stage(20), Stage(10, 0.5), Stage(10, 0.0)

    def after_step(self, ctx: Step) -> Kept:
        self.seen.append((ctx.stage, ctx.rate(self.layers["up"].B)))
        return {}

    def settled(self) -> bool:
        return False  # else a best score would be saved whatever the stages


def test_every_stage_has_a_warm_up_and_a_decay_of_its_own() -> None:
    settings = section(steps=40, warmup=0.2, lr=1e-2)
    trainee = under(Staged, settings)
    taught(trainee, settings)
    long, short = (
        [optim.factor(step, steps, settings) for step in range(1, steps + 1)] for steps in (20, 10)
    )
    want = [*long, *(0.5 * share for share in short), *[0.0] * 10]
    assert [stage for stage, _ in trainee.controller.seen] == [0] * 20 + [1] * 10 + [2] * 10
    assert [rate for _, rate in trainee.controller.seen] == pytest.approx([1e-2 * f for f in want])


def test_every_stage_ends_with_a_score_and_a_checkpoint() -> None:
    settings = section(steps=40, eval_every=None, save_every=None, log_every=100)
    notes = taught(under(Staged, settings), settings)
    scored = [row for row in notes.rows if "ranks" not in row]
    assert [row["step"] for row in scored] == [20, 30, 40]
    assert notes.saved == [20, 30, 40]
    assert scored[1]["loss"] == scored[2]["loss"]  # nothing moved at rate 0


def test_a_run_of_one_stage_is_scored_and_saved_as_the_recipe_says() -> None:
    settings = section(steps=12, eval_every=5, save_every=6)
    notes = taught(pupil(LORA, settings), settings)
    assert [row["step"] for row in notes.rows if "ranks" not in row] == [5, 10, 12]
    assert {6, 12} <= set(notes.saved)


class Weighed(Controller[Any, Any]):
    """Looks at the gradients of B as they come, and adds `weight` times its sum to the loss."""

    weight = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.gradients: list[Tensor] = []

    def penalty(self) -> Tensor | None:
        return self.weight * self.layers["up"].B.sum() + 5.0 if self.weight else None

    def before_step(self, ctx: Step) -> None:
        self.gradients.append(self.layers["up"].B.grad.clone())


class Penalised(Weighed):
    weight = 7.0


@pytest.mark.parametrize(("batch_size", "accumulate"), [(16, 1), (4, 4)])
def test_a_penalty_is_added_once_a_step_and_is_no_part_of_the_loss_that_is_told(
    batch_size: int, accumulate: int
) -> None:
    settings = section(steps=1, batch_size=batch_size, accumulate=accumulate, log_every=1)
    gradients, losses = [], []
    for kind in (Weighed, Penalised):
        torch.manual_seed(0)
        trainee = under(kind, settings)
        losses.append(taught(trainee, settings).rows[0]["loss"])
        gradients += trainee.controller.gradients
    assert losses[0] == losses[1]
    assert_close(gradients[1] - gradients[0], torch.full_like(gradients[0], 7.0))


def test_before_the_step_gradients_are_not_clipped_yet() -> None:
    settings = section(steps=1, clip=1e-3, log_every=1)
    norms = {}

    class Looks(Controller[Any, Any]):
        def before_step(self, ctx: Step) -> None:
            norms["before"] = self.norm()

        def after_step(self, ctx: Step) -> Kept:
            norms["after"] = self.norm()
            return {}

        def norm(self) -> float:
            layers = self.layers.values()
            gradients = [p.grad for layer in layers for p in (layer.A, layer.B)]
            return float(torch.cat([g.flatten() for g in gradients]).norm())

    row = taught(under(Looks, settings), settings).rows[0]
    assert norms["before"] == pytest.approx(row["norm"])
    assert norms["after"] == pytest.approx(1e-3, rel=1e-3)


class Compacts(Controller[Any, Any]):
    """Gives up ranks 0 and 2 of a layer at step 5, and reads rates to the end."""

    def after_step(self, ctx: Step) -> Kept:
        assert ctx.rate(self.layers["up"].B) > 0
        return {"up": torch.tensor([1, 3])} if ctx.step == 5 else {}


def test_ranks_that_are_dead_change_no_step_whether_they_are_compacted_away_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the moments of those that stay went with them, and the optimizer moves the new ones."""
    monkeypatch.setattr(LoRALinear, "ranked", {"A": 0, "B": 1})
    settings = section(steps=20, log_every=1)
    ended, losses = [], []
    for kind in (Controller, Compacts):
        torch.manual_seed(0)
        trainee = under(kind, settings)
        with torch.no_grad():  # a row of A and a column of B that are 0 have no gradient
            trainee.layers["up"].A[[0, 2]] = 0.0
        notes = taught(trainee, settings)
        losses.append([row["loss"] for row in notes.rows if "ranks" in row])
        ended.append(trainee)
    assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    whole, small = (trainee.layers["up"] for trainee in ended)
    assert small.A.shape == (2, 16)
    assert small.B.shape == (48, 2)
    assert_close(small.A, whole.A[[1, 3]])
    assert_close(small.delta(), whole.delta())
    assert {id(p) for p in optim.parameters(ended[1].optimizer)} == {
        id(p) for p in ended[1].model.parameters() if p.requires_grad
    }


class Warns(Controller[Any, Any]):
    def ended(self) -> tuple[str, ...]:
        return ("no gate has moved",)


class Fails(Controller[Any, Any]):
    def ended(self) -> tuple[str, ...]:
        raise LorakitError("no rank has moved; a longer run may help")


def test_what_a_variant_says_at_the_end_reaches_the_screen(
    recipe: Path, lorakit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "VARIANT", lora.VARIANT._replace(controller=Warns))
    answer = lorakit("train", recipe)
    assert answer.code == 0
    assert "WARNING: no gate has moved" in answer.err
    answer = lorakit("train", recipe, "output_dir=runs/other", "--json")
    assert "WARNING: no gate has moved" in answer.err
    assert json.loads(answer.out)["warnings"] == ["no gate has moved"]


def test_a_run_that_did_not_do_what_was_asked_fails_and_keeps_its_checkpoints(
    recipe: Path, lorakit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "VARIANT", lora.VARIANT._replace(controller=Fails))
    answer = lorakit("train", recipe)
    assert answer.code == 2
    assert "no rank has moved; a longer run may help" in answer.err
    assert (recipe.parent / "runs/tiny/checkpoints/step-000006").is_dir()


# learning rates


def test_rates_rise_to_the_peak_then_fall_to_zero_just_behind_the_last_step() -> None:
    settings = section(steps=100, warmup=0.1, schedule="linear")
    factors = [optim.factor(step, 100, settings) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[-1] == pytest.approx(1 / 90)
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_cosine_is_half_way_in_the_middle_and_constant_stays() -> None:
    cosine, constant = (section(warmup=0.0, schedule=kind) for kind in ("cosine", "constant"))
    assert optim.factor(51, 100, cosine) == pytest.approx(0.5)
    assert {optim.factor(step, 100, constant) for step in range(1, 101)} == {1.0}


def test_no_step_has_rate_zero() -> None:
    for steps in (1, 2, 3, 10):
        for kind in ("linear", "cosine", "constant"):
            settings = section(warmup=0.5, schedule=kind)
            assert all(optim.factor(step, steps, settings) > 0 for step in range(1, steps + 1))


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = optim.adamw(model, {}, section(weight_decay=0.1))
    decay = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def test_intervals_in_epochs_are_turned_into_steps() -> None:
    settings = section(steps=None, epochs=3, eval_every="1 epoch", save_every="2 epochs")
    assert settings.timetable(50) == Timetable(150, 10, 50, 100)
    assert section(steps=None, epochs=0.5).timetable(50).steps == 25
