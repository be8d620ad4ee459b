"""The base model and its tokenizer: from the hub, a folder, a file, or an installed package."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from lorakit import seal
from lorakit.base import Codes, is_linear, is_quantized, quantized, settled
from lorakit.errors import FolderError, ModelError
from lorakit.models import fingerprint, gguf, heads, kernels
from lorakit.models.fingerprint import Fingerprint
from lorakit.models.heads import WRITERS, Head
from lorakit.models.refusals import explained, refuse_other_kinds
from lorakit.places import PACKAGE, locate
from lorakit.schema import Section

Precision = Literal["auto", "fp32", "tf32", "bf16"]


class ModelSection(Section):
    """The base model."""

    name: str
    """A hub id, a folder, or `package:DISTRIBUTION/PATH`: a model inside an installed package. In
    the place of a folder, a .gguf file."""
    revision: str | None = None
    """A branch, tag or commit of the hub's repository."""
    precision: Precision = "auto"
    """What the base computes in and stores its weights in: fp32; tf32, which is fp32 with products
    rounded by the GPU; bf16; or auto: bf16 where the device computes it natively. Adapters and the
    head are float32 always."""
    quantize: Codes | None = None
    """Store the base's linears in codes: nf4 or fp4, 4.5 bits a weight, or int8; null: not. Codes
    are taken of the weights as their files have them, and computed with in `precision`, in which
    the embeddings, norms and output layer stay."""
    double_quant: bool = Field(False, validate_default=True)
    """Store the scales of 4-bit codes in 8 bits themselves: 4.13 bits a weight."""
    dropout: float | None = Field(None, ge=0.0, lt=1.0)
    """Dropout within the base model while training; null: as its own configuration has it."""

    @property
    def gguf(self) -> str | None:
        """The name of the GGUF file that it is; null where it is none."""
        return Path(self.name).name if self.name.endswith(gguf.ENDING) else None

    @field_validator("double_quant")
    @classmethod
    def _of_four_bits(cls, double: bool, others: ValidationInfo) -> bool:
        if double and others.data.get("quantize", "nf4") not in ("nf4", "fp4"):
            raise ValueError("only 4-bit codes have scales to store so: model.quantize nf4 or fp4")
        return double


class Base(NamedTuple):
    """A loaded base model."""

    model: nn.Module
    tokenizer: Any
    head: tuple[str, ...]
    """Names of the modules that start anew and are trained whole."""
    max_tokens: int
    """The longest sequence the model has positions for."""
    fingerprint: Fingerprint
    notes: tuple[str, ...] = ()
    """What was done to it, to be said aloud."""


def load(section: ModelSection, head: Head, seed: int, stored: bool = False) -> Base:
    """Loads model and tokenizer; `seed` draws the head, whatever was drawn before.

    With `stored`, weights come as their files have them, whatever the section's precision. They
    are mapped into memory, and read when they are looked at.

    Raises:
        ModelError: the model is not there, not reachable, not one that does what `head` asks for,
            or was changed since lorakit merged it; or its tokenizer has no token to pad with.

    """
    import transformers

    _quiet()
    if not stored:  # weights to look at compute nothing
        kernels.round_products(section.precision == "tf32")
    where = resolve(section.name)
    if where.endswith(gguf.ENDING):
        where = str(gguf.unpacked(section.name, Path(where).expanduser()))
    _refuse_changed(Path(where).expanduser())
    torch.manual_seed(seed)
    with explained(section.name, section.revision, Path(where).expanduser()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, revision=section.revision, trust_remote_code=False
        )
        config = transformers.AutoConfig.from_pretrained(
            where,
            revision=section.revision,
            trust_remote_code=False,  # left out, transformers asks whether to run the model's code
            **heads.settings(head),
        )
        refuse_other_kinds(section.name, config, head.kind)
        if section.dropout is not None:
            _set_dropout(config, section.dropout)
        in_files, commit = config.dtype, getattr(config, "_commit_hash", None)
        model, info = getattr(transformers, heads.CLASSES[head.kind]).from_pretrained(
            where,
            config=config,
            revision=section.revision,
            trust_remote_code=False,
            dtype="auto" if stored or section.quantize else dtype(section.precision),
            attn_implementation=kernels.implementation(head),
            ignore_mismatched_sizes=bool(head.labels),  # a head of another size starts anew
            output_loading_info=True,
        )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if fresh and head.kind in WRITERS:
        raise ModelError(
            f"model.name: {section.name!r} writes no text: its files lack {min(fresh)}."
        )
    names, notes = heads.modules_of(model, fresh, head), _pad(section.name, model, tokenizer)
    known_by = fingerprint.of(model, names, in_files, commit)  # before there are codes
    if section.precision == "auto":
        notes = (kernels.automatic()[1], *notes)
    if section.quantize is not None:
        _quantize(section, model, names)
    for module in model.modules():
        settled(module)  # a base may bring codes of its own
    kernels.install(model, head)
    longest = min(_positions(model) or tokenizer.model_max_length, tokenizer.model_max_length)
    return Base(model, tokenizer, names, longest, known_by, notes)


