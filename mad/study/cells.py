"""How well each score separates anomalies from normals, and whom it flags: from the files that
`run` leaves.

A cell is one score on one (task, seed, regime, stratum of anomalies).  Its AUROC is the share of
(normal, anomalous) pairs in which the anomalous prompt scores higher, ties counted half.  Regimes
are never pooled: `iid` compares with `normal_iid`, `shift` with `normal_shift`.  A score's **worst
case** is its smallest AUROC over all cells.

Intervals are 95 % percentile bootstraps over prompts (Efron 1979), of the models at hand: normals
are redrawn within their group, anomalies within their stratum.  Every score meets the same redrawn
prompts, so that two scores can be compared draw by draw.  With counts w of normals and v of
anomalies in a draw,

    AUROC = sum_j v_j (W(<a_j) + W(<=a_j)) / 2 / (sum w * sum v),    W: cumulative sum of w in the order of scores,

which is exact and linear in the number of prompts; so no variance formula (DeLong et al. 1988) is
needed, whose symmetric intervals pass 1 where scores separate well.

Circuits: `none` for a baseline; a recipe's name; `random0 of RECIPE` for a random circuit of the
    same size.

Shapes: prompts B, normals N, anomalies A, bootstrap draws D.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mad.detector import Calibration
from mad.study.plan import Recipe
from mad.study.subject import GROUP_NAMES, rows

FOLDER = "scores"
CALIBRATION, ANOMALY = "calibration", "anomaly"
REGIMES = {"iid": "normal_iid", "shift": "normal_shift"}
NONE, SEVERAL, ORACLE = "none", "several", "oracle"  # in place of a circuit
MAIN = Recipe().name  # the circuit that a candidate is reported at
ALPHAS = (0.01, 0.05)
DRAWS = 500
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz", ".joblib")


@dataclass(frozen=True, order=True)
class Scorer:
    """A score and the circuit it looks through."""

    score: str
    circuit: str = NONE

    def __str__(self) -> str:
        return self.score if self.circuit == NONE else f"{self.score} at {self.circuit}"

    @property
    def control_of(self) -> str | None:
        """The circuit that this one is a random control of; None: it is no control."""
        found = re.fullmatch(r"random\d+ of (.+)", self.circuit)
        return None if found is None else found[1]

    @property
    def family(self) -> str | None:
        """Of a baseline at one layer, `FAMILY_layer_N`, the family."""
        found = re.fullmatch(r"(.+)_layer_\d+", self.score)
        return found[1] if found is not None and self.circuit == NONE else None

    @property
    def baseline(self) -> bool:
        """Whether no circuit is used, and nothing is left to choose by looking at anomalies, as a
        layer is.
        """
        return self.circuit == NONE and self.family is None


@dataclass(frozen=True)
class Scores:
    """Every score of one subject."""

    task: str
    seed: int
    strata: Mapping[str, tuple[str, ...]]  # of each prompt of each group
    about: Mapping[str, Any]  # the whole of the .json
    parts: Mapping[Scorer, Mapping[str, Float[Tensor, "B"]]]  # calibration and each group

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.task}-{self.seed}"

    @property
    def anomalous(self) -> bool:
        """Whether there are anomalies to tell from normals."""
        return ANOMALY in self.strata

    def rows(self, group: str) -> dict[str, Tensor]:
        """The rows of each stratum of a group, in alphabetical order."""
        own = self.strata[group]
        return {name: rows(own, name) for name in sorted(set(own))}


@dataclass(frozen=True)
class Results:
    """Every subject's scores."""

    subjects: tuple[Scores, ...]

    @cached_property
    def scorers(self) -> tuple[Scorer, ...]:
        """All that any subject has, controls too, in alphabetical order."""
        return tuple(sorted({scorer for subject in self.subjects for scorer in subject.parts}))

    def select(
        self, *, tasks: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Results:
        """Only the subjects of some tasks, or of some seeds.

        Raises:
            ValueError: none is left.
        """
        left = tuple(
            subject
            for subject in self.subjects
            if (tasks is None or subject.task in tasks) and (seeds is None or subject.seed in seeds)
        )
        if not left:
            there = ", ".join(subject.name for subject in self.subjects)
            raise ValueError(f"0 subjects with tasks={tasks} and seeds={seeds}; there are {there}")
        return Results(left)


# --- reading
# ----------------------------------------------------------------------------------------------------


def read(folder: Path) -> Results:
    """Returns what `run` left in `folder`/scores: a .json and a .safetensors for each subject.

    Raises: FileNotFoundError: there are no scores, or one of a subject's two files is missing.
        ValueError: a file that cannot be read safely or at all, or whose contents do not fit
        together; it is named.
    """
    files = sorted((Path(folder) / FOLDER).glob("*"))
    if pickles := [file for file in files if file.suffix in PICKLES]:
        raise ValueError(
            f"{pickles[0]} may hold code, and only .json and .safetensors are read; remove it"
        )
    stems = {
        suffix: {file.stem for file in files if file.suffix == suffix}
        for suffix in (".json", ".safetensors")
    }
    both = stems[".json"] | stems[".safetensors"]
    if not both:
        raise FileNotFoundError(
            f"{Path(folder) / FOLDER} holds no scores; run the study with this folder first"
        )
    for suffix, own in stems.items():
        if missing := sorted(both - own):
            file = Path(folder) / FOLDER / f"{missing[0]}{suffix}"
            raise FileNotFoundError(
                f"{file} is missing: the subject is unfinished; run the study again"
            )
    subjects = [_read_subject(Path(folder) / FOLDER, stem) for stem in sorted(both)]
    known = {scorer for subject in subjects for scorer in subject.parts}
    return Results(tuple(_with_twins(subject, known) for subject in subjects))


def _read_subject(folder: Path, stem: str) -> Scores:
    file = folder / f"{stem}.json"
    try:
        about = json.loads(file.read_text())
        task, seed = str(about["task"]), int(about["seed"])
        strata = {str(group): tuple(map(str, names)) for group, names in about["strata"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file} is no record of a subject ({error!r}); score that subject anew"
        ) from error
    if stem != f"{task}-{seed}":
        raise ValueError(f"{file} says task={task!r} and seed={seed}; name it {task}-{seed}.json")
    if unknown := [group for group in strata if group not in GROUP_NAMES]:
        raise ValueError(f"{file} has a group {unknown[0]!r}; groups are {', '.join(GROUP_NAMES)}")
    if missing := [group for group in REGIMES.values() if not strata.get(group)]:
        raise ValueError(
            f"{file} has 0 prompts in {missing[0]}; every subject needs normals of both regimes"
        )
    if ANOMALY in strata and not strata[ANOMALY]:
        raise ValueError(f"{file} has 0 prompts in {ANOMALY}; leave the group out, or score some")
    return Scores(task, seed, strata, about, _read_parts(folder / f"{stem}.safetensors", strata))


def _with_twins(subject: Scores, known: set[Scorer]) -> Scores:
    """The subject with its scores under other names too, of recipes that come to the same and that
    others have.

    Where prompts have no positions in common, `positions-X` and `edges-X` are one circuit, and only
    one is computed. That is seen by graphs that have as many edges with positions as without.
    """
    circuits: dict[str, Any] = dict(subject.about.get("circuits", {}))
    by = ("positions-", "edges-")
    totals = [
        {size.get("edges_total") for name, size in circuits.items() if name.startswith(start)}
        for start in by
    ]
    if len(totals[0]) != 1 or totals[0] != totals[1] or None in totals[0]:
        return subject
    parts = dict(subject.parts)
    for name, size in list(circuits.items()):
        old, new = by if name.startswith(by[0]) else by[::-1]
        twin = new + name.removeprefix(old)
        for scorer, own in subject.parts.items():
            other = replace(scorer, circuit=scorer.circuit.replace(name, twin))
            if (
                name in (scorer.circuit, scorer.control_of)
                and other in known
                and other not in parts
            ):
                parts[other] = own
                circuits.setdefault(twin, size)
    return replace(subject, parts=parts, about={**subject.about, "circuits": circuits})


def _read_parts(file: Path, strata: Mapping[str, Sequence[str]]) -> dict[Scorer, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no safetensors file ({error}); score that subject anew"
        ) from error
    parts: dict[Scorer, dict[str, Tensor]] = {}
    lengths = {group: len(names) for group, names in strata.items()}
    for name, tensor in sorted(tensors.items()):
        words = name.split("|")
        if len(words) != 3 or words[2] not in (CALIBRATION, *lengths):
            raise ValueError(
                f"{file} has a tensor {name!r}; names are SCORE|CIRCUIT|PART, PART one of the "
                "groups"
            )
        if tensor.dtype != torch.float32 or tensor.ndim != 1:
            raise ValueError(
                f"{file}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}; it must be a row of "
                "float32"
            )
        wanted = lengths.setdefault(
            words[2], len(tensor)
        )  # only calibration has no strata: all must be as the first
        if len(tensor) != wanted or not wanted:
            raise ValueError(f"{file}: {name!r} has {len(tensor)} scores for {wanted} prompts")
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(
                f"{file}: {bad} of {len(tensor)} scores of {name!r} are not finite; mend the score"
            )
        parts.setdefault(Scorer(words[0], words[1]), {})[words[2]] = tensor
    for scorer, own in parts.items():
        if missing := [part for part in (CALIBRATION, *strata) if part not in own]:
            raise ValueError(
                f"{file} has no {scorer.score}|{scorer.circuit}|{missing[0]}; score that subject "
                "anew"
            )
    return parts


# --- AUROC
# ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A score's AUROC in one place; `low` and `high` bound it, None where nothing was redrawn."""

    score: str
    circuit: str
    task: str
    seed: int
    regime: str  # iid or shift
    stratum: str  # of the anomalies
    auroc: float
    low: float | None
    high: float | None
    normals: int
    anomalies: int

    @property
    def scorer(self) -> Scorer:
        """Whose it is."""
        return Scorer(self.score, self.circuit)

    @property
    def place(self) -> tuple[str, int, str, str]:
        """Task, seed, regime, stratum."""
        return self.task, self.seed, self.regime, self.stratum


def cells(results: Results, *, draws: int = DRAWS, seed: int = 0) -> tuple[Cell, ...]:
    """Every score in every place.  Random controls get no intervals, and with draws=0 nothing does.

    Raises:
        ValueError: draws is negative.
    """
    if draws < 0:
        raise ValueError(f"draws={draws}, but it must be 0 (no intervals) or more")
    found = []
    for subject in results.subjects:
        if not subject.anomalous:
            continue
        rows, redrawn = subject.rows(ANOMALY), _redraw(subject, draws, seed)
        for scorer, parts in sorted(subject.parts.items()):
            for regime, group in REGIMES.items():
                points = _aurocs(parts[group], parts[ANOMALY], rows)
                low, high = torch.full((2, len(rows)), torch.nan)
                if draws and scorer.control_of is None:
                    samples = _auroc_draws(
                        parts[group], parts[ANOMALY], rows, redrawn[group], redrawn[ANOMALY]
                    )
                    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975]), dim=1)
                for name, point, *bounds in zip(
                    rows, points.tolist(), low.tolist(), high.tolist(), strict=True
                ):
                    below, above = (None if bound != bound else bound for bound in bounds)
                    found.append(
                        Cell(
                            scorer.score,
                            scorer.circuit,
                            subject.task,
                            subject.seed,
                            regime,
                            name,
                            point,
                            below,
                            above,
                            len(parts[group]),
                            len(rows[name]),
                        )
                    )
    return tuple(found)


