"""The kernels around the pass: forward, backward (three roles in one launch, or in one program), states of segments, z.

    B batch   T time   H key heads   HV value heads   K key width   V value width   N sequences
    W state columns: V, or V + 1 with the normaliser      G cumulative gates [B * HV, T] (gate_sums)

A sequence is cut into segments ("slots"), each walked by its own programs from the state in which it starts:

    LAYOUT 0  dense: B sequences of `cuts` segments of L tokens
    LAYOUT 1  packed, every sequence one segment: slot n is [cu[n], cu[n + 1])
    LAYOUT 2  packed, cut: table[slot] is the sequence n, whose slots begin at cu[n] // L + n. Some slots stay empty.

What works in blocks (docs/kernels) has blocks of one chunk. They are slots too, with L = C.

Program ids: output tile fastest, then head, then slot, all on grid axis x (the others end at 65,535). So the programs
that read the same tokens run together, and share them through L2.
"""

import triton
import triton.language as tl

from .walk import (
    decays,
    factors,
    operand,
    pair_decay,
    plus,
    product,
    rows,
    split,
    store_rows,
    walk,
    walk_safely,
    walk_states,
    walk_states_tokens,
    walk_tokens,
    weighted_rows,
)


@triton.jit
def offset(cu, n, T):
    """cu[n], held inside [0, T]."""
    return tl.minimum(tl.maximum(tl.load(cu + n).to(tl.int64), 0), T)


@triton.jit
def bounds(cu, n, T):
    """First token and end of a packed sequence."""
    begin = offset(cu, n, T)
    return begin, tl.maximum(offset(cu, n + 1, T), begin)


@triton.jit
def segment(slot, cu, table, T, cuts, L, LAYOUT: tl.constexpr):
    """Sequence and batch row of a slot, or of several; its first token and end, and those of the sequence."""
    if LAYOUT == 0:
        begin = slot * 0
        t0 = slot % cuts * L
        return slot // cuts, slot // cuts, t0, tl.minimum(t0 + L, T), begin, begin + T
    n = slot if LAYOUT == 1 else tl.load(table + slot).to(tl.int64)
    begin, end = bounds(cu, n, T)
    if LAYOUT == 1:
        return n, slot * 0, begin, end, begin, end
    number = slot - begin // L - n  # of the segment; negative in slots before the first sequence
    t0 = tl.where(number < 0, end, tl.minimum(begin + number * L, end))
    return n, slot * 0, t0, tl.minimum(t0 + L, end), begin, end


@triton.jit
def outside(u, i, cu, T, N):
    """Tokens of no sequence, counted by u + i: those before the first offset, then those past the last."""
    begin = tl.minimum(tl.maximum(tl.load(cu).to(tl.int64), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu + N).to(tl.int64), begin), T)
    t = u + i
    return tl.where(t < begin, t, t - begin + end)


@triton.jit
def count_outside(cu, T, N):
    """How many there are."""
    begin = tl.minimum(tl.maximum(tl.load(cu).to(tl.int64), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu + N).to(tl.int64), begin), T)
    return begin + T - end


@triton.jit
def zero_outside(out, out_t, cu, T, N, slot, slots, n0, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of no sequence get zeros. All slots share that work; each clears the columns of its own tile."""
    n = n0 + tl.arange(0, BLOCK)
    i = tl.arange(0, 16)
    total = count_outside(cu, T, N)
    for u in range(slot * 16, total, slots * 16):
        t = outside(u, i, cu, T, N)
        mask = (u + i < total)[:, None] & (n < WIDTH)[None, :]
        tl.store(out + t[:, None] * out_t + n[None, :], tl.zeros([16, BLOCK], out.dtype.element_ty), mask=mask)


@triton.jit
def state_tile(p, m, n, p_m, p_n, M: tl.constexpr, N: tl.constexpr):
    """Pointers and mask of a tile of a state."""
    p = p + m.to(tl.int64)[:, None] * p_m + n.to(tl.int64)[None, :] * p_n
    return p, (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def load_state(
    p, used, m, n, p_m, p_n, M: tl.constexpr, N: tl.constexpr, HAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FLOAT: tl.constexpr = True,
):  # fmt: skip
    if HAS:
        p, mask = state_tile(p, m, n, p_m, p_n, M, N)
        S = tl.load(p, mask=mask & used, other=0.0)
        if FLOAT:
            S = S.to(tl.float32)
    else:
        S = tl.zeros([BM, BN], tl.float32)
    return S


@triton.jit
def load_z(p, used, k, p_k, K: tl.constexpr, HAS: tl.constexpr, BK: tl.constexpr):
    if HAS:
        return tl.load(p + k.to(tl.int64) * p_k, mask=(k < K) & used, other=0.0).to(tl.float32)
    return tl.zeros([BK], tl.float32)


@triton.jit
def head_gate(gamma, h, GATE: tl.constexpr):
    """log2-decay of a head. Decays below exp(-128) are 0 in float32 anyway; the clamp keeps -inf out of differences."""
    if GATE == 2:
        g = tl.load(gamma + h).to(tl.float32)
        return tl.where(g < -128.0, -128.0, g) * 1.4426950408889634
    return 0.0


@triton.jit
def owed(G, gamma2, t0, t1, begin, end, GATE: tl.constexpr, REVERSE: tl.constexpr):
    """log2-decay of the first token of a slot, in the operator's order, and of the token after its last."""
    if GATE == 2:
        return gamma2, tl.where(t0 > begin if REVERSE else t1 < end, gamma2, 0.0)
    if GATE == 0:
        return 0.0, 0.0
    if REVERSE:
        first = tl.load(G + t1 - 1, mask=t0 < t1, other=0.0)
        return first.to(tl.float32), tl.load(G + t0 - 1, mask=t0 > begin, other=0.0).to(tl.float32)
    first = tl.load(G + t0, mask=t0 < t1, other=0.0)
    return first.to(tl.float32), tl.load(G + t1, mask=t1 < end, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "N", "cuts", "L", "slots"])
