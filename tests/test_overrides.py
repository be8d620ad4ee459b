"""`key=value` and `~key` behind a recipe on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import recipe as recipes
from lorakit import variants
from lorakit.errors import RecipeError

VARIANTS = ", ".join(variants.names())
TEXT = """\
model: {name: some/model}
task: {name: classification}
data: {train: x.csv, label: topic}
adapter: {variant: sora, rank: 8, sparsity: {lambda: 0.5}}
train: {lr: 1e-2}
output_dir: runs/x
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT)
    return file


@pytest.fixture
def after(path: Path) -> Callable[..., dict[str, Any]]:
    """The values by dotted key after some overrides."""

    def leaves(*overrides: str) -> dict[str, Any]:
        loaded = recipes.load(path, overrides)
        return dict(recipes._leaves(loaded.model_dump(mode="json")))

    return leaves


@pytest.fixture
def fault(path: Path) -> Callable[..., str]:
    """The one fault that some overrides are refused for."""

    def of(*overrides: str) -> str:
        with pytest.raises(RecipeError) as refusal:
            recipes.load(path, overrides)
        title, line = str(refusal.value).splitlines()
        assert title == f"{path}: 1 fault"
        return line.strip()

    return of


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-3", 0.001),
        ("train.lr=2", 2.0),
        ("train.batch_size=4", 4),
        ("train.eval_every=2 epochs", "2 epochs"),
        ("train.eval_every=7", 7),
        ("train.eval_every=null", None),
        ("train.clip=null", None),
        ("adapter.sparsity.lambda=3", 3.0),
        ("adapter.sparsity.schedule=linear", "linear"),
        ("adapter.targets=query", "query"),
        ("adapter.targets=[query,value]", ["query", "value"]),
        ("adapter.targets=[query, value]", ["query", "value"]),
        (r"adapter.targets=encoder\.layer\.[01]\..*", r"encoder\.layer\.[01]\..*"),
        ("data.deduplicate=false", False),
        ("data.label=null", None),
        ("data.validation=data/dev.csv", "data/dev.csv"),
        ("seed=3", 3),
        ("output_dir=a=b", "a=b"),
        ("output_dir=a: b", "a: b"),
    ],
)
def test_an_override_sets_a_key_to_a_value_of_its_type(
    after: Callable[..., dict[str, Any]], override: str, value: object
) -> None:
    key = override.partition("=")[0]
    found = after(override)
    assert found[key] == value
    assert type(found[key]) is type(value)
    unchanged = after()
    assert {k for k in found if found[k] != unchanged[k]} == {key}


@pytest.mark.parametrize("word", ["2024", "1e-3", "true", "2024-01-01", "on", "0x10"])
def test_a_field_of_words_keeps_the_word(after: Callable[..., dict[str, Any]], word: str) -> None:
    assert after(f"output_dir={word}")["output_dir"] == word
    assert after(f"model.revision={word}")["model.revision"] == word
    assert after(f"data.labels=[{word}, other]")["data.labels"] == [word, "other"]


def test_an_override_of_a_dumped_word_is_still_a_word(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipes.dump(recipes.load(path, ["output_dir=1e-3"])))
    assert recipes.load(copy).output_dir == "1e-3"


@pytest.mark.parametrize(
    ("override", "default"),
    [("~train.lr", 1e-3), ("~adapter.rank", 16), ("~data.label", None)],
)
def test_a_tilde_puts_a_key_back_to_its_default(
    after: Callable[..., dict[str, Any]], override: str, default: object
) -> None:
    assert after()[override[1:]] != default
    assert after(override)[override[1:]] == default


def test_a_tilde_restores_a_whole_section(after: Callable[..., dict[str, Any]]) -> None:
    assert after("train.batch_size=3", "~train")["train.batch_size"] == 32
    assert after("~adapter.sparsity")["adapter.sparsity.lambda"] == 2.0


def test_a_tilde_on_what_is_not_there_changes_nothing(
    path: Path, after: Callable[..., dict[str, Any]]
) -> None:
    path.write_text(TEXT.replace("classification", "glue/sst2").replace("data:", "#"))
    assert after("~data.text", "~seed") == after()


def test_a_required_key_has_no_default(fault: Callable[..., str]) -> None:
    assert fault("~output_dir").startswith("output_dir: missing. The run folder")


def test_of_two_overrides_of_a_key_the_later_holds(
    after: Callable[..., dict[str, Any]],
) -> None:
    assert after("seed=1", "seed=2")["seed"] == 2
    assert after("~train.lr", "train.lr=5e-4")["train.lr"] == 5e-4


