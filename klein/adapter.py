"""Adapters as files: whatever diffusers' loader takes is read; its layout, peft's and ComfyUI's are written.

A layer that was read is {"A": (r, in), "B": (out, r), "alpha": float}, by its path in the network.
"""

import json
import math
import re
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
import torch.nn as nn

from config import DAMAGE, UserError
from corpora import shards
from klein.lora import LoRA, add_lora, remove_lora
from pretrained import frozen

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' file name
PEFT_WEIGHTS = "adapter_model.safetensors"
OTHER_WEIGHTS = re.compile("scheduler|optimizer|checkpoint")  # in a file's name: diffusers takes it for none
KEY_PREFIXES = {
    "transformer.": "transformer",
    "diffusion_model.": "transformer",
    "text_encoder.": "text_encoder",
    "base_model.model.": None,
}
KEY_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}
ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)")  # peft's, as in .lora_A.default.weight


def read_adapter(name: str) -> dict[str, dict]:
    """Read an adapter in any layout that diffusers' loader takes, with diffusers' names of modules.

    name: a folder, a .safetensors file or a hub id.
    returns: {"transformer": {path: {"A", "B", "alpha"}}, "text_encoder": the same, if there is one}.
    raises UserError for what is no adapter, half of one, or not finite.
    """
    file = find_weights(name)
    adapter = read_layers(file, "transformer")
    source = str(file.parent) if Path(name).exists() else name
    try:
        frozen.find_file(source, "text_encoder/adapter_config.json")
    except UserError:
        return adapter  # most have no text encoder
    text_file = frozen.find_file(source, f"text_encoder/{PEFT_WEIGHTS}")
    return adapter | read_layers(text_file, "text_encoder")


def find_weights(name: str) -> Path:
    """An adapter's file: `name`, or in a folder or repository that of a usual name, or else the only one."""
    if name.endswith(".safetensors"):
        return Path(name)
    files = [file for file in list_weights(name) if not OTHER_WEIGHTS.search(file)]
    usual = [file for file in (PEFT_WEIGHTS, LORA_WEIGHTS) if file in files]
    found = usual[:1] or files or [LORA_WEIGHTS]
    if len(found) > 1:
        raise UserError(f"{name}: which adapter? give one of its files: {', '.join(found)}")
    return frozen.find_file(name, found[0])


def list_weights(name: str) -> list[str]:
    """The .safetensors files at the top of the folder or hub repository `name`; [] where nobody knows."""
    if Path(name).is_dir():
        return sorted(path.name for path in Path(name).glob("*.safetensors"))
    if frozen.hub_unreachable():
        return []
    try:
        files = huggingface_hub.list_repo_files(name)
    except Exception:  # `frozen.find_file` says what is wrong
        return []
    return [file for file in files if file.endswith(".safetensors") and "/" not in file]


def read_layers(file: Path, peft_part: str) -> dict[str, dict]:
    """What `read_adapter` returns, of one file.

    peft_part: the part that peft's keys, base_model.model., belong to: they do not say it.
    """
    tensors, header = read_safetensors(file)
    settings = read_peft_settings(file, header, peft_part)
    adapter = {}
    for key, tensor in tensors.items():
        plain = ADAPTER_NAME.sub("", key)
        prefix = next((p for p in KEY_PREFIXES if plain.startswith(p)), "")
        ending = next((e for e in KEY_SUFFIXES if plain.endswith(e)), "")
        if not ending:
            raise UserError(
                f"{file}: {key} is no tensor of an adapter that is known here; "
                "keys are transformer.MODULE.lora_A.weight"
            )
        if tensor.is_complex():
            raise UserError(f"{file}: {key} has complex numbers: the adapter is damaged")
        if not tensor.float().isfinite().all():
            raise UserError(f"{file}: {key} is not finite (nan or infinity): the adapter is damaged")
        part = KEY_PREFIXES.get(prefix) or peft_part
        path = plain[len(prefix) : -len(ending)]
        name = KEY_SUFFIXES[ending]  # A, B or alpha
        layer = adapter.setdefault(part, {}).setdefault(path, {})
        if name in layer:
            raise UserError(f"{file}: {key} is there under another name too; one adapter a file")
        layer[name] = tensor
    if not adapter:
        raise UserError(f"{file}: holds no adapter")
    for part, layers in adapter.items():
        for path, layer in layers.items():
            complete_layer(file, path, layer, settings.get(part, {}))
    converted = {}
    for path, layer in adapter.pop("transformer", {}).items():
        converted |= convert_layer(path, layer)
    return {"transformer": converted} | adapter if converted else adapter


def convert_layer(path: str, layer: dict) -> dict[str, dict]:
    """A layer by diffusers' names: three where Black Forest Labs and kohya have one for Q, K and V.

    A name that diffusers does not know stays as it is.
    """
    import diffusers  # takes seconds

    if re.search(r"\d{4}", path):
        return {path: layer}  # diffusers would count up to it
    diffusers.logging.set_verbosity_error()  # `check_adapter` says what no layer is called
    A = layer["A"]
    B = layer["B"]
    rank = len(A)
    if path.startswith("lora_unet_"):  # kohya's; this alpha multiplies by 1
        ones = torch.tensor(float(rank))
        tensors = {f"{path}.lora_down.weight": A, f"{path}.lora_up.weight": B, f"{path}.alpha": ones}
    else:
        tensors = {f"diffusion_model.{path}.lora_A.weight": A, f"diffusion_model.{path}.lora_B.weight": B}
    try:
        tensors = diffusers.Flux2KleinPipeline.lora_state_dict(tensors)
    except Exception:  # of what is no layer of Klein's it says so in every way there is
        return {path: layer}
    layers = {}
    for key, tensor in tensors.items():
        new_path, _, ending = key.removeprefix("transformer.").rpartition(".lora_")
        name = ending[0]  # A or B
        layers.setdefault(new_path, {})[name] = tensor
    for new_layer in layers.values():
        share = len(new_layer["A"]) / rank  # of the ranks: kohya's Q, K and V may have a third each
        new_layer["alpha"] = layer["alpha"] * share
    return layers or {path: layer}


