"""What happens between the passes: gates, the table of packed segments, the scan over segments, and dg.

B batch   T time   HV value heads   K key width   V value width   C chunk   L tokens of a segment   N sequences
"""

import triton
import triton.language as tl

from .chunk import bounds, count_outside, head_gate, outside, owed, segment


@triton.jit
def _same_chunk(id1, x1, id2, x2):
    return id2, tl.where(id1 == id2, x1 + x2, x2)


@triton.jit(do_not_specialize=["T", "N"])
def gate_sums(
    g,  # [B, T, HV] natural logarithm
    g_b, g_t, g_h,
    G,  # [B * HV, T] out: log2-decay from the start of the chunk, inclusive (REVERSE: from its end)
    cu,  # [N + 1]
    T, N, HV,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Chunks count from the start of each packed sequence, so a block of BT >= C tokens looks one chunk further."""
    head_blocks = tl.cdiv(HV, BH)
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    h = pid % head_blocks * BH + tl.arange(0, BH)
    block = (pid // head_blocks % blocks).to(tl.int64)
    batch = (pid // head_blocks // blocks).to(tl.int64)
    WINDOW: tl.constexpr = 2 * BT if PACKED and C > 1 else BT
    first = block * BT - (BT if PACKED and C > 1 and not REVERSE else 0)
    t = first + tl.arange(0, WINDOW)
    inside = (t >= 0) & (t < T)
    mask = inside[:, None] & (h < HV)[None, :]
    x = tl.load(g + batch * g_b + t[:, None] * g_t + h.to(tl.int64)[None, :] * g_h, mask=mask, other=0.0)
    x = x.to(G.dtype.element_ty)
    x = tl.where(x < -128.0, -128.0, x) * 1.4426950408889634
    if C > 1:
        origin = tl.zeros([WINDOW], tl.int64)
        if PACKED:  # the largest n with cu[n] <= t, by bisection
            low = tl.zeros([WINDOW], tl.int64)
            high = low + N
            size = N
            while size > 0:
                middle = (low + high + 1) // 2
                up = tl.load(cu + middle, mask=inside, other=0) <= t
                low = tl.where(up, middle, low)
                high = tl.where(up, high, tl.maximum(middle - 1, low))
                size = size // 2
            origin = tl.load(cu + low, mask=inside, other=0).to(tl.int64)
        chunk = tl.where(t < origin, -1, t - (t - origin) % C)  # -1: before the first sequence
        ids = tl.broadcast_to(chunk[:, None], [WINDOW, BH])
        ids, x = tl.associative_scan((ids, x), 0, _same_chunk, reverse=REVERSE)
    own = inside & (t >= block * BT) & (t < (block + 1) * BT)
    p = G + (batch * HV + h.to(tl.int64)[None, :]) * T + t[:, None]
    tl.store(p, x, mask=own[:, None] & (h < HV)[None, :])


@triton.jit(do_not_specialize=["T", "N", "L", "slots"])
def segment_table(
    cu,  # [N + 1]
    table,  # [slots] out: the sequence of each slot
    T, N, L, slots,
    BS: tl.constexpr,
):  # fmt: skip
    """The last sequence n with cu[n] // L + n <= slot, by bisection: slots are numbered without counting them."""
    slot = tl.program_id(0) * BS + tl.arange(0, BS)
    low = tl.zeros([BS], tl.int32)
    high = low + (N - 1)
    size = N
    while size > 0:
        middle = (low + high + 1) // 2
        up = tl.minimum(tl.maximum(tl.load(cu + middle).to(tl.int64), 0), T) // L + middle <= slot
        low = tl.where(up, middle, low)
        high = tl.where(up, high, tl.maximum(middle - 1, low))
        size = size // 2
    tl.store(table + slot, low, mask=slot < slots)


@triton.jit(do_not_specialize=["T", "cuts", "L", "in_scale", "out_scale"])
def scan(
    states,  # [slots, HV, K, W] in: what each segment adds; out: the state in which it starts
    decay,  # [slots, HV] log2-decay of each segment
    S0,  # [N, HV, K, W]
    s_n, s_h, s_k, s_v,
    S1,  # [N, HV, K, W] out, contiguous
    G,  # [B * HV, T]
    gamma,  # [HV]
    cu,  # [N + 1]
    T, HV, cuts, L, in_scale, out_scale,
    KW: tl.constexpr, W: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, MIRROR: tl.constexpr,
    GATE: tl.constexpr, TOKENS: tl.constexpr, HAS_S0: tl.constexpr, HAS_S1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S_{j+1} = exp2(decay_j) S_j + states_j, element by element, in float32."""
    BACK: tl.constexpr = REVERSE != MIRROR
    BLOCKS: tl.constexpr = (KW + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    e = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    h = (pid // BLOCKS % HV).to(tl.int64)
    n = (pid // BLOCKS // HV).to(tl.int64)
    mask = e < KW
    if PACKED:
        begin, end = bounds(cu, n, T)
        j0 = begin // L + n
        count = tl.cdiv(end - begin, L).to(tl.int32)
    else:
        begin = n * 0
        end = begin + T
        j0 = n * cuts
        count = cuts
    S = tl.zeros([BLOCK], tl.float32)
    if HAS_S0:
        p = S0 + n * s_n + h * s_h + (e // W).to(tl.int64) * s_k + (e % W).to(tl.int64) * s_v
        S = tl.load(p, mask=mask, other=0.0).to(tl.float32) * in_scale
    step = -HV if BACK else HV
    row = (j0 + (count - 1 if BACK else 0)) * HV + h
    for j in range(0, count):
        p = states + row * KW + e
        followed = HAS_S1 or j + 1 < count  # or else `local_state` wrote nothing, and nobody needs it
        x = tl.load(p, mask=mask & followed, other=0.0)
        tl.store(p, S, mask=mask)
        if GATE != 0:
            S = S * tl.exp2(tl.load(decay + row, mask=followed, other=0.0))
        S += x
        row += step
    if HAS_S1:
        if MIRROR and GATE != 0 and not TOKENS:  # what it still owes
            row = ((n * 0 if PACKED else n) * HV + h) * T
            own, _ = owed(G + row, head_gate(gamma, h, GATE), begin, end, begin, end, GATE, REVERSE)
            S = S * tl.exp2(tl.where(begin < end, own, 0.0))
        tl.store(S1 + (n * HV + h) * KW + e, S * out_scale, mask=mask)


@triton.jit(do_not_specialize=["T", "N", "cuts", "slots", "heads"])
def gate_gradient(
    rho,  # [READ + INSIDE + WROTE, B * HV, T] see below
    across,  # [slots, HV, ACROSS]
    factor,  # [slots, HV] of `across`
    dg,  # [B, T, HV] out
    dgamma,  # [programs / HV, HV] out: sums of dg
    cu, table, T, N, HV, cuts, slots, heads,
    READ: tl.constexpr, INSIDE: tl.constexpr, WROTE: tl.constexpr, ACROSS: tl.constexpr, FACTOR: tl.constexpr,
    REVERSE: tl.constexpr, LAYOUT: tl.constexpr, SUM: tl.constexpr,
    C: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """dg, for NB blocks.

    dg_t is the sum over all pairs of a token i >= t that reads and a token j < t that wrote. With both in the block of
    t, that is the sum over i >= t of q.dq - k.dk, each from pairs inside the block and without the pair of a token with
    itself; the pairs after t cancel, to the last digit, since both roles round the same weights. To it come what tokens
    i >= t read from the state where the block starts (in READ, with the first part), what tokens j < t wrote that is
    read after the block (WROTE), and what goes across the whole block. Nothing else cancels: each part has the
    relative error of its own size, however short the memory of the gates.
    """
    pid = tl.program_id(0)
    h = (pid % HV).to(tl.int64)
    slot = (pid // HV).to(tl.int64) * NB + tl.arange(0, NB)
    exists = slot < slots
    _, batch, t0, t1, _, _ = segment(tl.minimum(slot, slots - 1), cu, table, T, cuts, C, LAYOUT)
    count = (t1 - t0).to(tl.int32)
    i = tl.arange(0, C)[None, :]
    live = exists[:, None] & (i < count[:, None])
    size = heads.to(tl.int64) * T
    p = rho + ((batch * HV + h) * T + t0)[:, None] + i
    earlier = i + 1 < count[:, None] if REVERSE else i > 0  # the token has one before it in the block
    x = tl.zeros([NB, C], tl.float32)
    wrote = tl.zeros([NB, C], tl.float32)
    over = tl.zeros([NB], tl.float32)
    for j in tl.static_range(READ):
        x += tl.load(p + j * size, mask=live, other=0.0)
    for j in tl.static_range(READ, READ + INSIDE):
        x -= tl.load(p + j * size, mask=live, other=0.0)
    for j in tl.static_range(READ + INSIDE, READ + INSIDE + WROTE):
        wrote += tl.load(p + j * size + (1 if REVERSE else -1), mask=live & earlier, other=0.0)
    for j in tl.static_range(ACROSS):
        over += tl.load(across + (slot * HV + h) * ACROSS + j, mask=exists & (count > 0), other=0.0)
    if FACTOR:
        over *= tl.load(factor + slot * HV + h, mask=exists & (count > 0), other=0.0)
    x = over[:, None] + tl.cumsum(x, 1, reverse=not REVERSE) + tl.cumsum(wrote, 1, reverse=REVERSE)
    if SUM:
        tl.store(dgamma + pid, tl.sum(tl.sum(tl.where(live, x, 0.0), 1), 0))
    else:
        dg += h
        tl.store(dg + ((batch * T + t0)[:, None] + i) * HV, x.to(dg.dtype.element_ty), mask=live)
        if LAYOUT != 0:
            none = count_outside(cu, T, N)
            u = tl.arange(0, C)
            for u0 in range(pid // HV * C, none, tl.num_programs(0) // HV * C):
                t = outside(u0, u, cu, T, N)
                tl.store(dg + t * HV, tl.zeros([C], dg.dtype.element_ty), mask=u0 + u < none)
