"""Schedule and balancer: what they promise at every step and after a checkpoint, and the known defects."""

import io
import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mclip import balancing
from mclip.balancing import BEGINS_WITH, FLOOR, STRATEGIES, Balancer, Schedule, gradient_norms
from mclip.config import ConfigError, DistillConfig
from mclip.recipes import BASE

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
WHOLE = {"original": 1.0, "feature": 1.0, "response": 1.0}
# The published order, without icl.
published = partial(
    DistillConfig, order=("original", "feature", "response"), icl_weight=0.0, max_temperature=8.0, min_temperature=4.0
)


def balancer(*strategies, rate=1.0, frequency=1, **settings):
    settings = {"icl_weight": 0.0, "adaptation_rate": rate, "gradient_check_frequency": frequency} | settings
    return Balancer(DistillConfig(balancers=strategies, **settings))


def losses_of(sizes):
    """Terms of the given sizes, each with the same number as its gradient norm at the embedding."""
    embedding = torch.zeros(len(sizes), requires_grad=True)
    terms = {name: size + size * embedding[i] for i, (name, size) in enumerate(sizes.items())}
    return terms, [embedding]


# Schedule


def test_the_bounds_of_the_existing_implementation_work_as_steps():
    schedule = Schedule(published(phases=(1000, 2000, 3000)), 10_000)
    assert [schedule.phase(s) for s in (0, 999, 1000, 1999, 2000, 9999)] == [1, 1, 2, 2, 3, 3]
    temperatures = [schedule.temperature(s) for s in (0, 1000, 1500, 2000, 2500, 3000, 9999)]
    assert temperatures == [8, 8, 7, 6, 5, 4, 4]


def test_fractions_and_steps_mean_the_same():
    in_steps = Schedule(DistillConfig(phases=(100, 500, 900), ramp=50), 1000)
    in_fractions = Schedule(DistillConfig(phases=(0.1, 0.5, 0.9), ramp=0.05), 1000)
    for step in range(1000):
        assert in_steps.phase(step) == in_fractions.phase(step)
        assert in_steps.temperature(step) == in_fractions.temperature(step)
        assert in_steps.active(step) == in_fractions.active(step)


def test_one_is_the_whole_run_not_one_step():
    schedule = Schedule(published(phases=(0.0, 0.5, 1.0), ramp=1.0), 100)
    assert schedule.temperature(99) == pytest.approx(4.04)
    assert schedule.active(49) == {"original": 1, "feature": 0.5}


def test_terms_start_with_their_phase_and_ramp_in():
    config = published(phases=(10, 20, 30), ramp=4, similarity_weight=1, icl_weight=1)
    schedule = Schedule(config, 40)
    assert schedule.active(9) == {"original": 1}
    assert schedule.active(10) == {"original": 1, "feature": 0.25, "similarity": 0.25}
    assert schedule.active(13) == {"original": 1, "feature": 1, "similarity": 1}
    assert schedule.active(21) == {"original": 1, "feature": 1, "similarity": 1, "response": 0.5, "icl": 0.5}


def test_a_schedule_without_phases_is_whole_from_the_first_step():
    schedule = Schedule(published(phases=(0, 0, 0), ramp=0), 1)
    assert schedule.phase(0) == 3
    assert schedule.temperature(0) == 4
    assert schedule.active(0) == WHOLE