def read_peft_settings(file: Path, header: dict[str, str], peft_part: str) -> dict[str, dict]:
    """The fields of LoraConfig by part, from the file's header or from the adapter_config.json beside it."""
    settings = {}
    try:
        metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
        for key, value in metadata.items():
            part, _, field = key.partition(".")
            fields = settings.setdefault(part, {})
            fields[field] = value
        if file.name == PEFT_WEIGHTS:
            config_file = file.with_name("adapter_config.json")
            settings[peft_part] = dict(json.loads(config_file.read_text(encoding="utf-8")))
    except (OSError, *DAMAGE) as e:
        reason = frozen.one_line(e)
        raise UserError(f"{file}: the adapter's settings cannot be read ({reason})") from e
    return settings


def complete_layer(file: Path, path: str, layer: dict, settings: dict) -> None:
    """Set the layer's alpha to a float; raises UserError where A and B are not a pair."""
    missing = torch.empty(0)
    A = layer.get("A", missing)  # (r, in)
    B = layer.get("B", missing)  # (out, r)
    are_matrices = A.dim() == B.dim() == 2
    if not are_matrices or not 0 < len(A) == B.shape[1]:
        raise UserError(
            f"{file}: {path} lacks one of its two matrices, or they do not fit each other: half an adapter"
        )
    try:
        layer["alpha"] = float(layer.get("alpha", peft_alpha(settings, path, len(A))))
        if not math.isfinite(layer["alpha"]):
            raise ValueError("not finite")
    except (RuntimeError, re.error, *DAMAGE) as e:
        reason = frozen.one_line(e)
        raise UserError(f"{file}: the alpha of {path} cannot be read ({reason})") from e


def peft_alpha(settings: dict, path: str, rank: int) -> float:
    """A layer's alpha by peft's settings; where they say nothing it is the rank, as everywhere."""
    patterns = settings.get("alpha_pattern", {})
    matches = [value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    alpha = matches[0] if matches else settings.get("lora_alpha", rank)
    if settings.get("use_rslora"):
        return alpha * math.sqrt(rank)
    return alpha


def check_adapter(root: nn.Module, layers: dict[str, dict], where: str) -> None:
    """raises UserError where `root` has no such layer or one of another size."""
    linear_layers = {}
    for path, module in root.named_modules():
        if type(module) is nn.Linear:
            path = path.removesuffix(".base")
            linear_layers[path] = module
    for path, layer in layers.items():
        if path not in linear_layers:
            raise UserError(f"{where} has no linear layer {path}: an adapter of another network")
        shape = tuple(linear_layers[path].weight.shape)
        adapter_shape = (layer["B"].shape[0], layer["A"].shape[1])  # (out, in)
        if shape != adapter_shape:
            raise UserError(f"{where}: {path} is {shape}, the adapter's {adapter_shape}: one of another size")


def apply_adapter(root: nn.Module, layers: dict[str, dict]) -> None:
    """Put the layers of `read_adapter` in place of the LoRA of `root`."""
    remove_lora(root)
    for path, layer in layers.items():
        A = layer["A"]
        add_lora(root, {path: len(A)}, layer["alpha"])
        lora = root.get_submodule(path)
        with torch.no_grad():
            lora.A.copy_(A)
            lora.B.copy_(layer["B"])


def peft_settings(layers: dict[str, LoRA]) -> dict:
    """Rank and alpha as fields of peft's LoraConfig: without these a reader takes alpha to be the rank."""
    first = next(iter(layers.values()))
    rank = len(first.A)
    rank_pattern = {path: len(lora.A) for path, lora in layers.items() if len(lora.A) != rank}
    alpha_pattern = {path: lora.alpha for path, lora in layers.items() if lora.alpha != first.alpha}
    return {
        "r": rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(layers),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def write_tensors(path: Path, layers: dict[str, LoRA], header: dict, folded: bool = False) -> None:
    """folded: alpha / r multiplied into B, for ComfyUI, which reads no settings."""
    tensors = {}
    for name, lora in layers.items():
        B = lora.B.detach().cpu()
        tensors[f"{name}.lora_A.weight"] = lora.A.detach().cpu()
        tensors[f"{name}.lora_B.weight"] = B * lora.scale if folded else B
    with shards.atomic_write(path) as part:
        safetensors.torch.save_file(tensors, part, {"format": "pt", **header})


def write_peft(folder: Path, layers: dict[str, LoRA], base: str) -> None:
    """The text encoder's adapter as a folder of peft, since diffusers' own format has no place for it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{path}": lora for path, lora in layers.items()}
    write_tensors(folder / PEFT_WEIGHTS, tensors, {})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        **peft_settings(layers),
    }
    with shards.atomic_write(folder / "adapter_config.json") as part:
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_safetensors(path: Path) -> tuple[dict, dict]:
    """All tensors of a file by their keys, and the metadata in its header, texts by keys."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            keys = f.keys()
            tensors = {key: f.get_tensor(key) for key in keys}
            return tensors, f.metadata() or {}
    except (OSError, safetensors.SafetensorError) as e:
        reason = frozen.one_line(e)
        raise UserError(f"{path}: not a safetensors file ({reason})") from e
