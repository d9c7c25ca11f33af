"""Llama 3 from nothing: the shapes of Llama 3.2 1B, Llama 3 8B and 70B on text of your own, tokenized by any tokenizer.json.

    bigflax plan  --config=llama3:8b --topology=v5e:4x4                  before anything is rented
    bigflax train --config=llama3:8b --hosts=0 --config.data.source.path="gs://bucket/fineweb-edu/*.parquet" \\
        --config.tokenizer.path=tokenizer.json --config.work=gs://bucket/runs/llama3-8b

bfloat16 over float32 weights and moments, AdamW, cosine, FSDP over all chips; sequences of 4,096 tokens, packed. A larger slice takes a larger
`data.batch_size`; with the same batch `mesh` and `step.accumulate` change what a chip holds, not what is learned.

Measured: not yet run. Planned (the TPU compiler's account of a chip; a step takes at least so long):

    variant  slice        memory of a chip    weights  optimizer  temporaries  a step    MFU at most  tokens/s  the whole run
    1b       v5e:4x4      10.89 of 15.75 GiB     0.29       0.58         9.99  1,875 ms          73%      280K   26 h,     500 dollars
    8b       v5e:4x4      11.89 of 15.75 GiB     1.87       3.74         6.24  1,333 ms          76%     49.2K  185 h,   3,550 dollars
    70b      v5p:4x4x4    31.98 of 94.75 GiB     4.11       8.22        19.57  4,980 ms          78%     52.6K  692 h, 186,000 dollars

A step is bound by compute in all three; MFU stays below 1 because full remat computes each layer's forward pass twice.
"""

from ml_collections import ConfigDict

#           size            batch  steps    peak learning rate
VARIANTS = {
    "1b": ("llama3.2-1b", 128, 50_000, 4e-4),
    "8b": ("llama3-8b", 16, 500_000, 3e-4),
    "70b": ("llama3-70b", 64, 500_000, 1.5e-4),
}


def get_config(variant: str = "8b"):
    size, batch, steps, lr = VARIANTS[variant]
    return ConfigDict(
        dict(
            work=f"runs/llama3-{variant}",
            model=dict(name="llama", size=size, vocab_size=128_256, dtype="bfloat16", remat="full"),
            tokenizer=dict(kind="file", path="tokenizer.json"),
            data=dict(source=dict(kind="parquet", path="data/fineweb-edu/*.parquet"), length=4096, batch_size=batch, validation_fraction=0.0005, workers=4),
            task=dict(name="causal_lm", z_loss=1e-4),
            optimizer=dict(name="adamw", lr=lr, warmup_steps=2000, weight_decay=0.1, b2=0.95),
            mesh=dict(data=1, fsdp=-1),
            fit=dict(steps=steps, log_every=20, eval_every=2000, save_minutes=20.0),
        )
    )  # fmt: skip
