"""A recipe is refused with one message that names every fault, or read back as it was written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorakit import recipe as recipes
from lorakit import shipped, variants
from lorakit.errors import RecipeError
from lorakit.foreign_keys import BY_COMMAND, HERE
from lorakit.sections import variants_with
from lorakit.tasks import glue

VARIANTS = ", ".join(variants.names())
PLAIN = """\
model: {name: some/model}
task: {name: glue/sst2}
adapter: {variant: sora}
output_dir: runs/x
"""
KEYS = recipes.keys()
OWN = PLAIN.replace("glue/sst2", "classification")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def to_file(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return to_file


@pytest.fixture
def faults(write: Callable[[str | bytes], Path]) -> Callable[[str | bytes], list[str]]:
    """The lines of the message that refuses a text, the file's path cut off."""

    def of(text: str | bytes) -> list[str]:
        path = write(text)
        with pytest.raises(RecipeError) as refusal:
            recipes.load(path)
        message = str(refusal.value)
        assert message.startswith(str(path))
        return [line.strip() for line in message.removeprefix(str(path)).splitlines()]

    return of


def one(lines: list[str]) -> str:
    """The only fault, below the title."""
    assert lines[0] == ": 1 fault"
    assert len(lines) == 2, lines
    return lines[1]


def with_adapter(settings: str) -> str:
    return PLAIN.replace("{variant: sora}", settings)


