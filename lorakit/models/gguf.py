"""A GGUF file, llama.cpp's form of a model, as a folder that transformers reads."""

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch

from lorakit.disk import cache_root, sweep, whole_folder
from lorakit.errors import ModelError
from lorakit.models.refusals import first_line

ENDING, MAGIC, VERSIONS = ".gguf", b"GGUF", (2, 3)


def unpacked(name: str, path: Path) -> Path:
    """The folder in lorakit's cache that a GGUF file is unpacked to, in float32, once.

    transformers reads a file's vocabulary three times over in Python: half a minute for one of
    49,000 tokens. A folder loads in a second and is mapped into memory, not copied.

    Raises:
        ModelError: there is no such file, the package gguf is missing, or it cannot be read.

    """
    import transformers

    if not path.is_file():
        raise ModelError(f"model.name: {name!r}: there is no such file.")
    facts = path.resolve(), path.stat().st_size, path.stat().st_mtime_ns
    key = sha256(repr(facts).encode()).hexdigest()[:16]
    folder = cache_root() / "models" / f"{path.stem}-{key}"
    if folder.exists():
        return folder
    if find_spec("gguf") is None:
        raise ModelError(
            f"model.name: {name!r}: GGUF files are read by the package gguf, which is not "
            "installed; pip install 'lorakit[gguf]'."
        )
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    except Exception as error:  # a broken file leads its reader to any of them
        raise ModelError(f"model.name: {name!r} cannot be unpacked: {_why(path, error)}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    with whole_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)
    return folder


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that transformers does not read; its own words are of buffers."""
    import gguf

    with path.open("rb") as file:
        magic, version = file.read(len(MAGIC)), int.from_bytes(file.read(4), "little")
    if not MAGIC.startswith(magic):
        return f"it is no GGUF file; it begins with {magic!r}, not with {MAGIC!r}."
    if version not in (0, *VERSIONS):
        return f"it is GGUF of version {version}; {' and '.join(map(str, VERSIONS))} are read."
    try:
        gguf.GGUFReader(path)
    except Exception:  # it indexes, decodes and reshapes whatever bytes are there
        return (
            f"it is cut or damaged: not all that it should hold is in its {path.stat().st_size:,} "
            "bytes. Copy or download it again, and compare its size with that at its source."
        )
    return (
        "it is whole, but not of a kind that transformers unpacks "
        f"({first_line(error)}). Take the model's own folder instead."
    )
