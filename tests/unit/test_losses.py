"""Every loss against a loop over tokens that follows algorithms.md, and its slopes against torch's own gradient."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.objective import LossSection
from common.wire import EXPERT
from learner.losses.corrections import by_sequence, m2_bound, m2po, needs_sequences
from learner.losses.policy import policy_loss
from learner.losses.router import balance_loss
from learner.losses.tokens import LossStats, Tokens

N, D, PER_SEQUENCE = 24, 31, 5
SECTIONS = {
    "ppo": LossSection(clip_low=0.1, clip_high=0.3),
    "ppo_broker": LossSection(anchor="broker", weight_cap=1.5),
    "ppo_proximal": LossSection(anchor="proximal", weight_cap=2.0),
    "no_clip": LossSection(anchor="none"),
    "jackpot_paper": LossSection(anchor="behaviour", target="policy", weight_cap=1.5, anchor_cap=1.2),
    "reinforce": LossSection(kind="reinforce", anchor="none", weight_cap=2.0),
    "cispo": LossSection(kind="cispo", clip_low=1.0, clip_high=0.5),
    "cispo_absolute": LossSection(kind="cispo", clip_low=0.4, ratio_cap=1.2, anchor="broker"),
    "double_sided": LossSection(kind="double_sided", clip_low=0.3, clip_high=0.4),
    "m2po": LossSection(kind="m2po", m2_threshold=0.1),
    "dppo_tv": LossSection(kind="dppo_tv", tv_threshold=0.05, ratio_penalty=1e-2),
    "gspo": LossSection(kind="gspo", clip_low=0.05, clip_high=0.1, aggregate="sequence_mean"),
    "icepop": LossSection(anchor="proximal", correction="icepop", correction_low=0.6, correction_high=1.5),
    "mask_sequence": LossSection(anchor="proximal", correction="mask_sequence", correction_high=1.5),
    "mask_geometric": LossSection(
        anchor="proximal", correction="mask_geometric", correction_low=0.9, correction_high=1.05
    ),
    "cap_sequence": LossSection(anchor="proximal", correction="cap_sequence", correction_high=1.5),
    "k2": LossSection(anchor="proximal", correction="k2", correction_high=0.1),
    "k3": LossSection(anchor="proximal", correction="k3", correction_high=0.1),
    "uncorrected": LossSection(anchor="proximal", correction="uncorrected"),
    "veto": LossSection(anchor="proximal", veto=0.3),
    "opsm": LossSection(opsm=0.05),
    "kl_k1": LossSection(kl=0.3, kl_estimator="k1"),
    "kl_k2": LossSection(kl=0.3, kl_estimator="k2"),
    "kl_k3": LossSection(kl=0.3, kl_estimator="k3", anchor="broker"),
    "distill": LossSection(distill=0.7, distill_clip=0.5),
    "entropy": LossSection(entropy=0.02),
}


def batch(seed, n=N, spread=1.0, expert=True):
    g = torch.Generator().manual_seed(seed)
    log_q = -torch.rand(n, generator=g) * 3 - 0.01
    log_p_v = (log_q + spread * torch.randn(n, generator=g)).clamp_max(-1e-3)
    logp = (log_p_v + 0.3 * spread * torch.randn(n, generator=g)).clamp_max(-1e-3)
    accept = (torch.rand(n, generator=g) < 0.7).to(torch.uint8)
    if expert:
        accept[5] = EXPERT
    teacher = -torch.rand(n, generator=g) * 2
    teacher[3] = float("nan")
    teacher[4] = -math.inf
    tokens = Tokens(
        log_q, torch.minimum(log_q, log_p_v - 0.1), log_p_v, torch.randn(n, generator=g),
        torch.rand(n, generator=g) / D, accept, -torch.rand(n, generator=g) * 2, teacher,
    )  # fmt: skip
    return logp, torch.rand(n, generator=g), tokens


def prepared(logp, tokens, section):
    """What fixes masks before the loss, as a step does it."""
    if section.kind == "m2po":
        tokens = m2po(logp, tokens, section.m2_threshold, lambda sums: sums)
    if not needs_sequences(section):
        return tokens
    return by_sequence(logp, tokens, torch.bincount(torch.arange(len(logp)) // PER_SEQUENCE), section)


def clip(x, low, high):
    return torch.clamp(x, 1 - low, 1 + high)


def naive(logp, entropy, t, c):
    """``loss`` with torch's gradient: one token after another, detached where the formula says sg."""
    total = torch.zeros(())
    now = logp.detach()
    sampled = [i for i in range(len(logp)) if t.accept[i] != EXPERT]
    harmful = sorted(
        (float((now[i] - t.log_q[i]) ** 2), i)
        for i in sampled
        if t.accept[i] == 1 and (now[i] - t.log_q[i]) * t.advantages[i] > 0
    )
    while c.kind == "m2po" and harmful and sum(m for m, _ in harmful) / len(harmful) > c.m2_threshold:
        harmful.pop()
    kept_harmful = {i for _, i in harmful}
    for i in range(len(logp)):
        w, a = t.weights[i], t.advantages[i]
        if t.accept[i] == EXPERT:
            p = logp[i].exp()
            total = total - w * a * p / (p + c.exemplar_shape)
            continue
        total = total - c.entropy * w * entropy[i]
        if t.accept[i] == 0:
            continue
        lq, lm, lp = t.log_q[i], t.log_m[i], logp[i]
        anchor = {"behaviour": lq, "broker": t.log_p_v[i], "proximal": now[i], "none": now[i]}[c.anchor]
        weight = torch.exp(anchor - lm)
        mates = [j for j in sampled if j // PER_SEQUENCE == i // PER_SEQUENCE]
        rho = [float((now[j] if c.anchor == "proximal" else t.log_q[j]) - t.log_q[j]) for j in mates]
        keep = 1.0
        if c.correction == "icepop":
            keep = float(c.correction_low <= math.exp(anchor - lq) <= c.correction_high)
        elif c.correction == "mask_sequence":
            keep = float(c.correction_low <= math.exp(sum(rho)) <= c.correction_high)
        elif c.correction == "mask_geometric":
            keep = float(c.correction_low <= math.exp(sum(rho) / len(rho)) <= c.correction_high)
        elif c.correction == "cap_sequence":
            keep, weight = min(math.exp(sum(rho)), c.correction_high), torch.exp(lq - lm)
        elif c.correction == "k2":
            keep = float(sum(r * r / 2 for r in rho) / len(rho) <= c.correction_high)
        elif c.correction == "k3":
            keep = float(sum(math.exp(r) - 1 - r for r in rho) / len(rho) <= c.correction_high)
        if c.correction == "uncorrected":
            weight = torch.ones(())
        if c.veto and min(rho) < math.log(c.veto):
            keep = 0.0
        if c.opsm is not None and a < 0 and sum(float(t.log_q[j] - now[j]) for j in mates) / len(mates) > c.opsm:
            keep = 0.0
        if c.target == "policy":
            weight = torch.exp(now[i] - lm).clamp(max=c.weight_cap) * torch.exp(anchor - now[i]).clamp(max=c.anchor_cap)
        elif c.weight_cap is not None:
            weight = weight.clamp(max=c.weight_cap)
        if c.distill and not torch.isnan(t.log_teacher[i]):
            a = a + c.distill * (t.log_teacher[i] - now[i]).clamp(-c.distill_clip, c.distill_clip)
        if c.kl and c.kl_estimator == "k1":
            a = a - c.kl * (now[i] - t.log_reference[i])
        ratio = torch.exp(lp - anchor)
        if c.anchor == "none":
            gain = a * lp
        elif c.kind == "cispo":
            cap = 1 + c.clip_high if c.ratio_cap is None else c.ratio_cap
            gain = torch.clamp(ratio, 1 - c.clip_low, cap).detach() * a * lp
        elif c.kind == "double_sided":
            inside = 1 - c.clip_low < float(ratio.detach()) < 1 + c.clip_high
            gain = ratio * a * inside
        elif c.kind == "m2po":
            was_harmful = (now[i] - lq) * a > 0
            gain = ratio * a * (i in kept_harmful or not was_harmful)
        elif c.kind == "dppo_tv":
            moved = float(now[i].exp() - lq.exp())
            gain = ratio * a * (not (moved > c.tv_threshold and a > 0) and not (-moved > c.tv_threshold and a < 0))
        elif c.kind == "gspo":
            s = math.exp(sum(float(now[j] - t.log_q[j]) for j in mates) / len(mates)) * torch.exp(lp - now[i])
            gain = torch.minimum(s * a, clip(s, c.clip_low, c.clip_high) * a)
        else:
            gain = torch.minimum(ratio * a, clip(ratio, c.clip_low, c.clip_high) * a)
        total = total - w * keep * weight * gain
        x = t.log_reference[i] - lp
        if c.kl and c.kl_estimator == "k2":
            total = total + c.kl * w * weight * x * x / 2
        elif c.kl and c.kl_estimator == "k3":
            total = total + c.kl * w * weight * (torch.exp(x) - 1 - x)
        if c.ratio_penalty:
            total = total + c.ratio_penalty * w * weight * (lp - lq) ** 2
    return total


@pytest.mark.parametrize("name", SECTIONS)
@settings(max_examples=5)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.0, 1.5))
def test_loss_and_slopes_are_those_of_a_loop_and_of_torch(name, seed, spread):
    section = SECTIONS[name]
    logp, entropy, tokens = batch(seed, spread=spread)
    share, stats = policy_loss(logp, entropy, prepared(logp, tokens, section), section)
    leaf, hs = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    expected = naive(leaf, hs, tokens, section)
    slope, of_entropy = torch.autograd.grad(expected, (leaf, hs), allow_unused=True)
    assert share.loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(share.slope, slope, rtol=2e-3, atol=2e-6)
    assert (share.entropy_slope is None) == (section.entropy == 0)
    if share.entropy_slope is not None:
        torch.testing.assert_close(share.entropy_slope, of_entropy)
    assert stats.accepted.item() == (tokens.accept == 1).sum().item()
    assert stats.exemplars.item() == 1


