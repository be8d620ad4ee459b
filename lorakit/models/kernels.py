"""What a CPU computes faster in another way, and the measurements that say so.

Each changes how something is computed, not what: attention and the last block give the same
numbers, dropout the same distribution from other draws. All were timed in training MiniLM with
LoRA on SST-2 (rank 8, 32 rows of 16 tokens in the mean, bfloat16, one core of a Xeon with AMX;
docs/performance.md). On a GPU torch's own kernels stand.
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.errors import ModelError
from lorakit.models.heads import CLASSIFIER, WRITERS, Head

ATTENTION = "lorakit"
"""The name of `attention` among transformers' own."""
MAPS = 2**24
"""Bytes that attention's maps may have at once. Of 16 x 512 tokens, whose maps have 100 MB, a step
took 0.67 x as long so (4.3 s for 6.4, two cores): pieces of memory above 32 MiB glibc gives back to
the system and asks for anew each time, and every page comes filled with zeros."""
REGISTER = 64
"""Bytes of AVX-512's registers. Torch's softmax takes rows narrower than that number by number:
forward and backward of 32 x 12 maps in bfloat16 took 1.3 ms with 16 keys, 3.9 with 28 and 0.8 with
32 (one core). Filled up to a register they took 0.55, 0.42 and 0.29 x as long with 8, 16 and 28
keys. Beyond one register that is no gain any more."""
PLAIN = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
"""Families whose own attention is `attention`, by `model_type`."""
POOLED = (
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "electra",
    "mpnet",
    "roberta",
    "xlm-roberta",
)
"""Families of encoders whose classification head reads the first token alone."""


def automatic() -> tuple[torch.dtype, str]:
    """What `precision: auto` computes in on this machine, and a line that says so.

    Where the processor computes bfloat16 natively, a step took 221 ms in it, 382 in float32.
    """
    if torch.cuda.is_available():
        native, what = torch.cuda.is_bf16_supported(including_emulation=False), "GPU"
    else:
        features, what = torch.cpu.get_capabilities(), "processor"
        native = features.get("avx512_bf16") or features.get("bf16")  # x86; ARM
    if native:
        return torch.bfloat16, f"precision auto: bf16, which this {what} computes natively"
    return torch.float32, f"precision auto: fp32; this {what} does not compute bf16 natively"


def round_products(wanted: bool) -> None:
    """Whether products of float32 matrices may be in TF32: 10 bits of fraction for 23.

    Raises:
        ModelError: they are to be, and no GPU here does.

    """
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if wanted and not able:
        raise ModelError(
            "model.precision: tf32: it is GPUs of compute capability 8.0 or more that have it, and "
            "there is none here; take auto, or fp32."
        )
    torch.set_float32_matmul_precision("high" if wanted else "highest")


def implementation(head: Head) -> str | None:
    """What attention a model is loaded with: plain for short texts on a CPU, else its own choice.

    With a padding mask, torch's fused CPU attention took 1.15 x the step of plain matrix products
    (32 x 96 tokens, two cores). But plain attention has maps of tokens x tokens, and a step of a
    language model took 2.5 GiB with them, 1.7 without (SmolLM2-135M in nf4, 4 x 512 tokens,
    activations computed again).
    """
    short = head.kind not in WRITERS and not torch.accelerator.is_available()
    return "eager" if short else None


def install(model: Any, head: Head) -> None:
    """Has a model fresh from disk compute in these ways, as far as they fit it and the device."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if torch.accelerator.is_available():
        return
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, Dropout(module.p).train(module.training))
    kind = model.config.model_type
    if kind in PLAIN and head.kind not in WRITERS:
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        model.set_attn_implementation(ATTENTION)
    if kind in POOLED and head.kind == CLASSIFIER:
        last = model.base_model.encoder.layer[-1]
        last.attention.register_forward_hook(_first_token)


def _first_token(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of what attention gives in the last block, all that the head will read.

    The rest of the block then has one token of each row.
    """
    return output[0][:, :1].contiguous(), *output[1:]  # strided, a product took 200 times as long


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with about a share `p` of its numbers at 0, and 1 / (1 - p) times the others.

    16 random bits decide over a number, so that p is met to 1 / 65,536, and four numbers share a
    draw. Torch's own on a CPU took 3 times as long, and 15 % of a step.
    """
    count = x.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(x.shape)
    kept = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(bits, round(p * 2**16) - 2**15, out=kept)  # by way of bool it took twice as long
    return x * kept.mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """Dropout by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Plain attention, as transformers' `eager`: the three of shape (rows, heads, tokens, d).

    Rows are taken a few at a time, as `MAPS` has it.
    """
    rows, heads, tokens, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    share = dropout if module.training else 0.0
    some = max(1, MAPS // (heads * tokens * key.size(2) * query.element_size()))
    if some >= rows:
        return _attention(query, key, value, attention_mask, scale, share), None
    given = (x.split(some) for x in (query, key, value))
    masks: Iterable[Tensor | None] = repeat(None)
    if attention_mask is not None:
        masks = attention_mask.expand(rows, -1, -1, -1).split(some)
    parts = zip(*given, masks, strict=False)
    return torch.cat([_attention(q, k, v, mask, scale, share) for q, k, v, mask in parts]), None


def _softmax(x: Tensor) -> Tensor:
    """x.softmax(-1), over a register of numbers where a row has fewer."""
    keys, register = x.size(-1), REGISTER // x.element_size()
    if keys >= register:
        return x.softmax(-1)
    return pad(x, (0, register - keys), value=-torch.inf).softmax(-1)[..., :keys]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, share: float
) -> Tensor:
    """(rows, tokens, heads, d); `share` of the map's numbers drop out."""
    weights = query @ key.transpose(2, 3)
    weights *= scale
    if mask is not None:
        weights += mask
    weights = _softmax(weights)
    if share:
        weights = dropout(weights, share)
    return (weights @ value).transpose(1, 2).contiguous()
