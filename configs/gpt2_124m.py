"""GPT-2 124M from nothing on 10 billion tokens of FineWeb-Edu: bfloat16 activations over float32 weights, AdamW, cosine.

    huggingface-cli download HuggingFaceFW/fineweb-edu --repo-type dataset --include "sample/10BT/*" --local-dir data/fineweb-edu
    bigflax train --config=gpt2_124m --config.data.source.path="data/fineweb-edu/sample/10BT/*.parquet"

Hardware: eight TPU v5e or eight H100. On a TPU slice of another size only `mesh` and `step.accumulate` change.

Measured: not yet run at full length. Planned, on v5e:2x4 (the TPU compiler's account of a chip; a step takes at least so long):

    7.83 of 15.75 GiB of a chip (weights 0.46, optimizer 0.93, temporaries 6.42), 320 ms a step, bound by compute, MFU at most 83%,
    1.64M tokens/s; 19,073 steps take 1.7 hours, 16 dollars
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            work="runs/gpt2_124m",
            # 50304 is the vocabulary rounded up to a multiple of 128: whole tiles for the largest product, and it divides over `tensor`
            model=dict(name="gpt2", size="124m", vocab_size=50304, embd_pdrop=0.0, resid_pdrop=0.0, dtype="bfloat16", remat="dots"),
            tokenizer=dict(kind="bpe", vocab_size=50257, max_bytes=200_000_000),
            data=dict(source=dict(kind="parquet", path="data/fineweb-edu/*.parquet"), length=1024, batch_size=512, validation_fraction=0.0005, workers=4),
            task=dict(name="causal_lm", z_loss=1e-4),
            optimizer=dict(name="adamw", lr=6e-4, warmup_steps=700, weight_decay=0.1, b2=0.95),
            mesh=dict(data=-1),
            step=dict(accumulate=4),
            fit=dict(steps=19_073, log_every=20, eval_every=500, save_minutes=15.0),
            sample=dict(prompt="The tides are caused by", max_new_tokens=64, temperature=0.8, top_p=0.95),
        )
    )  # fmt: skip