def forward(
    q,  # [B, T, H, K]
    q_b, q_t, q_h,
    k,  # [B, T, H, K]
    k_b, k_t, k_h,
    v,  # [B, T, HV, V]
    v_b, v_t, v_h,
    o,  # [B, T, HV, V] out, contiguous
    G,  # [B * HV, T]
    gamma,  # [HV]
    S0,  # [slots, HV, K, W] states in which the slots start
    s_n, s_h, s_k, s_v,
    S1,  # [slots, HV, K, W] out, contiguous
    cu,  # [N + 1]
    table,  # [slots] the sequence of each
    T, N, H, HV, cuts, L, slots, scale,
    EPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_S0: tl.constexpr, HAS_S1: tl.constexpr,
    LAYOUT: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (V + BN - 1) // BN
    W: tl.constexpr = V + NORMALIZE
    pid = tl.program_id(0)
    n0 = pid % TILES * BN
    h = (pid // TILES % HV).to(tl.int64)
    slot = (pid // TILES // HV).to(tl.int64)
    _, batch, t0, t1, _, _ = segment(slot, cu, table, T, cuts, L, LAYOUT)
    used = t0 < t1 if LAYOUT == 2 else True  # slots of the table that no segment took have no state
    m = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    S0 += slot * s_n + h * s_h
    S = load_state(S0, used, m, n, s_k, s_v, K, V, HAS_S0, BK, BN)
    z = load_z(S0 + V * tl.cast(s_v, tl.int64), used, m, s_k, K, HAS_S0 and NORMALIZE, BK)
    hk = h // (HV // H)
    o += (batch * T * HV + h) * V
    if isinstance(q, tl.core.tensor_descriptor_base):  # all three are: `rows` takes the place of the head with each
        place = (batch if LAYOUT == 0 else t1).to(tl.int32)
        q_t = (place, hk.to(tl.int32))
        k_t = q_t
        v_t = (place, h.to(tl.int32))
    else:
        q += batch * q_b + hk * q_h
        k += batch * k_b + hk * k_h
        v += batch * v_b + h * v_h
    go: tl.constexpr = walk_tokens if TOKENS else walk_safely
    S, z = go(
        q, q_t, k, k_t, v, v_t, o, HV * V, q, q_t, o, o, G + (batch * HV + h) * T, head_gate(gamma, h, GATE), o, o,
        S, z, 0.0, t0, t1, n0, scale, EPS, K, V, BK, BN, C, 0, GATE, REVERSE, NORMALIZE, False, True, PRECISION,
    )  # fmt: skip
    if HAS_S1:
        S1 += (slot * HV + h) * K * W
        p, mask = state_tile(S1, m, n, W, 1, K, V)
        tl.store(p, S, mask=mask)
        if NORMALIZE:
            tl.store(S1 + m * W + V, z, mask=(m < K) & (n0 == 0))
    if LAYOUT != 0:
        zero_outside(o, HV * V, cu, T, N, slot, slots, n0, V, BN)


@triton.jit(do_not_specialize=["T", "cuts", "L"])
def local_state(
    k,  # [B, T, H, K]  (MIRROR: q)
    k_b, k_t, k_h,
    v,  # [B, T, HV, V]  (MIRROR: do)
    v_b, v_t, v_h,
    G, gamma, rden, dden,
    states,  # [slots, HV, K, W] out: what each segment adds to the state
    decay,  # [slots, HV] out: log2-decay of each segment; mirrored states owe that of a first token, not of their own
    cu, table, T, H, HV, cuts, L,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, MIRROR: tl.constexpr, NORMALIZE: tl.constexpr, LAST: tl.constexpr,
    LAYOUT: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state. Without LAST, not that on which nothing follows: no one asks for it."""
    DUE: tl.constexpr = MIRROR and GATE != 0 and not TOKENS
    TILES: tl.constexpr = (V + BN - 1) // BN
    W: tl.constexpr = V + NORMALIZE
    pid = tl.program_id(0)
    n0 = pid % TILES * BN
    h = (pid // TILES % HV).to(tl.int64)
    slot = (pid // TILES // HV).to(tl.int64)
    _, batch, t0, t1, begin, end = segment(slot, cu, table, T, cuts, L, LAYOUT)
    if t0 >= t1:
        return
    if not LAST and (t0 == begin if REVERSE != MIRROR else t1 == end):
        return
    m = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    row = (batch * HV + h) * T
    hk = h // (HV // H)
    k += batch * k_b + hk * k_h
    v += batch * v_b + h * v_h
    S, z = tl.zeros([BK, BN], tl.float32), tl.zeros([BK], tl.float32)
    go: tl.constexpr = walk_states_tokens if TOKENS else walk_states
    S, z, _ = go(
        k, k_t, v, v_t, G + row, head_gate(gamma, h, GATE), rden + row, dden + row, S, z, 0.0, states, states, 0, 0,
        t0, t1, n0, K, V, BK, BN, C, MIRROR, GATE, REVERSE, NORMALIZE, False, PRECISION,
    )  # fmt: skip
    states += (slot * HV + h) * K * W
    p, mask = state_tile(states, m, n, W, 1, K, V)
    tl.store(p, S, mask=mask)
    if NORMALIZE:
        tl.store(states + m * W + V, z, mask=(m < K) & (n0 == 0))
    if GATE != 0 and pid % TILES == 0:
        if GATE == 2:
            total = head_gate(gamma, h, GATE) * (t1 - t0)
        else:
            total = 0.0
            STEP: tl.constexpr = 1 if TOKENS else C  # token by token, G holds the gates themselves
            for t in range(t0, t1, STEP):
                total += tl.load(G + row + (t if REVERSE else tl.minimum(t + STEP, t1) - 1)).to(tl.float32)
        if DUE:
            own, due = owed(G + row, head_gate(gamma, h, GATE), t0, t1, begin, end, GATE, REVERSE)
            total += due - own
        tl.store(decay + slot * HV + h, total)


@triton.jit(do_not_specialize=["T", "cuts", "L", "blocks", "first", "size", "z_size", "d_scale"])
def boundaries(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    v, v_b, v_t, v_h,
    do, do_b, do_t, do_h,
    G, gamma, rden, dden,
    S0, s_n, s_h, s_k, s_v,  # [slots, HV, K, W] states in which the slots start
    dS1, d_n, d_h, d_k, d_v,  # [slots, HV, K, W] their gradients where the slots end
    d_scale,  # brings dS1 to the form divided by the scale
    dS0,  # [slots, HV, K, W] out, contiguous
    scale,
    kept,  # [2, blocks, HV, K, V] out: states in which the blocks start, then their gradients where the blocks end
    kept_z,  # [2, blocks, HV, K] out, float32: those of the normaliser
    size, z_size,  # elements of one half of them
    cu, table, T, H, HV, cuts, L, blocks,
    first,  # direction: 0 states, 1 their gradients
    DIRECTIONS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_S0: tl.constexpr, HAS_DS1: tl.constexpr,
    HAS_DS0: tl.constexpr, LAYOUT: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks the slots and keeps the state before every block of C tokens; and the same for its gradient."""
    TILES: tl.constexpr = (V + BN - 1) // BN
    W: tl.constexpr = V + NORMALIZE
    pid = tl.program_id(0)
    n0 = pid % TILES * BN
    h = (pid // TILES % HV).to(tl.int64)
    direction = pid // TILES // HV % DIRECTIONS + first
    slot = (pid // TILES // HV // DIRECTIONS).to(tl.int64)
    sequence, batch, t0, t1, begin, end = segment(slot, cu, table, T, cuts, L, LAYOUT)
    used = t0 < t1 if LAYOUT == 2 else True
    m = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    row = (batch * HV + h) * T
    hk = h // (HV // H)
    gamma2 = head_gate(gamma, h, GATE)
    at = begin // C + sequence if LAYOUT != 0 else sequence * blocks
    at += (t0 - begin) // C
    kept += (at * HV + h) * K * V
    kept_z += (at * HV + h) * K
    go: tl.constexpr = walk_states_tokens if TOKENS else walk_states
    if direction == 0:
        S0 += slot * s_n + h * s_h
        S = load_state(S0, used, m, n, s_k, s_v, K, V, HAS_S0, BK, BN)
        z = load_z(S0 + V * tl.cast(s_v, tl.int64), used, m, s_k, K, HAS_S0 and NORMALIZE, BK)
        S, z, _ = go(
            k + batch * k_b + hk * k_h, k_t, v + batch * v_b + h * v_h, v_t, G + row, gamma2, rden, dden, S, z, 0.0,
            kept, kept_z, HV * K * V, HV * K, t0, t1, n0,
            K, V, BK, BN, C, False, GATE, REVERSE, NORMALIZE, True, PRECISION,
        )  # fmt: skip
    else:
        dS1 += slot * d_n + h * d_h
        dS = load_state(dS1, used, m, n, d_k, d_v, K, V, HAS_DS1, BK, BN) * d_scale
        dz = load_z(dS1 + V * tl.cast(d_v, tl.int64), used, m, d_k, K, HAS_DS1 and NORMALIZE, BK) * d_scale
        due = 0.0
        if GATE != 0 and not TOKENS:
            _, due = owed(G + row, gamma2, t0, t1, begin, end, GATE, REVERSE)
        dS, dz, due = go(
            q + batch * q_b + hk * q_h, q_t, do + batch * do_b + h * do_h, do_t, G + row, gamma2, rden + row,
            dden + row, dS, dz, due, kept + size, kept_z + z_size, HV * K * V, HV * K, t0, t1, n0,
            K, V, BK, BN, C, True, GATE, REVERSE, NORMALIZE, True, PRECISION,
        )  # fmt: skip
        if HAS_DS0:
            dS0 += (slot * HV + h) * K * W
            p, mask = state_tile(dS0, m, n, W, 1, K, V)
            factor = scale * tl.exp2(due)
            tl.store(p, dS * factor, mask=mask)
            if NORMALIZE:
                tl.store(dS0 + m * W + V, dz * factor, mask=(m < K) & (n0 == 0))


@triton.jit(do_not_specialize=["T", "cuts", "L", "blocks"])
def key_sums(
    k, k_b, k_t, k_h,
    G, gamma,
    S0, s_n, s_h, s_k, s_v,  # [slots, HV, K, W] states in which the slots start
    kept_z,  # [blocks, HV, K] out
    cu, table, T, H, HV, cuts, L, blocks,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    HAS_S0: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z where every block of C tokens starts, and no state: what the denominators of a walking backward need."""
    TILES: tl.constexpr = (K + BM - 1) // BM
    pid = tl.program_id(0)
    m0 = pid % TILES * BM
    h = (pid // TILES % HV).to(tl.int64)
    slot = (pid // TILES // HV).to(tl.int64)
    sequence, batch, t0, t1, begin, _ = segment(slot, cu, table, T, cuts, L, LAYOUT)
    m = m0 + tl.arange(0, BM)
    z = load_z(S0 + slot * s_n + h * s_h + V * tl.cast(s_v, tl.int64), t0 < t1, m, s_k, K, HAS_S0, BM)
    k += batch * k_b + h // (HV // H) * k_h
    G += (batch * HV + h) * T
    gamma2 = head_gate(gamma, h, GATE)
    at = begin // C + sequence if LAYOUT != 0 else sequence * blocks
    kept_z += ((at + (t0 - begin) // C) * HV + h) * K
    i = tl.arange(0, C)
    chunks = tl.cdiv((t1 - t0).to(tl.int32), C)
    for step in range(0, chunks):
        place = chunks - 1 - step if REVERSE else step
        t = t0 + place * C
        count = tl.minimum(t1 - t, C).to(tl.int32)
        live = i < count
        xk = operand(rows(k, k_t, t, i, live, m0, K, BM), k.dtype.element_ty, PRECISION)
        tl.store(kept_z + tl.cast(place, tl.int64) * HV * K + m, z, mask=m < K)
        weight = tl.full([C], 1.0, tl.float32)
        if GATE != 0:
            R, head, end = decays(G, gamma2, t, i, live, count, GATE, REVERSE)
            weight, _D, gain, _due = factors(R, head, end, 0.0, False)
            z = z * gain
        z += weighted_rows(xk, weight, k.dtype.element_ty, PRECISION)


@triton.jit(do_not_specialize=["T", "cuts"])
def normaliser(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    o,  # [B, T, HV, V] contiguous
    do,  # [B, T, HV, V]
    do_b, do_t, do_h,
    G, gamma,
    z,  # [blocks, HV, K]
    rden,  # [B * HV, T] out: 1 / (s q.z + eps)
    dden,  # [B * HV, T] out: -(do . o) rden
    cu, table, T, H, HV, cuts, scale,
    EPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, LAYOUT: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The denominator again, for the backward, block by block: z is a sum of k, so no further product is needed."""
    pid = tl.program_id(0)
    h = (pid % HV).to(tl.int64)
    slot = (pid // HV).to(tl.int64)
    _, batch, t0, t1, _, _ = segment(slot, cu, table, T, cuts, C, LAYOUT)
    if t0 >= t1:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BK)
    z += (slot * HV + h) * K
    xz = tl.load(z + m, mask=m < K, other=0.0)
    gamma2 = head_gate(gamma, h, GATE)
    hk = h // (HV // H)
    q += batch * q_b + hk * q_h
    k += batch * k_b + hk * k_h
    do += batch * do_b + h * do_h
    o += (batch * T * HV + h) * V
    row = (batch * HV + h) * T
    G += row
    count = (t1 - t0).to(tl.int32)
    live = i < count
    dot = rows(o, HV * V, t0, i, live, 0, V, BV).to(tl.float32) * rows(do, do_t, t0, i, live, 0, V, BV).to(tl.float32)
    top = -tl.sum(dot, 1)
    if TOKENS:
        for step in range(0, count):
            j = count - 1 - step if REVERSE else step
            xk = tl.load(k + (t0 + j) * k_t + m, mask=m < K, other=0.0).to(tl.float32)
            xq = tl.load(q + (t0 + j) * q_t + m, mask=m < K, other=0.0).to(tl.float32)
            if GATE != 0:
                factor = tl.exp2(tl.load(G + t0 + j) if GATE == 1 else gamma2.to(tl.float64))
                gain = factor.to(tl.float32)
                xz = xz * gain + xz * (factor - gain).to(tl.float32)
            xz += xk
            r = 1.0 / (scale * tl.sum(xq * xz, 0) + EPS)
            tl.store(rden + row + t0 + j, r)
            tl.store(dden + row + t0 + j, r * tl.sum(tl.where(i == j, top, 0.0), 0))
    else:
        xq = operand(rows(q, q_t, t0, i, live, 0, K, BK), q.dtype.element_ty, PRECISION)
        xk = operand(rows(k, k_t, t0, i, live, 0, K, BK), k.dtype.element_ty, PRECISION)
        P = tl.dot(xq, tl.trans(xk), input_precision=PRECISION)
        qz = tl.sum(xq.to(tl.float32) * xz[None, :], 1)
        if GATE != 0:
            R, _, _ = decays(G, gamma2, t0, i, live, count, GATE, REVERSE)
            P = pair_decay(P, R, gamma2, i, GATE, False)
            qz = qz * tl.exp2(R.to(tl.float32))
        P = tl.where(i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :], P, 0.0)
        r = 1.0 / (scale * (tl.sum(P, 1) + qz) + EPS)
        tl.store(rden + row + t0 + i, r, mask=live)
        tl.store(dden + row + t0 + i, r * top, mask=live)


@triton.jit
def inner(p, other, m, n, p_m, p_n, M: tl.constexpr, N: tl.constexpr):
    """<S, dS> over a tile, of which S is read here (again: to hold it would take the registers of other things)."""
    offsets = m.to(tl.int64)[:, None] * p_m + n.to(tl.int64)[None, :] * p_n
    mask = (m < M)[:, None] & (n < N)[None, :]
    x = tl.load(p + offsets, mask=mask, other=0.0).to(tl.float32) * other.to(tl.float32)
    return tl.sum(tl.sum(x, 0), 0)


@triton.jit
def together(
    q, q_t, k, k_t, v, v_t, do, do_t, dq, dk, dk_t, dv, dv_t, G, gamma2, rden, dden, rho, rho_size, across,
    S0, s_k, s_v, dS1, d_k, d_v, z, dz, due, t0, t1, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, RHO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one block in one program, by the formulas of `walk`: tensors and states are read once.

    What a pair of tokens adds to dg is W_ij (do_i v_j) (q_i k_j), of which both factors are at hand here.
    """
    DTYPE: tl.constexpr = k.dtype.element_ty
    TWICE: tl.constexpr = NORMALIZE and PRECISION != "ieee"
    i = tl.arange(0, C)
    count = (t1 - t0).to(tl.int32)
    live = i < count
    m, n = tl.arange(0, BK), tl.arange(0, BV)
    S = load_state(S0, True, m, n, s_k, s_v, K, V, True, BK, BV, False)
    zs, dzs = load_z(z, True, m, 1, K, NORMALIZE, BK), load_z(dz, True, m, 1, K, NORMALIZE, BK)
    xdo = operand(rows(do, do_t, t0, i, live, 0, V, BV), DTYPE, PRECISION)
    xv = operand(rows(v, v_t, t0, i, live, 0, V, BV), DTYPE, PRECISION)
    xk = operand(rows(k, k_t, t0, i, live, 0, K, BK), DTYPE, PRECISION)
    xq = operand(rows(q, q_t, t0, i, live, 0, K, BK), DTYPE, PRECISION)
    if GATE != 0:
        R, _, end = decays(G, gamma2, t0, i, live, count, GATE, REVERSE, True)
    if NORMALIZE:
        w = tl.load(rden + t0 + i, mask=live, other=0.0)
        dd = tl.load(dden + t0 + i, mask=live, other=0.0)

    P = tl.dot(xdo, tl.trans(xv), input_precision=PRECISION)
    if NORMALIZE:
        P = P * w[:, None] + dd[:, None]
    if GATE != 0:
        P = pair_decay(P, R, gamma2, i, GATE, False)
    P = tl.where(i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :], P, 0.0)
    high, low, factor = split(P, TWICE, DTYPE, PRECISION)
    y = product(xdo, tl.trans(S), TWICE, DTYPE, PRECISION)
    if NORMALIZE:
        y = y * w[:, None] + dd[:, None] * zs[None, :]
    if GATE != 0:
        y = y * tl.exp2(R.to(tl.float32))[:, None]
    if RHO:
        read = tl.sum(xq.to(tl.float32) * y, 1)
    y = tl.dot(high, xk, y, input_precision=PRECISION)
    if TWICE:
        y = plus(low, xk, factor, y, DTYPE, PRECISION)
    store_rows(dq, dk_t, t0, i, live, m, scale * y, K, BK)

    dS = load_state(dS1, True, m, n, d_k, d_v, K, V, True, BK, BV, False)
    if RHO:
        e = inner(S0, dS, m, n, s_k, s_v, K, V)
        if NORMALIZE:
            e += tl.sum(zs * dzs, 0)
        total = due + tl.zeros([], tl.float32)
        if GATE != 0:
            total += end.to(tl.float32)
        tl.store(across, scale * e * tl.exp2(total))
    P = tl.dot(xv, tl.trans(xdo), input_precision=PRECISION)
    if NORMALIZE:
        P = P * w[None, :] + dd[None, :]
    A = tl.dot(xk, tl.trans(xq), input_precision=PRECISION)
    keep = i[:, None] >= i[None, :] if REVERSE else i[:, None] <= i[None, :]
    if GATE != 0:
        P = pair_decay(P, R, gamma2, i, GATE, True)
    P = tl.where(keep, P, 0.0)
    if RHO:
        M = tl.where(i[:, None] == i[None, :], 0.0, P * A)
        tl.store(rho + t0 + i, scale * (read + tl.sum(M, 0)), mask=live)
        tl.store(rho + rho_size + t0 + i, scale * tl.sum(M, 1), mask=live)
    high, low, factor = split(P, TWICE, DTYPE, PRECISION)
    if NORMALIZE:
        A = A * w[None, :]
    if GATE != 0:
        A = pair_decay(A, R, gamma2, i, GATE, True)
        late = tl.exp2((end - R).to(tl.float32) + due)
    A = operand(tl.where(keep, A, 0.0), DTYPE, PRECISION)
    y = product(xv, tl.trans(dS), TWICE, DTYPE, PRECISION)
    if NORMALIZE:
        y += dzs[None, :]
    if GATE != 0:
        y = y * late[:, None]
    if RHO:
        tl.store(rho + 2 * rho_size + t0 + i, scale * tl.sum(xk.to(tl.float32) * y, 1), mask=live)
    y = tl.dot(high, xq, y, input_precision=PRECISION)
    if TWICE:
        y = plus(low, xq, factor, y, DTYPE, PRECISION)
    store_rows(dk, dk_t, t0, i, live, m, scale * y, K, BK)

    y = tl.dot(xk, operand(dS, DTYPE, PRECISION), input_precision=PRECISION)
    if GATE != 0:
        y = y * late[:, None]
    y = tl.dot(A, xdo, y, input_precision=PRECISION)
    store_rows(dv, dv_t, t0, i, live, n, scale * y, V, BV)


@triton.jit(do_not_specialize=["T", "N", "cuts", "L", "slots", "heads", "d_scale"])
def backward(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    v, v_b, v_t, v_h,
    do,  # [B, T, HV, V]
    do_b, do_t, do_h,
    q_n, k_n, do_n,  # q, k and do again; where they are descriptors, of tiles of BN columns
    dq,  # [B, T, HV, K] out, contiguous, one per value head
    dk,  # [B, T, HV, K] out
    dv,  # [B, T, HV, V] out
    G, gamma, rden, dden,
    rho,  # [3, TILES, B * HV, T] out: q.dq and the two parts of k.dk, for each tile of K columns
    across,  # [slots, HV, TV] out: <S where the block starts, dS where it ends>, with the decay between
    S0, s_n, s_h, s_k, s_v,  # [slots, HV, K, W] states in which the slots start
    dS1, d_n, d_h, d_k, d_v,  # [slots, HV, K, W] their gradients where the slots end
    z, dz,  # [slots, HV, K] those of the normaliser, with BLOCKS; otherwise they are the last columns of the states
    dS0,  # [slots, HV, K, W] out, contiguous; not with BLOCKS
    cu, table, T, N, H, HV, cuts, L, slots, heads, scale, d_scale,
    EPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, RHO: tl.constexpr,
    HAS_S0: tl.constexpr, HAS_DS1: tl.constexpr, HAS_DS0: tl.constexpr, LAYOUT: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile 0 .. TK of dq, then of dk, then of dv. dS is held divided by the scale: d_scale brings dS1 to that form.

    BLOCKS: the slots are blocks of C tokens, and `boundaries` has left the states between them; where one tile holds
    all columns, one program does all three (`together`). Otherwise the slots are long segments, walked chunk by chunk;
    then there is no RHO.
    """
    TK: tl.constexpr = (K + BN - 1) // BN
    TV: tl.constexpr = (V + BN - 1) // BN
    W: tl.constexpr = V + NORMALIZE
    TOGETHER: tl.constexpr = BLOCKS and not TOKENS and TK == 1 and TV == 1
    TILES: tl.constexpr = 1 if TOGETHER else 2 * TK + TV
    MOVES: tl.constexpr = not BLOCKS
    pid = tl.program_id(0)
    tile = pid % TILES
    h = (pid // TILES % HV).to(tl.int64)
    slot = (pid // TILES // HV).to(tl.int64)
    n0 = (tile % TK if tile < 2 * TK else tile - 2 * TK) * BN
    if TOGETHER and LAYOUT != 0:
        zero_outside(dq + h * K, HV * K, cu, T, N, slot, slots, n0, K, BK)
        zero_outside(dk + h * K, HV * K, cu, T, N, slot, slots, n0, K, BK)
        zero_outside(dv + h * V, HV * V, cu, T, N, slot, slots, n0, V, BV)
    elif LAYOUT != 0:
        if tile < TK:
            zero_outside(dq + h * K, HV * K, cu, T, N, slot, slots, n0, K, BN)
        elif tile < 2 * TK:
            zero_outside(dk + h * K, HV * K, cu, T, N, slot, slots, n0, K, BN)
        else:
            zero_outside(dv + h * V, HV * V, cu, T, N, slot, slots, n0, V, BN)
    _, batch, t0, t1, begin, end = segment(slot, cu, table, T, cuts, L, LAYOUT)
    used = t0 < t1 if LAYOUT == 2 else True
    if BLOCKS and t0 >= t1:
        return
    hk = h // (HV // H)
    if isinstance(q, tl.core.tensor_descriptor_base):
        place = (batch if LAYOUT == 0 else t1).to(tl.int32)
        q_t = (place, hk.to(tl.int32))
        k_t = q_t
        v_t = (place, h.to(tl.int32))
        do_t = v_t
    else:
        q += batch * q_b + hk * q_h
        k += batch * k_b + hk * k_h
        v += batch * v_b + h * v_h
        do += batch * do_b + h * do_h
        q_n, k_n, do_n = q, k, do
    head = batch * HV + h
    dq += (batch * T * HV + h) * K
    dk += (batch * T * HV + h) * K
    dv += (batch * T * HV + h) * V
    G += head * T
    rden += head * T
    dden += head * T
    gamma2 = head_gate(gamma, h, GATE)
    due = 0.0  # what the mirrored state at the end of the slot owes
    if GATE != 0 and not TOKENS:
        _, due = owed(G, gamma2, t0, t1, begin, end, GATE, REVERSE)
    go: tl.constexpr = walk_tokens if TOKENS else walk
    S0 += slot * s_n + h * s_h
    dS1 += slot * d_n + h * d_h
    HAS_Z: tl.constexpr = NORMALIZE and (BLOCKS or HAS_S0)
    HAS_DZ: tl.constexpr = NORMALIZE and (BLOCKS or HAS_DS1)
    if BLOCKS:
        z += (slot * HV + h) * K
        dz += (slot * HV + h) * K
        z_k, dz_k = 1, 1
    else:
        z = S0 + V * tl.cast(s_v, tl.int64)
        dz = dS1 + V * tl.cast(d_v, tl.int64)
        z_k, dz_k = s_k, d_k
    if TOGETHER:
        together(
            q, q_t, k, k_t, v, v_t, do, do_t, dq, dk, HV * K, dv, HV * V, G, gamma2, rden, dden, rho + head * T,
            heads.to(tl.int64) * T, across + slot * HV + h, S0, s_k, s_v, dS1, d_k, d_v, z, dz, due, t0, t1, scale,
            K, V, BK, BV, C, GATE, REVERSE, NORMALIZE, RHO, PRECISION,
        )  # fmt: skip
    else:  # three `if`s in a row: Triton gives branches of a nested one shared memory side by side
        m, n = tl.arange(0, BV), n0 + tl.arange(0, BN)
        mv = tl.arange(0, BK)
        if tile < TK:
            rq = rho + (tile.to(tl.int64) * heads + head) * T
            S = load_state(S0, used, m, n, s_v, s_k, V, K, HAS_S0, BV, BN, MOVES)
            go(
                do, do_t, v, v_t, k_n, k_t, dq, HV * K, q_n, q_t, rq, rq, G, gamma2, rden, dden,
                S, load_z(z, used, n, z_k, K, HAS_Z, BN), 0.0, t0, t1, n0,
                scale, EPS, V, K, BV, BN, C, 1, GATE, REVERSE, NORMALIZE, RHO, MOVES, PRECISION,
            )  # fmt: skip
        if tile >= TK and tile < 2 * TK:
            rk = rho + (tile.to(tl.int64) * heads + head) * T
            dS = load_state(dS1, used, m, n, d_v, d_k, V, K, HAS_DS1, BV, BN, MOVES)
            dzs = load_z(dz, used, n, dz_k, K, HAS_DZ, BN)
            if MOVES:
                dS = dS * d_scale
                dzs = dzs * d_scale
            _dS, dzs = go(
                v, v_t, do, do_t, q_n, q_t, dk, HV * K, k_n, k_t, rk, rk + TK * heads.to(tl.int64) * T,
                G, gamma2, rden, dden, dS, dzs, due, t0, t1, n0,
                scale, EPS, V, K, BV, BN, C, 3, GATE, REVERSE, NORMALIZE, RHO, MOVES, PRECISION,
            )  # fmt: skip
            if HAS_DS0 and NORMALIZE:
                tl.store(dS0 + (slot * HV + h) * K * W + n * W + V, dzs * scale, mask=n < K)
        if tile >= 2 * TK:
            dSv = load_state(dS1, used, mv, n, d_k, d_v, K, V, HAS_DS1, BK, BN, MOVES)
            if MOVES:
                dSv = dSv * d_scale
            Sv, _zv = go(
                k, k_t, q, q_t, do_n, do_t, dv, HV * V, v, v_t, rho, rho, G, gamma2, rden, dden, dSv,
                tl.zeros([BK], tl.float32), due, t0, t1, n0,
                scale, EPS, K, V, BK, BN, C, 2, GATE, REVERSE, NORMALIZE, False, MOVES, PRECISION,
            )  # fmt: skip
            if RHO:
                dSb = load_state(dS1, True, mv, n, d_k, d_v, K, V, True, BK, BN, False)  # not kept through the walk
                e = inner(S0, dSb, mv, n, s_k, s_v, K, V)
                if NORMALIZE and tile == 2 * TK:
                    e += tl.sum(load_z(z, True, mv, 1, K, True, BK) * load_z(dz, True, mv, 1, K, True, BK), 0)
                if GATE == 2:
                    total = gamma2 * (t1 - t0).to(tl.float32)
                elif TOKENS:
                    i = tl.arange(0, C)
                    total = tl.sum(tl.load(G + t0 + i, mask=i < t1 - t0, other=0.0), 0).to(tl.float32)
                else:
                    total = tl.load(G + (t0 if REVERSE else t1 - 1)).to(tl.float32)
                tl.store(across + (slot * HV + h) * TV + tile - 2 * TK, scale * e * tl.exp2(total + due))
            if HAS_DS0:
                p, mask = state_tile(dS0 + (slot * HV + h) * K * W, mv, n, W, 1, K, V)
                tl.store(p, Sv * scale, mask=mask)
