"""What README.md and docs/*.md tell a reader to type does what they say.

Every page is followed from top to bottom in a folder of its own: its commands and its Python are run, its recipes and
data cards are read. Small networks and data stand in for the files that a page names; a name without a stand-in is an
error, so that what is written next is run too. Training is cut to two steps.
"""

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from documents import PAGES, ROOT, Command, blocks, commands, inline, option_names
from graphs import Net
from typer.main import get_command
from typer.testing import CliRunner, Result

from onnxmerge.calibration import distillation
from onnxmerge.cli.app import app
from onnxmerge.cli.recipe import read_recipe
from onnxmerge.data.card import read_card
from onnxmerge.methods import timing
from onnxmerge.runtime import latency

ids = [page.name for page in PAGES]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]

# --- what stands in --------------------------------------------------------------------------------------------------

IMAGE = (1, 28, 28)


def network(
    body: int, head: int = 0, widths: tuple[int, ...] = (4, 4, 4, 4), name: str = "image"
) -> Callable[[Path], None]:
    """A classifier of pictures; networks of one `body` have the same hidden layers."""

    def write(path: Path) -> None:
        net = Net(body)
        value = net.input(["N", *IMAGE], name)
        for number, width in enumerate(widths):
            value = net.relu(net.conv(value, width, strides=[1 if number else 2] * 2))
        value = net.flatten(net.op("GlobalAveragePool", value), widths[-1])
        value = net.relu(net.gemm(value, 8))
        net.generator = np.random.default_rng(1000 + head)
        net.output(net.op("Identity", net.gemm(value, 10), name="logits"))
        onnx.save(net.proto(), path)

    return write


def coloured(body: int) -> Callable[[Path], None]:
    """Eight convolutions on [N, 3, 32, 32]."""

    def write(path: Path) -> None:
        net = Net(body)
        value = net.input(["N", 3, 32, 32])
        for _ in range(8):
            value = net.relu(net.conv(value, 4))
        net.head(value)
        onnx.save(net.proto(), path)

    return write


def samples(labels: bool) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        random = np.random.default_rng(0)
        arrays = {"image": random.random((100, *IMAGE), np.float32)}
        if labels:
            arrays |= {"labels": random.integers(0, 10, 100)}
        np.savez(path, **arrays)  # type: ignore[arg-type]

    return write


def card(path: Path) -> None:
    path.write_text(f"file: {path.stem}.npz\n")
    samples(labels=True)(path.with_suffix(".npz"))


def merged(path: Path) -> None:
    """Both demo tasks in one graph."""
    provide(path.parent, "digits.onnx")
    provide(path.parent, "fashion.onnx")
    ran = CliRunner().invoke(app, ["pack", "digits.onnx", "fashion.onnx", "-o", path.name])
    assert ran.exit_code == 0, ran.stderr


STAND_INS: dict[str, Callable[[Path], None]] = {
    **{f"{name}.onnx": network(0, head) for head, name in enumerate(("digits", "fashion", "cars", "birds"))},
    **{f"{name}.onnx": network(1, head) for head, name in enumerate(("dogs", "faces", "plants"))},
    "cats.onnx": network(1, 3, name="x"),
    **{f"{name}.onnx": network(2, head, (4, 4)) for head, name in enumerate(("a", "b", "c"))},
    **{f"seed{seed}.onnx": network(seed, widths=(4, 4)) for seed in (1, 2)},
    **{name: network(3, widths=(8, 8, 8)) for name in ("big.onnx", "deep.onnx", "net4.onnx")},
    **{name: network(4, widths=(4, 4)) for name in ("small.onnx", "shallow.onnx", "net2.onnx")},
    "merged.onnx": merged,
    **{f"{name}.onnx": coloured(body) for body, name in enumerate(("resnet20_cifar10", "resnet20_cifar100"))},
    "resnet8_cifar10.onnx": coloured(3),
    "samples.npz": samples(labels=False),
    **{f"{name}.npz": samples(labels=True) for name in ("digits", "fashion", "mnist", "a", "b", "c")},
    **{f"{name}.yaml": card for name in ("digits", "fashion")},
}
NOT_RUN = {
    "make demo": "makes an environment; .ci/run does so",
    "make test": "is what runs this",
    "pip install": "needs a package index; tests/test_distribution.py installs what is built",
    "torchrun": "tests/test_distributed.py runs it",
    "onnxmerge demo": "takes a minute; tests/test_zip.py merges the same networks",
}
"""Command lines that are not run, by how they begin, and why."""
PATH = re.compile(r"[\w./-]+\.(onnx|npz|yaml)")


