"""The pass that computes every tensor of causal linear attention: o, dq, dk, dv and the states.

    LA (a, b, c):  S_t = exp(g_t) S_{t-1} + b_t c_t^T        out_t = a_t S_t        causal
    LA~(a, b, c):  S_t = exp(g_{t+1}) S_{t+1} + b_t c_t^T    out_t = a_t S_t        anticausal ("mirrored")
    o = s LA(q, k, v)   dq = s LA(do, v, k)   dv = s LA~(k, q, do)   dk = s LA~(v, do, q)      s = scale

dq and dk hold the state transposed: it is loaded with swapped strides, because transposing the result of a
matrix product is miscompiled on Hopper (Triton 3.4.0 to 3.7.0). Only tiles fresh from memory are transposed here.
The mirrored state is held divided by s, so that one factor s on the output serves all four roles.

`walk` goes by chunks of C tokens. R_i is the log2-decay from the start of the chunk to token i, inclusive, in the order
in which the operator walks (op.reverse: from the chunk's end), and R_end the decay of the whole chunk. Then

    out = s ((a b^T * W) c + D * (a S))        S <- exp2(R_end) S + b^T (U * c)
    LA : W_ij = exp2(R_i - R_j)   D_i = exp2(R_i)           U_j = exp2(R_end - R_j)
    LA~: W_ij = exp2(R_j - R_i)   D_i = exp2(R_end - R_i)   U_j = exp2(R_j)

The mirrored state owes the decay of the token that it reached last: that factor ("due") is applied when the next chunk
reads the state. So U = exp2(R_j - R_first) has a 1 in it, as in LA, and U c stays in the range of float16. Where a
mirrored state is written to memory between two segments, the reader finds the gate of that token again.

Exponents are differences under the causal mask: nothing overflows, however strong the decay. (Those of pairs off the
mask may; the mask must come after them.) Where it is mild, the forward takes a cheaper form with exp2(-R): see
`walk_safely`.

The normaliser is one more value column that is always 1: its state z [K] is float32, its gradient column is dden.
With rden = 1 / (s q.z + eps), the gradient of the numerator is do * rden; that factor goes onto P, D and U in float32,
so that do itself is never rounded again.

`walk_tokens` is the same function one token at a time, in exact float32 without matrix units.

    B batch   T time   H key heads   HV value heads   K key width   V value width   C chunk   N sequences
    M, N      rows and columns of the state as a role holds it ([K, V], or [V, K] transposed); BM, BN their tiles
"""

import triton
import triton.language as tl

# ROLE: 0 o, 1 dq, 2 dv, 3 dk (2 and 3 are mirrored).   GATE: 0 none, 1 g (R from memory), 2 g_gamma (R = (i + 1) gamma)


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of a matrix product. TF32 units cut float32 off after 10 bits, which biases: round it before."""
    x = x.to(DTYPE)
    if tl.float32 == DTYPE and PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def remainder(x, high, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What rounding took off x, as an operand, and the factor to put back on its product.

    float16 has no numbers below 6e-8, where weights under strong decay lie: there the tile is scaled to 1 first.
    """
    low = x - high.to(tl.float32)
    factor = 1.0
    if tl.float16 == DTYPE:
        factor = tl.maximum(tl.max(tl.max(tl.abs(low), 1), 0), 1e-30)
        low = low * (1.0 / factor)
    return operand(low, DTYPE, PRECISION), factor


