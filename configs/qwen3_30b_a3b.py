"""Qwen3-30B-A3B from nothing: a mixture of 128 experts a layer, of which each token passes through 8; 30.5 billion weights, 3.3 in use.

    bigflax plan  --config=qwen3_30b_a3b --topology=v5p:4x4x4            before anything is rented
    bigflax train --config=qwen3_30b_a3b --hosts=0 --config.data.source.path="gs://bucket/fineweb-edu/*.parquet" \\
        --config.tokenizer.path=tokenizer.json --config.work=gs://bucket/runs/qwen3-30b-a3b

The experts lie over `expert`, everything else and the batch over `fsdp` and `expert` together: each token travels to its experts and back.

Measured: not yet run. Planned (the TPU compiler's account of a chip; a step takes at least so long):

    v5p:4x4x4, fsdp=8 x expert=8: 21.00 of 94.75 GiB of a chip (weights 1.78, optimizer 3.56, temporaries 15.60), 629 ms a step, bound by compute,
    MFU at most 66%, 834K tokens/s; 200,000 steps take 35 hours, 9,400 dollars
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            work="runs/qwen3-30b-a3b",
            model=dict(name="qwen3_moe", size="30b-a3b", vocab_size=151_936, dtype="bfloat16", remat="full"),
            tokenizer=dict(kind="file", path="tokenizer.json"),
            data=dict(source=dict(kind="parquet", path="data/fineweb-edu/*.parquet"), length=4096, batch_size=128, validation_fraction=0.0005, workers=4),
            task=dict(name="causal_lm", z_loss=1e-4),
            optimizer=dict(name="adamw", lr=3e-4, warmup_steps=2000, weight_decay=0.1, b2=0.95),
            mesh=dict(data=1, fsdp=-1, expert=8),
            fit=dict(steps=200_000, log_every=20, eval_every=2000, save_minutes=20.0),
        )
    )  # fmt: skip
