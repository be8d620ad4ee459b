"""What is said of a pruned folder: to the terminal, in its model card, and to programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from lorakit import __version__
from lorakit.places import PACKAGE

if TYPE_CHECKING:
    from lorakit.bops import Costs
    from lorakit.merge import Merged
    from lorakit.models import ModelSection
    from lorakit.prune import Selection
    from lorakit.trained import Trained

_LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


Form = Literal["plain", "packed"]
"""A PEFT folder in float32, or integer codes."""


GROWN = (
    "More ranks than at the start: the start, which is subtracted, takes as many again. "
    "`lorakit prune --rank R` cuts them, and tells the error."
)


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
    form: Form = "plain"
    forms: dict[str, int] = field(default_factory=dict)
    """Bytes of the weight files in each form that there is, head included; empty without codes."""
    costs: Costs | None = None
    """Of the codes; null where there are none, or where they are not what was written."""

    @property
    def grown(self) -> bool:
        """Whether the plain pairs have more ranks than the layers that learned them."""
        return sum(self.ranks.values()) > sum(self.start.values())


def card(trained: Trained, pruned: Pruned) -> str:
    """Markdown: what this adapter is, how to load it, its ranks, and how it was checked."""
    plain = pruned.form == "plain"
    kept, total = sum(pruned.ranks.values()), sum(pruned.start.values())
    lines = ["---", f"library_name: {'peft' if plain else 'lorakit'}"]
    lines += _base_model(trained)
    title = f"# {pruned.source.name}, {'pruned' if plain else 'packed'}"
    lines += ["tags: [lora, lorakit]", "---", "", title, ""]
    kind = "A LoRA adapter" if plain else "A low-rank adapter in integer codes"
    lines.append(f"{kind} for `{_base(trained)}`, {kept} of {total} ranks kept.")
    lines += [*_training(trained), ""]
    if plain and _apart(trained):
        lines += ["PEFT does not find this base by its name, so it is loaded first.", ""]
    lines += ["```python", *_loading(trained, pruned), "```", ""]
    if trained.head.labels:
        lines += [f"Labels, in the order of the outputs: {', '.join(trained.head.labels)}.", ""]
    lines += [*_modules(pruned), ""]
    lines += [f"Relative error of the update: {pruned.error:.3g}. Read back into a fresh base,"]
    lines.append(f"the largest difference of a logit was {pruned.difference:.2g}.")
    if pruned.costs is not None:
        lines += ["", *told(pruned.costs)]
    if pruned.grown:
        lines += ["", GROWN]
    if pruned.limits:
        lines += ["", "Other readers:", "", *(f"- {limit}" for limit in pruned.limits)]
    return "\n".join(lines) + "\n"


def _base(trained: Trained) -> str:
    """The base model as others may know it: a folder of this machine by its own name alone."""
    name = trained.base.name
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _base_model(trained: Trained) -> list[str]:
    """The hub's word for it, where it may be the hub's."""
    name = trained.base.name
    known = name == _base(trained) and not _apart(trained)
    return [f"base_model: {json.dumps(name)}"] if known else []


def merged_card(trained: Trained, merged: Merged) -> str:
    """Markdown: what this model is, how to load it, and how it was checked."""
    lines = ["---", "library_name: transformers"]
    lines += _base_model(trained)
    lines += ["tags: [lorakit]", "---", "", f"# {merged.source.name}, merged", ""]
    lines.append(
        f"`{_base(trained)}` with the update of {merged.linears} linears added to its weights "
        f"in float32, stored in {merged.dtype}."
    )
    if trained.base.quantize is not None:
        lines.append(f"The weights are those that the base had in {trained.base.quantize} codes.")
    loader = _loader(trained).removeprefix("AutoPeft")
    code = [
        f"from transformers import Auto{loader}",
        "",
        f"model = Auto{loader}.from_pretrained(FOLDER)",
    ]
    lines += [*_training(trained), "", "```python", *code, "```", ""]
    if trained.head.labels:
        lines += [f"Labels, in the order of the outputs: {', '.join(trained.head.labels)}.", ""]
    lines.append(
        "Read back by transformers alone, the largest difference of a logit to the base with its "
        f"adapter was {merged.difference:.2g}."
    )
    return "\n".join(lines) + "\n"


def told(costs: Costs) -> tuple[str, ...]:
    """Storage and bit operations in sentences, each share with what it is a share of."""
    bill = costs.total
    whole, whole_float = bill.adapter + bill.base, bill.adapter_float + bill.base_float
    lora = "LoRA at the start's ranks in float32"
    return (
        f"Codes take {bill.storage:,} bits, {bill.storage / bill.storage_float:.1%} of the "
        f"{bill.storage_float:,} of {lora}.",
        f"Bit operations a token, adapter alone: {bill.adapter:,}, {bill.share:.1%} of the "
        f"{bill.adapter_float:,} of {lora}.",
        f"With the adapted linears' base weights: {whole:,}, {bill.share_with_base:.1%} of "
        f"{whole_float:,} in float32.",
    )


def _training(trained: Trained) -> list[str]:
    recipe, lines = trained.recipe, []
    if recipe is not None:
        lines.append(
            f"Trained by lorakit with the variant `{recipe.adapter.variant}` on "
            f"`{recipe.task.name}`, seed {recipe.seed}, to step {trained.step}; "
            "`recipe.yaml` beside this file has every setting."
        )
    known = [f"{name} `{origin}`" for name, origin in trained.origins.items() if origin]
    if known:
        lines.append(f"Its rows, by commit or SHA-256: {', '.join(known)}.")
    if trained.base.quantize is not None:
        lines.append(
            f"The linears of its base were stored in {trained.base.quantize} codes; over weights "
            "in full precision it is not the same model."
        )
    if trained.scores:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in trained.scores.items())
        lines.append(f"Validation scores of the run at that step ({trained.precision}): {scores}.")
    return lines


def _loading(trained: Trained, pruned: Pruned) -> list[str]:
    if pruned.form == "packed":
        return [
            "from pathlib import Path",
            "",
            "from lorakit.trained import open_trained",
            "",
            "model = open_trained(Path(FOLDER)).model",
        ]
    codes = _codes(trained)
    if _apart(trained):
        return _loading_apart(trained, codes)
    imports = ["import transformers"] if codes else []
    call = f"model = {_loader(trained)}.from_pretrained({_given(trained, 'FOLDER')})"
    return [*imports, f"from peft import {_loader(trained)}", "", *codes, call]


def _apart(trained: Trained) -> bool:
    """Whether the base is where PEFT does not look: inside a package, or in a GGUF file."""
    return trained.base.name.startswith(PACKAGE) or trained.base.gguf is not None


def _loading_apart(trained: Trained, codes: list[str]) -> list[str]:
    """The base first, then the adapter. transformers makes no codes of a GGUF file by itself."""
    file, (folder, imports) = trained.base.gguf, _folder(trained.base)
    auto = f"transformers.{_loader(trained).replace('AutoPeft', 'Auto')}.from_pretrained"
    lines = [*imports, "import transformers", "from peft import PeftModel", "", *codes]
    if file is None:
        given = _given(trained, folder)
    elif codes:
        whole = "quantization_config=transformers.GgufConfig(dequantize=True)"
        lines.append(f"model = {auto}({folder}, gguf_file={file!r}, {whole})")
        lines.append("model.save_pretrained('unpacked')")
        given = _given(trained, "'unpacked'")
    else:
        given = f"{_given(trained, folder)}, gguf_file={file!r}"
    return [*lines, f"model = {auto}({given})", "model = PeftModel.from_pretrained(model, FOLDER)"]


def _folder(base: ModelSection) -> tuple[str, list[str]]:
    """Where a base is that stands apart, in Python, and what that imports."""
    if not base.name.startswith(PACKAGE):
        return "DIR", [f"# DIR is the folder that {base.gguf} is in"]
    package, _, inside = base.name.removeprefix(PACKAGE).partition("/")
    inside = str(PurePosixPath(inside).parent) if base.gguf else inside
    place = f"distribution({package!r}).locate_file({inside!r})"
    return place, ["from importlib.metadata import distribution", ""]


def _codes(trained: Trained) -> list[str]:
    """How transformers is told to store the base as lorakit does; modules trained whole are not."""
    base = trained.base
    if base.quantize is None:
        return []
    bits = 8 if base.quantize == "int8" else 4
    given = [f"load_in_{bits}bit=True"]
    if bits == 4:
        given.append(f"bnb_4bit_quant_type={base.quantize!r}")
        given.append(f"bnb_4bit_use_double_quant={base.double_quant}")
    if trained.whole:
        given.append(f"llm_int8_skip_modules={list(trained.whole)}")
    return [
        "codes = transformers.BitsAndBytesConfig(",
        *(f"    {argument}," for argument in given),
        ")",
    ]


def _modules(pruned: Pruned) -> list[str]:
    """The table of ranks, and of bits where codes were written."""
    if pruned.form == "plain" or pruned.costs is None:
        lines = ["| module | rank | of |", "| --- | --: | --: |"]
        return lines + [f"| `{n}` | {pruned.ranks[n]} | {of} |" for n, of in pruned.start.items()]
    lines = ["| module | rank | of | bits of A, E, B |", "| --- | --: | --: | --- |"]
    bits = {n: ", ".join(map(str, (b.A, b.E, b.B))) for n, b in pruned.costs.bits.items()}
    return lines + [
        f"| `{n}` | {pruned.ranks[n]} | {of} | {bits.get(n, '')} |"
        for n, of in pruned.start.items()
    ]


def _loader(trained: Trained) -> str:
    return _LOADERS.get(trained.head.kind or "", "AutoPeftModel")


def _given(trained: Trained, folder: str) -> str:
    """The arguments that a base is loaded with: of classifiers, labels and what fills rows up."""
    given, words = [folder], trained.tokenizer
    if trained.head.labels:
        given.append(f"num_labels={len(trained.head.labels)}")
        if words.pad_token_id == words.eos_token_id:  # the base has none of its own
            given.append(f"pad_token_id={words.pad_token_id}")
    if trained.base.quantize:
        given += ["quantization_config=codes", "dtype='auto'"]
    return ", ".join(given)


def provenance(trained: Trained, pruned: Pruned, selection: Selection) -> dict[str, Any]:
    """`lorakit.json`."""
    return {
        "format": 1,
        "lorakit": __version__,
        "source": trained.path.name,
        "step": trained.step,
        "labels": list(trained.head.labels),
        "multiple": trained.head.multiple,
        "precision": trained.precision,
        "scores": dict(trained.scores),
        "base": asdict(trained.fingerprint),
        "origins": dict(trained.origins),
        "selection": selection._asdict() if selection.lossy else "exact",
        "start": pruned.start,
        "ranks": pruned.ranks,
        "parameters": pruned.parameters,
        "bytes": pruned.size,
        "relative_error": pruned.error,
        "logit_difference": pruned.difference,
        "logit_shift": pruned.shift,
        "form": pruned.form,
        "bytes_by_form": pruned.forms,
        "costs": asdict(pruned.costs) if pruned.costs else None,
    }
