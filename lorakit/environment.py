"""What a reader of results needs to know of the machine. No paths, no variables, no secrets."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lorakit.engine import Engine

PACKAGES = (
    "lorakit",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
)
MORE = ("huggingface_hub", "peft", "pydantic", "pyyaml", "numpy", "scikit-learn")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
)
"""Whose values are told in a report: numbers and words. No other variable is ever looked at."""

NUMERIC = ("device", "processor", "threads", "processes")
"""What else sums are taken in another order by."""


def environment(engine: Engine) -> dict[str, Any]:
    """Versions and hardware, as environment.json keeps them."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": str(engine.device),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": engine.processes,
    }


def report(engine: Engine) -> dict[str, Any]:
    """What a report of a fault needs: `environment`, more versions, what the processor can do."""
    found = environment(engine)
    return {
        **found,
        "packages": {**found["packages"], **{name: _version(name) for name in MORE}},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`torch 2.12.0 there, 2.13.0 here`, for all that may change the last digits of a result."""
    told = [{**e.get("packages", {}), **{key: e.get(key) for key in NUMERIC}} for e in (then, now)]
    return [
        f"{key} {told[0].get(key)} there, {value} here"
        for key, value in told[1].items()
        if told[0].get(key) != value
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the project that the run was started in, `-dirty` with changes on top."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