def _aurocs(
    normal: Float[Tensor, "N"], anomalous: Float[Tensor, "A"], rows: Mapping[str, Tensor]
) -> Tensor:
    """The AUROC of each stratum of anomalies."""
    ordered = normal.sort().values
    below, up_to = (torch.searchsorted(ordered, anomalous, side=side) for side in ("left", "right"))
    won = (below + up_to).double() / (2 * len(normal))
    return torch.stack([won[own].mean() for own in rows.values()])


def _auroc_draws(
    normal: Float[Tensor, "N"],
    anomalous: Float[Tensor, "A"],
    rows: Mapping[str, Tensor],
    normal_counts: Float[Tensor, "N D"],
    anomalous_counts: Float[Tensor, "A D"],
) -> Float[Tensor, "strata D"]:
    """The AUROC of each stratum in each draw.  Float32 is exact here: counts are whole and under
    2^23.
    """
    ordered, order = normal.sort()
    sums = torch.cat([torch.zeros(1, normal_counts.shape[1]), normal_counts[order].cumsum(0)])
    below, up_to = (torch.searchsorted(ordered, anomalous, side=side) for side in ("left", "right"))
    won = (sums[below] + sums[up_to]) * anomalous_counts
    return torch.stack([won[own].sum(0) / (2 * len(normal) * len(own)) for own in rows.values()])


