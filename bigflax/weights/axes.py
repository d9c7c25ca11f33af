"""The axes of a weight as one string, written where the weight is declared."""

from typing import NamedTuple


class Axes(NamedTuple):
    """The names of a weight's axes, read from its string: `names == stack + first + second`."""

    stack: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]
    outputs_first: bool

    @property
    def names(self) -> tuple[str, ...]:
        return self.stack + self.first + self.second

    @property
    def contracted(self) -> tuple[int, ...]:
        """The positions of the input axes, over which a product sums."""
        start = len(self.stack) + (len(self.first) if self.outputs_first else 0)
        return tuple(range(start, start + len(self.second if self.outputs_first else self.first)))


def parse_axes(text: str) -> Axes:
    """Reads "layers | embed -> heads head_dim"."""
    stack, _, rest = text.rpartition("|")
    arrow = next((a for a in ("->", "<-") if a in rest), None)
    first, second = rest.split(arrow) if arrow else ("", rest)
    return Axes(tuple(stack.split()), tuple(first.split()), tuple(second.split()), arrow == "<-")


def write_axes(axes: Axes) -> str:
    """The inverse of `parse_axes`."""
    arrow = " <- " if axes.outputs_first else " -> "
    body = arrow.join((" ".join(axes.first), " ".join(axes.second))) if axes.first else " ".join(axes.second)
    return f"{' '.join(axes.stack)} | {body}" if axes.stack else body
