"""BERT from nothing by masked language modelling on your own text: the encoder that classification and search then start from.

    bigflax train --config=bert_mlm --config.data.source.path="corpus/**/*.txt"
    bigflax train --config=bert_mlm --config.tokenizer.kind=file --config.tokenizer.path=tokenizer.json      any tokenizer with a mask token
    bigflax train --config=bert_mlm --config.model.size=base --config.model.dtype=bfloat16      on an accelerator

A byte-level BPE is trained on the corpus. The default size (MiniLM's, 6 layers of 384) suits one GPU. 15% of the tokens are asked for, as
in Devlin et al. 2019; no next-sentence task.

Measured: not yet run at full length.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            work="runs/bert_mlm",
            model=dict(name="bert", size="minilm-l6"),
            tokenizer=dict(kind="bpe", vocab_size=30_000, mask="[MASK]"),
            data=dict(source=dict(kind="text", path="corpus/**/*.txt"), objective="masked", length=128, batch_size=256, validation_fraction=0.01),
            task=dict(name="masked_lm"),
            optimizer=dict(name="adamw", lr=5e-4, kind="linear", warmup_steps=1000, weight_decay=0.01, b2=0.98, final=0.0),
            fit=dict(steps=50_000, log_every=50, eval_every=2000),
        )
    )  # fmt: skip
