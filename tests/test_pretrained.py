"""Third-party networks: frozen means frozen, one call for every text encoder, BigVGAN equal to NVIDIA's."""

import copy
import dataclasses
import importlib.util
import json
import pickle
import socket
import threading

import huggingface_hub
import pytest
import torch
import torch.nn as nn
import transformers

from config import Mel, UserError
from pretrained import bigvgan, frozen, text_encoder

MEL = Mel(sample_rate=16000, n_fft=64, hop=16, n_mels=10, fmin=0.0, fmax=8000.0)
SNAKEBETA = {
    "resblock": "1",
    "activation": "snakebeta",
    "snake_logscale": True,
    "upsample_rates": [4, 2, 2],
    "upsample_kernel_sizes": [8, 4, 4],
    "upsample_initial_channel": 32,
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
    "sampling_rate": 16000,
    "n_fft": 64,
    "win_size": 64,
    "hop_size": 16,
    "num_mels": 10,
    "fmin": 0,
    "fmax": None,
}
# tanh and a bias, as BigVGAN v1
SNAKE = {key: value for key, value in SNAKEBETA.items() if not key.startswith("use_")}
SNAKE |= {
    "resblock": "2",
    "activation": "snake",
    "upsample_rates": [8, 2],
    "upsample_kernel_sizes": [16, 4],
    "resblock_dilation_sizes": [[1, 3], [1, 5]],
    "fmax": 8000,
}


@pytest.fixture
def bigvgan_folder(tmp_path):
    torch.manual_seed(0)
    return save_bigvgan(tmp_path, SNAKEBETA, add_weight_norm(shake(bigvgan.BigVGAN(SNAKEBETA)).state_dict()))


def save_bigvgan(folder, config, state):
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"generator": state}, folder / "bigvgan_generator.pt")
    return folder


def shake(network):
    """Weights of such a size that every part is heard in the output."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight_g"):
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5 if "weight" in name else 0.2)
    return network


def add_weight_norm(state):
    """Every convolution's weight as the published pair: a direction of any length, and the length."""
    pairs = {}
    for key, value in state.items():
        if key.endswith(".weight"):
            pairs |= {key + "_g": value.norm(dim=(1, 2), keepdim=True), key + "_v": 3 * value}
        else:
            pairs[key] = value
    return pairs


def ids_and_mask(rows):
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


# Frozen


def frozen_parent():
    parent = nn.ModuleDict(
        {"head": nn.Linear(4, 4), "frozen": frozen.Frozen(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))}
    )
    parent["frozen"].module.register_buffer("table", torch.zeros(3))
    return parent


def test_frozen_is_in_no_state_dict_and_no_parameters_of_its_parent():
    parent = frozen_parent()
    assert set(parent.state_dict()) == {"head.weight", "head.bias"}
    assert len(list(parent.parameters())) == 2 and not list(parent.buffers())
    parent.load_state_dict(parent.state_dict(), strict=True)


def test_frozen_stays_in_eval_and_without_gradient_whatever_its_parent_does():
    parent = frozen_parent()
    parent.train()
    parent.requires_grad_(True)
    parent["frozen"].train().requires_grad_(True)
    x = torch.randn(8, 4, requires_grad=True)
    first, second = parent["frozen"](x), parent["frozen"](x)
    assert torch.equal(first, second) and not first.requires_grad
    assert not parent["frozen"].training and not any(
        p.requires_grad for p in parent["frozen"].module.parameters()
    )
    assert parent["head"].training and parent["head"].weight.requires_grad


def test_frozen_moves_with_its_parent():
    parent = frozen_parent().to(torch.float64)
    assert parent["frozen"].module[0].weight.dtype == parent["frozen"].module.table.dtype == torch.float64
    assert parent.to("meta")["frozen"].module[0].weight.is_meta


def test_frozen_survives_deepcopy_as_an_equal_of_its_own():
    parent = frozen_parent()
    twin, x = copy.deepcopy(parent), torch.randn(2, 4)
    assert (
        torch.equal(twin["frozen"](x), parent["frozen"](x))
        and twin["frozen"].module is not parent["frozen"].module
    )


# Text encoders


