"""draft

Measured
"""

from ml_collections import ConfigDict

VARIANTS = {"digits": ("mnist", 8_000, 0.1307, 0.3081, 40), "fashion": ("fashion", 60_000, 0.2860, 0.3530, 15)}


def get_config(variant: str = "digits"):
    name, images, mean, std, epochs = VARIANTS[variant]
    batch = 128
    return ConfigDict(
        dict(
            work=f"runs/{name}",
            model=dict(name="cnn", hidden_sizes=[16, 32, 32, 48, 48], pools=[2, 1, 2, 1, 2], dense_size=64, num_labels=10),
            data=dict(
                source=dict(kind="numpy", path=f"{name}-train.npz"), validation_source=dict(kind="numpy", path=f"{name}-test.npz"),
                size=28, mean=(mean,), std=(std,), min_area=1.0, aspect=1.0, flip=0.0, central=1.0,
                augment="affine:12:0.12:10:2.5,erase:0.25:0.02:0.15:2:black", batch_size=batch,
            ),
            task=dict(name="classification", smoothing=0.05),
            optimizer=dict(name="adamw", lr=4e-3, warmup_steps=100, weight_decay=0.05, b2=0.99, final=0.0),
            fit=dict(steps=epochs * images // batch, log_every=50, eval_every=250, save_minutes=60.0),
            watch=dict(metric="accuracy", mode="max"),
        )
    )  # fmt: skip