def test_a_run_without_a_teacher_has_one_phase():
    alone = Schedule(BASE, 100)
    assert {alone.phase(step) for step in range(100)} == {1}
    feature = Schedule(published(response_weight=0), 100)
    assert {feature.phase(step) for step in range(100)} == {1, 2}


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(1, 500),
    phases=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
    ramp=st.floats(0, 1),
    order=st.permutations(["original", "feature", "response"]),
    off=st.sets(st.integers(1, 2)),
)
def test_schedule_promises(total, phases, ramp, order, off):
    off = {order[place] for place in off}
    weights = {f"{name}_weight": 0.0 for name in off}
    config = DistillConfig(phases=tuple(phases), ramp=ramp, order=tuple(order), icl_weight=1.0, **weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a phase that starts after the last step is warned of
        schedule = Schedule(config, total)
    before, temperature = {}, config.max_temperature
    for step in range(total):
        active = schedule.active(step)
        assert active[order[0]] == 1
        assert not off & active.keys()
        assert "similarity" not in active
        assert all(before.get(name, 0) <= factor <= 1 for name, factor in active.items())
        assert all(factor > 0 for factor in active.values())
        assert all(1 + order.index(BEGINS_WITH[name]) <= schedule.phase(step) for name in active)
        assert ("icl" in active) == ("response" in active) or "response" in off
        assert before.keys() <= active.keys()
        assert config.min_temperature <= schedule.temperature(step) <= temperature
        before, temperature = active, schedule.temperature(step)


def test_terms_begin_in_the_order_of_the_phases():
    config = DistillConfig(phases=(0.4, 0.8, 0.9), ramp=0.0, icl_weight=0.0)
    schedule = Schedule(config, 10)
    began = [tuple(sorted(schedule.active(step))) for step in (0, 3, 4, 7, 8)]
    assert began == [("feature",)] * 2 + [("feature", "response")] * 2 + [("feature", "original", "response")]
    assert [schedule.phase(step) for step in (0, 4, 8)] == [1, 2, 3]
    assert schedule.temperature(4) == config.max_temperature


def test_terms_that_would_never_start_are_warned_of():
    with pytest.warns(UserWarning, match="response would never start in a run of 1500 steps"):
        Schedule(published(phases=(1000, 2000, 3000)), 1500)
    with pytest.raises(ConfigError, match="total_steps=0"):
        Schedule(DistillConfig(), 0)


# Balancer


@every_strategy
@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=5),
    priors=st.lists(st.floats(0.01, 100), min_size=5, max_size=5),
    ramp=st.floats(1e-4, 1),
)
def test_weights_are_positive_and_sum_to_the_number_of_active_terms(strategy, sizes, priors, ramp):
    settings = {f"{name}_weight": prior for name, prior in zip(BEGINS_WITH, priors, strict=True)}
    sizes = dict(zip(BEGINS_WITH, sizes, strict=False))
    active = dict.fromkeys(sizes, ramp) | {"original": 1.0}
    terms, embeddings = losses_of(sizes)
    weigher = balancer(strategy, rate=0.5, **settings)
    for step in range(3):
        loss, weights = weigher.combine(terms, active, step, embeddings)
        assert weights.keys() == active.keys()
        assert all(weight > 0 for weight in weights.values())
        assert sum(weights.values()) == pytest.approx(len(active))
        if strategy != "uncertainty":
            expected = sum(weight * sizes[name] for name, weight in weights.items())
            assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_fixed_weights_are_the_priors_times_the_ramps():
    weigher = balancer("fixed", feature_weight=2.0, response_weight=5.0)
    terms, embeddings = losses_of({"original": 3.0, "feature": 0.1, "response": 7.0})
    weights = weigher.weights(terms, WHOLE | {"response": 0.2}, 0, embeddings)
    assert weights == pytest.approx({"original": 0.75, "feature": 1.5, "response": 0.75})


def test_magnitude_makes_terms_equally_large():
    sizes = {"original": 4.0, "feature": 0.5, "response": -0.02}
    weights = balancer("magnitude").weights(losses_of(sizes)[0], WHOLE, 0, [])
    contributions = [weights[name] * abs(size) for name, size in sizes.items()]
    assert contributions == pytest.approx([contributions[0]] * 3)
    mean = sum(abs(size) for size in sizes.values()) / 3
    factors = {name: mean / abs(size) for name, size in sizes.items()}
    expected = {name: 3 * factor / sum(factors.values()) for name, factor in factors.items()}
    assert weights == pytest.approx(expected)


def test_gradient_norm_makes_terms_pull_equally_hard():
    torch.manual_seed(0)
    image, text = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    base = image * 1.0  # not a leaf, as in training
    terms = {
        "original": (base @ text.T).square().mean(),
        "feature": 0.1 * (base - 1).square().mean() + 5,
        "response": text.cosh().sum(),  # depends on one of the two only
    }
    weights = balancer("gradient_norm").weights(terms, WHOLE, 0, [base, text])
    pulls = []
    for name, term in terms.items():
        loss = weights[name] * term
        found = torch.autograd.grad(loss, [base, text], retain_graph=True, allow_unused=True)
        pulls.append(torch.cat([g.flatten() for g in found if g is not None]).norm().item())
    assert pulls == pytest.approx([pulls[0]] * 3, rel=1e-4)
    sum(terms.values()).backward()  # the graph is still there for the step itself
    assert image.grad is not None


