"""Packed folders: written, read back to the same logits, never believed, and told of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.testing import assert_close

from lorakit import export, manifest, models, packed, run
from lorakit import recipe as recipes
from lorakit.adapter import Plan, VariantConfig
from lorakit.codes import BITS, Coded, CodedPair, Grid, Grids, coded_base, coded_update, top
from lorakit.errors import FolderError, LorakitError, NotCodedError, NotLowRankError
from lorakit.finished import PackedLinear
from lorakit.fitting import with_codes
from lorakit.models import ModelSection
from lorakit.models.heads import Head
from lorakit.packed import PackedAdapter
from lorakit.progress import Watch
from lorakit.prune import Selection
from lorakit.trained import logits, open_trained

LAYER = "bert.encoder.layer.{}.{}"
KINDS = ("attention.self.query", "attention.self.value", "intermediate.dense", "output.dense")
SIZES = {"intermediate.dense": (16, 32), "output.dense": (32, 16)}
OUTER = Grids(*[Grid(torch.tensor(3.0), bits) for bits in (4, 8, 16, 4, 32, 8)])
AUTO = peft.AutoPeftModelForSequenceClassification


def drawn(shape: tuple[int, ...], bits: int) -> Coded:
    if bits == 32:
        return Coded(torch.randn(shape), torch.tensor(1.0), 32)
    codes = torch.randint(-top(bits), top(bits) + 1, shape, dtype=torch.int16)
    return Coded(codes, torch.tensor(0.8 / top(bits)), bits)


def adapter(tiny: Path, grids: Grids | None = None) -> PackedAdapter:
    """Every width in each of A, E and B, ranks 0 to 3, one linear without E."""
    names = [LAYER.format(block, kind) for block in (0, 1) for kind in KINDS]
    pairs = {}
    for i, name in enumerate(names):
        n, m = next((size for kind, size in SIZES.items() if kind in name), (16, 16))
        k, width = (3, 1, 2, 0)[i % 4], [BITS[(i + j) % len(BITS)] for j in range(3)]
        E = None if i == 1 else drawn((k,), width[1])
        parts = drawn((k, n), width[0]), E, drawn((m, k), width[2])
        pairs[name] = CodedPair(*parts, 0.5 + i, grids or Grids())
    whole = {"classifier": {"weight": torch.randn(2, 16), "bias": torch.randn(2)}}
    start = dict.fromkeys(pairs, 3)
    return PackedAdapter(pairs, start, whole, str(tiny), None, ("bad", "good"))


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    path = tmp_path / "packed"
    path.mkdir()
    packed.write(path, adapter(tiny))
    return path


def answers(given: PackedAdapter) -> Tensor:
    """Logits of a fresh base with `given`, which was never on disk."""
    section = ModelSection(name=given.base_model, precision="fp32")
    base = models.load(section, Head(given.labels), seed=5)
    with_codes(base, given, Path("memory"))
    return logits(base.model.eval(), models.probe(base.model))


def same(one: PackedAdapter, other: PackedAdapter) -> bool:
    """Whether two adapters are equal to the last bit."""
    return packed.encode(one) == packed.encode(other)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes packed.json, and its checksum with it, as another program might write it."""
    header = json.loads((folder / packed.HEADER).read_text())
    change(header)
    try:
        valid = packed.Header.model_validate_json(json.dumps(header))
        header["sha256"] = packed._checksum(valid, (folder / packed.WEIGHTS).read_bytes())
    except ValueError:
        pass
    (folder / packed.HEADER).write_text(json.dumps(header))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes packed.safetensors, and its checksum with it."""
    tensors = load_file(folder / packed.WEIGHTS)
    change(tensors)
    (folder / packed.WEIGHTS).write_bytes(save(tensors))
    rewrite(folder, lambda _: None)


# what is written is what is read


def test_every_number_comes_back(folder: Path) -> None:
    given, found = adapter(Path("x")), packed.read(folder)
    assert list(found.pairs) == list(given.pairs)
    torch.manual_seed(0)  # the fixture's draw again
    again = adapter(Path(found.base_model))
    assert same(again, found)
    for name, pair in again.pairs.items():
        assert found.pairs[name].scale == pair.scale
        for part, coded in pair.parts().items():
            assert torch.equal(found.pairs[name].parts()[part].dense(), coded.dense())
    assert found[3:] == again[3:]
    assert found.start == again.start
    for key, value in again.whole["classifier"].items():
        assert torch.equal(found.whole["classifier"][key], value)


def test_a_linear_of_codes_is_the_sum_of_its_quantised_parts() -> None:
    base, x = torch.nn.Linear(16, 12), torch.randn(5, 16)
    grids = OUTER._replace(total=Grid(torch.tensor(0.9), 4))
    pair = CodedPair(drawn((3, 16), 4), drawn((3,), 8), drawn((12, 3), 2), 0.5, grids)
    layer = PackedLinear(base, VariantConfig(variant="plain"), Plan(3, 0.5), pair).eval()
    total = coded_update(x, pair, coded_base(x, base, grids))
    assert grids.total is not None
    assert torch.equal(layer(x), grids.total(total))
    assert not torch.equal(layer(x), total)


def test_quantisers_around_a_pair_come_back(tmp_path: Path, tiny: Path) -> None:
    given = adapter(tiny, OUTER)
    packed.write(tmp_path, given)
    found = packed.read(tmp_path)
    assert all(pair.grids == OUTER for pair in found.pairs.values())
    assert torch.equal(answers(given), answers(found))


def test_a_file_holds_the_bits_of_its_codes_and_little_more(folder: Path) -> None:
    given, sizes = packed.read(folder), {}
    for key, value in load_file(folder / packed.WEIGHTS).items():
        sizes[key] = value.numel() * value.element_size()
    for name, pair in given.pairs.items():
        for part, coded in pair.parts().items():
            assert sizes[f"codes/{name}/{part}"] == -(-coded.codes.numel() * coded.bits // 8)


@pytest.mark.parametrize("grids", [Grids(), OUTER], ids=["codes", "codes and quantisers"])
def test_a_folder_packed_again_is_the_same_folder(tmp_path: Path, tiny: Path, grids: Grids) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    packed.write(first, adapter(tiny, grids))
    told = export.pack(open_trained(first), second)
    for name in (packed.HEADER, packed.WEIGHTS):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert told.difference == 0
    assert told.size == (packed.size(first), packed.size(second))
    assert ("plain" in told.forms) == (grids == Grids())


def test_a_packed_folder_prunes_to_a_plain_one(folder: Path, tmp_path: Path) -> None:
    found = open_trained(folder)
    told = export.export(found, tmp_path / "plain", Selection())
    rows = models.probe(found.model)
    plain = open_trained(tmp_path / "plain")
    assert_close(logits(plain.model, rows), logits(found.model, rows), rtol=1e-5, atol=1e-5)
    assert told.forms["packed"] == packed.size(folder)
    assert told.ranks == {name: pair.rank for name, pair in packed.read(folder).pairs.items()}


def test_layers_of_quantised_activations_make_no_plain_folder(tmp_path: Path, tiny: Path) -> None:
    packed.write(tmp_path, adapter(tiny, OUTER))
    with pytest.raises(NotLowRankError, match="base weight or activations are quantised"):
        export.export(open_trained(tmp_path), tmp_path / "plain", Selection())
    assert not (tmp_path / "plain").exists()


def test_a_bfloat16_base_answers_like_codes_that_were_never_on_disk(folder: Path) -> None:
    found = open_trained(folder, precision="bf16")
    base = models.load(found.base, found.head, seed=5)
    with_codes(base, packed.read(folder), folder)
    rows = models.probe(base.model)
    assert torch.equal(logits(base.model.eval(), rows), logits(found.model, rows))


# what was changed is refused


def test_a_folder_that_answers_differently_is_not_left_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not within a tolerance: one code, one step further, is another model."""
    found, write = open_trained(folder), packed.write

    def spoilt(out: Path, given: PackedAdapter) -> None:
        name = LAYER.format(0, "attention.self.value")
        pair = given.pairs[name]
        codes = pair.A.codes.clone()
        codes[0, 0] -= codes[0, 0].sign() or 1
        A = pair.A._replace(codes=codes)
        write(out, given._replace(pairs={**given.pairs, name: pair._replace(A=A)}))

    monkeypatch.setattr(export.packed, "write", spoilt)
    with pytest.raises(LorakitError, match="read back, its logits differ"):
        export.pack(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [packed.HEADER, packed.WEIGHTS])
