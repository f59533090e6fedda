import pytest
import torch

from grainwise.controller.network import Controller, Inputs, Rollout
from grainwise.controller.trainer import PolicyTrainer, TrainerConfig

N, L, F, D, S, P = 6, 5, 4, 3, 28, 10


def controller(seed: int = 0) -> Controller:
    return Controller(F, D, generator=torch.Generator().manual_seed(seed))


def rollout(seed: int = 0, count: int = N) -> Rollout:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, L, S, P, generator=g) < 0.3
    mask[..., 0, 0] = True
    actions = torch.multinomial(mask.flatten(2).float().flatten(0, 1), 1, generator=g).view(count, L)
    previous = torch.cat([torch.full((count, 1), S * P), actions[:, :-1]], dim=1)
    static, dynamic = torch.randn(count, L, F, generator=g), torch.randn(count, L, D, generator=g)
    summary, prior = torch.randn(count, L, S + P, generator=g), torch.randn(count, L, S, P, generator=g)
    return Rollout(Inputs(static, dynamic, summary, previous, prior, mask), actions)


def train(trainer: PolicyTrainer, times: int) -> None:
    for time in range(times):
        advantages = torch.randn(N, L, generator=torch.Generator().manual_seed(time))
        trainer.update(rollout(time), advantages, elite=rollout(100 + time))


def test_steps_reproduce_the_teacher_forced_log_probabilities() -> None:
    trainer = PolicyTrainer(controller())
    train(trainer, 3)
    seen = rollout(7)
    expected, entropies = trainer.controller.evaluate(seen)
    memory = None
    for step in range(L):
        parts = {name: getattr(seen.inputs, name)[:, step : step + 1] for name in Inputs.__dataclass_fields__}
        log_probs, memory = trainer.controller.step(Inputs(**parts), memory)
        chosen = log_probs.flatten(1).gather(1, seen.actions[:, step : step + 1])[:, 0]
        assert torch.allclose(chosen, expected[:, step], atol=1e-5)
    assert (entropies >= 0).all() and entropies.isfinite().all()


def test_entropies_average_to_that_of_the_joint_distribution() -> None:
    trainer = PolicyTrainer(controller())
    train(trainer, 3)
    seen = rollout(7)
    with torch.no_grad():
        joint = trainer.controller(seen.inputs)[0][:, 0].flatten(1).exp()  # [N, S * P] of the first layer
        mean = torch.zeros(N)
        for action in range(S * P):
            actions = seen.actions.clone()
            actions[:, 0] = action
            mean += joint[:, action] * trainer.controller.evaluate(Rollout(seen.inputs, actions))[1][:, 0]
    assert torch.allclose(mean, torch.special.entr(joint).sum(1), atol=1e-4)


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_a_rewarded_profile_becomes_likelier(algorithm: str) -> None:
    trainer = PolicyTrainer(controller(), TrainerConfig(algorithm=algorithm, entropy=0.0))  # type: ignore[arg-type]
    seen = rollout(count=2)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, L)
    before = trainer.controller.evaluate(seen)[0].sum(1)
    for _ in range(5):
        trainer.update(seen, advantages)
    after = trainer.controller.evaluate(seen)[0].sum(1)
    assert after[0] > before[0] and after[1] < before[1]


def test_imitation_alone_trains_too() -> None:
    trainer = PolicyTrainer(controller())
    seen = rollout(count=1)
    before = trainer.controller.evaluate(seen)[0].sum()
    trainer.update(None, elite=seen)
    assert trainer.controller.evaluate(seen)[0].sum() > before


def test_advantages_that_are_not_finite_leave_the_weights_finite() -> None:
    trainer = PolicyTrainer(controller())
    trainer.update(rollout(), torch.full((N, L), torch.nan))
    assert all(weight.isfinite().all() for weight in trainer.controller.parameters())


def test_a_rate_of_zero_leaves_the_policy_alone() -> None:
    trainer = PolicyTrainer(controller(), TrainerConfig(learning_rate=0))
    before = [weight.clone() for weight in trainer.controller.parameters()]
    train(trainer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.controller.parameters(), strict=True))


def test_restored_training_goes_on_exactly() -> None:
    uncut, cut = PolicyTrainer(controller()), PolicyTrainer(controller(9))
    train(uncut, 3)
    cut.restore(*uncut.state())
    train(uncut, 2)
    train(cut, 2)
    for a, b in zip(uncut.controller.parameters(), cut.controller.parameters(), strict=True):
        assert torch.equal(a, b)
    assert uncut.updates == cut.updates


def test_a_policy_of_another_shape_is_refused() -> None:
    other = PolicyTrainer(Controller(F + 1, D, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="does not fit"):
        PolicyTrainer(controller()).restore(*other.state())
