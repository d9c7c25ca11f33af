"""Augmentation: small functions (value, rng) -> value of the same shape, dtype and range, chosen by name.

    augment = create("image", [("shift", 2), ("rotate", 10), ("erase", 0.25)])          or as words: "shift:2,rotate:10,erase:0.25"
    image = augment(image, np.random.default_rng([seed, epoch, index]))

A function draws from the generator that it is given and from nothing else; with one that is a function of (seed, epoch, record), whoever
reads a record, on whatever host, after whatever restart, makes the same of it. Each does nothing at strength 0; labels it never sees.

    image   uint8 [H, W, C], C 1 or 3     crop shift rotate scale shear affine elastic jitter erase randaugment
    text    str                           swap delete synonyms
    wave    float32 [samples] in -1..1    shift gain noise
    mel     float32 [M, T]                mask

Sources: AlexNet's and ResNet's crops (Krizhevsky et al. 2012; He et al. 2015, arXiv 1512.03385); elastic distortion, Simard et al. 2003;
RandAugment, Cubuk et al. 2019 (1909.13719), its operations and their ranges AutoAugment's (1805.09501, table 6); random erasing, Zhong et
al. 2017 (1708.04896); swaps, deletions and synonyms, Wei & Zou 2019 (EDA, 1901.11196); SpecAugment, Park et al. 2019 (1904.08779).

Left out on purpose: what needs two records (mixup and cutmix: ops/mixing.py, inside the step), random parts and mirroring (the view of
images.py, one resampling for both), learned policies, EDA's insertions, and SpecAugment's time warping, by its authors' account the least
useful of its parts.

Legend: H height, W width, C channels, M mel bands, T frames.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigflax import trees
from bigflax.data.records import extra

Rng = np.random.Generator
Said = str | Sequence[Any] | None


@dataclasses.dataclass(frozen=True)
class Chain:
    """`chain(value, rng)`: its functions one after the other. `said`: [[name, {option: value}], ...], every default written in."""

    functions: tuple[Callable[..., Any], ...]
    said: list[list[Any]]

    def __call__(self, value: Any, rng: Rng) -> Any:
        for function in self.functions:
            value = function(value, rng)
        return value


def create(kind: str, said: Said = None) -> Chain:
    """The chain that a recipe names for values of a kind: "name:value:option=value,...", or a sequence of such words and of (name, *values).

    ValueError for an unknown kind, name or option, which names the nearest, and for a value out of range; ImportError where a library is absent.
    """
    if kind not in TABLES:
        raise ValueError(f"there is no augmentation of {kind!r}; {trees.did_you_mean(kind, TABLES, 'there is that of')}")
    table, functions, lines = TABLES[kind], [], []
    for name, *values in _parsed(said):
        if name not in table:
            raise ValueError(f"there is no augmentation {name!r} of {kind}; {trees.did_you_mean(str(name), table, 'there are')}")
        options = _options(name, table[name], values)
        functions.append(functools.partial(table[name], **options))
        lines.append([name, options])
    chain = Chain(tuple(functions), lines)
    chain(TRIALS[kind], np.random.default_rng(0))  # what is out of range is said now, not at the first record
    return chain


def _parsed(said: Said) -> list[list[Any]]:
    """Rows of a name and values, a dict among them for what is named."""
    found = []
    for one in [word for word in said.split(",") if word.strip()] if isinstance(said, str) else said or ():
        if isinstance(one, list | tuple) and one:
            found.append([*one])
            continue
        if not isinstance(one, str):
            raise ValueError(f"an augmentation is said as 'name:value' or as (name, *values), not as {one!r}")
        name, *words = one.strip().split(":")
        named = {key: _literal(value) for key, equals, value in (word.partition("=") for word in words) if equals}
        found.append([name, *(_literal(word) for word in words if "=" not in word), *([named] if named else [])])
    return found


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


KINDS: dict[type, Any] = {int: (int, "a whole number"), float: (int | float, "a number"), str: (str, "a word")}


def _options(name: str, function: Callable[..., Any], values: Sequence[Any]) -> dict[str, Any]:
    defaults = {p.name: p.default for p in [*inspect.signature(function).parameters.values()][2:]}
    plain = [value for value in values if not isinstance(value, dict)]
    if len(plain) > len(defaults):
        raise ValueError(f"{name} takes {', '.join(defaults)}, not {len(plain)} values")
    options = dict(zip(defaults, plain, strict=False))
    for key, value in (pair for named in values if isinstance(named, dict) for pair in named.items()):
        if key not in defaults:
            raise ValueError(f"{name} has no option {key!r}; {trees.did_you_mean(key, defaults, 'there are')}")
        options[key] = value
    for key, value in options.items():
        kinds, what = KINDS[type(defaults[key])]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{name}'s {key} is {what}, as {defaults[key]!r} is, not {value!r}")
    return defaults | options


def _within(low: float, high: float, /, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{name} {value} is not between {low:g} and {high:g}")


# -- images: uint8 [H, W, C] ---------------------------------------------------------------------------------------------------

FILLS: dict[str, Any] = {"black": "constant", "reflect": "reflect", "edge": "edge"}  # np.pad's names
MOST = 10_000  # pixels: only to refuse what is below 0


def _picture(image: np.ndarray) -> Any:
    return extra("PIL.Image", "images").fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _pixels(picture: Any, image: np.ndarray) -> np.ndarray:
    return np.asarray(picture).reshape(image.shape)


def _warped(image: np.ndarray, matrix: Sequence[float], dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Each pixel p of the result, seen from the centre, is the image at matrix p - (dx, dy), bilinear; black where that lies outside."""
    library, (a, b, c, d), (H, W, _) = extra("PIL.Image", "images"), matrix, image.shape
    x, y = W / 2, H / 2
    coefficients = (a, b, x - a * x - b * y - dx, c, d, y - c * x - d * y - dy)
    return _pixels(_picture(image).transform((W, H), library.Transform.AFFINE, coefficients, resample=library.Resampling.BILINEAR), image)


