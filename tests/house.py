"""The house in figures: `python tests/house.py [TREE]` prints a table of a tree's modules, and what deleting
a system would take.

A code line has something on it besides a comment or a docstring; its density is syntax nodes a code line,
over a whole module. For comparison: nanoGPT 10.0, nanochat 9.3, DiT 9.9, F5-TTS 7.9, flux2 8.0. Functions of
tests/test_architecture.py.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ("klein", "music", "speech2image")
SUPPORT = ("corpora", "pretrained", "tracking")
COMMANDS = ("bench", "records")  # folders of what is started, and imported by nothing else
LOOP = ("train", "main")  # the one function that may be long
DEFINITION = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
COUNT_FIELDS = "import config as c; print(len(c.keys(getattr(c, 'TTSConfig', c.Config))))"


@dataclass(frozen=True)
class Module:
    """A Python file by its dotted name."""

    name: str
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def system(self) -> str:
        """The folder of the system that it belongs to; "" for the root and its support."""
        first = self.name.split(".")[0]
        return first if first in SYSTEMS else ""

    @cached_property
    def code_lines(self) -> int:
        docstrings = set()
        for node in ast.walk(self.tree):
            documented = isinstance(node, (ast.Module, *DEFINITION)) and ast.get_docstring(node) is not None
            if documented:
                docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        count = 0
        for number, line in enumerate(self.source.splitlines(), 1):
            text = line.strip()
            count += bool(text) and not text.startswith("#") and number not in docstrings
        return count

    @cached_property
    def density(self) -> float:
        """Syntax nodes a code line."""
        nodes = sum(1 for _ in ast.walk(self.tree))
        return nodes / max(1, self.code_lines)

    def wide_lines(self, columns: int) -> list[int]:
        """Numbers of the lines that are longer."""
        return [n for n, line in enumerate(self.source.splitlines(), 1) if len(line) > columns]

    def functions(self) -> dict[str, int]:
        """How many lines each function has, the loop aside."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, FUNCTION) and (self.name, node.name) != LOOP:
                found[node.name] = max(found.get(node.name, 0), node.end_lineno - node.lineno + 1)
        return found

    def imports(self) -> set[str]:
        """Dotted names of what it imports, also in functions; `from a import b` counts as a and as a.b."""
        commands = set()  # what `python FILE.py` runs stands above all rooms
        for node in self.tree.body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                commands |= set(ast.walk(node))
        found = set()
        for node in ast.walk(self.tree):
            if node in commands:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found

    def hard_to_read(self) -> list[str]:
        """Places that want a second reading: the lines and what is there."""
        found = []
        for node in ast.walk(self.tree):
            place = f"{self.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                if isinstance(node.value, ast.Tuple) and not is_swap(node):
                    found.append(f"{place}: a tuple of unrelated things is assigned")
                if isinstance(node.value, COMPREHENSION):
                    found.append(f"{place}: a comprehension is unpacked")
            if isinstance(node, COMPREHENSION):
                inner = [part for part in ast.walk(node) if isinstance(part, COMPREHENSION)]
                if len(inner) > 1 or len(node.generators) > 1:
                    found.append(f"{place}: a comprehension in a comprehension")
            if isinstance(node, ast.NamedExpr):
                found.append(f"{place}: a walrus inside an expression")
        return found


def is_swap(node: ast.Assign) -> bool:
    """a, b = b, a."""
    names = [ast.unparse(part) for part in node.targets[0].elts]
    return [ast.unparse(part) for part in node.value.elts] == names[::-1]


def modules(root: Path = ROOT) -> list[Module]:
    """All modules but the tests, the root's first."""
    paths = sorted(root.glob("*.py"))
    for folder in (*SUPPORT, "assets", *SYSTEMS, *COMMANDS):
        paths += sorted((root / folder).glob("*.py"))
    return [Module(".".join(path.relative_to(root).with_suffix("").parts), path) for path in paths]


def arrows(found: list[Module]) -> list[tuple[str, str]]:
    """Imports between modules of the tree, as (from, to)."""
    names = {module.name for module in found}
    edges = []
    for module in found:
        edges += [(module.name, other) for other in sorted(module.imports() & names)]
    return edges


def known_by(system: str, found: list[Module]) -> list[str]:
    """The modules outside its folder that name a system's modules: what is to be opened to delete it."""
    names = []
    for module in found:
        imported = any(name.split(".")[0] == system for name in module.imports())
        if module.system != system and (imported or f'"{system}.' in module.source):
            names.append(module.name)
    return names


def fields_of_text_to_speech(root: Path) -> str:
    """How many knobs a user of text-to-speech meets."""
    done = subprocess.run([sys.executable, "-c", COUNT_FIELDS], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "?"


def figures(root: Path, found: list[Module]) -> dict[str, str]:
    """The tree as a whole."""
    system_of = {module.name: module.system for module in found}
    between = []
    for source, target in arrows(found):
        if system_of[source] and system_of[target] not in ("", system_of[source]):
            between.append(source)
    functions = [max(module.functions().values(), default=0) for module in found]
    wide = [len(module.wide_lines(100)) for module in found]
    of_speech = [module.code_lines for module in found if not module.system]
    rows = {
        "densest module": f"{max(module.density for module in found):.1f} nodes a line",
        "lines over 100 characters": str(sum(wide)),
        "longest function but the loop": f"{max(functions)} lines",
    }
    for system in SYSTEMS:
        rows[f"modules to open to delete {system}"] = ", ".join(known_by(system, found)) or "none"
    return rows | {
        "config fields of text-to-speech": fields_of_text_to_speech(root),
        "import arrows between systems": str(len(between)),
        "code lines of text-to-speech and the loop": f"{sum(of_speech):,}",
        "code lines in all": f"{sum(module.code_lines for module in found):,}",
    }


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    found = modules(root)
    print("| module | code lines | nodes a line | lines over 100 | longest function |\n|---|---|---|---|---|")
    for module in found:
        wide = len(module.wide_lines(100))
        longest = max(module.functions().values(), default=0)
        print(f"| {module.name} | {module.code_lines} | {module.density:.1f} | {wide} | {longest} |")
    print("\n| the tree | |\n|---|---|")
    for name, value in figures(root, found).items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
