"""PEFT's adapter folder, written and read without importing peft.

Scale and gates are folded into B, so every module is written with alpha equal to its rank: scale
alpha / r = 1 for readers that know patterns (PEFT) and for those that read only the global pair
(vLLM). Modules of rank 0 are left out, since PEFT refuses them.

A folder may come from anybody. Nothing in it is executed: weights are read as safetensors alone,
settings as JSON of the types they must have, and patterns, which are regular expressions, within a
time.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lorakit import peft_config
from lorakit.adapter import Factors
from lorakit.errors import FolderError, several
from lorakit.peft_config import CONFIG, Patterns, PeftConfig

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
_FRACTIONS = ("weight", "bias")
_MORE = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
)


class PeftAdapter(NamedTuple):
    """What an adapter folder holds."""

    pairs: dict[str, Factors]  # the scale is folded in
    whole: dict[str, dict[str, Tensor]]  # modules saved whole: name -> state dict
    base_model: str
    task_type: str | None


def is_adapter(folder: Path) -> bool:
    """Whether `folder` looks like PEFT's."""
    return (folder / CONFIG).is_file()


def write(folder: Path, adapter: PeftAdapter) -> None:
    """Writes config and weights into `folder`, which exists."""
    for name, content in encode(adapter).items():
        (folder / name).write_bytes(content)


def encode(adapter: PeftAdapter) -> dict[str, bytes]:
    """The folder's two files, by name.

    An adapter without a single live rank is written with one module of rank 1 whose B is 0: PEFT
    refuses to load an adapter of no modules, and the head still has to travel.
    """
    pairs = {name: pair for name, pair in adapter.pairs.items() if pair.rank}
    if not pairs:
        name, dead = next(iter(adapter.pairs.items()))
        pairs = {
            name: Factors(dead.A.new_zeros(1, dead.A.shape[1]), dead.B.new_zeros(len(dead.B), 1))
        }
    ranks = {name: pair.rank for name, pair in pairs.items()}
    top = max(ranks.values())
    pattern = {_key(name, ranks): rank for name, rank in ranks.items() if rank != top}
    config = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(ranks),
        "modules_to_save": list(adapter.whole) or None,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": tensor.contiguous()
        for name, pair in pairs.items()
        for side, tensor in (("A", pair.A), ("B", pair.B))
    }
    tensors |= {
        f"{PREFIX}{name}.{key}": value.contiguous()
        for name, state in adapter.whole.items()
        for key, value in state.items()
    }
    return {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }


