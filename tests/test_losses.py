"""Losses against closed forms, plain loops and open_clip; their gradients, symmetries and known defects."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss

from mclip import losses
from mclip.config import ConfigError

sizes = {
    "batch": st.integers(2, 6),
    "width": st.integers(1, 5),
    "teacher_width": st.integers(1, 5),
    "scale": st.floats(0.5, 100),
    "seed": st.integers(0, 10_000),
}


def unit(batch, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def embeddings(batch=5, width=4, teacher_width=4, seed=0, dtype=torch.float64):
    widths = (width, width, teacher_width, teacher_width)
    return [unit(batch, w, 4 * seed + i, dtype) for i, w in enumerate(widths)]


# Every loss as a function of the student's u and v, the teacher's tu and tv, and the student's scale s.
LOSSES = {
    "info_nce": lambda u, v, tu, tv, s: losses.info_nce(u, v, s),
    "siglip": lambda u, v, tu, tv, s: losses.siglip(u, v, s, -3.0),
    "jsd": lambda u, v, tu, tv, s: losses.jsd(u, v, s),
    "feature": lambda u, v, tu, tv, s: losses.feature(u, tu) + losses.feature(v, tv),
    "feature_mse": lambda u, v, tu, tv, s: losses.feature(u, tu, "mse") + losses.feature(v, tv, "mse"),
    "response": lambda u, v, tu, tv, s: losses.response(u, v, tu, tv, s, 20.0, 4.0),
    "similarity": lambda u, v, tu, tv, s: losses.similarity(u, v, tu, tv),
    "icl": lambda u, v, tu, tv, s: losses.icl(u, v, tu, tv, s),
}
ANY_WIDTH = ("info_nce", "siglip", "jsd", "response", "similarity")
every_loss = pytest.mark.parametrize("name", LOSSES)


# The same definitions once more, one pair at a time.


def softmax(row):
    shifted = [math.exp(x - max(row)) for x in row]
    return [x / sum(shifted) for x in shifted]


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def loop_info_nce(u, v, s):
    logits, n = s * u @ v.T, len(u)
    rows = [-math.log(softmax(logits[i])[i]) for i in range(n)]
    columns = [-math.log(softmax(logits[:, i])[i]) for i in range(n)]
    return (sum(rows) + sum(columns)) / (2 * n)


def loop_siglip(u, v, s, b):
    n, total = len(u), 0.0
    for i in range(n):
        for j in range(n):
            total += softplus((-1 if i == j else 1) * (s * u[i] @ v[j] + b))
    return total / n


def loop_jsd(u, v, s):
    n = len(u)
    positives = [softplus(-s * u[i] @ v[i]) for i in range(n)]
    negatives = [softplus(s * u[i] @ v[j]) for i in range(n) for j in range(n) if i != j]
    return sum(positives) / len(positives) + sum(negatives) / len(negatives)


def loop_response(u, v, tu, tv, s, ts, t):
    student, teacher, n = s * u @ v.T / t, ts * tu @ tv.T / t, len(u)
    total = 0.0
    for ours, theirs in ((student, teacher), (student.T, teacher.T)):
        for i in range(n):
            p, log_q = softmax(theirs[i]), ours[i] - max(ours[i])
            log_q = log_q - math.log(sum(np.exp(log_q)))
            total += sum(a * (math.log(a) - b) for a, b in zip(p, log_q, strict=True) if a > 0)
    return t**2 * total / (2 * n)


def loop_similarity(u, v, tu, tv):
    n, total = len(u), 0.0
    for i in range(n):
        for j in range(n):
            total += (u[i] @ u[j] - tu[i] @ tu[j]) ** 2 / 3
            total += (v[i] @ v[j] - tv[i] @ tv[j]) ** 2 / 3
            total += (u[i] @ v[j] - tu[i] @ tv[j]) ** 2 / 3
    return total / n**2


def loop_icl(u, v, tu, tv, s):
    n = len(u)
    images = [-math.log(softmax(s * tv @ u[i])[i]) for i in range(n)]
    texts = [-math.log(softmax(s * tu @ v[i])[i]) for i in range(n)]
    return (sum(images) + sum(texts)) / (2 * n)


def loop_cosine(x, tu):
    return sum(1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(x, tu, strict=True)) / len(x)


def loop_mse(x, tu):
    return sum(((a - b) ** 2).sum() for a, b in zip(x, tu, strict=True)) / len(x)


@settings(max_examples=40, deadline=None)
@given(**sizes, temperature=st.floats(1, 10), bias=st.floats(-12, 2))
def test_every_loss_is_its_loop(batch, width, teacher_width, scale, seed, temperature, bias):
    u, v, tu, tv = embeddings(batch, width, teacher_width, seed)
    a, b, ta, tb = (x.numpy() for x in (u, v, tu, tv))
    near = {"rel": 1e-8, "abs": 1e-9}
    assert losses.siglip(u, v, scale, bias).item() == pytest.approx(loop_siglip(a, b, scale, bias), **near)
    assert losses.jsd(u, v, scale).item() == pytest.approx(loop_jsd(a, b, scale), **near)
    response = losses.response(u, v, tu, tv, scale, 30.0, temperature)
    assert response.item() == pytest.approx(loop_response(a, b, ta, tb, scale, 30.0, temperature), **near)
    assert losses.similarity(u, v, tu, tv).item() == pytest.approx(loop_similarity(a, b, ta, tb), **near)
    # Probabilities below 1e-308 are the loop's own limit.
    assert losses.info_nce(u, v, scale).item() == pytest.approx(loop_info_nce(a, b, scale), **near)
    if width == teacher_width:
        assert losses.icl(u, v, tu, tv, scale).item() == pytest.approx(loop_icl(a, b, ta, tb, scale), **near)
        assert losses.feature(3 * u, tu).item() == pytest.approx(loop_cosine(3 * a, ta), **near)
        assert losses.feature(3 * u, tu, "mse").item() == pytest.approx(loop_mse(3 * a, ta), **near)


@settings(max_examples=20, deadline=None)
@given(batch=sizes["batch"], width=sizes["width"], scale=sizes["scale"], seed=sizes["seed"])
def test_contrastive_losses_are_those_of_open_clip(batch, width, scale, seed):
    u, v, _, _ = embeddings(batch, width, width, seed)
    s, bias = torch.tensor(scale, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    torch.testing.assert_close(losses.info_nce(u, v, s), ClipLoss()(u, v, s))
    torch.testing.assert_close(losses.siglip(u, v, s, bias), SigLipLoss()(u, v, s, bias))


def test_closed_forms():
    n, s = 6, 9.0
    alike, basis = torch.ones(n, 1).double(), torch.eye(n).double()
    assert losses.info_nce(alike, alike, s).item() == pytest.approx(math.log(n))
    assert losses.info_nce(basis, basis, s).item() == pytest.approx(math.log1p((n - 1) * math.exp(-s)))
    assert losses.jsd(basis, basis.roll(1, 0), 0.0).item() == pytest.approx(2 * math.log(2))
    assert losses.jsd(basis, basis, s).item() == pytest.approx(math.log1p(math.exp(-s)) + math.log(2))
    expected = math.log1p(math.exp(-s + 4)) + (n - 1) * math.log1p(math.exp(-4))
    assert losses.siglip(basis, basis, s, -4.0).item() == pytest.approx(expected)
    assert losses.feature(basis, basis).item() == pytest.approx(0, abs=1e-12)
    assert losses.feature(basis, -basis).item() == pytest.approx(2)
    assert losses.feature(basis, -basis, "mse").item() == pytest.approx(4)
    # A student that knows nothing, a teacher that knows everything: all but the diagonal differs by 1.
    assert losses.similarity(alike, alike, basis, basis).item() == pytest.approx((n - 1) / n)
    # A teacher sure of each pair against a student that knows nothing: KL = log n.
    known = losses.response(alike, alike, basis, basis, s, 1000.0, 1.0)
    assert known.item() == pytest.approx(math.log(n))


def test_mse_of_unit_vectors_is_twice_the_cosine_distance():
    u, _, tu, _ = embeddings()
    torch.testing.assert_close(losses.feature(u, tu, "mse"), 2 * losses.feature(u, tu))


@every_loss
def test_gradients_are_those_of_finite_differences(name):
    inputs = [x.requires_grad_() for x in embeddings(4, 3, 3, seed=2)]
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (*inputs, scale))


def test_learned_bias_and_teacher_scale_have_gradients():
    u, v, tu, tv = embeddings()
    scalars = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: losses.siglip(u, v, s[0], s[1]), (scalars,))
    assert torch.autograd.gradcheck(lambda s: losses.response(u, v, tu, tv, s[0], -s[1], 2.0), (scalars,))


@every_loss
@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_order_of_the_batch_and_roles_of_the_modalities_do_not_matter(name, batch, width, teacher_width, scale, seed):
    u, v, tu, tv = embeddings(batch, width, teacher_width if name in ANY_WIDTH else width, seed)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    loss = LOSSES[name](u, v, tu, tv, scale)
    assert loss.ndim == 0
    assert loss.item() >= -1e-9
    torch.testing.assert_close(LOSSES[name](u[order], v[order], tu[order], tv[order], scale), loss)
    torch.testing.assert_close(LOSSES[name](v, u, tv, tu, scale), loss)


@settings(max_examples=30, deadline=None)
@given(**sizes, temperature=st.floats(1, 8))
def test_response_is_zero_if_and_only_if_the_distributions_are_equal(
    batch, width, teacher_width, scale, seed, temperature
):
    u, v, tu, tv = embeddings(batch, width, teacher_width, seed)
    assert abs(losses.response(u, v, u, v, scale, scale, temperature).item()) < 1e-12
    other = losses.response(u, v, tu, tv, scale, 20.0, temperature).item()
    ours, theirs = scale * u @ v.T / temperature, 20.0 * tu @ tv.T / temperature
    both = ((ours, theirs), (ours.T, theirs.T))
    gap = max((a.softmax(1) - b.softmax(1)).abs().max().item() for a, b in both)
    # Pinsker: KL >= |p - q|_1^2 / 2, here for the worst of the 2 B rows of the average.
    assert other >= temperature**2 * gap**2 / (4 * batch) - 1e-12


def test_cross_entropy_with_the_teacher_is_not_zero_when_equal():
    """At its optimum it is the teacher's entropy: a value from which no distance can be read."""
    u, v, _, _ = embeddings()
    target = (5 * u @ v.T).softmax(1)
    cross_entropy = -(target * (5 * u @ v.T).log_softmax(1)).sum(1).mean()
    assert cross_entropy > 0.1
    assert losses.response(u, v, u, v, 5.0, 5.0).abs() < 1e-12


