"""From `key=value` overrides to the dataclass that a command runs on.

    normalise (paths quoted, `model=` and `task=` resolved) -> Hydra composes -> check -> instances

Defaults live in one place, the dataclasses beside the algorithms. They are registered as Hydra
schemas, lazily, as `_NAME` in their group; `configs/GROUP/NAME.yaml` is a preset on top of one, and
`configs/COMMAND.yaml` lists the groups that a command takes. Hydra and OmegaConf stay at this door:
library code receives plain dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.commands.overrides import UsageError, branches, explained, normalise, unknown_key

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIGS = "configs"

# Where each group's dataclasses are: a dict from name to (dataclass, function, ...), registered as
# `_NAME`, or the one dataclass that all presets of the group fill in, registered as `_GROUP`.
SCHEMAS = {
    "model": "circuits.model.load:ModelConfig",
    "ablation": "circuits.ablation:AblationConfig",
    "units": "circuits.parts.division:UnitsConfig",
    "task": "mad.tasks:TASKS",
    "method": "circuits.discovery:METHODS",
    "detector": "mad.detectors:DETECTORS",
}


# --------------------------------------------------------------------------------------------------
# schemas and presets


def register(group: str | None, name: str, schema: type) -> None:
    """Make a dataclass known to Hydra as `_name` in `group`; None: among the commands' own."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    def writable(node: DictConfig) -> None:
        # A frozen dataclass makes a read-only node, that no preset could override.
        OmegaConf.set_readonly(node, None)
        for _, child in branches(node):
            writable(child)

    node = OmegaConf.structured(schema)
    writable(node)
    ConfigStore.instance().store(name=f"_{name}", group=group, node=node, provider="madcap")


def register_group(group: str) -> None:
    """Register every choice of a group; importing them is the slow step of a start."""
    module, _, attribute = SCHEMAS[group].partition(":")
    schemas = getattr(importlib.import_module(module), attribute)
    if isinstance(schemas, type):
        register(group, group, schemas)
        return
    for name, entry in schemas.items():
        register(group, name, entry.schema)


def primary(command: str) -> dict[str, Any]:
    """The command's own file, configs/COMMAND.yaml, as it is written."""
    import yaml

    return yaml.safe_load((configs_folder() / f"{command}.yaml").read_text(encoding="utf-8"))


def groups(command: str) -> dict[str, str | None]:
    """The groups that a command takes, each with its default preset; None: nothing is chosen."""
    entries = [entry for entry in primary(command)["defaults"] if isinstance(entry, dict)]
    return {_group_name(key): value for entry in entries for key, value in entry.items()}


def _group_name(key: str) -> str:
    """The group in a defaults-list key such as `optional /detector@fit.detector`."""
    return key.split()[-1].lstrip("/").partition("@")[0]


def configs_folder() -> Path:
    """Where the presets are, found without importing anything."""
    spec = find_spec(CONFIGS)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {CONFIGS!r} with madcap's presets is not installed")
    return Path(spec.submodule_search_locations[0])


# --------------------------------------------------------------------------------------------------
# composition

Run = Callable[[Any], "int | None"]


def run_command(
    command: str, schema: type, run: Run, typed: list[str], *, sweep: bool = False
) -> int:
    """Compose the command's configuration from what the user typed, run it, return the exit code.

    With `sweep`, or when a mode sets `hydra.mode: MULTIRUN`, every combination of comma-separated
    values is one job for Hydra's launcher (`hydra/launcher=submitit_slurm` sends them to a
    cluster).

    Raises:
        UsageError: for what makes no configuration, and for required values that are missing.
    """
    from hydra.types import RunMode

    with _hydra(command, schema) as hydra:
        presets = functools.partial(_presets, hydra.config_loader, command, typed)
        with explained(presets):
            if not sweep:
                overrides = normalise(typed, groups(command), presets)
                config = hydra.compose_config(
                    command, overrides, RunMode.RUN, False, from_shell=False
                )
                sweep = config.hydra.mode == RunMode.MULTIRUN
            if sweep:
                overrides = normalise(typed, groups(command), presets, sweep=True)
                # Logging is set up already. These two come first, so that the user's own win.
                overrides = ["hydra/hydra_logging=none", "hydra/job_logging=none", *overrides]
                batches = hydra.multirun(
                    command, functools.partial(_job, run), overrides, with_log_configuration=False
                )
                return max(job.return_value for batch in batches for job in batch)
    return _run(run, config, typed)


def show_config(settings: Any) -> None:
    """Print the configuration instead of running on it."""
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.structured(settings)), end="")


def _job(run: Run, config: DictConfig) -> int:
    """One job of a sweep, perhaps in another process."""
    from hydra.core.hydra_config import HydraConfig

    return _run(run, config, list(HydraConfig.get().overrides.task))


def _run(run: Run, config: DictConfig, typed: list[str]) -> int:
    from omegaconf import OmegaConf, open_dict

    with explained(lambda group: []):
        if "hydra" in config:
            with open_dict(config):
                del config["hydra"]
        if "overrides" in config:  # a command that records what it was asked declares this field
            config.overrides = typed
        _refuse_extra_keys(config)
        _refuse_missing(config)
        settings = OmegaConf.to_object(config)
    return run(settings) or 0


@contextmanager
def _hydra(command: str, schema: type) -> Iterator[Any]:
    """Hydra, initialised on madcap's presets and the schemas of the command's groups."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    register(None, command, schema)
    for group in groups(command):
        if group in SCHEMAS:
            register_group(group)
    with initialize_config_module(CONFIGS, job_name=f"madcap-{command}", version_base="1.3"):
        yield GlobalHydra.instance().hydra


def _presets(loader: Any, command: str, typed: list[str], group: str) -> list[str]:
    """The group's presets, those of a user's own `hydra.searchpath` included, without schemas."""
    searchpath = [override for override in typed if override.startswith("hydra.searchpath=")]
    names = loader.get_group_options(group, config_name=command, overrides=searchpath)
    return [name for name in names if not name.startswith("_")]


def _refuse_extra_keys(config: DictConfig, prefix: str = "") -> None:
    """Refuse keys that a `+` smuggled past the schema."""
    from omegaconf import OmegaConf

    schema = OmegaConf.get_type(config)
    if dataclasses.is_dataclass(schema):
        known = [f"{prefix}{field.name}" for field in dataclasses.fields(schema)]
        for key in config:
            if f"{prefix}{key}" not in known:
                raise UsageError(unknown_key(f"{prefix}{key}", known))
    for key, child in branches(config):
        _refuse_extra_keys(child, f"{prefix}{key}.")


def _refuse_missing(config: DictConfig) -> None:
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(config))
    inner = [key for key in missing if not any(other.startswith(f"{key}.") for other in missing)]
    if inner:
        raise UsageError("required and not given: " + ", ".join(f"{key}=..." for key in inner))
