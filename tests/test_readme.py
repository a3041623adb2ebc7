"""What the README and the other papers of the house promise exists."""

import re
import subprocess

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


def test_ruff_is_clean() -> None:
    import sys
    from pathlib import Path

    done = subprocess.run([Path(sys.executable).with_name("ruff"), "check", "--output-format=concise", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
