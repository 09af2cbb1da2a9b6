"""Scores a stream of inputs: one result line per input line, in constant memory, resumable.

Inputs are read in chunks of a fixed number of lines, and results are written chunk by chunk (see
`mad.resuming`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from circuits.engine.memory import TooLittleMemory, parse_memory
from circuits.model.load import LoadedModel, weight_hash
from circuits.prompts import EncodedPrompt, InputError, collate, encode_record, parse_line
from circuits.prompts.files import decode
from circuits.prompts.sources import is_source, opened
from mad.attribution import largest_shares
from mad.calibration import Calibrated
from mad.detector import ExplainingDetector
from mad.resuming import append, finish, locked, results_so_far, resume
from mad.saved_detector import circuit_hash

log = logging.getLogger(__name__)

EXPLAIN = ("flagged", "all", "none")
LEAST_OVER_NOISE = 10  # a score is shared out where it is so many times its own rounding
Result = dict[str, Any]  # one line of the output

progress_log = logging.getLogger("mad.progress")  # where there is no progress bar
LOG_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Scoring:
    """How inputs are scored."""

    alpha: float = 0.01  # inputs with p_value <= alpha are anomalous
    explain: str = "flagged"  # which results get `because`: flagged, all or none
    edges: int = 8  # how many edges `because` lists, largest share first
    # input lines at a time; part of the job, because results may differ in the last digit
    chunk: int = 64


@dataclass(frozen=True)
class Tally:
    """What a run did."""

    lines: int
    errors: int
    flagged: int
    resumed: int  # lines that an earlier run had done


def score(
    inputs: Path,
    out: Path,
    calibrated: Calibrated,
    model: LoadedModel,
    scoring: Scoring = Scoring(),  # noqa: B008
    *,
    memory: str = "2GB",
    overwrite: bool = False,
) -> Tally:
    """Scores every line of a JSONL file, plain or gzip; a bad line becomes a line with `error`.

    `-` is standard input; what comes from a pipe is kept in a temporary file until it is scored.
    Ids are repeated as they are given, the same one as often as it is given.
    A chunk is run in as many parts as `memory` asks for (working memory beside the model's own
    weights).  It is no part of the job, so that a run can go on with another `memory`; results may
    then differ in the last digit.  A line that does not fit by itself is a bad one; where only its
    explanation does not, or where the score is rounding and shares of it would be noise, the result
    has `because_error`.

    >>> from circuits import Engine, load_model
    >>> from circuits.prompts import write_jsonl
    >>> from circuits.tasks import recall
    >>> from mad import Context, MaxProbability, fit
    >>> model = load_model("pkg://mad/models/recall_redirect")
    >>> prompts = model.prompts(recall.generate(recall.Recall(), 60, seed=0))
    >>> parts = prompts.split({"fit": 30, "calibration": 20}, seed=0)
    >>> context = Context(Engine(model))
    >>> fitted = fit(MaxProbability(), context, parts["fit"], parts["calibration"])
    >>> write_jsonl(recall.generate(recall.Recall(), 5, seed=1), Path("new.jsonl"))
    >>> score(Path("new.jsonl"), Path("scored.jsonl"), fitted, model, Scoring(alpha=0.1)).lines
    5

    Raises:
        FileNotFoundError: no such input file.
        FileExistsError: `out` exists and may not be overwritten.
        ValueError: the file is empty, Parquet or UTF-16, alpha is too small for the calibration, or
            `out.partial` is of another job or being written by another run.
    """
    _check_settings(scoring, calibrated)
    if doubt := calibrated.calibration.doubt():
        log.warning(doubt)
    parse_memory(memory)
    _check_files(inputs, out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with opened(inputs) as source:
        job = _job(source, inputs, calibrated, model, scoring)
        with locked(out.with_name(out.name + ".partial")) as sink:
            _check_files(inputs, out, overwrite)  # another run may have finished since
            done = resume(sink, job, scoring.chunk, overwrite=overwrite)
            number, (errors, flagged) = done, _counts(results_so_far(sink))
            for lines in _chunks(source, done, scoring.chunk):
                results = score_lines(lines, number + 1, calibrated, model, scoring, memory)
                append(sink, results)
                more_errors, more_flagged = _counts(results)
                errors, flagged = errors + more_errors, flagged + more_flagged
                number += len(lines)
            finish(sink, out)
    return Tally(number, errors, flagged, done)


def _check_settings(scoring: Scoring, calibrated: Calibrated) -> None:
    if problem := calibrated.calibration.problem(scoring.alpha):
        raise ValueError(problem)
    if scoring.explain not in EXPLAIN:
        raise ValueError(f"explain={scoring.explain!r}, but the choices are {', '.join(EXPLAIN)}")
    if scoring.explain == "all" and not isinstance(calibrated.detector, ExplainingDetector):
        raise ValueError(
            f"explain=all, but detector {calibrated.detector.config.name} cannot explain its scores"
        )
    for name, value in (("chunk", scoring.chunk), ("edges", scoring.edges)):
        if value < 1:
            raise ValueError(f"{name}={value}, but it must be at least 1")


def _check_files(inputs: Path, out: Path, overwrite: bool) -> None:
    if not is_source(inputs):
        raise FileNotFoundError(f"no input file {inputs}")
    if out.is_dir():
        raise FileExistsError(f"out={out} is a folder; name a file in it")
    if out.exists() and inputs.exists() and out.samefile(inputs):
        raise FileExistsError(f"out={out} is the input file itself; choose another out=")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another out=, or overwrite=true")


def _chunks(source: Iterable[bytes], done: int, size: int) -> Iterator[list[bytes]]:
    """Yields lines after those that are done, so many at a time, with a progress bar.

    Off a terminal, where there is none, a line is logged from time to time.
    """
    lines = (line.rstrip(b"\r\n") for line in itertools.islice(source, done, None))
    number, started, told = done, time.monotonic(), time.monotonic()
    with tqdm(desc="score", unit="line", initial=done, disable=None) as progress:
        while chunk := list(itertools.islice(lines, size)):
            yield chunk
            progress.update(len(chunk))
            number, now = number + len(chunk), time.monotonic()
            if progress.disable and now - told >= LOG_EVERY:
                told = now
                progress_log.info(
                    "%d lines scored, %.1f a second", number, (number - done) / (now - started)
                )


def _counts(results: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """How many results are errors, and how many are anomalous."""
    errors = flagged = 0
    for result in results:
        errors += "error" in result
        flagged += bool(result.get("anomalous"))
    return errors, flagged


# ---- lines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A readable input line, and its result so far."""

    number: int  # from 1
    prompt: EncodedPrompt
    result: Result

    def refuse(self, error: Exception) -> None:
        """Makes the result an error."""
        identifier = self.result["id"]
        self.result.clear()
        self.result.update({"id": identifier, "error": f"line {self.number}: {error}"})

    def leave_unexplained(self, error: Exception | str) -> None:
        """Says why there is no explanation."""
        self.result["because_error"] = str(error)