# unknown keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "trian: {}", "line 5: trian: no such key. Nearest: 'train'."),
        (PLAIN + "train: {lrr: 1}", "line 5: train.lrr: no such key. Nearest: 'lr'."),
        (PLAIN + "train:\n  lrr: 1", "line 6: train.lrr: no such key. Nearest: 'lr'."),
        (
            PLAIN.replace("{name: some/model}", "{name: x, revison: y}"),
            "line 1: model.revison: no such key. Nearest: 'revision'.",
        ),
        (
            with_adapter("{variant: lora, target: all-linear}"),
            "line 3: adapter.target: no such key. Nearest: 'targets'.",
        ),
        (
            with_adapter("{variant: sora, sparsity: {gate_rl: 1}}"),
            "line 3: adapter.sparsity.gate_rl: no such key. Nearest: 'gate_lr'.",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(
    faults: Callable[[str], list[str]], text: str, message: str
) -> None:
    assert one(faults(text)) == message


def test_a_key_in_the_wrong_section_is_told_where_it_belongs(
    faults: Callable[[str], list[str]],
) -> None:
    assert one(faults(PLAIN + "lr: 1e-3")) == "line 5: lr: no such key. Is it `train.lr`?"
    fault = one(faults(PLAIN + "train: {dropout: 0.1}"))
    assert fault.endswith("Is it `model.dropout` or `adapter.dropout`?")


def test_a_key_that_resembles_none_is_answered_with_all_there_are(
    faults: Callable[[str], list[str]],
) -> None:
    fault = one(faults(PLAIN + "zzz: 1"))
    assert fault.endswith(
        "Known here: model, task, data, adapter, train, output_dir, seed, per_task."
    )


def test_a_key_of_another_variant_names_that_variant(faults: Callable[[str], list[str]]) -> None:
    fault = one(faults(with_adapter("{variant: lora, sparsity: {}}")))
    assert fault == "line 3: adapter.sparsity: no such key. It belongs to the variant sora."


def test_every_section_of_every_variant_refuses_unknown_keys(
    faults: Callable[[str], list[str]],
) -> None:
    sections = {key.rpartition(".")[0] for key in KEYS if "." in key}
    assert {"model", "task", "data", "adapter", "adapter.sparsity", "train"} <= sections
    for section in sorted(sections):
        data = yaml.safe_load(OWN) | {"data": {"train": "x.csv"}}
        own = section.removeprefix("adapter.").split(".")[0]
        if section.startswith("adapter."):
            data["adapter"]["variant"] = variants_with(own)[0]
        place = data
        for key in section.split("."):
            place = place.setdefault(key, {})
        place["no_such_thing"] = 1
        assert one(faults(yaml.safe_dump(data))).split(": ")[1] == f"{section}.no_such_thing"


# keys of other tools


@pytest.mark.parametrize("foreign", ["lora_r", "r", "lora_rank"])
def test_another_tools_key_is_named_in_this_ones_words(
    faults: Callable[[str], list[str]], foreign: str
) -> None:
    expected = f"{foreign}: no such key. `{foreign}` is `adapter.rank` here."
    assert one(faults(PLAIN + f"{foreign}: 8")) == f"line 5: {expected}"
    below = one(faults(with_adapter(f"{{variant: sora, {foreign}: 8}}")))
    assert below == f"line 3: adapter.{expected}"


def test_the_keys_that_users_bring_along_are_known() -> None:
    expected = {
        "lora_alpha": "adapter.alpha",
        "target_modules": "adapter.targets",
        "modules_to_save": "adapter.also_train",
        "per_device_train_batch_size": "train.batch_size",
        "gradient_accumulation_steps": "train.accumulate",
        "num_train_epochs": "train.epochs",
        "learning_rate": "train.lr",
        "lr_scheduler_type": "train.schedule",
        "max_seq_length": "task.max_length",
    }
    assert expected.items() <= HERE.items()


def test_every_hint_points_to_a_key_that_exists() -> None:
    assert set(HERE.values()) <= set(KEYS)


def test_a_key_that_is_a_command_here_names_the_command(
    faults: Callable[[str], list[str]],
) -> None:
    for key, command in BY_COMMAND.items():
        assert one(faults(f"{PLAIN}{key}: x")).endswith(f"`{key}` is {command} here.")


# values


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train: {steps: true}", "train.steps: true: expected a whole number."),
        ("train: {steps: 2.5}", "train.steps: 2.5: expected a whole number."),
        ("train: {steps: '6'}", "train.steps: '6': expected a whole number."),
        ("train: {batch_size: 0}", "train.batch_size: 0: expected a number above 0."),
        ("train: {lr: .nan}", "train.lr: .nan: expected a finite number."),
        ("train: {lr: .inf}", "train.lr: .inf: expected a finite number."),
        ("train: {lr: nan}", "train.lr: 'nan': expected a number."),
        ("train: {lr: -1.0}", "train.lr: -1.0: expected a number above 0."),
        ("train: {lr: null}", "train.lr: null: expected a number."),
        ("train: {warmup: 1}", "train.warmup: 1: expected a number below 1."),
        ("train: 3", "train: 3: expected a mapping of keys to values."),
        ("train:", "train: null: expected a mapping of keys to values."),
        ("seed: -1", "seed: -1: expected a number of at least 0."),
        (
            "train: {schedule: linaer}",
            "train.schedule: 'linaer': expected 'linear', 'cosine' or 'constant'."
            " Nearest: 'linear'.",
        ),
    ],
)
def test_a_value_that_cannot_hold_is_shown_with_what_was_expected(
    faults: Callable[[str], list[str]], setting: str, message: str
) -> None:
    assert one(faults(PLAIN + setting)) == f"line 5: {message}"


@pytest.mark.parametrize("value", ["3 steps", "0 epochs", "1.5", "yes", "epoch", "[1]"])
def test_a_field_of_several_types_gives_one_line_in_words(
    faults: Callable[[str], list[str]], value: str
) -> None:
    fault = one(faults(PLAIN + f"train: {{eval_every: {value}}}"))
    assert fault.startswith("line 5: train.eval_every: ")
    assert fault.endswith(
        ": expected steps between evaluations, or `1 epoch`, `2 epochs`; null: at the end only."
    )


def test_of_several_types_the_one_that_fits_speaks(faults: Callable[[str], list[str]]) -> None:
    fault = one(faults(PLAIN + "train: {eval_every: 0}"))
    assert fault == "line 5: train.eval_every: 0: expected a number above 0."
    fault = one(faults(with_adapter("{variant: lora, targets: [query, 1]}")))
    assert fault == "line 3: adapter.targets.1: 1: expected text; put it in quotes."