def test_a_folder_gives_the_frozen_encoder_that_was_saved_there(t5_folder):
    encoder, tokenizer, width = text_encoder.load_text_encoder(str(t5_folder))
    reference = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    encoder.train()
    ids, mask = ids_and_mask(text_encoder.tokenize(tokenizer, ["to be or not", "ja"]))
    out = encoder(ids, mask)
    assert (
        out.shape == (*ids.shape, width)
        and width == 32
        and out.dtype == torch.float32
        and not out.requires_grad
    )
    torch.testing.assert_close(out, reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state)
    assert not encoder.state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_frozen_encoder_is_bf16_on_a_gpu_and_gives_float32(t5_folder):
    parent = nn.ModuleDict({"encoder": text_encoder.load_text_encoder(str(t5_folder))[0]}).to("cuda")
    assert parent["encoder"].module.stack.embed_tokens.weight.dtype == torch.bfloat16
    out = parent["encoder"](
        torch.tensor([[100, 1]], device="cuda"), torch.ones(1, 2, dtype=torch.bool, device="cuda")
    )
    assert out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("scratch", [False, True])
def test_padding_does_not_reach_the_encoding_of_the_text(t5_folder, scratch):
    encoder, tokenizer, _ = text_encoder.load_text_encoder("scratch" if scratch else str(t5_folder))
    texts = ["a", "a much longer sentence", ""]
    rows = text_encoder.tokenize(tokenizer, texts)
    ids, mask = ids_and_mask(rows)
    together = encoder(ids, mask)
    for i, row in enumerate(rows):
        alone = encoder(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[0]
        torch.testing.assert_close(together[i, : len(row)], alone, rtol=1e-4, atol=1e-5)


def test_scratch_trains_every_parameter_and_names_each_once():
    encoder, tokenizer, width = text_encoder.load_text_encoder("scratch")
    ids, mask = ids_and_mask(text_encoder.tokenize(tokenizer, ["hello", "ü"]))
    encoder(ids, mask).square().sum().backward()
    assert width == 192 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    assert len(encoder.state_dict()) == len(list(encoder.parameters()))
    assert ids.max() < 384 and sum(p.numel() for p in encoder.parameters()) < 2e6


def test_tokens_are_bytes_and_an_end_and_markup_is_text():
    tokenizer = text_encoder.load_text_encoder("scratch")[1]
    assert text_encoder.tokenize(tokenizer, ["ab", "", "é"]) == [[100, 101, 1], [1], [198, 172, 1]]
    assert text_encoder.tokenize(tokenizer, ["</s>"]) == [[*(3 + byte for byte in b"</s>"), 1]]
    assert text_encoder.tokenize(tokenizer, []) == []


def test_a_sentencepiece_t5_is_read_too(tmp_path):
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁the", "s"]
    transformers.T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    ).save_pretrained(tmp_path)
    shape = transformers.T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(shape).save_pretrained(tmp_path)
    _, tokenizer, width = text_encoder.load_text_encoder(str(tmp_path))
    assert width == 16 and text_encoder.tokenize(tokenizer, ["the", ""]) == [[4, 1], [1]]


def test_a_hub_id_out_of_reach_is_refused_with_the_remedies_and_without_another_call(monkeypatch):
    called = []

    def no_network(request, *_, **__):
        called.append(str(request.url))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.get_session(), "send", no_network)
    monkeypatch.setattr(frozen, "hub_unreachable", lambda: True)
    with pytest.raises(UserError, match="nobody/no-such-t5.*folder.*scratch"):
        text_encoder.load_text_encoder("nobody/no-such-t5")
    with pytest.raises(UserError, match="nobody/no-such-vocoder"):
        bigvgan.load_vocoder("nobody/no-such-vocoder", MEL, "cpu")
    # the client's own questions, about itself, are its own affair
    assert not [url for url in called if "no-such" in url]


def test_a_hub_that_does_not_answer_is_called_once(monkeypatch):
    called = []

    def hang_up(server: socket.socket) -> None:
        while True:
            connection, address = server.accept()
            called.append(address)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=hang_up, args=[server], daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        assert frozen.hub_unreachable.__wrapped__()
    assert len(called) == 1


def damage(folder, what):
    if what == "truncated weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
    elif what == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    elif what == "a layer missing":
        shape = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(shape | {"num_layers": 3}))
    elif what == "broken config":
        (folder / "config.json").write_text("{")
    elif what == "another network":
        shape = transformers.BertConfig(
            vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        transformers.BertModel(shape).save_pretrained(folder)
    elif what == "nothing there":
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    "what",
    [
        "truncated weights",
        "no tokenizer",
        "a layer missing",
        "broken config",
        "another network",
        "nothing there",
    ],
)
def test_a_damaged_text_encoder_is_refused_in_one_line(t5_folder, tmp_path, what):
    for path in t5_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path, what)
    with pytest.raises(UserError) as refusal:
        text_encoder.load_text_encoder(str(tmp_path))
    line = str(refusal.value)
    assert str(tmp_path) in line and "scratch" in line and "\n" not in line


