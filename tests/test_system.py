"""Checkpoints that cannot be trusted, names what is wrong; saving that is whole or absent; the average of the weights."""

import pickle
import shutil

import pytest
import torch

import config as configs
import system
from config import UserError
from conftest import options

CPU = torch.device("cpu")
SHAPE = {"model": {"text_encoder": "scratch", "width": 16, "layers": 1, "heads": 2, "frame_stack": 2}}


def refused(path) -> str:
    """What is said about a checkpoint that cannot be loaded, which begins with its name, in one line."""
    with pytest.raises(UserError) as e:
        system.load(str(path), CPU, {})
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
    return str(e.value).removeprefix(f"{path}: ")


@pytest.fixture
def good(run, tmp_path):
    """A copy of a trained checkpoint, to be spoiled."""
    return shutil.copy(system.newest_checkpoint(run), tmp_path / "x.pt")


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(good, left):
    whole = good.read_bytes()
    good.write_bytes(whole[:int(left * len(whole))])
    assert "truncated" in refused(good)


class Bomb:
    """What a malicious pickle is: loading it calls something, here the making of a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_its_code_does_not_run(tmp_path):
    path, trace = tmp_path / "x.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    assert "not written by nanoaudio" in refused(path)
    torch.save({"config": Bomb(trace), "model": {}, "step": 1}, path)
    assert "not written by nanoaudio" in refused(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02.", b"]e.", b"0", bytes(range(256))], ids=repr)
def test_a_file_of_anything_else_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    assert "not a readable checkpoint" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("state", [[1, 2], torch.zeros(3), {"model": {}}, {"config": {}, "model": {}, "step": 1}], ids=repr)
def test_a_torch_file_of_something_else_is_named(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    assert "not a nanoaudio checkpoint" in refused(tmp_path / "x.pt")


def test_a_missing_checkpoint_and_a_folder_without_any_are_named(tmp_path):
    assert "no such checkpoint" in refused(tmp_path / "x.pt")
    assert "holds no checkpoints" in refused(tmp_path)


@pytest.mark.parametrize("change, complaint", [
    (lambda state: state["config"]["model"].update(depth=3), "unknown key model.depth"),
    (lambda state: state["config"]["model"].update(width=16), "has shape"),
    (lambda state: state["config"]["model"].update(layers=1), "not part of this model"),
    (lambda state: state["config"]["model"].update(layers=3), "is missing"),
    (lambda state: state["config"]["model"].update(width="wide"), "must be int")])
def test_a_checkpoint_that_does_not_fit_its_config_is_named_with_the_first_difference(good, change, complaint):
    state = system.load_checkpoint(good)
    change(state)
    torch.save(state, good)
    assert complaint in refused(good)


def test_a_folder_is_its_newest_checkpoint_and_speaks_with_the_average(run):
    config, network, step = system.load(str(run), CPU, {"sample": {"euler_steps": 7}}, out_dir="elsewhere")
    state = system.load_checkpoint(run / "checkpoints" / "step_0000006.pt")
    assert (config.sample.euler_steps, config.out_dir, step, network.training) == (7, "elsewhere", 6, False)
    for name, p in network.named_parameters():
        assert torch.equal(p, state["ema"][name])
    assert not torch.equal(state["ema"]["decoder.out_proj.weight"], state["model"]["decoder.out_proj.weight"])


def test_a_run_is_not_resumed_with_another_shape(run):
    network = system.build(configs.from_dict(SHAPE))
    with pytest.raises(UserError, match=f"{run}.*step_0000006.pt: .*trained with another config"):
        system.resume(str(run), network, system.Average(network, 0.9), [])


def test_a_rate_changed_on_the_command_line_holds_after_resuming(run):
    values = {**SHAPE, "train": {"muon_lr": 0.5, "lr": 0.25}}
    config, network, _ = system.load(str(run), CPU, {"train": {"muon_lr": 0.5, "lr": 0.25}})
    optimizers = system.optimizers(network, config)
    assert system.resume(str(run), network, system.Average(network, 0.9), optimizers)[0] == 6
    assert [group["peak_lr"] for o in optimizers for group in o.param_groups] == [0.5, 0.25]
    assert all(o.state for o in optimizers)


def test_a_save_that_fails_leaves_the_older_checkpoint_whole(tmp_path):
    folder = tmp_path / "checkpoints"
    system.save_checkpoint(folder / "step_0000001.pt", {"config": {}, "model": {}, "ema": {}, "step": 1}, keep=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        system.save_checkpoint(folder / "step_0000002.pt", {"model": torch.zeros(1000), "step": lambda: 2}, keep=1)
    assert system.newest_checkpoint(tmp_path) == folder / "step_0000001.pt"
    assert system.load_checkpoint(folder / "step_0000001.pt")["step"] == 1


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 6):
        system.save_checkpoint(tmp_path / "checkpoints" / f"step_{step:07d}.pt", {"step": step}, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000004.pt", "step_0000005.pt"]


def test_weights_are_drawn_from_the_seed():
    one, same, other = (system.build(configs.from_dict({**SHAPE, "seed": seed})).decoder.in_proj.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# The average

@pytest.fixture
def layer():
    return torch.nn.Linear(1, 1, bias=False)


def test_the_average_forgets_its_start_soon_and_then_decays(layer):
    layer.weight.data.fill_(0.0)
    average, expected = system.Average(layer, 0.9), 0.0
    layer.weight.data.fill_(1.0)
    for step in range(200):
        average.update(step)
        decay = min(0.9, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay)
        if step == 0:
            assert expected == pytest.approx(0.9)
    assert average.mean["weight"].item() == pytest.approx(expected) and expected > 0.999
    layer.weight.data.fill_(0.0)
    average.update(200)
    assert average.mean["weight"].item() == pytest.approx(0.9, abs=1e-3)


def test_without_decay_the_average_is_the_weights(layer):
    average = system.Average(layer, 0.0)
    layer.weight.data.fill_(3.0)
    average.update(0)
    assert average.mean["weight"].item() == 3.0


def test_the_average_is_borrowed_and_given_back_bit_for_bit(layer):
    average = system.Average(layer, 0.9)
    layer.weight.data.add_(1 / 3)
    average.update(0)
    live, mean = layer.weight.clone(), average.mean["weight"].clone()
    with pytest.raises(ZeroDivisionError), average:
        assert torch.equal(layer.weight, mean) and not torch.equal(layer.weight, live)
        raise ZeroDivisionError
    assert torch.equal(layer.weight, live) and torch.equal(average.mean["weight"], mean)


def test_a_frozen_parameter_is_not_averaged():
    layers = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False))
    assert list(system.Average(layers, 0.9).mean) == ["0.weight", "0.bias"]


# Optimizers and devices

def test_every_trained_parameter_has_exactly_one_optimizer():
    config = configs.from_dict(SHAPE)
    network = system.build(config)
    given = [id(p) for o in system.optimizers(network, config) for group in o.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("alignment", ["learned", "uniform", "none"])
@pytest.mark.parametrize("upsample_text", ["true", "false"])
def test_every_trained_parameter_gets_a_gradient(tiny, alignment, upsample_text):
    """With one that gets none, several ranks cannot train: DistributedDataParallel waits for it."""
    config = configs.load("", options(tiny | {"alignment": alignment, "upsample_text": upsample_text}))
    corpus = system.open_corpus(config)
    network = system.build(config, corpus.mean, corpus.std)
    network(system.open_batches(config, corpus, network, 0, 1).train(0))["loss"].backward()
    assert not [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_in_words():
    with pytest.raises(UserError, match="--device cpu"):
        system.pick_device("cuda")
    assert system.pick_device("auto") == CPU
