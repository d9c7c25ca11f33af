"""A trained model made small: chains of steps, and a decoder to take through them.

    bigflax train    --config=preference:base                             a small decoder, and what it takes: configs/preference.py
    bigflax compress --config=compress --recipe=int4-gptq                 any chain below
    bigflax compress --work=runs/finetune-full --recipe=int8 --max-loss=1%          or of a run of your own

In the work folder stay compress/1-... with the weights of each step, which `bigflax.load` reads, report.json, and two pictures.

Measured (tests/benchmarks/bench_compress.py): the decoder, 1.4M numbers, one seed, matrices of the layers, 16 batches looked at; perplexity of what is held
out, by how much worse, KL from float32, and of what plain rounding (scales to the largest number, no clipping) or magnitude loses in perplexity and KL:

    float32                54.10
    int4:128, plain        55.26     2.15%   0.0225
    int4:128, clipped      55.21     2.05%   0.0210     96%    94%
    int4:128, awq          54.89     1.47%   0.0150     68%    67%
    int4:128, gptq         54.50     0.75%   0.0082     35%    36%
    int4:128, hadamard     54.48     0.71%   0.0066     33%    29%      a random rotation, then GPTQ
    int4:128, qat          53.92    -0.33%   0.0097               43%   200 steps from GPTQ's codes: better than it was, for it learned on
    50%, magnitude         61.07    12.88%   0.1209
    50%, wanda             59.25     9.53%   0.0950     74%    79%
    50%, sparsegpt         55.92     3.37%   0.0353     26%    29%
    50%, alps              55.08     1.81%   0.0166     14%    14%
    50%, alps, recovered   54.33     0.44%   0.0112      3%     9%      200 steps by the teacher
    2:4, magnitude         71.16    31.55%   0.2773
    2:4, wanda             68.12    25.92%   0.2427     82%    88%
    2:4, sparsegpt         60.56    11.96%   0.1220     38%    44%
    2:4, alps              58.38     7.93%   0.0785     25%    28%
    2:4, alps, recovered   56.42     4.29%   0.0484     14%    17%      200 steps
    ", another decoder     55.00     1.72%   0.0306    5.7%    11%      1,000 steps; magnitude 30.11%, alps 8.04% there
    80%, svd               90.95    68.13%   0.5513                     low rank: a fifth of the numbers less
    80%, asvd              87.30    61.38%   0.5207     90%    94%
    80%, whitened          60.80    12.40%   0.1212     18%    22%
    80%, ", recovered      55.82     3.19%   0.0450      5%     8%      200 steps

Another decoder of the same recipe, at 54.07 on another machine: int8 0.01% worse, W8A8 0.04%, SmoothQuant 0.02% (an mlp of 344, at 53.67); plain 2.87%, awq
1.53%, gptq 0.86%, hadamard 0.44%; magnitude 12.77%, wanda 9.28%, sparsegpt 3.40%. Students of half the
layers: configs/distill.py.

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
    "int4-gptq": [dict(do="quantize", to=INT4, tables="int8", method="gptq", correct=True)],
    "int4-rotated": [dict(do="quantize", to=INT4, tables="int8", method="hadamard", correct=True)],
    "int4-awq": [dict(do="quantize", to=INT4, tables="int8", method="awq", correct=True)],
    "mixed": [dict(do="quantize", to=["int3:32", "int4:32", "int8"], within="5 bits", tables="int8", method="gptq", correct=True)],
    "int4-qat": [dict(do="qat", to=INT4, tables="int8", steps=300)],
    "nf4": [dict(do="quantize", to="nf4:32", tables="int8", method="gptq", correct=True)],
    "half": [dict(do="prune", to="50%", method="alps", correct=True), dict(do="recover", steps=200), dict(do="pack")],
    "2:4-int8": [
        dict(do="prune", to="2:4", method="alps", correct=True),
        dict(do="recover", steps=200),
        dict(do="pack"),
        dict(do="quantize", to="int8", tables="int8"),
    ],
    "half-depth": [dict(do="layers", keep=0.5), dict(do="recover", steps=500)],
    "half-depth-int8": [dict(do="layers", keep=0.5), dict(do="recover", steps=500), dict(do="quantize", to="int8", tables="int8")],
    "small-tables": [dict(do="factorize", tables=0.5, method="frequency"), dict(do="recover", steps=200)],
    "low-rank-budget": [
        dict(do="factorize", to=0.8, spread=True, method="whitened", correct=True),
        dict(do="recover", steps=200),
        dict(do="quantize", to="int8", tables="int8"),
    ],
    "low-rank-int8": [
        dict(do="factorize", to=0.8, method="whitened", correct=True),
        dict(do="recover", steps=200),
        dict(do="quantize", to="int8", tables="int8"),
    ],
}


def get_config(chain: str = "int4-gptq"):
    config = recipes.load("preference:base")
    config.compress = dict(chain=CHAINS[chain])
    return config