# Vocoders


@pytest.mark.skipif(importlib.util.find_spec("bigvgan") is None, reason="needs the package bigvgan")
@pytest.mark.parametrize("shape", [SNAKEBETA, SNAKE], ids=["AMPBlock1, snakebeta", "AMPBlock2, snake"])
def test_bigvgan_equals_nvidias(tmp_path, shape):
    from bigvgan import BigVGAN
    from bigvgan.env import AttrDict

    torch.manual_seed(1)
    reference = shake(BigVGAN(AttrDict(shape))).eval()
    reference.conv_post.weight_g.data.mul_(0.1)
    vocode = bigvgan.load_vocoder(str(save_bigvgan(tmp_path, shape, reference.state_dict())), MEL, "cpu")
    log_mel = torch.randn(23, 10)
    with torch.no_grad():
        expected = reference(log_mel.T[None])[0, 0]
    # neither silent nor all at the clamp
    assert expected.std() > 0.1 and (expected.abs() < 0.99).float().mean() > 0.5
    torch.testing.assert_close(vocode([log_mel])[0], expected, rtol=0, atol=1e-5)


def test_the_published_22khz_shape_has_the_published_number_of_weights():
    shape = SNAKEBETA | {
        "upsample_rates": [4, 4, 2, 2, 2, 2],
        "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
        "upsample_initial_channel": 1536,
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "num_mels": 80,
    }
    with torch.device("meta"):
        assert sum(p.numel() for p in bigvgan.BigVGAN(shape).parameters()) == 112_199_472


@pytest.mark.parametrize("name", ["griffinlim", "bigvgan"])
def test_a_vocoder_gives_hop_samples_a_frame_within_one(name, bigvgan_folder):
    vocode = bigvgan.load_vocoder(str(bigvgan_folder) if name == "bigvgan" else name, MEL, "cpu")
    log_mel = torch.randn(37, 10, dtype=torch.bfloat16, requires_grad=True)
    wave = vocode([log_mel])[0]
    assert (
        wave.shape == (37 * 16,)
        and wave.dtype == torch.float32
        and not wave.requires_grad
        and wave.abs().max() <= 1
    )
    assert wave.std() > 0 and torch.equal(wave, vocode([log_mel])[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wave, vocode([log_mel])[0])


def test_bigvgan_vocodes_a_batch_as_its_clips():
    torch.manual_seed(2)
    generator, batch = shake(bigvgan.BigVGAN(SNAKE)), torch.randn(3, 5, 10)
    with torch.no_grad():
        torch.testing.assert_close(
            generator(batch), torch.stack([generator(clip) for clip in batch]), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("shape", [SNAKEBETA, SNAKE], ids=["AMPBlock1, snakebeta", "AMPBlock2, snake"])
def test_bigvgan_makes_clips_of_any_lengths_in_a_batch_as_alone(shape):
    torch.manual_seed(3)
    generator = shake(bigvgan.BigVGAN(shape)).eval().double()
    for shortest in (2 * generator.reach, generator.reach):  # those that are too short are made alone
        clips = [torch.randn(shortest + more, 10, dtype=torch.float64) for more in (0, 70, 3, 41)]
        with torch.no_grad():
            pairs = zip(generator.batch(clips), map(generator, clips), strict=True)
            for found, alone in pairs:
                torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [SNAKEBETA, SNAKE], ids=["AMPBlock1, snakebeta", "AMPBlock2, snake"])
def test_bigvgan_hears_as_far_as_it_says_and_not_farther(shape):
    torch.manual_seed(4)
    generator = shake(bigvgan.BigVGAN(shape)).eval().double()
    reach = generator.reach
    clip = torch.randn(3 * reach, 10, dtype=torch.float64)
    other = clip.clone()
    other[2 * reach :] += 1
    with torch.no_grad():
        changed = (generator(clip) - generator(other)).abs()
    first = changed.nonzero()[0].item() / generator.hop
    assert reach <= first < 1.6 * reach


def test_weights_load_with_and_without_weight_norm_alike(tmp_path_factory, bigvgan_folder):
    state = bigvgan.fold_weight_norm(torch.load(bigvgan_folder / "bigvgan_generator.pt")["generator"])
    folded = save_bigvgan(tmp_path_factory.mktemp("folded"), SNAKEBETA, state)
    vocode_folded, vocode = (
        bigvgan.load_vocoder(str(folder), MEL, "cpu") for folder in (folded, bigvgan_folder)
    )
    log_mel = torch.randn(5, 10)
    assert not any(key.endswith(("_g", "_v")) for key in state)
    assert torch.equal(vocode_folded([log_mel])[0], vocode([log_mel])[0])


def test_the_low_pass_keeps_what_lies_below_a_quarter_of_the_rate_and_stops_what_lies_above():
    # at 0, 0.001, ... 0.5 cycles a sample
    response = torch.fft.rfft(bigvgan.LowPassFilter().filter[0, 0], 1000).abs()
    assert (
        (response[:101] - 1).abs().max() < 0.02 and response[401:].max() < 0.02 and 0.4 < response[250] < 0.6
    )


@pytest.mark.parametrize(
    "knob, key",
    [
        ("sample_rate", "sampling_rate"),
        ("hop", "hop_size"),
        ("n_fft", "n_fft"),
        ("n_mels", "num_mels"),
        ("fmin", "fmin"),
        ("fmax", "fmax"),
    ],
)
def test_a_vocoder_for_another_mel_is_refused_by_the_differing_key(bigvgan_folder, knob, key):
    other = dataclasses.replace(
        MEL, **{knob: getattr(MEL, knob) / 2 + 1 if knob.startswith("f") else getattr(MEL, knob) * 2}
    )
    with pytest.raises(UserError, match=f"config.json.* {key} "):
        bigvgan.load_vocoder(str(bigvgan_folder), other, "cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"resblock": "3"},
        {"activation": "relu"},
        {"snake_logscale": False},
        {"upsample_rates": [4, 2, 4]},
        {"upsample_rates": "many"},
        {"upsample_kernel_sizes": [8, 4]},
        {"fmax": "high"},
        {"win_size": 32},
    ],
)
def test_a_config_that_is_no_bigvgan_of_ours_is_refused(bigvgan_folder, change):
    (bigvgan_folder / "config.json").write_text(json.dumps(SNAKEBETA | change))
    with pytest.raises(UserError, match="config.json"):
        bigvgan.load_vocoder(str(bigvgan_folder), MEL, "cpu")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
