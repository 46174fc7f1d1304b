"""The verb ``perplexity`` as a user meets it: references, interruptions, warnings, what is on the screen."""

import dataclasses
import io
import json
import os
import re
import select
import signal

import pytest
from command import call, listing, message, start
from perplexity_cases import DEMO, case_file
from rich.console import Console
from rich.progress import Progress, Task, TaskID
from tiny_gguf import N_VOCAB, tiny_text, tiny_weights, write_tiny_gguf

from nsds_gguf.cli import display, screen, verbs
from nsds_gguf.errors import OutputError
from nsds_gguf.evaluate.perplexity import Window, perplexity
from nsds_gguf.evaluate.texts import VerifyOptions, evaluation_text
from nsds_gguf.session import session
from nsds_gguf.system import resources, workfolder

SHORT = ("--ctx-size", "128", "--chunks", "3", "--threads", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder of the demo model in BF16 and Q4_K and of the tiny model in F32."""
    folder = tmp_path_factory.mktemp("files")
    for model in ("demo-bos-BF16", "demo-bos-Q4_K", "tiny-bos-F32"):
        case_file(folder, model)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, files):
    """A working directory with these files."""
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the original folder as the reference ---


def test_the_original_folder_is_as_good_as_its_gguf(here):
    before = listing(here)
    found = [
        json.loads(call("perplexity", "demo-bos-Q4_K.gguf", *SHORT, "--reference", reference, "--json", "-").out)
        for reference in (DEMO, "demo-bos-BF16.gguf")
    ]
    assert [run.pop("reference") for run in found] == [str(DEMO), "demo-bos-BF16.gguf"]
    assert found[0] == found[1]
    assert found[0]["file"] == "demo-bos-Q4_K.gguf" and 0.001 < found[0]["divergence"]["kld_mean"] < 0.1
    assert listing(here) == before


def test_another_vocabulary_is_refused_before_the_original_is_written(here, monkeypatch):
    monkeypatch.setattr(session, "write_gguf", None)
    outcome = call("perplexity", "tiny-bos-F32.gguf", *SHORT, "--reference", DEMO)
    assert message(outcome, 7) == (
        f"{DEMO}: cannot be the reference of tiny-bos-F32.gguf: wanted a vocabulary of 260, got 2048; compare files of "
        "one model"
    )


def test_folder_that_is_no_model(here):
    (here / "empty").mkdir()
    assert message(call("perplexity", "demo-bos-Q4_K.gguf", *SHORT, "--reference", "empty"), 3).startswith("empty: ")


def test_no_room_for_the_original(here, monkeypatch):
    usage = resources.shutil.disk_usage(here)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    line = message(call("perplexity", "demo-bos-Q4_K.gguf", *SHORT, "--reference", DEMO), 5)
    assert line == (
        f"{here}: the reference takes 0.01 GiB, the disk has 0.00 GiB free: make room or choose another folder"
    )


def test_no_memory_for_the_comparison(here, monkeypatch):
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 2**20)
    assert message(call("perplexity", "demo-bos-Q4_K.gguf", *SHORT, "--reference", DEMO), 5).startswith(
        "a comparison with the original takes "
    )


def test_folder_that_cannot_be_written(here, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workfolder.Path, "mkdir", refuse)
    line = message(call("perplexity", "demo-bos-Q4_K.gguf", *SHORT, "--reference", DEMO), 5)
    assert line.endswith("cannot be written: Permission denied; choose another name or folder")


# --- memory, context, batch, parts ---


@pytest.mark.parametrize(
    ("n_ctx", "n_batch", "n_rows"),
    [(128, 2048, 16 * 64 + 512), (512, 2048, 4 * 256 + 512), (512, 256, 256 + 256), (100, 150, 50 + 100)],
)
def test_memory_for_logits_is_that_of_one_batch(files, monkeypatch, n_ctx, n_batch, n_rows):
    """Rows that a batch gives, half of whole chunks, and those that llama.cpp computes at once."""
    file = files / "tiny-bos-F32.gguf"
    n_weights_bytes = sum(tensor.nbytes for tensor in tiny_weights().values())
    needed = []
    monkeypatch.setattr("nsds_gguf.evaluate.perplexity.check_memory", lambda n_bytes, *_: needed.append(n_bytes))
    perplexity(file, tiny_text(), Window(n_ctx=n_ctx, n_batch=n_batch, n_chunks=1), n_threads=1)
    perplexity(file, tiny_text(), Window(n_ctx=n_ctx, n_batch=n_batch, n_chunks=1), n_threads=1, reference=file)
    logits_bytes = n_rows * N_VOCAB * 4
    assert needed[1] == 2 * needed[0] and needed[0] - logits_bytes == n_weights_bytes


def test_too_little_memory_names_the_way_out(here, monkeypatch):
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 2**20)
    with pytest.raises(OutputError) as caught:
        perplexity(here / "tiny-bos-F32.gguf", tiny_text(), n_threads=1)
    assert str(caught.value) == (
        "perplexity takes 0.00 GiB of memory, 0.00 GiB are available: close other programs or lower --batch"
    )


def test_context_beyond_the_trained_one_warns(here):
    (here / "tiny.txt").write_text(tiny_text())
    options = ("perplexity", "tiny-bos-F32.gguf", "--text", "tiny.txt", "--threads", "1", "--ctx-size")
    assert call(*options, "512").err == ""
    outcome = call(*options, "513")
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("warning: tiny-bos-F32.gguf: ")
    for words in ("trained for 512 tokens", "--ctx-size is 513", "beyond the first 512 tokens of a chunk"):
        assert words in outcome.err


def test_batch_is_the_users(here):
    options = ("perplexity", "demo-bos-Q4_K.gguf", *SHORT, "--json", "-")
    whole, parts = (json.loads(call(*options, "--batch", size).out) for size in ("128", "50"))
    assert (whole["n_batch"], parts["n_batch"]) == (128, 50)
    assert parts["ppl"] == pytest.approx(whole["ppl"], rel=0.01)


def test_split_files_are_read_as_one(here):
    whole = write_tiny_gguf(here / "whole.gguf")
    write_tiny_gguf(here / "split.gguf", split_max_tensors=8)
    first, *others = sorted(here.glob("split-*.gguf"))
    assert first.name == "split-00001-of-00003.gguf" and len(others) == 2
    (here / "tiny.txt").write_text(tiny_text())
    options = ("--text", "tiny.txt", *SHORT, "--json", "-")
    found = json.loads(call("perplexity", first.name, "--reference", whole.name, *options).out)
    assert found["divergence"]["kld_percentiles"]["100"] < 1e-9 and found["divergence"]["same_top"] == 1
    assert found["ppl"] == pytest.approx(json.loads(call("perplexity", whole.name, *options).out)["ppl"], rel=1e-6)


# --- interruptions ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_shows_what_it_found(here, number):
    before = listing(here)
    process = start(
        "perplexity", "demo-bos-Q4_K.gguf", "--reference", DEMO, "--threads", "1", "--ctx-size", "64", "--batch", "64",
        "--json", "out.json", "-v", cwd=here, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("chunk 5 of "):
            assert re.fullmatch(r"chunk 5 of 641: PPL \d+\.\d{4}, KLD 0\.\d{6}\n", line), line
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.endswith(f"error: stopped by {number.name}; no unfinished file is left\n")
    found = json.loads((here / "out.json").read_text())
    assert 5 <= found["n_chunks"] < found["n_chunks_wanted"] == 641
    assert found["n_scored_tokens"] == 31 * found["n_chunks"]
    assert f"interrupted after {found['n_chunks']} of 641 chunks of 64 tokens, " in out
    assert f"{found['divergence']['kld_mean']:.6f}" in out and f"{found['ppl']:.4f}" in out
    (here / "out.json").unlink()
    assert listing(here) == before


def test_a_run_stopped_before_its_first_chunk_shows_nothing(here, monkeypatch):
    def stopped(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "perplexity", stopped)
    outcome = call("perplexity", "demo-bos-Q4_K.gguf", "--json", "-")
    assert message(outcome, 130) == "stopped by SIGINT; no unfinished file is left"


# --- the screen ---


def rendered(*views, width=80):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for view in views:
        console.print(view)
    return console.file.getvalue()


def test_tables_fit_80_columns(files):
    found = perplexity(
        files / "demo-bos-Q4_K.gguf",
        evaluation_text(VerifyOptions()),
        Window(n_ctx=128, n_chunks=3),
        n_threads=1,
        reference=files / "demo-bos-BF16.gguf",
    )
    d = found.divergence
    text = rendered(display.perplexity_view(found, "demo-Q4_K.gguf", "books"), display.divergence_details(d))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"compared with the reference +percentiles of positions", text)  # side by side
    assert re.search(rf"│ books +│ +{d.reference_ppl:.4f} │ +{d.reference_ppl_error:.4f} │", text)
    assert re.search(rf"│ demo-Q4_K.gguf +│ +{found.ppl:.4f} │ +{found.ppl_error:.4f} │", text)
    assert re.search(rf"│ mean KL divergence +│ +{d.kld_mean:.6f} │ +{d.kld_error:.6f} │", text)
    median, median_change = d.kld_percentiles["50"], 100 * d.delta_p_percentiles["50"]
    assert re.search(rf"│ median │ {median:.6f} │ +{median_change:.3f} % │", text)


@pytest.mark.parametrize(("ratio", "words"), [(1.0234, "2.34 % ± 0.50 % higher"), (0.99, "1.00 % ± 0.50 % lower")])
def test_a_sentence_says_what_it_means(files, ratio, words):
    file = files / "tiny-bos-F32.gguf"
    found = perplexity(file, tiny_text(), Window(n_ctx=128, n_chunks=2), n_threads=1, reference=file)
    changed = dataclasses.replace(
        found.divergence, same_top=0.912, ppl_ratio=ratio, ppl_ratio_error=0.005, kld_mean=0.0125, kld_error=0.00025
    )
    view = display.perplexity_view(dataclasses.replace(found, divergence=changed), "a.gguf", "b.gguf")
    assert rendered(view, width=300).splitlines()[-1] == (
        f"KL divergence from b.gguf: 0.012500 ± 0.000250 nats per token; same top token 91.2 %; perplexity {words}."
    )


def test_a_sentence_without_a_reference(files):
    found = perplexity(files / "tiny-bos-F32.gguf", tiny_text(), Window(n_ctx=128, n_chunks=2), n_threads=1)
    view = display.perplexity_view(dataclasses.replace(found, ppl=22.4521, bits_per_byte=1.4239), "a.gguf")
    assert rendered(view, width=300).splitlines()[-1] == (
        "On average the next token is as uncertain as a choice among 22.5 equally likely ones; 1.424 bits per byte of "
        "text."
    )


def test_a_terminal_gets_the_running_estimate_and_the_time_left(here):
    master, slave = os.openpty()
    with start("perplexity", "demo-bos-Q4_K.gguf", "--ctx-size", "64", "--batch", "64", "--chunks", "9",
               "--threads", "1", stderr=slave, cwd=here) as process:  # fmt: skip
        os.close(slave)
        seen = b""
        while select.select([master], [], [], 60)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        process.stdout.read()
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert process.returncode == 0
    assert re.search(r"chunk 9 of 9: PPL \d+\.\d{4} +━+ *100% \d:\d\d:\d\d 0:00:00", text)


@pytest.mark.parametrize(
    ("completed", "total", "elapsed", "shown"),
    [(1, 4, 100, "0:05:00"), (3, 4, 3, "0:00:01"), (4, 4, 9, "0:00:00"), (0, 4, 9, "-:--:--"), (1, None, 9, "-:--:--")],
)
def test_time_left_is_known_from_the_first_step(completed, total, elapsed, shown):
    task = Task(TaskID(0), "perplexity", total, completed, lambda: float(elapsed))
    task.start_time = 0.0
    assert screen._TimeLeftColumn().render(task).plain == shown


# --- the bar of a whole run ---


def test_stages_that_were_skipped_count_for_nothing():
    whole = screen.WholeRun([("generate text", 20.0), ("find sensitivities", 30.0), ("write", 4.0), ("write", 4.0)])
    assert (whole.total, whole.begin("read headers")) == (58.0, 0.0)
    assert (whole.begin("find sensitivities"), whole.total) == (30.0, 38.0)  # the text was kept by an earlier run
    assert [whole.begin("write a.gguf"), whole.begin("write b.gguf"), whole.begin("write c.gguf")] == [4.0, 4.0, 0.0]
    assert whole.total == 38.0


class EagerBars(Progress):
    """Bars that are drawn at every step."""

    def update(self, *arguments, **values):
        super().update(*arguments, **values)
        self.refresh()


def test_a_stage_moves_the_bar_of_the_whole_run(monkeypatch):
    monkeypatch.setattr(screen, "Bars", EagerBars)
    shown = screen.Screen(quiet=False, json_to_stdout=False, verbose=False)
    file = io.StringIO()
    shown.notes = Console(file=file, force_terminal=True, width=100)
    shown.draws_bars = True
    shown.expect([("generate text", 30.0), ("find sensitivities", 60.0), ("write", 10.0)])
    with shown.stage("generate text") as progress:
        progress(1, 2)
    with shown.stage("find sensitivities") as progress:
        progress(1, 2)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    whole = [int(re.search(r"(\d+)%", line)[1]) for line in lines if line.startswith("all stages")]
    assert list(dict.fromkeys(whole)) == [0, 15, 30, 60]
    assert not lines[-1].startswith("all stages")  # only the bars of stages stay