@pytest.mark.parametrize("name", SECTIONS)
def test_a_loss_is_the_sum_of_its_parts_however_it_is_cut(name):
    section = SECTIONS[name]
    logp, entropy, tokens = batch(7, n=60)
    tokens = prepared(logp, tokens, section)
    whole, stats = policy_loss(logp, entropy, tokens, section)
    for size in (1, 7, 59):
        parts = [slice(a, a + size) for a in range(0, 60, size)]
        found = [policy_loss(logp[p], entropy[p], tokens[p], section) for p in parts]
        assert sum(s.loss.item() for s, _ in found) == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-7)
        assert torch.allclose(torch.cat([s.slope for s, _ in found]), whole.slope)
        for f in fields(LossStats):
            total = sum(getattr(s, f.name).item() for _, s in found)
            assert total == pytest.approx(getattr(stats, f.name).item(), rel=1e-4, abs=1e-5), f.name


@pytest.mark.parametrize("name", SECTIONS)
def test_values_of_rejected_tokens_are_never_looked_at_and_faulty_ones_are_counted(name):
    section = SECTIONS[name]
    logp, entropy, tokens = batch(3, expert=False)
    hole = tokens.accept == 0
    results = []
    for poison in (0.0, float("nan"), float("inf"), -float("inf")):
        spoilt = tokens[:]
        for field in ("log_m", "log_p_v"):  # the broker sends log q of rejected tokens too: sequences count them
            setattr(spoilt, field, torch.where(hole, poison, getattr(tokens, field)))
        share, _ = policy_loss(logp, entropy, prepared(logp, spoilt, section), section)
        results.append((share.loss.item(), share.slope.tolist()))
    assert all(r == results[0] for r in results)
    bad = tokens[:]
    bad.log_m = tokens.log_m.clone()
    at = int(torch.nonzero(tokens.accept == 1)[0])
    bad.log_m[at] = float("nan")
    share, stats = policy_loss(logp, entropy, prepared(logp, bad, section), section)
    assert stats.faulty.item() == 1
    assert share.slope[at] == 0 and share.slope.isfinite().all()