def crop(image: np.ndarray, rng: Rng, pixels: int = 4, fill: str = "black") -> np.ndarray:
    """A part of the image's own size out of the image with `pixels` more on every side, "black", "reflect" or "edge"."""
    _within(0, MOST, pixels=pixels)
    if fill not in FILLS:
        raise ValueError(f"crop has no fill {fill!r}; {trees.did_you_mean(fill, FILLS, 'there are')}")
    top, left = rng.integers(0, 2 * pixels + 1, 2)
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), FILLS[fill])
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def affine(image: np.ndarray, rng: Rng, degrees: float = 10.0, scale: float = 0.1, shear: float = 10.0, pixels: float = 2.0) -> np.ndarray:
    """Turned by up to `degrees`, sheared by up to `shear` degrees, 1 / (1 + scale) to 1 + scale times as large, moved by up to `pixels` in both
    directions: one resampling for all."""
    _within(0, 180, degrees=degrees)
    _within(0, 60, shear=shear)
    _within(0, MOST, scale=scale, pixels=pixels)
    angle, slant, size, dx, dy = rng.uniform(-1, 1, 5)
    angle, slant, size = math.radians(angle * degrees), math.tan(math.radians(slant * shear)), (1 + scale) ** size
    cos, sin = math.cos(angle) / size, math.sin(angle) / size
    return _warped(image, (cos, sin + slant * cos, -sin, cos - slant * sin), dx * pixels, dy * pixels)


def rotate(image: np.ndarray, rng: Rng, degrees: float = 10.0) -> np.ndarray:
    """Turned about its centre by up to `degrees` either way."""
    return affine(image, rng, degrees, 0.0, 0.0, 0.0)


def scale(image: np.ndarray, rng: Rng, scale: float = 0.1) -> np.ndarray:
    """1 / (1 + scale) to 1 + scale times as large."""
    return affine(image, rng, 0.0, scale, 0.0, 0.0)


