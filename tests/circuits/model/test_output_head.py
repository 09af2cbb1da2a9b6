"""Linear heads in place of the language model's: against HuggingFace's last hidden state, and what
is refused.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from circuits.engine import Engine
from circuits.model.load import ModelConfig, load_model
from circuits.model.output_head import OutputHead, load_output_head
from circuits.prompts import write_jsonl
from mad.commands.main import main
from tests import tiny

TOKENS = torch.randint(29, (3, 7), generator=torch.Generator().manual_seed(11))


def weights(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(name: str) -> torch.Tensor:
    """HuggingFace's last hidden state, which is behind the final norm."""
    with torch.no_grad():
        return (
            tiny.HUGGINGFACE[name]().double()(TOKENS, output_hidden_states=True).hidden_states[-1]
        )


def with_head(name: str, head: OutputHead) -> Engine:
    return Engine(dataclasses.replace(tiny.huggingface(name), head=head))


@pytest.mark.parametrize("name", ["codegen", "gpt2", "gemma2"])
def test_one_head_at_all_positions(name):
    """Gemma 2's soft-cap belongs to its own head, not to this one."""
    width = tiny.HUGGINGFACE[name]().config.hidden_size
    weight, bias = weights(5, width), weights(5, seed=3)
    engine = with_head(name, OutputHead(weight, bias))
    expected = hidden(name) @ weight.T + bias
    assert expected.abs().max() > 3.0  # beyond the cap
    torch.testing.assert_close(
        engine.logits(tiny.from_tokens(TOKENS)), expected, atol=1e-4, rtol=1e-4
    )
    ones = engine.graph.exists
    ablated = engine.ablated(torch.zeros_like(engine.clean(tiny.from_tokens(TOKENS)).writers))
    torch.testing.assert_close(
        engine.masked(tiny.from_tokens(TOKENS), ones, ablated), expected, atol=1e-4, rtol=1e-4
    )


def test_one_probe_for_each_sensor_at_its_position():
    weight, bias = weights(2, 1, 24), weights(2, 1, seed=3)
    engine = with_head("codegen", OutputHead(weight, bias))
    positions = torch.tensor([[2, 5], [1, 6], [6, 0]])
    at = hidden("codegen")[torch.arange(3)[:, None], positions]
    probes = (at * weight[:, 0]).sum(-1) + bias[:, 0]  # [prompts, sensors]
    logits = engine.logits(tiny.from_tokens(TOKENS, positions=positions))
    assert logits.shape == (3, 2, 2)
    torch.testing.assert_close(logits.softmax(-1)[..., 1], probes.sigmoid(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        engine.clean(tiny.from_tokens(TOKENS, positions=positions[:, :1])).logits, logits[:, :1]
    )
    with pytest.raises(
        ValueError, match="the head has 2 places, but 7 positions are read; name 2 `positions`"
    ):
        engine.logits(tiny.from_tokens(TOKENS))


def test_bad_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a head of weight \(3, 4\) and bias \(4,\)"):
        OutputHead(weights(3, 4), weights(4))
    with pytest.raises(ValueError, match="reads 5 numbers, but the model's residual stream has 24"):
        with_head("codegen", OutputHead(weights(3, 5)))
    with pytest.raises(FileNotFoundError, match="no head at"):
        load_output_head(tmp_path / "head.safetensors")
    save_file({"other": torch.zeros(3)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="head.safetensors holds no head: 'weight'"):
        load_output_head(tmp_path / "head.safetensors")
    (tmp_path / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="head.safetensors holds no head"):
        load_output_head(tmp_path / "head.safetensors")


def test_a_sensor_model_goes_through_the_commands(tmp_path):
    """Three sensors, each with its own probe; answers are outputs: 1 for yes, 0 for no."""
    tiny.HUGGINGFACE["codegen"]().save_pretrained(tmp_path / "model")
    head = tmp_path / "sensors.safetensors"
    save_file({"weight": weights(3, 1, 24).float()}, head)
    engine = Engine(load_model(ModelConfig(path=str(tmp_path / "model"), head=str(head))))
    places = [3, 4, 5]
    records = []
    for record in tiny.records(90, shortest=6, longest=9):
        logits = engine.logits(
            tiny.from_tokens(torch.tensor([record["clean"]]), positions=torch.tensor([places]))
        )[0]
        answers = logits.argmax(-1).tolist()
        records.append(
            {
                "clean": record["clean"],
                "corrupt": record["corrupt"],
                "positions": places,
                "answers": [[a] for a in answers],
                "wrong_answers": [[1 - a] for a in answers],
            }
        )
    write_jsonl(records[:80], tmp_path / "trusted.jsonl")
    write_jsonl(records[80:], tmp_path / "new.jsonl")
    words = [
        f"model={tmp_path / 'model'}",
        f"model.head={head}",
        f"task={tmp_path / 'trusted.jsonl'}",
        "method=eap_ig",
        "metric=kl",
        "ablation=mean",
        "selection.share=0.5",
        "splits.discovery=16",
        "splits.evaluation=16",
        "splits.fit=16",
        "splits.calibration=24",
        f"out={tmp_path / 'run'}",
    ]
    assert main(["extract", *words]) == 0
    assert (
        main(
            [
                "score",
                f"circuit={tmp_path / 'run'}",
                f"inputs={tmp_path / 'new.jsonl'}",
                f"out={tmp_path / 'scored.jsonl'}",
                "alpha=0.05",
            ]
        )
        == 0
    )
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 10
    save_file(
        {"weight": weights(3, 1, 24, seed=5).float()}, head
    )  # other sensors are other weights
    assert (
        main(
            [
                "score",
                f"circuit={tmp_path / 'run'}",
                f"inputs={tmp_path / 'new.jsonl'}",
                f"out={tmp_path / 'again.jsonl'}",
                "alpha=0.05",
            ]
        )
        == 1
    )
    records[0]["answers"] = [[2], [0], [0]]
    write_jsonl(records[:80], tmp_path / "trusted.jsonl")
    assert main(["extract", *words, "overwrite=true"]) == 1
