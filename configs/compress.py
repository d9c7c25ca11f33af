"""A trained model made small: chains of steps, and a decoder to take through them.

    bigflax train    --config=preference:base                             a small decoder, and what it takes: configs/preference.py
    bigflax compress --config=compress --recipe=int4-gptq                 any chain below
    bigflax compress --work=runs/finetune-full --recipe=int8 --max-loss=1%          or of a run of your own

In the work folder stay compress/1-... with the weights of each step, which `bigflax.load` reads, report.json, and two pictures.

Measured (tests/benchmarks/bench_compress.py): the decoder, 1.4M numbers, matrices of the layers, 16 batches looked at; perplexity of what is held out, by how
much worse, KL from float32, and of what plain rounding (scales to the largest number, no clipping) or magnitude loses in perplexity and KL. "Corrected": each
matrix first makes good what was lost before it (correct=True), as the chains below do.

    float32                     54.09
    int4:128, plain             55.22     2.09%   0.0222
    int4:128, clipped           55.26     2.15%   0.0222    103%   100%
    int4:128, awq               54.93     1.54%   0.0149     74%    67%
    int4:128, gptq              54.63     0.99%   0.0082     48%    37%
    int4:128, hadamard          54.41     0.58%   0.0064     28%    29%      a random rotation, then GPTQ
    int4:128, awq, corrected    54.56     0.86%   0.0091     41%    41%
    int4:128, gptq, "           54.41     0.59%   0.0062     28%    28%
    int4:128, hadamard, "       54.32     0.42%   0.0046     20%    21%
    int4:128, qat               54.01    -0.16%   0.0099            45%      200 steps from GPTQ's codes, three seeds (+- 0.06): it learned on
    50%, magnitude              61.07    12.88%   0.1209                     another decoder of the recipe, 54.10 in float32
    50%, wanda                  59.25     9.53%   0.0950     74%    79%      of magnitude's, as all below
    50%, sparsegpt              55.92     3.37%   0.0353     26%    29%
    50%, alps                   55.04     1.75%   0.0166     14%    14%
    50%, wanda, corrected       56.51     4.46%   0.0457     35%    38%
    50%, sparsegpt, "           55.24     2.12%   0.0214     16%    18%
    50%, alps, "                54.89     1.46%   0.0126     11%    10%
    50%, ", recovered           53.84    -0.48%   0.0102     -4%     8%      200 steps, three seeds (+- 0.08)
    2:4, magnitude              71.22    31.65%   0.2763
    2:4, wanda                  68.32    26.30%   0.2450     83%    89%
    2:4, sparsegpt              60.61    12.04%   0.1230     38%    45%
    2:4, alps                   58.39     7.93%   0.0791     25%    29%
    2:4, wanda, corrected       61.33    13.37%   0.1261     42%    46%
    2:4, sparsegpt, "           58.68     8.48%   0.0806     27%    29%
    2:4, alps, "                57.22     5.78%   0.0557     18%    20%
    2:4, ", recovered           54.39     0.54%   0.0274      2%    10%      500 steps, three seeds (+- 0.04)
    80%, svd                    90.46    67.22%   0.5472                     low rank: a fifth of the numbers less
    80%, asvd                   87.72    62.16%   0.5262     93%    96%
    80%, whitened               60.84    12.47%   0.1217     19%    22%
    80%, whitened, corrected    59.40     9.80%   0.0949     15%    17%
    80%, ", recovered           56.04     3.59%   0.0514      5%     9%      200 steps, one seed

Other decoders of the same recipe, on other machines (54.07 to 54.10, one seed): int8 0.01% worse, W8A8 0.04%, SmoothQuant 0.02% (an mlp of 344, at 53.67);
plain 2.15 to 2.87%, awq 1.47 to 1.53%, gptq 0.75 to 0.86%, hadamard 0.44 to 0.71%; 50% of zeros by magnitude 12.77 to 12.88%, by ALPS 1.81%, 0.44%
after 200 steps at 3e-4. Students of half the layers: configs/distill.py.

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