def score_lines(
    lines: Sequence[bytes],
    first: int,
    calibrated: Calibrated,
    model: LoadedModel,
    scoring: Scoring,
    memory: str,
) -> list[Result]:
    """Results of some lines, in order; `first` is the number of the first one, from 1."""
    results: list[Result] = []
    good: list[_Line] = []
    for number, line in enumerate(lines, start=first):
        result: Result = {"id": number}
        results.append(result)
        try:
            good.append(_Line(number, _encode(line, number, model, result), result))
        except ValueError as error:  # the record's own fault; UnicodeDecodeError is one
            result["error"] = f"line {number}: {error}"
    work = partial(_score, calibrated=calibrated, scoring=scoring, memory=memory)
    _together_or_alone(work, good, InputError, _Line.refuse)
    return results


def _encode(line: bytes, number: int, model: LoadedModel, result: Result) -> EncodedPrompt:
    """The prompt of a line, whose id is put into the result."""
    record = parse_line(decode(line))
    if type(record.get("id")) in (str, int):  # any other id is refused
        result["id"] = record["id"]
    if record.get("label") in (0, 1, "normal", "anomaly"):  # for `madcap plot scored=FILE`
        result["label"] = record["label"]
    if {"clean", "text"} & set(record):
        # Scoring needs no more than this; the rest may be there for some lines only.
        needed = ("clean", "text", "positions", "id")
        record = {key: record[key] for key in needed if key in record}
    return encode_record(
        record,
        default_id=str(result["id"]),
        tokenizer=model.tokenizer,
        prepend_bos=model.prepend_bos,
        max_length=model.context,
        vocabulary=model.vocabulary,
    )