def test_a_prior_shifts_what_the_strategy_balances():
    terms, embeddings = losses_of({"original": 4.0, "feature": 0.5})
    active = {"original": 1.0, "feature": 1.0}
    weights = balancer("gradient_norm", feature_weight=3.0).weights(terms, active, 0, embeddings)
    assert weights["feature"] * 0.5 == pytest.approx(3 * weights["original"] * 4.0)


@every_strategy
def test_a_term_alone_weighs_one_and_no_gradient_is_taken(strategy, monkeypatch):
    monkeypatch.setattr(balancing, "gradient_norms", None)
    weigher = balancer(strategy, original_weight=0.3)
    term = torch.tensor(2.5, requires_grad=True)
    loss, weights = weigher.combine({"original": term, "feature": term * math.nan}, {"original": 1.0}, 0, [])
    assert weights == {"original": 1.0}
    assert loss.item() == 2.5


def test_norms_are_taken_only_when_due(monkeypatch):
    steps = []

    def stand_in(terms, embeddings):
        steps.append(step)
        return dict.fromkeys(terms, 1.0)

    monkeypatch.setattr(balancing, "gradient_norms", stand_in)
    weigher = balancer("gradient_norm", frequency=4)
    terms, embeddings = losses_of(dict.fromkeys(WHOLE, 1.0))
    for step in range(3, 14):
        weigher.weights(terms, WHOLE, step, embeddings)
    assert steps == [4, 8, 12]


def test_factors_are_smoothed_in_logarithms():
    weigher = balancer("magnitude", rate=0.1)
    terms, _ = losses_of({"original": 1.0, "feature": math.exp(-2)})
    for step in range(5):
        weights = weigher.weights(terms, {"original": 1.0, "feature": 1.0}, step, [])
        expected = 2 * (1 - 0.9 ** (step + 1))  # from 0 to 2, the logarithm of the ratio of sizes
        assert math.log(weights["feature"] / weights["original"]) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("strategy", ["magnitude", "gradient_norm"])
def test_a_size_that_says_nothing_changes_nothing(strategy, bad):
    weigher = balancer(strategy)
    good = {"original": 2.0, "feature": 0.5, "response": 1.0}
    spoilt, hopeless = good | {"response": bad}, dict.fromkeys(good, bad)
    found = []
    for step, sizes in enumerate((good, spoilt, hopeless, good)):
        terms, embeddings = losses_of(sizes)
        found.append(weigher.weights(terms, WHOLE, step, embeddings))
    assert all(weights == pytest.approx(found[0]) for weights in found)


def test_the_floor_bounds_the_factors():
    terms, embeddings = losses_of({"original": 1.0, "feature": 1e-12})
    weights = balancer("gradient_norm").weights(terms, {"original": 1.0, "feature": 1.0}, 0, embeddings)
    assert weights["feature"] / weights["original"] == pytest.approx(1 / FLOOR)


def test_a_term_without_gradient_at_the_embeddings_is_an_error_not_a_zero():
    embedding = torch.ones(2, requires_grad=True)
    elsewhere = torch.ones(2, requires_grad=True)
    wrong = (([embedding], "feature"), ([embedding.detach()], "original"), ([], "original"))
    terms = {"original": embedding.sum(), "feature": elsewhere.sum()}
    for given_embeddings, name in wrong:
        with pytest.raises(ValueError, match=f"'{name}' has no gradient at the embeddings"):
            gradient_norms(terms, given_embeddings)
    with pytest.raises(ValueError, match="'original' has no gradient"):
        gradient_norms({"original": embedding.sum().detach()}, [embedding])
    assert gradient_norms(terms, [embedding, elsewhere]) == pytest.approx(dict.fromkeys(terms, math.sqrt(2)))


def test_unknown_strategy_is_named():
    with pytest.raises(ConfigError, match=r"balancers='gradnorm'.*'gradient_norm'"):
        balancer("gradnorm")