def shear(image: np.ndarray, rng: Rng, degrees: float = 10.0) -> np.ndarray:
    """Rows moved sideways, so that a column leans by up to `degrees` either way."""
    return affine(image, rng, 0.0, 0.0, degrees, 0.0)


def shift(image: np.ndarray, rng: Rng, pixels: float = 2.0) -> np.ndarray:
    """Moved by up to `pixels`, parts of one included, in both directions; `crop` moves by whole ones."""
    return affine(image, rng, 0.0, 0.0, 0.0, pixels)


def elastic(image: np.ndarray, rng: Rng, pixels: float = 1.0, sigma: float = 4.0) -> np.ndarray:
    """Every pixel from elsewhere, by a random field smoothed with a Gaussian of `sigma` pixels, whose root mean square is `pixels`."""
    _within(0, MOST, pixels=pixels)
    _within(0.5, MOST, sigma=sigma)
    (H, W, _), both = image.shape, rng.uniform(-1, 1, (2, *image.shape[:2]))
    field = _gaussian(H, sigma) @ both @ _gaussian(W, sigma)
    field *= pixels / (math.sqrt(np.square(field).mean()) + 1e-12)
    y, x = (np.clip(at + move, 0, n - 1) for at, move, n in zip(np.mgrid[:H, :W], field, (H, W), strict=True))
    top, left = (np.minimum(at.astype(int), max(n - 2, 0)) for at, n in ((y, H), (x, W)))
    below, right = np.minimum(top + 1, H - 1), np.minimum(left + 1, W - 1)
    v, u = (y - top)[..., None], (x - left)[..., None]
    upper, lower = (image[row, left] * (1 - u) + image[row, right] * u for row in (top, below))
    return np.rint(upper * (1 - v) + lower * v).astype(np.uint8)


@functools.lru_cache(8)
def _gaussian(n: int, sigma: float) -> np.ndarray:
    """[n, n] symmetric: smooths along an axis."""
    return np.exp(-0.5 * np.square(np.subtract.outer(np.arange(n), np.arange(n)) / sigma))


def jitter(
    image: np.ndarray, rng: Rng, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1
) -> np.ndarray:
    """Brightness, contrast, saturation times a number from 1 - strength to 1 + strength, the hue turned by up to `hue` of the circle, in random
    order; gray images have only the first two."""
    _within(0, 1, brightness=brightness, contrast=contrast, saturation=saturation)
    _within(0, 0.5, hue=hue)
    picture, draws, gray = _picture(image), rng.uniform(-1, 1, 4), image.shape[-1] == 1
    strengths = {"Brightness": brightness, "Contrast": contrast, "Color": saturation, "hue": hue}
    for i in rng.permutation(4):
        name, strength = [*strengths.items()][i]
        if not strength or (gray and name in ("Color", "hue")):
            continue
        picture = _turned(picture, draws[i] * strength) if name == "hue" else _enhanced(name)(picture, draws[i] * strength)
    return _pixels(picture, image)


def _turned(picture: Any, part: float) -> Any:
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] += np.uint8(round(part * 256) % 256)
    return extra("PIL.Image", "images").fromarray(hsv, "HSV").convert("RGB")


def _enhanced(name: str) -> Callable[[Any, float], Any]:
    return lambda picture, more: getattr(extra("PIL.ImageEnhance", "images"), name)(picture).enhance(max(0.0, 1 + more))


def erase(
    image: np.ndarray, rng: Rng, chance: float = 0.5, low: float = 0.02, high: float = 0.4, aspect: float = 10 / 3, fill: str = "noise"
) -> np.ndarray:
    """With this chance a box of `low` to `high` of the area, 1 / aspect to `aspect` as wide as high, full of "noise" or "black"."""
    _within(0, 1, chance=chance, low=low)
    _within(low, 1, high=high)
    _within(1, MOST, aspect=aspect)
    if fill not in ("noise", "black"):
        raise ValueError(f"erase fills with 'noise' or 'black', not {fill!r}")
    (H, W, C), (wanted, area, shape, top, left) = image.shape, rng.random(5)
    if wanted >= chance:
        return image
    area, shape = (low + (high - low) * area) * H * W, aspect ** (2 * shape - 1)
    h, w = min(H, round(math.sqrt(area / shape))), min(W, round(math.sqrt(area * shape)))
    top, left, image = int(top * (H - h + 1)), int(left * (W - w + 1)), image.copy()
    image[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, C), np.uint8) if fill == "noise" else 0
    return image


