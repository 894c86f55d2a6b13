"""Worst-case weights of every ambiguity set, by searches that only reduce and never sort.

One program holds one problem. Formulas: `drrlhf.ambiguity`; the same searches for the host:
csrc/core/dual_search.h; an independent solution by sorting: `drrlhf.reference`.

Losses l, nominal weights p, shifted losses d = (max - l) / (max - min) in [0, 1] and worst-case
weights q lie in a float64 scratch (4, n), small enough for the nearest cache: a reduction goes
through it in blocks of BLOCK, so one text serves any n. Every scalar is float64 and known to every
thread of the program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.numerics import expm1, log1p

from drrlhf.conventions import MASS_ROUNDING

INFINITY = tl.constexpr(float("inf"))
MASS_ROUNDING = tl.constexpr(MASS_ROUNDING)
MOST_STEPS = tl.constexpr(200)


@triton.jit
def zero():
    return tl.zeros([], tl.float64)


@triton.jit
def read(x_ptr, y_ptr, first, n, BLOCK: tl.constexpr):
    """The places of a block and what lies there in two arrays (n,), behind their end 0."""
    o = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    return o, x, tl.load(y_ptr + o, mask=o < n, other=0.0)


# --------------------------------------------------------------------------- reductions


@triton.jit
def bounds(l_ptr, p_ptr, n, BLOCK: tl.constexpr):
    """The smallest and the largest unmasked loss."""
    low = tl.zeros([BLOCK], tl.float64) + INFINITY
    high = tl.zeros([BLOCK], tl.float64) - INFINITY
    for first in range(0, n, BLOCK):
        o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
        present = p > 0
        low = tl.where(present & (l < low), l, low)
        high = tl.where(present & (l > high), l, high)
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def look(l_ptr, p_ptr, n, pivot, BLOCK: tl.constexpr):
    """Of losses above `pivot` the mass and the number, and the mass of those equal to it."""
    mass = tl.zeros([BLOCK], tl.float64)
    count, at = mass, mass
    for first in range(0, n, BLOCK):
        o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
        mass += tl.where(l > pivot, p, 0.0)
        count += tl.where((l > pivot) & (o < n), 1.0, 0.0)
        at += tl.where(l == pivot, p, 0.0)
    return tl.sum(mass, 0), tl.sum(count, 0), tl.sum(at, 0)


@triton.jit
def neighbours(l_ptr, p_ptr, n, pivot, BLOCK: tl.constexpr):
    """The smallest unmasked loss above `pivot`, and the largest that is not above it."""
    above = tl.zeros([BLOCK], tl.float64) + INFINITY
    below = tl.zeros([BLOCK], tl.float64) - INFINITY
    for first in range(0, n, BLOCK):
        o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
        present = p > 0
        above = tl.where(present & (l > pivot) & (l < above), l, above)
        below = tl.where(present & (l <= pivot) & (l > below), l, below)
    return tl.min(above, 0), tl.max(below, 0)


@triton.jit
def powers(d_ptr, p_ptr, n, eta, BLOCK: tl.constexpr):
    """Over the set d < eta: sum p, sum p d, sum p d^2, and how many there are with p > 0."""
    m0 = tl.zeros([BLOCK], tl.float64)
    m1, m2, count = m0, m0, m0
    for first in range(0, n, BLOCK):
        o, d, p = read(d_ptr, p_ptr, first, n, BLOCK)
        w = tl.where(d < eta, p, 0.0)
        m0 += w
        m1 += w * d
        m2 += w * d * d
        count += tl.where(w > 0, 1.0, 0.0)
    return tl.sum(m0, 0), tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(count, 0)


@triton.jit
def tilted_moments(d_ptr, p_ptr, n, s, BLOCK: tl.constexpr):
    """Of d under p exp(-s d): the log of the normaliser, mean and variance."""
    m0 = tl.zeros([BLOCK], tl.float64)
    m1, m2, less = m0, m0, m0
    for first in range(0, n, BLOCK):
        o, d, p = read(d_ptr, p_ptr, first, n, BLOCK)
        e = p * tl.exp(-s * d)
        m0 += e
        m1 += e * d
        m2 += e * d * d
        if s < 0.34:
            less += p * expm1(-s * d)
    total = tl.sum(m0, 0)
    # log1p keeps the digits of a normaliser close to 1.
    log_z = tl.where(s < 0.34, log1p(tl.sum(less, 0)), tl.log(total))
    mean = tl.sum(m1, 0) / total
    variance = tl.sum(m2, 0) / total - mean * mean
    return log_z, mean, tl.where(variance > 0, variance, 0.0)


@triton.jit
def expected(q_ptr, d_ptr, n, BLOCK: tl.constexpr):
    """sum q d."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        o, q, d = read(q_ptr, d_ptr, first, n, BLOCK)
        total += q * d
    return tl.sum(total, 0)


