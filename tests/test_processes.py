"""Two processes on one machine, over gloo: the same run as one process with twice the batch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from stopped import metrics, stop_after
from torch.testing import assert_close


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """Also when stopped and resumed. 60 rows in steps of 16: an epoch's last step has 12."""
    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.05}", "train.log_every=1")
    settings = (*sora, "train.steps=6", "train.eval_every=2", "model.dropout=0.0")
    one = lorakit("train", recipe, *settings, "train.batch_size=16", "output_dir=runs/one")
    assert one.code == 0, one.err
    two = ("train", recipe, *settings, "train.batch_size=8", "output_dir=runs/two")
    assert in_two_processes(*two).stdout.count("lorakit prune runs/two") == 1
    same(Path("runs/two"), Path("runs/one"))

    stop_after(Path("runs/two"), 3)
    assert in_two_processes(*two, "--resume").stderr.count("resumed at step 3 of 6") == 1
    same(Path("runs/two"), Path("runs/one"))


def test_two_processes_learn_bits_and_ranks_as_one_does(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """The noise of the gates is the same in both, and so is their penalty's share."""
    settings = ("adapter.variant=blora", "train.steps=6", "model.dropout=0.0", "train.log_every=1")
    one = lorakit("train", recipe, *settings, "train.batch_size=16", "output_dir=runs/one")
    assert one.code == 0, one.err
    in_two_processes("train", recipe, *settings, "train.batch_size=8", "output_dir=runs/two")
    same(Path("runs/two"), Path("runs/one"))


def test_ranges_of_activations_are_set_by_the_rows_of_both_processes(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """At the end of the warm-up, which is one step here; each has seen half of its rows."""
    settings = ("adapter.variant=blora", "adapter.quantize={activations: true}", "train.steps=3")
    steps = (*settings, "model.dropout=0.0", "train.save_every=1")
    one = lorakit("train", recipe, *steps, "train.batch_size=16", "output_dir=runs/one")
    assert one.code == 0, one.err
    in_two_processes("train", recipe, *steps, "train.batch_size=8", "output_dir=runs/two")
    file = "checkpoints/step-000001/adapter.safetensors"
    found = [load_file(Path("runs", name, file)) for name in ("two", "one")]
    for name, ranges in found[0].items():
        if name.endswith("log_ranges"):
            assert_close(ranges, found[1][name], rtol=1e-4, atol=1e-5)


def test_compaction_is_refused_in_two_processes_before_anything_is_written(recipe: Path) -> None:
    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.05, compact: true}")
    done = in_two_processes("train", recipe, *sora, code=2)
    assert "layers can be compacted in one process only; these are 2" in done.stderr
    assert not Path("runs/tiny").exists()


def in_two_processes(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "lorakit"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (code == 0), done.stderr  # torchrun has a code of its own
    return done


def same(two: Path, one: Path) -> None:
    """Equal but for the order of sums: metrics, adapters, head."""
    assert_close(metrics(two), metrics(one), rtol=1e-4, atol=1e-6)
    for part in ("adapter", "head"):
        file = f"checkpoints/step-000006/{part}.safetensors"
        assert_close(load_file(two / file), load_file(one / file), rtol=1e-4, atol=1e-5)