@pytest.mark.parametrize("text", ["3", "[a]", "{a: b}"])
def test_the_columns_of_the_text_are_one_or_two_names(
    faults: Callable[[str], list[str]], text: str
) -> None:
    fault = one(faults(OWN + f"data: {{train: x.csv, text: {text}}}"))
    assert fault == (
        f"line 5: data.text: {yaml.safe_load(text)}: ".replace("'", "")
        + "expected column of the text, or columns of a pair of texts; null: found by their names, "
        "like `text`, `sentence1` and `sentence2`, or `tokens`, and said."
    )


def test_no_message_shows_a_regular_expression(faults: Callable[[str], list[str]]) -> None:
    fault = one(faults(with_adapter("{variant: lora, layers: 0 to 3}")))
    assert fault == (
        "line 3: adapter.layers: '0 to 3': "
        "expected blocks to adapt, counted from 0: `0-3,5`. null: all."
    )


def test_what_is_left_out_and_cannot_be_is_told_by_its_own_name_beside_all_else(
    faults: Callable[[str], list[str]],
) -> None:
    """Not by its section's, behind which there would be room for one fault alone."""
    lacking = "{variant: blora, gates: {lambda_bits: null, lambda_ranks: null, range_lr: 0}}"
    assert faults(with_adapter(lacking))[1:] == [
        "line 3: adapter.gates.keep: give `lambda_ranks` or `keep`, one of them.",
        "line 3: adapter.gates.bits: give `lambda_bits` or `bits`, one of them.",
        "line 3: adapter.gates.range_lr: 0: expected a number above 0.",
    ]


def test_a_contradiction_across_sections_is_told_where_its_key_is(
    faults: Callable[[str], list[str]],
) -> None:
    text = with_adapter("{variant: adalora, rank: 4, budget: {target: 6}}")
    assert one(faults(text)) == (
        "line 3: adapter.budget.target: 6.0: expected less than the start rank, 4: else there is "
        "nothing to prune."
    )
    more = "{variant: blora, gates: {bits: 4}, quantize: {weights: true, activations: true}}"
    _, *told = faults(with_adapter(more))
    for fault, key in zip(told, ("weights", "activations"), strict=True):
        assert fault.startswith(f"line 3: adapter.quantize.{key}: true: `gates.bits` counts the")


@pytest.mark.parametrize("value", ["2024", "2024-01-01", "true", "1e-3"])
def test_a_word_that_yaml_takes_for_something_else_must_be_quoted(
    faults: Callable[[str], list[str]], write: Callable[[str], Path], value: str
) -> None:
    text = PLAIN.replace("runs/x", value)
    assert one(faults(text)).endswith(": expected text; put it in quotes.")
    assert recipes.load(write(PLAIN.replace("runs/x", f"'{value}'"))).output_dir == value


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "0.001"])
def test_a_number_with_an_exponent_is_a_number(write: Callable[[str], Path], written: str) -> None:
    assert recipes.load(write(PLAIN + f"train: {{lr: {written}}}")).train.lr == 0.001


def test_a_long_value_is_cut_short_in_the_message(faults: Callable[[str], list[str]]) -> None:
    assert len(one(faults(PLAIN + f"seed: {'x' * 1000}"))) < 200


def test_an_empty_output_dir_is_refused(faults: Callable[[str], list[str]]) -> None:
    assert "output_dir: ''" in one(faults(PLAIN.replace("runs/x", "''")))