def test_a_free_mapping_takes_keys_of_the_users_own(
    after: Callable[..., dict[str, Any]],
) -> None:
    assert after("adapter.ranks.query=4")["adapter.ranks.query"] == 4
    assert after("adapter.ranks={query: 4}")["adapter.ranks.query"] == 4
    assert after("adapter.ranks.query=4", "~adapter.ranks.query")["adapter.ranks"] == {}


def test_a_key_of_a_free_mapping_may_hold_dots(path: Path) -> None:
    loaded = recipes.load(path, ["adapter.ranks.attention.output.dense=4"])
    assert loaded.adapter.ranks == {"attention.output.dense": 4}


@pytest.mark.parametrize("swapped", [False, True])
def test_a_variant_is_switched_by_putting_the_others_settings_away(
    path: Path, swapped: bool
) -> None:
    overrides = ["adapter.variant=lora", "~adapter.sparsity", "adapter.lr_ratio=4"]
    adapter = recipes.load(path, overrides[::-1] if swapped else overrides).adapter.model_dump()
    assert (adapter["variant"], adapter["lr_ratio"], adapter["rank"]) == ("lora", 4.0, 8)
    assert "sparsity" not in adapter


def test_a_variant_switched_with_the_others_settings_left_is_refused(
    fault: Callable[..., str],
) -> None:
    message = fault("adapter.variant=lora")
    assert message.endswith("adapter.sparsity: no such key. It belongs to the variant sora.")


def test_a_whole_section_may_be_replaced(after: Callable[..., dict[str, Any]]) -> None:
    found = after("train={steps: 7}")
    assert (found["train.steps"], found["train.epochs"], found["train.lr"]) == (7, None, 1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr: no such key. Nearest: 'lr'."),
        ("trian.lr=1", "trian: no such key. Nearest: 'train'."),
        ("~train.lrr", "train.lrr: no such key. Nearest: 'lr'."),
        ("lr=1", "lr: no such key. Is it `train.lr`?"),
        ("lora_r=8", "lora_r: no such key. `lora_r` is `adapter.rank` here."),
        ("train.lr.x=1", "train.lr.x: no such key."),
        ("adapter.lr_ratio=2", "adapter.lr_ratio: no such key. It belongs to the variant lora."),
        ("adapter.sparsity.lam=2", "adapter.sparsity.lam: no such key. Nearest: 'lambda'."),
        ("train.lr=fast", "train.lr: 'fast': expected a number."),
        ("train.lr=", "train.lr: null: expected a number."),
        ("train.lr=true", "train.lr: true: expected a number."),
        ("train.lr=nan", "train.lr: 'nan': expected a number."),
        ("train.lr=.nan", "train.lr: .nan: expected a finite number."),
        ("adapter.rank=0", "adapter.rank: 0: expected a number above 0."),
        ("adapter.rank=2.5", "adapter.rank: 2.5: expected a whole number."),
        (
            "adapter.variant=lorra",
            f"adapter.variant: no variant 'lorra'. Nearest: 'lora'. Known: {VARIANTS}.",
        ),
        ("train", "write key=value, or ~key for the default."),
        ("~train.lr=3", "write key=value, or ~key for the default."),
        ("=3", "write key=value, or ~key for the default."),
        ("~", "write key=value, or ~key for the default."),
        ("", "write key=value, or ~key for the default."),
        ("train..lr=3", "write key=value, or ~key for the default."),
        (".lr=3", "write key=value, or ~key for the default."),
    ],
)
def test_an_override_that_cannot_hold_is_refused_by_name(
    fault: Callable[..., str], override: str, message: str
) -> None:
    assert fault(override) == f"override {override!r}: {message}"


def test_faults_of_the_file_and_of_overrides_are_reported_together(path: Path) -> None:
    path.write_text(TEXT + "seed: x\n")
    with pytest.raises(RecipeError) as refusal:
        recipes.load(path, ["train.lrr=1", "adapter.rank=0"])
    assert str(refusal.value).splitlines() == [
        f"{path}: 3 faults",
        "  override 'train.lrr=1': train.lrr: no such key. Nearest: 'lr'.",
        "  override 'adapter.rank=0': adapter.rank: 0: expected a number above 0.",
        "  line 7: seed: 'x': expected a whole number.",
    ]


def test_an_override_mends_a_fault_of_the_file(
    path: Path, after: Callable[..., dict[str, Any]]
) -> None:
    path.write_text(TEXT + "seed: x\n")
    assert after("seed=3")["seed"] == 3


def test_a_fault_below_a_replaced_section_is_placed_at_the_override(
    fault: Callable[..., str],
) -> None:
    override = "train={lr: 1e-3, batch_size: 0}"
    message = "train.batch_size: 0: expected a number above 0."
    assert fault(override) == f"override {override!r}: {message}"
