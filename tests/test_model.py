"""The mel flow Transformer: what it may depend on, and what it may not."""

import dataclasses

import pytest
import torch

import config as configs
import model
import system
from config import Sample

TINY = {"model": {"text_encoder": "scratch", "width": 32, "layers": 2, "heads": 2, "frame_stack": 2}, "train": {"dtype": "fp32"}}


def make(alignment="learned", predict="x", upsample_text=True):
    """A tiny network whose zero-initialised layers were filled, so that everything is connected."""
    values = {**TINY, "model": {**TINY["model"], "alignment": alignment, "upsample_text": upsample_text}, "flow": {"predict": predict}}
    network = system.build(configs.from_dict(values), -5.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return network


def make_batch(frames=(24, 16), text_lengths=(9, 5), pad=0, text_pad=0):
    """A batch whose valid part does not depend on its padding."""
    rows, generator = len(frames), torch.Generator().manual_seed(1)
    longest, longest_text = max(frames) + pad, max(text_lengths) + text_pad
    batch = {"x": torch.zeros(rows, longest, 80), "noise": torch.zeros(rows, longest, 80),
             "ids": torch.zeros(rows, longest_text, dtype=torch.long),
             "t": torch.linspace(0.2, 0.8, rows), "frames": torch.tensor(frames), "text_dropped": torch.zeros(rows, dtype=torch.bool),
             "x_mask": torch.arange(longest) < torch.tensor(frames)[:, None],
             "text_mask": torch.arange(longest_text) < torch.tensor(text_lengths)[:, None]}
    for row, (n, s) in enumerate(zip(frames, text_lengths)):
        batch["x"][row, :n] = torch.randn(n, 80, generator=generator)
        batch["noise"][row, :n] = torch.randn(n, 80, generator=generator)
        batch["ids"][row, :s] = torch.randint(3, 200, (s,), generator=generator)
    return batch


@pytest.mark.parametrize("alignment", ["learned", "uniform", "none"])
def test_padding_changes_no_loss_and_no_gradient(alignment):
    network = make(alignment)
    results = []
    for pad, text_pad in ((0, 0), (8, 16)):
        network.zero_grad()
        losses = network(make_batch(pad=pad, text_pad=text_pad))
        losses["loss"].backward()
        results.append((losses, {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}))
    (plain, gradients), (padded, padded_gradients) = results
    for name in plain:
        assert torch.allclose(plain[name], padded[name], atol=1e-5), name
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, padded_gradients[name], atol=1e-4), name


def test_the_batch_is_its_clips():
    network, batch = make(), make_batch()
    both = network(batch)["flow_loss_per_clip"]
    for row in range(2):
        alone = network({name: value[row:row + 1] for name, value in batch.items()})["flow_loss_per_clip"]
        assert torch.allclose(alone[0], both[row], atol=1e-5)


def test_self_attention_has_positions():
    """Without them, the frames of a clip could be permuted, and the output with them (the seed's defect)."""
    network = make("none", upsample_text=False)
    h = torch.randn(1, 6, 32)
    _, context = network.decoder.embed(torch.randn(1, 12, 80), torch.tensor([0.5]), torch.randn(1, 4, 32), torch.zeros(1, 4),
                                       torch.ones(1, 12, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool))
    block, order = network.decoder.blocks[0], torch.tensor([3, 1, 4, 0, 5, 2])
    assert not torch.allclose(block.look_around(h[:, order], context), block.look_around(h, context)[:, order], atol=1e-3)


def test_uniform_alignment_spreads_the_bytes_over_the_clip():
    network = make("uniform")
    text_mask = torch.tensor([[True] * 4 + [False] * 2])
    centres = network.align(torch.rand(1, 6), text_mask, torch.tensor([16]))           # 16 frames are 8 tokens
    assert torch.allclose(centres[0, :4], torch.tensor([1.0, 3.0, 5.0, 7.0]))


