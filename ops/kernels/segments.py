"""What happens between the passes: gates, the table of packed segments, the scan over segments, and dg.

B batch   T time   HV value heads   K key width   V value width   C chunk   L tokens of a segment   N sequences
"""

import triton
import triton.language as tl

from .chunk import count_outside, outside, segment


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


@triton.jit(do_not_specialize=["N", "L", "slots"])
def segment_table(
    cu,  # [N + 1]
    table,  # [slots, 2] out: first token and end of each slot
    first,  # [N + 1] out: first slot of each sequence
    N, L, slots,
    BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Slots are numbered sequence by sequence, ceil(length / L) each; every program counts all sequences again."""
    slot = tl.program_id(0) * BS + tl.arange(0, BS)
    before = tl.zeros([BS], tl.int64)  # sequences that end before the slot
    base = tl.zeros([BS], tl.int64)  # and their slots
    total = tl.zeros([], tl.int64)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        start = tl.load(cu + n, mask=n < N, other=0).to(tl.int64)
        end = tl.load(cu + n + 1, mask=n < N, other=0).to(tl.int64)
        cuts = (end - start + L - 1) // L
        ends = total + tl.cumsum(cuts, 0)
        past = (ends[None, :] <= slot[:, None]) & (n < N)[None, :]
        before += tl.sum(past.to(tl.int64), 1)
        base = tl.maximum(base, tl.max(tl.where(past, ends[None, :], 0), 1))
        tl.store(first + n, ends - cuts, mask=(n < N) & (tl.program_id(0) == 0))
        total += tl.sum(cuts, 0)
    tl.store(first + N, total, mask=tl.program_id(0) == 0)
    found = (before < N) & (slot < slots)
    start = tl.load(cu + before, mask=found, other=0).to(tl.int64) + (slot - base) * L
    end = tl.minimum(start + L, tl.load(cu + before + 1, mask=found, other=0).to(tl.int64))
    tl.store(table + 2 * slot, tl.where(found, start, 0), mask=slot < slots)
    tl.store(table + 2 * slot + 1, tl.where(found, end, 0), mask=slot < slots)


@triton.jit(do_not_specialize=["cuts", "in_scale", "out_scale"])
def scan(
    states,  # [slots, HV, K, W] in: what each segment adds; out: the state in which it starts
    decay,  # [slots, HV] log2-decay of each segment
    S0,  # [N, HV, K, W]
    s_n, s_h, s_k, s_v,
    S1,  # [N, HV, K, W] out, contiguous
    first,  # [N + 1] first slot of each packed sequence
    HV, cuts, in_scale, out_scale,
    KW: tl.constexpr, W: tl.constexpr, PACKED: tl.constexpr, BACK: tl.constexpr, GATED: tl.constexpr,
    HAS_S0: tl.constexpr, HAS_S1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S_{j+1} = exp2(decay_j) S_j + states_j, element by element, in float32."""
    BLOCKS: tl.constexpr = (KW + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    e = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    h = (pid // BLOCKS % HV).to(tl.int64)
    n = (pid // BLOCKS // HV).to(tl.int64)
    mask = e < KW
    if PACKED:
        j0 = tl.load(first + n).to(tl.int64)
        count = (tl.load(first + n + 1) - j0).to(tl.int32)
    else:
        j0 = n * cuts
        count = cuts
    S = tl.zeros([BLOCK], tl.float32)
    if HAS_S0:
        p = S0 + n * s_n + h * s_h + (e // W).to(tl.int64) * s_k + (e % W).to(tl.int64) * s_v
        S = tl.load(p, mask=mask, other=0.0).to(tl.float32) * in_scale
    step = -HV if BACK else HV
    row = (j0 + (count - 1 if BACK else 0)) * HV + h
    for _ in range(0, count):
        p = states + row * KW + e
        x = tl.load(p, mask=mask, other=0.0)
        tl.store(p, S, mask=mask)
        if GATED:
            S = S * tl.exp2(tl.load(decay + row))
        S += x
        row += step
    if HAS_S1:
        tl.store(S1 + (n * HV + h) * KW + e, S * out_scale, mask=mask)


@triton.jit(do_not_specialize=["T", "N", "cuts", "L", "slots", "heads"])
def gate_gradient(
    rho,  # [2, TILES, B * HV, T] q.dq and k.dk, each without the term of the token with itself
    edge,  # [slots, HV, 2, TILES] <S, dS> where the slot ends and starts, in the operator's order
    dg,  # [B, T, HV] out
    dgamma,  # [slots, HV] out: the sum of dg over the slot
    cu, table, T, N, HV, cuts, L, slots, heads,
    TILES: tl.constexpr, REVERSE: tl.constexpr, LAYOUT: tl.constexpr, SUM: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """dg_t = <S_end, dS_end> + sum over i >= t of the segment of (q.dq - k.dk)_i.

    q.dq - k.dk is a sum over pairs of a reading and a writing token. The pair of a token with itself is in both, and
    so is the pair of the last token with dS_end (in <S_end, dS_end> and in k.dk). They are left out on both sides:
    under strong decay they would be all there is, and dg what rounding leaves of them. A sum from the end gathers
    rounding error like a random walk; but its value where the segment starts is known, <S_start, dS_start>. Spreading
    the difference evenly over the segment pins both ends of the walk, which leaves a third of its variance.
    """
    pid = tl.program_id(0)
    h = (pid % HV).to(tl.int64)
    slot = (pid // HV).to(tl.int64)
    batch, t0, t1 = segment(slot, cu, table, T, cuts, L, LAYOUT)
    count = (t1 - t0).to(tl.int32)
    i = tl.arange(0, BL)
    live = i < count
    size = heads.to(tl.int64) * T
    p = rho + (batch * HV + h) * T + t0 + i
    last = 0 if REVERSE else count - 1  # of the walk
    x = tl.zeros([BL], tl.float32)
    at_end = 0.0
    at_start = 0.0
    for j in range(TILES):
        x += tl.load(p + j * size, mask=live, other=0.0)
        x -= tl.load(p + (TILES + j) * size, mask=live & (i != last), other=0.0)
        at_end += tl.load(edge + (slot * HV + h) * 2 * TILES + j)
        at_start += tl.load(edge + (slot * HV + h) * 2 * TILES + TILES + j)
    total = tl.sum(x, 0)
    x = at_end + tl.cumsum(x, 0, reverse=not REVERSE)
    # 1 at the first token of the walk, 0 past its last
    share = (i + 1 if REVERSE else count - i).to(tl.float32) / tl.maximum(count, 1)
    x += (at_start - at_end - total) * share
    if SUM:
        tl.store(dgamma + slot * HV + h, tl.sum(tl.where(live, x, 0.0), 0))
    else:
        dg += batch * T * HV + h
        tl.store(dg + (t0 + i) * HV, x.to(dg.dtype.element_ty), mask=live)
        if LAYOUT != 0:
            none = count_outside(cu, T, N)
            for u in range(slot * BL, none, slots * BL):
                t = outside(u, i, cu, T, N)
                tl.store(dg + t * HV, tl.zeros([BL], dg.dtype.element_ty), mask=u + i < none)
