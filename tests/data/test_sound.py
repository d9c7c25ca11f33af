"""Sound as rows: every width of PCM says the same, another rate is the same tone, and a row is what its file holds."""

import io
import wave

import numpy as np
import pytest

from bigflax import data
from bigflax.data.sound import read_wav, resample

BYTES = data.byte_tokenizer()
TONE = lambda rate, hertz=440, seconds=0.1: np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


def wav(heard, rate, width=2, channels=1):
    file = io.BytesIO()
    whole = np.round(heard.astype(float) * (2.0 ** (8 * width - 1) - 1)).astype("<i8") + (128 if width == 1 else 0)
    with wave.open(file, "wb") as out:
        out.setnchannels(channels), out.setsampwidth(width), out.setframerate(rate)
        out.writeframes(whole.reshape(-1, 1).view(np.uint8)[:, :width].repeat(channels, 0).tobytes())
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_wav_is_the_same_sound(width, channels, tmp_path):
    """To half a step of its own, and of float32."""
    (tmp_path / "tone.wav").write_bytes(wav(TONE(8000), 8000, width, channels))
    heard, rate = read_wav(str(tmp_path / "tone.wav"))
    assert rate == 8000
    np.testing.assert_allclose(heard, TONE(8000), rtol=0, atol=1.5 * 2.0 ** (1 - 8 * width) + 2**-23)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100])
def test_a_tone_is_the_same_at_another_rate(rate):
    """Away from the ends, where the window is whole. A Hann window of 16 zeros passes tones below its band to 1e-3, and stops those above it."""
    got, edge = resample(TONE(rate), rate), 200
    np.testing.assert_allclose(got[edge:-edge], TONE(16000)[: len(got)][edge:-edge], rtol=0, atol=2e-3)
    if rate > 16000:
        assert np.abs(resample(TONE(rate, hertz=10000), rate)[edge:-edge]).max() < 2e-3
    assert len(got) == -(-round(rate * 0.1) * 16000 // rate)


def test_a_row_is_its_sound_and_what_is_said(tmp_path):
    (tmp_path / "tone.wav").write_bytes(wav(TONE(16000), 16000))
    read = data.transcribed(BYTES, seconds=0.2, target_length=4, folder=str(tmp_path))
    rows = [
        read({"audio": sound, "text": "hi"}, None)
        for sound in ("tone.wav", wav(TONE(16000), 16000), {"array": TONE(16000), "sampling_rate": 16000})
    ]
    for row in rows:
        assert row["waveform"].shape == (3200,) and not row["waveform"][1600:].any()
        np.testing.assert_allclose(row["waveform"][:1600], TONE(16000), rtol=0, atol=2.0**-14)
        np.testing.assert_array_equal(row["labels"], [*b"hi", BYTES.eos_id, -100])
    short = data.transcribed(BYTES, seconds=0.05, target_length=4)({"audio": wav(TONE(16000), 16000), "text": "hi"}, None)
    assert short["waveform"].shape == (800,)


def test_the_marks_of_a_decoder_are_read_and_not_learned():
    """Whisper's tokenizer: start and "no timestamps", a blank before the text, its end behind it; what is too long is cut."""
    from tokenizers import processors

    tokenizer = data.byte_tokenizer()
    tokenizer.inner.add_special_tokens(["<|startoftranscript|>", "<|notimestamps|>"])
    start, plain, end = (tokenizer.inner.token_to_id(token) for token in ("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"))
    tokenizer.inner.post_processor = processors.TemplateProcessing(
        single="<|startoftranscript|> <|notimestamps|> $A <|endoftext|>",
        special_tokens=[("<|startoftranscript|>", start), ("<|notimestamps|>", plain), ("<|endoftext|>", end)],
    )
    record, pad = {"audio": {"array": TONE(16000), "sampling_rate": 16000}, "text": "hi "}, tokenizer.pad_id
    row = data.transcribed(tokenizer, seconds=0.1, target_length=6)(record, None)
    np.testing.assert_array_equal(row["decoder_input_ids"], [start, plain, *b" hi", end])
    np.testing.assert_array_equal(row["labels"], [-100, *b" hi", end, -100])
    row = data.transcribed(tokenizer, seconds=0.1, target_length=7)(record, None)
    np.testing.assert_array_equal(row["decoder_input_ids"], [start, plain, *b" hi", end, pad])
    row = data.transcribed(tokenizer, seconds=0.1, target_length=4)(record, None)
    np.testing.assert_array_equal(row["decoder_input_ids"], [start, plain, *b" h"])
    np.testing.assert_array_equal(row["labels"], [-100, *b" h", end])


REFUSED = {
    "no file": ({"audio": "nowhere.wav", "text": "a"}, "'nowhere.wav' cannot be read as wav: .*No such file"),
    "no wav": ({"audio": b"RIFFxxxx", "text": "a"}, "the sound cannot be read as wav: not a WAVE file"),
    "no sound": ({"audio": 3, "text": "a"}, "sound is a wav file or an array with its sampling_rate, not int"),
    "no rate": ({"audio": {"array": [0.0]}, "text": "a"}, "no field 'sampling_rate'"),
    "silence of no length": ({"audio": {"array": [], "sampling_rate": 8000}, "text": "a"}, r"finite samples, not an array of shape \[0\]"),
    "no text": ({"audio": {"array": [0.0], "sampling_rate": 8000}}, "no field 'text'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    record, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        data.transcribed(BYTES, seconds=0.1, target_length=4)(record, None)


def test_rows_are_changed_in_training_alone():
    read = data.transcribed(BYTES, seconds=0.2, target_length=4, augment="gain:6")
    record = {"audio": {"array": TONE(16000) / 2, "sampling_rate": 16000}, "text": "hi"}  # half as loud as could be: twice of it is not cut
    plain, changed = read(record, None)["waveform"], read(record, np.random.default_rng(0))["waveform"]
    np.testing.assert_array_equal(plain[:1600], TONE(16000) / 2)
    factor = changed[1:1600] / np.where(plain[1:1600] == 0, np.nan, plain[1:1600])
    assert np.nanstd(factor) < 1e-5 and 0.5 < np.nanmean(factor) < 2 and abs(np.nanmean(factor) - 1) > 1e-3  # at most 6 dB either way