def _redraw(subject: Scores, draws: int, seed: int) -> dict[str, Float[Tensor, "_ D"]]:
    """How often each prompt of each group is drawn: normals within their group, anomalies within
    their stratum.
    """
    counts = {}
    for group, names in subject.strata.items():
        everyone = {"": torch.arange(len(names))}
        counts[group] = torch.zeros(len(names), draws)
        for stratum, rows in (subject.rows(group) if group == ANOMALY else everyone).items():
            # Of its own name alone, so that draws do not depend on what else was scored.
            salt = zlib.crc32(f"{subject.name} {group} {stratum} {seed}".encode())
            drawn = torch.randint(
                len(rows), (len(rows), draws), generator=torch.Generator().manual_seed(salt)
            )
            own = torch.zeros(len(rows), draws)
            counts[group][rows] = own.scatter_add_(0, drawn, torch.ones(len(rows), draws))
    return counts


# --- worst cases
# ------------------------------------------------------------------------------------------------


def places(found: Sequence[Cell]) -> set[tuple[str, int, str, str]]:
    """Every (task, seed, regime, stratum) that any score has."""
    return {cell.place for cell in found}


def by_scorer(found: Sequence[Cell]) -> dict[Scorer, list[Cell]]:
    """Each scorer's cells."""
    own: dict[Scorer, list[Cell]] = {}
    for cell in found:
        own.setdefault(cell.scorer, []).append(cell)
    return own


