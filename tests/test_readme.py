"""What the README and the other papers of the house promise exists."""

import re
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import ROOT

from defectbook.practice.cli import build_parser

README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_make_targets_exist() -> None:
    targets = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0, target


def test_defectbook_commands_parse() -> None:
    found = [command.split()[1:] for command in commands() if command.startswith("defectbook ")]
    assert found
    for words in found:
        build_parser().parse_args(words)


def test_ci_runs_the_readmes_test_commands_and_nothing_else() -> None:
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    made = [line for line in lines if line.startswith("make ")]
    assert made == ["make test", "make test-slow"] and set(made) <= set(commands())


def test_citation_is_valid() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] and citation["title"] == "defectbook" and citation["license"] == "Apache-2.0"


def test_links_lead_somewhere() -> None:
    for file in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text()):
            if not link.startswith("http"):
                assert ((ROOT / file).parent / link).exists(), f"{file} links to {link}"


def call_tool(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], cwd=ROOT, capture_output=True, text=True)


def test_ruff_is_clean() -> None:
    done = call_tool("ruff", "check", "--output-format=concise", ".")
    assert done.returncode == 0, done.stdout


def test_words_are_spelt_right(tmp_path) -> None:
    """Prose, chapters and the library; tests misspell names on purpose."""
    kinds = ("*.md", "*.ipynb", "*.yml", "*.cff", "tools", "benchmarks", "defectbook/*.py", "defectbook/assets/*.js")
    listed = subprocess.run(["git", "ls-files", *kinds], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) > 100
    done = call_tool("codespell", *listed)
    assert done.returncode == 0, done.stdout
    slip = tmp_path / "slip.md"
    slip.write_text("a seperate mask")
    assert call_tool("codespell", str(slip)).returncode != 0, "codespell finds nothing"
