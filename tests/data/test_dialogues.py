"""Conversations: the template's text is transformers' own, answers alone are learned, and a packed row is its records."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import data, losses, models
from bigflax.data.dialogues import written
from bigflax.data.packing import pack

pytest.importorskip("jinja2", reason="jinja2 (extra chat) is not installed")
TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {  # template, what comes after an answer and is learned with it
    "chatml": ("{% for message in messages %}" + TURN + "{% endfor %}" + ASK, "<|im_end|>\n"),
    "marked": (MARKED + ASK, "<|im_end|>"),
    "no mark of the end": ("{% for message in messages %}{{ message.role ~ ': ' ~ message.content ~ '|' }}{% endfor %}"
                           "{% if add_generation_prompt %}assistant: {% endif %}", "|"),
    "the end of text": ("{{ bos_token }}{% for m in messages %}{{ '[INST]' ~ m.content ~ '[/INST]' if m.role == 'user' else m.content ~ eos_token }}"
                        "{% endfor %}", "<|endoftext|>"),
}  # fmt: skip
TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "naïve 四 🙂"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes"},
]
BYTES = data.byte_tokenizer()


def answers(tokenizer, pairs):
    """The learned tokens, run by run, as text."""
    runs, at = [], 0
    while at < len(pairs):
        end = at
        while end < len(pairs) and pairs[end, 1] != -100:
            end += 1
        runs += [tokenizer.decode(pairs[at:end, 1], skip_special=False)] if end > at else []
        at = end + 1
    return runs


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_alone_are_learned(name):
    template, end = TEMPLATES[name]
    pairs = data.chat(BYTES, length=400, template=template)({"messages": TALK}, None)["pairs"]
    assert answers(BYTES, pairs) == [TALK[1]["content"] + end, TALK[3]["content"] + end]
    text, _ = written(template, TALK, BYTES)
    ids = BYTES.encode(text)
    np.testing.assert_array_equal(pairs[:, 0], ids[:-1])
    learned = pairs[:, 1] != -100
    np.testing.assert_array_equal(pairs[learned, 1], ids[1:][learned])  # beside the token that they follow


def test_a_prompt_and_its_completion_stand_within_marks():
    pairs = data.chat(BYTES, length=9)({"prompt": "ab", "completion": "cd"}, None)["pairs"]
    end = BYTES.eos_id
    np.testing.assert_array_equal(pairs, [[end, -100], [97, -100], [98, 99], [99, 100], [100, end]])
    cut = data.chat(BYTES, length=3)({"prompt": "ab", "completion": "cd"}, None)["pairs"]
    np.testing.assert_array_equal(cut, pairs[:3])


def test_a_prompt_is_what_stands_before_an_answer():
    for template, want in [(None, "<|endoftext|>hi"), (TEMPLATES["chatml"][0], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")]:
        ids = data.asked(BYTES, SimpleNamespace(template=template), "hi")
        assert BYTES.decode(ids, skip_special=False) == want


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, tmp_path):
    """Token ids of the whole; of a template that marks its answers the mask too."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    template, _ = TEMPLATES[name]
    tokenizer = data.train_bpe([message["content"] for message in TALK] * 3, 290)
    tokenizer.template = template
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    marked = "generation %" in template
    want = theirs.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked)
    ours = data.load_tokenizer(tmp_path)
    assert ours.template == template and ours.fingerprint == tokenizer.fingerprint != data.load_tokenizer("bytes").fingerprint
    pairs = data.chat(ours, length=400)({"messages": TALK}, None)["pairs"]
    np.testing.assert_array_equal(pairs[:, 0], want["input_ids"][:-1])
    if marked:
        np.testing.assert_array_equal(pairs[:, 1] != -100, np.array(want["assistant_masks"][1:], bool))


LATER = "{% for m in messages %}{{ m.role ~ (m.content if loop.last else '') }}{% endfor %}"
REFUSED = {
    "no messages": ({"messages": "hello"}, {}, "field 'messages' is no list of messages"),
    "no content": ({"messages": [{"role": "user"}]}, {}, "each with a role and its content"),
    "neither": ({"mesages": TALK}, {}, "no field 'messages', nearest is 'mesages'"),
    "a mark of ours": ({"messages": [*TALK, {"role": "user", "content": "\ufdd0"}]}, {}, "holds U.FDD0 or U.FDD1"),
    "no answer": ({"messages": TALK[:1]}, {}, "no message is the assistant's"),
    "an answer beyond the row": ({"messages": TALK}, dict(length=20), "no answer begins within the first 20 tokens of"),
    "a template that refuses": (
        {"messages": TALK},
        dict(template="{{ raise_exception('roles must alternate') }}"),
        "does not take this conversation: roles must",
    ),
    "a template that is none": ({"messages": TALK}, dict(template="{% for %}"), "the chat template is none"),
    "one that looks back": ({"messages": TALK}, dict(template=LATER), "writes message 2 otherwise once others follow"),
    "an escape from the sandbox": ({"messages": TALK}, dict(template="{{ messages.append(1) }}"), "does not take this conversation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    record, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        data.chat(BYTES, **{"length": 64, "template": TEMPLATES["chatml"][0], **options})(record, None)
    with pytest.raises(RuntimeError, match=r"no chat template; put a chat_template.jinja beside it"):
        data.chat(BYTES, length=8)({"messages": TALK}, None)


def test_without_jinja2_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"chat templates need jinja2: pip install 'bigflax\[chat\]'"):
        data.chat(BYTES, length=64, template="{# another one, not compiled before #}")({"messages": TALK}, None)


def test_a_packed_row_gives_each_record_the_loss_that_it_has_alone():
    """Attention stays within a record and positions begin anew: float32 sums in another order, 1e-5."""
    import grain

    read = data.chat(BYTES, length=64)
    records = [{"prompt": "q" * n, "completion": "answer"[:m]} for n, m in [(3, 6), (20, 2), (9, 5), (1, 1), (40, 4)]]
    alone = [read(record, None)["pairs"] for record in records]
    rows = [*pack(grain.MapDataset.source([{"pairs": p} for p in alone]).to_iter_dataset(), 64, bins=2)]
    assert len(rows) < len(records)
    model = models.create("gpt2", size="tiny", vocab_size=BYTES.vocab_size)
    params = jax.tree.map(lambda w: w * 3, model.init(jax.random.key(0)))  # so that context and positions matter

    @jax.jit
    def loss_of(row):
        inputs = {name: row[name][None] for name in ("input_ids", "segment_ids", "position_ids")}
        return -losses.token_log_probs(model.apply(params, **inputs)["logits"], row["labels"][None])[0]

    blank = {"input_ids": 0, "labels": -100, "segment_ids": 0, "position_ids": 0}
    want = {}
    for pairs in alone:
        row = {name: np.full(64, value, np.int32) for name, value in blank.items()}
        row["input_ids"][: len(pairs)], row["labels"][: len(pairs)] = pairs.T
        row["segment_ids"][: len(pairs)], row["position_ids"][: len(pairs)] = 1, np.arange(len(pairs))
        want[tuple(pairs[:, 0])] = float(jnp.sum(loss_of(row)))
    got = {}
    for row in rows:
        each = np.asarray(loss_of(row))
        for k in range(1, row["segment_ids"].max() + 1):
            got[tuple(row["input_ids"][row["segment_ids"] == k])] = each[row["segment_ids"] == k].sum()
    assert got.keys() == want.keys()
    for key in want:
        assert got[key] == pytest.approx(want[key], rel=1e-5)
