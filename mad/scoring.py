"""Scores a stream of inputs: any number of lines in constant memory, resumable, one result line per
input line.

Inputs are read in chunks of a fixed number of lines.  After each chunk its results are appended to
`OUT.partial` and flushed; when all are done that file becomes `OUT`.  A run that finds
`OUT.partial` of the same job goes on at the first chunk that is not wholly there, so that every
chunk is always computed as a whole and the finished file is the same, byte for byte, as that of a
run that was never interrupted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from circuits.engine.memory import TooLittleMemory, parse_memory
from circuits.graph import Graph
from circuits.model.load import LoadedModel, weight_hash
from circuits.prompts import EncodedPrompt, InputError, collate, encode_record, parse_line
from mad.calibration import Calibrated
from mad.detector import ExplainingDetector
from mad.saved_detector import circuit_hash

log = logging.getLogger(__name__)

EXPLAIN = ("flagged", "all", "none")
Result = dict[str, Any]  # one line of the output


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
    """Scores every line of a JSONL file; a bad line becomes a line with `error`.

    A chunk is run in as many parts as `memory` asks for (working memory beside the model's own
    weights).  It is no part of the job, so that a run can go on with another `memory`; results may
    then differ in the last digit.  A line that does not fit by itself is a bad one; where only its
    explanation does not, the result has `because_error`.

    Raises:
        FileNotFoundError: no such input file.
        FileExistsError: `out` exists and may not be overwritten.
        ValueError: the file is empty, alpha is too small for the calibration, or `out.partial` is
            of another job.
    """
    _check_settings(scoring, calibrated)
    parse_memory(memory)
    _check_files(inputs, out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    job = _job(inputs, calibrated, model, scoring)
    done = _resume(partial, job, scoring.chunk, overwrite=overwrite)
    with partial.open("rb") as file:
        next(file)  # names the job
        errors, flagged = _counts(map(json.loads, file))  # of an earlier run
    number = done
    with inputs.open("rb") as source, partial.open("ab") as sink:
        for lines in _chunks(source, done, scoring.chunk):
            results = score_lines(lines, number + 1, calibrated, model, scoring, memory)
            for result in results:
                sink.write(json.dumps(result, allow_nan=False).encode() + b"\n")
            sink.flush()
            more_errors, more_flagged = _counts(results)
            errors, flagged = errors + more_errors, flagged + more_flagged
            number += len(lines)
    _finish(partial, out)
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
    if not inputs.is_file():
        raise FileNotFoundError(f"no input file {inputs}")
    if inputs.stat().st_size == 0:
        raise ValueError(f"{inputs} is empty; give one JSON object a line")
    if out.is_dir():
        raise FileExistsError(f"out={out} is a folder; name a file in it")
    if out.exists() and out.samefile(inputs):
        raise FileExistsError(f"out={out} is the input file itself; choose another out=")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another out=, or overwrite=true")


def _chunks(source: Iterable[bytes], done: int, size: int) -> Iterator[list[bytes]]:
    """Yields lines after those that are done, so many at a time, with a progress bar."""
    lines = (line.rstrip(b"\r\n") for line in itertools.islice(source, done, None))
    with tqdm(desc="score", unit="line", initial=done, disable=None) as progress:
        while chunk := list(itertools.islice(lines, size)):
            yield chunk
            progress.update(len(chunk))


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
    _score_each(good, calibrated, scoring, memory)
    return results


def _encode(line: bytes, number: int, model: LoadedModel, result: Result) -> EncodedPrompt:
    """The prompt of a line, whose id is put into the result."""
    record = parse_line(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    if isinstance(record, Mapping):
        result["id"] = record.get("id", number)
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


def _score_each(
    lines: Sequence[_Line], calibrated: Calibrated, scoring: Scoring, memory: str
) -> None:
    """Scores lines together or, where an input is at fault, each by itself to find out which."""
    if not lines:
        return
    try:
        _score(lines, calibrated, scoring, memory)
    except InputError as error:
        if len(lines) == 1:
            lines[0].refuse(error)
            return
        for line in lines:
            _score_each([line], calibrated, scoring, memory)


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
    if explained:
        _explain(explained, detector, scoring.edges, memory)


def _explain(lines: Sequence[_Line], detector: ExplainingDetector, edges: int, memory: str) -> None:
    """Adds because and because_residual, or because_error where memory is too little.

    Raises:
        InputError: an explanation is not finite.
    """
    prompts = collate([line.prompt for line in lines])
    left = iter(lines)
    assert detector.circuit is not None
    try:
        for explained in detector.explain(prompts, memory=memory):
            if not torch.isfinite(explained.residual).all():
                raise InputError(
                    "the explanation is not finite; the model's numbers overflow on this input"
                )
            pairs = zip(explained.shares, explained.residual.tolist(), strict=True)
            for (shares, residual), line in zip(pairs, left, strict=False):
                because = _because(shares, detector.circuit.graph, edges)
                line.result.update({"because": because, "because_residual": residual})
    except TooLittleMemory as error:
        if len(lines) == 1:
            lines[0].result["because_error"] = str(error)
            return
        for line in lines:
            _explain([line], detector, edges, memory)


def _because(shares: Tensor, graph: Graph, count: int) -> list[Result]:
    """The edges with the largest |share|."""
    order = shares.flatten().abs().argsort(descending=True, stable=True)[:count]
    edges = zip(*(axis.tolist() for axis in torch.unravel_index(order, shares.shape)), strict=True)
    return [
        {"edge": graph.edge_name(*edge), "share": shares[edge].item()}
        for edge in edges
        if shares[edge] != 0
    ]


# ---- files ---------------------------------------------------------------------------------------


def _job(
    inputs: Path, calibrated: Calibrated, model: LoadedModel, scoring: Scoring
) -> dict[str, Any]:
    """What has to be equal for a partial result to be gone on with."""
    detector = calibrated.detector
    with inputs.open("rb") as file:
        contents = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "inputs": contents,
        "weights": model.weight_hash,
        "dtype": str(model.bridge.cfg.dtype),
        "prepend_bos": model.prepend_bos,
        "circuit": circuit_hash(detector),
        "detector": asdict(detector.config),
        "fitted": weight_hash({**detector.state(), "calibration": calibrated.calibration.scores}),
        "scoring": asdict(scoring),
    }


def _resume(partial: Path, job: dict[str, Any], chunk: int, *, overwrite: bool) -> int:
    """Makes `partial` ready to be appended to and returns how many lines are done.

    Its first line names the job; what follows a whole number of chunks is cut off.  Results of
    another job are refused, or with `overwrite` dropped.
    """
    header = json.dumps({"job": job}).encode() + b"\n"
    if not partial.exists():
        partial.write_bytes(header)
        return 0
    with partial.open("rb+") as file:
        if file.readline() != header:
            if overwrite:
                partial.write_bytes(header)
                return 0
            raise ValueError(
                f"{partial} is the beginning of another job (other inputs, circuit, detector or "
                "settings); delete it to start over, or choose another out="
            )
        lines, keep, end = 0, 0, file.tell()
        whole = end
        for line in file:
            if not line.endswith(b"\n"):
                break
            lines, end = lines + 1, end + len(line)
            if lines % chunk == 0:
                keep, whole = lines, end
        file.truncate(whole)
    if keep:
        log.info("going on after %d lines of %s", keep, partial)
    return keep


def _finish(partial: Path, out: Path) -> None:
    """Moves the results, without the job line, to `out`."""
    ready = out.with_name(out.name + ".ready")
    with partial.open("rb") as source, ready.open("wb") as sink:
        source.readline()
        while block := source.read(1 << 20):
            sink.write(block)
    ready.replace(out)
    partial.unlink()


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The result lines of a scored file."""
    with path.open("rb") as file:
        yield from map(json.loads, file)
