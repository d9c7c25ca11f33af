"""Floor 2, data: sources, tokenizers, packing, mixtures and the loader. Everything below is loaded on first use, so that `import bigflax`
stays quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigflax.data.captions import captioned, captioned_shapes
    from bigflax.data.dialogues import asked, chat, chat_shapes
    from bigflax.data.examples import (
        ended,
        find_classes,
        labelled,
        labelled_shapes,
        many_labelled,
        many_labelled_shapes,
        paired,
        paired_shapes,
        scored,
        scored_shapes,
        translated,
        translated_shapes,
    )
    from bigflax.data.images import count_classes, image_shapes, viewed
    from bigflax.data.kinds import KINDS, Kind, reading
    from bigflax.data.loader import Loader, virtual_shards
    from bigflax.data.pipeline import Examples, Mixed, Records, Text, in_split, record_batches, sample_texts, text_batches, text_shapes
    from bigflax.data.pixels import NORMALIZED, channels_first
    from bigflax.data.quality import BadRecord, Quality
    from bigflax.data.sound import transcribed, transcribed_shapes
    from bigflax.data.sources import SOURCES, Source, open_source
    from bigflax.data.spans import answered, answered_shapes, find_tags, tagged, tagged_shapes
    from bigflax.data.text import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

_HOMES = {
    "captions": ("captioned", "captioned_shapes"),
    "dialogues": ("asked", "chat", "chat_shapes"),
    "examples": (
        "ended",
        "find_classes",
        "labelled",
        "labelled_shapes",
        "many_labelled",
        "many_labelled_shapes",
        "paired",
        "paired_shapes",
        "scored",
        "scored_shapes",
        "translated",
        "translated_shapes",
    ),
    "images": ("count_classes", "image_shapes", "viewed"),
    "kinds": ("KINDS", "Kind", "reading"),
    "loader": ("Loader", "virtual_shards"),
    "pipeline": ("Examples", "Mixed", "Records", "Text", "in_split", "record_batches", "sample_texts", "text_batches", "text_shapes"),
    "pixels": ("NORMALIZED", "channels_first"),
    "quality": ("BadRecord", "Quality"),
    "sound": (
        "transcribed",
        "transcribed_shapes",
    ),
    "sources": ("SOURCES", "Source", "open_source"),
    "spans": (
        "answered",
        "answered_shapes",
        "find_tags",
        "tagged",
        "tagged_shapes",
    ),
    "text": ("Tokenizer", "byte_tokenizer", "load_tokenizer", "train_bpe"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "KINDS", "NORMALIZED", "SOURCES", "BadRecord", "Examples", "Kind", "Loader", "Mixed", "Quality", "Records", "Source", "Text",
    "Tokenizer", "answered", "answered_shapes", "asked", "byte_tokenizer", "captioned", "captioned_shapes", "channels_first", "chat",
    "chat_shapes", "count_classes", "ended", "find_classes", "find_tags", "image_shapes", "in_split", "labelled", "labelled_shapes",
    "load_tokenizer", "many_labelled", "many_labelled_shapes", "open_source", "paired", "paired_shapes", "reading", "record_batches",
    "sample_texts", "scored", "scored_shapes", "tagged", "tagged_shapes", "text_batches", "text_shapes", "train_bpe", "transcribed",
    "transcribed_shapes", "translated", "translated_shapes", "viewed", "virtual_shards",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"bigflax.data.{_HOME[name]}"), name)
