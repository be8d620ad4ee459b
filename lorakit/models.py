"""The base model and its tokenizer: from the hub, a folder, or an installed package."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.places import PACKAGE, locate
from lorakit.schema import Section

Precision = Literal["auto", "fp32", "bf16"]


class ModelSection(Section):
    """The base model."""

    name: str
    """A hub id, a folder, or `package:DISTRIBUTION/PATH`: a model inside an installed package."""
    revision: str | None = None
    """A branch, tag or commit of the hub's repository."""
    precision: Precision = "auto"
    """What the base weights are stored in: fp32, bf16, or auto: bf16 where the device computes it
    natively. Adapters and the head are float32 always."""
    dropout: float | None = Field(None, ge=0.0, lt=1.0)
    """Dropout within the base model while training; null: as its own configuration has it."""


CLASSIFIER = "SEQ_CLS"
"""PEFT's word for a model with a classification head."""
_CLASSES = {
    CLASSIFIER: "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
    None: "AutoModel",
}


class Head(NamedTuple):
    """What a task asks of the model's last layer, known before the model is loaded."""

    labels: tuple[str, ...] = ()
    """Names of the outputs, one for a regression; empty: as the base model has them."""
    kind: str | None = CLASSIFIER
    """PEFT's task type."""
    multiple: bool = False
    """Whether a text may have any number of the labels."""

    @property
    def problem(self) -> str:
        """What transformers calls it, by its own rule: one output is a regression's."""
        if self.multiple:
            return "multi_label_classification"
        return "regression" if len(self.labels) == 1 else "single_label_classification"


class Base(NamedTuple):
    """A loaded base model."""

    model: nn.Module
    tokenizer: Any
    head: tuple[str, ...]
    """Names of the modules that start anew and are trained whole."""
    max_tokens: int
    """The longest sequence the model has positions for."""


def load(section: ModelSection, head: Head, seed: int) -> Base:
    """Loads model and tokenizer; `seed` draws the head, whatever was drawn before.

    Raises:
        ModelError: the model is not there, not reachable, or not one that classifies.

    """
    import transformers

    _quiet()
    where = resolve(section.name)
    torch.manual_seed(seed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=section.revision)
        config = transformers.AutoConfig.from_pretrained(
            where, revision=section.revision, **_head_settings(head)
        )
        if section.dropout is not None:
            _set_dropout(config, section.dropout)
        model, info = getattr(transformers, _CLASSES[head.kind]).from_pretrained(
            where,
            config=config,
            revision=section.revision,
            dtype=dtype(section.precision),
            attn_implementation=_attention(),
            ignore_mismatched_sizes=bool(head.labels),  # a head of another size starts anew
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load(section, error)) from error
    if model.config.pad_token_id is None:  # decoders classify the last token that is no padding
        model.config.pad_token_id = tokenizer.pad_token_id
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    return Base(model, tokenizer, _head(model, fresh), longest)


def resolve(name: str) -> str:
    """The folder of a `package:` name; any other name as it stands."""
    return str(locate(name, ModelError, "model.name")) if name.startswith(PACKAGE) else name


def dtype(precision: Precision) -> torch.dtype:
    """What `precision` means on this machine's device."""
    if precision == "auto":
        return torch.bfloat16 if _computes_bf16() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def probe(model: nn.Module, rows: int = 4, tokens: int = 24) -> dict[str, Tensor]:
    """A small batch of token ids, the same at every call: to see whether two models agree."""
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(size), (rows, tokens), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _computes_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("bf16"))  # x86; ARM


def _head(model: nn.Module, fresh: set[str]) -> tuple[str, ...]:
    """The outermost modules all of whose parameters are new, and owners of single new ones.

    Where none is (a base that already classifies into these labels) the head is what stands
    outside the backbone.
    """
    if not fresh:
        backbone = getattr(model, "base_model_prefix", "")
        children = [n for n, m in model.named_children() if n != backbone and [*m.parameters()]]
        return tuple(children)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = [f"{name}.{key}" for key, _ in module.named_parameters()]
        covered = any(name.startswith(f"{outer}.") for outer in found)
        if name and inside and fresh.issuperset(inside) and not covered:
            found.append(name)
    alone = [key for key in sorted(fresh) if not any(key.startswith(f"{o}.") for o in found)]
    return tuple(dict.fromkeys([*found, *(key.rpartition(".")[0] for key in alone)]))


def _head_settings(head: Head) -> dict[str, Any]:
    if not head.labels:
        return {}
    return {
        "num_labels": len(head.labels),
        "id2label": dict(enumerate(head.labels)),
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "problem_type": head.problem,
    }


def _attention() -> str | None:
    """Plain attention on a CPU, transformers' own choice elsewhere.

    With a padding mask, torch's fused CPU attention took 1.15 x the step of plain matrix products
    (MiniLM, 32 x 96 tokens, bfloat16, two cores).
    """
    return None if torch.accelerator.is_available() else "eager"


def _set_dropout(config: Any, p: float) -> None:
    """Sets every dropout of a model's configuration, whatever its family calls it."""
    for name, value in list(vars(config).items()):
        if re.search(r"(dropout|dropout_prob|pdrop)$", name) and isinstance(value, int | float):
            setattr(config, name, p)


def _quiet() -> None:
    """No table of missing keys: lorakit says itself which modules start anew."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _cannot_load(section: ModelSection, error: Exception) -> str:
    from huggingface_hub import is_offline_mode

    folder = Path(resolve(section.name)).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return f"model.name: {section.name!r} is a folder without a model: no config.json in it."
    reason = str(error).strip().splitlines()[0]
    message = f"model.name: {section.name!r} cannot be loaded: {reason}"
    if folder.is_dir():
        return message
    if is_offline_mode():
        return f"{message}\n  HF_HUB_OFFLINE is set: only models already in the cache can be used."
    return f"{message}\n  It is no folder here; as a hub id it was not found or not reachable."
