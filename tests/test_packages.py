"""The checks that .ci/run makes of wheel, sdist and site, on made-up contents."""

import check_packages
import pytest

WANTED = {"nsds_gguf/a.py", "nsds_gguf/page/a.html"}


def test_a_wheel_holds_the_package_and_nothing_else():
    library = "nsds_gguf/quantize/_rounding.cpython-311-x86_64-linux-gnu.so"
    names = {*WANTED, library, "nsds_gguf-0.1.0.dist-info/METADATA"}
    assert check_packages.faults_of_wheel(names, WANTED) == []
    assert check_packages.faults_of_wheel(names - {"nsds_gguf/page/a.html"} | {"tests/test_a.py"}, WANTED) == [
        "wheel lacks nsds_gguf/page/a.html", "wheel holds tests/test_a.py",
    ]  # fmt: skip
    assert check_packages.faults_of_wheel(names - {library}, WANTED) == ["wheel lacks the compiled rounding"]


def test_an_sdist_holds_no_model_and_all_documents():
    names = {*WANTED, *check_packages.SDIST_ONLY, "PKG-INFO"}
    assert check_packages.faults_of_sdist(names, WANTED) == []
    model = "examples/zoo/wide/model.safetensors"
    assert check_packages.faults_of_sdist(names - {"SECURITY.md"} | {model}, WANTED) == [
        "sdist lacks SECURITY.md", f"sdist holds {model}",
    ]  # fmt: skip


def test_the_tree_has_the_data_that_code_reads():
    assert check_packages.package_files() >= check_packages.DATA


@pytest.mark.parametrize(("target", "folder", "wanted"), [
    ("cli.md", "docs", "cli.md"),
    ("../SECURITY.md", "docs", "security.md"),
    ("../README.md", "docs", "overview.md"),
    ("docs/cli.md", "", "cli.md"),
    ("docs/demo-scores.png", "", "demo-scores.png"),
    ("README.md", "", "overview.md"),
    ("LICENSE", "", "../LICENSE"),
])  # fmt: skip
def test_links_of_the_site(target, folder, wanted):
    docs_site = pytest.importorskip("docs_site", exc_type=ImportError)
    assert docs_site.site_path(target, folder) == wanted
