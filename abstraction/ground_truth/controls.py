"""Controls: the same shapes with random weights, and the same circuit with other meanings.

A claim about a compiled program says little if it also holds for a model that computes nothing
(`randomised`), or if it rests on which token stands for which answer (`relabelled`) or on what a
table says (`with_random_table`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from abstraction.ground_truth.building import compiled_model
from abstraction.ground_truth.compiled import Compiled
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.steps import Lookup
from circuits.model.load import LoadedModel


def randomised(compiled: Compiled, seed: int) -> LoadedModel:
    """Returns a model of the same shape with weights as before training.

    Weights are normal with standard deviation 1 / sqrt(width), biases 0 and those of norms 1.
    """
    generator = torch.Generator().manual_seed(seed)
    bridge = compiled.model.bridge
    names = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp")
    size = {name: getattr(bridge.cfg, name) for name in names}
    tensors = {}
    for name, tensor in sorted(bridge.state_dict().items()):
        if name.endswith((".bias", "ln1.weight", "ln2.weight", "ln_final.weight")):
            tensors[name] = torch.full_like(tensor, float(name.endswith(".weight")))
        else:
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensors[name] = (drawn / tensor.shape[-1] ** 0.5).to(tensor.dtype)
    return compiled_model(compiled.program, compiled.options, size, tensors)


def relabelled(program: Program, seed: int) -> Program:
    """Returns the program with its answers permuted; ValueError where there is only one answer."""
    if len(set(program.answers)) < 2:
        raise ValueError(
            f"program {program.name!r} has one answer only; there is nothing to permute"
        )
    generator, answers = torch.Generator().manual_seed(seed), program.answers
    while answers == program.answers:
        order = torch.randperm(len(answers), generator=generator).tolist()
        answers = tuple(program.answers[index] for index in order)
    return replace(program, name=f"{program.name}, relabelled", answers=answers)


def with_random_table(program: Program, step: str, seed: int) -> Program:
    """Returns the program with one lookup's table drawn at random; ValueError for another step."""
    old = program.by_name.get(step)
    if not isinstance(old, Lookup):
        able = ", ".join(s.name for s in program.steps if isinstance(s, Lookup)) or "none"
        raise ValueError(f"step={step!r} is no lookup of {program.name!r}; its lookups are {able}")
    shape = program.tables[step].shape
    drawn = torch.randint(old.size, shape, generator=torch.Generator().manual_seed(seed))
    table = {tuple(key): int(drawn[tuple(key)]) for key in torch.ones(shape).nonzero().tolist()}
    steps = tuple(replace(old, table=table) if s.name == step else s for s in program.steps)
    return replace(program, name=f"{program.name}, random table", steps=steps)
