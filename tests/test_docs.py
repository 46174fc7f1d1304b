"""Documentation in step with the code: generated blocks, commands, module tree."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\((\w[\w-]*\.md)\)", index)) == pages


def test_changelog_and_citation_know_the_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and "2603.17354" in citation["preferred-citation"]["url"]


COMMANDS = [
    (page.name, line.split("  #")[0].strip())
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.name in ("gallery.md", "memory.md", "upload.md")
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("nsds-gguf ")
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_commands_of_the_gallery_parse(page, command):
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    assert callable(arguments.run)


def test_the_gallery_has_a_command_for_every_device():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert [title for title, _ in sections] == [
        "A phone", "Raspberry Pi 5 (8 GB)", "A laptop with 8 GB", "A Mac with 16 GB", "A GPU with 24 GB", "To publish"
    ]  # fmt: skip
    assert all("\nnsds-gguf convert " in body for _, body in sections)
    assert sum(page == "gallery.md" for page, _ in COMMANDS) == text.count("\nnsds-gguf ") >= 15


def ci_command(name):
    return subprocess.run(["bash", ".ci/readme-command", name], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="the script names other folders there")
def test_commands_of_the_readme_are_what_ci_runs():
    for name in ("main-command", "test-command"):
        assert ci_command(name).stdout == re.search(rf"<!-- {name} -->\n```sh\n(.+\n)```", README)[1]
    lacking = ci_command("no-command")
    assert (lacking.returncode, lacking.stderr) == (1, "README.md holds no no-command\n")


@pytest.mark.parametrize("file", sorted(ROOT.glob(".github/**/*.yml")), ids=lambda path: path.name)
def test_forge_files_are_yaml(file):
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    if file.name in ("bug.yml", "model.yml"):
        assert found["name"] and found["description"] and all(part["type"] for part in found["body"])
        assert "nsds-gguf --version" in str(found["body"]) and "config.json" in str(found["body"])


@pytest.mark.parametrize("verb", ["convert", "score", "plan", "perplexity", "inspect"])
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([verb, "--help"])
    assert stopped.value.code == 0 and f"example: nsds-gguf {verb} " in capsys.readouterr().out.replace("\n", " ")