def _moved(matrix: Callable[[float], Sequence[float]]) -> Callable[[np.ndarray, float], np.ndarray]:
    return lambda image, level: _warped(image, matrix(level))


def _drawn(operation: Callable[[Any, float], Any]) -> Callable[[np.ndarray, float], np.ndarray]:
    return lambda image, level: _pixels(operation(_picture(image), level), image)


def _ops() -> Any:
    return extra("PIL.ImageOps", "images")


# (image, level from -1 to 1 at magnitude 10); where AutoAugment's range has one side only, the sign says nothing
OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "identity": lambda image, level: image,
    "auto_contrast": _drawn(lambda picture, level: _ops().autocontrast(picture)),
    "equalize": _drawn(lambda picture, level: _ops().equalize(picture)),
    "rotate": _moved(lambda l: (math.cos(l * math.pi / 6), math.sin(l * math.pi / 6), -math.sin(l * math.pi / 6), math.cos(l * math.pi / 6))),
    "solarize": _drawn(lambda picture, level: _ops().solarize(picture, max(0, 256 - round(256 * abs(level))))),
    "posterize": _drawn(lambda picture, level: _ops().posterize(picture, max(1, 8 - round(4 * abs(level))))),
    **{name.lower(): _drawn(lambda p, l, name=name: _enhanced(name)(p, 0.9 * l)) for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    "shear_x": _moved(lambda level: (1, 0.3 * level, 0, 1)),
    "shear_y": _moved(lambda level: (1, 0, 0.3 * level, 1)),
    "translate_x": lambda image, level: _warped(image, (1, 0, 0, 1), 0.45 * level * image.shape[1]),
    "translate_y": lambda image, level: _warped(image, (1, 0, 0, 1), 0.0, 0.45 * level * image.shape[0]),
}  # fmt: skip


def randaugment(image: np.ndarray, rng: Rng, n: int = 2, m: float = 9.0) -> np.ndarray:
    """`n` of `OPERATIONS` drawn evenly, each at magnitude `m` of 10 (up to 30, the ranges continued), either way."""
    _within(0, len(OPERATIONS), n=n)
    _within(0, 30, m=m)
    operations = [*OPERATIONS.values()]
    for which, sign in zip(rng.integers(0, len(operations), int(n)), rng.choice((-1, 1), int(n)), strict=True):
        image = operations[which](image, sign * m / 10)
    return image


# -- text ----------------------------------------------------------------------------------------------------------------------


def _split(text: str) -> tuple[list[str], list[str]]:
    """Words, and what stands before, between and behind them."""
    parts = re.split(r"(\S+)", text)
    return parts[1::2], parts[::2]


def _joined(words: Sequence[str], between: Sequence[str]) -> str:
    return between[0] + "".join(word + space for word, space in zip(words, between[1:], strict=True))


def swap(text: str, rng: Rng, share: float = 0.1) -> str:
    """Two words exchanged, for `share` of the words (rounded up) one time after the other."""
    _within(0, 1, share=share)
    words, between = _split(text)
    for _ in range(math.ceil(share * len(words)) if len(words) > 1 else 0):
        a, b = rng.choice(len(words), 2, replace=False)
        words[a], words[b] = words[b], words[a]
    return _joined(words, between)


def delete(text: str, rng: Rng, share: float = 0.1) -> str:
    """Each word left out with the chance `share`, but not the last one that is left."""
    _within(0, 1, share=share)
    words, between = _split(text)
    if not words:
        return text
    keep = rng.random(len(words)) >= share
    keep[rng.integers(len(words))] |= not keep.any()
    return between[0] + "".join(word + space for word, space, kept in zip(words, between[1:], keep, strict=True) if kept)


