"""One token of generation, in place on a pool of states: S <- exp(g) S + k v^T,  o = scale q S.

B requests   H key heads   HV value heads   K key width   V value width   P slots of the pool
"""

import triton
import triton.language as tl

from .chunk import head_gate


@triton.jit(do_not_specialize=["slots"])
def step(
    q,  # [B, H, K]
    q_b, q_h,
    k,  # [B, H, K]
    k_b, k_h,
    v,  # [B, HV, V]
    v_b, v_h,
    o,  # [B, HV, V] out, contiguous
    state,  # [P, HV, K, V], or [P, HV, K, V + 1] with NORMALIZE; read once, written once
    s_n, s_h, s_k, s_v,
    g,  # [B, HV]
    g_b, g_h,
    gamma,  # [HV]
    indices,  # [B] slot of each request; outside [0, P): nothing is touched, o is zero
    i_b,
    H, HV, slots, scale,
    EPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (V + BN - 1) // BN
    # every tile needs z, and one would write it while others read: with the normaliser one program takes all tiles
    PROGRAMS: tl.constexpr = 1 if NORMALIZE else TILES
    pid = tl.program_id(0)
    h = (pid // PROGRAMS % HV).to(tl.int64)
    b = (pid // PROGRAMS // HV).to(tl.int64)
    slot = tl.load(indices + b * i_b).to(tl.int64) if INDEXED else b
    valid = (slot >= 0) & (slot < slots)
    slot = tl.where(valid, slot, 0)
    m = tl.arange(0, BK)
    hk = h // (HV // H)
    xq = tl.load(q + b * q_b + hk * q_h + m, mask=m < K, other=0.0).to(tl.float32) * scale
    xk = tl.load(k + b * k_b + hk * k_h + m, mask=m < K, other=0.0).to(tl.float32)
    gain = 1.0
    if GATE == 1:
        gain = tl.exp2(tl.load(g + b * g_b + h * g_h).to(tl.float32) * 1.4426950408889634)
    elif GATE == 2:
        gain = tl.exp2(head_gate(gamma, h, GATE))
    state += slot * s_n + h * s_h
    rden = 1.0
    if NORMALIZE:
        pz = state + m.to(tl.int64) * s_k + V * tl.cast(s_v, tl.int64)
        z = tl.load(pz, mask=(m < K) & valid, other=0.0) * gain + xk
        tl.store(pz, z, mask=(m < K) & valid)
        rden = 1.0 / (tl.sum(xq * z, 0) + EPS)
    for j in range(TILES // PROGRAMS):
        n = (j if NORMALIZE else pid % TILES) * BN + tl.arange(0, BN)
        xv = tl.load(v + b * v_b + h * v_h + n, mask=n < V, other=0.0).to(tl.float32)
        p = state + m.to(tl.int64)[:, None] * s_k + n.to(tl.int64)[None, :] * s_v
        mask = (m < K)[:, None] & (n < V)[None, :] & valid
        S = tl.load(p, mask=mask, other=0.0) * gain + xk[:, None] * xv[None, :]
        tl.store(p, S, mask=mask)
        y = tl.where(valid, tl.sum(xq[:, None] * S, 0) * rden, 0.0)
        tl.store(o + (b * HV + h) * V + n, y.to(o.dtype.element_ty), mask=n < V)