def test_uncertainty_is_kendalls_loss_and_finds_its_optimum():
    weigher = balancer("uncertainty", feature_weight=2.0)
    assert set(dict(weigher.named_parameters())) == {f"log_variances.{name}" for name in WHOLE}
    assert not list(balancer("fixed", "magnitude").parameters())
    terms = {"original": torch.tensor(3.0), "feature": torch.tensor(0.2), "response": torch.tensor(1.0)}
    active = WHOLE | {"response": 0.5}
    loss, _ = weigher.combine(terms, active, 0, [])
    assert loss.item() == pytest.approx(3.0 + 2 * 0.2 + 0.5 * 1.0)
    loss.backward()
    gradients = {name: s.grad.item() for name, s in weigher.log_variances.items()}
    expected = {"original": 0.5 - 3.0, "feature": 2 * (0.5 - 0.2), "response": 0.5 * (0.5 - 1.0)}
    assert gradients == pytest.approx(expected)
    optimizer = torch.optim.Adam(weigher.parameters(), lr=0.05)
    for step in range(400):
        optimizer.zero_grad()
        loss, weights = weigher.combine(terms, active, step, [])
        loss.backward()
        optimizer.step()
    for name, s in weigher.log_variances.items():
        assert s.item() == pytest.approx(math.log(2 * terms[name].item()), abs=0.01)
    raw = {"original": 1 / 3.0, "feature": 2 / 0.2, "response": 0.5 / 1.0}
    assert weights == pytest.approx({name: 3 * r / sum(raw.values()) for name, r in raw.items()}, rel=0.02)


def test_uncertainty_stays_in_range_and_comes_back_from_its_edge():
    weigher = balancer("uncertainty")
    optimizer = torch.optim.SGD(weigher.parameters(), lr=5.0)
    for size in [0.0] * 5 + [10.0] * 5:
        optimizer.zero_grad()
        terms = {name: torch.tensor(size) for name in WHOLE}
        loss, weights = weigher.combine(terms, WHOLE, 0, [])
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert weights == pytest.approx(dict.fromkeys(WHOLE, 1.0))
        assert all(s.abs() < 1e6 for s in weigher.parameters())
    assert all(s.grad.abs() > 0 for s in weigher.parameters())


def test_the_next_strategy_takes_over_on_a_plateau():
    weigher = balancer("gradient_norm", "magnitude", "gradient_norm", "fixed", plateau_patience=2)
    metrics = [0.5, 0.5, 0.6, math.nan, 0.6, 0.1, 0.6, 0.7, 0.2, 0.7, 0.7, 0.7]
    changes = [weigher.observe(metric) for metric in metrics]
    expected = {4: "magnitude", 6: "gradient_norm", 9: "fixed", 11: "gradient_norm"}
    assert [i for i, changed in enumerate(changes) if changed] == list(expected)
    assert weigher.strategy == "gradient_norm"
    assert weigher.index == 0
    alone = balancer("fixed", plateau_patience=1)
    assert not any(alone.observe(0.0) for _ in range(5))


# Defects of the existing implementation. Each check accepts our form and must reject the defective one.


def check_missing_terms_are_noticed(combine):
    embedding = torch.ones(3, requires_grad=True)
    delivered = dict.fromkeys(("original", "kd_feature", "kd_response"), embedding.sum())
    with pytest.raises(ValueError, match=r"'feature' is active, but .* delivered only .*'kd_feature'"):
        combine(delivered, WHOLE, 0, [embedding])


@every_strategy
def test_defect_01_terms_that_are_named_but_never_delivered(strategy):
    def missing_terms_are_zero(terms, active, step, embeddings):
        zero = torch.tensor(0.0)
        return sum(factor * terms.get(name, zero) for name, factor in active.items()), active

    check_missing_terms_are_noticed(balancer(strategy).combine)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_missing_terms_are_noticed(missing_terms_are_zero)


class DeadBalancer:
    """The defective form: smooths the weights themselves from 0, over all terms, and swallows errors."""

    def __init__(self):
        self.step = 0
        self.log_weights = {"original": 0.0, "feature": -math.inf, "response": -math.inf}

    def weights(self, terms, active, step, embeddings):
        try:
            sizes = {name: terms[name].item() if name in active else 0.0 for name in self.log_weights}
            mean = sum(sizes.values()) / len(sizes)
            target = {name: mean / (size + 1e-8) for name, size in sizes.items()}
            total = sum(target.values())
            for name, value in target.items():
                self.log_weights[name] = 0.9 * self.log_weights[name] + 0.1 * math.log(3 * value / total)
            self.step += 1
        except Exception:  # noqa: BLE001 (the defect)
            pass
        return {name: math.exp(log) for name, log in self.log_weights.items()}