@pytest.mark.parametrize("name", ["kl_k1", "kl_k2", "kl_k3", "distill"])
def test_a_frozen_model_that_cannot_say_has_no_say_and_an_impossible_token_is_cut(name):
    """NaN is as if there were no penalty on the token; -inf as a reference far below (algorithms.md 0.4, 3.6)."""
    section = SECTIONS[name]
    logp, entropy, tokens = batch(8, expert=False)
    field = "log_teacher" if name == "distill" else "log_reference"
    at = int(torch.nonzero((tokens.accept == 1) & ~getattr(tokens, field).isnan())[0])

    def share(value, section=section):
        spoilt = tokens[:]
        setattr(spoilt, field, getattr(tokens, field).clone())
        getattr(spoilt, field)[at] = value
        found, stats = policy_loss(logp, entropy, prepared(logp, spoilt, section), section)
        assert all(getattr(stats, f.name).isfinite() for f in fields(LossStats))
        return found

    without = replace(section, kl=0.0, distill=0.0)
    assert share(float("nan")).slope[at] == share(0.0, without).slope[at]
    far = float(logp[at]) - max(20.0, section.distill_clip)
    impossible = share(-float("inf"))
    assert impossible.loss.item() == pytest.approx(share(far).loss.item(), rel=1e-5)
    assert impossible.slope[at] == pytest.approx(share(far).slope[at].item(), rel=1e-5)
    assert impossible.slope.isfinite().all()


