"""The README's commands exist, its tree names every file, and help comes fast."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from samples import run_trimtab, write_reviews
from trimtab.engine.fused import native

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """Every `trimtab …` line in the README's shell blocks."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
    return [
        line.partition(" #")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.startswith("trimtab ")
    ]


def test_the_commands_of_the_readme_are_known():
    """Each command and flag that the README shows is one that the program takes."""
    assert len(commands()) >= 5
    for line in commands():
        words = shlex.split(line)[1:]
        text = run_trimtab(words[0], "--help").stdout
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"(^|\s){re.escape(flag)}\b", text), f"{line}: {flag}"


def test_the_readme_run_on_your_own_table_works(tmp_path, model_folder):
    """The README's example for a CSV, with a model that is there offline and rows of its shape."""
    line = next(line for line in commands() if "--train-data reviews.csv" in line)
    write_reviews(tmp_path / "reviews.csv", 160)
    text = (tmp_path / "reviews.csv").read_text().replace("text,label", "review,stars", 1)
    (tmp_path / "reviews.csv").write_text(text)
    words = [*shlex.split(line)[1:], "--model", str(model_folder("bert")), "--tokens-per-batch", "128"]
    done = run_trimtab(*words, cwd=tmp_path, alone=True)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    assert list(tmp_path.glob("runs/*/report.html"))


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_tree_of_the_readme_names_every_file():
    names = set(re.findall(r"[\w.]+\.(?:py|cpp|j2|yaml|css|js)\b", README))
    missing = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "src").rglob("*")
        if path.suffix in (".py", ".cpp", ".j2", ".yaml", ".css", ".js")
        and path.name != "__init__.py"
        and path.name not in names
    ]
    assert missing == []


def test_help_does_not_import_torch():
    code = "import sys, trimtab.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["run", "evaluate", "compare", "report", "doctor"])
def test_every_command_has_help(command):
    done = run_trimtab(command, "--help")
    assert done.returncode == 0
    assert "Usage: trimtab" in done.stdout


def test_doctor_measures():
    done = run_trimtab("doctor", "--json")
    import json

    found = json.loads(done.stdout)
    assert found["gemm_gflops"]["float32"] > 0.1
    assert found["machine"]["cores"] >= 1
    assert found["fused_kernels"] == native.is_available()
    shown = run_trimtab("doctor").stdout
    assert "float32" in shown
    assert ("compiled for this processor" if found["fused_kernels"] else "install g++") in " ".join(shown.split())