# what does not go together


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN, "data: task.name classification needs a `data` section with its files."),
        (
            PLAIN + "data: {train: x.csv}",
            "line 5: data: glue/sst2 brings its own rows; `data` would be ignored.",
        ),
        (
            PLAIN + "train: {epochs: 1, steps: 2}",
            "line 5: train.steps: 2: give `epochs` or `steps`, one of them; train.steps=N takes "
            "'~train.epochs' beside it where the recipe names epochs.",
        ),
        (
            PLAIN + "train: {epochs: null}",
            "line 5: train.steps: give `epochs` or `steps`, one of them; train.steps=N takes "
            "'~train.epochs' beside it where the recipe names epochs.",
        ),
        (
            PLAIN + "train: {keep_best: 2}",
            "line 5: train.keep_best: 2: without train.keep_last all checkpoints are kept; give "
            "both.",
        ),
        (
            PLAIN + "train: {keep_last: 1, keep_best: 2, eval_every: null}",
            "line 5: train.keep_best: 2: train.eval_every: null scores the last step alone; "
            "nothing to rank.",
        ),
        (
            with_adapter("{variant: sora, sparsity: {lambda: 1, xi: 0.1}}"),
            "line 3: adapter.sparsity.xi: 0.1: give `lambda` or `xi`, one of them.",
        ),
        (
            with_adapter("{variant: sora, sparsity: {schedule: exp-linear}}"),
            "line 3: adapter.sparsity.start: exp-linear grows by a ratio, so `start` must be above "
            "0.",
        ),
        (
            with_adapter("{variant: sora, sparsity: {schedule: linear, start: 3.0}}"),
            "line 3: adapter.sparsity.start: 3.0: expected at most the end, 2.",
        ),
        (
            OWN + "data: {train: x.csv, labels: [good]}",
            "line 5: data.labels: [good]: expected two labels or more, none of them twice.",
        ),
        (
            OWN + "data: {train: x.csv, labels: [good, good]}",
            "line 5: data.labels: [good, good]: expected two labels or more, none of them twice.",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    faults: Callable[[str], list[str]], text: str, message: str
) -> None:
    assert one(faults(text)) == message


def test_a_setting_that_others_look_at_may_be_at_fault_itself(
    faults: Callable[[str], list[str]],
) -> None:
    text = with_adapter("{variant: sora, sparsity: {xi: 0.1, dense: x, retrain: false}}")
    assert one(faults(text)) == "line 3: adapter.sparsity.dense: 'x': expected a number."


def test_contradictions_are_reported_together_with_every_other_fault(
    faults: Callable[[str], list[str]],
) -> None:
    text = with_adapter("{variant: sora, rank: 0, sparsity: {lambda: 1, xi: 0.1}}")
    said = faults(text + "train: {epochs: 1, steps: 2, lrr: 3}\ndata: {train: x.csv}\n")
    told = [line.split(": ")[1] for line in said if line.startswith("line")]
    want = {"adapter.rank", "adapter.sparsity.xi", "train.steps", "train.lrr", "data"}
    assert set(told) == want
    assert len(told) == len(want)


def test_steps_alone_replace_epochs_and_xi_alone_replaces_lambda(
    write: Callable[[str], Path],
) -> None:
    text = with_adapter("{variant: sora, sparsity: {xi: 0.1}}") + "train: {steps: 7}"
    loaded = recipes.load(write(text))
    assert (loaded.train.steps, loaded.train.epochs) == (7, None)
    assert loaded.adapter.model_dump()["sparsity"]["lambda"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            with_adapter("{variant: sorra}"),
            f"line 3: adapter.variant: no variant 'sorra'. Nearest: 'sora'. Known: {VARIANTS}.",
        ),
        (with_adapter("{variant: 3}"), "line 3: adapter.variant: no variant '3'. Known: "),
        (with_adapter("{rank: 3}"), f"line 3: adapter.variant: missing. Known: {VARIANTS}."),
        (with_adapter("lora"), "line 3: adapter: 'lora': expected a mapping of keys to values."),
        (
            PLAIN.replace("glue/sst2", "glue/sst"),
            "line 2: task.name: no task 'glue/sst'. Nearest: 'glue/sst2'. Known: causal-lm,",
        ),
    ],
)
def test_an_unknown_variant_or_task_is_answered_with_the_nearest(
    faults: Callable[[str], list[str]], text: str, message: str
) -> None:
    assert one(faults(text)).startswith(message)


