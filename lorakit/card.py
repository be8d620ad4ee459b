"""The model card of a pruned adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.export import Pruned
    from lorakit.trained import Trained

_LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
}


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
