# ruff: noqa: RUF005, SIM102 (Triton takes no [*x]; it knows GATE when it compiles, `mild` only when it runs)
"""`walk` of walk.py on Hopper for heads wider than 64, in Gluon: what Triton's own scheduling does not reach.

Roles, letters and formulas as there; dense sequences, bfloat16 and float16; of the normaliser the forward, in bfloat16:

    out = s ((a b^T * W) c + D * (a S))        S <- gain S + b^T (U * c)

where gates are mild, in bfloat16 and without the normaliser, in the factored form (see `walk_safely` there):
W_ij = D_i E_j and U = gain E, so that no product waits for a factor of another:

    out = s D * (tril(a b^T) (E * c) + a S)    S <- gain (S + b^T (E * c))

A program holds NC * 64 columns of the state of one segment, in NC warpgroups ("consumers"), each with S^T [64, BM] in
float32 registers. Rounded, S^T is the left operand of out^T = S^T a^T straight from registers: the state never goes
through shared memory. Another warpgroup ("scores") computes a b^T * W once for all consumers, a chunk ahead of them.

With the normaliser "scores" holds z as well, and divides. z, and the U that it grows by, are matrices of 8 columns, so
that a z and b^T U are products on the matrix units: sums over 128 or 256 columns in registers would take longer than
all that the consumers do.

With gradients of gates (SUMS) the roles leave what gate_gradient of segments.py takes: dk the products k.dk and, chunk
by chunk, its state; dq the products q.dq and the inner product of that state with its own.

Copies between memory and shared memory go by descriptors, issued by a warp of their own; but with BM = 256 and two
consumers there are no registers for one more, and "scores" issues them.

    C tokens of a chunk   BN columns of a consumer   SA, SB stages of a, and of b and c
    barriers: _full that copies, or numbers, are there; _empty that they have been used
"""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .chunk import head_gate, owed

CHUNK = 64
C = gl.constexpr(CHUNK)
BN = gl.constexpr(64)


@functools.cache
def _swizzled(bits):
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4)


def described(x, view, columns):
    """x as a descriptor of tiles of CHUNK tokens; view as in plan.py."""
    shape, strides = view
    return TensorDescriptor(x, shape, strides, [1, 1, CHUNK, columns], _swizzled(8 * x.element_size()))


