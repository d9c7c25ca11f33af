"""A smaller student of a trained model: half of its layers, learned from labels and from what the model finds likely (DistilBERT's way, 1910.01108).

    bigflax train --config=finetune                                        the teacher: MiniLM-L6 that tells classes apart, configs/finetune.py
    bigflax train --config=distill --config.data.source.path=train.jsonl   its student of three layers, on the same data

    bigflax train --config=distill:texts                                   of further texts, texts.jsonl, without labels: those of test.jsonl judge

    bigflax train --config=preference:base                                 the teacher: a small decoder, configs/preference.py
    bigflax train --config=distill:decoder                                 its student of two layers, on the same texts

A teacher of your own: `--config.teacher.source=` the work folder of a run, a folder of weights or a hub id, and in `model` its sizes with fewer layers
(`teacher.every=2` takes every second to begin with; None begins with nothing, and any sizes are right). The work folder holds the student alone.

Measured: MiniLM-L6, accuracy of 800 texts in 11 topics, students of every second of its layers, 1.94 times as fast, three seeds where a deviation is given;
alone is finetune, at the same rate, of the layers that a chain's dict(do="layers", keep=0.5, by="every") leaves of the teacher:

    labels   teacher   student alone      steps   taught on                  steps
       200    85.12%   82.37 +- 0.45%       75    5,000 texts, no labels       312    86.00 +- 0.57%     101.0% of the teacher (the recipe distill:texts)
                       83.58 +- 0.71%      312
       500    88.88%   87.08 +- 0.51%       94    1,800 texts, no labels       225    88.17 +- 0.56%      99.2%
                                                  the 500, with labels                86.38%
     1,800    89.88%   90.62%              225    the 1,800, with labels       225    90.92 +- 0.56%     101.2%, loss 0.40 where alone has 0.50

So where labels are few a teacher that reads further texts is worth points of accuracy, and on the same texts, with their labels, next to none. As a chain
(tests/benchmarks/bench_compress.py --only half --student-steps 225 --student-lr 3e-4 --weight 0.7), 1,800 labels, layers chosen by influence, three seeds: cut
76.50%, KL from the teacher 0.477; trained alone 88.25 +- 0.45%, 0.308; taught 88.92 +- 0.31%, 0.161.
The student of the decoder (perplexity 54.1 of what is held out), one seed, 1,000 steps: 56.2, the same layers without a teacher 57.1.
"""

from ml_collections import ConfigDict

from bigflax import recipes


def get_config(variant: str = "encoder"):
    adamw = dict(name="adamw", kind="linear", warmup_steps=20, final=0.0)
    if variant in ("encoder", "texts"):
        config = recipes.load("finetune:full")
        model = dict(name="bert", hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=12)
        teacher = dict(source="runs/finetune-full", every=2, weight=0.7, temperature=2.0, states=0.1)
        said = dict(work="runs/distill-encoder", teacher=teacher, optimizer=dict(**adamw, lr=3e-4, weight_decay=0.01, b2=0.999))
        if variant == "texts":
            files = {part: dict(kind="jsonl", path=f"{name}.jsonl") for part, name in (("source", "texts"), ("validation_source", "test"))}
            data, fit = {**config.data.to_dict(), **files, "unlabelled": True}, {**config.fit.to_dict(), "epochs": 2}
            said = dict(said, work="runs/distill-texts", teacher=dict(teacher, weight=1.0), data=data, fit=fit)
    elif variant == "decoder":
        config = recipes.load("preference:base")
        model = {**config.model.to_dict(), "num_hidden_layers": 2}
        said = dict(
            work="runs/distill-decoder", teacher=dict(source="runs/preference-base", every=2, weight=0.7, temperature=2.0),
            optimizer=dict(**adamw, lr=1e-3, weight_decay=0.1), tokenizer=dict(),
        )  # fmt: skip
    else:
        raise ValueError(f"there is no student {variant!r}; there are 'encoder', 'texts' and 'decoder'")
    return ConfigDict({**config.to_dict(), **said, "model": model})
