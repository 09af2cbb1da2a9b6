"""A causal model: variables as functions of others, run on a batch at once, with interventions.

    value(v) = set[v]                                    where an intervention sets it
             = fn_v(value(p) for p in parents(v))        otherwise

An *interchange* intervention (Geiger et al. 2021, arXiv 2106.02997) sets some variables to the
values that they have on other inputs, the sources, and lets everything downstream follow.

Every value is a tensor whose first axis is the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
from torch import Tensor

Mechanism = tuple[tuple[str, ...], Callable[..., Tensor]]  # parents, function of their values
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class CausalModel:
    """Variables `{name: (parents, function)}` over named inputs; functions take whole batches.

    >>> import torch
    >>> even = (("sum",), lambda total: total % 2 == 0)
    >>> model = CausalModel(("a", "b"), {"sum": (("a", "b"), torch.add), "even": even})
    >>> model.run({"a": torch.tensor([1, 2]), "b": torch.tensor([1, 3])})["even"].tolist()
    [True, False]

    Raises:
        ValueError: an unknown parent, a variable named like an input, or a cycle.
    """

    inputs: tuple[str, ...]
    variables: Mapping[str, Mechanism]

    def __post_init__(self) -> None:
        for name, (parents, _) in self.variables.items():
            if name in self.inputs:
                raise ValueError(f"variable {name!r} has the name of an input; rename one of them")
            if unknown := [p for p in parents if p not in self.variables and p not in self.inputs]:
                raise ValueError(
                    f"variable {name!r} has the parent {unknown[0]!r}, which is neither input nor "
                    f"variable; known are {', '.join([*self.inputs, *self.variables])}"
                )
        try:
            cycle = nx.find_cycle(self.graph)
        except nx.NetworkXNoCycle:
            return
        around = " -> ".join([cycle[0][0], *(edge[1] for edge in cycle)])
        raise ValueError(f"variables depend on themselves: {around}")

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Parents before children; every node is an input or a variable."""
        graph = nx.DiGraph()
        graph.add_nodes_from([*self.inputs, *self.variables])
        graph.add_edges_from(
            (parent, name) for name, (parents, _) in self.variables.items() for parent in parents
        )
        return graph

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The variables, parents first."""
        return tuple(name for name in nx.topological_sort(self.graph) if name in self.variables)

    def run(self, inputs: Values, set: Values | None = None) -> dict[str, Tensor]:
        """Returns the values of all inputs and variables; those in `set` are taken from there.

        Raises:
            ValueError: an input is missing or unknown, or `set` names what is no variable.
        """
        set = {} if set is None else set
        if missing := [name for name in self.inputs if name not in inputs]:
            raise ValueError(
                f"input {missing[0]!r} is missing; this model needs {', '.join(self.inputs)}"
            )
        if unknown := [name for name in inputs if name not in self.inputs]:
            raise ValueError(f"{unknown[0]!r} is no input; the inputs are {', '.join(self.inputs)}")
        self._require_variables(set)
        values = dict(inputs)
        for name in self.order:
            parents, function = self.variables[name]
            given = (values[parent] for parent in parents)
            values[name] = set[name] if name in set else function(*given)
        return values

    def interchange(self, base: Values, sources: Mapping[str, Values]) -> dict[str, Tensor]:
        """Returns all values on `base`, with each variable in `sources` as on its source inputs."""
        self._require_variables(sources)
        return self.run(base, {name: self.run(source)[name] for name, source in sources.items()})

    def _require_variables(self, names: Mapping[str, object]) -> None:
        if unknown := [name for name in names if name not in self.variables]:
            raise ValueError(
                f"{unknown[0]!r} is no variable; the variables are {', '.join(self.variables)}"
            )