def test_a_config_that_is_not_a_config_is_refused(bigvgan_folder, text):
    (bigvgan_folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="config.json"):
        bigvgan.load_vocoder(str(bigvgan_folder), MEL, "cpu")


class Command:
    """A pickle of this would run `print` when unpickled without care."""

    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.mark.parametrize(
    "what",
    [
        "truncated",
        "empty",
        "text",
        "a command",
        "no generator",
        "not a dict",
        "key missing",
        "key too many",
        "other shape",
    ],
)
def test_a_file_that_is_not_the_weights_is_refused(bigvgan_folder, capsys, what):
    path = bigvgan_folder / "bigvgan_generator.pt"
    whole, state = path.read_bytes(), torch.load(path)["generator"]
    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1",
        "a command": pickle.dumps({"generator": Command()}, protocol=2),
        "no generator": {"model": state},
        "not a dict": [1, 2],
        "key missing": {"generator": {key: value for key, value in state.items() if key != "conv_pre.bias"}},
        "key too many": {"generator": state | {"extra": torch.zeros(1)}},
        "other shape": {"generator": state | {"conv_pre.bias": torch.zeros(3)}},
    }[what]
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    with pytest.raises(UserError) as refusal:
        bigvgan.load_vocoder(str(bigvgan_folder), MEL, "cpu")
    assert "bigvgan_generator.pt" in str(refusal.value) and "\n" not in str(refusal.value)
    assert "never" not in capsys.readouterr().out


def test_a_missing_folder_or_file_is_refused(bigvgan_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "hub_unreachable", lambda: True)
    with pytest.raises(UserError, match="no-such-folder"):
        bigvgan.load_vocoder(str(tmp_path / "no-such-folder"), MEL, "cpu")
    (bigvgan_folder / "bigvgan_generator.pt").unlink()
    with pytest.raises(UserError, match="bigvgan_generator.pt: no such file"):
        bigvgan.load_vocoder(str(bigvgan_folder), MEL, "cpu")
