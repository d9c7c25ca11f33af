"""Structured pruning: fewer layers, MLP channels and heads; what is left is a smaller dense model of the same family.

    scores = taylor(model, params, "mlp", loss_fn, batches)                   {"blocks/mlp/down": [L, F]}, how much each channel matters
    small, changes = narrow(model, params, "mlp", [(".*", 0.5)], scores)      half of the channels of each layer, {"intermediate_size": 512}
    apart = distances(model, params, batches)                                 {"blocks": [L + 1, L + 1]}, between the states that layers leave
    kept = best_layers(model, influence(apart), [("blocks", 8)])              [("blocks", [0, 1, 4, ...])]
    small, changes = layers(model, params, kept)
    model = models.resized(model, small, changes)                             the model of the changed config, which has those weights

Everything goes by the names of axes, so that it holds for encoders, decoders, pairs and towers alike. The matrix that reads an axis ("mlp -> embed",
"heads head_dim -> embed") names the place, and every leaf beside it that has the axis is cut with it. Rules are ordered (regex, value) over these names, or
for layers over the names of stacks ("blocks", "encoder/blocks"); a value is how many are kept, or what share of them, None leaves all.

    magnitude    |w_read| |w_write| of a channel, of a head those of its values                        Han et al. 2015 (1506.02626)
    activation   |h| |w_read|, h what a channel holds over all tokens: the norm of what it adds        after Wanda, Sun et al. 2024 (2306.11695)
    taylor       |dL/dz| summed over batches, z = 1 a factor of the channel, head or layer             Michel et al. 2019 (1905.10650), eq. 2;
                 and that is |g . w_read|, for z could stand before w_read                               Molchanov et al. 2019 (1906.10771)
    influence    1 - cos(h_l, h_l+1), the mean over real tokens: of layers                             ShortGPT, Men et al. 2024 (2403.03853), eq. 1
    best_run     the n layers in a row that turn the states least, arccos(h_l . h_l+n) / pi,           Gromov et al. 2024 (2403.17887), section 3
                 over all real tokens too, where the paper looks at the last

Left out on purpose: the width of embeddings, which no score of a trained model makes cheap (distill into a narrower student instead); different sizes in
different layers, which no config can say; recovery, which is any training: with the large model as a teacher, or of LoRA.
Legend: B batch, T time, D width, F mlp width, N heads, K kv heads, G = N / K, H head width, L layers.
"""

from bigflax.compress.structure.depth import Unit, best_layers, best_run, layers, stacks
from bigflax.compress.structure.fields import Scores
from bigflax.compress.structure.scores import activation, distances, influence, magnitude, taylor
from bigflax.compress.structure.width import Place, narrow, places

__all__ = [
    "Place", "Scores", "Unit", "activation", "best_layers", "best_run", "distances", "influence", "layers", "magnitude", "narrow", "places", "stacks", "taylor",
]  # fmt: skip
