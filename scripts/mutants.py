"""Breaks one line at a time and asks the tests whether they notice.

    python scripts/mutants.py [WORD ...]     only mutants whose file or reason has one of the words

Works on a copy of the checkout in a temporary folder. Each mutant names the tests that should see
it; one that survives them is a fault of the tests. Takes about ten seconds a mutant.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A fault: in `file`, `line` becomes `broken`."""

    file: str
    line: str
    broken: str
    why: str
    tests: str


LAWS, SORA = "tests/test_variant_laws.py", "tests/variants/test_sora.py"
TRAIN, PRUNE, PEFT = "tests/test_train.py", "tests/test_prune.py", "tests/test_peft_format.py"
WAIT = "tests/test_waiting.py"
INJECT, CHECKPOINT = "tests/test_inject.py", "tests/test_checkpoint.py"
COMPACT, KEEP = "tests/variants/test_sora_compact.py", "tests/variants/test_sora_keep.py"
AXES, ADALORA = "tests/variants/test_sora_axes.py", "tests/variants/test_adalora.py"
CHAINS, B = "tests/test_chains.py", "tests/variants/test_blora_target.py"
Q, PER_TASK = "tests/test_quantizer.py", "tests/test_per_task.py"
MODELS, LORA, DATA = "tests/test_models.py", "tests/variants/test_lora.py", "tests/test_data.py"

SOURCES, COLUMNS = "tests/test_sources.py", "tests/test_columns.py"
CACHE, TASKS, GLUE = "tests/test_cache.py", "tests/test_own_tasks.py", "tests/test_glue.py"

UNTRUSTED, FUZZ, DISK = "tests/test_untrusted.py", "tests/test_fuzz.py", "tests/test_disk.py"
RESUME, DOCTOR = "tests/test_resume.py", "tests/test_doctor.py"
SEAL = "tests/test_seal.py"
KERNELS = "tests/test_kernels.py"
LANGUAGE, FORMATS = "tests/test_language.py", "tests/test_formats.py"

