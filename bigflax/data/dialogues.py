"""Conversations as packed rows: the tokenizer's chat template writes them out, and only what the assistant says is learned.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}        written by the template
    {"prompt": "2 + 2 = ", "completion": "4"}                                  as they are, within the marks of a document, the last one learned

A template is Jinja, in a sandbox, and sees what transformers gives it. Answers are what its {% generation %} blocks hold; of a template without
them, what an answer adds to the conversation before it and the prompt to answer, which must both be a beginning of the whole.
Left out on purpose: tools and documents in templates, and cutting a long conversation at its beginning: what is beyond `length` is dropped.

Legend: T length of a row.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigflax.data.examples import Read, field, text_of
from bigflax.data.packing import IGNORED, Example, document
from bigflax.data.pipeline import text_shapes
from bigflax.data.sources import Record
from bigflax.data.text import Tokenizer

MARKS = "\ufdd0\ufdd1"  # around an answer, while a template writes: Unicode says that no text holds them
TODAY = datetime.date(2024, 7, 26)  # what a template is told: rows must not depend on the day


@functools.lru_cache(8)
def compiled(template: str) -> Any:
    """The Jinja template. Raises ImportError without jinja2, ValueError for what is no template."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install 'bigflax[chat]'") from error

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: what is between, within the marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in MARKS)
            return [begin, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]

    def refuse(message):
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    made.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    made.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    try:
        return made.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is none: {error}") from error


def render(template: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, ask: bool = False) -> str:
    """The text of a conversation, with the marks; `ask`: and the prompt to answer it. Raises ValueError where the template refuses it."""
    made = compiled(template)  # which says what to install, where there is no jinja2
    from jinja2 import TemplateError

    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    tokens = {f"{role}_token": tokenizer.inner.id_to_token(i) for role, i in roles.items() if i is not None}
    try:
        return made.render(messages=messages, add_generation_prompt=ask, **tokens)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template does not take this conversation: {error}") from error


def written(template: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where its answers stand, by characters from and to. Raises ValueError where there is none, and where it is not
    told from the rest."""
    text, spans = render(template, messages, tokenizer), []
    if MARKS[0] in text:
        at, plain = 0, ""
        for k, part in enumerate(re.split(f"[{MARKS}]", text)):
            spans += [(at, at + len(part))] if k % 2 else []
            at, plain = at + len(part), plain + part
        return plain, spans
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(template, messages[:k], tokenizer, ask=True), render(template, messages[: k + 1], tokenizer)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template writes message {k + 1} otherwise once others follow; mark answers in it by {{% generation %}}"
                )
            spans.append((len(before), len(after)))
    if not spans:
        raise ValueError("no message is the assistant's: there is nothing to learn")
    return text, spans


def asked(tokenizer: Tokenizer, data: Any, prompt: str) -> np.ndarray | None:
    """The ids of what a model that learned `chat` is to answer."""
    template = tokenizer.template if data.template is None else data.template
    if template is None:
        return np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
    return tokenizer.encode(render(template, [{"role": "user", "content": prompt}], tokenizer, ask=True))


def chat(
    tokenizer: Tokenizer, *, length: int, messages: str = "messages", prompt: str = "prompt", completion: str = "completion",
    template: str | None = None,
) -> Read:  # fmt: skip
    """A conversation, or where a record has none a prompt and its completion: "pairs" int32 [n, 2], n <= `length`, of input ids and labels,
    -100 for all but answers. `template` instead of the tokenizer's."""
    template = tokenizer.template if template is None else template

    def reader(record: Record, rng: np.random.Generator | None = None) -> Example:
        if messages not in record and completion in record:
            before, after = tokenizer.encode(text_of(record, prompt)), tokenizer.encode(text_of(record, completion))
            ids = np.concatenate([*document((before, after), tokenizer.bos_id, tokenizer.eos_id)])
            answer = np.arange(len(ids)) > len(before)
        else:
            if template is None:
                raise RuntimeError("the tokenizer has no chat template; put a chat_template.jinja beside it, or name one: data.template")
            said = _messages(field(record, messages), messages)
            text, spans = written(template, said, tokenizer)
            ids, at = tokenizer.located(text)
            answer = np.any([(at[:, 0] >= begin) & (at[:, 0] < end) for begin, end in spans], axis=0)
        pairs = np.stack([ids[:-1], np.where(answer, ids, IGNORED)[1:]], axis=1)[:length]
        if np.all(pairs[:, 1] == IGNORED):
            raise ValueError(f"no answer begins within the first {length} tokens of {len(ids)}")
        return {"pairs": pairs}

    return reader


def _messages(found: Any, name: str) -> list[dict[str, Any]]:
    said = list(found) if isinstance(found, Sequence | np.ndarray) and not isinstance(found, str | bytes) else []
    if not said or not all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in said):
        raise ValueError(f"field {name!r} is no list of messages, each with a role and its content")
    if any(mark in str(one["content"]) for one in said for mark in MARKS):
        raise ValueError(f"field {name!r} holds U+FDD0 or U+FDD1, which are no characters of a text")
    return [dict(one) for one in said]


def chat_shapes(*, length: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of packed conversations, known without a source."""
    return text_shapes(length=length, batch_size=batch_size)
