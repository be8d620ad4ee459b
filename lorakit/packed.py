"""A folder of adapters as integer codes, at the bits they were learned with.

    packed.json          shapes, bits, steps, ranges; names of modules saved whole; a checksum
    packed.safetensors   codes/LAYER/A, codes/LAYER/E, codes/LAYER/B   uint8, one run of bits each
                         whole/MODULE/KEY                              as they are

The checksum is the SHA-256 of packed.json without it, keys sorted, and of packed.safetensors: a
changed byte is an error, never another model. No pickle; nothing here knows what learned the codes.
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lorakit.codes import BITS, FLOAT, Coded, CodedPair, Grid, Grids, pack, unpack
from lorakit.errors import FolderError, several
from lorakit.models.heads import CLASSIFIER
from lorakit.schema import Section, misfits

HEADER, WEIGHTS, FORMAT = "packed.json", "packed.safetensors", 1


def _single(value: float) -> float:
    if float(torch.tensor(value, dtype=torch.float32)) != value:
        raise ValueError("expected a number that float32 has")
    return value


def _width(value: int) -> int:
    if value not in BITS:
        raise ValueError(f"{value}: expected one of {BITS}")
    return value


Width = Annotated[int, AfterValidator(_width)]
Single = Annotated[PositiveFloat, AfterValidator(_single)]
Size = Annotated[int, Field(ge=0, lt=2**31)]


class TensorHeader(Section):
    """One tensor of codes."""

    shape: tuple[Size, ...]
    bits: Width
    step: Single

    @field_validator("step")
    @classmethod
    def _floats_have_no_step(cls, step: float, others: ValidationInfo) -> float:
        if others.data.get("bits") == FLOAT and step != 1:
            raise ValueError("expected 1, the step of 32 bits")
        return step


class GridHeader(Section):
    """One quantiser around a pair."""

    bound: Single
    bits: Width
    signed: bool


class LayerHeader(Section):
    """One linear: A (k, n), E (k,) or null, B (m, k), and its quantisers."""

    start: PositiveInt
    scale: Annotated[PositiveFloat, Field(lt=2.0**127)]
    A: TensorHeader
    E: TensorHeader | None
    B: TensorHeader
    grids: dict[str, GridHeader]

    @field_validator("B")
    @classmethod
    def _one_rank(cls, B: TensorHeader, others: ValidationInfo) -> TensorHeader:
        if not {"A", "E"} <= others.data.keys():  # faults of their own
            return B
        A, E = others.data["A"], others.data["E"]
        fit = len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1]
        if not fit or (E is not None and E.shape != A.shape[:1]):
            e = "" if E is None else f", E {E.shape}"
            raise ValueError(f"A {A.shape}{e} and B {B.shape} make no product")
        return B

    @field_validator("grids")
    @classmethod
    def _known(cls, grids: dict[str, GridHeader]) -> dict[str, GridHeader]:
        if strangers := sorted(grids.keys() - set(Grids._fields)):
            raise ValueError(f"{', '.join(strangers)}: expected names among {Grids._fields}")
        return grids

    def tensors(self) -> dict[str, TensorHeader]:
        """A, E and B by name; no E where there is none."""
        parts = {"A": self.A, "E": self.E, "B": self.B}
        return {name: part for name, part in parts.items() if part is not None}


class Header(Section):
    """packed.json."""

    format: PositiveInt
    base_model: str
    revision: str | None
    task_type: str | None
    labels: tuple[str, ...]
    multiple: bool = False
    layers: dict[str, LayerHeader]
    whole: tuple[str, ...]
    sha256: str = ""


class PackedAdapter(NamedTuple):
    """What a packed folder holds."""

    pairs: dict[str, CodedPair]
    start: dict[str, int]
    """Rank of every linear at the start of the run, at least 1."""
    whole: dict[str, dict[str, Tensor]]
    """Modules saved whole: name to state dict."""
    base_model: str
    revision: str | None
    labels: tuple[str, ...]
    """Of the head, as `Head` has them, and so the next two."""
    task_type: str | None = CLASSIFIER
    multiple: bool = False


def is_packed(folder: Path) -> bool:
    """Whether `folder` looks like one of these."""
    return (folder / HEADER).is_file()


def encode(adapter: PackedAdapter) -> dict[str, bytes]:
    """The folder's two files, by name."""
    tensors = {
        f"codes/{name}/{part}": pack(coded)
        for name, pair in adapter.pairs.items()
        for part, coded in pair.parts().items()
    }
    tensors |= {
        f"whole/{name}/{key}": value.detach().cpu().contiguous()
        for name, state in adapter.whole.items()
        for key, value in state.items()
    }
    weights = save(tensors)
    header = Header(
        format=FORMAT,
        base_model=adapter.base_model,
        revision=adapter.revision,
        task_type=adapter.task_type,
        labels=adapter.labels,
        multiple=adapter.multiple,
        layers={
            name: _layer_header(pair, adapter.start[name]) for name, pair in adapter.pairs.items()
        },
        whole=tuple(adapter.whole),
    )
    header = header.model_copy(update={"sha256": _checksum(header, weights)})
    return {HEADER: header.model_dump_json().encode() + b"\n", WEIGHTS: weights}


