"""The result in one sentence: what was chosen and what it saves."""

from onnxmerge.report.figures import megabytes, one_line, percent, points, significant
from onnxmerge.report.schema import Candidate, LayerMap, Result


def task_names(result: Result) -> list[str]:
    """All tasks, the inputs' first and in their order; those of a merged model where that is the only input."""
    names = [record.task for record in result.inputs]
    if len(names) == 1 and any(candidate.tasks and names[0] not in candidate.tasks for candidate in result.candidates):
        names = []
    for candidate in result.candidates:
        names.extend(task for task in candidate.tasks if task not in names)
    return names


def chosen_candidate(result: Result) -> Candidate | None:
    """The chosen candidate, or None when none was chosen."""
    return None if result.chosen is None else result.candidate(result.chosen)


def original_bytes(result: Result) -> int | None:
    """Size of all originals together in bytes; None when there are none on record."""
    return sum(record.bytes for record in result.inputs) or None


def has_stem(result: Result) -> bool:
    """Whether candidates differ in how many units of a stem they share."""
    return result.method not in ("fuse", "gate")


def is_fused(result: Result) -> bool:
    """Whether the originals have one task, so that their ensemble is what candidates are compared with."""
    kept_apart = any(candidate.ensemble is None for candidate in result.candidates)
    return result.method == "fuse" or (result.method == "gate" and not kept_apart)


def best_original(result: Result) -> tuple[str, float] | None:
    """The original of the highest accuracy on all held-out samples, and that accuracy; None without labels."""
    known = {task: score.accuracy for task, score in result.originals.items() if score.accuracy is not None}
    return max(known.items(), key=lambda item: item[1], default=None)


def ensemble_accuracy(result: Result) -> float | None:
    """The accuracy of the originals' mean prediction; None without labels."""
    scores = [*result.originals.values(), *(c.ensemble for c in result.candidates if c.ensemble is not None)]
    return next((score.original_accuracy for score in scores if score.original_accuracy is not None), None)


def headline(result: Result) -> str:
    """One sentence: the chosen candidate, its size and speed against the originals, and its worst drop."""
    if result.layer_map is not None:
        return _mapped(result.layer_map, *task_names(result))
    if result.method in ("bench", "validate") and result.candidates:
        return _held_against_bounds(result)
    chosen = chosen_candidate(result)
    if chosen is None:
        return _nothing_chosen(result)
    if is_fused(result):
        return _fused(chosen, result)
    facts = [_size(chosen, result), _speed(chosen, result), _worst_drop(chosen)]
    known = [fact for fact in facts if fact is not None]
    return f"{_sharing(chosen, result)}{': ' if known else ''}{'; '.join(known)}."


def _held_against_bounds(result: Result) -> str:
    """What `bench` and `validate` found: they make no candidates and choose none."""
    fastest = min(result.candidates, key=lambda candidate: candidate.latency_ms.merged or 0.0)
    subject = one_line(fastest.name)
    if len(result.candidates) > 1:
        subject += f" is the fastest of {len(result.candidates)}"
    else:
        subject += " was timed" if result.method == "bench" else " was compared with its originals"
    total, broken = len(result.checks), len(result.broken)
    if total:
        kept = f"{broken} of {total} bounds {'is' if broken == 1 else 'are'} broken" if broken else "no bound is broken"
        subject += f", and {kept}"
    merged = fastest.latency_ms.merged
    time = None if merged is None or fastest.latency_ms.speedup is not None else f"{significant(merged)} ms"
    facts = [time, _speed(fastest, result), _size(fastest, result), _worst_drop(fastest)]
    known = [fact for fact in facts if fact is not None]
    return f"{subject}{': ' if known else ''}{'; '.join(known)}."


def _fused(chosen: Candidate, result: Result) -> str:
    facts = [_against_originals(chosen, result), _size(chosen, result), _speed(chosen, result)]
    known = [fact for fact in facts if fact is not None]
    return f"{one_line(chosen.name)} was chosen, {_why(chosen, result)}{': ' if known else ''}{'; '.join(known)}."


def _why(chosen: Candidate, result: Result) -> str:
    """Why a fuse or a gate run chose what it did."""
    if result.method == "gate":
        tuned = f", fine-tuned for {chosen.steps} steps" if chosen.steps else ""
        return f"the channels of the originals that gates selected{tuned}"
    if chosen.steps:
        started = "" if chosen.start is None else f" {one_line(chosen.start)}"
        return f"the candidate{started} calibrated for {chosen.steps} steps with the originals as teachers"
    if len(result.candidates) == 1:
        return "the only candidate"
    closeness = {c.name: c.ensemble.closeness for c in result.candidates if c.ensemble is not None}
    nearest = closeness.get(chosen.name) == max(closeness.values(), default=None)
    bound = "" if nearest else ", of those within the allowed drop,"
    return f"the candidate that{bound} agrees best with the ensemble of the originals"