def test_response_survives_probabilities_below_the_smallest_float():
    basis = torch.eye(4)
    for scale in (100.0, 1000.0):
        student = (-basis).requires_grad_()
        value = losses.response(student, basis, basis, basis, scale, scale, 1.0)
        value.backward()
        exact = losses.response(-basis.double(), *[basis.double()] * 3, scale, scale, 1.0)
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        assert student.grad.isfinite().all()
        assert student.grad.norm() > 0
    # The form with softmax and log instead of log_softmax breaks at the second scale.
    q = (1000.0 * -basis).softmax(1)
    assert not (basis * (basis.log() - q.log())).sum().isfinite()


def test_temperature_does_not_change_the_size_of_the_gradient():
    u, v, tu, tv = embeddings(8, 4, 6)
    norms = []
    for temperature in (20.0, 40.0, 80.0):
        student = u.clone().requires_grad_()
        losses.response(student, v, tu, tv, 10.0, 10.0, temperature).backward()
        norms.append(student.grad.norm().item())
    assert max(norms) < 1.2 * min(norms)


def test_mixed_precision_and_stored_half_precision_change_little():
    u, v, tu, tv = embeddings(16, 32, 32, dtype=torch.float32)
    assert losses.cosines(u.half(), v.half()).dtype == torch.float32
    for name, loss in LOSSES.items():
        expected = loss(u, v, tu, tv, 100.0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(u, v, tu, tv, 100.0), expected, rtol=1e-5, atol=1e-5)
        # Two products of rounded unit vectors differ by about 1e-3 at most: 0.1 in the logits.
        halved = loss(u, v, tu.half(), tv.half(), 100.0)
        torch.testing.assert_close(halved, expected, rtol=2e-2, atol=2e-2, msg=name)