def worst_cases(found: Sequence[Cell]) -> dict[Scorer, Cell]:
    """Each scorer's cell of smallest AUROC; the first of several."""
    return {
        scorer: min(own, key=lambda cell: (cell.auroc, cell.place))
        for scorer, own in by_scorer(found).items()
    }


def best_baseline(found: Sequence[Cell]) -> Scorer:
    """The baseline whose worst case is best, of those that were computed in every place.

    Distances at one layer and oracle rows, which pick the layer by looking at anomalies, do not
    count.  The choice among baselines is itself made by looking, which favours the baselines.

    Raises:
        ValueError: no baseline was computed everywhere.
    """
    everywhere = len(places(found))
    own = by_scorer(found)
    complete = {
        s: w for s, w in worst_cases(found).items() if s.baseline and len(own[s]) == everywhere
    }
    if not complete:
        raise ValueError(
            f"0 baselines were computed in all {everywhere} places; score every subject with one"
        )
    return max(sorted(complete), key=lambda scorer: complete[scorer].auroc)


@dataclass(frozen=True)
class Difference:
    """One score's worst case less another's: above 0 the first is better."""

    ours: Cell
    theirs: Cell
    difference: float
    low: float
    high: float
    above: float  # share of draws in which it is above 0
    draws: int


def compare(
    results: Results, ours: Scorer, theirs: Scorer, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Returns the difference of two worst cases with its 95 % bootstrap interval.

    Each draw redraws every subject's prompts once, for both scores, and takes both worst cases:
    they may stand in other places than the worst cases of all prompts.  The models are not redrawn:
    the interval says nothing of other seeds.

    Raises: ValueError: fewer than 2 draws, no anomalies, or a subject with anomalies on which one
        of the two is missing.
    """
    if draws < 2:
        raise ValueError(f"draws={draws}, but an interval needs at least 2")
    subjects = [subject for subject in results.subjects if subject.anomalous]
    if not subjects:
        raise ValueError("0 subjects with anomalies; a worst case needs at least one")
    lowest: dict[Scorer, Tensor] = {}
    for subject in subjects:
        redrawn, rows = _redraw(subject, draws, seed), subject.rows(ANOMALY)
        for scorer in dict.fromkeys((ours, theirs)):
            if scorer not in subject.parts:
                raise ValueError(
                    f"{scorer} has no scores on {subject.name}; compare over subjects that both "
                    "have"
                )
            parts = subject.parts[scorer]
            for group in REGIMES.values():
                samples = _auroc_draws(
                    parts[group], parts[ANOMALY], rows, redrawn[group], redrawn[ANOMALY]
                ).amin(0)
                lowest[scorer] = torch.minimum(lowest.get(scorer, samples), samples)
    only = [replace(s, parts={k: s.parts[k] for k in {ours, theirs}}) for s in subjects]
    worst = worst_cases(cells(Results(tuple(only)), draws=draws, seed=seed))
    differences = lowest[ours] - lowest[theirs]
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975])).tolist()
    return Difference(
        worst[ours],
        worst[theirs],
        worst[ours].auroc - worst[theirs].auroc,
        low,
        high,
        (differences > 0).float().mean().item(),
        draws,
    )


def oracle(found: Sequence[Cell]) -> tuple[Cell, ...]:
    """What picking the layer in each cell by its AUROC would reach: no detector, since it looks at
    anomalies.

    One row for each family of baselines `FAMILY_layer_0`, `FAMILY_layer_1`, ..., with `oracle` as
    its circuit.
    """
    best: dict[tuple, Cell] = {}
    for cell in found:
        if (family := cell.scorer.family) is None:
            continue
        key = (family, cell.place)
        if key not in best or cell.auroc > best[key].auroc:
            best[key] = replace(cell, score=f"{family}_best_layer", circuit=ORACLE)
    return tuple(best[key] for key in sorted(best))


@dataclass(frozen=True)
class Control:
    """What random circuits of the same size reach: over draws of the circuit."""

    mean: float
    low: float
    high: float
    circuits: int


def controls(found: Sequence[Cell]) -> dict[tuple[Scorer, tuple[str, int, str, str]], Control]:
    """The random controls of each scorer in each place."""
    values: dict[tuple, list[float]] = {}
    for cell in found:
        if (circuit := cell.scorer.control_of) is not None:
            values.setdefault((Scorer(cell.score, circuit), cell.place), []).append(cell.auroc)
    return {key: _control(own) for key, own in values.items()}


def worst_controls(found: Sequence[Cell]) -> dict[Scorer, Control]:
    """The worst cases of each scorer's random controls: each random circuit has its own worst case."""
    values: dict[Scorer, list[float]] = {}
    for scorer, cell in worst_cases(found).items():
        if (circuit := scorer.control_of) is not None:
            values.setdefault(Scorer(scorer.score, circuit), []).append(cell.auroc)
    return {scorer: _control(own) for scorer, own in values.items()}


def _control(values: Sequence[float]) -> Control:
    return Control(sum(values) / len(values), min(values), max(values), len(values))


# --- flags
# ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """The share of a stratum with a conformal p-value of at most alpha: of normals, false alarms."""

    score: str
    circuit: str
    task: str
    seed: int
    group: str
    stratum: str
    alpha: float
    share: float
    prompts: int

    @property
    def scorer(self) -> Scorer:
        """Whose it is."""
        return Scorer(self.score, self.circuit)

    @property
    def benign(self) -> bool:
        """Whether to flag here is a false alarm."""
        return self.group != ANOMALY


def flags(results: Results, alphas: Sequence[float] = ALPHAS) -> tuple[Flag, ...]:
    """Who is flagged, by every score but the random controls.

    Raises:
        ValueError: an alpha that the calibration is too small for.
    """
    found = []
    for subject in results.subjects:
        rows = {group: subject.rows(group) for group in subject.strata}
        for scorer, parts in sorted(subject.parts.items()):
            if scorer.control_of is not None:
                continue
            calibration = Calibration.of(parts[CALIBRATION])
            for alpha in alphas:
                if problem := calibration.problem(alpha):
                    raise ValueError(f"{scorer} on {subject.name}: {problem}")
            for group in subject.strata:
                values = calibration.p_values(parts[group])
                found += [
                    Flag(
                        scorer.score,
                        scorer.circuit,
                        subject.task,
                        subject.seed,
                        group,
                        stratum,
                        alpha,
                        (values[own] <= alpha).double().mean().item(),
                        len(own),
                    )
                    for stratum, own in rows[group].items()
                    for alpha in alphas
                ]
    return tuple(found)


def worst_false_alarms(found: Sequence[Flag], alpha: float) -> dict[Scorer, Flag]:
    """Each scorer's benign stratum with the largest share flagged at alpha."""
    worst: dict[Scorer, Flag] = {}
    for flag in found:
        if flag.benign and flag.alpha == alpha:
            held = worst.setdefault(flag.scorer, flag)
            worst[flag.scorer] = flag if flag.share > held.share else held
    return worst


# --- combinations
# -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """Scores that are combined by their p-values, under a name of their own.

    A member is the name of a score, taken at each circuit in turn, or a score at one circuit for
    good.
    """

    name: str
    members: tuple[str | Scorer, ...]
    how: str = "fisher"  # or minimum; or mean, of the scores themselves


def combine(
    parts: Sequence[Mapping[str, Float[Tensor, "_"]]], how: str
) -> dict[str, Float[Tensor, "_"]]:
    """Returns one score from several: no anomaly is looked at.

    mean: of the scores, which must be in one unit.  The others go through conformal p-values alone.
    fisher: - sum of ln p (Fisher 1925); minimum: - ln of the smallest p (Tippett 1931).  High =
        anomalous.

    A calibration prompt's own p-value is its rank among the others, (1 + #{others >= s}) / (n + 1).
    The calibration part of what is returned calibrates the combination in turn, however members
    depend on each other: to count a new prompt among the others could only raise these p-values, so
    that P(p <= alpha) <= alpha stays true, at any n.

    Raises:
        ValueError: no members, members with other parts, or an unknown way.
    """
    if how not in ("fisher", "minimum", "mean"):
        raise ValueError(f"how={how!r}, but scores are combined by fisher, minimum or mean")
    if not parts:
        raise ValueError("0 scores to combine; give at least one")
    if other := [own for own in parts if set(own) != set(parts[0])]:
        raise ValueError(
            f"parts {', '.join(other[0])}, but the first score has {', '.join(parts[0])}"
        )
    if how == "mean":
        return {name: torch.stack([own[name] for own in parts]).mean(0) for name in parts[0]}
    combined = {}
    for name in parts[0]:
        values = torch.stack([_p_values(own, name) for own in parts]).log()
        combined[name] = (-values.sum(0) if how == "fisher" else -values.amin(0)).float()
    return combined


def _p_values(parts: Mapping[str, Tensor], name: str) -> Tensor:
    calibration = Calibration.of(parts[CALIBRATION])
    n, values = len(calibration.scores), calibration.p_values(parts[name])
    # A calibration prompt has counted itself.  Whole numbers are divided, so that equal ranks are equal in every bit.
    return ((values * (n + 1)).round() - 1) / (n + 1) if name == CALIBRATION else values


def with_combination(results: Results, combination: Combination) -> Results:
    """The results with one more score: at every circuit, and random control, that all members named
    alone have.

    Its circuit is `none` where no member has one, and `several` where each member brings a circuit
    of its own.

    Raises:
        ValueError: the name is taken, or there is no subject with all members.
    """
    if any(scorer.score == combination.name for scorer in results.scorers):
        raise ValueError(
            f"there is a score {combination.name!r} already; name the combination otherwise"
        )
    subjects = []
    for subject in results.subjects:
        parts = dict(subject.parts)
        for circuit, members in _members(subject, combination).items():
            combined = combine([subject.parts[member] for member in members], combination.how)
            parts[Scorer(combination.name, circuit)] = combined
        subjects.append(replace(subject, parts=parts))
    more = Results(tuple(subjects))
    if not any(scorer.score == combination.name for scorer in more.scorers):
        raise ValueError(
            f"0 subjects with all of {', '.join(map(str, combination.members))} at one circuit"
        )
    return more


def _members(subject: Scores, combination: Combination) -> dict[str, list[Scorer]]:
    """Which scores are combined, by the circuit of the combination."""
    fixed = [
        member if isinstance(member, Scorer) else Scorer(member)
        for member in combination.members
        if isinstance(member, Scorer) or Scorer(member) in subject.parts
    ]
    if any(scorer not in subject.parts for scorer in fixed):
        return {}
    free = [
        name for name in combination.members if isinstance(name, str) and Scorer(name) not in fixed
    ]
    if not free:
        return {NONE if all(scorer.circuit == NONE for scorer in fixed) else SEVERAL: fixed}
    shared = set.intersection(
        *({s.circuit for s in subject.parts if s.score == name} for name in free)
    )
    return {circuit: fixed + [Scorer(name, circuit) for name in free] for circuit in sorted(shared)}
