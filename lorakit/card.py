"""What is said of a pruned folder: to the terminal, in its model card, and to programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import __version__

if TYPE_CHECKING:
    from lorakit.prune import Selection
    from lorakit.trained import Trained

_LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
}


@dataclass(frozen=True)
class Pruned:
    """What was written, and how it compares with what it was written from."""

    out: Path
    source: Path
    start: dict[str, int]
    """Ranks at the start, by module."""
    ranks: dict[str, int]
    """Ranks kept; 0 where the module left the adapter."""
    parameters: tuple[int, int]
    """Numbers in the pairs, at the start ranks and kept."""
    size: tuple[int, int]
    """Bytes of the weight files, before and after, head included."""
    error: float
    """Relative error of the update; 0 where only dead ranks left."""
    difference: float
    """Largest difference of logits between the folder, reloaded, and what it should be."""
    shift: float
    """Largest difference of logits to the adapter before pruning."""
    limits: tuple[str, ...]
    """What readers other than PEFT will not take."""


def card(trained: Trained, pruned: Pruned) -> str:
    """Markdown: what this adapter is, how to load it, its ranks, and how it was checked."""
    recipe, kept = trained.recipe, sum(pruned.ranks.values())
    total = sum(pruned.start.values())
    lines = ["---", "library_name: peft"]
    if not trained.base.name.startswith("package:"):
        lines.append(f"base_model: {json.dumps(trained.base.name)}")
    lines += ["tags: [lora, lorakit]", "---", "", f"# {pruned.source.name}, pruned", ""]
    lines.append(f"A LoRA adapter for `{trained.base.name}`, {kept} of {total} ranks kept.")
    if recipe is not None:
        lines.append(
            f"Trained by lorakit with the variant `{recipe.adapter.variant}` on "
            f"`{recipe.task.name}`, seed {recipe.seed}, to step {trained.step}; "
            "`recipe.yaml` beside this file has every setting."
        )
    if trained.scores:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in trained.scores.items())
        lines.append(f"Validation scores of the run at that step ({trained.precision}): {scores}.")
    lines += [
        "",
        "```python",
        f"from peft import {_loader(trained)}",
        "",
        _call(trained),
        "```",
        "",
    ]
    if trained.head.labels:
        lines += [f"Labels, in the order of the outputs: {', '.join(trained.head.labels)}.", ""]
    lines += ["| module | rank | of |", "| --- | --: | --: |"]
    lines += [f"| `{name}` | {pruned.ranks[name]} | {of} |" for name, of in pruned.start.items()]
    lines += ["", f"Relative error of the update: {pruned.error:.3g}. Read back into a fresh base,"]
    lines.append(f"the largest difference of a logit was {pruned.difference:.2g}.")
    if pruned.limits:
        lines += ["", "Other readers:", "", *(f"- {limit}" for limit in pruned.limits)]
    return "\n".join(lines) + "\n"


def _loader(trained: Trained) -> str:
    return _LOADERS.get(trained.head.kind or "", "AutoPeftModel")


def _call(trained: Trained) -> str:
    count = f", num_labels={len(trained.head.labels)}" if trained.head.labels else ""
    return f"model = {_loader(trained)}.from_pretrained(FOLDER{count})"


def provenance(trained: Trained, pruned: Pruned, selection: Selection) -> dict[str, Any]:
    """`lorakit.json`."""
    return {
        "format": 1,
        "lorakit": __version__,
        "source": trained.path.name,
        "step": trained.step,
        "labels": list(trained.head.labels),
        "precision": trained.precision,
        "scores": dict(trained.scores),
        "selection": selection._asdict() if selection.lossy else "exact",
        "start": pruned.start,
        "ranks": pruned.ranks,
        "parameters": pruned.parameters,
        "bytes": pruned.size,
        "relative_error": pruned.error,
        "logit_difference": pruned.difference,
        "logit_shift": pruned.shift,
    }
