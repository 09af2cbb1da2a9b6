"""The fine-tuned copy against HuggingFace's own numbers, on tiny models."""

from __future__ import annotations

import pytest
import torch

from circuits.engine import Engine
from circuits.model.load import ModelConfig, load_model
from mad.detector import Context
from mad.detectors.fine_tuned import FineTuned, fit_fine_tuned
from tests import tiny

NEW, TRUSTED = tiny.prompts(9, seed=1), tiny.prompts(40)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_an_untrained_copy_is_the_model(name, tmp_path):
    tiny.HUGGINGFACE[name]().to(torch.float64).save_pretrained(tmp_path)
    engine = Engine(load_model(ModelConfig(path=str(tmp_path), dtype="float64")))
    detector = fit_fine_tuned(FineTuned(steps=0), Context(engine), TRUSTED)
    assert detector.score(NEW).abs().max() < 1e-9


def test_the_score_against_the_formula_and_again(contexts):
    context, config = contexts["edges"], FineTuned(steps=4, batch=16, learning_rate=1e-2, seed=3)
    state = torch.get_rng_state()
    detector = fit_fine_tuned(config, context, TRUSTED)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left as it was"
    torch.manual_seed(17)
    again = fit_fine_tuned(config, context, TRUSTED)
    torch.set_rng_state(state)
    score = detector.score(NEW)
    assert torch.equal(score, again.score(NEW))
    other = FineTuned(steps=4, batch=16, learning_rate=1e-2, seed=4)
    assert not torch.equal(score, fit_fine_tuned(other, context, TRUSTED).score(NEW))
    for row, found in enumerate(score.tolist()):
        one, parts = NEW.select([row]), []
        model = context.engine.logits(tiny.from_tokens(one.clean))[0].log_softmax(-1)
        copy = detector.tuned(one.clean).logits[0].log_softmax(-1)
        for position in one.positions[0].tolist():
            parts.append(float((model[position].exp() * (model[position] - copy[position])).sum()))
        assert found == pytest.approx(sum(parts) / len(parts), rel=1e-5) and found > 1e-4


def test_the_copy_learns_the_models_own_first_choice(contexts):
    context = contexts["edges"]
    rows, columns = (TRUSTED.positions >= 0).nonzero(as_tuple=True)
    at = rows, TRUSTED.positions[rows, columns]
    logits = context.engine.logits(tiny.from_tokens(TRUSTED.clean, TRUSTED.key_mask))
    choice = logits[at].argmax(-1)

    def loss(steps: int) -> float:
        config = FineTuned(steps=steps, learning_rate=1e-2)
        copy = fit_fine_tuned(config, context, TRUSTED).tuned
        return float(torch.nn.functional.cross_entropy(copy(TRUSTED.clean).logits[at], choice))

    assert loss(20) < 0.5 * loss(0)


def test_a_model_that_is_in_no_folder_is_refused():
    with pytest.raises(ValueError, match="memory.*no HuggingFace folder"):
        fit_fine_tuned(FineTuned(), Context(Engine(tiny.gpt2())), TRUSTED)
    with pytest.raises(ValueError, match="leave fine_tuned_kl out"):
        fit_fine_tuned(FineTuned(), Context(Engine(tiny.native())), TRUSTED)
