"""ViT from nothing: ViT-B/16 and ViT-L/16 on a folder of images with one subfolder a class, as ImageNet-1k comes; and one for a first look.

    bigflax plan  --config=vit:base --topology=v5e:2x4                   before anything is rented
    bigflax train --config=vit:base --config.data.source.path=imagenet/train
    bigflax train --config=vit:large --hosts=0 --config.data.source.path=imagenet/train          on v5e:4x4
    bigflax train --config=vit:tiny --config.data.source.path=photos     a few thousand images, any number of classes, one CPU or GPU

bfloat16 over float32 weights and moments, AdamW, cosine, 224 x 224 pixels; optimizer, length and label smoothing after He et al. 2022 (arXiv
2111.06377, table 11, training from nothing) at a quarter of its batch, without its mixup, cutmix, RandAugment, drop path and moving average.
A hash of their names holds 1% of the images out. A JPEG of 500 x 375 takes 4 ms of a core, half of it to decode, half for the view; so one chip
that takes 1,000 images a second keeps four cores at work, and `data.workers` of a host are that many.

Measured: not yet run at full length. Planned, base on v5e:2x4, large on v5e:4x4 (the TPU compiler's account of a chip; a step takes at least so
long):

    base     7.89 of 15.75 GiB of a chip (weights 0.32, optimizer 0.64, temporaries 6.83)     69 ms a step    14.8K images/s    7.2 h,  69 dollars
    large    7.65 of 15.75 GiB of a chip (weights 0.07, optimizer 0.14, temporaries 7.30)    121 ms a step     8.5K images/s    8.4 h, 162 dollars

Both are bound by compute, and nearly nothing is computed twice.
"""

from ml_collections import ConfigDict

IMAGES = 1_281_167  # of ImageNet-1k
#           size             epochs  mesh
VARIANTS = {
    "base": ("base-patch16", 300, dict(data=-1)),
    "large": ("large-patch16", 200, dict(data=1, fsdp=-1)),
}


def get_config(variant: str = "base"):
    if variant == "tiny":
        return tiny()
    size, epochs, mesh = VARIANTS[variant]
    batch = 1024
    return ConfigDict(
        dict(
            work=f"runs/vit-{variant}",
            model=dict(name="vit", size=size, num_labels=1000, dtype="bfloat16", remat="dots"),
            data=dict(source=dict(kind="images", path="imagenet/train"), size=224, batch_size=batch, validation_fraction=0.01, workers=64),
            task=dict(name="classification", smoothing=0.1),
            optimizer=dict(name="adamw", lr=4e-4, warmup_steps=20 * IMAGES // batch, weight_decay=0.3, b2=0.95, final=0.0),
            mesh=mesh,
            fit=dict(steps=epochs * IMAGES // batch, log_every=50, eval_every=5000, save_minutes=20.0),
            watch=dict(metric="accuracy", mode="max"),
        )
    )  # fmt: skip


def tiny():
    """Images of 32 x 32, two layers."""
    return ConfigDict(
        dict(
            work="runs/vit-tiny",
            model=dict(name="vit", size="tiny"),
            data=dict(source=dict(kind="images", path="photos"), size=32, batch_size=64, min_area=0.5, validation_fraction=0.1),
            task=dict(name="classification"),
            optimizer=dict(name="adamw", lr=1e-3, warmup_steps=50, weight_decay=0.05),
            fit=dict(steps=2000, log_every=20, eval_every=200),
            watch=dict(metric="accuracy", mode="max"),
        )
    )  # fmt: skip