# --------------------------------------------------------------------------- the ordered sets


@triton.jit
def key(x):
    """Integers in the order of the doubles."""
    bits = x.to(tl.int64, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


@triton.jit
def midpoint_of_bits(low, high):
    """Halving between the integers of doubles finds any scale in 64 steps."""
    a, b = key(low), key(high)
    # Without overflow, whatever the signs.
    middle = (a >> 1) + (b >> 1) + (a & b & 1)
    bits = tl.where(middle < 0, middle ^ 0x7FFFFFFFFFFFFFFF, middle)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def upper_tail(l_ptr, p_ptr, n, mass, bottom, top, BLOCK: tl.constexpr):
    """The value v with p(l > v) < mass <= p(l >= v), and the share of its ties; mass in (0, 1].

    First real-valued pivots close in on it; then the bracket snaps to the data.
    """
    # Invariant: p(l > high) < mass <= p(l >= low), so the threshold lies in [low, high].
    low, high = bottom, top
    excess_low, excess_high = 1 - mass, -mass
    count_low, count_high = zero() + INFINITY, zero()
    side = 0  # which end the last pivot replaced
    step = 0
    going = low < high
    while going & (step < 40):
        # Regula falsi; the Illinois rule and every fourth step a halving keep it from creeping.
        pivot = low + (high - low) * (excess_low / (excess_low - excess_high))
        if step % 4 == 3:
            pivot = low + 0.5 * (high - low)
        if step % 8 == 7:
            pivot = midpoint_of_bits(low, high)
        inside = (pivot > low) & (pivot < high)
        if inside:
            above, count, at = look(l_ptr, p_ptr, n, pivot, BLOCK)
            if above >= mass:
                low, excess_low, count_low = pivot, above - mass, count
                excess_high = tl.where(side == 1, 0.5 * excess_high, excess_high)
                side = 1
            else:
                high, excess_high, count_high = pivot, above - mass, count
                excess_low = tl.where(side == -1, 0.5 * excess_low, excess_low)
                side = -1
        going = inside & (low < high) & (count_low - count_high > 3)
        step += 1
    if low < high:
        _, high = neighbours(l_ptr, p_ptr, n, high, BLOCK)
    if (low < high) & (count_low < INFINITY):
        low, _ = neighbours(l_ptr, p_ptr, n, low, BLOCK)
    while low < high:
        pivot = midpoint_of_bits(low, high)
        pivot = tl.where(pivot < high, pivot, low)
        next_above, last_below = neighbours(l_ptr, p_ptr, n, pivot, BLOCK)
        above, count, at = look(l_ptr, p_ptr, n, pivot, BLOCK)
        low = tl.where(above >= mass, next_above, low)
        high = tl.where(above >= mass, high, last_below)
    above, count, at = look(l_ptr, p_ptr, n, high, BLOCK)
    # A part below the rounding of the masses is none: trimming must not leave 1e-17 of a loss
    # behind for the adversary to find.
    part = mass - above
    share = tl.where(at - part < MASS_ROUNDING, 1.0, part / at)
    return high, tl.where(part < MASS_ROUNDING, 0.0, share)


@triton.jit
def kept(l, threshold, share):
    """The fraction of each loss that belongs to the tail."""
    return tl.where(l > threshold, 1.0, tl.where(l == threshold, share, 0.0))


@triton.jit
def trim_top(l_ptr, p_ptr, n, trim, BLOCK: tl.constexpr):
    """Sets the top `trim` of nominal mass aside."""
    bottom, top = bounds(l_ptr, p_ptr, n, BLOCK)
    threshold, share = upper_tail(l_ptr, p_ptr, n, trim, bottom, top, BLOCK)
    left = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
        left += p * (1 - kept(l, threshold, share))
    total = tl.sum(left, 0)
    tl.debug_barrier()
    for first in range(0, n, BLOCK):
        o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
        tl.store(p_ptr + o, p * (1 - kept(l, threshold, share)) / total, mask=o < n)
    tl.debug_barrier()


# --------------------------------------------------------------------------- the smooth sets


@triton.jit
def write_tilted(d_ptr, p_ptr, q_ptr, n, s, log_z, BLOCK: tl.constexpr):
    """q = p exp(-s d - log_z)."""
    scale = tl.exp(-log_z)
    for first in range(0, n, BLOCK):
        o, d, p = read(d_ptr, p_ptr, first, n, BLOCK)
        tl.store(q_ptr + o, p * tl.exp(-s * d) * scale, mask=o < n)


@triton.jit
def solve_kl_radius(d_ptr, p_ptr, n, r, BLOCK: tl.constexpr):
    """KL(q||p) = r: Newton on sqrt(2 KL), nearly linear in the inverse temperature s.

    A bracket halves on a log scale whenever Newton leaves it. Returns s and the log normaliser.
    """
    target = tl.sqrt(2 * r)
    low, high = zero(), zero() + INFINITY
    # KL(s) <= s^2 / 8 on [0, 1] (Hoeffding), so this start is never past the solution.
    s, log_z = 2 * target, zero()
    step = 0
    going = step == 0
    while going & (step < MOST_STEPS):
        log_z, mean, variance = tilted_moments(d_ptr, p_ptr, n, s, BLOCK)
        # For tiny s the difference of the two terms has no digits left, its series has.
        kl = tl.where(s < 1e-7, 0.5 * s * s * variance, -s * mean - log_z)
        kl = tl.where(kl > 0, kl, 0.0)
        g = tl.sqrt(2 * kl)
        low = tl.where(kl < r, s, low)
        high = tl.where(kl < r, high, s)
        error = g - target
        noise = 1e-13 * r + 1e-15 * s * mean
        done = (tl.abs(kl - r) <= noise) | (high <= low * (1 + 1e-15))
        newton = s - error * g / (s * variance)
        ceiling = tl.where(high < INFINITY, high, 64 * s)
        between = tl.where(low > 0, tl.sqrt(low) * tl.sqrt(high), 0.5 * high)
        halved = tl.where(high < INFINITY, between, ceiling)
        following = tl.where((newton > low) & (newton < ceiling), newton, halved)
        s = tl.where(done, s, following)
        going = done == 0
        step += 1
    return s, log_z


@triton.jit
def active_root(m0, m1, m2, parameter, RADIUS: tl.constexpr):
    """eta for the moments of the set {d < eta}: of a chi-square ball, or of a penalty."""
    if RADIUS:
        mean, slack = m1 / m0, (1 + 2 * parameter) * m0 - 1
        variance = m2 / m0 - mean * mean
        spread = tl.sqrt(tl.where(variance > 0, variance, 0.0) / tl.where(slack > 0, slack, 1.0))
        # Without slack the set is too small for the radius: eta must grow.
        eta = tl.where(slack > 0, mean + spread, INFINITY)
    else:
        eta = (m1 + parameter) / m0
    return eta


@triton.jit
def solve_active_set(d_ptr, p_ptr, n, start, parameter, RADIUS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """eta of q ~ p (eta - d)_+, from above, guarded by a bracket."""
    low, high, eta, count = zero(), start, start, zero() - 1
    step = 0
    going = step == 0
    while going & (step < MOST_STEPS):
        m0, m1, m2, found = powers(d_ptr, p_ptr, n, eta, BLOCK)
        candidate = active_root(m0, m1, m2, parameter, RADIUS)
        # Sets {d < eta} are nested: the same count is the same set, whose root is already eta.
        done = (found == count) | (candidate == eta)
        low = tl.where(candidate < eta, low, eta)
        high = tl.where(candidate < eta, eta, high)
        inside = (candidate > low) & (candidate <= high)
        count = tl.where(inside, found, -1.0)
        following = tl.where(inside, candidate, 0.5 * (low + high))
        eta = tl.where(done, eta, following)
        going = (done == 0) & (low < high)
        step += 1
    return eta


@triton.jit
def write_linear(d_ptr, p_ptr, q_ptr, n, eta, BLOCK: tl.constexpr):
    """q = p (eta - d)_+, normalised."""
    mass = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        o, d, p = read(d_ptr, p_ptr, first, n, BLOCK)
        mass += tl.where(d < eta, p * (eta - d), 0.0)
    total = tl.sum(mass, 0)
    for first in range(0, n, BLOCK):
        o, d, p = read(d_ptr, p_ptr, first, n, BLOCK)
        tl.store(q_ptr + o, tl.where(d < eta, p * ((eta - d) / total), 0.0), mask=o < n)


@triton.jit
def solve_cvar_temperature(l_ptr, p_ptr, d_ptr, q_ptr, n, alpha, t, bottom, top,
                           BLOCK: tl.constexpr):  # fmt: skip
    """q = p min(y exp((l - v)/t), 1/alpha), any v, y > 0 such that q sums to 1; value and dual."""
    s = (top - bottom) / t
    s = tl.where(s < 1e300, s, 1e300)
    log_z, _, _ = tilted_moments(d_ptr, p_ptr, n, s, BLOCK)
    value = top + t * log_z
    dual = value
    if log_z >= tl.log(alpha):  # the cap binds nowhere
        write_tilted(d_ptr, p_ptr, q_ptr, n, s, log_z, BLOCK)
    else:
        # h = log(alpha y): the exponent (l - v)/t + h is cut at 0. From any y below the solution,
        # Newton on the concave sum climbs to it.
        v, h = top, tl.log(alpha) - log_z
        if s > 16:
            # From the uncapped y the climb would cap the losses level by level. The threshold of
            # the alpha-tail is close: anchored there, y lies in [rest / p(l <= v), 1 / alpha], and
            # what is free never underflows.
            v, _ = upper_tail(l_ptr, p_ptr, n, alpha, bottom, top, BLOCK)
            above, _, _ = look(l_ptr, p_ptr, n, v, BLOCK)
            rest = 1 - above / alpha
            h = tl.log(tl.where(rest > 1e-300, rest, 1e-300) / (1 - above) * alpha)
        step = 0
        going = step == 0
        while going & (step < MOST_STEPS):
            capped = tl.zeros([BLOCK], tl.float64)
            free = capped
            for first in range(0, n, BLOCK):
                o = first + tl.arange(0, BLOCK)
                z = (tl.load(l_ptr + o, mask=o < n, other=0.0) - v) / t + h
                p = tl.load(p_ptr + o, mask=o < n, other=0.0)
                capped += tl.where(z >= 0, p, 0.0)
                free += tl.where(z >= 0, 0.0, p * tl.exp(tl.where(z < 0, z, 0.0)))
            growth = (alpha - tl.sum(capped, 0)) / tl.sum(free, 0)
            going = growth > 1 + 1e-15
            h = tl.where(going, h + tl.log(tl.where(going, growth, 1.0)), h)
            step += 1
        # sum q (l - v - t log(q/p)): a constant where free, l - v + t log(alpha) where capped.
        of_free, of_capped = -t * (h - tl.log(alpha)), t * tl.log(alpha)
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, n, BLOCK):
            o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
            z = (l - v) / t + h
            q = p * tl.exp(tl.where(z < 0, z, 0.0)) / alpha
            total += q * tl.where(z < 0, of_free, l - v + of_capped)
            tl.store(q_ptr + o, q, mask=o < n)
        value, dual = v + tl.sum(total, 0), v + of_free
    return value, dual


# --------------------------------------------------------------------------- all together


@triton.jit
def write_nominal(p_ptr, q_ptr, n, BLOCK: tl.constexpr):
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        tl.store(q_ptr + o, tl.load(p_ptr + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def write_top(l_ptr, p_ptr, q_ptr, n, top, threshold, share, kept_mass, top_mass,
              BLOCK: tl.constexpr):  # fmt: skip
    """q = kept_mass p (fraction in the tail) + top_mass p / p(top) on the largest losses."""
    _, _, at_top = look(l_ptr, p_ptr, n, top, BLOCK)
    for first in range(0, n, BLOCK):
        o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
        at = tl.where(l == top, top_mass / at_top, 0.0)
        tl.store(q_ptr + o, p * (kept_mass * kept(l, threshold, share) + at), mask=o < n)


@triton.jit
def worst_case(scratch_ptr, n, a, b, trim, KIND: tl.constexpr, NOMINAL: tl.constexpr,
               TRIMS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Value and dual of a problem whose unmasked losses are finite; q in the scratch.

    NOMINAL: the parameters leave the adversary no choice but p.
    """
    l_ptr, p_ptr, d_ptr, q_ptr = (
        scratch_ptr, scratch_ptr + n, scratch_ptr + 2 * n, scratch_ptr + 3 * n
    )  # fmt: skip
    if TRIMS:
        trim_top(l_ptr, p_ptr, n, trim, BLOCK)
    bottom, top = bounds(l_ptr, p_ptr, n, BLOCK)
    span = tl.where(top > bottom, top - bottom, 1.0)
    # The optimistic side is measured from the smallest loss, everything else from the largest.
    anchor = top
    if KIND == "kl_temperature":
        anchor = tl.where(a < 0, bottom, top)
    for first in range(0, n, BLOCK):
        o, l, p = read(l_ptr, p_ptr, first, n, BLOCK)
        tl.store(d_ptr + o, tl.where(p > 0, tl.abs(l - anchor) / span, 0.0), mask=o < n)
    tl.debug_barrier()

    dual, penalty = zero(), zero()
    value = zero()
    if KIND == "erm" or NOMINAL:
        write_nominal(p_ptr, q_ptr, n, BLOCK)
        if KIND == "kl_radius":
            dual = dual + INFINITY
        elif KIND == "chi2_radius":
            dual = dual - INFINITY
        elif KIND != "erm":
            dual = bottom
    elif KIND == "kl_temperature":
        s = (top - bottom) / tl.abs(a)
        s = tl.where(s < 1e300, s, 1e300)
        log_z, _, _ = tilted_moments(d_ptr, p_ptr, n, s, BLOCK)
        write_tilted(d_ptr, p_ptr, q_ptr, n, s, log_z, BLOCK)
        value, dual = anchor + a * log_z, a
    elif KIND == "cvar_temperature":
        value, dual = solve_cvar_temperature(
            l_ptr, p_ptr, d_ptr, q_ptr, n, a, b, bottom, top, BLOCK
        )
    elif KIND == "kl_radius":
        _, _, at_top = look(l_ptr, p_ptr, n, top, BLOCK)
        if a >= -tl.log(at_top):  # the ball holds all mass on the largest losses
            write_top(l_ptr, p_ptr, q_ptr, n, top, top, zero(), zero(), zero() + 1, BLOCK)
        else:
            s, log_z = solve_kl_radius(d_ptr, p_ptr, n, a, BLOCK)
            write_tilted(d_ptr, p_ptr, q_ptr, n, s, log_z, BLOCK)
            dual = span / s
    elif KIND == "chi2_radius":
        _, _, at_top = look(l_ptr, p_ptr, n, top, BLOCK)
        dual = top
        if a >= (1 / at_top - 1) / 2:
            write_top(l_ptr, p_ptr, q_ptr, n, top, top, zero(), zero(), zero() + 1, BLOCK)
        else:
            m0, m1, m2, _ = powers(d_ptr, p_ptr, n, zero() + 2.0, BLOCK)
            start = active_root(zero() + 1, m1, m2, a, True)
            eta = solve_active_set(d_ptr, p_ptr, n, start, a, True, BLOCK)
            write_linear(d_ptr, p_ptr, q_ptr, n, eta, BLOCK)
            dual = top - span * eta
    elif KIND == "chi2_penalty":
        c = a / span
        m0, m1, m2, _ = powers(d_ptr, p_ptr, n, zero() + 2.0, BLOCK)
        eta = solve_active_set(d_ptr, p_ptr, n, m1 + c, c, False, BLOCK)
        write_linear(d_ptr, p_ptr, q_ptr, n, eta, BLOCK)
        dual = top - span * eta
        tl.debug_barrier()
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, n, BLOCK):
            o, p, q = read(p_ptr, q_ptr, first, n, BLOCK)
            excess = tl.where(p > 0, q / tl.where(p > 0, p, 1.0) - 1, 0.0)
            total += p * excess * excess
        penalty = 0.5 * a * tl.sum(total, 0)
    elif KIND == "tv":
        threshold, share = top, zero()
        if a < 1:
            threshold, share = upper_tail(l_ptr, p_ptr, n, 1 - a, bottom, top, BLOCK)
        write_top(l_ptr, p_ptr, q_ptr, n, top, threshold, share, zero() + 1, a, BLOCK)
        dual = threshold
    else:  # CVaR
        threshold, share = upper_tail(l_ptr, p_ptr, n, a, bottom, top, BLOCK)
        write_top(l_ptr, p_ptr, q_ptr, n, top, threshold, share, 1 / a, zero(), BLOCK)
        dual = threshold
    tl.debug_barrier()
    if (KIND != "kl_temperature" and KIND != "cvar_temperature") or NOMINAL:
        if top <= bottom:  # equal losses: no answer pays more than q = p
            write_nominal(p_ptr, q_ptr, n, BLOCK)
            penalty = zero()
            tl.debug_barrier()
        value = top - span * expected(q_ptr, d_ptr, n, BLOCK) - penalty
    return value, dual
