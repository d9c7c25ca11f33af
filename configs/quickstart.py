"""A small decoder on the Python standard library's own source text, which is on every machine: nothing to download, no licence to carry.

    bigflax train                              two minutes on two CPU cores
    bigflax train --config=quickstart:long     half an hour: a model three times as large, below `xz -9` on the same held-out files

A byte-level BPE is trained on the training files; the figure to watch is `bits_per_byte` on files held out by a hash of their names.

Measured on two x86 cores, JAX 0.10.2; held-out bits per byte, where gzip -9 needs 1.991, xz -9 1.652 and a 3-gram byte model 2.524:

    short    1.940    116 s from command to end with an empty compilation cache, half a second a step
    long     1.257    41 min, the machine doing other work; 1.471 half-way
"""

from ml_collections import ConfigDict


def get_config(variant: str = "short"):
    long = {"short": False, "long": True}[variant]
    return ConfigDict(
        dict(
            work="runs/quickstart-long" if long else "runs/quickstart",
            model=dict(
                name="qwen3",
                hidden_size=192 if long else 128,
                intermediate_size=512 if long else 344,
                num_hidden_layers=6 if long else 4,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=48 if long else 32,
                tie_word_embeddings=True,
                max_position_embeddings=256 if long else 128,
                unroll=True,  # a tenth faster on a CPU, which copies each layer's slice of a scanned weight
            ),
            tokenizer=dict(kind="bpe", vocab_size=2048, max_bytes=4_000_000),
            data=dict(source=dict(kind="python"), length=256 if long else 128, batch_size=16, validation_fraction=0.03),
            task=dict(name="causal_lm"),
            optimizer=dict(name="muon", lr=0.02, kind="linear", warmup_steps=10, final=0.0, weight_decay=0.01),
            fit=dict(steps=600 if long else 110, log_every=10, eval_every=300 if long else 110, save_minutes=0.5),
            watch=dict(metric="bits_per_byte"),
            sample=dict(prompt="def read_lines(path):\n", max_new_tokens=120, temperature=0.5),
            yardsticks=True,
        )
    )  # fmt: skip
