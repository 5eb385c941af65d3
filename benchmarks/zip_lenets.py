"""LeNets: MTZ's table 1 and figure 2 (two networks for MNIST), and two tasks (MNIST and Fashion-MNIST).

python benchmarks/zip_lenets.py [--part table1 tasks figure2] [--seeds 3] [--samples 10000] [--finished]

All hidden layers are shared, in one of two ways. `zip` is the product: the shared subspace, which the heads read.
`no adapters` is what the paper means by shared: matched channels, least squares layer by
layer towards both networks on the merged network's own inputs, and nothing of a task's own but its head. Where the
networks are sparse, `no adapters` keeps as many weights as one of them has: L-OBS (`lenets.prune`) stands in place of
least squares, and once more behind the training; `zip` knows nothing of zeros.

Errors are in per cent of the 10 000 test images, which nothing but the tables sees; no label is used. An increase is
the mean of both networks'; mean and range over pairs. `--samples` unlabelled images are for the closed forms, all
55 000 for training. A seed is another pair of networks.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import markdown
import numpy as np
import onnx_ir as oir
from lenets import CNN, FASHION, FOLDER, MLP, MNIST, LeNet, density, errors, images, prune, pruned, test_images
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from onnxmerge import ZipSettings, zip_models
from onnxmerge.calibration.settings import Settings
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.weights import get_array
from onnxmerge.methods.calibrating import calibrate_merged
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task, load_networks, task_outputs, with_data
from onnxmerge.methods.zip.alignment import Aligned, Sharable, align, find_sharable
from onnxmerge.passes.attach_tails import SHARED, AttachTails
from onnxmerge.passes.average import Average, Partner
from onnxmerge.passes.least_squares import solve_least_squares
from onnxmerge.passes.mtz import functional_difference, solve_hessian
from onnxmerge.passes.refit import Refit, Teacher, set_weights_and_bias, weights_and_bias
from onnxmerge.runtime.statistics import Regression

ZIP, BARE = "zip", "no adapters"
THREADS = 1
KINDS = {MLP: "LeNet-300-100", CNN: "LeNet-5"}
PUBLISHED = {
    (MLP, False): (1.57, 1.60, 1.64, 550),
    (MLP, True): (1.80, 1.81, 1.83, 800),
    (CNN, False): (0.89, 0.95, 0.93, 600),
    (CNN, True): (1.27, 1.28, 1.29, 1200),
}
"""The paper's table 1: errors of both networks, of the merged one after retraining, and its iterations."""
TABLE_STEPS, TASKS_STEPS = (0, 550), (0, 2000)
PLOT = Path(__file__).with_suffix(".svg")


# --- the tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Two networks, and how they are merged; `steps` of training without labels."""

    pair: tuple[LeNet, LeNet]
    how: str
    steps: int
    samples: int

    @property
    def path(self) -> Path:
        """Of its cell in the cache."""
        names = "+".join(lenet.name for lenet in self.pair)
        return FOLDER / f"{names}_{self.how.replace(' ', '-')}_{self.steps}_{self.samples}.json"


@dataclass(frozen=True)
class Cell:
    """Errors in per cent of both networks, before and after; `weights`: numbers that are not zero, before and after."""

    originals: list[float]
    merged: list[float]
    weights: list[int]
    seconds: float

    @property
    def increases(self) -> list[float]:
        """In points."""
        return [after - before for before, after in zip(self.originals, self.merged, strict=True)]


def cell(run: Run, finished: bool) -> Cell | None:
    """One run, from the cache if it has been made before; None where that is all that is asked for."""
    if not run.path.exists():
        if finished:
            return None
        made = _made(run)
        temporary = run.path.with_suffix(".partial")
        temporary.write_text(json.dumps(asdict(made)))
        temporary.rename(run.path)
        print(f"{run.path.stem}: {made}", flush=True)
    return Cell(**json.loads(run.path.read_text()))


def _made(run: Run) -> Cell:
    paths = [lenet.path for lenet in run.pair]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merged.onnx"
        if run.how == ZIP:
            settings = ZipSettings(
                share="1.0", max_drop=None, steps=run.steps, samples=run.samples, threads=THREADS, measure=False
            )
            sources = {lenet.name: images(lenet.data) for lenet in run.pair}
            file = Path(zip_models(paths, sources, Path(folder) / "zipped", settings=settings).candidates[0].path or "")
        else:
            save(_without_adapters(run), file)
        seconds = time.perf_counter() - begun
        merged = [errors(file, lenet.data)[f"{lenet.name}/logits"] for lenet in run.pair]
        weights = [sum(map(_weights, paths)), _weights(file)]
    return Cell([errors(lenet.path, lenet.data)["logits"] for lenet in run.pair], merged, weights, seconds)


