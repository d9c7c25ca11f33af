"""A Llama-shaped decoder of 15M parameters, for one GPU or a Colab TPU: long enough a run to see words become sentences.

    bigflax train --config=llama_tiny --config.data.source.path="stories/*.jsonl"      lines of {"text": ...}: TinyStories, or texts of yours
    bigflax train --config=llama_tiny --fake-devices=8 --config.mesh.fsdp=4 --config.mesh.tensor=2

Hardware: one GPU or TPU chip; about an hour on a T4.

Measured: not yet run at full length.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            work="runs/llama_tiny",
            model=dict(
                name="llama", hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
                max_position_embeddings=512, tie_word_embeddings=True, dtype="bfloat16",
            ),
            tokenizer=dict(kind="bpe", vocab_size=8192, max_bytes=50_000_000),
            data=dict(source=dict(kind="jsonl", path="stories/*.jsonl"), length=512, batch_size=64, validation_fraction=0.01),
            task=dict(name="causal_lm"),
            optimizer=dict(name="adamw", lr=2e-3, kind="wsd", warmup_steps=200, weight_decay=0.1),
            fit=dict(steps=10_000, log_every=20, eval_every=1000),
            sample=dict(prompt="Once upon a time", max_new_tokens=200, temperature=0.8),
        )
    )  # fmt: skip
