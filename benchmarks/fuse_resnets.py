"""Fuse residual networks of unequal depth on CIFAR-10: CLAFusion's tables 1, 2 and 3 (14, 15, 17), at one core's scale.

python benchmarks/fuse_resnets.py [--seeds 3] [--samples 2000] [--part NAME] [--finished]

The networks are resnet8, resnet14 and resnet20 of the shared models; all are fused into resnet20. The closed forms see
`--samples` unlabelled training images. What is trained afterwards sees the training images, 64 in a step, equally many
steps of one schedule for all (the trainer's default: AdamW, one cycle, a highest rate of 0.01 of each array's size):
with labels alone (the paper's fine-tune), or without any (the default losses, towards all networks that were fused). Of
the first and the last weights those with the lower loss on 1000 test images are kept (* where those are the first in
every seed); the paper takes its best epoch.
The networks are given, so a seed decides only the order of the images, and how a random start is drawn. Accuracy in per
cent of all 10 000 test images.

Each cell is kept in benchmarks/cache/fuse_resnets as it is finished, and an interrupted run goes on from there;
`--finished` prints the tables of what there is. Delete that folder when the code has changed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import markdown
import onnx_ir as oir
from datasets import CACHE, SHARED, cifar

from onnxmerge import FuseSettings, fuse_models
from onnxmerge.calibration.settings import Settings
from onnxmerge.errors import ModelError
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.methods.calibrating import calibrate_merged
from onnxmerge.methods.choices import Balance, LayerCost, Matching, Rule, Targets
from onnxmerge.methods.fuse_plan import Planned, make_fuse_plan
from onnxmerge.methods.fusing import fuse_networks, kept_network
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Feeds, Task, load_networks, with_data
from onnxmerge.passes.reinitialise import Reinitialise
from onnxmerge.report.schema import Result
from onnxmerge.runtime.activations import BATCH, stream

FOLDER = CACHE / "fuse_resnets"
IMAGES = 50_000
SHORT, LONG = 300, 1000

OT, MEAN, SELECTED, HEADS = "OT as published", "least squares, mean", "least squares, selected", "heads"
PARENT, ALIGNED, RANDOM = "resnet20", "the other in resnet20's depth", "random resnet20"
HMT, HMT_AVERAGE, HMT_OT, HMT_CLA = "HMT", "HMT + naive average", "HMT + OTFusion", "HMT + CLA + OTFusion"
KEEP = "least squares, selected, keep"
LABELS, TEACHERS = "labels", "teachers"

CANDIDATES = {"least-squares-mean": MEAN, "least-squares-selected": SELECTED, "heads": HEADS}
"""What `fuse_models` calls the ones that it tries."""

_TRANSFER = {"balance": Balance.KEEP, "cost": LayerCost.ORDER}
RULES: dict[str, dict[str, object]] = {
    OT: {"rule": Rule.TRANSPORT},
    HMT: {"rule": Rule.AVERAGE, "match": Matching.NONE, "weights": (0.0, 1.0), **_TRANSFER},
    HMT_AVERAGE: {"rule": Rule.AVERAGE, "match": Matching.NONE, **_TRANSFER},
    HMT_OT: {"rule": Rule.TRANSPORT, **_TRANSFER},
    HMT_CLA: {"rule": Rule.TRANSPORT, "balance": Balance.KEEP},
    KEEP: {"targets": Targets.SELECTED, "balance": Balance.KEEP},
}
"""Starts that one rule makes, with what is set for it."""

STARTS = (OT, MEAN, SELECTED, HEADS, PARENT, ALIGNED, RANDOM)
TABLE_1 = {OT: ("65.72", "93.67"), PARENT: ("93.31", "93.52"), ALIGNED: ("92.92", "93.24"), RANDOM: ("", "92.00")}
"""The paper's accuracies before and after fine-tuning: CIFAR-10, ResNet-34 and ResNet-18, means of five seeds."""
TABLE_2 = {OT: ("31.76", "93.76"), PARENT: ("93.31", "93.52")}
"""The same for four networks."""
TABLE_3 = {
    HMT: ("10.79 +- 1.01", "93.10 +- 0.18"),
    HMT_AVERAGE: ("37.49 +- 4.59", "93.38 +- 0.19"),
    HMT_OT: ("18.32 +- 1.76", "93.66 +- 0.14"),
    HMT_CLA: ("61.29 +- 3.69", "93.86 +- 0.14"),
    KEEP: ("", ""),
    SELECTED: ("", ""),
}