def test_repeated_captions_put_a_floor_under_contrastive_losses_but_not_under_response():
    basis = torch.eye(4)[[0, 0, 1, 2]]
    assert losses.info_nce(basis, basis, 1e4).item() == pytest.approx(math.log(2) / 2)
    assert losses.response(basis, basis, basis, basis, 1e4, 1e4).item() == 0


def test_icl_of_the_student_with_itself_is_info_nce():
    u, v, _, _ = embeddings()
    torch.testing.assert_close(losses.icl(u, v, u, v, 7.0), losses.info_nce(u, v, 7.0))


def test_shapes_that_cannot_work_are_named():
    u, v, tu, tv = embeddings(5, 4, 6)
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(4, 4\)"):
        losses.info_nce(u, v[:4], 1.0)
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(5, 6\)"):
        losses.icl(u, v, tu, tv, 1.0)
    with pytest.raises(ValueError, match=r"(?s)\(5, 4\).*\(5, 6\).*Aligner\(4, 6\)"):
        losses.feature(u, tu)
    with pytest.raises(ConfigError, match=r"form='huber'.*cosine"):
        losses.feature(u, v, "huber")
    with pytest.raises(ValueError, match="5 pairs, the teacher's 1"):
        losses.response(u, v, tu[:1], tv[:1], 1.0, 1.0)
    with pytest.raises(ValueError, match="5 pairs, the teacher's 1"):
        losses.similarity(u, v, tu[:1], tv[:1])
    with pytest.raises(ValueError, match="at least 2 pairs"):
        losses.jsd(u[:1], v[:1], 1.0)