def _weights(path: Path) -> int:
    return sum(int(np.count_nonzero(get_array(value))) for value in load(path).graph.initializers.values())


def _without_adapters(run: Run) -> oir.Model:
    networks = load_networks([lenet.path for lenet in run.pair])
    sources = {network.name: images(lenet.data) for network, lenet in zip(networks, run.pair, strict=True)}
    tasks = with_data(networks, sources, seed=0)
    sharable = find_sharable(tasks)
    aligned = align(sharable, tasks[1], tasks, samples=run.samples, seed=0, threads=THREADS)
    merged = _averaged(sharable, aligned, tasks)
    teachers = {task.name: _teacher(sharable, aligned, task, run.samples) for task in tasks}
    cuts = [SHARED + cut.unit.cut for cut in sharable.cuts]
    sparse = run.pair[0].sparse
    Refit(teachers, cuts, _solve_sparse if sparse else _solve, threads=THREADS)(merged)
    if run.steps:
        calibrate_merged(merged, tasks, task_outputs(tasks), Settings(run.steps, threads=THREADS), Silent())
        return pruned(merged, run.pair[0].data) if sparse else merged
    return merged


def _averaged(sharable: Sharable, aligned: Aligned, tasks: Sequence[Task]) -> oir.Model:
    """The mean of the matched hidden layers, and each network's head in the first one's order and scale."""
    assert sharable.stem is not None
    stem, cut, other = sharable.stem.clone(), sharable.cuts[-1], tasks[1]
    constants = sharable.partners[other.name].constants
    Average([Partner(other.model, constants, aligned.alignment)], sharable.spaces)(stem)
    tails = {task.name: cut_out(task.model, [cut.names[task.name]], task.outputs) for task in tasks}
    (head,) = find_layers(tails[other.name])
    weights = weights_and_bias(head)
    weights[:, :-1] = weights[:, aligned.orders[cut.unit.cut]] / aligned.scales[cut.unit.cut][:, None]
    set_weights_and_bias(head, weights)
    return AttachTails(tails)(stem).model


def _teacher(sharable: Sharable, aligned: Aligned, task: Task, samples: int) -> Teacher:
    split = task.data.calibration.take(samples, 0)
    reference = task is sharable.reference
    computed = [value.name or "" for node in task.model.graph for value in node.outputs]
    theirs = {name: name for name in computed} if reference else sharable.partners[task.name].values
    names = [name for name in theirs if name not in task.outputs]
    return Teacher(
        model=task.model,
        samples=task.feeds(split, task),
        student_samples=task.feeds(split, sharable.reference),
        count=len(split),
        values={SHARED + name: theirs[name] for name in names} | {f"{task.name}/{name}": name for name in task.outputs},
        orders={} if reference else {SHARED + name: order for name, order in aligned.orders.items()},
        scales={} if reference else {SHARED + name: scale for name, scale in aligned.scales.items()},
    )


