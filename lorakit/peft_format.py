"""PEFT's adapter folder, written and read without importing peft.

Scale and gates are folded into B, so every module is written with alpha equal to its rank: scale
alpha / r = 1 for readers that know patterns (PEFT) and for those that read only the global pair
(vLLM). Modules of rank 0 are left out, since PEFT refuses them.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.adapter import Factors
from lorakit.errors import FolderError, several

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


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
    """Writes config and weights into `folder`, which exists.

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
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read(folder: Path) -> PeftAdapter:
    """Reads a LoRA of PEFT's, ours or another's.

    Raises:
        FolderError: the files are missing or broken, or it is no plain LoRA on linear layers.

    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is no mapping")
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(f"{folder} cannot be read as a PEFT adapter: {error}.") from error
    _refuse_other_kinds(config, folder)
    names = [key.removeprefix(PREFIX) for key in tensors]
    tensors = dict(zip(names, tensors.values(), strict=True))
    A = {_stem(name): t for name, t in tensors.items() if name.endswith(".lora_A.weight")}
    B = {_stem(name): t for name, t in tensors.items() if name.endswith(".lora_B.weight")}
    whole: dict[str, dict[str, Tensor]] = {}
    faults = [f"{name}: A or B is missing" for name in sorted(A.keys() ^ B.keys())]
    for name, tensor in tensors.items():
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            continue
        if module := _owner(name, config.get("modules_to_save") or ()):
            whole.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor.float()
        else:
            faults.append(f"{name}: neither lora_A, lora_B nor of a module saved whole")
    pairs = {}
    for name in A.keys() & B.keys():
        a, b = A[name], B[name]
        if a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
            pairs[name] = Factors(a.float(), _scale(name, config, len(a)) * b.float())
        else:
            faults.append(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} make no product")
    pairs = {name: pairs[name] for name in A if name in pairs}  # in the file's order
    if faults or not pairs:
        raise FolderError(several(str(folder), faults or ["no lora_A and lora_B in its weights"]))
    base = str(config.get("base_model_name_or_path") or "")
    return PeftAdapter(pairs, whole, base, config.get("task_type"))


def _key(name: str, names: Iterable[str]) -> str:
    """The pattern key of a module: its full name, anchored only where that would hit another too.

    PEFT reads a key as a regular expression for the end of a name. Plain full names serve every
    version: earlier ones look them up whole, and match no key that starts with `^` (peft #3582).
    """
    hits = [n for n in names if re.match(rf"(.*\.)?({name})$", n)]
    return name if hits == [name] else f"^{re.escape(name)}"


def _scale(name: str, config: Mapping[str, Any], rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora, as PEFT computes it for this module."""
    patterns = config.get("alpha_pattern") or {}
    hit = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), name)
    alpha = float(patterns.get(hit, config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path) -> None:
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    if config.get("bias", "none") != "none":
        faults.append(f"bias is {config['bias']!r}: it trains base biases, which no pair holds")
    faults += [f"{key} is set: its update is more than B A" for key in _MORE if config.get(key)]
    if isinstance(init := config.get("init_lora_weights"), str) and init.startswith(
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
