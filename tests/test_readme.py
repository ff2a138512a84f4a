"""What the README says of the tree is so: its walks, its files, its commands."""

import ast
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)\)")
WALK = re.compile(r"^- \*(.+?)\* (.+)$", re.MULTILINE)
WALKS = {question: LINK.findall(way) for question, way in WALK.findall(README)}
COMMAND = re.compile(r"^python (?:-m ([\w.]+)|([\w/.]+\.py)) (.*?)(?: +#.*)?$", re.MULTILINE)
COMMANDS = COMMAND.findall(README)


def definitions(path: str) -> set[str]:
    """Names of functions, by their file as well, and of methods."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            stem = path.rpartition("/")[2].removesuffix(".py")
            found |= {node.name, f"{stem}.{node.name}"}
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_there_are_four_walks():
    assert len(WALKS) == 4


@pytest.mark.parametrize("question", WALKS)
def test_a_walk_has_at_most_three_hops_and_ends_at_a_function(question):
    hops = WALKS[question]
    assert 2 <= len(hops) <= 3
    for name, path in hops:
        assert name in definitions(path), f"{path} has no {name}"


def test_the_tree_names_every_file_and_folder_of_the_root():
    tree = re.search(r"```\n(train\.py .*?)```", README, re.DOTALL)[1]
    named = set(re.findall(r"[\w]+(?:\.py|/)", tree))
    made = {"data/", "out/", "wandb/"}
    there = {path.name for path in ROOT.glob("*.py")}
    for path in ROOT.iterdir():
        if path.is_dir() and not path.name.startswith((".", "__")):
            there.add(f"{path.name}/")
    assert there - made <= named


@pytest.mark.parametrize("module, script, words", COMMANDS)
def test_what_a_command_starts_and_names_is_there(module, script, words):
    path = script or module.replace(".", "/") + ".py"
    assert (ROOT / path).is_file()
    for config in re.findall(r"configs/[\w]+\.yaml", words):
        assert (ROOT / config).is_file()
