"""BERT from nothing by masked language modelling on your own text: the encoder that classification and search then start from.

    bigflax train --config=bert_mlm --config.data.source.path="corpus/**/*.txt"
    bigflax train --config=bert_mlm --config.tokenizer.kind=file --config.tokenizer.path=tokenizer.json      any tokenizer with a mask token
    bigflax train --config=bert_mlm:base                                            BERT-base in bfloat16, on a slice v5e:2x2
    bigflax plan  --config=bert_mlm:base --topology=v5e:2x2

A byte-level BPE is trained on the corpus. The default size (MiniLM's, 6 layers of 384) suits one GPU. 15% of the tokens are asked for, as
in Devlin et al. 2019; no next-sentence task.

Measured: not yet run at full length. Planned, "base" on v5e:2x2 (the TPU compiler's account of a chip; a step takes at least so long):

    11.67 of 15.75 GiB of a chip (weights 0.41, optimizer 0.81, temporaries 10.41), 133 ms a step, bound by compute, MFU at most 88%,
    983K tokens/s; 50,000 steps take 1.9 hours, 9 dollars
"""

from ml_collections import ConfigDict


def get_config(variant: str = "minilm"):
    base = {"minilm": False, "base": True}[variant]
    model = dict(size="base", vocab_size=30_080, dtype="bfloat16", remat="dots") if base else dict(size="minilm-l6")
    data = dict(length=512, batch_size=256) if base else dict(length=128, batch_size=256)
    return ConfigDict(
        dict(
            work=f"runs/bert_mlm-{variant}",
            model=dict(name="bert", **model),
            tokenizer=dict(kind="bpe", vocab_size=30_000, mask="[MASK]"),
            data=dict(source=dict(kind="text", path="corpus/**/*.txt"), objective="masked", **data, validation_fraction=0.01),
            task=dict(name="masked_lm"),
            optimizer=dict(name="adamw", lr=5e-4, kind="linear", warmup_steps=1000, weight_decay=0.01, b2=0.98, final=0.0),
            fit=dict(steps=50_000, log_every=50, eval_every=2000),
        )
    )  # fmt: skip