def _together_or_alone(
    work: Callable[[Sequence[_Line]], None],
    lines: Sequence[_Line],
    fault: type[InputError],
    blame: Callable[[_Line, InputError], None],
) -> None:
    """Does work on lines together or, where an input is at fault, on each to find out which."""
    try:
        if lines:
            work(lines)
    except fault as error:
        if len(lines) == 1:
            blame(lines[0], error)
            return
        for line in lines:
            _together_or_alone(work, [line], fault, blame)


def _score(lines: Sequence[_Line], calibrated: Calibrated, scoring: Scoring, memory: str) -> None:
    """Adds score, p_value, anomalous and because to the results.

    Raises:
        InputError: one of the inputs cannot be scored.
    """
    scores = calibrated.score(collate([line.prompt for line in lines]), memory=memory)
    if not torch.isfinite(scores).all():
        raise InputError("the score is not finite; the model's numbers overflow on this input")
    p_values = calibrated.calibration.p_values(scores).tolist()
    for line, score, p_value in zip(lines, scores.tolist(), p_values, strict=True):
        anomalous = p_value <= scoring.alpha
        line.result.update({"score": score, "p_value": p_value, "anomalous": anomalous})
    detector = calibrated.detector
    if scoring.explain == "none" or not isinstance(detector, ExplainingDetector):
        return
    explained = [line for line in lines if scoring.explain == "all" or line.result["anomalous"]]
    work = partial(_explain, detector=detector, edges=scoring.edges, memory=memory)
    _together_or_alone(work, explained, TooLittleMemory, _Line.leave_unexplained)


def _explain(lines: Sequence[_Line], detector: ExplainingDetector, edges: int, memory: str) -> None:
    """Adds because and because_residual.

    Raises:
        InputError: an explanation is not finite.
        TooLittleMemory: not even one fits.
    """
    assert detector.circuit is not None
    graph, left = detector.circuit.graph, iter(lines)
    prompts = collate([line.prompt for line in lines])
    scores = torch.tensor([line.result["score"] for line in lines])
    for explained in detector.explain(prompts, scores=scores, memory=memory):
        columns = explained.residual.tolist(), explained.noise.tolist()
        for shares, residual, noise in zip(explained.shares, *columns, strict=True):
            line = next(left)
            if (score := line.result["score"]) < noise * LEAST_OVER_NOISE:
                line.leave_unexplained(
                    f"score {score:.2g} is not {LEAST_OVER_NOISE} times the rounding of its own "
                    f"arithmetic, {noise:.2g}: shares of it would be noise"
                )
                continue
            if not math.isfinite(residual):
                raise InputError(
                    "the explanation is not finite; the model's numbers overflow on this input"
                )
            because = largest_shares(shares, graph, edges, noise / score)
            line.result.update({"because": because, "because_residual": residual})


# ---- files ---------------------------------------------------------------------------------------


def _job(
    source: BufferedIOBase,
    inputs: Path,
    calibrated: Calibrated,
    model: LoadedModel,
    scoring: Scoring,
) -> dict[str, Any]:
    """What has to be equal for a partial result to be gone on with; the source is read anew."""
    if not source.read(1):
        raise ValueError(f"{inputs} is empty; give one JSON object a line")
    source.seek(0)
    detector = calibrated.detector
    contents = hashlib.file_digest(source, "sha256").hexdigest()
    source.seek(0)
    return {
        "inputs": contents,
        "weights": model.weight_hash,
        "dtype": str(model.bridge.cfg.dtype),
        "prepend_bos": model.prepend_bos,
        "circuit": circuit_hash(detector),
        "detector": asdict(detector.config),
        "about": dict(calibrated.about),
        "fitted": weight_hash({**detector.state(), "calibration": calibrated.calibration.scores}),
        "scoring": asdict(scoring),
    }


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The result lines of a scored file."""
    with path.open("rb") as file:
        yield from map(json.loads, file)
