"""Merges a finished adapter into its base: a model that transformers loads without any of us.

    W' = W + dW         in float32, W dequantised where it is stored in codes

For updates of full rank, which no small pair is, this is the only way out; for others it trades
the small folder for one forward pass without the detour through the rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import models, seal
from lorakit.adapter import Adapter
from lorakit.base import dense_weight, is_linear, is_quantized, with_weight
from lorakit.card import merged_card
from lorakit.disk import refuse_existing, whole_folder
from lorakit.errors import LorakitError, NotCodedError
from lorakit.export import largest, refuse_wrong, tolerance, write_beside
from lorakit.models import ModelSection
from lorakit.trained import Trained, logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Merged:
    """What was written, and how it compares with what it was written from."""

    out: Path
    source: Path
    base: str
    """The base model's name."""
    linears: int
    """How many took an update."""
    dtype: str
    """What the weights are stored in."""
    size: int
    """Bytes of the weight files."""
    difference: float
    """Largest difference of logits between the folder, reloaded, and the unmerged model."""
    exact: float
    """The same before weights were rounded to `dtype`; equal to `difference` in fp32."""


def merge(trained: Trained, out: Path, dtype: str = "auto") -> Merged:
    """Writes base, update and trained modules to `out` as one model; `trained` is used up.

    `dtype` is one of `DTYPES`, or `auto`: what the base's own files are stored in.

    Raises:
        FolderError: `out` exists or cannot be written.
        LorakitError: a linear computes more than a weight does; or the folder, read back by
            transformers alone, does not answer as the unmerged model, and nothing is left.

    """
    refuse_existing(out, "Choose another with --out.")
    for name, layer in trained.layers.items():
        _refuse_outer_quantisers(name, layer)
    stored = _stored(trained.base) if dtype == "auto" else dtype
    model, rows = trained.model, models.probe(trained.model)
    before = logits(model, rows)
    into_base(model, trained.layers)
    exact = largest(logits(model, rows), before)
    refuse_wrong("merged", exact, tolerance(before))
    with whole_folder(out) as folder:
        _save(model, DTYPES[stored], folder)
        write_beside(trained, folder)
        expected = logits(model, rows)  # of the rounded weights
        after = _reloaded(trained, folder)
        refuse_wrong(f"{out}: read back", largest(after, expected), tolerance(expected))
        merged = Merged(
            out=out,
            source=trained.path,
            base=trained.base.name,
            linears=len(trained.layers),
            dtype=stored,
            size=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            difference=largest(after, before),
            exact=exact,
        )
        names = {file.name for file in folder.iterdir()} - {"recipe.yaml"}
        seal.write(folder, names)  # last: what is read back is not hashed for it
        (folder / "README.md").write_text(merged_card(trained, merged), encoding="utf-8")
    return merged


def into_base(model: nn.Module, layers: Mapping[str, Adapter]) -> None:
    """Puts W + dW in the place of every layer, and plain weights in that of codes; in place."""
    for name, layer in layers.items():
        _put(model, name, with_weight(layer.base, dense_weight(layer.base) + layer.delta()))
    for name, module in list(model.named_modules()):
        if is_linear(module) and is_quantized(module):
            _put(model, name, with_weight(module, dense_weight(module)))
    _forget_storage(model)


def _forget_storage(model: Any) -> None:
    """Lets the configuration say what is true of the weights now: not in codes, perhaps untied."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if outer is not None and outer.weight is not inner.weight:
        model.config.tie_word_embeddings = False


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _refuse_outer_quantisers(name: str, layer: Adapter) -> None:
    """Raises LorakitError where codes are computed on grids that stand around the pair."""
    try:
        grids = layer.coded().grids.present()
    except NotCodedError:
        return
    if grids:
        raise LorakitError(
            f"{name} quantises more than its pair while it computes ({', '.join(grids)}), which no "
            "weight of a plain model does. `lorakit prune --packed` keeps it as it was trained."
        )


def _save(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Writes weights and configuration, and leaves the weights in `model` rounded to `dtype`."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    for parameter in parameters:
        parameter.data = parameter.data.float()


def _reloaded(trained: Trained, folder: Path) -> Tensor:
    """The answers of the folder as transformers loads it."""
    section = ModelSection(name=str(folder), precision="fp32")
    model = models.load(section, trained.head, seed=0).model.eval()
    return logits(model, models.probe(model))


def _stored(section: ModelSection) -> str:
    kind = models.stored_in(section)
    return next((name for name, dtype in DTYPES.items() if dtype == kind), "fp32")
