"""The kernels around the pass: forward, backward (three roles in one launch), states of segments, the normaliser.

    B batch   T time   H key heads   HV value heads   K key width   V value width   N sequences
    W state columns: V, or V + 1 with the normaliser      G cumulative gates [B * HV, T] (gates.py)

A sequence is cut into segments ("slots"), each walked by its own programs from the state in which it starts:

    LAYOUT 0  dense: B sequences of `cuts` segments of L tokens
    LAYOUT 1  packed, every sequence one segment: slot n is [cu[n], cu[n + 1])
    LAYOUT 2  packed, cut: slot s is [table[2 s], table[2 s + 1]), empty where the static bound is not reached

Program ids: output tile fastest, then head, then slot, all on grid axis x (the others end at 65,535). So the programs
that read the same tokens run together, and share them through L2.
"""

import triton
import triton.language as tl

from .walk import operand, rows, walk, walk_safely, walk_tokens


@triton.jit
def segment(slot, cu, table, T, cuts, L, LAYOUT: tl.constexpr):
    """Batch row, first and last token of a slot."""
    if LAYOUT == 0:
        t0 = (slot % cuts).to(tl.int64) * L
        return slot // cuts, t0, tl.minimum(t0 + L, T)
    p = cu + slot if LAYOUT == 1 else table + 2 * slot
    t0 = tl.maximum(tl.load(p).to(tl.int64), 0)
    return slot * 0, t0, tl.minimum(tl.load(p + 1).to(tl.int64), T)


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
    p, used, m, n, p_m, p_n, M: tl.constexpr, N: tl.constexpr, HAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    if HAS:
        p, mask = state_tile(p, m, n, p_m, p_n, M, N)
        return tl.load(p, mask=mask & used, other=0.0).to(tl.float32)
    return tl.zeros([BM, BN], tl.float32)


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
    table,  # [slots, 2]
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
    batch, t0, t1 = segment(slot, cu, table, T, cuts, L, LAYOUT)
    used = t0 < t1 if LAYOUT == 2 else True  # slots of the table that no segment took have no state
    m = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    S0 += slot * s_n + h * s_h
    S = load_state(S0, used, m, n, s_k, s_v, K, V, HAS_S0, BK, BN)
    z = load_z(S0 + V * s_v, used, m, s_k, K, HAS_S0 and NORMALIZE, BK)
    hk = h // (HV // H)
    o += (batch * T * HV + h) * V
    q += batch * q_b + hk * q_h
    k += batch * k_b + hk * k_h
    v += batch * v_b + h * v_h
    go: tl.constexpr = walk_tokens if TOKENS else walk_safely
    S, z = go(
        q, q_t, k, k_t, v, v_t, o, HV * V, q, q_t, o, G + (batch * HV + h) * T, head_gate(gamma, h, GATE), o, o, S, z,
        t0, t1, 0, n0, scale, EPS, K, V, BK, BN, C, 0, GATE, REVERSE, NORMALIZE, True, False, PRECISION,
    )  # fmt: skip
    if HAS_S1:
        S1 += (slot * HV + h) * K * W
        p, mask = state_tile(S1, m, n, W, 1, K, V)
        tl.store(p, S, mask=mask)
        if NORMALIZE:
            tl.store(S1 + m * W + V, z, mask=(m < K) & (n0 == 0))
    if LAYOUT != 0:
        zero_outside(o, HV * V, cu, T, N, slot, slots, n0, V, BN)


