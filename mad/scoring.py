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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from circuits.engine.memory import TooLittleMemory, parse_memory
from circuits.model.load import LoadedModel, weight_hash
from circuits.prompts import EncodedPrompt, Prompts, collate, encode_record, parse_line
from mad.calibration import Calibrated
from mad.detector import ExplainingDetector

log = logging.getLogger(__name__)

EXPLAIN = ("flagged", "all", "none")


@dataclass(frozen=True)
class Scoring:
    """How inputs are scored."""

    alpha: float = 0.01  # inputs with p_value <= alpha are anomalous
    explain: str = "flagged"  # which results get `because`: flagged, all or none
    edges: int = 8  # how many edges `because` lists, largest share first
    chunk: int = (
        64  # input lines at a time; part of the job, because results may differ in the last digit
    )


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

    Raises: FileNotFoundError: no such input file. FileExistsError: `out` exists and may not be
        overwritten. ValueError: the file is empty, alpha is too small for the calibration, or
        `out.partial` is of another job.
    """
    if problem := calibrated.calibration.problem(scoring.alpha):
        raise ValueError(problem)
    if scoring.explain not in EXPLAIN:
        raise ValueError(f"explain={scoring.explain!r}, but the choices are {', '.join(EXPLAIN)}")
    if scoring.explain == "all" and not isinstance(calibrated.detector, ExplainingDetector):
        raise ValueError(
            f"explain=all, but detector {calibrated.detector.config.name} cannot explain its scores"
        )
    parse_memory(memory)
    for name, value in (("chunk", scoring.chunk), ("edges", scoring.edges)):
        if value < 1:
            raise ValueError(f"{name}={value}, but it must be at least 1")
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
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    done = _resume(
        partial, _job(inputs, calibrated, model, scoring), scoring.chunk, overwrite=overwrite
    )
    with partial.open("rb") as file:
        errors, flagged = _counts(
            map(json.loads, itertools.islice(file, 1, None))
        )  # those of an earlier run
    with inputs.open("rb") as source, partial.open("ab") as sink:
        lines = (line.rstrip(b"\r\n") for line in source)
        for _ in itertools.islice(lines, done):
            pass
        progress = tqdm(desc="score", unit="line", initial=done, disable=None)
        number = done
        while chunk := list(itertools.islice(lines, scoring.chunk)):
            results = score_lines(chunk, number + 1, calibrated, model, scoring, memory)
            number += len(chunk)
            more_errors, more_flagged = _counts(results)
            errors, flagged = errors + more_errors, flagged + more_flagged
            sink.write(
                b"".join(json.dumps(result, allow_nan=False).encode() + b"\n" for result in results)
            )
            sink.flush()
            progress.update(len(chunk))
        progress.close()
    _finish(partial, out)
    return Tally(number, errors, flagged, done)


def _counts(results: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """How many results are errors, and how many are anomalous."""
    errors = flagged = 0
    for result in results:
        errors += "error" in result
        flagged += bool(result.get("anomalous"))
    return errors, flagged


def score_lines(
    lines: list[bytes],
    first: int,
    calibrated: Calibrated,
    model: LoadedModel,
    scoring: Scoring,
    memory: str,
) -> list[dict[str, Any]]:
    """Results of some lines, in order; `first` is the number of the first one, from 1."""
    results: list[dict[str, Any]] = []
    good: list[tuple[int, EncodedPrompt]] = []
    for place, line in enumerate(lines):
        identifier: Any = first + place
        try:
            record = parse_line(line.decode("utf-8-sig" if first + place == 1 else "utf-8"))
            identifier = record.get("id", identifier) if isinstance(record, Mapping) else identifier
            good.append((place, _encode(record, str(identifier), model)))
            results.append({"id": identifier})
        except ValueError as error:  # UnicodeDecodeError is one
            results.append({"id": identifier, "error": f"line {first + place}: {error}"})
    try:
        _score_into(results, good, calibrated, scoring, memory)
    except ValueError:  # one input's numbers are not finite, say: find out which
        for place, prompt in good:
            try:
                _score_into(results, [(place, prompt)], calibrated, scoring, memory)
            except ValueError as error:
                results[place] = {
                    "id": results[place]["id"],
                    "error": f"line {first + place}: {error}",
                }
    return results


def _encode(record: Any, default_id: str, model: LoadedModel) -> EncodedPrompt:
    if isinstance(record, Mapping) and {"clean", "text"} & set(record):
        # Scoring needs no more than this; the rest may be there for some lines only.
        record = {key: record[key] for key in ("clean", "text", "positions", "id") if key in record}
    return encode_record(
        record,
        default_id=default_id,
        tokenizer=model.tokenizer,
        prepend_bos=model.prepend_bos,
        max_length=model.context,
        vocabulary=model.vocabulary,
    )


def _score_into(
    results: list[dict[str, Any]],
    good: list[tuple[int, EncodedPrompt]],
    calibrated: Calibrated,
    scoring: Scoring,
    memory: str,
) -> None:
    """Adds score, p_value, anomalous and because to the results at the places of good prompts."""
    if not good:
        return
    detector, places = calibrated.detector, [place for place, _ in good]
    prompts = collate([prompt for _, prompt in good])
    scores = detector.score(prompts, memory=memory)
    if not torch.isfinite(scores).all():
        raise ValueError("the score is not finite; the model's numbers overflow on this input")
    p_values = calibrated.calibration.p_values(scores)
    for place, score, p_value in zip(places, scores.tolist(), p_values.tolist(), strict=True):
        results[place] |= {
            "score": score,
            "p_value": p_value,
            "anomalous": p_value <= scoring.alpha,
        }
    if scoring.explain == "none" or not isinstance(detector, ExplainingDetector):
        return
    rows = [
        row
        for row, place in enumerate(places)
        if scoring.explain == "all" or results[place]["anomalous"]
    ]
    if rows:
        _explain_into(
            results, [places[row] for row in rows], prompts.select(rows), detector, scoring, memory
        )


def _explain_into(
    results: list[dict[str, Any]],
    places: list[int],
    prompts: Prompts,
    detector: ExplainingDetector,
    scoring: Scoring,
    memory: str,
) -> None:
    """Adds because and because_residual to the results at some places; where memory is too little,
    because_error.
    """
    try:
        explained = detector.explain(prompts, memory=memory)
    except TooLittleMemory as error:
        if len(places) == 1:
            results[places[0]]["because_error"] = str(error)
            return
        for row, place in enumerate(places):
            _explain_into(results, [place], prompts.select([row]), detector, scoring, memory)
        return
    if not torch.isfinite(explained.residual).all():
        raise ValueError(
            "the explanation is not finite; the model's numbers overflow on this input"
        )
    for place, shares, residual in zip(
        places, explained.shares, explained.residual.tolist(), strict=True
    ):
        results[place] |= {
            "because": _because(shares, detector, scoring.edges),
            "because_residual": residual,
        }


def _because(shares: torch.Tensor, detector: Any, count: int) -> list[dict[str, Any]]:
    """The edges with the largest |share|."""
    graph = detector.engine.graph
    order = shares.flatten().abs().argsort(descending=True, stable=True)[:count]
    edges = zip(*(axis.tolist() for axis in torch.unravel_index(order, shares.shape)), strict=True)
    return [
        {"edge": graph.edge_name(*edge), "share": shares[edge].item()}
        for edge in edges
        if shares[edge] != 0
    ]


def _job(
    inputs: Path, calibrated: Calibrated, model: LoadedModel, scoring: Scoring
) -> dict[str, Any]:
    """What has to be equal for a partial result to be gone on with."""
    detector = calibrated.detector
    circuit = getattr(detector, "circuit", None)
    with inputs.open("rb") as file:
        contents = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "inputs": contents,
        "weights": model.weight_hash,
        "dtype": str(model.bridge.cfg.dtype),
        "prepend_bos": model.prepend_bos,
        "circuit": None if circuit is None else circuit.hash(),
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
                "settings); "
                "delete it to start over, or choose another out="
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