def test_everything_rejected_is_a_loss_of_zero_with_slope_zero():
    logp, entropy, tokens = batch(4, expert=False)
    share, stats = policy_loss(logp, entropy, replace(tokens, accept=torch.zeros_like(tokens.accept)), LossSection())
    assert share.loss.item() == 0
    assert not share.slope.any()
    assert stats.accepted.item() == stats.weight.item() == 0


@pytest.mark.parametrize("name", ["ppo", "no_clip", "reinforce", "cispo", "double_sided", "m2po", "dppo_tv", "gspo"])
def test_on_policy_every_slope_is_that_of_the_policy_gradient(name):
    section = replace(SECTIONS[name], weight_cap=None, ratio_cap=None, ratio_penalty=0.0)
    logp, entropy, tokens = batch(5, expert=False)
    on = replace(
        tokens, log_q=logp, log_m=logp, log_p_v=logp, accept=torch.ones(N, dtype=torch.uint8),
    )  # fmt: skip
    share, stats = policy_loss(logp, entropy, prepared(logp, on, section), section)
    torch.testing.assert_close(share.slope, -on.advantages * on.weights)
    assert stats.kl.item() == pytest.approx(0, abs=1e-6)
    assert stats.clipped.item() == stats.masked_positive.item() == stats.masked_negative.item() == 0


def test_a_proximal_anchor_at_the_present_policy_never_clips():
    logp, entropy, tokens = batch(6, spread=2.0)
    _, stats = policy_loss(logp, entropy, tokens, LossSection(anchor="proximal", clip_low=0.1, clip_high=0.1))
    assert stats.clipped.item() == 0
    _, stats = policy_loss(logp, entropy, tokens, LossSection(clip_low=0.1, clip_high=0.1))
    assert stats.clipped.item() > 0


