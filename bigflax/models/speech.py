"""Speech: spectrograms into states. Whisper's two convolutions; Radford et al. 2022 (arXiv 2212.04356), section 2.2.

Input: `input_features` [B, M, T], as ops.log_mel makes them.
Left out on purpose: masking parts of a spectrogram while training (SpecAugment), which is a transform of data.
Shapes: B batch, T frames, M mels, W taps of a convolution, C channels, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigflax import ops
from bigflax.models.transformer import Inputs
from bigflax.nn import ACTIVATIONS, NORMAL, Initializer, dropout, weight, zeros
from bigflax.sharding import constrain


class Conv(nn.Module):
    """A convolution over time of `taps` frames around each, every `stride`-th kept: [B, T, C] -> [B, ceil(T / stride), D].

    As a product with the frames side by side, so that it multiplies by whatever stands in its weight's place.
    """

    features: int
    taps: int = 3
    stride: int = 1
    inputs: str = "_"
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        side, T = self.taps // 2, x_BTC.shape[1]
        padded = jnp.pad(x_BTC, ((0, 0), (side, self.taps - 1 - side), (0, 0)))
        x_BTWC = jnp.stack([padded[:, tap : tap + T : self.stride] for tap in range(self.taps)], axis=2)
        w_WCD = weight(self, "w", (self.taps, x_BTC.shape[-1], self.features), f"taps {self.inputs} -> embed", self.init)
        y_BTD = ops.einsum("btwc,wcd->btd", x_BTWC, w_WCD)
        return y_BTD + weight(self, "b", (self.features,), "norm", zeros).astype(y_BTD.dtype)


class MelEmbed(nn.Module):
    """Two convolutions with GELU, the second of stride 2, and the sines and cosines of fixed positions, which are stored but not learned."""

    mels: int
    features: int
    positions: int
    dropout: float = 0.0
    dtype: str = "float32"
    init: Initializer = NORMAL

    takes = "input_features"

    def example(self) -> Inputs:
        return {"input_features": jax.ShapeDtypeStruct((1, self.mels, 2 * min(self.positions, 8)), jnp.float32)}

    @nn.compact
    def __call__(self, input_features, position_ids=None, token_type_ids=None, table=None):
        """(x_BTD, `table` as it is)."""
        if input_features.ndim != 3 or input_features.shape[1] != self.mels or not 0 < input_features.shape[2] <= 2 * self.positions:
            raise ValueError(
                f"input_features are [B, {self.mels} mels, up to {2 * self.positions} frames], not {list(input_features.shape)}; see ops.log_mel"
            )
        x_BTD = input_features.swapaxes(1, 2).astype(self.dtype)
        for i, stride in ((1, 1), (2, 2)):
            x_BTD = ACTIVATIONS["gelu"](Conv(self.features, stride=stride, init=self.init, name=f"conv{i}")(x_BTD))
        at_TD = jax.lax.stop_gradient(weight(self, "positions", (self.positions, self.features), "positions embed", sinusoids))
        x_BTD += at_TD[: x_BTD.shape[1]].astype(x_BTD.dtype)
        return constrain(dropout(self, x_BTD, self.dropout), "batch", "seq", None), table


def sinusoids(rng: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """[T, D]: sines of t / 10000^(i / (D/2 - 1)), i < D/2, then the cosines. An initializer; the key is not looked at."""
    half = shape[1] // 2
    angles = np.arange(shape[0])[:, None] / 10000 ** (np.arange(half) / (half - 1))
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)
