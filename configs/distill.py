"""A smaller student of a trained model: half of its layers, learned from labels and from what the model finds likely (DistilBERT's way, 1910.01108).

    bigflax train --config=finetune                                        the teacher: MiniLM-L6 that tells classes apart, configs/finetune.py
    bigflax train --config=distill --config.data.source.path=train.jsonl   its student of three layers, on the same data

    bigflax train --config=preference:base                                 the teacher: a small decoder, configs/preference.py
    bigflax train --config=distill:decoder                                 its student of two layers, on the same texts

A teacher of your own: `--config.teacher.source=` the work folder of a run, a folder of weights or a hub id, and in `model` its sizes with fewer layers
(`teacher.every=2` takes every second to begin with; None begins with nothing, and any sizes are right). The work folder holds the student alone.

Measured: MiniLM-L6 fine-tuned on 1,800 texts in 11 topics, accuracy of 800 others: the teacher 89.88%, its student by this recipe, three seeds, 90.92 +- 0.56%,
macro F1 0.886, half of the layers and 1.94 times as fast. The same three layers at the same rate without a teacher (finetune, one seed): 90.62%; what the
teacher adds there is not accuracy but a loss of 0.40 where they have 0.50. As a chain (tests/benchmarks/bench_compress.py --only half --student-steps 225
--student-lr 3e-4 --weight 0.7), layers chosen by influence, three seeds: cut 76.50%, KL from the teacher 0.477; trained alone 88.25 +- 0.45%, 0.308; taught
88.92 +- 0.31%, 0.161. With 500 texts and six epochs: teacher 88.88%; alone 87.08 +- 0.51% (three seeds); taught on the same texts 86.38% (one seed); taught
by that teacher on 1,800 texts, their labels not looked at (--config.teacher.weight=1), 88.17 +- 0.56% (three seeds).
The student of the decoder: not yet run.
"""

from ml_collections import ConfigDict

from bigflax import recipes


def get_config(variant: str = "encoder"):
    adamw = dict(name="adamw", kind="linear", warmup_steps=20, final=0.0)
    if variant == "encoder":
        config = recipes.load("finetune:full")
        model = dict(name="bert", hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=12)
        said = dict(
            work="runs/distill-encoder", teacher=dict(source="runs/finetune-full", every=2, weight=0.7, temperature=2.0, states=0.1),
            optimizer=dict(**adamw, lr=3e-4, weight_decay=0.01, b2=0.999),
        )  # fmt: skip
    elif variant == "decoder":
        config = recipes.load("preference:base")
        model = {**config.model.to_dict(), "num_hidden_layers": 2}
        said = dict(
            work="runs/distill-decoder", teacher=dict(source="runs/preference-base", every=2, weight=0.7, temperature=2.0),
            optimizer=dict(**adamw, lr=1e-3, weight_decay=0.1), tokenizer=dict(),
        )  # fmt: skip
    else:
        raise ValueError(f"there is no student {variant!r}; there are 'encoder' and 'decoder'")
    return ConfigDict({**config.to_dict(), **said, "model": model})
