"""llama.cpp's file for an adapter, written and read back with its own package, gguf.

    dW = alpha / r  B A        alpha of the file, r of the pair (llama.cpp, src/llama-adapter.h)

Ranks that differ would so be scaled differently; B is divided by that scale, and what comes out is
B A for every rank. Names are those of `convert_lora_to_gguf.py`. Of Llama and its kin llama.cpp
keeps the outputs of q and k in another order, which halves of a head are turned into pairs by for
its rotary positions (`LlamaModel.permute`, conversion/llama.py); rows of B are put in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lorakit.adapter import Factors
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from gguf import TensorNameMap

Pairs = Mapping[str, Factors]


class Family(NamedTuple):
    """How llama.cpp knows an architecture."""

    name: str
    turned: bool
    """Whether rows of q and k stand in another order there."""


FAMILIES = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "qwen2": Family("qwen2", turned=False),
    "qwen3": Family("qwen3", turned=False),
    "gemma": Family("gemma", turned=False),
    "gemma2": Family("gemma2", turned=False),
    "gemma3_text": Family("gemma3", turned=False),
}
"""By what transformers calls the architecture."""


def check(config: Any, names: list[str]) -> None:
    """Refuses what llama.cpp would not load for a model of this `config`.

    Raises:
        LorakitError: the package is missing, the architecture is unknown here, or a linear of the
            `names` has no counterpart.

    """
    if find_spec("gguf") is None:
        raise LorakitError(
            "--format gguf needs the package gguf, which is not installed; pip install "
            "'lorakit[gguf]'."
        )
    if config.model_type not in FAMILIES:
        raise LorakitError(
            f"--format gguf: the names that llama.cpp gives to {config.model_type} are not known "
            f"here; known are {', '.join(FAMILIES)}. `lorakit merge` writes a whole model, which "
            "its own converter takes."
        )
    known = _names(config)
    strange = [name for name in names if known.get_name(name) is None]
    if config.tie_word_embeddings:  # then the file of the base has no output matrix
        strange += [name for name in names if known.get_name(name) == "output"]
    if strange:
        raise LorakitError(
            f"--format gguf: llama.cpp's model has no matrix of its own for {', '.join(strange)}; "
            "`lorakit merge` writes a whole model, which its own converter takes."
        )


def write(path: Path, pairs: Pairs, config: Any) -> None:
    """Writes the pairs, in float32, for a base model of this `config`; ranks of 0 are left out."""
    from gguf import GGUFType, GGUFWriter, Keys

    names, alpha = _names(config), max(pair.rank for pair in pairs.values())
    writer = GGUFWriter(path, FAMILIES[config.model_type].name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, pair in pairs.items():
        if pair.rank:
            B = _order(pair.B * (pair.rank / alpha), name, config)
            writer.add_tensor(f"{names.get_name(name)}.weight.lora_a", _array(pair.A))
            writer.add_tensor(f"{names.get_name(name)}.weight.lora_b", _array(B))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path, config: Any, names: list[str]) -> dict[str, Factors]:
    """The pairs of those linears of `names` that are in the file, as llama.cpp computes them."""
    from gguf import GGUFReader, Keys

    reader, known = GGUFReader(path), _names(config)
    alpha = reader.fields[Keys.Adapter.LORA_ALPHA].contents()
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    found = {}
    for name in names:
        A = tensors.get(f"{known.get_name(name)}.weight.lora_a")
        B = tensors.get(f"{known.get_name(name)}.weight.lora_b")
        if A is not None and B is not None:
            found[name] = Factors(A, _order(B * (alpha / B.shape[1]), name, config, back=True))
    return found


def _names(config: Any) -> TensorNameMap:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    family = FAMILIES[config.model_type].name
    arch = next(kind for kind in MODEL_ARCH if MODEL_ARCH_NAMES[kind] == family)
    return get_tensor_name_map(arch, config.num_hidden_layers)


def _order(B: Tensor, name: str, config: Any, back: bool = False) -> Tensor:
    """The rows of B, (m, r), as llama.cpp orders those of this linear, or `back` from there."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.rpartition(".")[2])
    if count is None or not FAMILIES[config.model_type].turned:
        return B
    half = len(B) // count // 2
    split = (count, half, 2) if back else (count, 2, half)
    return B.reshape(*split, -1).transpose(1, 2).reshape(B.shape)


def _array(tensor: Tensor) -> Any:
    return tensor.float().contiguous().numpy()