def write(folder: Path, adapter: PackedAdapter) -> None:
    """Writes both files into `folder`, which exists."""
    for name, content in encode(adapter).items():
        (folder / name).write_bytes(content)


def size(folder: Path) -> int:
    """Bytes of both files."""
    return sum((folder / name).stat().st_size for name in (HEADER, WEIGHTS))


def read(folder: Path) -> PackedAdapter:
    """Reads such a folder back, and believes nothing in it.

    Raises:
        FolderError: a file is missing or broken, or was changed after it was written, or is of a
            later format; all faults found are listed.

    """
    for name in (HEADER, WEIGHTS):
        if not (folder / name).is_file():  # a device, or a pipe, would be read without end
            raise FolderError(f"{folder}: there is no file {name}.")
    try:
        text, weights = (folder / HEADER).read_bytes(), (folder / WEIGHTS).read_bytes()
        header, tensors = _header(text), load(weights)
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise FolderError(f"{folder} cannot be read as a packed adapter: {error}") from error
    faults = _tensor_faults(header, tensors)
    if _checksum(header, weights) != header.sha256:
        faults.append("sha256: a file was changed after both were written")
    pairs = {} if faults else _pairs(header, tensors, faults)
    if faults:
        raise FolderError(several(str(folder), faults))
    whole = {name: dict[str, Tensor]() for name in header.whole}
    for key, value in tensors.items():
        kind, name, inner = key.split("/", 2)
        if kind == "whole":
            whole[name][inner] = value
    return PackedAdapter(
        pairs,
        {name: layer.start for name, layer in header.layers.items()},
        whole,
        header.base_model,
        header.revision,
        header.labels,
        header.task_type,
        header.multiple,
    )


def _layer_header(pair: CodedPair, start: int) -> LayerHeader:
    E = None if pair.E is None else _tensor_header(pair.E)
    grids = {
        name: GridHeader(bound=float(grid.bound), bits=grid.bits, signed=grid.signed)
        for name, grid in pair.grids.present().items()
    }
    A, B = _tensor_header(pair.A), _tensor_header(pair.B)
    return LayerHeader(start=start, scale=pair.scale, A=A, E=E, B=B, grids=grids)


def _tensor_header(coded: Coded) -> TensorHeader:
    return TensorHeader(shape=tuple(coded.codes.shape), bits=coded.bits, step=float(coded.step))


def _checksum(header: Header, weights: bytes) -> str:
    """SHA-256 of all that the header says but its checksum, and of the weights."""
    unsaid = {"sha256"} if header.multiple else {"sha256", "multiple"}  # older ones lack the latter
    said = header.model_dump(mode="json", exclude=unsaid)
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode() + weights).hexdigest()


def _header(text: bytes) -> Header:
    """packed.json; a ValueError names all its faults."""
    given = json.loads(text)
    form = given.get("format") if isinstance(given, dict) else None
    if isinstance(form, int) and form > FORMAT:
        raise ValueError(f"format {form}; this lorakit reads up to {FORMAT}.")
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(several(HEADER, misfits(error))) from None


def _tensor_faults(header: Header, tensors: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor that is missing, too many, or not of the size its header says."""
    wanted = {
        f"codes/{name}/{part}": tensor
        for name, layer in header.layers.items()
        for part, tensor in layer.tensors().items()
    }
    faults = [f"{key}: not in {WEIGHTS}" for key in wanted if key not in tensors]
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        name, inside, _ = rest.partition("/")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            faults.append(f"{key}: holds nan or inf")
        if tensor.is_complex():
            faults.append(f"{key}: {tensor.dtype}; expected fractions")
        if key in wanted:
            faults += _size_fault(key, wanted[key], tensor)
        elif kind != "whole" or name not in header.whole or not inside:
            faults.append(f"{key}: not in {HEADER}")
    return faults


def _size_fault(key: str, header: TensorHeader, tensor: Tensor) -> list[str]:
    shape, kind = header.shape, torch.float32
    if header.bits != FLOAT:
        shape, kind = (-(-prod(shape) * header.bits // 8),), torch.uint8
    if (tuple(tensor.shape), tensor.dtype) == (shape, kind):
        return []
    given = f"{tuple(tensor.shape)} of {tensor.dtype}"
    wanted = f"{header.shape} in {header.bits} bits: {shape} of {kind}"
    return [f"{key}: {given}; expected, for {wanted}"]


def _pairs(
    header: Header, tensors: Mapping[str, Tensor], faults: list[str]
) -> dict[str, CodedPair]:
    """The pairs of all layers; what cannot be unpacked is added to `faults`."""
    pairs = {}
    for name, layer in header.layers.items():
        parts: dict[str, Coded] = {}
        for part, tensor in layer.tensors().items():
            key = f"codes/{name}/{part}"
            try:
                parts[part] = unpack(tensors[key], tensor.shape, tensor.step, tensor.bits)
            except ValueError as error:
                faults.append(f"{key}: {error}")
        grids = {
            kind: Grid(torch.tensor(grid.bound), grid.bits, grid.signed)
            for kind, grid in layer.grids.items()
        }
        if len(parts) == len(layer.tensors()):
            E = parts.get("E")
            pairs[name] = CodedPair(parts["A"], E, parts["B"], layer.scale, Grids(**grids))
    return pairs