@dataclass(frozen=True)
class Run:
    """A start, and what it is trained with.

    Attributes:
        depths: of the networks; the first is whose architecture the result has.
        start: one of those above.
        how: with labels alone, or towards the networks as teachers.
        steps: 0 only scores the start.
        seed: of the training.
    """

    depths: tuple[int, ...]
    start: str
    how: str = LABELS
    steps: int = 0
    seed: int = 0

    @property
    def slug(self) -> str:
        """Its file name; with labels alone it makes no difference which networks stand beside the reference."""
        alone = self.start in (PARENT, RANDOM) and self.how == LABELS
        trained = f"_{self.how}_{self.steps}_{self.seed}" if self.steps else f"_{self.seed}" * (self.start == RANDOM)
        return f"{_family(self.depths[:1] if alone else self.depths)}_{_slug(self.start)}{trained}"


@dataclass(frozen=True)
class Score:
    """Accuracy in per cent, and whether training ended below its start by the loss; `refused`: why there is none."""

    accuracy: float = 0.0
    kept_start: bool = False
    refused: str = ""


@dataclass
class Family:
    """The networks of some depths, and the starts that are made of them."""

    depths: tuple[int, ...]
    samples: int

    @cached_property
    def paths(self) -> list[Path]:
        """The files."""
        return [SHARED / "models" / f"resnet{depth}_cifar10.onnx" for depth in self.depths]

    @cached_property
    def tasks(self) -> list[Task]:
        """The networks with their images, the reference first."""
        networks = load_networks(self.paths)
        return with_data(networks, {network.name: cifar(labels=True, samples=IMAGES) for network in networks}, seed=0)

    @property
    def folder(self) -> Path:
        """Where `fuse_models` puts its candidates."""
        return FOLDER / f"{_family(self.depths)}_candidates"

    @cached_property
    def result(self) -> Result:
        """What `fuse_models` makes and chooses, without training."""
        report = self.folder / "report.json"
        if not report.exists():
            images = cifar(labels=True, samples=IMAGES)
            fuse_models(self.paths, images, self.folder, settings=self.settings(), resume=True)
        return Result.model_validate_json(report.read_text())

    def settings(self, **given: object) -> FuseSettings:
        """What is set for every fusing, and `given`."""
        return FuseSettings(into=self.tasks[0].name, samples=self.samples, threads=1, measure=False, **given)

    def plan(self, **given: object) -> Planned:
        """The layer maps."""
        return make_fuse_plan(self.tasks, self.settings(**given), Silent())

    def start(self, run: Run) -> oir.Model:
        """Where the run begins.

        Raises:
            ModelError: there is no such start.
        """
        reference = self.tasks[0]
        if run.start == PARENT:
            return reference.model.clone()
        if run.start == RANDOM:
            return Reinitialise(run.seed)(reference.model.clone()).model
        path = FOLDER / f"{_family(self.depths)}_{_slug(run.start)}.onnx"
        if run.start in CANDIDATES.values():
            names = {shown: name for name, shown in CANDIDATES.items()}
            path = Path(next(own.path for own in self.result.candidates if own.name == names[run.start]))
        elif not path.exists():
            save(self._made(run.start), path)
        return load(path)

    def _made(self, start: str) -> oir.Model:
        if start == ALIGNED:
            planned = self.plan()
            return kept_network(planned.reference, planned.others[0], planned.maps[0])
        settings = self.settings(**RULES[start])
        planned = make_fuse_plan(self.tasks, settings, Silent())
        weights = settings.weights_of(len(self.tasks))
        return fuse_networks(planned.reference, planned.others, planned.maps, weights, settings.options, Silent())


