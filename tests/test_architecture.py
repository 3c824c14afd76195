"""Who may import whom, no cycles, and the exact public names."""

import ast
from pathlib import Path

import trimtab

SOURCE = Path(trimtab.__file__).parent

# Top to bottom: a module may import only from lines below its own.
FLOORS = [
    "__main__",
    "cli",
    "console",
    "conversation",
    "support",
    "study",
    "prediction",
    "record_files",
    "estimate",
    "encoding",
    "report",
    "combining",
    "merging",
    "exporting",
    "publishing",
    "tuning",
    "untuned",
    "adapters",
    "precision",
    "generation",
    "sampling",
    "evaluation.evaluate",
    "job",
    "evaluation",
    "engine",
    "methods",
    "tasks",
    "models",
    "data",
    "fingerprints",
    "sources",
    "starters",
    "study_config",
    "machine",
    "runs",
    "cache",
    "progress",
    "errors",
]


def floor_of(module):
    """The longest entry of FLOORS that `module` lies in."""
    inside = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    assert inside, f"{module} has no place in FLOORS"
    return FLOORS.index(max(inside, key=len))


def imports():
    """(importer, imported) over the whole package, imports inside functions included."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        if name == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trimtab"):
                base = node.module.removeprefix("trimtab").removeprefix(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".strip(".")
                    is_module = (SOURCE / Path(*full.split("."))).is_dir() or (
                        SOURCE / Path(*full.split("."))
                    ).with_suffix(".py").is_file()
                    modules.append(full if is_module else base)
            elif isinstance(node, ast.Import):
                modules = [
                    alias.name.removeprefix("trimtab.") for alias in node.names if alias.name.startswith("trimtab.")
                ]
            for module in filter(None, modules):
                yield name, module


def test_imports_go_downward():
    upward = [
        f"{importer} imports {imported}" for importer, imported in imports() if floor_of(imported) < floor_of(importer)
    ]
    assert upward == []


def test_no_cycles():
    graph = {}
    for importer, imported in imports():
        # A package's own modules meet in its __init__, which imports them and is not imported back.
        if importer != imported and not importer.startswith(f"{imported}.") and not imported.startswith(f"{importer}."):
            graph.setdefault(importer, set()).add(imported)
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in graph.get(module, ()):
            visit(other)
        path.pop()
        done.add(module)

    for module in list(graph):
        visit(module)
    assert len(done) > 20


def test_public_names():
    assert trimtab.__all__ == ["InputError", "LoadedAdapter", "Merge", "RunError", "Sampling", "StudyConfig", "TrimtabError", "build_study",
                               "compare", "load_adapter", "merge", "read_predictions", "run"]  # fmt: skip
    for name in trimtab.__all__:
        assert getattr(trimtab, name).__doc__ or name.endswith("Error")


def test_only_the_command_line_prints():
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "cli" or path.name == "console.py":
            continue
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert "print" not in calls, path


def test_files_and_functions_stay_small():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 380, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{path}:{node.name}"


def test_names_are_nouns_a_user_would_say():
    forbidden = {"utils", "util", "helpers", "common", "misc", "manager"}
    assert not {path.stem for path in SOURCE.rglob("*.py")} & forbidden