def _refuse_changed(folder: Path) -> None:
    """Raises ModelError where lorakit has merged a model that is not as it was written."""
    try:
        seal.check(folder)
    except FolderError as error:
        raise ModelError(f"model.name: {error}") from None


def resolve(name: str) -> str:
    """The folder of a `package:` name; any other name as it stands."""
    return str(locate(name, ModelError, "model.name")) if name.startswith(PACKAGE) else name


def dtype(precision: Precision) -> torch.dtype:
    """What `precision` means on this machine's device."""
    if precision == "auto":
        return kernels.automatic()[0]
    return torch.bfloat16 if precision == "bf16" else torch.float32


def stored_in(section: ModelSection) -> torch.dtype:
    """What the base's own files are stored in, as its configuration says; else float32."""
    import transformers

    where = resolve(section.name)
    if where.endswith(gguf.ENDING):  # unpacked so
        return torch.float32
    config = transformers.AutoConfig.from_pretrained(
        where, revision=section.revision, trust_remote_code=False
    )
    found: torch.dtype | None = config.dtype
    return torch.float32 if found is None else found


def probe(model: nn.Module, rows: int = 4, tokens: int = 24) -> dict[str, Tensor]:
    """A small batch of token ids, the same at every call: to see whether two models agree.

    Encoders with a decoder behind classify at the one end-of-sequence token of a row.
    """
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(size), (rows, tokens), generator=draw)
    config: Any = model.config
    if config.is_encoder_decoder:
        end: int = config.eos_token_id
        ids[ids == end] = 0
        ids[:, -1] = end
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _quantize(section: ModelSection, model: Any, head: Sequence[str]) -> None:
    """Puts codes in the place of all linears but the head and the output layer, which may be tied,
    and those that transformers knows to suffer from low precision.

    The weights come as their files have them, mapped into memory, and leave it one by one.
    """
    assert section.quantize is not None
    spared = {id(m) for name in head for m in model.get_submodule(name).modules()}
    spared.add(id(model.get_output_embeddings()))
    fragile = set(model._keep_in_fp32_modules or ())
    for name, linear in list(model.named_modules()):
        if is_quantized(linear):
            raise ModelError(
                f"model.quantize: {section.quantize}: {section.name!r} is stored in codes already."
            )
        if is_linear(linear) and id(linear) not in spared and not fragile & {*name.split(".")}:
            model.set_submodule(name, quantized(linear, section.quantize, section.double_quant))
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype(section.precision))


def _pad(name: str, model: Any, tokenizer: Any) -> tuple[str, ...]:
    """Sees to it that model and tokenizer pad with the same token; decoders classify the last
    token that is another one.
    """
    notes: tuple[str, ...] = ()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"model.name: {name!r}: its tokenizer has neither a padding token nor one for the "
                "end of a text, so rows of unequal length make no batch. Give it a pad_token, in "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes = (f"the tokenizer has no padding token; {tokenizer.eos_token!r} pads",)
    model.config.pad_token_id = tokenizer.pad_token_id
    return notes


def _positions(model: nn.Module) -> int | None:
    """How many tokens there are positions for; None where they are not counted.

    RoBERTa and its kin count from the padding token's number on.
    """
    count = getattr(model.config, "max_position_embeddings", None)
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return count if count is None or padding is None else count - padding - 1


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
