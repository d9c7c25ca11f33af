"""What PEFT adapts: the lines of a family's table of names as modules, and the tensors that it may have of each; the words of its configs."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigflax import hub, models, peft, sharding, trees
from bigflax.models import names
from bigflax.nn import Model
from bigflax.weights import Axes, dense, parse_axes

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# the head of a model -> what PEFT calls its task
TASKS = {
    "causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS", None: "FEATURE_EXTRACTION", "embedding": "FEATURE_EXTRACTION",
}  # fmt: skip
LANGUAGE = ("causal_lm", "masked_lm", "seq2seq_lm")  # heads that are the base's own
METHODS = {"LoRA": "LORA", "DoRA": "LORA", "IA3": "IA3", "Prompted": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}  # ours -> PEFT's type
SOFT = ("PROMPT_TUNING", "PREFIX_TUNING")
# PEFT's classes of these tasks forget token types: only a prompt, which needs a class, names them.
FORGETFUL = ("QUESTION_ANS", "FEATURE_EXTRACTION")
# Fields of a config that change what its tensors mean, and that weights.py has nothing for.
UNKNOWN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
CHANGING = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")  # values of init_lora_weights that change the base

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Module:
    """A line of a family's table as PEFT sees it: a matrix with one dimension of inputs and one of outputs, and the names of its parts' tensors.

    Of a table of embeddings the rows are the inputs. The letters are those of names.py, and R is the rank.
    """

    entry: names.Entry
    axes: Axes  # of its leaves

    @property
    def stem(self) -> str:
        return self.entry.template.removesuffix(".weight")

    @property
    def table(self) -> bool:
        return self.axes.outputs_first and not self.entry.leaves[0].startswith("head/")

    @property
    def inner(self) -> tuple[str, ...]:
        """The letters of a leaf's dimensions behind those of its layers."""
        return tuple(letter for letter in self.entry.letters if letter != "S")

    @property
    def inputs(self) -> tuple[str, ...]:
        first = len(self.axes.first)
        return self.inner[:first] if self.table or not self.axes.outputs_first else self.inner[first:]

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(letter for letter in self.inner if letter not in self.inputs)

    @property
    def transposed(self) -> bool:
        """Whether the file has inputs first, as transformers' Conv1D does."""
        return not self.table and set(self.entry.groups[0]) <= set(self.inputs)

    @property
    def fits(self) -> bool:
        """Whether it is such a matrix, and a module of its own."""
        sides = [{letter in self.inputs for letter in group} for group in self.entry.groups]
        mixture = "experts" in self.axes.stack or any("/router/" in leaf for leaf in self.entry.leaves)
        return (
            self.entry.template.endswith(".weight")
            and bool(self.axes.first)
            and sorted(sides, key=max) == [{False}, {True}]
            and not mixture
        )

    @property
    def near(self) -> str:
        """Which part of a LoRA is PEFT's A, that which the inputs meet."""
        return "a" if self.inner[: len(self.inputs)] == self.inputs else "b"

    @property
    def far(self) -> str:
        return "b" if self.near == "a" else "a"

    @functools.cached_property
    def lines(self) -> dict[str, names.Entry]:
        """The tensors that PEFT may have of this module, by what each is to us. What meets the inputs is one for all parts."""
        ins, outs = (next(group for group in self.entry.groups if (set(group) <= set(self.inputs)) == side) for side in (True, False))
        ins, outs = f"({' '.join(ins)})", f"({' '.join(outs)})"
        ranked = lambda part, letters: (*letters, "R") if part == "a" else ("R", *letters)
        a, b = (".lora_embedding_A", ".lora_embedding_B") if self.table else (".lora_A.weight", ".lora_B.weight")
        return {
            "near": self._line(a, f"R {ins}", ranked(self.near, self.inputs), True),
            "far": self._line(b, f"{outs} R", ranked(self.far, self.outputs), False),
            "magnitude": self._line(".lora_magnitude_vector", outs, self.outputs, False),
            "scale of outputs": self._line(".ia3_l", f"{outs} 1", self.outputs, False),
            "scale of inputs": self._line(".ia3_l", f"1 {ins}", self.inputs, True),
        }

    def _line(self, suffix: str, theirs: str, ours: Sequence[str], shared: bool) -> names.Entry:
        leaves = self.entry.leaves[:1] if shared else self.entry.leaves
        ours = [*(["S"] if "S" in self.entry.letters and not shared else []), *ours]
        return dataclasses.replace(self.entry, template=self.stem + suffix, leaves=leaves, pattern=f"{theirs} -> {' '.join(ours)}")

    def shapes(self, what: str, shapes: names.Shapes, rank: int = 1) -> names.Shapes:
        """The shapes that our leaves of one of `lines` have."""
        line, k = self.lines[what], len(self.entry.fields)
        sizes = {leaf: {**dict(zip(self.inner, shapes[leaf][k:], strict=True)), "R": rank} for leaf in line.leaves}
        return {leaf: (*shapes[leaf][:k], *(sizes[leaf][letter] for letter in line.letters if letter != "S")) for leaf in line.leaves}

    def beside(self, vector: np.ndarray, full: Sequence[int], inputs: bool) -> np.ndarray:
        """A vector of the inputs or outputs, with axes of size 1 where the leaf, of shape `full`, has its others."""
        k = len(self.entry.fields)
        return vector.reshape(
            *full[:k], *(size if (c in self.inputs) == inputs else 1 for c, size in zip(self.inner, full[k:], strict=True))
        )

    def lengths(self, weights: Mapping[str, Any], but: Any = ()) -> dict[str, np.ndarray]:
        """Of each leaf the norm over the inputs, one a layer and output: the magnitude that changes nothing."""
        k = len(self.entry.fields)
        over = tuple(k + i for i, letter in enumerate(self.inner) if letter in self.inputs)
        length = lambda w: np.sqrt(np.square(sharding.whole(dense(w)).astype(np.float32)).sum(over))
        return {leaf: length(weights[leaf]) for leaf in self.entry.leaves if leaf not in but}

    def tied_to(self, model: Model, weights: Mapping[str, Any]) -> bool:
        """Whether the table is also the head, which PEFT leaves as it was."""
        return self.table and self.entry.leaves[0].endswith("tokens") and model.config["head"] in LANGUAGE and "head/w" not in weights


def modules_of(model: Model, *, prefixed: bool = False) -> tuple[list[Module], names.Shapes]:
    """Every line of the model's table as a module, those that are none (biases, norms) too, and the shapes of our leaves."""
    bare, _ = peft.split(model.shapes())  # a prompt or a prefix is in no table
    model = dataclasses.replace(model, shaped=bare)
    axes, shapes = dict(trees.named_leaves(model.axes)), {name: leaf.shape for name, leaf in trees.named_leaves(bare)}
    home, lines = models.family(model.family), hub.lines(model, prefixed=prefixed)
    lines = [dataclasses.replace(line, template=renamed(line.template, home)) for line in lines]
    return [Module(line, parse_axes(axes[line.leaves[0]])) for line in lines], shapes


def renamed(name: str, home: Any) -> str:
    """A name in the file as transformers calls it once it is read, where a family says that it differs: `MODULES`, pairs of a regex and its
    replacement; a weight that ends up in no module of its own is named so that it ends on something else than ".weight"."""
    for pattern, new in getattr(home, "MODULES", ()):
        name = re.sub(pattern, new, name)
    return name