@triton.jit(do_not_specialize=["T", "N", "cuts", "L"])
def local_state(
    k,  # [B, T, H, K]  (MIRROR: q)
    k_b, k_t, k_h,
    v,  # [B, T, HV, V]  (MIRROR: do)
    v_b, v_t, v_h,
    G, gamma, rden, dden,
    states,  # [slots, HV, K, W] out: what each segment adds to the state
    decay,  # [slots, HV] out: log2-decay of each segment
    cu, table, T, N, H, HV, cuts, L,
    EPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, MIRROR: tl.constexpr, NORMALIZE: tl.constexpr,
    LAYOUT: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = (V + BN - 1) // BN
    TILES: tl.constexpr = (K + BM - 1) // BM * COLUMNS
    W: tl.constexpr = V + NORMALIZE
    pid = tl.program_id(0)
    m0 = pid % TILES // COLUMNS * BM
    n0 = pid % COLUMNS * BN
    h = (pid // TILES % HV).to(tl.int64)
    slot = (pid // TILES // HV).to(tl.int64)
    batch, t0, t1 = segment(slot, cu, table, T, cuts, L, LAYOUT)
    if t0 >= t1:
        return
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    row = (batch * HV + h) * T
    hk = h // (HV // H)
    k += batch * k_b + hk * k_h
    v += batch * v_b + h * v_h
    go: tl.constexpr = walk_tokens if TOKENS else walk
    S, z = go(
        k, k_t, k, k_t, v, v_t, k, k_t, k, k_t, k, G + row, head_gate(gamma, h, GATE), rden + row, dden + row,
        tl.zeros([BM, BN], tl.float32), tl.zeros([BM], tl.float32), t0, t1, m0, n0, 1.0,
        EPS, K, V, BM, BN, C, 2 if MIRROR else 0, GATE, REVERSE, NORMALIZE, False, False, PRECISION,
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
            for t in range(t0, t1, C):
                total += tl.load(G + row + (t if REVERSE else tl.minimum(t + C, t1) - 1)).to(tl.float32)
        tl.store(decay + slot * HV + h, total)


@triton.jit(do_not_specialize=["T", "cuts", "L"])
def normaliser(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    o,  # [B, T, HV, V] contiguous
    do,  # [B, T, HV, V]
    do_b, do_t, do_h,
    G, gamma,
    S0, s_n, s_h, s_k, s_v,
    rden,  # [B * HV, T] out: 1 / (s q.z + eps)
    dden,  # [B * HV, T] out: -(do . o) rden
    cu, table, T, H, HV, cuts, L, scale,
    EPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_S0: tl.constexpr, LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The denominator again, for the backward: z is a cumulative sum of k, so no matrix product is needed."""
    pid = tl.program_id(0)
    h = (pid % HV).to(tl.int64)
    slot = (pid // HV).to(tl.int64)
    batch, t0, t1 = segment(slot, cu, table, T, cuts, L, LAYOUT)
    used = t0 < t1 if LAYOUT == 2 else True
    i = tl.arange(0, C)
    m = tl.arange(0, BK)
    n = tl.arange(0, BV)
    z = load_z(S0 + slot * s_n + h * s_h + V * s_v, used, m, s_k, K, HAS_S0, BK)
    gamma2 = head_gate(gamma, h, GATE)
    hk = h // (HV // H)
    q += batch * q_b + hk * q_h
    k += batch * k_b + hk * k_h
    do += batch * do_b + h * do_h
    o += (batch * T * HV + h) * V
    row = (batch * HV + h) * T
    chunks = tl.cdiv((t1 - t0).to(tl.int32), C)
    for step in range(0, chunks):
        t = t0 + (chunks - 1 - step if REVERSE else step) * C
        count = tl.minimum(t1 - t, C).to(tl.int32)
        live = i < count
        xq = rows(q, q_t, t, i, live, m, K, BK)
        xk = rows(k, k_t, t, i, live, m, K, BK)
        if C == 1:
            P = tl.sum(xq.to(tl.float32) * xk.to(tl.float32), 1)[:, None]
        else:
            xq = operand(xq, q.dtype.element_ty, PRECISION)
            P = tl.dot(xq, tl.trans(operand(xk, k.dtype.element_ty, PRECISION)), input_precision=PRECISION)
        xq = xq.to(tl.float32)
        xk = xk.to(tl.float32)
        dot = rows(o, HV * V, t, i, live, n, V, BV).to(tl.float32) * rows(do, do_t, t, i, live, n, V, BV).to(tl.float32)
        if GATE == 1:
            end = tl.load(G + row + t + (0 if REVERSE else count - 1))
            R = tl.load(G + row + t + i, mask=live, other=0.0)
            R = tl.where(live, R, 0.0 if REVERSE else end)
        elif GATE == 2:
            end = gamma2 * count
            R = gamma2 * (tl.maximum(count - i, 0) if REVERSE else tl.minimum(i + 1, count))
        qz = tl.sum(xq * z[None, :], 1)
        if GATE == 1:
            P = P * tl.exp2((R[:, None] - R[None, :]).to(tl.float32))
        elif GATE == 2:
            P = P * tl.exp2(gamma2 * tl.abs(i[:, None] - i[None, :]))
        P = tl.where(i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :], P, 0.0)
        if GATE != 0:
            qz = qz * tl.exp2(R.to(tl.float32))
            xk = xk * tl.exp2((end - R).to(tl.float32))[:, None]
            z = z * tl.exp2(end.to(tl.float32))
        z += tl.sum(xk, 0)
        r = 1.0 / (scale * (tl.sum(P, 1) + qz) + EPS)
        tl.store(rden + row + t + i, r, mask=live)
        tl.store(dden + row + t + i, -r * tl.sum(dot, 1), mask=live)


@triton.jit(do_not_specialize=["T", "N", "cuts", "L", "slots", "heads", "d_scale"])
def backward(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    v, v_b, v_t, v_h,
    do,  # [B, T, HV, V]
    do_b, do_t, do_h,
    dq,  # [B, T, HV, K] out, contiguous, one per value head
    dk,  # [B, T, HV, K] out
    dv,  # [B, T, HV, V] out
    G, gamma, rden, dden,
    rho,  # [2, TILES, B * HV, T] out: q.dq and k.dk of each tile of K columns
    edge,  # [slots, HV, 2, TILES] out: <S, dS> where the slot ends, and where it starts
    S0, s_n, s_h, s_k, s_v,  # [slots, HV, K, W] states in which the slots start
    dS1, d_n, d_h, d_k, d_v,  # [slots, HV, K, W] their gradients where the slots end
    dS0,  # [slots, HV, K, W] out, contiguous
    cu, table, T, N, H, HV, cuts, L, slots, heads, scale, d_scale,
    EPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, RHO: tl.constexpr,
    HAS_S0: tl.constexpr, HAS_DS1: tl.constexpr, HAS_DS0: tl.constexpr, LAYOUT: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile 0 .. TK of dq, then of dk, then of dv. dS is held divided by the scale: d_scale brings dS1 to that form."""
    TK: tl.constexpr = (K + BN - 1) // BN
    TV: tl.constexpr = (V + BN - 1) // BN
    W: tl.constexpr = V + NORMALIZE
    TILES: tl.constexpr = 2 * TK + TV
    pid = tl.program_id(0)
    tile = pid % TILES
    h = (pid // TILES % HV).to(tl.int64)
    slot = (pid // TILES // HV).to(tl.int64)
    batch, t0, t1 = segment(slot, cu, table, T, cuts, L, LAYOUT)
    used = t0 < t1 if LAYOUT == 2 else True
    hk = h // (HV // H)
    q += batch * q_b + hk * q_h
    k += batch * k_b + hk * k_h
    v += batch * v_b + h * v_h
    do += batch * do_b + h * do_h
    head = batch * HV + h
    dq += (batch * T * HV + h) * K
    dk += (batch * T * HV + h) * K
    dv += (batch * T * HV + h) * V
    G += head * T
    rden += head * T
    dden += head * T
    S0 += slot * s_n + h * s_h
    dS1 += slot * d_n + h * d_h
    dS0 += (slot * HV + h) * K * W
    edge += (slot * HV + h) * 2 * TK
    gamma2 = head_gate(gamma, h, GATE)
    go: tl.constexpr = walk_tokens if TOKENS else walk
    if tile < 2 * TK:
        j = tile % TK
        n0 = j * BN
        m = tl.arange(0, BV)
        n = n0 + tl.arange(0, BN)
        rho += (tile.to(tl.int64) * heads + head) * T
        if tile < TK:
            S = load_state(S0, used, m, n, s_v, s_k, V, K, HAS_S0, BV, BN)
            z = load_z(S0 + V * s_v, used, n, s_k, K, HAS_S0 and NORMALIZE, BN)
            S, z = go(
                do, do_t, v, v_t, k, k_t, dq, HV * K, q, q_t, rho, G, gamma2, rden, dden, S, z, t0, t1, 0, n0, scale,
                EPS, V, K, BV, BN, C, 1, GATE, REVERSE, NORMALIZE, True, RHO, PRECISION,
            )  # fmt: skip
            if RHO:
                e = tl.sum(tl.sum(S * load_state(dS1, used, m, n, d_v, d_k, V, K, HAS_DS1, BV, BN), 0), 0)
                if NORMALIZE:
                    e += tl.sum(z * load_z(dS1 + V * d_v, used, n, d_k, K, HAS_DS1, BN), 0)
                tl.store(edge + j, e * d_scale * scale)
            if LAYOUT != 0:
                zero_outside(dq, HV * K, cu, T, N, slot, slots, n0, K, BN)
        else:
            S = load_state(dS1, used, m, n, d_v, d_k, V, K, HAS_DS1, BV, BN) * d_scale
            z = load_z(dS1 + V * d_v, used, n, d_k, K, HAS_DS1 and NORMALIZE, BN) * d_scale
            S, z = go(
                v, v_t, do, do_t, q, q_t, dk, HV * K, k, k_t, rho, G, gamma2, rden, dden, S, z, t0, t1, 0, n0, scale,
                EPS, V, K, BV, BN, C, 3, GATE, REVERSE, NORMALIZE, True, RHO, PRECISION,
            )  # fmt: skip
            if RHO:
                e = tl.sum(tl.sum(S * load_state(S0, used, m, n, s_v, s_k, V, K, HAS_S0, BV, BN), 0), 0)
                if NORMALIZE:
                    e += tl.sum(z * load_z(S0 + V * s_v, used, n, s_k, K, HAS_S0, BN), 0)
                tl.store(edge + TK + j, e * scale)
            if NORMALIZE and HAS_DS0:
                tl.store(dS0 + n * W + V, z * scale, mask=n < K)
            if LAYOUT != 0:
                zero_outside(dk, HV * K, cu, T, N, slot, slots, n0, K, BN)
    else:
        n0 = (tile - 2 * TK) * BN
        mv = tl.arange(0, BK)  # other names than above: Triton wants one type per name in both branches
        nv = n0 + tl.arange(0, BN)
        Sv = load_state(dS1, used, mv, nv, d_k, d_v, K, V, HAS_DS1, BK, BN) * d_scale
        zv = tl.zeros([BK], tl.float32)
        Sv, zv = go(
            k, k_t, q, q_t, do, do_t, dv, HV * V, v, v_t, rho, G, gamma2, rden, dden, Sv, zv, t0, t1, 0, n0, scale,
            EPS, K, V, BK, BN, C, 2, GATE, REVERSE, NORMALIZE, True, False, PRECISION,
        )  # fmt: skip
        if HAS_DS0:
            p, mask = state_tile(dS0, mv, nv, W, 1, K, V)
            tl.store(p, Sv * scale, mask=mask)
        if LAYOUT != 0:
            zero_outside(dv, HV * V, cu, T, N, slot, slots, n0, V, BN)