@triton.jit
def plus(x, y, factor, z, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """z + factor x y"""
    if tl.float16 == DTYPE:
        return z + factor * tl.dot(x, y, input_precision=PRECISION)
    return tl.dot(x, y, z, input_precision=PRECISION)


@triton.jit
def parts(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A float32 vector as sixteen rows of operands: its rounding, twice what rounding took off, zeros.

    Rows, for the products to transpose: sixteen columns in memory order are miscompiled (docs/kernels, hazards).
    """
    row = tl.arange(0, 16)[:, None]
    high = operand(x, DTYPE, PRECISION).to(tl.float32)
    middle = operand(x - high, DTYPE, PRECISION).to(tl.float32)
    low = x - high - middle
    x = tl.where(row == 0, high[None, :], tl.where(row == 1, middle[None, :], low[None, :]))
    return operand(tl.where(row < 3, x, 0.0), DTYPE, PRECISION)


@triton.jit
def weighted(x, weight, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """sum over m of x_im weight_m in float32, as a product with sixteen columns: x stays in shared memory.

    (float16 has not the range for the parts, and exact products are no faster.)
    """
    if PRECISION == "ieee" or tl.float16 == DTYPE:
        return tl.sum(x.to(tl.float32) * weight[None, :], 1)
    else:
        return tl.sum(tl.dot(x, tl.trans(parts(weight, DTYPE, PRECISION)), input_precision=PRECISION), 1)


@triton.jit
def weighted_rows(x, weight, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """sum over i of weight_i x_im, likewise."""
    if PRECISION == "ieee" or tl.float16 == DTYPE:
        return tl.sum(x.to(tl.float32) * weight[:, None], 0)
    else:
        return tl.sum(tl.dot(tl.trans(x), tl.trans(parts(weight, DTYPE, PRECISION)), input_precision=PRECISION), 1)


@triton.jit
def rows(p, stride, t, i, live, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [C, BLOCK] of a [T, WIDTH] tensor from token t and column `first` on; zeros outside.

    p is a pointer to the rows of a head, `stride` its token stride; or a descriptor, by which the hardware copies a
    tile to shared memory, and `stride` the place of the rows in it: batch and head in one of [B, H, T, WIDTH], end and
    head in one of packed sequences, where tokens from the end on are outside (`view_of` in plan.py).
    """
    if isinstance(p, tl.core.tensor_descriptor_base):
        if len(p.block_shape) == 4:
            x = p.load([stride[0], stride[1], t.to(tl.int32), first])
        else:
            x = p.load([1 << 30, stride[0], stride[1], ((1 << 30) - stride[0] + t).to(tl.int32), first])
        x = x.reshape(i.shape[0], BLOCK)
    else:
        col = first + tl.arange(0, BLOCK)
        mask = live[:, None]
        if WIDTH % BLOCK != 0:
            mask = mask & (col < WIDTH)[None, :]
        x = tl.load(p + t * stride + i[:, None] * stride + col[None, :], mask=mask, other=0.0)
    return x


@triton.jit
def store_rows(p, stride, t, i, live, col, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    p = p + t * stride + i[:, None] * stride + col[None, :]
    mask = live[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (col < WIDTH)[None, :]
    tl.store(p, value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def decays(
    gate, gamma, t, i, live, count, GATE: tl.constexpr, REVERSE: tl.constexpr, AT_ONCE: tl.constexpr = False
):  # fmt: skip
    """R of the tokens of a chunk, of its first (in the operator's order), and of all of it.

    AT_ONCE: R waits for no other load. But then Triton's pipeline no longer prefetches it: which one is faster depends
    on what else the loop waits for (docs/kernels).
    """
    if GATE == 1:
        head = tl.load(gate + t + (count - 1 if REVERSE else 0))
        end = tl.load(gate + t + (0 if REVERSE else count - 1))
        # past the end: that of the last token, so no exponent is positive
        if AT_ONCE:
            R = tl.load(gate + t + tl.minimum(i, count - 1))
        else:
            R = tl.load(gate + t + i, mask=live, other=0.0)
            R = tl.where(live, R, head if REVERSE else end)
    else:
        head = gamma
        end = gamma * count
        R = gamma * (tl.maximum(count - i, 1) if REVERSE else tl.minimum(i + 1, count))
    return R, head, end


@triton.jit
def factors(R, head, end, due, MIRROR: tl.constexpr):
    """U, D, the decay of the state over the chunk, and what it owes then (see above)."""
    if MIRROR:
        U = tl.exp2((R - head).to(tl.float32))
        D = tl.exp2((end - R).to(tl.float32) + due)
        gain = tl.exp2((end - head).to(tl.float32) + due)
        due = head.to(tl.float32)
    else:
        U = tl.exp2((end - R).to(tl.float32))
        D = tl.exp2(R.to(tl.float32))
        gain = tl.exp2(end.to(tl.float32))
    return U, D, gain, due


@triton.jit
def pair_decay(P, R, gamma, i, GATE: tl.constexpr, MIRROR: tl.constexpr):
    """P * W. R of strong decays is in the thousands: where it comes in float64, differences keep its last digits."""
    if GATE == 2:
        return P * tl.exp2(gamma * tl.abs(i[:, None] - i[None, :]))  # exact, where a difference of two R is not
    high = R.to(tl.float32)
    e = high[None, :] - high[:, None] if MIRROR else high[:, None] - high[None, :]
    if R.dtype == tl.float64:
        low = (R - high).to(tl.float32)
        e += low[None, :] - low[:, None] if MIRROR else low[:, None] - low[None, :]
    return P * tl.exp2(e)


@triton.jit
def split(x, TWICE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand; and, TWICE, what rounding took off, with its factor."""
    high = operand(x, DTYPE, PRECISION)
    if TWICE:
        low, factor = remainder(x, high, DTYPE, PRECISION)
        return high, low, factor
    return high, high, 1.0


@triton.jit
def products(xa, xb, S, TWICE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T and a S."""
    high = operand(S, DTYPE, PRECISION)
    if TWICE:  # P last: it would wait in registers
        y = tl.dot(xa, high, input_precision=PRECISION)
        low, factor = remainder(S, high, DTYPE, PRECISION)
        y = plus(xa, low, factor, y, DTYPE, PRECISION)
        P = tl.dot(xa, tl.trans(xb), input_precision=PRECISION)
    else:
        P = tl.dot(xa, tl.trans(xb), input_precision=PRECISION)
        y = tl.dot(xa, high, input_precision=PRECISION)
    return P, y


@triton.jit
def product(a, x, TWICE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a x, with an x from memory whose rounding goes through the matrix units too."""
    high, low, factor = split(x, TWICE, DTYPE, PRECISION)
    y = tl.dot(a, high, input_precision=PRECISION)
    if TWICE:
        y = plus(a, low, factor, y, DTYPE, PRECISION)
    return y


@triton.jit
def output(
    P,  # [C, C]  a b^T
    y,  # [C, BN]  a S
    xc,  # [C, BN]
    xx,  # [C, BN]  for RHO: q for DQ, k for DK
    z,  # [BN]  for DQ and DK, of the normaliser
    w,  # [C]  rden
    dd,  # [C]  dden
    R,  # [C]
    D,  # [C]
    gamma,
    rho,  # [C]  pointers: s sum_n x_n out_n without the term j = t; for DK only the part from tokens of the block
    rho_rest,  # [C]  DK: the part from the state where the block ends (see gate_gradient)
    i,
    live,
    scale,
    ROLE: tl.constexpr,
    GATE: tl.constexpr,
    BACK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RHO: tl.constexpr,
    TWICE: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTORED: tl.constexpr = False,
):
    """s ((a b^T * W) c + D * (a S)), and the sum of every row of weights where the normaliser divides by it."""
    DTYPE: tl.constexpr = xc.dtype
    if NORMALIZE:  # do carries the factor rden; dden is its column that meets the ones of v
        if ROLE == 1:
            P = P * w[:, None] + dd[:, None]
            y = y * w[:, None] + dd[:, None] * z[None, :]
        elif ROLE == 2:
            P = P * w[None, :]
        elif ROLE == 3:
            P = P * w[None, :] + dd[None, :]
            y += z[None, :]
    if RHO:
        own = tl.sum(tl.where(i[:, None] == i[None, :], P, 0.0), 1)
        keep = i[:, None] < i[None, :] if BACK else i[:, None] > i[None, :]
    else:
        keep = i[:, None] <= i[None, :] if BACK else i[:, None] >= i[None, :]
    if GATE != 0 and not FACTORED:
        P = pair_decay(P, R, gamma, i, GATE, ROLE >= 2)
        y = y * D[:, None]
    P = tl.where(keep, P, 0.0)
    high = operand(P, DTYPE, PRECISION)
    if RHO:
        x = xx.to(tl.float32)
    if RHO and ROLE == 3:
        tl.store(rho_rest + i, scale * tl.sum(x * y, 1), mask=live)
        rest = y
        y = tl.dot(high, xc, input_precision=PRECISION)
    else:
        y = tl.dot(high, xc, y, input_precision=PRECISION)
    if TWICE or (RHO and tl.float16 == DTYPE):  # dg may be as small as the weights that float16 does not hold
        low, factor = remainder(P, high, DTYPE, PRECISION)
        y = plus(low, xc, factor, y, DTYPE, PRECISION)
    if FACTORED:
        y = y * D[:, None]
    if RHO:
        tl.store(rho + i, scale * tl.sum(x * y, 1), mask=live)
        y += own[:, None] * xc.to(tl.float32)
        if ROLE == 3:
            y += rest
    total = 0.0
    if NORMALIZE and ROLE == 0:
        total = tl.sum(P, 1)
    return y * scale, total


@triton.jit
def walk(
    a,  # [T, M] this head's rows; the role decides which tensor
    a_t,  # its token stride; the last dimension is contiguous
    b,  # [T, M]
    b_t,
    c,  # [T, N]
    c_t,
    out,  # [T, N]
    out_t,
    x,  # [T, N]  q for DQ, k for DK
    x_t,
    rho,  # [T]  out: s sum_n x_tn out_tn without the term j = t; for DK only the part from tokens of the block
    rho_rest,  # [T]  out, DK: the part from the state where the block ends (see gate_gradient)
    gate,  # [T]  R, contiguous
    gamma,  # float: log2-decay of this head, for GATE 2
    rden,  # [T]  backward of the normaliser
    dden,  # [T]
    S,  # [BM, BN] the state where the walk begins: float32, or an operand if it does not move
    z,  # its column (or row, transposed) of the normaliser: [BM], or [BN] for DQ and DK
    due,  # log2-decay that a mirrored S still owes
    t0,  # first token of the segment, int64
    t1,  # its end
    n0,  # first column of this tile of the state
    scale,
    EPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
    ROLE: tl.constexpr,
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RHO: tl.constexpr,
    MOVES: tl.constexpr,  # False: the walk is one chunk, and the state at its end is not wanted
    PRECISION: tl.constexpr,
    FACTORED: tl.constexpr = False,
):
    """Walks the tokens [t0, t1) by chunks, writes out, and returns the state at the end of the walk."""
    MIRROR: tl.constexpr = ROLE >= 2
    BACK: tl.constexpr = REVERSE != MIRROR  # walks from t1 down to t0
    COPIED: tl.constexpr = isinstance(b, tl.core.tensor_descriptor_base)
    DTYPE: tl.constexpr = b.dtype if COPIED else b.dtype.element_ty
    # With the normaliser, the means of k and v drop out of dq and dk, and with them most of S and P: there, what
    # rounding takes off S and P goes through the matrix units too.
    TWICE: tl.constexpr = NORMALIZE and (ROLE == 1 or ROLE == 3) and PRECISION != "ieee"
    AT_ONCE: tl.constexpr = COPIED and not NORMALIZE
    i = tl.arange(0, C)
    n = n0 + tl.arange(0, BN)
    chunks = tl.cdiv((t1 - t0).to(tl.int32), C) if MOVES else 1
    due += tl.zeros([], tl.float32)  # not a constant: the loop changes it
    for step in range(0, chunks):
        t = t0 + (chunks - 1 - step if BACK else step) * C
        count = tl.minimum(t1 - t, C).to(tl.int32)
        live = i < count
        xa = operand(rows(a, a_t, t, i, live, 0, M, BM), DTYPE, PRECISION)
        xb = operand(rows(b, b_t, t, i, live, 0, M, BM), DTYPE, PRECISION)
        xc = operand(rows(c, c_t, t, i, live, n0, N, BN), DTYPE, PRECISION)
        R, D, w, dd = 0.0, 0.0, 0.0, 0.0
        if GATE != 0:
            R, head, end = decays(gate, gamma, t, i, live, count, GATE, REVERSE, AT_ONCE)
            if FACTORED:
                D = tl.exp2(R.to(tl.float32))
                gain = tl.exp2(end.to(tl.float32))
                xc = operand(xc.to(tl.float32) * tl.exp2(-R.to(tl.float32))[:, None], DTYPE, PRECISION)
            else:
                U, D, gain, due = factors(R, head, end, due, MIRROR)
        if NORMALIZE and ROLE != 0:
            w = tl.load(rden + t + i, mask=live, other=0.0)
            dd = tl.load(dden + t + i, mask=live, other=0.0)

        P, y = products(xa, xb, S, TWICE, DTYPE, PRECISION)
        if NORMALIZE and ROLE == 0:
            qz = weighted(xa, z, DTYPE, PRECISION)
        xx = operand(rows(x, x_t, t, i, live, n0, N, BN), DTYPE, PRECISION) if RHO else xc
        y, total = output(
            P, y, xc, xx, z, w, dd, R, D, gamma, rho + t, rho_rest + t, i, live, scale,
            ROLE, GATE, BACK, NORMALIZE, RHO, TWICE, PRECISION, FACTORED,
        )  # fmt: skip
        if NORMALIZE and ROLE == 0:
            if GATE != 0:
                qz = qz * D
            y = y / (scale * (total + qz) + EPS)[:, None]
        store_rows(out, out_t, t, i, live, n, y, N, BN)
        if MOVES:
            if NORMALIZE and ROLE != 2:
                weight = dd if ROLE == 3 else tl.full([C], 1.0, tl.float32)
                if GATE != 0:
                    weight = weight * U
                    z = z * gain
                z += weighted_rows(xb if ROLE == 0 else xc, weight, DTYPE, PRECISION)
            if NORMALIZE and MIRROR:
                U = U * w if GATE != 0 else w
            if FACTORED:
                S = tl.dot(tl.trans(xb), xc, S, input_precision=PRECISION) * gain
            else:
                if GATE != 0:
                    S = S * gain
                if GATE != 0 or (NORMALIZE and MIRROR):
                    xc = operand(xc.to(tl.float32) * U[:, None], DTYPE, PRECISION)
                S = tl.dot(tl.trans(xb), xc, S, input_precision=PRECISION)
    if MOVES and MIRROR and GATE != 0:
        S = S * tl.exp2(due)
        if NORMALIZE:
            z = z * tl.exp2(due)
    return S, z


@triton.jit
def walk_states(
    b, b_t, c, c_t, gate, gamma, rden, dden, S, z, due, kept, kept_z, kept_n, kept_zn, t0, t1, n0,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, MIRROR: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Only the state moves: roles 0 and 2 without an output. Returns it at the end of the walk, and what it owes.

    KEEP: writes the state before every chunk, counted from t0, to `kept` [., M, N] and `kept_z` [., M].
    """
    BACK: tl.constexpr = REVERSE != MIRROR
    DTYPE: tl.constexpr = b.dtype.element_ty
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    if KEEP:
        kept += m.to(tl.int64)[:, None] * N + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        z_mask = (m < M) & (n0 == 0)
    chunks = tl.cdiv((t1 - t0).to(tl.int32), C)
    due += tl.zeros([], tl.float32)  # not a constant: the loop changes it
    for step in range(0, chunks):
        place = chunks - 1 - step if BACK else step
        t = t0 + place * C
        count = tl.minimum(t1 - t, C).to(tl.int32)
        live = i < count
        xb = operand(rows(b, b_t, t, i, live, 0, M, BM), DTYPE, PRECISION)
        xc = operand(rows(c, c_t, t, i, live, n0, N, BN), DTYPE, PRECISION)
        if KEEP:
            at = tl.cast(place, tl.int64)
            tl.store(kept + at * kept_n, S.to(kept.dtype.element_ty), mask=mask)
            if NORMALIZE:
                tl.store(kept_z + at * kept_zn + m, z, mask=z_mask)
        if GATE != 0:
            R, head, end = decays(gate, gamma, t, i, live, count, GATE, REVERSE)
            U, _, gain, due = factors(R, head, end, due, MIRROR)
            S = S * gain
        if NORMALIZE:
            weight = tl.load(dden + t + i, mask=live, other=0.0) if MIRROR else tl.full([C], 1.0, tl.float32)
            if GATE != 0:
                weight = weight * U
                z = z * gain
            z += weighted_rows(xb, weight, DTYPE, PRECISION)
            if MIRROR:
                w = tl.load(rden + t + i, mask=live, other=0.0)
                U = U * w if GATE != 0 else w
        if GATE != 0 or (NORMALIZE and MIRROR):
            xc = operand(xc.to(tl.float32) * U[:, None], DTYPE, PRECISION)
        S = tl.dot(tl.trans(xb), xc, S, input_precision=PRECISION)
    return S, z, due


@triton.jit
def mild(gate, gamma, t0, t1, C: tl.constexpr, GATE: tl.constexpr):
    """Whether exp2 of every R and of every -R is far inside the range of float32."""
    if GATE == 2:
        return tl.abs(gamma) * C < 80.0
    i = tl.arange(0, 1024)
    most = 0.0
    for t in range(t0, t1, 1024):
        most = tl.maximum(most, tl.max(tl.abs(tl.load(gate + t + i, mask=i < t1 - t, other=0.0).to(tl.float32)), 0))
    return most < 80.0


@triton.jit
def walk_safely(
    a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, rho_rest, gate, gamma, rden, dden, S, z, due, t0, t1, n0, scale,
    EPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    ROLE: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, RHO: tl.constexpr,
    MOVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk` of role 0, by the factored form where the gates of the whole segment allow it.

    W_ij = D_i E_j with E_j = exp2(-R_j) needs no exponential per pair of tokens, and one scaled c serves both products:
    out = s D * (tril(a b^T) (E c) + a S),  S <- exp2(R_end) (S + b^T (E c)).  It overflows under strong decay.
    """
    FACTORS: tl.constexpr = GATE != 0 and not NORMALIZE and out.dtype.element_ty != tl.float16
    if FACTORS and isinstance(b, tl.core.tensor_descriptor_base):
        # Two loops, of which one is empty: with g_gamma, the branches of an `if` would not share their memory.
        end = t1 if mild(gate, gamma, t0, t1, C, GATE) else t0
        S, z = walk(
            a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, rho_rest, gate, gamma, rden, dden, S, z, due, t0, end,
            n0, scale, EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, RHO, MOVES, PRECISION, True,
        )  # fmt: skip
        t1 = t0 + (t1 - end)
        S, z = walk(
            a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, rho_rest, gate, gamma, rden, dden, S, z, due, t0, t1,
            n0, scale, EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, RHO, MOVES, PRECISION,
        )  # fmt: skip
    elif FACTORS:  # by pointers, two loops would spill more
        if mild(gate, gamma, t0, t1, C, GATE):
            S, z = walk(
                a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, rho_rest, gate, gamma, rden, dden, S, z, due, t0, t1,
                n0, scale, EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, RHO, MOVES, PRECISION, True,
            )  # fmt: skip
        else:
            S, z = walk(
                a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, rho_rest, gate, gamma, rden, dden, S, z, due, t0, t1,
                n0, scale, EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, RHO, MOVES, PRECISION,
            )  # fmt: skip
    else:
        S, z = walk(
            a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, rho_rest, gate, gamma, rden, dden, S, z, due, t0, t1,
            n0, scale, EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, RHO, MOVES, PRECISION,
        )  # fmt: skip
    return S, z


@triton.jit
def walk_tokens(
    a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, rho_rest, gate, gamma, rden, dden, S, z, due, t0, t1, n0, scale,
    EPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    ROLE: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, RHO: tl.constexpr,
    MOVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk` with the same arguments, one token at a time; `gate` holds the log2-decay of each token.

    A mirrored state owes nothing here. With RHO, DK holds the state from outside the block (S) apart from what the
    tokens of the block add (Sb): what one of them adds to rho may be far below the rounding of the other.
    """
    MIRROR: tl.constexpr = ROLE >= 2
    BACK: tl.constexpr = REVERSE != MIRROR
    m = tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    tokens = (t1 - t0).to(tl.int32)
    APART: tl.constexpr = RHO and ROLE == 3
    if APART:
        Sb, zb = tl.zeros([BM, BN], tl.float32), tl.zeros([BN], tl.float32)
    for step in range(0, tokens):
        t = t1 - 1 - step if BACK else t0 + step
        xb = tl.load(b + t * b_t + m, mask=m < M, other=0.0).to(tl.float32)
        xc = tl.load(c + t * c_t + n, mask=n < N, other=0.0).to(tl.float32)
        # the factor exp(g) in two parts: its rounding error would compound over as many tokens as the state remembers
        if GATE != 0:
            factor = tl.exp2(tl.load(gate + t) if GATE == 1 else gamma.to(tl.float64))
            gain = factor.to(tl.float32)
            rest = (factor - gain).to(tl.float32)
        if NORMALIZE and ROLE != 0:
            w = tl.load(rden + t)
            dd = tl.load(dden + t)
        if GATE != 0 and not MIRROR:
            S = S * gain + S * rest
            if NORMALIZE:
                z = z * gain + z * rest

        xa = tl.load(a + t * a_t + m, mask=m < M, other=0.0).to(tl.float32)
        p = tl.sum(xa * xb, 0)
        y = tl.sum(xa[:, None] * S, 0)
        if NORMALIZE:
            if ROLE == 1:
                p = p * w + dd
                y = y * w + dd * z
            elif ROLE == 2:
                p = p * w
            elif ROLE == 3:
                p = p * w + dd
                y += z
        if RHO:
            xx = tl.load(x + t * x_t + n, mask=n < N, other=0.0).to(tl.float32)
            if APART:
                yb = tl.sum(xa[:, None] * Sb, 0) + zb
                tl.store(rho_rest + t, scale * tl.sum(xx * y, 0))
                tl.store(rho + t, scale * tl.sum(xx * yb, 0))
                y += yb
            else:
                tl.store(rho + t, scale * tl.sum(xx * y, 0))
        y = scale * (y + p * xc)
        if NORMALIZE and ROLE == 0:
            y = y / (scale * (p + tl.sum(xa * z, 0)) + EPS)
        tl.store(out + t * out_t + n, y.to(out.dtype.element_ty), mask=n < N)

        if APART:
            if NORMALIZE:
                zb += xc * dd
                xc = xc * w
            Sb += xb[:, None] * xc[None, :]
        else:
            if NORMALIZE:
                if ROLE == 0:
                    z += xb
                elif ROLE == 1:
                    z += xc
                elif ROLE == 3:
                    z += xc * dd
                if MIRROR:
                    xc = xc * w
            S += xb[:, None] * xc[None, :]
        if GATE != 0 and MIRROR:
            S = S * gain + S * rest
            if NORMALIZE and ROLE == 3:
                z = z * gain + z * rest
            if APART:
                Sb = Sb * gain + Sb * rest
                zb = zb * gain + zb * rest
    return S, z


@triton.jit
def walk_states_tokens(
    b, b_t, c, c_t, gate, gamma, rden, dden, S, z, due, kept, kept_z, kept_n, kept_zn, t0, t1, n0,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, MIRROR: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk_states` one token at a time, in exact float32. States owe nothing: `due` is 0."""
    BACK: tl.constexpr = REVERSE != MIRROR
    m = tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    if KEEP:
        kept += m.to(tl.int64)[:, None] * N + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        z_mask = (m < M) & (n0 == 0)
    tokens = (t1 - t0).to(tl.int32)
    for step in range(0, tokens):
        place = tokens - 1 - step if BACK else step
        t = t0 + place
        if KEEP and (step == 0 or (place + 1 if BACK else place) % C == 0):
            at = (place // C).to(tl.int64)
            tl.store(kept + at * kept_n, S.to(kept.dtype.element_ty), mask=mask)
            if NORMALIZE:
                tl.store(kept_z + at * kept_zn + m, z, mask=z_mask)
        xb = tl.load(b + t * b_t + m, mask=m < M, other=0.0).to(tl.float32)
        xc = tl.load(c + t * c_t + n, mask=n < N, other=0.0).to(tl.float32)
        zk = xb
        if NORMALIZE and MIRROR:
            zk = xb * tl.load(dden + t)
            xc = xc * tl.load(rden + t)
        if GATE != 0:
            factor = tl.exp2(tl.load(gate + t) if GATE == 1 else gamma.to(tl.float64))
            gain = factor.to(tl.float32)
            rest = (factor - gain).to(tl.float32)
            if not MIRROR:
                S = S * gain + S * rest
                z = z * gain + z * rest
        S += xb[:, None] * xc[None, :]
        if NORMALIZE:
            z += zk
        if GATE != 0 and MIRROR:
            S = S * gain + S * rest
            z = z * gain + z * rest
    return S, z, due
