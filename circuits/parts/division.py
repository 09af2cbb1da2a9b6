"""Which units a model is divided into: from a configuration to `Divided`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from circuits.engine.engine import Engine
from circuits.model.architecture import Norm
from circuits.parts.dictionary import Dictionary, read_dictionary
from circuits.parts.divided import Divided
from circuits.parts.readings import Decoded, Reading, Slices
from circuits.parts.units import Site, Units

EDGES = "edges"
Found = tuple[Site, Reading]


@dataclass
class UnitsConfig:
    """What a circuit is made of.

    >>> UnitsConfig("neurons", layers=[0, 1]).name
    'neurons'
    """

    name: str = EDGES  # edges, nodes, neurons or features
    layers: list[int] | None = None  # nodes, neurons: of these blocks only; null: of all
    # features: folders of sparse autoencoders and transcoders as SAELens writes them, each with
    # cfg.json and sae_weights.safetensors
    dictionaries: list[str] = field(default_factory=list)
    # neurons, features: heads, MLPs that are not divided, and the input as units beside them, so
    # that nothing is kept unless a unit keeps it
    nodes: bool = False


def check_units(config: UnitsConfig) -> None:
    """Raises ValueError for settings that need no model to be refused."""
    if config.name not in (EDGES, *KINDS):
        raise ValueError(f"units={config.name!r}, but they are {', '.join((EDGES, *KINDS))}")
    if config.dictionaries and config.name != "features":
        raise ValueError(
            f"units.dictionaries are for units=features, not for units={config.name}; leave them "
            "out"
        )
    if config.name == "features" and not config.dictionaries:
        raise ValueError(
            "units=features needs units.dictionaries=[FOLDER,...]: sparse autoencoders or "
            "transcoders as SAELens writes them"
        )
    if config.layers is not None and config.name not in ("nodes", "neurons"):
        raise ValueError(f"units.layers is for units=nodes and units=neurons, not {config.name}")
    if config.nodes and config.name not in ("neurons", "features"):
        raise ValueError(f"units.nodes is for units=neurons and units=features, not {config.name}")


def divide(engine: Engine, config: UnitsConfig) -> Divided:
    """Returns the model with its units; those of edges by position are told apart by position too.

    >>> from circuits.model.load import load_model
    >>> engine = Engine(load_model("pkg://mad/models/recall_redirect"))
    >>> divided = divide(engine, UnitsConfig("nodes"))
    >>> divided.units.n_parts, divided.units.part_name(1)
    (11, 'a0.h0')

    Raises:
        FileNotFoundError: a folder holds no dictionary.
        ValueError: the settings do not fit each other, the model has no such layer or no MLPs, or
            a dictionary cannot be used, does not fit the model, or divides what another does.
    """
    check_units(config)
    if config.name == EDGES:
        raise ValueError("units=edges is no division of a model; its graph has the edges")
    found = KINDS[config.name](engine, config)
    if config.nodes:
        taken = {site.name for site, _ in found}
        found += [one for one in _nodes(engine, UnitsConfig("nodes")) if one[0].name not in taken]
    found.sort(key=lambda one: _order(one[0]))
    sites = tuple(site for site, _ in found)
    units = Units(sites, engine.graph.n_positions)
    start = _input(engine)[1]
    others = (reading for site, reading in found if site.kind != "input")
    return Divided(engine, units, (start, *others))


def _order(site: Site) -> tuple[int, int]:
    """In which a run reaches sites."""
    kinds = ("residual_features", "heads", "mlp", "neurons", "mlp_features")
    return (-1, 0) if site.kind == "input" else (site.layer, kinds.index(site.kind))


def _input(engine: Engine) -> Found:
    return Site("input"), Slices("input", 1, engine.architecture.width)


def _nodes(engine: Engine, config: UnitsConfig) -> list[Found]:
    """The input, all heads and all MLPs; of some layers heads and MLPs alone."""
    graph, architecture = engine.graph, engine.architecture
    found = [_input(engine)] if config.layers is None else []
    for layer in _layers(engine, config.layers):
        heads = Slices(f"a{layer}.z", graph.n_heads, architecture.head_width)
        found.append((Site("heads", layer, graph.n_heads), heads))
        if not graph.attention_only:
            found.append((Site("mlp", layer), Slices(f"m{layer}", 1, architecture.width)))
    return found


def _neurons(engine: Engine, config: UnitsConfig) -> list[Found]:
    if engine.graph.attention_only:
        raise ValueError("units=neurons, but the model has no MLPs; use units=nodes or edges")
    found = []
    for layer in _layers(engine, config.layers):
        mlp = engine.architecture.blocks[layer].mlp
        assert mlp is not None
        count = mlp.down.weight.shape[1]
        found.append((Site("neurons", layer, count), Slices(f"m{layer}.z", count, 1)))
    return found


def _layers(engine: Engine, layers: list[int] | None) -> list[int]:
    known = engine.graph.n_layers
    if layers is None:
        return list(range(known))
    if not layers:
        raise ValueError("units.layers=[] leaves no unit; name some, or leave it out")
    for layer in layers:
        if not 0 <= layer < known:
            raise ValueError(
                f"units.layers has {layer}, but the model's blocks are 0 to {known - 1}"
            )
    return sorted(set(layers))


# ---- features ------------------------------------------------------------------------------------


def _features(engine: Engine, config: UnitsConfig) -> list[Found]:
    found: dict[str, tuple[Found, str]] = {}
    for folder in config.dictionaries:
        site, reading = featured(engine, read_dictionary(folder))
        if site.name in found:
            raise ValueError(
                f"dictionaries {found[site.name][1]} and {folder} are both of {site.name}; give "
                "one of them"
            )
        found[site.name] = ((site, reading), folder)
    return [one for one, _ in found.values()]


def featured(engine: Engine, dictionary: Dictionary) -> Found:
    """The site of a dictionary and its reading.

    Raises:
        ValueError: it is for another width, or for a block that the model does not have.
    """
    _check_fit(engine, dictionary)
    hook, blocks = dictionary.hook, engine.architecture.blocks
    own = dictionary.to(engine.device, engine.dtype)
    layer_norm = blocks[0].norm1.kind == "layer"
    centred = hook.centred and layer_norm and hook.reads == "value"
    norm = None if hook.reads == "value" else _norm(blocks[hook.layer].norm2, dictionary)
    kind = "mlp_features" if hook.site == "m" else "residual_features"
    site = Site(kind, hook.layer, own.features)
    return site, Decoded(f"{hook.site}{hook.layer}", own, norm, centred)


def _norm(norm: Norm | None, dictionary: Dictionary) -> Norm:
    """What stands between the residual stream and what a transcoder reads."""
    assert norm is not None
    hook = dictionary.hook
    if hook.reads == "before norm":
        return Norm("none")
    bare = hook.reads == "norm without gain" and not (hook.unfolded and norm.kind == "layer")
    return Norm(norm.kind, norm.eps) if bare else norm


def _check_fit(engine: Engine, dictionary: Dictionary) -> None:
    hook, width, layers = dictionary.hook, engine.architecture.width, engine.graph.n_layers
    sizes = {dictionary.weights["W_enc"].shape[0], dictionary.decoder.shape[1]}
    if sizes != {width}:
        raise ValueError(
            f"dictionary {dictionary.origin} is for values of {min(sizes - {width})} numbers, but "
            f"the model's residual stream has {width}; it was trained on another model"
        )
    last = layers if hook.site == "r" else layers - 1
    if hook.layer > last:
        raise ValueError(
            f"dictionary {dictionary.origin} is of {hook.site}{hook.layer}, but the model has "
            f"{layers} blocks, with {hook.site}0 to {hook.site}{last}"
        )
    if hook.site == "m" and engine.graph.attention_only:
        raise ValueError(f"dictionary {dictionary.origin} is of an MLP, but the model has none")


KINDS: Mapping[str, Callable[[Engine, UnitsConfig], list[Found]]] = {
    "nodes": _nodes,
    "neurons": _neurons,
    "features": _features,
}