@dataclass
class Bench:
    """Finished cells, and how to finish more.

    Attributes:
        samples: unlabelled, of the closed forms.
        finished: only what is in the cache is known.
    """

    samples: int
    finished: bool
    families: dict[tuple[int, ...], Family] = field(default_factory=dict)

    def family(self, depths: tuple[int, ...]) -> Family:
        """Loaded when it is first needed."""
        return self.families.setdefault(depths, Family(depths, self.samples))

    def score(self, run: Run) -> Score | None:
        """One run, from the cache if it has been made before; None where that is all that is asked for."""
        path = FOLDER / f"{run.slug}_samples{self.samples}.json"
        if not path.exists():
            if self.finished:
                return None
            FOLDER.mkdir(parents=True, exist_ok=True)
            begun = time.perf_counter()
            score = self._score(run)
            temporary = path.with_suffix(".partial")
            temporary.write_text(json.dumps(vars(score)))
            temporary.rename(path)
            print(f"{run.slug}: {score} ({time.perf_counter() - begun:.0f} s)", flush=True)
        return Score(**json.loads(path.read_text()))

    def _score(self, run: Run) -> Score:
        family = self.family(run.depths)
        try:
            model = family.start(run)
        except ModelError as error:
            return Score(refused=str(error).replace(f"{SHARED}/models/", ""))
        if not run.steps:
            return Score(accuracy(model, family.tasks[0]))
        teachers = family.tasks if run.how == TEACHERS else family.tasks[:1]
        only = {"label_weight": 1.0, "kl_weight": 0.0, "logit_weight": 0.0, "feature_weight": 0.0}
        settings = Settings(run.steps, seed=run.seed, evaluations=1, threads=1, **(only if run.how == LABELS else {}))
        outputs = {task.name: [value.name or "" for value in model.graph.outputs] for task in teachers}
        losses = calibrate_merged(model, teachers, outputs, settings, Silent()).losses
        return Score(accuracy(model, family.tasks[0]), kept_start=losses[-1][1] >= losses[0][1])


def accuracy(model: oir.Model, task: Task) -> float:
    """Per cent of the held-out images."""
    split, output = task.data.held_out, model.graph.outputs[0].name or ""
    feeds = Feeds(split, dict(zip(task.inputs, [value.name or "" for value in model.graph.inputs], strict=True)))
    found = stream(model, feeds, [output], threads=1)
    right = [a[output].argmax(1) == b.labels for a, b in zip(found, split.batches(BATCH), strict=True)]
    return 100 * sum(int(own.sum()) for own in right) / len(split)


# --- the cells of each table, and how they are shown ------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A table of starts, before training and after.

    Attributes:
        title: above the table.
        depths: of the networks.
        published: for some starts the paper's accuracies, before and after.
        columns: (how, steps, seeds, starts) of each training.
        starts: the rows.
    """

    title: str
    depths: tuple[int, ...]
    published: Mapping[str, tuple[str, str]]
    columns: Sequence[tuple[str, int, int, Sequence[str]]]
    starts: Sequence[str] = STARTS

    def runs(self) -> list[Run]:
        """All its cells, the first seed of all trainings first."""
        plain = [Run(self.depths, start) for start in self.starts]
        trained = [
            (seed, Run(self.depths, start, how, steps, seed))
            for how, steps, seeds, starts in self.columns
            for seed in range(seeds)
            for start in starts
        ]
        return plain + [run for _, run in sorted(trained, key=lambda own: own[0])]

    def show(self, bench: Bench) -> None:
        """Print the table, with the paper's figures beside ours."""
        header = ["start", "paper", "paper, fine-tuned", "here"]
        header += [f"{how}, {steps} steps" for how, steps, *_ in self.columns]
        rows, reasons = [], []
        for start in self.starts:
            before = bench.score(Run(self.depths, start))
            cells = [start, *self.published.get(start, ("", "")), _shown([before])]
            for how, steps, seeds, starts in self.columns:
                runs = [Run(self.depths, start, how, steps, seed) for seed in range(seeds if start in starts else 0)]
                cells.append(_shown([bench.score(run) for run in runs]))
            rows.append(cells)
            reasons += [f"{start}: {before.refused}"] if before is not None and before.refused else []
        print(f"\n{self.title}\n\n{markdown.table(header, rows)}\n")
        print("".join(f"- {reason}\n" for reason in reasons), end="", flush=True)

    def show_choice(self, bench: Bench) -> None:
        """Print what the product chooses without labels."""
        family = bench.family(self.depths)
        if bench.finished and not (family.folder / "report.json").exists():
            return
        result = family.result
        ensemble = result.candidates[0].ensemble
        assert ensemble is not None
        rows = [
            [CANDIDATES[own.name], f"{own.ensemble.closeness:.4f}", "chosen" if own.name == result.chosen else ""]
            for own in result.candidates
            if own.ensemble is not None
        ]
        print(f"The ensemble: {markdown.percent(ensemble.original_accuracy)}. Agreement of the candidates with it:\n")
        print(markdown.table(["candidate", "agreement", ""], rows), flush=True)