def _solve(layer: Layer, found: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    return solve_least_squares(found, current, [1.0] * len(found))


def _solve_sparse(layer: Layer, found: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    known = [own for own in found if own.rows]
    moments, cross = (
        np.mean([getattr(own, name)[0] / own.rows for own in known], axis=0) for name in ("gram", "cross")
    )
    return prune(moments, cross, current[0], density(layer))[None]


def table_1(seeds: int, samples: int, finished: bool) -> None:
    """Print the paper's figures beside ours."""
    rows = []
    for (kind, sparse), (first, second, retrained, iterations) in PUBLISHED.items():
        pairs = [(LeNet(kind, MNIST, 2 * n, sparse), LeNet(kind, MNIST, 2 * n + 1, sparse)) for n in range(seeds)]
        row = [f"{KINDS[kind]}, {'sparse' if sparse else 'dense'}", f"{first:.2f} / {second:.2f}"]
        row.append(f"{retrained - (first + second) / 2:+.3f} ({iterations})")
        rows.append(row + _cells(pairs, TABLE_STEPS, samples, finished))
    print("\nTable 1: increase of the error in points\n")
    print(markdown.table(["networks", "paper: errors", "paper (iterations)", *_header(TABLE_STEPS)], rows), flush=True)


def _cells(pairs: Sequence[tuple[LeNet, LeNet]], steps: Sequence[int], samples: int, finished: bool) -> list[str]:
    found = {
        (how, count): [made for pair in pairs if (made := cell(Run(pair, how, count, samples), finished)) is not None]
        for how in (BARE, ZIP)
        for count in steps
    }
    known = next((own for own in found.values() if own), [])
    shown = [_ranges([own.originals for own in known], "{:.2f}")]
    for how in (BARE, ZIP):
        shown += [_increases(found[how, count]) for count in steps]
        last = next((own for count in steps for own in found[how, count]), None)
        shown.append("" if last is None else f"{last.weights[1] / last.weights[0]:.2f}")
    return shown


def _header(steps: Sequence[int]) -> list[str]:
    return ["errors here", *(f"{how}: {own}" for how in (BARE, ZIP) for own in (*map(str, steps), "size"))]


def _ranges(rows: Sequence[Sequence[float]], style: str) -> str:
    return " / ".join(style.format(statistics.mean(own)) for own in zip(*rows, strict=True))


def _increases(made: Sequence[Cell]) -> str:
    """Mean over pairs of the mean of both networks, and the range over pairs."""
    if not made:
        return ""
    means = [statistics.mean(own.increases) for own in made]
    return f"{statistics.mean(means):+.3f} ({min(means):+.2f} to {max(means):+.2f})"


def two_tasks(seeds: int, samples: int, finished: bool) -> None:
    """Print the increase of each task's error."""
    rows = []
    for kind, shown in KINDS.items():
        pairs = [(LeNet(kind, MNIST, n), LeNet(kind, FASHION, n)) for n in range(seeds)]
        for how in (BARE, ZIP):
            for steps in TASKS_STEPS:
                found = [cell(Run(pair, how, steps, samples), finished) for pair in pairs]
                made = [own for own in found if own is not None]
                if made:
                    increases = list(zip(*(own.increases for own in made), strict=True))
                    spreads = [f"{statistics.mean(own):+.2f} ({min(own):+.2f} to {max(own):+.2f})" for own in increases]
                    size = made[0].weights[1] / made[0].weights[0]
                    before = _ranges([own.originals for own in made], "{:.2f}")
                    rows.append([shown, before, how, steps, *spreads, f"{size:.2f}"])
    print("\nTwo tasks: increase of the error in points\n")
    header = ["networks", "errors: MNIST / Fashion", "how", "steps", "MNIST", "Fashion", "size"]
    print(markdown.table(header, rows), flush=True)


# --- figure 2 ---------------------------------------------------------------------------------------------------------

RANDOM, GREEDY = "random", "paper: greedy by functional difference"
ASSIGNED, FITTED = "assignment by functional difference", "the same, what reads them refitted"
COUNTS = ([(n,) for n in range(0, 301, 30)], [(300, n) for n in range(0, 101, 10)])
RIDGE, FIGURE_SAMPLES = 1e-2, 5000

Weights = list[np.ndarray]
"""[fan in + 1, neurons] of each layer, the bias last."""


def share(first: Weights, second: Weights, x: np.ndarray, counts: Sequence[int], rule: str, seed: int) -> list[Weights]:
    """Share neurons of two perceptrons; in all layers of `counts` but the last all of them.

    Args:
        first: one network.
        second: the other, as wide.
        x: what both read, [samples, pixels].
        counts: how many neurons are shared in each of the first layers.
        rule: how they are chosen and made one.
        seed: of what is random.

    Returns:
        both networks, the second with its neurons in another order: those that are shared have one column in both.
    """
    generator = np.random.default_rng(seed)
    originals, networks = (list(first), list(second)), (list(first), list(second))
    read, wanted = [x, x], [x, x]
    for depth in range(len(first)):
        inputs = [_ones(values) for values in read]
        if rule == FITTED and depth:
            for network, own, have, want in zip(networks, originals, inputs, wanted, strict=True):
                network[depth] = _fitted(have, _ones(want) @ own[depth], network[depth])
        if depth < len(counts):
            moments = [own.T @ own / len(own) for own in inputs]
            cost = functional_difference(moments, *(network[depth] for network in networks))
            ours, theirs = _pairs(cost, counts[depth], rule, generator)
            for network in (originals[1], networks[1]):
                _reorder(network, depth, ours, theirs)
            both = [network[depth][:, ours] for network in networks]
            if rule == RANDOM:
                shared = np.where(generator.random(len(ours)) < 0.5, *both)
            else:
                shared = solve_hessian([own[None] for own in moments], [own[None] for own in both], [1.0, 1.0])[0]
            for network in networks:
                network[depth] = network[depth].copy()
                network[depth][:, ours] = shared
        read = [np.maximum(own @ network[depth], 0) for own, network in zip(inputs, networks, strict=True)]
        wanted = [np.maximum(_ones(own) @ network[depth], 0) for own, network in zip(wanted, originals, strict=True)]
    return list(networks)


def _pairs(cost: np.ndarray, count: int, rule: str, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` neurons of ours and those of theirs that they are shared with; `cost` is [theirs, ours]."""
    if rule == RANDOM:
        return generator.permutation(len(cost))[:count], generator.permutation(len(cost))[:count]
    if rule == GREEDY:
        left, found = cost.copy(), np.empty((2, count), int)
        for place in range(count):
            theirs, ours = np.unravel_index(left.argmin(), left.shape)
            found[:, place] = ours, theirs
            left[theirs], left[:, ours] = np.inf, np.inf
        return found[0], found[1]
    alone = len(cost) - count  # as many neurons of each network go to none of the other, for nothing
    padded = np.zeros((len(cost) + alone,) * 2)
    padded[: len(cost), : len(cost)] = cost
    padded[len(cost) :, len(cost) :] = 1 + cost.sum()
    theirs, ours = linear_sum_assignment(padded)
    real = (theirs < len(cost)) & (ours < len(cost))
    return ours[real], theirs[real]


def _reorder(network: Weights, depth: int, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Put neurons `theirs` of a layer to the places `ours`, and the others where there is room."""
    order = np.empty(network[depth].shape[1], int)
    order[ours] = theirs
    order[np.setdiff1d(np.arange(len(order)), ours)] = np.setdiff1d(np.arange(len(order)), theirs)
    network[depth] = network[depth][:, order]
    network[depth + 1] = network[depth + 1][[*order, len(order)]]


def _fitted(inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    found = Regression()
    found.update(inputs[None, :, :-1], targets)
    return solve_least_squares([found], weights[None], [1.0], RIDGE)[0]


def _ones(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.ones((len(values), 1))], axis=1)


def _wrong(network: Weights, x: np.ndarray, labels: np.ndarray) -> float:
    """Per cent."""
    for weights in network[:-1]:
        x = np.maximum(_ones(x) @ weights, 0)
    return 100 * float(np.mean((_ones(x) @ network[-1]).argmax(1) != labels))


def _curves(first: LeNet, second: LeNet, seed: int) -> dict[str, list[list[float]]]:
    """By rule, for both layers the mean error of the two networks at each count."""
    networks = [[weights_and_bias(layer)[0] for layer in find_layers(load(lenet.path))] for lenet in (first, second)]
    with np.load(images(first.data)) as arrays:
        x = arrays["input"][:FIGURE_SAMPLES].reshape(FIGURE_SAMPLES, -1).astype(np.float64)
    inputs, labels = test_images(first.data)
    inputs = inputs.reshape(len(inputs), -1)
    return {
        rule: [
            [
                statistics.mean(_wrong(own, inputs, labels) for own in share(*networks, x, counts, rule, seed))
                for counts in layer
            ]
            for layer in COUNTS
        ]
        for rule in (RANDOM, GREEDY, ASSIGNED, FITTED)
    }


def figure_2(seeds: int, samples: int, finished: bool) -> None:
    """Draw the curves, and print them where neurons are all shared."""
    found = []
    for seed in range(seeds):
        path = FOLDER / f"figure2_{seed}.json"
        if not path.exists():
            if finished:
                continue
            curves = _curves(LeNet(MLP, MNIST, 2 * seed), LeNet(MLP, MNIST, 2 * seed + 1), seed)
            path.write_text(json.dumps(curves))
        found.append(json.loads(path.read_text()))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    grid = figure.subplots(1, len(COUNTS), sharey=True)
    rows = []
    for rule in (RANDOM, GREEDY, ASSIGNED, FITTED):
        row = [rule]
        for axes, counts, place in zip(grid, COUNTS, range(len(COUNTS)), strict=True):
            errors_of = np.array([own[rule][place] for own in found])
            (line,) = axes.plot([own[-1] for own in counts], errors_of.mean(0), marker="o", markersize=3, label=rule)
            axes.fill_between(
                [own[-1] for own in counts], errors_of.min(0), errors_of.max(0), color=line.get_color(), alpha=0.2
            )
            increases = errors_of[:, -1] - [own[rule][0][0] for own in found]
            row.append(f"{increases.mean():+.2f} ({increases.min():+.2f} to {increases.max():+.2f})")
        rows.append(row)
    for axes, title in zip(grid, ("first hidden layer", "second, the first wholly shared"), strict=True):
        axes.set(title=title, xlabel="shared neurons", yscale="log")
        axes.grid(alpha=0.3)
        axes.set_yticks([2, 5, 10, 20, 30], ["2", "5", "10", "20", "30"])
        axes.set_yticks([], minor=True)
    grid[0].set_ylabel("mean error of both networks (%)")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})
    print("\nFigure 2: increase of the error in points where all neurons are shared\n")
    print(markdown.table(["rule", "first layer (300)", "both layers (300 + 100)"], rows), flush=True)


PARTS: dict[str, Callable[[int, int, bool], None]] = {"table1": table_1, "tasks": two_tasks, "figure2": figure_2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="only these, in this order")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of networks, at most 3")
    parser.add_argument("--samples", type=int, default=10_000, help="unlabelled, for the closed forms")
    parser.add_argument("--finished", action="store_true", help="show what is in the cache, make nothing")
    options = parser.parse_args()
    for part in options.part:
        PARTS[part](options.seeds, options.samples, options.finished)


if __name__ == "__main__":
    main()