def provide(folder: Path, name: str) -> None:
    """See that the file `name` lies in the folder: what the page made, or what stands in for it."""
    path = folder / name
    if not path.exists():
        assert name in STAND_INS, f"the page names {name}: give it a stand-in in STAND_INS"
        path.parent.mkdir(parents=True, exist_ok=True)
        STAND_INS[name](path)


# --- following a page ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distillation, "train", shortened(distillation.train))
    for home in (latency, timing):
        monkeypatch.setattr(home, "measure_latency", hasty(home.measure_latency))
    return tmp_path


def shortened(train: Callable[..., Any]) -> Callable[..., Any]:
    """The training loop, ended after two steps."""

    def first_steps(problem: Any, settings: Any, *others: Any, **named: Any) -> Any:
        return train(problem, replace(settings, steps=min(settings.steps, 2)), *others, **named)

    return first_steps


def hasty(measure: Callable[..., Any]) -> Callable[..., Any]:
    """The clock, content with 20 rounds."""
    return lambda variants, **named: measure(variants, **named | {"runs": 20, "min_seconds": 0.0})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_do_what_the_page_says(page: Path, folder: Path) -> None:
    code = [block.text for block in blocks(page) if block.language == "python"]
    files = {name[1]: text for text in code if (name := re.match(r"# ([\w/]+\.py)\n", text))}
    for name, text in files.items():
        if "/" not in name:  # the others are files of the package: tests/test_extending.py puts them there
            (folder / name).write_text(text)
    for command in commands(page):
        if is_run(command):
            follow(page, command, folder)
    for text in code:
        if text not in files.values():
            run_python(page, text, folder)


def follow(page: Path, command: Command, folder: Path) -> None:
    """Run a command and hold what it says against what the page shows below it."""
    _, name, *arguments = command.words
    written = {Path(word) for option, word in pairwise(arguments) if is_output(option)}
    for word in arguments:
        file = word.rpartition("=")[2]
        if PATH.fullmatch(file) and Path(file) not in written:
            if name == "run":
                read_from_page(page, folder / file)
            provide(folder, file)
    ran = run_once(name, arguments)
    told = f"{command}\n{ran.stdout}\n{ran.stderr}"
    failed = re.match(r"onnxmerge: error: .*", command.shown)
    assert (ran.exit_code == 0) is not bool(failed), told
    if failed:
        assert failed[0] in ran.stderr, told
    for head in table_heads(command.shown):
        assert head in re.findall(r"\S+", ran.stdout), f"{head}: {told}"
    if command.shown.startswith("# recipe"):
        (step,) = yaml.safe_load(command.shown)["steps"]
        (own,) = yaml.safe_load(ran.stderr[ran.stderr.index("# recipe") :])["steps"]
        assert step.keys() == own.keys(), told
        for values, others in zip(step.values(), own.values(), strict=True):
            assert values == others | {"output": values["output"]}, told  # another page may have said it with another
    if name == "inspect" and "\nsteps:" in command.shown:
        shown, found = (yaml.safe_load(text[text.index("\nsteps:") :]) for text in (command.shown, ran.stdout))
        assert shown == found, told


DONE: dict[tuple[str, ...], tuple[Result, Path]] = {}
"""What `zip` said and made of networks that stand in, by its arguments but the folder that it writes to."""


def run_once(name: str, arguments: list[str]) -> Result:
    """Run a command; a `zip` that another page has run already is copied."""
    if name != "zip" or "-o" not in arguments:
        return CliRunner().invoke(app, [name, *arguments], env={"COLUMNS": "200"})
    at = arguments.index("-o") + 1
    key = (*arguments[:at], *arguments[at + 1 :])
    if key in DONE:
        shutil.copytree(DONE[key][1], arguments[at])
    else:
        ran = CliRunner().invoke(app, [name, *arguments], env={"COLUMNS": "200"})
        DONE[key] = ran, Path(arguments[at]).resolve()
    return DONE[key][0]