def parts(seeds: int) -> dict[str, Part]:
    """The tables by name, what matters most first."""
    fused, main = (MEAN, HEADS), (OT, MEAN, HEADS, PARENT, ALIGNED, RANDOM)
    short = [(LABELS, SHORT, seeds, main), (TEACHERS, SHORT, seeds, (*fused, PARENT))]
    long = [(LABELS, LONG, 1, (OT, *fused, PARENT)), (TEACHERS, LONG, 1, (*fused, PARENT))]
    once = [(LABELS, SHORT, 1, main), (TEACHERS, SHORT, 1, (*fused, PARENT))]
    three = [(LABELS, SHORT, 1, (OT, *fused, PARENT)), (TEACHERS, SHORT, 1, (*fused, PARENT))]
    transfer = [(LABELS, SHORT, 1, tuple(TABLE_3))]
    without = tuple(start for start in STARTS if start not in (ALIGNED, RANDOM))
    return {
        "14": Part("Table 1: resnet20 and resnet14", (20, 14), TABLE_1, short),
        "transfer": Part("Table 3: resnet14 transferred to resnet20", (20, 14), TABLE_3, transfer, tuple(TABLE_3)),
        "8": Part("Table 1: resnet20 and resnet8", (20, 8), TABLE_1, once),
        "three": Part("Table 2: resnet20, resnet14 and resnet8", (20, 14, 8), TABLE_2, three, without),
        "long": Part("Table 1 with more steps: resnet20 and resnet14", (20, 14), TABLE_1, long, (OT, *fused, PARENT)),
    }


def _shown(scores: Sequence[Score | None]) -> str:
    """Mean and deviation of those that are finished; * where the start was kept in all of them."""
    known = [score for score in scores if score is not None]
    if any(score.refused for score in known):
        return "refused"
    if not known:
        return ""
    values = [score.accuracy for score in known]
    spread = f" +- {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}{' *' * all(score.kept_start for score in known)}"


def _family(depths: Sequence[int]) -> str:
    return "resnet" + "-".join(map(str, depths))


def _slug(name: str) -> str:
    return name.lower().replace("'", "").replace("+", "").replace(",", "").replace("  ", " ").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(parts(1))
    parser.add_argument("--seeds", type=int, default=3, help="of the short trainings of resnet20 and resnet14")
    parser.add_argument("--samples", type=int, default=2000, help="unlabelled, for the closed forms")
    parser.add_argument("--part", choices=names, nargs="+", default=names, help="only these tables, in this order")
    parser.add_argument("--finished", action="store_true", help="show what is in the cache, make nothing")
    options = parser.parse_args()
    bench = Bench(options.samples, options.finished)
    for name in options.part:
        part = parts(options.seeds)[name]
        if not options.finished:
            for run in part.runs():
                bench.score(run)
        part.show(bench)
        if name in ("14", "8", "three"):
            part.show_choice(bench)


if __name__ == "__main__":
    main()