# ---- worked numbers of algorithms.md -----------------------------------------------------------


def of_ratios(ratios, advantages):
    """On-policy data but for the trained policy, weights 1: ``(logp, entropy, tokens)``."""
    log_q = torch.full((len(ratios),), -1.0)
    ones = torch.ones(len(ratios))
    accept = torch.ones(len(ratios), dtype=torch.uint8)
    logp = log_q + torch.tensor(ratios).log()
    return logp, ones, Tokens(log_q, log_q, log_q, torch.tensor(advantages), ones, accept)


def test_glm5_masks_what_ppo_keeps_and_needs_its_stop_gradient():
    ratios, advantages = (1.2, 0.5, 0.978, 1.333, 1.0), (1.0, 1.0, -1.0, -1.0, 1.0)
    given_ = of_ratios(ratios, advantages)
    double, _ = policy_loss(*given_, LossSection(kind="double_sided", clip_low=0.2, clip_high=0.28))
    assert [bool(s) for s in double.slope] == [True, False, True, False, True]
    ppo, _ = policy_loss(*given_, LossSection(clip_low=0.2, clip_high=0.28))
    assert all(ppo.slope != 0)
    z = torch.tensor([0.2, -0.1, 0.4], requires_grad=True)  # G1: one token, mu(y) = .28, A = 1.3
    logp = z.log_softmax(0)[1:2]
    tokens = Tokens(*(torch.tensor([math.log(0.28)]),) * 3, torch.tensor([1.3]), torch.ones(1),
                    torch.ones(1, dtype=torch.uint8))  # fmt: skip
    share, _ = policy_loss(
        logp.detach(), logp.detach(), tokens, LossSection(kind="double_sided", clip_low=0.9, clip_high=9.0)
    )
    (gradient,) = torch.autograd.grad((share.slope * logp).sum(), z)
    assert gradient.tolist() == pytest.approx([0.392, -0.871, 0.479], abs=5e-4)


def test_the_open_and_the_closed_interval():
    _, entropy, tokens = of_ratios((0.5, 2.0), (1.0, 1.0))
    tokens = replace(tokens, log_q=torch.zeros(2), log_m=torch.zeros(2))
    exact = torch.tensor([0.5, 2.0]).log()
    glm, _ = policy_loss(exact, entropy, tokens, LossSection(kind="double_sided", clip_low=0.5, clip_high=1.0))
    assert glm.slope.tolist() == [0.0, 0.0]
    pop, _ = policy_loss(
        exact, entropy, tokens,
        LossSection(anchor="proximal", correction="icepop", correction_low=0.5, correction_high=2.0),
    )  # fmt: skip
    assert all(pop.slope != 0)


def test_gspo_of_the_page_and_its_invariance_to_tiling():
    ratios = (1.10, 0.95, 1.30, 0.90)
    section = LossSection(kind="gspo", clip_low=3e-4, clip_high=4e-4, aggregate="sequence_mean")
    for times in (1, 7):
        logp, entropy, tokens = of_ratios(ratios * times, (1.0,) * 4 * times)
        found = by_sequence(logp, tokens, torch.tensor([4 * times]), section)
        assert found.sequence_ratio[0].item() == pytest.approx(1.051539, abs=1e-5)
        share, stats = policy_loss(logp, entropy, found, section)
        assert share.loss.item() == pytest.approx(-1.0004 * 4 * times, rel=1e-6)  # weights of 1 here, 1 / T in a run
        assert stats.clipped.item() == 4 * times  # one decision for all of it


def test_cispo_by_its_cap_and_by_what_is_above_one_are_the_same_numbers():
    given_ = of_ratios((0.2, 1.0, 3.0, 9.0), (1.0,) * 4)
    absolute, _ = policy_loss(*given_, LossSection(kind="cispo", clip_low=1.0, ratio_cap=5.0))  # TRL, ScaleRL
    relative, _ = policy_loss(*given_, LossSection(kind="cispo", clip_low=1.0, clip_high=4.0))  # verl, slime
    assert (-absolute.slope).tolist() == pytest.approx([0.2, 1.0, 3.0, 5.0])
    assert torch.equal(absolute.slope, relative.slope)


