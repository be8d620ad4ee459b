"""What a task asks of a model's last layer, and where that layer is found."""

from typing import Any, NamedTuple

from torch import nn

CLASSIFIER = "SEQ_CLS"
"""PEFT's word for a model with a classification head."""
WRITERS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""PEFT's words for models that write text with a layer of their own."""
CLASSES = {
    CLASSIFIER: "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
    None: "AutoModel",
}
"""Those of transformers that load each."""


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


def settings(head: Head) -> dict[str, Any]:
    """What a model's configuration is told of it."""
    if not head.labels:
        return {}
    return {
        "num_labels": len(head.labels),
        "id2label": dict(enumerate(head.labels)),
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "problem_type": head.problem,
    }


def modules_of(model: nn.Module, fresh: set[str], wanted: Head) -> tuple[str, ...]:
    """The outermost modules all of whose parameters are new, and owners of single new ones.

    Where none is (a base that already classifies into these labels) the head is what stands
    outside the backbone; the output layer of a language model is no head.
    """
    if not fresh and wanted.labels:
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
