"""Log-mel spectrograms, as Whisper hears. Radford et al. 2022 (arXiv 2212.04356), section 2.2; filters after Slaney 1998 (Auditory Toolbox).

    frames of 400 samples (25 ms) every 160, Hann window  ->  |Fourier transform|^2  ->  mel filters  ->  log10
    ->  at least the row's maximum - 8  ->  (x + 4) / 4

A pure function of arrays that runs under jit on any device, so that spectrograms may be made inside a training step.
Left out on purpose: resampling, and sound of several channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

RATE, WINDOW, HOP, SECONDS = 16_000, 400, 160, 30  # samples a second, samples, samples, of a row


def log_mel(waveform: jax.Array, mels: int = 80, *, seconds: float = SECONDS) -> jax.Array:
    """[B, samples] at 16 kHz, in -1..1 -> [B, mels, 100 * seconds] float32; rows are cut to `seconds`, or followed by silence up to them."""
    if waveform.ndim != 2:
        raise ValueError(f"log_mel takes rows of samples, [B, samples] at 16 kHz of one channel, not {list(waveform.shape)}")
    samples = round(seconds * RATE)
    if samples < HOP or samples % HOP:
        raise ValueError(f"{seconds} seconds are not a whole number of frames of 10 ms")
    sound = waveform[:, :samples].astype(jnp.float32)
    sound = jnp.pad(sound, ((0, 0), (0, samples - sound.shape[1])))
    # Frames are centred: the first begins half a window early, in what the sound mirrored at its ends gives.
    sound = jnp.pad(sound, ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    starts = HOP * np.arange(samples // HOP)
    frames_BTW = sound[:, starts[:, None] + np.arange(WINDOW)]
    hann_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    spectrum_BTF = jnp.fft.rfft(frames_BTW * jnp.asarray(hann_W, jnp.float32))
    power_BTF = jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag)
    mel_BMT = jnp.einsum("fm,btf->bmt", mel_filters(mels), power_BTF, precision="highest")
    log_BMT = jnp.log10(jnp.maximum(mel_BMT, 1e-10))
    return (jnp.maximum(log_BMT, log_BMT.max((1, 2), keepdims=True) - 8) + 4) / 4


@functools.cache
def mel_filters(mels: int) -> np.ndarray:
    """[201 frequencies from 0 to 8 kHz, mels] float32: triangles between neighbours on the mel scale, each of area 1 in Hz."""
    edges = _hertz(np.linspace(0, _mel(RATE / 2), mels + 2))
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


# Slaney's scale: 3 mels for 200 Hz up to 1 kHz, from there on 27 for a factor of 6.4.
def _mel(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * float(np.log(hertz / 1000) / np.log(6.4))


def _hertz(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < 15, 200 * mels / 3, 1000 * 6.4 ** ((mels - 15) / 27))