def read(folder: Path) -> PeftAdapter:
    """Reads a LoRA of PEFT's, ours or another's, and believes nothing in it.

    Raises:
        FolderError: a file is missing or broken, the settings are not of their types or disagree
            with the weights, a number is not finite, or it is no plain LoRA on linear layers; all
            faults of the weights are listed.

    """
    config, tensors = peft_config.read(folder), _tensors(folder)
    _refuse_other_kinds(config, folder)
    A = {_stem(name): t for name, t in tensors.items() if name.endswith(".lora_A.weight")}
    B = {_stem(name): t for name, t in tensors.items() if name.endswith(".lora_B.weight")}
    faults = [f"{name}: A or B is missing" for name in sorted(A.keys() ^ B.keys())]
    whole: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            continue
        if module := _owner(name, config.modules_to_save or ()):
            whole.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor.float()
        else:
            faults.append(f"{name}: neither lora_A, lora_B nor of a module saved whole")
    ranks = Patterns(folder, "rank_pattern", config.rank_pattern or {}, config.r)
    alphas = Patterns(folder, "alpha_pattern", config.alpha_pattern or {}, config.lora_alpha)
    pairs = {}
    for name in [name for name in A if name in B]:  # in the file's order
        a, b, rank = A[name], B[name], ranks.of(name)
        if not (a.ndim == b.ndim == 2 and len(a) == b.shape[1]):
            faults.append(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} make no product")
        elif len(a) != rank:
            faults.append(f"{name}: A and B have rank {len(a)}, {CONFIG} says {rank:g}")
        else:
            scale = alphas.of(name) / (rank**0.5 if config.use_rslora else rank)
            pairs[name] = Factors(a.float(), scale * b.float())
    faults += [
        f"{name}: B times its scale, {alphas.of(name):g} over the rank, is not finite"
        for name, pair in pairs.items()
        if not pair.B.isfinite().all()
    ]
    if faults or not pairs:
        raise FolderError(several(str(folder), faults or ["no lora_A and lora_B in its weights"]))
    return PeftAdapter(pairs, whole, config.base_model_name_or_path or "", config.task_type)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The weights by name, without PEFT's prefix.

    Raises:
        FolderError: no safetensors, or a name twice, or a number that is not finite, or integers
            where there should be fractions; all such are listed.

    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / WEIGHTS).with_suffix(".bin").exists()
        hint = "; adapter_model.bin is a pickle, which may run code, and is not read" * pickled
        raise FolderError(f"{folder}: there is no file {WEIGHTS}{hint}.")
    try:
        saved = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read: {error}.") from error
    tensors: dict[str, Tensor] = {}
    faults = []
    for key, tensor in saved.items():
        name = key.removeprefix(PREFIX)
        if not name.isprintable():
            faults.append(f"{name!r}: no name of a module")
        elif name in tensors:
            faults.append(f"{name}: twice, with and without {PREFIX}")
        elif tensor.is_complex() or (name.endswith(_FRACTIONS) and not tensor.is_floating_point()):
            faults.append(f"{name}: {tensor.dtype}; expected fractions")
        elif not tensor.float().isfinite().all():
            faults.append(f"{name}: holds nan or inf")
        tensors[name] = tensor
    if faults:
        raise FolderError(several(str(path), faults))
    return tensors


def _key(name: str, names: Iterable[str]) -> str:
    """The pattern key of a module: its full name, anchored only where that would hit another too.

    PEFT reads a key as a regular expression for the end of a name. Plain full names serve every
    version: earlier ones look them up whole, and match no key that starts with `^` (peft #3582).
    """
    hits = [n for n in names if re.match(rf"(.*\.)?({name})$", n)]
    return name if hits == [name] else f"^{re.escape(name)}"


def _refuse_other_kinds(config: PeftConfig, folder: Path) -> None:
    faults = []
    if config.peft_type != "LORA":
        faults.append(f"peft_type is {config.peft_type!r}, not 'LORA'")
    if config.bias != "none":
        faults.append(f"bias is {config.bias!r}: it trains base biases, which no pair holds")
    faults += [f"{key} is set: its update is more than B A" for key in _MORE if config.other(key)]
    if isinstance(init := config.other("init_lora_weights"), str) and init.startswith(
        ("pissa", "olora", "loftq", "corda", "lora_ga")
    ):
        faults.append(
            f"init_lora_weights is {init!r}: it goes with a changed base; convert it first"
        )
    if faults:
        raise FolderError(several(f"{folder} is no plain LoRA", faults))


def _stem(name: str) -> str:
    return name.rsplit(".", 2)[0]


def _owner(name: str, modules: Iterable[str]) -> str | None:
    """The module saved whole that a tensor belongs to, by full name; PEFT names it by its end."""
    found = (re.match(rf"((?:.*?\.)?{re.escape(module)})\.", name) for module in modules)
    return next((match[1] for match in found if match), None)


def size(folder: Path) -> int:
    """Bytes of the weights."""
    return (folder / WEIGHTS).stat().st_size


def tensors_of(modules: Mapping[str, torch.nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The state of modules saved whole, as `PeftAdapter.whole` wants it."""
    return {
        name: {key: value.detach() for key, value in module.state_dict().items()}
        for name, module in modules.items()
    }