def test_a_flipped_bit_is_an_error_or_changes_nothing(folder: Path, file: str) -> None:
    given, whole = packed.read(folder), (folder / file).read_bytes()
    draw, refused = torch.Generator().manual_seed(1), 0
    for place in torch.randint(0, len(whole) * 8, (150,), generator=draw).tolist():
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        (folder / file).write_bytes(changed)
        try:
            assert same(packed.read(folder), given)
        except FolderError:
            refused += 1
    assert refused > 140  # what may pass is blanks in JSON


@pytest.mark.parametrize("file", [packed.HEADER, packed.WEIGHTS])
@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_an_error(folder: Path, file: str, left: float) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(FolderError):
        packed.read(folder)


def test_bytes_added_are_an_error(folder: Path) -> None:
    with (folder / packed.WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FolderError):
        packed.read(folder)


def test_two_folders_files_do_not_mix(folder: Path, tmp_path: Path, tiny: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    packed.write(other, adapter(tiny))
    (folder / packed.WEIGHTS).write_bytes((other / packed.WEIGHTS).read_bytes())
    with pytest.raises(FolderError, match="sha256: a file was changed after both were written"):
        packed.read(folder)


NAME = LAYER.format(0, "attention.self.query")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.update(format=2), "format 2; this lorakit reads up to 1"),
        (lambda h: h.update(format="1"), "format: "),
        (lambda h: h.pop("layers"), "layers: Field required"),
        (lambda h: h.update(more=1), "more: Extra inputs are not permitted"),
        (lambda h: h["layers"][NAME]["A"].update(bits=3), f"layers.{NAME}.A.bits: 3: expected one"),
        (lambda h: h["layers"][NAME]["A"].update(step=0), f"layers.{NAME}.A.step: "),
        (lambda h: h["layers"][NAME]["A"].update(step=0.1), "a number that float32 has"),
        (lambda h: h["layers"][NAME]["B"].update(shape=[16, 4]), "make no product"),
        (lambda h: h["layers"][NAME]["E"].update(shape=[4]), "make no product"),
        (lambda h: h["layers"][NAME]["E"].update(shape=[-3]), f"layers.{NAME}.E.shape.0: "),
        (lambda h: h["layers"][NAME].update(scale=0), f"layers.{NAME}.scale: "),
        (lambda h: h["layers"][NAME].update(start=0), f"layers.{NAME}.start: "),
        (
            lambda h: h["layers"][NAME]["grids"].update(
                output={"bound": 1.0, "bits": 8, "signed": True}
            ),
            "output: expected names among",
        ),
        (
            lambda h: h["layers"][LAYER.format(1, "attention.self.query")]["A"].update(step=2),
            "expected 1, the step of 32 bits",
        ),
    ],
)
def test_a_header_that_cannot_be_is_explained(
    folder: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(FolderError) as caught:
        packed.read(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"codes/{NAME}/A"), f"codes/{NAME}/A: not in packed.safetensors"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra: not in packed.json"),
        (lambda t: t.update({"whole/pooler/weight": torch.zeros(1)}), "whole/pooler/weight: not"),
        (lambda t: t.update({f"codes/{NAME}/A": torch.zeros(2)}), "(2,) of torch.float32"),
        (
            lambda t: t[f"codes/{NAME}/A"].fill_(255),
            f"codes/{NAME}/A: a code above 1, which 2 bits do not have",
        ),
    ],
)
def test_tensors_that_do_not_fit_their_header_are_explained(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    retensor(folder, change)
    with pytest.raises(FolderError) as caught:
        packed.read(folder)
    assert said in str(caught.value)


def test_all_faults_are_told_together(folder: Path) -> None:
    def break_three(header: dict[str, Any]) -> None:
        header["layers"][NAME]["A"]["bits"] = 5
        header["layers"][NAME]["B"]["step"] = -1
        header["labels"] = "good"

    rewrite(folder, break_three)
    with pytest.raises(FolderError, match="3 faults"):
        packed.read(folder)


def test_shapes_and_names_of_another_base_model_are_refused_together(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = tmp_path / "other"
    found = packed.read(folder)
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained(other)
    for file in Path(found.base_model).glob("token*"):
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FolderError) as caught:
        open_trained(folder, base=str(other))
    assert f"{NAME}: the pair is 16 x 16, the base 24 x 24" in str(caught.value)
    assert f"{LAYER.format(1, KINDS[0])}: no such module in the base" in str(caught.value)


def test_a_module_that_is_no_linear_is_refused(folder: Path) -> None:
    found = packed.read(folder)
    pairs = {"bert.encoder.layer.0": found.pairs[NAME]}
    base = models.load(ModelSection(name=found.base_model), Head(found.labels), seed=0)
    with pytest.raises(FolderError, match=r"bert\.encoder\.layer\.0: no linear in the base"):
        with_codes(base, found._replace(pairs=pairs), folder)


# the commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path, reviews: Path) -> Path:
    """Two runs of the variant that learns bits: `codes`, and `all` with all else quantised too.

    Their gates are put anywhere, so that there are many widths.
    """
    folder = tmp_path_factory.mktemp("packed")
    for name, quantised in (("codes", False), ("all", True)):
        quantize = {"weights": quantised, "activations": quantised}
        given = {
            "model": {"name": str(tiny), "precision": "fp32"},
            "task": {"name": "classification", "max_length": 16},
            "data": {"train": str(reviews), "held_out": 0.1},
            "adapter": {"variant": "blora", "rank": 4, "alpha": 64, "quantize": quantize},
            "train": {"steps": 2, "batch_size": 4, "lr": 0.05, "save_every": None},
            "output_dir": str(folder / name),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(given))
        run.run(recipes.load(folder / "recipe.yaml"), False, Watch(Console(), quiet=True))
        (step,) = (folder / name / "checkpoints").glob("step-*")
        tensors = load_file(step / "adapter.safetensors")
        for key, value in tensors.items():
            if key.endswith("_logits"):
                tensors[key] = 3 * torch.randn_like(value) + 2
        save_file(tensors, step / "adapter.safetensors")
        manifest.write(step)
    return folder


@pytest.mark.parametrize("name", ["codes", "all"])
def test_a_packed_run_gives_the_logits_of_the_run(
    runs: Path, tmp_path: Path, lorakit: Callable[..., Any], name: str
) -> None:
    out = tmp_path / "out"
    answer = lorakit("prune", runs / name, "--packed", "--out", out, "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    ours, again = open_trained(runs / name), open_trained(out)
    rows = models.probe(ours.model, rows=8, tokens=32)
    assert torch.equal(logits(again.model, rows), logits(ours.model, rows))
    widths = {p.bits for x in again.layers.values() for p in x.coded().parts().values()}
    assert len(widths) > 2
    assert told["difference"] == 0
    assert told["size"][1] == told["forms"]["packed"] == packed.size(out)
    assert ("plain" in told["forms"]) == (name == "codes")
    card = json.loads((out / "lorakit.json").read_text())
    assert card["bytes_by_form"] == told["forms"]
    assert card["costs"] == told["costs"]
    scores = [json.loads(lorakit("eval", p, "--json").out)["scores"] for p in (runs / name, out)]
    assert scores[0] == scores[1]


def test_what_is_plain_and_what_is_packed_are_told_beside_each_other(
    runs: Path, tmp_path: Path, lorakit: Callable[..., Any]
) -> None:
    plain, codes = tmp_path / "plain", tmp_path / "codes"
    ours = json.loads(lorakit("prune", runs / "codes", "--out", plain, "--json").out)
    shown = lorakit("prune", runs / "codes", "--packed", "--out", codes).out
    theirs = json.loads((codes / "lorakit.json").read_text())
    assert ours["forms"] == theirs["bytes_by_form"]
    weights = plain / "adapter_model.safetensors"
    assert ours["forms"]["plain"] == ours["size"][1] == weights.stat().st_size
    assert ours["costs"] == theirs["costs"]
    assert ours["ranks"] == theirs["ranks"]
    assert "Bits, storage, and bit operations" in shown
    assert "Written plain, it would take" in shown
    assert "the same logits" in shown
    assert "size if plain" in lorakit("eval", codes).out
    card = (codes / "README.md").read_text()
    assert "library_name: lorakit" in card
    assert "from lorakit.trained import open_trained" in card
    assert "bits of A, E, B" in card
    assert "LoRA at the start's ranks in float32" in card
    model = AUTO.from_pretrained(plain, num_labels=2).eval()
    found = open_trained(runs / "codes")
    rows = models.probe(found.model)
    assert_close(logits(model, rows), logits(found.model, rows), rtol=0, atol=1e-5)


def test_codes_go_to_packed_within_the_run(runs: Path, lorakit: Callable[..., Any]) -> None:
    assert lorakit("prune", runs / "codes", "--packed", "--json").code == 0
    assert packed.is_packed(runs / "codes" / "packed")
    assert "exists; nothing is overwritten" in lorakit("prune", runs / "codes", "--packed").err


def test_a_plain_folder_is_refused_where_more_than_adapters_is_quantised(
    runs: Path, lorakit: Callable[..., Any]
) -> None:
    answer = lorakit("prune", runs / "all")
    assert answer.code == 2
    assert "quantised too" in answer.err
    assert "`prune --packed`" in answer.err
    assert not (runs / "all" / "pruned").exists()


def test_a_run_without_codes_has_nothing_to_pack(recipe: Path, lorakit: Callable[..., Any]) -> None:
    assert lorakit("train", recipe).code == 0
    answer = lorakit("prune", "runs/tiny", "--packed")
    assert answer.code == 2
    assert "nothing to pack: this adapter's numbers are float32" in answer.err
    assert not Path("runs/tiny/packed").exists()
    with pytest.raises(NotCodedError):
        export.pack(open_trained(Path("runs/tiny")), Path("out"))


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "1"),
        ("--energy", "0.9"),
        ("--keep", "0.5"),
        ("--of", "ranks"),
        ("--layout", "pattern"),
    ],
)
def test_packing_takes_no_rule_that_would_change_the_codes(
    recipe: Path, lorakit: Callable[..., Any], options: tuple[str, ...]
) -> None:
    answer = lorakit("prune", "runs/tiny", "--packed", *options)
    assert answer.code == 2
    assert f"--packed writes codes as they are and takes no {options[0]}" in answer.err


def test_a_packed_folder_is_no_run_to_choose_checkpoints_in(
    folder: Path, lorakit: Callable[..., Any]
) -> None:
    answer = lorakit("eval", folder, "--checkpoint", "last")
    assert answer.code == 2
    assert "is a packed folder; --checkpoint chooses within a run" in answer.err