MUTANTS = [
    Mutant("tasks/causal.py", "[] if eos in tokens[-1][-2:] else [eos]", "[]", "no end", LANGUAGE),
    Mutant("tasks/causal.py", "learnt[0] = False", "pass", "the first is a target", LANGUAGE),
    Mutant("tasks/language.py", "int(batch.labels.sum())", "len(batch.rows)", "rows", LANGUAGE),
    Mutant(
        "tasks/generation.py",
        "longest, 0, left=not apart)",
        "longest, 1, left=not apart)",
        "padding is read",
        LANGUAGE,
    ),
    Mutant("tasks/generation.py", "not text.startswith(", "text.startswith(", "bos", LANGUAGE),
    Mutant(
        "data/packing.py",
        "np.arange(int(each[i]))",
        "np.arange(i, int(each[i]) + i)",
        "positions go on",
        LANGUAGE,
    ),
    Mutant("data/packing.py", "(lengths[i], -1)", "(0, -1)", "a row overflows", LANGUAGE),
    Mutant("data/dialogues.py", "or i == 0", "or i < 2", "one answer less", LANGUAGE),
    Mutant("data/formats.py", 'if record.cells.get("input")', "if False", "no input", FORMATS),
    Mutant(
        "variants/sora.py",
        ".clamp_min(0.0)",
        ".clamp_min(0.0) * (u.abs() >= 2 * xi)",
        "the authors' threshold",
        SORA,
    ),
    Mutant("variants/sora.py", "value * ctx.rate(layer.g)", "value", "threshold not eta", SORA),
    Mutant(
        "variants/sora.py",
        "(self.scale * self.g * self.B).detach()",
        "(self.g * self.B).detach()",
        "factors forget the scale",
        LAWS,
    ),
    Mutant("variants/sora.py", '"weight_decay": 0.0', '"weight_decay": 0.1', "gates decay", SORA),
    Mutant(
        "variants/sora.py",
        'self.step, self.moved = state["steps"].tolist()',
        "pass",
        "controller's counters not restored",
        SORA,
    ),
    Mutant(
        "variants/sora.py",
        "self.step - self.moved >= max(1, self.steps // 10)",
        "True",
        "always settled",
        SORA,
    ),
    Mutant("variants/lora.py", "self.scale * self.B.detach()", "self.B.detach()", "no scale", LAWS),
    Mutant("variants/lora.py", '"lr_scale": self.lr_ratio', '"lr_scale": 1.0', "no LoRA+", LORA),
    Mutant(
        "adapter.py", "base.requires_grad_(False)", "base", "a layer leaves its base free", LAWS
    ),
    Mutant(
        "adapter.py",
        "B.copy_(plan.start.B / plan.scale)",
        "B.copy_(plan.start.B)",
        "a start is scaled twice",
        INJECT,
    ),
    Mutant("adapter.py", "torch.addmm(y, ", "torch.addmm(0 * y, ", "base path lost", LAWS),
    Mutant("subtracted.py", "self.A - self.A0", "self.A", "the start is not subtracted", LAWS),
    Mutant("adapter.py", "kept.to(old.device)", "kept.flip(0)", "compaction mixes ranks", LAWS),
    Mutant("inject.py", "model.requires_grad_(False)", "pass", "model not frozen", INJECT),
    Mutant(
        "inject.py", "module.float().requires_grad_(True)", "module.float()", "head frozen", INJECT
    ),
    Mutant(
        "inject.py",
        "is_linear(module) and not any(name == w",
        "is_linear(module) or any(name == w",
        "the head is adapted",
        INJECT,
    ),
    Mutant("variants/sora.py", "gates * self.live", "gates", "the dead come back", COMPACT),
    Mutant("variants/sora.py", "layer.g.grad.mul_(live)", "pass", "the dead are clipped", COMPACT),
    Mutant("variants/sora.py", "svd.S / unit", "svd.S / svd.S.mean()", "a unit a layer", AXES),
    Mutant("variants/sora.py", "ctx.forget(rewritten)", "pass", "old moments stay", AXES),
    Mutant("target.py", "place // self.at_most", "0 * place", "all may die at once", KEEP),
    Mutant("target.py", "3 * steps // 4", "steps", "no finish", KEEP),
    Mutant("chains.py", ".cummax(1).values", "", "a chain closes in its middle", CHAINS),
    Mutant("chains.py", "torch.where(due > 0, led, DEAD)", "led", "a gate is never shut", CHAINS),
    Mutant(
        "variants/blora.py", "else layer.rank(), layer.n", "else layer.r, layer.n", "dead bits", B
    ),
    Mutant(
        "quantizer.py", "clamp_(-tops, tops)", "clamp_(-tops - 1, tops + 1)", "a code too wide", Q
    ),
    Mutant(
        "quantizer.py", "passed = grad * inside", "passed = grad", "no clipping of gradients", Q
    ),
    Mutant("variants/adalora.py", "(now - sensitivity)", "now", "uncertainty", ADALORA),
    Mutant(
        "optim.py",
        "index_select(axis, kept.to(value.device))",
        "narrow(axis, 0, len(kept))",
        "moments of others",
        LAWS,
    ),
    Mutant("train.py", "if i == len(batches) else None", "", "a penalty for every batch", TRAIN),
    Mutant("train.py", "place.stage.rate * ", "", "frozen stages train", TRAIN),
    Mutant("recipe.py", "_choose_task(document, overrides)", "pass", "per_task unread", PER_TASK),
    Mutant(
        "models/__init__.py", "torch.manual_seed(seed)", "pass", "the head's start drifts", MODELS
    ),
    Mutant("optim.py", "own = special.get(id(p), {})", "own = {}", "optim() ignored", SORA),
    Mutant("optim.py", "(step - 1 - warm)", "(step - warm)", "the last step has rate 0", TRAIN),
    Mutant("train.py", "controller.after_step(", "(lambda ctx: None)(", "variant not asked", TRAIN),
    Mutant(
        "train.py",
        "Portion(sum(map(task.items, batches)),",
        "Portion(task.items(batches[0]) * len(batches),",
        "mean of means",
        TRAIN,
    ),
    Mutant(
        "train.py",
        "engine.clip(weights, section.clip)",
        "engine.clip(weights, None)",
        "no clipping",
        TRAIN,
    ),
    Mutant("train.py", "if controller.settled():", "if True:", "best while ranks move", TRAIN),
    Mutant("train.py", "isfinite(loss) and isfinite(norm):", "True:", "nan goes on", TRAIN),
    Mutant("train.py", "told or not engine.waits or", "True or", "every step is waited for", WAIT),
    Mutant("train.py", ' or section.non_finite == "skip"', "", "skipped too late", WAIT),
    Mutant(
        "train.py",
        "            take_note(progress, unread, section, engine)\n",
        "",
        "saved unread",
        WAIT,
    ),
    Mutant(
        "train.py",
        "seed, progress.step, engine",
        "seed, 0, engine",
        "resume repeats the rows",
        RESUME,
    ),
    Mutant(
        "checkpoint.py",
        'torch.set_rng_state(states["cpu"])',
        'states["cpu"]',
        "random state lost",
        RESUME,
    ),
    Mutant(
        "checkpoint.py",
        'load_state_tensors(trainee.model, trainee.optimizer, parts["optimizer"])',
        "pass",
        "moments lost",
        RESUME,
    ),
    Mutant(
        "checkpoint.py",
        "copy_into(_whole_tensors(whole)",
        "(lambda *_: None)(_whole_tensors(whole)",
        "the head comes back random",
        RESUME,
    ),
    Mutant(
        "resuming.py", "if _step_of(line) <=", "if 0 <=", "metrics repeat after a resume", RESUME
    ),
    Mutant("peft_format.py", '"rank_pattern": pattern', '"rank_pattern": {}', "no ranks", LAWS),
    Mutant("peft_format.py", '"alpha_pattern": pattern', '"alpha_pattern": {}', "no alphas", LAWS),
    Mutant(
        "peft_format.py",
        '"modules_to_save": list(adapter.whole) or None',
        '"modules_to_save": None',
        "the head stays behind",
        PEFT,
    ),
    Mutant("peft_format.py", "if config.use_rslora else", "if False else", "rslora", PEFT),
    Mutant("peft_format.py", "elif len(a) != rank:", "elif False:", "r is believed", UNTRUSTED),
    Mutant("peft_format.py", "not name.isprintable()", "False", "escapes get out", UNTRUSTED),
    Mutant("peft_config.py", "Field(gt=0, lt=2**31)", "Field(gt=0)", "any rank", UNTRUSTED),
    Mutant(
        "models/__init__.py",
        "trust_remote_code=False,  # left out,",
        "#",
        "a model's own code runs",
        UNTRUSTED,
    ),
    Mutant("models/kernels.py", "output[0][:, :1]", "output[0][:, 1:2]", "another token", KERNELS),
    Mutant("models/kernels.py", "value=-torch.inf", "value=0.0", "columns that are read", KERNELS),
    Mutant("models/kernels.py", "weights += mask", "pass", "padding is read", KERNELS),
    Mutant("models/kernels.py", "2**16) - 2**15", "2**15) - 2**15", "half the dropout", KERNELS),
    Mutant("models/kernels.py", ".train(module.training)", "", "dropout in evaluation", KERNELS),
    Mutant("yamltext.py", "self.depth > DEEPEST", "False", "open brackets", FUZZ),
    Mutant("packed.py", "ge=0, lt=2**31", "ge=0", "a shape of no tensor", FUZZ),
    Mutant("disk.py", "if told else None", "if False else None", "Rust's words", DISK),
    Mutant("seal.py", '{"base_model_name_or_path"}', '{"lora_alpha"}', "another scale", SEAL),
    Mutant("merge.py", '- {"recipe.yaml"}', '- {"config.json"}', "not all of a model", SEAL),
    Mutant("journal.py", 'if "ranks" not in row:', "if True:", "a loss no row has", CHECKPOINT),
    Mutant("journal.py", "except OSError as error:", "except KeyError as error:", "gone", DISK),
    Mutant(
        "checkpoint.py",
        'trainee.controller.load_state_dict(parts["controller"])',
        "pass",
        "controller's state not restored",
        RESUME,
    ),
    Mutant(
        "checkpoint.py", 'if not (parts["optimizer"] or bare):', "if False:", "no moments", RESUME
    ),
    Mutant("doctor.py", "needed > free:", "False:", "room for all", DOCTOR),
    Mutant("doctor.py", "torch.equal(before, _input", "bool(before is _input", "a probe", DOCTOR),
    Mutant(
        "environment.py", "for name in VARIABLES if", "for name in os.environ if", "secrets", DOCTOR
    ),
    Mutant(
        "prune.py", "float(s) ** 2 / costs[name]", "float(s) / costs[name]", "not energy", PRUNE
    ),
    Mutant("prune.py", "            break\n", "            continue\n", "sets do not nest", PRUNE),
    Mutant(
        "prune.py",
        "share * energy[-1]).sum()) + 1",
        "share * energy[-1]).sum())",
        "one short",
        PRUNE,
    ),
    Mutant("data/__init__.py", "if section.deduplicate:", "if False:", "duplicates stay", DATA),
    Mutant("data/batching.py", "(seed << 20) + epoch", "seed", "every epoch the same", DATA),
    Mutant("data/tables.py", " and number >= 0 else", " else", "-1 is the last label", SOURCES),
    Mutant("data/sources.py", "if reader.line_num > line:", "if False:", "swallowed", SOURCES),
    Mutant("data/sources.py", "if len(found) < len(pairs):", "if False:", "keys twice", SOURCES),
    Mutant("data/columns.py", "if (role,) in found:", "if False:", "text is no text", COLUMNS),
    Mutant("data/labels.py", "if known else label", "if False else label", "numbers", COLUMNS),
    Mutant("data/rows.py", "self._numbers[indices]", "indices", "rows of rows", CACHE),
    Mutant("data/rows.py", "IN_MEMORY, dir", "2**40, dir", "all rows in memory", CACHE),
    Mutant("data/cache.py", "== told for", "is not None for", "a broken cache is used", CACHE),
    Mutant("data/cache.py", "fcntl.lockf", "(lambda *_: 0)", "two do the same work", CACHE),
    Mutant("data/encoding.py", "key_of([*settings, own]", "key_of([own]", "one length", CACHE),
    Mutant("data/encoding.py", "backend.no_truncation()", "pass", "its last call", CACHE),
    Mutant("data/splitting.py", "kept[~np.isin(", "kept[np.isin(", "scored texts stay", DATA),
    Mutant("tasks/__init__.py", "torch.tensor(rows).argsort()", "rows", "disorder", TASKS),
    Mutant("tasks/multilabel.py", "summed / len(self.labels)", "summed", "no mean", TASKS),
    Mutant("tasks/tokens.py", 'kind != "I" or own != name', 'kind != "I"', "spans run on", TASKS),
    Mutant("tasks/tokens.py", "word is None or word == before", "word is None", "pieces", TASKS),
    Mutant("tasks/glue.py", "splits.setdefault(split, rows)", "splits[split] = rows", "ax", GLUE),
]


def survives(mutant: Mutant) -> bool:
    """Whether the tests that should notice pass all the same."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / "lorakit" / mutant.file
        whole = path.read_text()
        assert mutant.line in whole, f"{mutant.file} no longer has {mutant.line!r}"
        path.write_text(whole.replace(mutant.line, mutant.broken, 1))
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", mutant.tests]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.file}: {mutant.why}: pytest did not run\n{done.stdout}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Runs the mutants that a word picks; the exit code is 1 where one lives."""
    chosen = [m for m in MUTANTS if not words or any(w in m.file or w in m.why for w in words)]
    alive = 0
    for mutant in chosen:
        lives = survives(mutant)
        alive += lives
        print(f"{'ALIVE ' if lives else 'caught'}  {mutant.file}: {mutant.why}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} faults noticed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