def test_the_flow_loss_moves_the_durations_when_they_are_learned():
    for alignment, moves in (("learned", True), ("uniform", False)):
        network = make(alignment)
        network(make_batch())["flow_loss"].backward()
        gradient = network.text.log_duration.weight.grad
        assert (gradient is not None and gradient.abs().max() > 0) == moves


def test_a_dropped_text_teaches_no_duration():
    network, batch = make(), make_batch()
    network(batch | {"text_dropped": torch.tensor([True, True])})["duration_loss"].backward()
    assert network.text.log_duration.weight.grad.abs().max() == 0


def test_predicted_length_grows_with_the_text():
    network = system.build(configs.from_dict(TINY))
    short, long = network.sample_log_mels([model.Prompt("Hi."), model.Prompt("Hi there, my dear old friend.")], Sample(euler_steps=1))[0]
    assert len(long) > 3 * len(short)


def test_upsampling_gives_every_token_the_text_spoken_there():
    text = torch.eye(4)[None]                                                          # byte s is the unit vector s
    centres, positions = torch.tensor([[1.0, 3.0, 5.0, 7.0]]), torch.arange(8) + 0.5
    mask = torch.ones(1, 8, dtype=torch.bool)
    weights = model.upsample(text, centres, positions, mask, mask[:, :4])[0]
    assert weights.argmax(-1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and torch.allclose(weights.sum(-1), torch.ones(8))


@pytest.mark.parametrize("predict", ["x", "v"])
def test_a_sample_depends_on_its_own_seed_and_text_alone(predict):
    network, settings = make(predict=predict), Sample(euler_steps=3, cfg_scale=2.0)
    first, second = model.Prompt("Two green hats.", seed=1), model.Prompt("A much longer line of text than that.", seed=2)
    together = network.sample_log_mels([first, second], settings)[0]
    alone = network.sample_log_mels([second], settings)[0][0]
    assert torch.allclose(together[1], alone, atol=1e-3)
    other = network.sample_log_mels([dataclasses.replace(second, seed=3)], settings)[0][0]
    assert not torch.allclose(other, alone, atol=1e-1)


def test_sampling_speaks_for_as_long_as_it_is_told():
    made = make().sample([model.Prompt("Hello.", seconds=0.5), model.Prompt("Hello.", seconds=1.0)], Sample(euler_steps=2))
    assert [round(len(a.wave) / a.sample_rate, 1) for a in made] == [0.5, 1.0]
    assert made[1].attention.shape == (43, 7) and torch.allclose(made[1].attention.sum(-1), torch.ones(43), atol=1e-4)


def test_a_block_starts_as_the_identity():
    network = system.build(configs.from_dict(TINY))
    h, context = network.decoder.embed(torch.randn(2, 8, 80), torch.rand(2), torch.randn(2, 3, 32), torch.rand(2, 3),
                                       torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(network.decoder.blocks[0](h, torch.randn(2, 3, 32), context), h)


def test_muon_gets_hidden_matrices_only():
    network = make()
    names = {id(p): name for name, p in network.named_parameters()}
    hidden = {names[id(p)] for p in network.hidden_matrices()}
    assert "decoder.blocks.0.mlp.up.weight" in hidden and all(p.dim() == 2 for p in network.hidden_matrices())
    for outer in ("decoder.in_proj.weight", "decoder.out_proj.weight", "decoder.modulation.weight", "text.log_duration.weight",
                  "decoder.blocks.0.table"):
        assert outer not in hidden, outer


def test_a_handful_is_learned_by_heart():
    network = system.build(configs.from_dict(TINY))
    batch, optimizer = make_batch(), torch.optim.AdamW(network.parameters(), lr=1e-2)
    batch["t"] = torch.tensor([0.7, 0.9])
    first = network(batch)["flow_loss"].item()
    for _ in range(60):
        optimizer.zero_grad()
        network(batch)["loss"].backward()
        optimizer.step()
    assert network(batch)["flow_loss"].item() < 0.2 * first
