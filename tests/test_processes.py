"""Two processes on one machine, over gloo: the same run as one process with twice the batch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.testing import assert_close


def metrics(run: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "samples_per_s"} for row in rows]


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """60 rows in steps of 16: the last step of an epoch has 12. One process writes and speaks."""
    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.05}", "train.log_every=1")
    settings = (*sora, "train.steps=6", "train.eval_every=2", "model.dropout=0.0")
    one = lorakit("train", recipe, *settings, "train.batch_size=16", "output_dir=runs/one")
    assert one.code == 0, one.err
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "lorakit"]
    command += ["train", str(recipe), *settings, "train.batch_size=8", "output_dir=runs/two"]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lorakit prune runs/two") == 1
    assert_close(metrics("runs/two"), metrics("runs/one"), rtol=1e-4, atol=1e-6)
    for part in ("adapter", "head"):
        two, alone = (
            load_file(f"runs/{run}/checkpoints/step-000006/{part}.safetensors")
            for run in ("two", "one")
        )
        assert_close(two, alone, rtol=1e-4, atol=1e-5)
