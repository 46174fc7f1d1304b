"""Documentation in step with the code: generated blocks, commands, module tree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nsds_gguf import __version__
from nsds_gguf.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_blocks_are_current():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "update_docs.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mark", ["main-command", "test-command"])
def test_readme_has_its_two_commands(mark):
    assert len(re.findall(rf"<!-- {mark} -->\n```sh\n[^\n]+\n```", README)) == 1


def test_main_command_parses():
    command = re.search(r"<!-- main-command -->\n```sh\n(.+)\n```", README)[1]
    words = command.split("nsds-gguf ")[-1].split()
    arguments = build_parser().parse_args(words)
    assert (ROOT / arguments.model / "config.json").is_file()


def test_links_lead_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_changelog_knows_the_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["convert", "score", "plan", "perplexity", "inspect"])
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([verb, "--help"])
    assert stopped.value.code == 0 and f"example: nsds-gguf {verb} " in capsys.readouterr().out.replace("\n", " ")
