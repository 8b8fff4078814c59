"""What stands around the commands: help, exit statuses, start-up, and the printed program's name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from workshop import rankworks

import rankworks.cli as package

COMMANDS = ("demo", "train", "compare", "methods", "plan", "check", "inspect", "merge", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_fits_a_terminal(command: str) -> None:
    said = rankworks(command, "--help")
    assert said.status == 0
    assert "Examples:" in said.out
    assert f"rankworks {command}" in said.out.split("Examples:")[1]
    module = Path(package.__file__).with_name(f"{command}.py")
    tree = ast.parse(module.read_text())
    function = next(f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == command)
    assert all(len(line) <= 76 for line in (ast.get_docstring(function) or "").splitlines()), "it would be wrapped"


def test_help_lists_every_command_in_order() -> None:
    said = rankworks("--help")
    places = [said.out.index(f" {command} ") for command in COMMANDS]
    assert said.status == 0
    assert places == sorted(places)


def test_the_version_is_the_package_s() -> None:
    from rankworks.core.version import __version__

    assert rankworks("--version").out.strip() == f"rankworks {__version__}"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("trian", "x.yaml"), "Did you mean 'train'"),
        (("train",), "FILE"),
        (("train", "x.yaml", "--outptu", "y"), "--outptu"),
        (("plan", "--rank", "many"), "valid int"),
        (("merge", "somewhere"), "--output"),
    ],
)
def test_a_wrong_command_line_is_status_2_with_a_hint(words: tuple[str, ...], hint: str) -> None:
    said = rankworks(*words)
    assert said.status == 2
    assert hint.lower() in said.err.lower()
    assert "Traceback" not in said.err


def test_the_program_runs_as_a_module_and_its_help_loads_no_model_library() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['rankworks', '--help']\n"
        "from rankworks.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'transformers', 'datasets', 'accelerate', 'plotly', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "One workbench" in done.stdout


def test_a_printed_command_names_this_very_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rankworks.cli.output import command

    monkeypatch.setattr("shutil.which", lambda name: None)
    own = Path(sys.executable).with_name("rankworks")
    assert own.exists()
    monkeypatch.chdir(tmp_path)  # away from the environment, which may lie in the working directory
    assert command("merge", "a b") == f"{own} merge 'a b'"
    monkeypatch.chdir(own.parents[1])
    assert command("merge", "x") == "bin/rankworks merge x"
    monkeypatch.setattr("shutil.which", lambda name: str(own))
    assert command("merge", "x") == "rankworks merge x"


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("rankworks.cli.methods._list", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        rankworks("methods")