@gluon.jit
def piece(S, n: gl.constexpr, COUNT: gl.constexpr):
    """Columns [n W, (n + 1) W) of S, W = its width / COUNT. Moves no data: a thread's columns are its registers."""
    if COUNT == 1:
        return S
    else:
        low, high = S.reshape([S.shape[0], 2, S.shape[1] // 2]).permute([0, 2, 1]).split()
        if n < COUNT // 2:
            return piece(low, n, COUNT // 2)
        else:
            return piece(high, n - COUNT // 2, COUNT // 2)


@gluon.jit
def places(m0: gl.constexpr, BM: gl.constexpr, M, N, s_m, s_n, column):
    """Where columns [m0, m0 + BM) of S^T lie in a state [M, N] in memory, and what of them is inside."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    n = column + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, layout))
    return m[None, :] * s_m + n[:, None] * s_n, (m < M)[None, :] & (n < N)[:, None]


@gluon.jit
def read_state(p, m0: gl.constexpr, BM: gl.constexpr, M, N, s_m, s_n, column):
    """By pieces of 32 columns: the addresses of a whole state would not fit into registers beside it."""
    if BM == 32:
        at, inside = places(m0, BM, M, N, s_m, s_n, column)
        return gl.load(p + at, mask=inside, other=0.0).to(gl.float32)
    else:
        low = read_state(p, m0, BM // 2, M, N, s_m, s_n, column)
        high = read_state(p, m0 + BM // 2, BM // 2, M, N, s_m, s_n, column)
        return gl.join(low, high).permute([0, 2, 1]).reshape([BN, BM])


@gluon.jit
def write_state(p, S, m0: gl.constexpr, BM: gl.constexpr, M, N, s_m, column):
    if BM == 32:
        at, inside = places(m0, BM, M, N, s_m, 1, column)
        gl.store(p + at, gl.convert_layout(S, at.type.layout, assert_trivial=True), mask=inside)
    else:
        low, high = S.reshape([BN, 2, BM // 2]).permute([0, 2, 1]).split()
        write_state(p, low, m0, BM // 2, M, N, s_m, column)
        write_state(p, high, m0 + BM // 2, BM // 2, M, N, s_m, column)


@gluon.jit
def place(step, t0, chunks, BACK: gl.constexpr):
    """First token of a chunk; which one is walked at this step."""
    if BACK:
        return t0 + (chunks - 1 - step) * C
    else:
        return t0 + step * C


@gluon.jit
def weighed(c_t, weights, left: gl.constexpr):
    """c^T * weights, through registers."""
    return (c_t.load(left).to(gl.float32) * weights.load(gl.SliceLayout(0, left))[None, :]).to(c_t.dtype)


@gluon.jit
def by_warps(x):
    """Sums over the rows of x [64, n] that each of four warps holds: [4, n]."""
    return gl.sum(x.reshape([4, 16, x.shape[1]]), 1)


@gluon.jit
def write_by_warps(p, x, size, count):
    """x [4, C], or its first `count` columns, to rows that lie `size` apart."""
    layout: gl.constexpr = x.type.layout
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))
    i = gl.arange(0, C, layout=gl.SliceLayout(0, layout))
    gl.store(p + (warp.to(gl.int64) * size)[:, None] + i[None, :], x, mask=(i < count)[None, :])


@gluon.jit
def by_threads(S):
    """S^T [64, M] as rows of eight numbers that one thread holds, thread after thread."""
    x = S.reshape([4, 2, 8, S.shape[1] // 16, 2, 4, 2]).permute([0, 3, 2, 5, 4, 1, 6])
    return x.reshape([8 * S.shape[1], 8])


@gluon.jit
def in_threads(p, x):
    """Where x of `by_threads`, or half of it, lies in memory."""
    layout: gl.constexpr = x.type.layout
    row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))
    return p + row[:, None] * x.shape[1] + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def halves(S):
    """The even and the odd columns of `by_threads`."""
    x = by_threads(S)
    return x.reshape([x.shape[0], 4, 2]).split()


@gluon.jit
def inner(S, pairs, DTYPE: gl.constexpr):
    """<S, the state that `pairs` are>, by warps. Two numbers of 16 bits in one of 32: apart, they would take twice as
    many registers, and Triton takes them apart where it loads them, which makes it wait there."""
    even, odd = halves(S)
    x = even * (pairs & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True).to(gl.float32)
    x += odd * (pairs >> 16).to(gl.uint16).to(DTYPE, bitcast=True).to(gl.float32)
    return gl.sum(x.reshape([4, x.shape[0]]), 1)


@gluon.jit
def write_part(p, y, x, weights, scale, size, t, t1):
    """s weights_i sum_n y_in x_in, y^T of a chunk, x in shared memory: what its tokens have from the state before."""
    part = by_warps(y * x.reshape([C, BN]).permute([1, 0]).load(y.type.layout).to(gl.float32))
    part = part * (weights.load(gl.SliceLayout(0, part.type.layout)) * scale)[None, :]
    write_by_warps(p + t, part, size, t1 - t)


@gluon.jit
def steps(
    w: gl.constexpr, S, written, sums, smem,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, GATE: gl.constexpr, BACK: gl.constexpr,
    MIRROR: gl.constexpr, NORMALIZE: gl.constexpr, SUMS: gl.constexpr, FACTORED: gl.constexpr,
):  # fmt: skip
    """The walk of a consumer, from the state S to that which it returns."""
    out, batch, h, t0, chunks, column, scale = written
    a_s, b_s, c_s, x_s, p_s, d_s, u_s, gain_s, sums_s, out_s, a_full, a_empty, b_full, b_empty, p_full, p_empty = smem
    # S of 256 columns is rounded by quarters: more at once do not fit into registers, fewer wait more often.
    PIECES: gl.constexpr = 4 if BM == 256 else 1
    W: gl.constexpr = BM // PIECES
    DTYPE: gl.constexpr = c_s.dtype
    acc_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    acc_y: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_y, k_width=2)
    tile = out_s.index(w)
    r_s = sums_s[0]
    if SUMS:
        parts, _, size, kept, across, _, block_size, width, t1 = sums
        parts += (w * 4) * size
        kept += w * BN * BM
        if not MIRROR:
            there = place(0, t0, chunks, BACK) // C * block_size * (width * BN * BM // 2)
            kept = kept.to(gl.pointer_type(gl.uint32), bitcast=True)
            even, _odd = halves(S)
            other = gl.load(in_threads(kept + there, even))
    for step in range(chunks):
        sa, sb, sp = step % SA, step % SB, step % 2
        xa = a_s.index(sa).reshape([C, BM])
        xb = b_s.index(sb).reshape([C, BM])
        c_t = c_s.index(sb * NC + w).reshape([C, BN]).permute([1, 0])
        p = p_s.index(sp).permute([1, 0])
        if SUMS and not MIRROR:  # the one that is read at the end of this step
            there = place(gl.minimum(step + 1, chunks - 1), t0, chunks, BACK) // C * block_size
            line = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0])) * (BN * BM // 256)
            gl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [kept + there * (width * BN * BM // 2) + line],
                dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        mbarrier.wait(a_full.index(sa), (step // SA) & 1)
        y = gl.zeros([BN, C], gl.float32, acc_y)
        for n in gl.static_range(PIECES):
            rounded = gl.convert_layout(piece(S, n, PIECES).to(DTYPE), left, assert_trivial=True)
            y = warpgroup_mma(rounded, xa.slice(n * W, W, dim=1).permute([1, 0]), y, use_acc=n > 0, is_async=True)
            if n < PIECES - 1:
                y, S = warpgroup_mma_wait(0, deps=[y, S])
        if SUMS:
            t = place(step, t0, chunks, BACK)
            there = t // C * block_size
            if MIRROR:
                own = by_threads(S)
                gl.store(in_threads(kept + there * (width * BN * BM), own), own.to(DTYPE))
            else:
                found = inner(S, other, DTYPE)
                warp = gl.arange(0, 4, layout=found.type.layout)
                gl.store(across + there * (width * 4) + w * 4 + warp, found * scale)
        mbarrier.wait(p_full.index(sp), (step // 2) & 1)
        mbarrier.wait(b_full.index(sb), (step // SB) & 1)
        # (Beside an S of 256 columns registers are few: there, weights are read after the product before them.)
        if GATE == 0:
            y = warpgroup_mma(c_t, p, y, is_async=True)
            S = warpgroup_mma(c_t, xb, S, is_async=True)
        elif FACTORED:
            if BM == 256:
                y, S = warpgroup_mma_wait(0, deps=[y, S])
            moved = weighed(c_t, u_s.index(sp), left)
            if SUMS:  # y is read in between
                S = warpgroup_mma(moved, xb, S, is_async=True)
                y = warpgroup_mma_wait(1, deps=[y])
                write_part(parts, y, x_s.index(sb * NC + w), d_s.index(sp), scale, size, t, t1)
                y = warpgroup_mma(moved, p, y, is_async=True)
                y, S = warpgroup_mma_wait(0, deps=[y, S])
            else:
                y = warpgroup_mma(moved, p, y, is_async=True)
                S = warpgroup_mma(moved, xb, S, is_async=True)
        else:
            if BM < 256 and not SUMS:
                moved = weighed(c_t, u_s.index(sp), left)
                D = d_s.index(sp).load(gl.SliceLayout(0, acc_y))
                gain = gain_s.index(sp).load(gl.SliceLayout(1, acc_s))
            y, S = warpgroup_mma_wait(0, deps=[y, S])
            if SUMS:
                write_part(parts, y, x_s.index(sb * NC + w), d_s.index(sp), scale, size, t, t1)
            if BM == 256 or SUMS:
                D = d_s.index(sp).load(gl.SliceLayout(0, acc_y))
                gain = gain_s.index(sp).load(gl.SliceLayout(1, acc_s))
            y = y * D[None, :]
            S = S * gain[:, None]
            y = warpgroup_mma(c_t, p, y, is_async=True)
            if BM == 256 or SUMS:
                moved = weighed(c_t, u_s.index(sp), left)
            S = warpgroup_mma(moved, xb, S, is_async=True)
        y = warpgroup_mma_wait(1, deps=[y])
        mbarrier.arrive(a_empty.index(sa), count=1)
        if FACTORED:
            y = y * d_s.index(sp).load(gl.SliceLayout(0, acc_y))[None, :]
            gain = gain_s.index(sp).load(gl.SliceLayout(1, acc_s))
        if NORMALIZE:
            y = y * r_s.index(sp).load(gl.SliceLayout(0, acc_y))[None, :]
        mbarrier.arrive(p_empty.index(sp), count=1)
        tma.store_wait(0)
        tile.reshape([C, BN]).permute([1, 0]).store((y * scale).to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [batch, h, place(step, t0, chunks, BACK), column], tile)
        if SUMS and not MIRROR:
            there = place(gl.minimum(step + 1, chunks - 1), t0, chunks, BACK) // C * block_size
            other = gl.load(in_threads(kept + there * (width * BN * BM // 2), other))
        S = warpgroup_mma_wait(0, deps=[S])
        mbarrier.arrive(b_empty.index(sb), count=1)
        if FACTORED:
            S = S * gain[:, None]
    return S


@gluon.jit
def consumer(
    w: gl.constexpr, written, ends, mild, sums, smem,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, GATE: gl.constexpr, BACK: gl.constexpr,
    MIRROR: gl.constexpr, NORMALIZE: gl.constexpr, SUMS: gl.constexpr, HAS_S0: gl.constexpr, HAS_S1: gl.constexpr,
):  # fmt: skip
    """Walks with 64 columns of the state: number w of the program."""
    out, batch, h, t0, chunks, column, scale = written
    S0, s_m, s_n, S1, M, N, in_scale, out_scale = ends
    acc_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    column += w * BN
    if HAS_S0:
        S = gl.convert_layout(read_state(S0, 0, BM, M, N, s_m, s_n, column), acc_s, assert_trivial=True) * in_scale
    else:
        S = gl.zeros([BN, BM], gl.float32, acc_s)
    written = out, batch, h, t0, chunks, column, scale
    if GATE != 0 and out.dtype == gl.bfloat16 and not NORMALIZE:
        if mild != 0:
            S = steps(w, S, written, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, True)
        else:
            S = steps(w, S, written, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, False)
    else:
        S = steps(w, S, written, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, False)
    tma.store_wait(0)
    if HAS_S1:
        # hides from the compiler that these are the addresses of S0: it would keep them all through the loop
        M = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [M], dtype=gl.int32, is_pure=False, pack=1)
        N = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [N], dtype=gl.int32, is_pure=False, pack=1)
        write_state(S1, S * out_scale, 0, BM, M, N, N + NORMALIZE, column)


@gluon.jit
def copy_a(step, t, a, a_s, a_full, batch, ha, BM: gl.constexpr, SA: gl.constexpr):
    bar = a_full.index(step % SA)
    mbarrier.expect(bar, 2 * C * BM)
    tma.async_copy_global_to_shared(a, [batch, ha, t, 0], bar, a_s.index(step % SA))


@gluon.jit
def copy_bc(
    step, t, b, c, x, b_s, c_s, x_s, b_full, batch, ha, hc, column,
    BM: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    bar = b_full.index(step % SB)
    mbarrier.expect(bar, 2 * C * (BM + NC * BN * (1 + SUMS)))
    tma.async_copy_global_to_shared(b, [batch, ha, t, 0], bar, b_s.index(step % SB))
    for w in gl.static_range(NC):
        tma.async_copy_global_to_shared(c, [batch, hc, t, column + w * BN], bar, c_s.index(step % SB * NC + w))
        if SUMS:
            tma.async_copy_global_to_shared(x, [batch, hc, t, column + w * BN], bar, x_s.index(step % SB * NC + w))


@gluon.jit
def copies(
    read, smem,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, BACK: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """The warp that copies."""
    a, b, c, x, batch, ha, hc, t0, chunks, column = read
    a_s, b_s, c_s, x_s, _, _, _, _, _, _, a_full, a_empty, b_full, b_empty, _, _ = smem
    for step in range(chunks):
        t = place(step, t0, chunks, BACK)
        mbarrier.wait(a_empty.index(step % SA), ((step // SA) & 1) ^ 1)
        copy_a(step, t, a, a_s, a_full, batch, ha, BM, SA)
        mbarrier.wait(b_empty.index(step % SB), ((step // SB) & 1) ^ 1)
        copy_bc(step, t, b, c, x, b_s, c_s, x_s, b_full, batch, ha, hc, column, BM, SB, NC, SUMS)


@gluon.jit
def differences(x, layout: gl.constexpr):
    """x_i - x_j"""
    rows = gl.convert_layout(x, gl.SliceLayout(1, layout))
    return rows[:, None] - gl.convert_layout(x, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def gates(G, first, t1, t, REVERSE: gl.constexpr):
    """R of a chunk, of its first token in the operator's order, and of all of it. Past the end: as the last token."""
    last = gl.minimum(t1 - first, C) - 1
    R = gl.load(G + first + gl.minimum(t, last))
    return R, gl.load(G + first + (last if REVERSE else 0)), gl.load(G + first + (0 if REVERSE else last))


@gluon.jit
def split_in_two(x, layout: gl.constexpr):
    """x [n] as columns [n, 8]: rounded in the even ones, and in the odd ones what rounding has left of it."""
    x = gl.convert_layout(x, gl.SliceLayout(1, layout))
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    rounded = x.to(gl.bfloat16).to(gl.float32)
    return gl.where((column % 2 == 0)[None, :], rounded[:, None], (x - rounded)[:, None])


@gluon.jit
def sum_of_two(x):
    """The numbers that columns such as those of `split_in_two` are."""
    return gl.sum(x, 1) * 0.25


@gluon.jit
def scores(
    read, decay, mild, key_sums, sums, smem,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, GATE: gl.constexpr, MIRROR: gl.constexpr,
    REVERSE: gl.constexpr, NORMALIZE: gl.constexpr, EPS: gl.constexpr, SUMS: gl.constexpr, HAS_S0: gl.constexpr,
    HAS_S1: gl.constexpr, COPIES: gl.constexpr,
):  # fmt: skip
    """a b^T * W under the causal mask, D, U (mild: E) and gain of every chunk. COPIES: and what `copies` does.

    NORMALIZE: and z, and the reciprocals of the denominators.
    """
    a, b, c, x, batch, ha, hc, t0, chunks, column = read
    G, gamma, due, t1 = decay
    S0, s_m, s_n, S1, M, N, scale = key_sums
    parts, inside, size, _, _, factor, block_size, _, _ = sums
    PAIRS: gl.constexpr = SUMS and not MIRROR
    a_s, b_s, c_s, x_s, p_s, d_s, u_s, gain_s, sums_s, _, a_full, a_empty, b_full, b_empty, p_full, p_empty = smem
    BACK: gl.constexpr = REVERSE != MIRROR
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    flat: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # every warp holds all 64 numbers
    i = gl.arange(0, C, layout=gl.SliceLayout(1, acc))
    j = gl.arange(0, C, layout=gl.SliceLayout(0, acc))
    t = gl.arange(0, C, layout=flat)
    if NORMALIZE:
        # z, on the matrix units too: in two parts, so that its products are exact to 2^-16 and not to 2^-8
        r_s, z_s, w_s = sums_s
        two: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
        m = gl.arange(0, BM, layout=gl.SliceLayout(1, two))
        z = gl.zeros([BM], gl.float32, gl.SliceLayout(1, two))
        if HAS_S0:
            z = gl.load(S0 + N * s_n + m * s_m, mask=m < M, other=0.0)
        z_s.permute([1, 0]).store(split_in_two(z, two).to(z_s.dtype))
        if GATE == 0:
            w_s.permute([1, 0]).store(split_in_two(gl.full([C], 1.0, gl.float32, flat), two).to(w_s.dtype))
        fence_async_shared()
        none = gl.zeros([C, 8], gl.float32, two)
        nothing = gl.zeros([BM, 8], gl.float32, two)
    zero = gl.zeros([C, C], gl.float32, acc)
    if COPIES:
        for step in range(SA - 1):
            if step < chunks:
                copy_a(step, place(step, t0, chunks, BACK), a, a_s, a_full, batch, ha, BM, SA)
        for step in range(SB - 1):
            if step < chunks:
                copy_bc(
                    step, place(step, t0, chunks, BACK), b, c, x, b_s, c_s, x_s, b_full, batch, ha, hc, column,
                    BM, SB, NC, SUMS,
                )  # fmt: skip
    if GATE == 1:  # those of the next chunk are read while this one is computed
        next_R, next_head, next_end = gates(G, place(0, t0, chunks, BACK), t1, t, REVERSE)
    for step in range(chunks):
        sp = step % 2
        if COPIES:
            n = step + SA - 1
            if n < chunks:
                mbarrier.wait(a_empty.index(n % SA), ((n // SA) & 1) ^ 1)
                copy_a(n, place(n, t0, chunks, BACK), a, a_s, a_full, batch, ha, BM, SA)
            n = step + SB - 1
            if n < chunks:
                mbarrier.wait(b_empty.index(n % SB), ((n // SB) & 1) ^ 1)
                copy_bc(
                    n, place(n, t0, chunks, BACK), b, c, x, b_s, c_s, x_s, b_full, batch, ha, hc, column,
                    BM, SB, NC, SUMS,
                )  # fmt: skip
        count = gl.minimum(t1 - place(step, t0, chunks, BACK), C)
        if GATE == 1:
            R, head, end = next_R, next_head, next_end
            n = gl.minimum(step + 1, chunks - 1)
            next_R, next_head, next_end = gates(G, place(n, t0, chunks, BACK), t1, t, REVERSE)
        elif GATE == 2:
            R = gamma * (gl.maximum(count - t, 1) if REVERSE else gl.minimum(t + 1, count)).to(gl.float32)
            head = gamma
            end = gamma * count.to(gl.float32)
        mbarrier.wait(a_full.index(step % SA), (step // SA) & 1)
        mbarrier.wait(b_full.index(step % SB), (step // SB) & 1)
        xa = a_s.index(step % SA).reshape([C, BM])
        xb = b_s.index(step % SB).reshape([C, BM])
        P = warpgroup_mma(xa, xb.permute([1, 0]), zero, use_acc=False, is_async=True)
        if NORMALIZE:
            met = warpgroup_mma(xa, z_s.permute([1, 0]), none, use_acc=False, is_async=True)
            P, met = warpgroup_mma_wait(0, deps=[P, met])
            mbarrier.arrive(a_empty.index(step % SA), count=1)
        elif PAIRS:
            A = zero
            for w in gl.static_range(NC):
                xx = x_s.index(step % SB * NC + w).reshape([C, BN])
                xc = c_s.index(step % SB * NC + w).reshape([C, BN])
                A = warpgroup_mma(xx, xc.permute([1, 0]), A, use_acc=w > 0, is_async=True)
            P, A = warpgroup_mma_wait(0, deps=[P, A])
        else:
            P = warpgroup_mma_wait(0, deps=[P])
        if not NORMALIZE:
            mbarrier.arrive(a_empty.index(step % SA), count=1)
            mbarrier.arrive(b_empty.index(step % SB), count=1)
        mbarrier.wait(p_empty.index(sp), ((step // 2) & 1) ^ 1)
        if GATE == 1:
            if mild == 0:  # (the factored form has no weights of pairs)
                high = R.to(gl.float32)
                e = differences(high, acc)
                if R.dtype == gl.float64:  # see pair_decay of walk.py
                    e += differences((R - high).to(gl.float32), acc)
                P = P * gl.exp2(-e if MIRROR else e)
        elif GATE == 2:
            if mild == 0:
                P = P * gl.exp2(gamma * (j[None, :] - i[:, None] if BACK else i[:, None] - j[None, :]).to(gl.float32))
        if GATE != 0:
            if MIRROR:
                D = gl.exp2((end - R).to(gl.float32) + due)
                U = gl.exp2((R - end).to(gl.float32) - due if mild != 0 else (R - head).to(gl.float32))
                gain = gl.exp2((end - head).to(gl.float32) + due)
                due = head.to(gl.float32)
            else:
                D = gl.exp2(R.to(gl.float32))
                U = gl.exp2(-R.to(gl.float32) if mild != 0 else (end - R).to(gl.float32))
                gain = gl.exp2(end.to(gl.float32))
            d_s.index(sp).store(D)
            u_s.index(sp).store(U)
            gain_s.index(sp).store(gl.full([C], 1.0, gl.float32, flat) * gain)
        if PAIRS:
            here = place(step, t0, chunks, BACK)
            A = gl.where(i[:, None] < j[None, :] if BACK else i[:, None] > j[None, :], P * A, 0.0)
            if mild != 0:
                A = A * gl.convert_layout(D, gl.SliceLayout(1, acc))[:, None]
                A = A * gl.convert_layout(U, gl.SliceLayout(0, acc))[None, :]
            gl.store(parts + NC * 4 * size + here + i, scale * gl.sum(A, 1), mask=i < count)
            write_by_warps(inside + here, scale * by_warps(A), size, count)
            if column == 0:
                after = gl.where(step + 1 < chunks, next_head.to(gl.float32) if GATE == 1 else gamma, due)
                gl.store(factor + here // C * block_size, gl.exp2(end.to(gl.float32) + after))
        keep = i[:, None] <= j[None, :] if BACK else i[:, None] >= j[None, :]
        P = gl.where(keep, P, 0.0)  # (off the mask P may be inf)
        p_s.index(sp).store(P.to(p_s.dtype))
        if NORMALIZE:
            found = gl.convert_layout(sum_of_two(met), gl.SliceLayout(1, acc))
            if GATE != 0:
                found = found * gl.convert_layout(D, gl.SliceLayout(1, acc))
            r_s.index(sp).store(1.0 / (scale * (gl.sum(P, 1) + found) + EPS))
            if GATE != 0:
                w_s.permute([1, 0]).store(split_in_two(U, two).to(w_s.dtype))
        fence_async_shared()
        mbarrier.arrive(p_full.index(sp), count=1)
        if NORMALIZE:
            added = warpgroup_mma(xb.permute([1, 0]), w_s.permute([1, 0]), nothing, use_acc=False, is_async=True)
            added = warpgroup_mma_wait(0, deps=[added])
            mbarrier.arrive(b_empty.index(step % SB), count=1)
            if GATE != 0:
                z = z * gain
            z += sum_of_two(added)
            z_s.permute([1, 0]).store(split_in_two(z, two).to(z_s.dtype))
            fence_async_shared()
    if NORMALIZE and HAS_S1:
        if column == 0:
            gl.store(S1 + N + m * (N + 1), z, mask=m < M)


@gluon.jit
def are_mild(G, gamma, due, t0, t1, GATE: gl.constexpr, MIRROR: gl.constexpr):
    """Whether every E of the segment is below exp2(80): it is that of -R, or mirrored of R - R_end - due."""
    if GATE == 2:
        most = gl.abs(gamma) * C
    else:
        flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        i = gl.arange(0, 4096, layout=flat)
        found = gl.zeros([4096], gl.float32, flat)
        for t in range(t0, t1, 4096):
            found = gl.maximum(found, gl.abs(gl.load(G + t + i, mask=i < t1 - t, other=0.0).to(gl.float32)))
        most = gl.max(found, 0)
    if MIRROR:
        return ((most < 26.0) & (gl.abs(due) < 26.0)).to(gl.int32)
    else:
        return (most < 80.0).to(gl.int32)


@gluon.jit
def barriers(N: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def shared(
    wide, narrow, out,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, NORMALIZE: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Tiles and barriers of a program. wide, narrow and out: descriptors of tiles of BM columns, of BN, and of out."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], wide.dtype)
    a_s = gl.allocate_shared_memory(wide.dtype, [SA] + wide.block_type.shape, wide.layout)
    b_s = gl.allocate_shared_memory(wide.dtype, [SB] + wide.block_type.shape, wide.layout)
    c_s = gl.allocate_shared_memory(narrow.dtype, [SB * NC] + narrow.block_type.shape, narrow.layout)
    x_s = c_s
    if SUMS:
        x_s = gl.allocate_shared_memory(narrow.dtype, [SB * NC] + narrow.block_type.shape, narrow.layout)
    p_s = gl.allocate_shared_memory(wide.dtype, [2, C, C], square)
    d_s = gl.allocate_shared_memory(gl.float32, [2, C], line)
    u_s = gl.allocate_shared_memory(gl.float32, [2, C], line)
    gain_s = gl.allocate_shared_memory(gl.float32, [2, C], line)
    r_s = gain_s
    sums_s = (r_s, p_s, p_s)
    if NORMALIZE:
        r_s = gl.allocate_shared_memory(gl.float32, [2, C], line)
        flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, C], wide.dtype)
        z_s = gl.allocate_shared_memory(wide.dtype, [8, BM], flat)
        w_s = gl.allocate_shared_memory(wide.dtype, [8, C], flat)
        sums_s = (r_s, z_s, w_s)
    out_s = gl.allocate_shared_memory(out.dtype, [NC] + out.block_type.shape, out.layout)
    a_full, a_empty = barriers(SA, 1), barriers(SA, NC + 1)
    b_full, b_empty = barriers(SB, 1), barriers(SB, NC + 1)
    p_full, p_empty = barriers(2, 1), barriers(2, NC)
    fence_async_shared()
    return a_s, b_s, c_s, x_s, p_s, d_s, u_s, gain_s, sums_s, out_s, a_full, a_empty, b_full, b_empty, p_full, p_empty


@gluon.jit
def role(
    a, b, c, x, out, G, gamma, S0, s_slot, s_h, s_m, s_n, S1, slot, h, column, T, HA, HC, HV, M, N, cuts, L,
    scale, in_scale, out_scale, rho, kept, across, factor, heads, blocks,
    smem,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, GATE: gl.constexpr, MIRROR: gl.constexpr,
    REVERSE: gl.constexpr, NORMALIZE: gl.constexpr, EPS: gl.constexpr, SUMS: gl.constexpr, HAS_S0: gl.constexpr,
    HAS_S1: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One role, for one slot and head and the columns from `column` on. SUMS: and what dg is made of."""
    BACK: gl.constexpr = REVERSE != MIRROR
    batch = slot // cuts
    t0 = slot % cuts * L
    t1 = gl.minimum(t0 + L, T)
    chunks = gl.cdiv(t1 - t0, C)
    ha = h // (HV // HA)
    hc = h // (HV // HC)
    G += (batch * HV + h).to(gl.int64) * T
    gamma2 = head_gate(gamma, h, GATE)
    due = 0.0  # what a mirrored state owes where the slot ends
    if MIRROR and GATE != 0:
        own, due = owed(G, gamma2, t0, t1, 0, T, GATE, REVERSE)
        out_scale *= gl.exp2(own)
    elif SUMS:
        _, due = owed(G, gamma2, t0, t1, 0, T, GATE, REVERSE)
    S0 += slot.to(gl.int64) * s_slot + h.to(gl.int64) * s_h
    S1 += (slot * HV + h).to(gl.int64) * M * (N + NORMALIZE)
    read = a, b, c, x, batch, ha, hc, t0, chunks, column
    decay = G, gamma2, due, t1
    written = out, batch, h, t0, chunks, column, scale
    ends = S0, s_m, s_n, S1, M, N, in_scale, out_scale
    key_sums = S0, s_m, s_n, S1, M, N, scale
    size = heads.to(gl.int64) * T
    width = gl.cdiv(N, NC * BN) * NC  # consumers that share a state, over all programs
    first = column // BN  # of them: the first of this program
    rho += (batch * HV + h).to(gl.int64) * T
    inside = rho + (width * 4 + width // NC + first // NC * 4) * size
    # rows of rho: for each program those of its consumers' warps and one of its scores; of scores' warps; of consumers'
    parts = rho + ((width * 4 + width // NC * 5 + first * 4) if MIRROR else first * 4 + first // NC) * size
    block = batch.to(gl.int64) * blocks * HV + h
    kept += (block * width + first) * (BN * BM)
    across += (block * width + first) * 4
    sums = parts, inside, size, kept, across, factor + block, (batch * 0 + HV).to(gl.int64), width, t1
    mild = 0  # (float16 has not the range for the factored form, and the normaliser wants the weights of pairs)
    if GATE != 0 and out.dtype == gl.bfloat16 and not NORMALIZE:
        mild = are_mild(G, gamma2, due, t0, t1, GATE, MIRROR)
        gl.thread_barrier()  # Triton puts what it passes to partitions where other warps may still read the maximum
    # (constants in a tuple with a name would become numbers of the run)
    if NC == 2 and BM == 256:
        gl.warp_specialize([
            (scores, (
                read, decay, mild, key_sums, sums, smem, BM, SA, SB, NC, GATE, MIRROR, REVERSE, NORMALIZE, EPS, SUMS,
                HAS_S0, HAS_S1, True,
            )),
            (consumer, (
                0, written, ends, mild, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, HAS_S0, HAS_S1,
            )),
            (consumer, (
                1, written, ends, mild, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, HAS_S0, HAS_S1,
            )),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    elif NC == 2:
        gl.warp_specialize([
            (scores, (
                read, decay, mild, key_sums, sums, smem, BM, SA, SB, NC, GATE, MIRROR, REVERSE, NORMALIZE, EPS, SUMS,
                HAS_S0, HAS_S1, False,
            )),
            (consumer, (
                0, written, ends, mild, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, HAS_S0, HAS_S1,
            )),
            (consumer, (
                1, written, ends, mild, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, HAS_S0, HAS_S1,
            )),
            (copies, (read, smem, BM, SA, SB, NC, BACK, SUMS)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (scores, (
                read, decay, mild, key_sums, sums, smem, BM, SA, SB, NC, GATE, MIRROR, REVERSE, NORMALIZE, EPS, SUMS,
                HAS_S0, HAS_S1, False,
            )),
            (consumer, (
                0, written, ends, mild, sums, smem, BM, SA, SB, NC, GATE, BACK, MIRROR, NORMALIZE, SUMS, HAS_S0, HAS_S1,
            )),
            (copies, (read, smem, BM, SA, SB, NC, BACK, SUMS)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["T", "cuts", "L", "in_scale", "out_scale"])
def walk(
    a, b,  # descriptors of [B, HA, T, M] in tiles [C, BM]
    c,  # of [B, HC, T, N] in tiles [C, BN]
    out,  # of [B, HV, T, N], likewise
    G,  # [B * HV, T]
    gamma,  # [HV]
    S0,  # [slots, HV, M, N] states in which the slots start, times in_scale
    s_slot, s_h, s_m, s_n,
    S1,  # [slots, HV, M, N] out, contiguous: where they end, times out_scale
    T, HA, HC, HV, M, N, cuts, L, scale, in_scale, out_scale,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, GATE: gl.constexpr, MIRROR: gl.constexpr,
    REVERSE: gl.constexpr, NORMALIZE: gl.constexpr, EPS: gl.constexpr, HAS_S0: gl.constexpr, HAS_S1: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Any one role. Dense sequences of `cuts` segments of L tokens each, as LAYOUT 0 of chunk.py."""
    tiles = gl.cdiv(N, NC * BN)
    pid = gl.program_id(0)
    smem = shared(a, c, out, BM, SA, SB, NC, NORMALIZE, False)
    role(
        a, b, c, c, out, G, gamma, S0, s_slot, s_h, s_m, s_n, S1, pid // tiles // HV, pid // tiles % HV,
        pid % tiles * (NC * BN), T, HA, HC, HV, M, N, cuts, L, scale, in_scale, out_scale, G, G, G, G, T, T,
        smem, BM, SA, SB, NC, GATE, MIRROR, REVERSE, NORMALIZE, EPS, False, HAS_S0, HAS_S1, REGISTERS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["T", "cuts", "L", "d_scale", "heads", "blocks"])
def backward(
    q, k, v, do,  # descriptors in tiles [C, BM]
    q_n, k_n, do_n,  # in tiles [C, BN]
    dq, dk, dv,  # out, in tiles [C, BN]
    G, gamma,
    S0, s_slot, s_h, s_k, s_v,  # [slots, HV, K, V] states in which the slots start
    dS1, d_slot, d_h, d_k, d_v,  # [slots, HV, K, V] their gradients where the slots end, times d_scale
    dS0,  # [slots, HV, K, V] out, contiguous
    rho,  # [parts, B * HV, T] out, SUMS: q.dq and k.dk as gate_gradient takes them
    kept,  # [B * blocks, HV, a state] dS where every chunk ends, as consumers hold it: from ROLES 2 to ROLES 1
    across,  # [B * blocks, HV, parts] out: <S where the chunk starts, dS where it ends>
    factor,  # [B * blocks, HV] out: the decay between the two
    T, H, HV, K, V, cuts, L, scale, d_scale, heads, blocks,
    BM: gl.constexpr, SA: gl.constexpr, SB: gl.constexpr, NC: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr,
    SUMS: gl.constexpr, ROLES: gl.constexpr, HAS_S0: gl.constexpr, HAS_DS1: gl.constexpr,
    HAS_DS0: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq, dk and dv side by side: what one of them has read, the others find in L2. For K and V up to BM.

    ROLES: the sum of 1 (dq), 2 (dk) and 4 (dv). With SUMS, first 6, then 1, which reads what dk keeps.
    """
    TK = gl.cdiv(K, NC * BN)
    TV = gl.cdiv(V, NC * BN)
    pid = gl.program_id(0)
    first = 0 if ROLES & 1 else TK
    count = TK * (ROLES & 1) + TK * (ROLES >> 1 & 1) + TV * (ROLES >> 2)
    if SUMS and NC == 2:  # programs are few, and those of dk the longer ones: they come before those of dv
        pairs = gl.num_programs(0) // count
        tile = first + pid // pairs
        pair = pid % pairs
    else:
        tile = first + pid % count
        pair = pid // count
    h = pair % HV
    slot = pair // HV
    smem = shared(q, q_n, dq, BM, SA, SB, NC, False, SUMS)
    if ROLES & 1:
        if tile < TK:
            role(
                do, v, k_n, q_n, dq, G, gamma, S0, s_slot, s_h, s_v, s_k, dS0, slot, h, tile * (NC * BN),
                T, HV, H, HV, V, K, cuts, L, scale, 1.0, 1.0, rho, kept, across, factor, heads, blocks,
                smem, BM, SA, SB, NC, GATE, False, REVERSE, False, 0.0, SUMS, HAS_S0, False, REGISTERS,
            )  # fmt: skip
    if ROLES & 2:
        if tile >= TK and tile < 2 * TK:
            role(
                v, do, q_n, k_n, dk, G, gamma, dS1, d_slot, d_h, d_v, d_k, dS0, slot, h, (tile - TK) * (NC * BN),
                T, HV, H, HV, V, K, cuts, L, scale, d_scale, 1.0, rho, kept, across, factor, heads, blocks,
                smem, BM, SA, SB, NC, GATE, True, REVERSE, False, 0.0, SUMS, HAS_DS1, False, REGISTERS,
            )  # fmt: skip
    if ROLES & 4:
        if tile >= 2 * TK:
            role(
                k, q, do_n, do_n, dv, G, gamma, dS1, d_slot, d_h, d_k, d_v, dS0, slot, h, (tile - 2 * TK) * (NC * BN),
                T, H, HV, HV, K, V, cuts, L, scale, d_scale, scale, rho, kept, across, factor, heads, blocks,
                smem, BM, SA, SB, NC, GATE, True, REVERSE, False, 0.0, False, HAS_DS1, HAS_DS0, REGISTERS,
            )  # fmt: skip