def test_bounds_are_of_the_ratio_and_not_of_its_inverse():
    """verl's k1 mode bounds 1/rho: with (0.5, 5.0) it keeps .3 and drops 3, against its documentation."""
    ratios = (0.15, 0.3, 1.0, 3.0, 8.0)
    logp, entropy, tokens = of_ratios(ratios, (1.0,) * 5)
    section = LossSection(anchor="proximal", correction="icepop", correction_low=0.5, correction_high=5.0)
    share, _ = policy_loss(logp, entropy, tokens, section)
    ours = [bool(s) for s in share.slope]
    verl = [math.log(0.5) <= -math.log(r) <= math.log(5.0) for r in ratios]
    assert ours == [False, False, True, True, False]
    assert verl == [False, True, True, False, False]


def test_m2po_of_the_page():
    ratios = (1.02, 0.97, 1.9, 0.4, 1.1, 0.88, 3.0, 1.0)
    logp, _, tokens = of_ratios(ratios, (1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0))
    masked = m2po(logp, tokens, 0.04, lambda sums: sums)
    assert masked.factor.tolist() == [1, 1, 0, 0, 1, 1, 0, 1]


@settings(max_examples=60)
@given(st.lists(st.floats(0, 9, width=32), min_size=0, max_size=40), st.floats(0.0, 3.0))
def test_the_bound_leaves_the_longest_prefix_whose_mean_is_within(values, threshold):
    bound = m2_bound(torch.tensor(values, dtype=torch.float32), threshold, lambda sums: sums).item()
    kept = [v for v in values if v <= bound]
    assert not kept or sum(kept) / len(kept) <= threshold * (1 + 1e-9)
    beyond = [v for v in values if v > bound]
    if beyond:
        more = [v for v in values if v <= min(beyond)]
        assert sum(more) / len(more) > threshold


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_m2po_masks_only_harmful_tokens_more_of_them_for_a_smaller_threshold_and_bounds_chi_square(seed, one, two):
    logp, _, tokens = batch(seed, n=80, expert=False)
    low, high = sorted((one, two))
    masks = [m2po(logp, tokens, threshold, lambda sums: sums).factor for threshold in (low, high, math.inf)]
    assert (masks[0] <= masks[1]).all() and masks[2].all()
    x = logp - tokens.log_q
    harmful = (tokens.accept == 1) & (x * tokens.advantages > 0)
    assert masks[0][~harmful].all()
    kept = harmful & (masks[0] > 0)
    if kept.any():
        assert x[kept].square().mean().item() <= low * (1 + 1e-5)
        widest = x[kept].abs().max().exp().item()
        assert (x[kept].exp() - 1).square().mean().item() <= widest**2 * low * (1 + 1e-5)


def test_the_gradient_of_distillation_is_that_of_the_reverse_divergence():
    """G2: enumerated over the vocabulary, the surrogate's gradient is -d KL(pi || teacher) / d logits."""
    z = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64).log_softmax(0)
    logp = z.log_softmax(0)
    own = logp.detach()
    zero = torch.zeros(3, dtype=torch.float64)
    tokens = Tokens(own, own, own, zero, own.exp(), torch.ones(3, dtype=torch.uint8), log_teacher=teacher)
    share, _ = policy_loss(own, zero, tokens, LossSection(distill=1.0, anchor="proximal"))
    (ours,) = torch.autograd.grad((share.slope * logp).sum(), z, retain_graph=True)
    divergence = (logp.exp() * (logp - teacher)).sum()
    (wanted,) = torch.autograd.grad(divergence, z)
    assert divergence.item() == pytest.approx(0.43668, abs=1e-5)
    torch.testing.assert_close(ours, wanted)