def test_aligner():
    aligner = losses.Aligner(4, 6)
    kinds = [type(layer).__name__ for layer in aligner]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear"]
    assert aligner[2].p == 0.1
    assert aligner(torch.randn(3, 4)).shape == (3, 6)
    x = torch.randn(3, 4)
    assert losses.Aligner(4, 4, "identity")(x) is x
    assert not list(losses.Aligner(4, 4, "identity").parameters())
    with pytest.raises(ConfigError, match=r"aligner='identity'.*4.*6"):
        losses.Aligner(4, 6, "identity")
    with pytest.raises(ConfigError, match="aligner='linear'"):
        losses.Aligner(4, 6, "linear")


# Defects of the existing implementation. Each check accepts our form and must reject the defective one.


def check_targets_tell_captions_apart(teacher_image, teacher_text, scale):
    """The teacher's distributions over captions must hold less than the entropy of a guess."""
    log_p = (scale * teacher_image @ teacher_text.T).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean().item()
    assert entropy < 0.99 * math.log(len(log_p)), "targets are uniform: are all captions alike?"


def test_defect_02_a_constant_caption_leaves_nothing_to_learn():
    _, _, tu, tv = embeddings(16, 8, 8)
    constant = tv[:1].expand_as(tv)
    check_targets_tell_captions_apart(tu, tv, 20.0)
    with pytest.raises(AssertionError, match="uniform"):
        check_targets_tell_captions_apart(tu, constant, 20.0)
    # Worse than useless: the best student is one that tells no caption from another.
    ignorant = losses.response(tu, constant, tu, constant, 20.0, 20.0)
    knowing = losses.response(tu, tv, tu, constant, 20.0, 20.0)
    assert ignorant.item() == pytest.approx(0, abs=1e-12)
    assert knowing > 1


def check_matched_pairs_are_never_pushed_apart(loss):
    """At confident embeddings the gradient must still draw every pair together, however little."""
    image = torch.eye(4, dtype=torch.float64).requires_grad_()
    text = torch.eye(4, dtype=torch.float64)
    loss(image, text, torch.tensor(10.0)).backward()
    pull = (image.grad * text).sum(1)
    assert (pull < 0).all(), "a matched pair is pushed apart: it is also among the negatives"


def test_defect_05_a_pair_is_never_both_positive_and_negative():
    def with_the_pair_among_its_negatives(image, text, scale):
        logits = scale * image @ text.T
        return F.softplus(-logits.diagonal()).mean() + F.softplus(logits).mean()

    for loss in (losses.jsd, losses.info_nce, lambda u, v, s: losses.siglip(u, v, s, -5.0)):
        check_matched_pairs_are_never_pushed_apart(loss)
    with pytest.raises(AssertionError, match="pushed apart"):
        check_matched_pairs_are_never_pushed_apart(with_the_pair_among_its_negatives)


def check_feature_pulls_like_the_contrastive_term(feature):
    """Gradient norms at the embeddings of a fresh student must be within a factor of 30 of each other."""
    u, v, tu, _ = embeddings(64, 512, 512, dtype=torch.float32)
    student = u.clone().requires_grad_()
    (contrastive,) = torch.autograd.grad(losses.info_nce(student, v, 1 / 0.07), student)
    (distilled,) = torch.autograd.grad(feature(student, tu), student)
    share = (distilled.norm() / contrastive.norm()).item()
    assert share > 1 / 30, f"the feature term pulls {1 / share:.0f} times less than the contrastive one"


def test_defect_07_the_feature_term_is_not_averaged_into_silence():
    check_feature_pulls_like_the_contrastive_term(losses.feature)
    check_feature_pulls_like_the_contrastive_term(lambda x, tu: losses.feature(x, tu, "mse"))
    with pytest.raises(AssertionError, match="times less"):
        check_feature_pulls_like_the_contrastive_term(F.mse_loss)
    # The size gives it away: unrelated unit vectors of 512 dimensions differ by about 2 / 512 = 0.004.
    u, _, tu, _ = embeddings(64, 512, 512)
    assert F.mse_loss(u, tu).item() == pytest.approx(0.004, abs=0.001)