def _against_originals(chosen: Candidate, result: Result) -> str | None:
    """The chosen candidate's quality by the best figure there is."""
    score, best = chosen.ensemble, best_original(result)
    if score is None:
        return None
    if score.accuracy is not None:
        text = f"accuracy {percent(score.accuracy)} %"
        if best is not None:
            text += f", {points(score.accuracy - best[1])} points from the best original ({one_line(best[0])})"
        if score.original_accuracy is not None:
            text += f", {points(score.accuracy - score.original_accuracy)} from the ensemble"
        return text
    if score.agreement is not None:
        return f"it agrees with the ensemble on {percent(score.agreement)} % of the held-out samples"
    return (
        None if score.relative_error is None else f"relative error to the ensemble {significant(score.relative_error)}"
    )


def _mapped(found: LayerMap, first: str, second: str) -> str:
    mean = sum(pair.cka for pair in found.pairs) / len(found.pairs)
    number = len(found.pairs)
    return (
        f"{number} of the {len(found.first)} hidden layers or blocks of {one_line(first)} and {number} of the "
        f"{len(found.second)} of {one_line(second)} stand for each other, with a mean CKA of {significant(mean)}."
    )


def _nothing_chosen(result: Result) -> str:
    if not result.candidates:
        return "No candidate was made."
    number = len(result.candidates)
    rejected = "The only candidate did not stay" if number == 1 else f"None of the {number} candidates stayed"
    scored = [candidate for candidate in result.candidates if candidate.worst_drop is not None]
    if not scored:
        return f"{rejected} within the allowed drop."
    mildest = min(scored, key=lambda candidate: candidate.worst_drop or 0.0)
    subject = "it has a" if number == 1 else f"the mildest is {one_line(mildest.name)}, with a"
    return f"{rejected} within the allowed drop; {subject} {_worst_drop(mildest)}."


def _sharing(chosen: Candidate, result: Result) -> str:
    name = one_line(chosen.name)
    if result.method == "gate":
        return f"{name} was chosen, {_why(chosen, result)}"
    if not result.units and not chosen.branches:
        return f"{name} was chosen"
    branches = [f"{units} units between {one_line(group)}" for group, units in chosen.branches.items()]
    if chosen.share == 0:
        return f"{name} was chosen, which shares {', '.join(branches) or 'nothing'}"
    total, tasks = len(result.units), len(result.inputs)
    stem = f"all {total} stem units" if chosen.share == total else f"{chosen.share} of {total} stem units"
    return f"{name} was chosen, which shares {', '.join([f'{stem} between {tasks} tasks', *branches])}"


def _size(chosen: Candidate, result: Result) -> str | None:
    separate = original_bytes(result)
    if separate is None:
        return None
    originals = "the original" if len(result.inputs) == 1 else "the originals together"
    saved = 1 - chosen.bytes / separate
    sizes = f"({megabytes(chosen.bytes)} MB for {megabytes(separate)} MB)"
    if abs(saved) < 0.005:
        return f"as large as {originals} {sizes}"
    return f"{abs(100 * saved):.0f} % {'smaller' if saved > 0 else 'larger'} than {originals} {sizes}"


def _speed(chosen: Candidate, result: Result) -> str | None:
    speedup = chosen.latency_ms.speedup
    originals = "the original" if len(result.inputs) == 1 else "the originals run separately"
    return None if speedup is None else f"{significant(speedup)} times as fast as {originals}"


def _worst_drop(candidate: Candidate) -> str | None:
    """The worst task's drop in the terms it was measured in."""
    scored = {task: score for task, score in candidate.tasks.items() if score.drop is not None}
    if not scored:
        return None
    task, score = max(scored.items(), key=lambda item: item[1].drop or 0.0)
    of_task = f"({one_line(task)})"
    if score.accuracy is not None and score.original_accuracy is not None:
        return f"worst accuracy change of {points(score.accuracy - score.original_accuracy)} points {of_task}"
    if score.agreement is not None:
        return f"lowest agreement with an original of {percent(score.agreement)} % {of_task}"
    return f"largest relative error of {significant(score.relative_error or 0.0)} {of_task}"