def test_all_faults_are_reported_together_a_line_each(faults: Callable[[str], list[str]]) -> None:
    lines = faults(
        "model: {nam: x}\n"
        "task: {name: glue/sst, max_length: 0}\n"
        "adapter: {variant: sora, rank: 0, layers: x, sparsity: {lambda: x}}\n"
        "train: {eval_every: x, save_every: -1, lr: .nan}\n"
        "seed: 1\n"
        "seed: 2\n"
    )
    keys = [re.sub(r"^line \d+: ", "", line).split(": ")[0] for line in lines[1:]]
    assert lines[0] == ": 12 faults"
    assert sorted(keys) == [
        "adapter.layers",
        "adapter.rank",
        "adapter.sparsity.lambda",
        "model.nam",
        "model.name",
        "output_dir",
        "seed",
        "task.max_length",
        "task.name",
        "train.eval_every",
        "train.lr",
        "train.save_every",
    ]


def test_a_missing_key_says_what_it_is(faults: Callable[[str], list[str]]) -> None:
    fault = one(faults(PLAIN.replace("name: some/model", "")))
    assert fault.startswith("line 1: model.name: missing. A hub id, a folder, or `package:")


# what is no recipe

LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", ": a recipe is a mapping of keys to values; this is empty."),
        (b"# nothing\n", ": a recipe is a mapping of keys to values; this is empty."),
        (b"- model\n", ": a recipe is a mapping of keys to values; this is a list."),
        (b"model", ": a recipe is a mapping of keys to values; this is a single value."),
        (b"a: 1\nb: [}\n", ", line 2: not YAML: while parsing a flow node, expected"),
        (b"a: b: c\n", ", line 1: not YAML: mapping values are not allowed here."),
        (b"a: 1\n\tb: 1\n", ", line 2: not YAML: while scanning for the next token, found"),
        (b"a: 1\nb: \x00\n", ", line 2: not YAML: special characters are not allowed."),
        (b"a: 1\n---\nb: 2\n", ", line 2: not YAML: expected a single document in the stream,"),
        (b"a: &a [*a]\n", ": nested deeper than 50 levels."),
        (b"a: " + b"[" * 60 + b"]" * 60, ": nested deeper than 50 levels."),
        (b"a: " + b"[" * 9000 + b"]" * 9000, ": nested deeper than 50 levels."),
        (LAUGHS, ": 1,234,567,909 values, aliases written out; a recipe has at most 10,000."),
        (b"a: b\n" * 60_000, ": longer than 262,144 characters; that is no recipe."),
        (b"a: [" + b"1," * 30_000 + b"]", ", line 1: not YAML: more than 10,000 values."),
        (b"a: *b\n", ", line 1: not YAML: found undefined alias 'b'."),
        (b"a: \xff\n", ": cannot be read: not UTF-8 text."),
    ],
)
def test_a_file_that_is_no_mapping_of_keys_is_refused_in_words(
    faults: Callable[[bytes], list[str]], text: bytes, message: str
) -> None:
    assert faults(text)[0].startswith(message)


def test_a_tab_is_explained(faults: Callable[[str], list[str]]) -> None:
    assert faults("a: 1\n\tb: 1\n")[0].endswith("Indent by blanks, not tabs.")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        recipes.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        recipes.load(tmp_path)


def test_a_key_given_twice_is_refused_with_both_lines(faults: Callable[[str], list[str]]) -> None:
    assert one(faults(PLAIN + "seed: 1\nseed: 2")) == "line 6: seed: given twice; first at line 5."
    lines = faults(PLAIN + "train:\n  lr: 1e-3\n  steps: 3\n  lr: 1e-2")
    assert one(lines) == "line 8: train.lr: given twice; first at line 6."