def synonyms(text: str, rng: Rng, share: float = 0.1) -> str:
    """`share` of the words (rounded up) that WordNet has a synonym for replaced by one of them; needs nltk and its WordNet."""
    _within(0, 1, share=share)
    words, between = _split(text)
    wanted = math.ceil(share * len(words))
    for at in rng.permutation(len(words)):
        if not wanted:
            break
        if others := _synonyms(words[at].lower()):
            words[at], wanted = others[rng.integers(len(others))], wanted - 1
    return _joined(words, between)


@functools.lru_cache(100_000)
def _synonyms(word: str) -> tuple[str, ...]:
    try:
        wordnet = importlib.import_module("nltk.corpus").wordnet
        lemmas = {lemma.name().replace("_", " ") for synset in wordnet.synsets(word) for lemma in synset.lemmas()}
    except (ImportError, LookupError):
        raise ImportError("synonyms come from WordNet: pip install nltk && python -m nltk.downloader wordnet") from None
    return tuple(sorted(lemmas - {word}))  # sorted: a set's order is another one in every process


# -- sound: float32 [samples] in -1..1 -------------------------------------------------------------------------------------------


def late(wave: np.ndarray, rng: Rng, share: float = 0.1) -> np.ndarray:
    """Earlier or later by up to `share` of its length; silence comes in, and what goes beyond an end is lost."""
    _within(0, 1, share=share)
    by = round(rng.uniform(-share, share) * len(wave))
    moved = np.zeros_like(wave)
    moved[max(0, by) : len(wave) + min(0, by)] = wave[max(0, -by) : len(wave) - max(0, by)]
    return moved


def gain(wave: np.ndarray, rng: Rng, decibels: float = 6.0) -> np.ndarray:
    """Louder or softer by up to `decibels`, cut at -1 and 1."""
    _within(0, 100, decibels=decibels)
    return np.clip(wave * np.float32(10 ** (rng.uniform(-decibels, decibels) / 20)), -1, 1)


def noise(wave: np.ndarray, rng: Rng, level: float = 0.1) -> np.ndarray:
    """White noise added, as loud as up to `level` of the sound (root mean squares), cut at -1 and 1."""
    _within(0, 10, level=level)
    loud = np.float32(rng.uniform(0, level) * np.sqrt(np.square(wave, dtype=np.float64).mean()))
    return np.clip(wave + loud * rng.standard_normal(len(wave), np.float32), -1, 1)


def mask(mel: np.ndarray, rng: Rng, bands: int = 27, frames: int = 100, masks: int = 2, most: float = 1.0) -> np.ndarray:
    """SpecAugment of log-mel features [M, T] (ops.log_mel): `masks` times up to `bands` neighbouring bands, and as often up to `frames` neighbouring
    frames (no more than `most` of T), set to the mean of all. The defaults are the paper's policy LD without its warping."""
    _within(0, MOST, bands=bands, frames=frames, masks=masks)
    _within(0, 1, most=most)
    (M, T), out, mean = mel.shape, mel.copy(), mel.mean()
    for length, widest, rows in [(M, bands, out), (T, min(frames, int(most * T)), out.T)] * int(masks):
        width = rng.integers(0, min(widest, length) + 1)
        start = rng.integers(0, length - width + 1)
        rows[start : start + width] = mean
    return out


TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "image": {f.__name__: f for f in (crop, shift, rotate, scale, shear, affine, elastic, jitter, erase, randaugment)},
    "text": {f.__name__: f for f in (swap, delete, synonyms)},
    "wave": {"shift": late, "gain": gain, "noise": noise},
    "mel": {"mask": mask},
}
TRIALS = {  # the smallest of each kind that every function has to do with
    "image": np.zeros((8, 8, 3), np.uint8), "text": "three small words", "wave": np.zeros(8, np.float32), "mel": np.zeros((4, 4), np.float32),
}  # fmt: skip
