"""What a peer's work costs: runs inside the peers' environment and answers one request a line.

    PEERS_PYTHON -I mad/benchmark/peers_side.py FOLDER

The peer is auto-circuit 1.0.1 (Miller, Chughtai and Saunders 2024, arXiv 2407.08734), whose needs
rule out those of this package: nothing of it is imported here.  FOLDER, which
`mad.benchmark.peers_exchange` writes, holds

    model/          the weights as HuggingFace saves them: config.json, model.safetensors
    prompts.json    in auto-circuit's own form: clean and corrupt token ids, right and wrong answers
    settings.json   threads, the number of prompts, and the edges by auto-circuit's names in the
                    order of the sweep; every list of scores or masks here is in that order

A request on standard input is a JSON mapping with `work` and its arguments; the answer, one line on
standard output, has `seconds` and what the work gave.  All else that is printed goes to standard
error.  The first line, unasked, has the versions.
"""

# What is imported stands in another environment than the one that types are checked in.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

TRAINING_STEPS = 10  # that a step's time is taken from


class Peer:
    """The models and the prompts of a folder, as auto-circuit has them."""

    def __init__(self, folder: Path) -> None:
        import torch
        from auto_circuit.data import load_datasets_from_json
        from auto_circuit.utils.graph_utils import patchable_model

        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        torch.set_num_threads(settings["threads"])
        self.loader, _ = load_datasets_from_json(
            None,
            folder / "prompts.json",
            torch.device("cpu"),
            prepend_bos=False,
            batch_size=settings["prompts"],
            train_test_size=(settings["prompts"], 0),
            shuffle=False,
        )
        (self.batch,) = self.loader
        self.plain = transformer(folder / "model")
        self.model = patchable_model(
            transformer(folder / "model", factorized=True),
            factorized=True,
            slice_output="last_seq",
            separate_qkv=True,
        )
        self.model.edges = in_order(self.model.edges, settings["edges"])

    def scores(self, found: Mapping[str, Any]) -> list[float]:
        """Prune scores in the order of the edges."""
        return [edge.prune_score(found).item() for edge in self.model.edges]

    # ---- work, each giving its seconds -----------------------------------------------------------

    def forward(self) -> dict:
        """One plain forward of the model as TransformerLens runs it, with no edge to patch."""
        import torch

        with torch.inference_mode():
            seconds, logits = timed(lambda: self.plain(self.batch.clean))
        return {"seconds": seconds, "logits": logits[:, -1].tolist()}

    def masked(self, kept: list[float]) -> dict:
        """One run in which the other edges carry the corrupt prompt's values, these being given."""
        import torch
        from auto_circuit.utils.ablation_activations import src_ablations
        from auto_circuit.utils.graph_utils import patch_mode, set_all_masks

        set_all_masks(self.model, val=0.0)
        for edge, share in zip(self.model.edges, kept):
            edge.patch_mask(self.model).data[edge.patch_idx] = 1.0 - share
        corrupt = src_ablations(self.model, self.batch.corrupt)
        with torch.inference_mode(), patch_mode(self.model, corrupt):
            seconds, logits = timed(lambda: self.model(self.batch.clean))
        return {"seconds": seconds, "logits": logits[:, -1].tolist()}

    def eap(self) -> dict:
        """Edge attribution patching in its fast form, the gradient at a mask of nothing removed."""
        return self._gradient(mask_val=0.0)

    def integrated(self, steps: int) -> dict:
        """The mean of as many such gradients, along the mask from nothing to all removed."""
        return self._gradient(integrated_grad_samples=steps - 1)

    def _gradient(self, **points: float) -> dict:
        from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

        seconds, found = timed(
            lambda: mask_gradient_prune_scores(
                self.model,
                self.loader,
                None,
                grad_function="logit",
                answer_function="avg_diff",
                **points,
            )
        )
        return {"seconds": seconds, "scores": self.scores(found)}

    def acdc(self, tau: float) -> dict:
        """A whole sweep by the divergence from the model, with 1 for each edge that stays."""
        from auto_circuit.prune_algos.ACDC import acdc_prune_scores

        seconds, found = timed(
            lambda: acdc_prune_scores(self.model, self.loader, None, tao_exps=[0], tao_bases=[tau])
        )
        kept = [float(score == float("inf")) for score in self.scores(found)]
        return {"seconds": seconds, "scores": kept}

    def training_step(self) -> dict:
        """One step of subnetwork probing on edges: a longer training less one of a single step."""
        import torch
        from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores

        # It names a module that torch no longer shows under this name.
        torch.optim.adam = import_module("torch.optim.adam")

        def train(steps: int) -> float:
            return timed(
                lambda: subnetwork_probing_prune_scores(
                    self.model, self.loader, None, epochs=steps, tree_optimisation=True
                )
            )[0]

        first = train(1)
        return {"seconds": (train(1 + TRAINING_STEPS) - first) / TRAINING_STEPS}


def transformer(folder: Path, factorized: bool = False) -> Any:
    """The model in TransformerLens, factorized: with the hooks that patching an edge needs."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    source = GPT2LMHeadModel.from_pretrained(folder).eval()
    own = source.config
    config = HookedTransformerConfig(
        n_layers=own.n_layer,
        n_heads=own.n_head,
        d_model=own.n_embd,
        d_head=own.n_embd // own.n_head,
        d_mlp=own.n_inner,
        d_vocab=own.vocab_size,
        n_ctx=own.n_positions,
        eps=own.layer_norm_epsilon,
        act_fn=own.activation_function,
        normalization_type="LN",
        use_attn_result=factorized,
        use_attn_in=False,
        use_split_qkv_input=factorized,
        use_hook_mlp_in=factorized,
        device="cpu",
    )
    model = HookedTransformer(config)
    # As auto-circuit itself loads models: norms folded, weights centred.
    model.load_and_process_state_dict(
        convert_gpt2_weights(source, config),
        fold_ln=True,
        center_writing_weights=True,
        center_unembed=True,
    )
    return model.eval().requires_grad_(False)


def in_order(edges: Any, names: list[str]) -> Any:
    """The edges in the order of their names; ValueError where these are not the model's edges.

    ACDC sorts them by layer alone and keeps their order within one; that of a set of objects with
    names in them changes from process to process.
    """
    by_name = {edge.name: edge for edge in edges}
    if len(by_name) != len(edges) or set(by_name) != set(names):
        odd = sorted(set(by_name).symmetric_difference(names))[:3]
        raise ValueError(f"{len(edges)} edges, but {len(names)} were named; they differ by {odd}")
    from ordered_set import OrderedSet

    return OrderedSet([by_name[name] for name in names])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that work takes, and what it gives."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main(folder: Path, requests: TextIO, answers: TextIO) -> None:
    """Answers requests until there are no more."""
    peer = Peer(folder)
    packages = ("auto-circuit", "transformer-lens", "torch", "numpy")
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
    say(answers, {"versions": versions})
    for line in requests:
        request = json.loads(line)
        say(answers, getattr(peer, request.pop("work"))(**request))


def say(answers: TextIO, answer: dict) -> None:
    """Sends one answer."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    own_output, sys.stdout = sys.stdout, sys.stderr  # libraries print; answers stand alone
    main(Path(sys.argv[1]), sys.stdin, own_output)
