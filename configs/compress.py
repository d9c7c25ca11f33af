"""A trained model made small: chains of steps, and a decoder to take through them.

    bigflax train    --config=preference:base                             a small decoder, and what it takes: configs/preference.py
    bigflax compress --config=compress --recipe=int4-gptq                 any chain below
    bigflax compress --work=runs/finetune-full --recipe=int8 --max-loss=1%          or of a run of your own

In the work folder stay compress/1-... with the weights of each step, which `bigflax.load` reads, report.json, and two pictures.

Measured (tests/benchmarks/bench_compress.py): the decoder, 1.4M numbers, one seed, matrices of the layers, 16 batches looked at; perplexity of what is held
out, by how much worse, KL from float32, and of what plain rounding (scales to the largest number, no clipping) or magnitude loses in perplexity and KL:

    float32                54.07
    int8                             0.01%   0.0001
    int8, w8a8                       0.04%   0.0004
    int8, smoothquant                0.02%   0.0004
    int4:128, plain        55.63     2.87%   0.0268
    int4:128, clipped      55.19     2.06%   0.0214     72%    80%
    int4:128, awq          54.90     1.53%   0.0148     53%    55%      before AWQ chose among its best scales with the clipping that follows
    int4:128, gptq         54.54     0.86%   0.0084     30%    31%
    int4:128, hadamard     54.31     0.44%   0.0065     15%    24%      a random rotation, then GPTQ
    50%, magnitude         60.98    12.77%   0.1223
    50%, wanda             59.09     9.28%   0.0937     73%    77%
    50%, sparsegpt         55.91     3.40%   0.0337     27%    28%

(int8 of a first decoder, whose mlp was 344 wide, at 53.67.) 2:4, recovery, low rank and students of half the layers: not yet run.

MiniLM-L6 fine-tuned on 500 texts (finetune, one seed), matrices of the layers alone, tables left in float32; accuracy of 800 others, KL from float32, on a busy
machine of two CPU cores how many times as fast as float32; AWQ as it was before it clipped by products:

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
    "int4-rotated": [dict(do="quantize", to=INT4, tables="int8", method="hadamard")],
    "int4-awq": [dict(do="quantize", to=INT4, tables="int8", method="awq")],
    "mixed": [dict(do="quantize", to=["int3:32", "int4:32", "int8"], within="5 bits", tables="int8", method="gptq")],
    "int4-qat": [dict(do="qat", to=INT4, tables="int8", steps=300)],
    "nf4": [dict(do="quantize", to="nf4:32", tables="int8", method="gptq")],
    "half": [dict(do="prune", to="50%", method="alps"), dict(do="recover", steps=200), dict(do="pack")],
    "2:4-int8": [
        dict(do="prune", to="2:4", method="alps"),
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