def is_output(option: str) -> bool:
    return option in ("-o", "--output", "--report", "--junit")


def read_from_page(page: Path, path: Path) -> None:
    """Write the page's recipe to `path`, beside the files that it reads and does not make."""
    path.write_text(next(b.text for b in blocks(page) if b.language == "yaml" and b.text.startswith("steps:")))
    made = {str(step.values.get("output")) for step in read_recipe(path)}
    for file in PATH.finditer(path.read_text()):
        if not made & {file[0], file[0].split("/")[0]}:
            provide(path.parent, file[0])


def table_heads(shown: str) -> Iterator[str]:
    """The words above the rule of a table, and the first word of each row below it."""
    lines = shown.splitlines()
    rule = next((number for number, line in enumerate(lines) if line.startswith("──")), None)
    if rule is None:
        return
    above = [line for line in lines[:rule] if line.strip()]
    yield from {word for line in above for word in line.split()}
    for line in lines[rule + 1 :]:
        if not re.search(r" {2,}\S+ {2,}", line):
            return
        yield line.split()[0]


def run_python(page: Path, text: str, folder: Path) -> None:
    """Run a page's Python in a new folder, with the files that it reads."""
    own = folder / "python"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    for name in re.findall(r'"([\w./-]+\.(?:onnx|npz|yaml))"', text):
        if (folder / name).is_file() and "/" in name:
            shutil.copytree(folder / Path(name).parent, own / Path(name).parent, dirs_exist_ok=True)
        elif name in STAND_INS:
            provide(own, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(own)
        exec(compile(text, page.name, "exec"), {})


def is_run(command: Command) -> bool:
    if command.words[0] != "onnxmerge" or command.is_synopsis:
        return False
    edits = "--edit" in command.words and importlib.util.find_spec("onnx_graphsurgeon") is None
    return not edits and not any(command.text.startswith(begin) for begin in NOT_RUN)


# --- what is not run is checked as far as that goes ------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_synopses_name_commands_and_options_that_exist(page: Path) -> None:
    written = [command.words for command in commands(page) if command.is_synopsis]
    written += [text.split() for text in inline(page) if text.startswith("onnxmerge ")]
    for words in written:
        if words[0] == "onnxmerge" and not words[1].startswith("-"):
            check_synopsis(words)


def check_synopsis(words: list[str]) -> None:
    text = " ".join(words)
    assert words[1] in COMMANDS, text
    command = COMMANDS[words[1]]
    known = {name for own in command.params for name in (*own.opts, *own.secondary_opts)} | {"--help"}
    assert set(option_names(words)) <= known, text
    if not set("[|") & set(text):
        values = [word for word in words[2:] if word != "..."]
        command.make_context(words[1], values, resilient_parsing=len(values) < 2)


OF_OTHERS = frozenset({"--nproc-per-node"})


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_in_the_text_exist(page: Path) -> None:
    known = {name for own in COMMANDS.values() for param in own.params for name in (*param.opts, *param.secondary_opts)}
    known |= OF_OTHERS | {"--help", "--version", "--install-completion", "--show-completion"}
    for piece in inline(page):
        if piece.startswith("-"):
            named = set(option_names(re.split(r"[ ,|]+", piece)[:1]))
            assert named <= known, f"{page.name}: {piece}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_yaml_is_read_by_our_readers(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            path = tmp_path / "block.yaml"
            path.write_text(block.text)
            content = yaml.safe_load(block.text)
            if "steps" in content:
                assert read_recipe(path)
            elif isinstance(content, list):
                path.write_text(f"steps:\n{block.text}")
                assert read_recipe(path)
            elif "jobs" not in content:
                assert read_card(path).file


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(head) for head in heads}, f"{page.name}: {target}#{anchor}"


def slug(head: str) -> str:
    """The anchor that a heading gets where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


def test_every_reason_is_needed() -> None:
    texts = [command.text for page in PAGES for command in commands(page)]
    texts += [text for page in PAGES for text in inline(page)]
    for begin in NOT_RUN:
        assert any(text.startswith(begin) for text in texts), begin
    for name in STAND_INS:
        assert any(name in page.read_text(encoding="utf-8") for page in PAGES), name


def test_every_page_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, page.name
