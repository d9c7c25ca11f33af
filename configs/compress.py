"""A trained model made small: chains of steps, and a decoder to take through them.

    bigflax train    --config=preference:base                             a small decoder, and what it takes: configs/preference.py
    bigflax compress --config=compress --recipe=int4-gptq                 any chain below
    bigflax compress --work=runs/finetune-full --recipe=int8 --max-loss=1%          or of a run of your own

In the work folder stay compress/1-... with the weights of each step, which `bigflax.load` reads, report.json, and two pictures.

Measured: the decoder, not yet. MiniLM-L6 fine-tuned on 500 texts (finetune, one seed), matrices of the layers alone, tables left in float32; accuracy of 800
others, KL from float32, on a busy machine of two CPU cores how many times as fast as float32:

    float32                88.88%
    int8                   89.00%   0.0001   0.91
    int8, smoothquant      89.00%   0.0001   0.21
    int4:32, rounded       88.12%   0.0058   0.86
    int4:32, awq           87.50%   0.0043   0.85
    int4:32, gptq          88.50%   0.0020   0.85
"""

from bigflax import recipes

INT4 = "int4:32"
CHAINS = {
    "int8": [dict(do="quantize", to="int8", tables="int8")],
    "int8-w8a8": [dict(do="quantize", to="int8", tables="int8", method="smoothquant")],
    "int4": [dict(do="quantize", to=INT4, tables="int8")],
    "int4-gptq": [dict(do="quantize", to=INT4, tables="int8", method="gptq")],
    "int4-awq": [dict(do="quantize", to=INT4, tables="int8", method="awq")],
    "mixed": [dict(do="quantize", to=["int3:32", "int4:32", "int8"], within="5 bits", tables="int8", method="gptq")],
    "int4-qat": [dict(do="qat", to=INT4, tables="int8", steps=300)],
    "nf4": [dict(do="quantize", to="nf4:32", tables="int8", method="gptq")],
    "half": [dict(do="prune", to="50%", method="sparsegpt"), dict(do="recover", steps=200), dict(do="pack")],
    "2:4-int8": [
        dict(do="prune", to="2:4", method="sparsegpt"),
        dict(do="recover", steps=200),
        dict(do="pack"),
        dict(do="quantize", to="int8", tables="int8"),
    ],
    "half-depth": [dict(do="layers", keep=0.5), dict(do="recover", steps=500)],
    "half-depth-int8": [dict(do="layers", keep=0.5), dict(do="recover", steps=500), dict(do="quantize", to="int8", tables="int8")],
    "small-tables": [dict(do="factorize", tables=0.5, method="frequency"), dict(do="recover", steps=200)],
    "low-rank-budget": [
        dict(do="factorize", to=0.8, spread=True, method="whitened"),
        dict(do="recover", steps=200),
        dict(do="quantize", to="int8", tables="int8"),
    ],
    "low-rank-int8": [dict(do="factorize", to=0.8), dict(do="recover", steps=200), dict(do="quantize", to="int8", tables="int8")],
}


def get_config(chain: str = "int4-gptq"):
    config = recipes.load("preference:base")
    config.compress = dict(chain=CHAINS[chain])
    return config