def run_two_phases(weigher):
    """Weights at the end of a phase with one term, and after two more terms have been active for a while."""
    terms, embeddings = losses_of({"original": 4.0, "feature": 0.5, "response": 1.0})
    phases = ({"original": 1.0}, WHOLE)
    return [[weigher.weights(terms, a, step, embeddings) for step in range(50)][-1] for a in phases]


def check_a_new_term_comes_alive(weigher):
    weights = run_two_phases(weigher)[1]
    assert all(weight > 0.01 for weight in weights.values()), "a term that began at weight 0 stays there"


def check_inactive_terms_leave_active_ones_alone(weigher):
    weights = run_two_phases(weigher)[0]
    assert weights["original"] == 1, "terms that are not active drive the active one to 0"


def check_errors_are_raised(weigher):
    terms = dict.fromkeys(WHOLE, "not a tensor")
    with pytest.raises((TypeError, AttributeError, ValueError)):
        weigher.weights(terms, WHOLE, 0, [])


@pytest.mark.parametrize("strategy", ["magnitude", "gradient_norm"])
def test_defect_06_the_balancer_is_alive(strategy):
    checks = (check_a_new_term_comes_alive, check_inactive_terms_leave_active_ones_alone, check_errors_are_raised)
    for check in checks:
        check(balancer(strategy, rate=0.1))
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(DeadBalancer())


@every_strategy
def test_defect_06_a_new_term_starts_from_its_fair_share(strategy):
    """However far the factors of the others have moved, and however small the ramp."""
    weigher = balancer(strategy, rate=0.1, frequency=10, icl_weight=1.0)
    terms, embeddings = losses_of({"original": 100.0, "feature": 0.01, "response": 3.0, "icl": 1e-9})
    two = {"original": 1.0, "feature": 1.0}
    for step in range(1, 500):
        weigher.weights(terms, two, step, embeddings)
    old = weigher.weights(terms, two, 501, embeddings)
    for ramp in (1e-6, 1.0):
        new = weigher.weights(terms, two | {"icl": ramp}, 501, embeddings)
        middle = math.sqrt(new["original"] * new["feature"])
        assert new["icl"] == pytest.approx(ramp * middle)
        assert new["feature"] / new["original"] == pytest.approx(old["feature"] / old["original"])


def run_with_interruption(strategies, interrupt_at, rebuild):
    """What 60 steps give; ``rebuild`` is what a restart before one of them does to the balancer."""
    config = published(
        balancers=strategies,
        phases=(10, 20, 30),
        ramp=5,
        plateau_patience=2,
        adaptation_rate=0.2,
        gradient_check_frequency=3,
    )
    schedule, weigher, log = Schedule(config, 60), Balancer(config), []
    for step in range(60):
        if step == interrupt_at:
            weigher = rebuild(weigher, config)
        sizes = {"original": 4 + math.sin(step), "feature": 0.1 + step / 100, "response": 1 + math.cos(step)}
        terms, embeddings = losses_of(sizes)
        loss, weights = weigher.combine(terms, schedule.active(step), step, embeddings)
        loss.backward()
        with torch.no_grad():
            for parameter in weigher.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        if step % 5 == 4:
            weigher.observe(0.5)
        log.append((schedule.phase(step), schedule.temperature(step), weigher.strategy, loss.item(), weights))
    return log


def through_a_file(weigher, config):
    file = io.BytesIO()
    torch.save(weigher.state_dict(), file)
    file.seek(0)
    fresh = Balancer(config)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("interrupt_at", [1, 17, 33, 48])
@pytest.mark.parametrize(
    "strategies", [("magnitude",), ("gradient_norm", "magnitude"), ("uncertainty", "fixed", "gradient_norm")]
)
def test_defect_12_an_interrupted_run_continues_as_if_it_had_not_been(strategies, interrupt_at):
    whole = run_with_interruption(strategies, None, None)
    assert run_with_interruption(strategies, interrupt_at, through_a_file) == whole
    if interrupt_at > 20:  # nothing has been learnt before that could be lost
        forgetful = run_with_interruption(strategies, interrupt_at, lambda _, config: Balancer(config))
        assert forgetful != whole, "the state of the balancer is lost, and no check would see it"
