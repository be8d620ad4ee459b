"""The loop beside a device that goes on by itself, as GPUs do: it is waited for when it must be."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from planted import Calls, Notes, Poisoned, planted, pupil, section, taught

from lorakit.engine import Engine, Sums
from lorakit.errors import NotFiniteError
from lorakit.trainee import Trainee
from lorakit.variants.lora import LoRAConfig

LORA = LoRAConfig(variant="lora", rank=4, alpha=8.0)


class Waiting(Engine):
    """A CPU of which the loop thinks that numbers must be waited for; counts what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = True
        self.reads: list[int] = []

    def read(self, steps: Sequence[Sums]) -> list[tuple[float, float]]:
        self.reads += [len(steps)] if steps else []
        return super().read(steps)


def learner(settings: Any) -> Trainee:
    """The same at every call."""
    torch.manual_seed(0)
    return pupil(LORA, settings)


def told(notes: Notes) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [{k: v for k, v in row.items() if k != "samples_per_s"} for row in notes.rows]


def test_the_run_is_the_same_bit_for_bit_and_numbers_are_read_when_they_are_told() -> None:
    settings, engine = section(steps=12, log_every=5, eval_every=4), Waiting()
    here, there = learner(settings), learner(settings)
    near, far = taught(here, settings), taught(there, settings, engine=engine)
    assert engine.reads == [4, 1, 3, 2, 2]  # at 4, 5, 8, 10 and 12
    assert told(far) == told(near)
    assert far.saved == near.saved
    for own, other in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_no_number_is_asked_for_between() -> None:
    """But for the norm of a row that is told, which is there by then."""
    counted = []
    for steps in (10, 30):
        settings = section(steps=steps, log_every=10)
        trainee = pupil(LORA, settings)
        with Calls() as calls:
            taught(trainee, settings, engine=Waiting())
        counted.append(calls.counts["_local_scalar_dense"])
    rows_more, of_the_scores = 2, counted[0] - 1
    assert counted[1] == counted[0] + rows_more
    assert of_the_scores < 5


def test_a_loss_that_is_not_finite_is_found_late_and_told_of_its_own_step() -> None:
    """No later than at the next row that is told, and nothing is saved of it."""
    task, settings = planted(), section(steps=60, batch_size=8, log_every=50, save_every=1)
    trainee, notes = pupil(LORA, settings), Notes()
    with pytest.raises(NotFiniteError) as near:
        taught(trainee, settings, Poisoned(task.x, task.y), notes=notes)
    saved = notes.saved
    late, notes = section(steps=60, batch_size=8, log_every=50), Notes()
    with pytest.raises(NotFiniteError) as far:
        taught(pupil(LORA, late), late, Poisoned(task.x, task.y), Waiting(), notes)
    assert str(far.value) == str(near.value)
    assert str(far.value).startswith(f"step {saved[-1] + 1}: ")
    assert not notes.saved
    assert not notes.rows


def test_a_step_that_may_be_skipped_is_read_before_it_is_taken() -> None:
    task = planted()
    settings = section(steps=2 * task.rows("train") // 16, non_finite="skip", log_every=100)
    trainee, engine = pupil(LORA, settings), Waiting()
    taught(trainee, settings, Poisoned(task.x, task.y), engine)
    assert trainee.progress.skipped == 2
    assert set(engine.reads) == {1}
    assert all(p.isfinite().all() for p in trainee.model.parameters())


class Told(Notes):
    """Says to stop at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def stopping(self) -> bool:
        return len(self.ticks) >= self.step - 1


def test_what_is_saved_on_being_told_to_stop_was_read_before() -> None:
    task, settings = planted(), section(steps=60, batch_size=8, log_every=50)
    poisoned = Poisoned(task.x, task.y)
    epoch = task.steps(8, 1, seed=0)
    sick = next(step for step in range(1, 60) if 7 in next(epoch)[0].rows)
    assert 1 < sick < 50
    for step in (sick - 1, sick):
        trainee, engine, notes = pupil(LORA, settings), Waiting(), Told(step)
        if step == sick:
            with pytest.raises(NotFiniteError):
                taught(trainee, settings, poisoned, engine, notes)
        else:
            taught(trainee, settings, poisoned, engine, notes)
        assert notes.saved == [step] * (step < sick)
        assert engine.reads == [step]