def test_opsm_drops_a_far_sequence_only_where_its_advantage_is_negative():
    logp, _, tokens = of_ratios((0.5, 0.5, 0.5, 0.5, 0.9, 0.9), (1.0, 1.0, -1.0, -1.0, -1.0, -1.0))
    section = LossSection(opsm=0.3)
    assert by_sequence(logp, tokens, torch.tensor([2, 2, 2]), section).factor.tolist() == [1, 1, 0, 0, 1, 1]


def test_the_length_trap_of_sequence_ratios():
    for n, product in ((10, 2.594), (100, 13780.6)):
        logp, _, tokens = of_ratios((1.1,) * n, (1.0,) * n)
        capped = LossSection(anchor="proximal", correction="cap_sequence", correction_high=1e5)
        geometric = LossSection(anchor="proximal", correction="mask_geometric", correction_low=1.09,
                                correction_high=1.11)  # fmt: skip
        assert by_sequence(logp, tokens, torch.tensor([n]), capped).factor[0].item() == pytest.approx(product, rel=1e-3)
        assert by_sequence(logp, tokens, torch.tensor([n]), geometric).factor.all()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"kind": "double_sided", "anchor": "proximal"}, "loss.anchor.*same gap twice"),
        ({"kind": "m2po", "anchor": "broker"}, "loss.anchor.*same gap twice"),
        ({"kind": "reinforce"}, "loss.anchor.*set it to none"),
        ({"kind": "cispo", "anchor": "none"}, "loss.anchor.*behaviour, broker or proximal"),
        ({"correction": "icepop"}, "loss.correction.*loss.anchor=proximal"),
        ({"veto": 1e-4}, "loss.veto.*loss.anchor=proximal"),
        ({"target": "policy", "kind": "cispo"}, "loss.target"),
        ({"anchor_cap": 2.0}, "loss.anchor_cap.*loss.target=policy"),
        ({"ratio_cap": 5.0}, "loss.ratio_cap.*CISPO"),
        ({"kind": "m2po", "weight_cap": 2.0}, "loss.weight_cap.*one is enough"),
        ({"kind": "gspo"}, "loss.aggregate.*sequence_mean"),
        ({"kind": "gspo", "aggregate": "sequence_mean", "anchor": "broker"}, "loss.anchor.*accepted tokens alone"),
        ({"correction": "k3", "anchor": "broker"}, "loss.anchor.*accepted tokens alone"),
        ({"correction_low": 3.0}, "loss.correction_low"),
        ({"clip_low": 1.5}, "loss.clip_low"),
        ({"weight_cap": 0.0}, "loss.weight_cap"),
    ],
)
def test_what_cannot_stand_together_is_refused_with_the_reason(given_, words):
    with pytest.raises(ConfigError, match=words):
        LossSection(**given_)


def test_balance_loss_is_that_of_transformers_and_adds_up_over_shards():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    g = torch.Generator().manual_seed(0)
    experts, k, n = 6, 2, 40
    logits = torch.randn(n, experts, generator=g)
    probs = logits.softmax(1)
    chosen = probs.topk(k, dim=1).indices
    fraction = torch.nn.functional.one_hot(chosen, experts).sum((0, 1)) / (n * k)
    ours = balance_loss(probs.sum(0)[None], n, fraction[None].float())
    theirs = load_balancing_loss_func((logits,), experts, k)
    assert ours.item() * k == pytest.approx(theirs.item(), rel=1e-5)
    parts = [balance_loss(p.sum(0)[None], n, fraction[None].float()).item() for p in probs.split([13, 0, 27])]
    assert sum(parts) == pytest.approx(ours.item(), rel=1e-5)
    assert balance_loss(torch.zeros(0, 0), n, torch.zeros(0, 0)).item() == 0  # a dense model