def test_a_key_that_is_no_word_is_refused(faults: Callable[[str], list[str]]) -> None:
    assert one(faults(PLAIN + "? [a]\n: b")).startswith("line 5: recipe: a key is one word")


def test_a_merge_may_be_overridden_without_being_called_a_repetition(
    write: Callable[[str], Path],
) -> None:
    text = PLAIN + "train:\n  <<: {lr: 1e-2, batch_size: 4}\n  lr: 1e-4\n"
    section = recipes.load(write(text)).train
    assert (section.lr, section.batch_size) == (1e-4, 4)


# out and in again


SHIPPED = shipped.recipes()


def test_recipes_are_shipped() -> None:
    assert "quickstart" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_read_back_as_it_is_dumped(
    write: Callable[[str], Path], name: str
) -> None:
    loaded = recipes.load(SHIPPED[name])
    again = recipes.load(write(recipes.dump(loaded)))
    assert again == loaded
    assert recipes.differences(loaded, again) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_names_its_schema_and_its_command(name: str) -> None:
    lines = SHIPPED[name].read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={shipped.SCHEMA}"
    assert any(f"lorakit train recipes/{name}.yaml" in line for line in lines)


@pytest.mark.parametrize("variant", variants.names())
def test_a_dumped_recipe_writes_out_every_key(write: Callable[[str], Path], variant: str) -> None:
    text = OWN.replace("variant: sora", f"variant: {variant}") + "data: {train: x.csv}"
    dumped = yaml.safe_load(recipes.dump(recipes.load(write(text))))
    for key in KEYS:
        name = key.removeprefix("adapter.").partition(".")[0]
        if key.startswith("adapter.") and variant not in variants_with(name):
            continue
        place = dumped
        for part in key.split("."):
            assert part in place, key
            place = place[part]


def test_words_that_look_like_numbers_survive_the_way_out_and_in(
    write: Callable[[str], Path],
) -> None:
    text = OWN.replace("runs/x", "'1e-3'") + "data: {train: '2024', labels: ['0', 'yes', 'null']}"
    loaded = recipes.load(write(text))
    assert recipes.load(write(recipes.dump(loaded))) == loaded


def test_the_keys_in_which_two_recipes_differ_are_named(write: Callable[[str], Path]) -> None:
    one_, other = recipes.load(write(PLAIN)), recipes.load(write(PLAIN + "train: {lr: 1e-2}"))
    assert recipes.differences(one_, other) == ["train.lr: 0.001 there, 0.01 here"]


# the schema


def test_the_schema_describes_every_key_in_the_words_of_the_docstrings() -> None:
    schema = recipes.json_schema()
    sections = [schema, *schema["$defs"].values()]
    bare = [
        f"{section['title']}.{key}"
        for section in sections
        for key, field in section["properties"].items()
        if not ("description" in field or "$ref" in json.dumps(field)) and key not in ("variant",)
    ]
    assert not bare
    assert "Peak learning rate." in json.dumps(schema)
    assert all(section["additionalProperties"] is False for section in sections)


def test_every_reference_and_every_required_key_of_the_schema_is_there() -> None:
    schema = recipes.json_schema()
    for section in [schema, *schema["$defs"].values()]:
        assert set(section.get("required", ())) <= set(section["properties"])
    references = set(re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema)))
    assert references == set(schema["$defs"])
    assert schema["required"] == ["model", "task", "adapter", "output_dir"]


def test_the_schema_knows_every_variant() -> None:
    written = json.dumps(recipes.json_schema()["properties"]["adapter"])
    assert all(f'"{name}"' in written for name in variants.names())


def test_the_schema_beside_the_recipes_is_the_one_that_is_printed() -> None:
    kept = (shipped.folder() / shipped.SCHEMA).read_text()
    assert json.loads(kept) == recipes.json_schema()


def test_every_glue_task_of_the_table_may_be_named(write: Callable[[str], Path]) -> None:
    for name in glue.NAMES:
        assert recipes.load(write(PLAIN.replace("glue/sst2", name))).task.name == name
