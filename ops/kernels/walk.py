"""The pass that computes every tensor of causal linear attention: o, dq, dk, dv and the states.

    LA (a, b, c):  S_t = exp(g_t) S_{t-1} + b_t c_t^T        out_t = a_t S_t        causal
    LA~(a, b, c):  S_t = exp(g_{t+1}) S_{t+1} + b_t c_t^T    out_t = a_t S_t        anticausal ("mirrored")
    o = s LA(q, k, v)   dq = s LA(do, v, k)   dv = s LA~(k, q, do)   dk = s LA~(v, do, q)      s = scale

dq and dk hold the state transposed: it is loaded and stored with swapped strides, because transposing the result of a
matrix product is miscompiled on Hopper (Triton 3.4.0 to 3.7.0). Only tiles fresh from memory are transposed here.
The mirrored state is held divided by s, so that one factor s on the output serves all four roles.

`walk` goes by chunks of C tokens. R_i is the log2-decay from the start of the chunk to token i, inclusive, in the order
in which the operator walks (op.reverse: from the chunk's end), and R_end the decay of the whole chunk. Then

    out = s ((a b^T * W) c + D * (a S))        S <- exp2(R_end) S + b^T (U * c)
    LA : W_ij = exp2(R_i - R_j)   D_i = exp2(R_i)           U_j = exp2(R_end - R_j)
    LA~: W_ij = exp2(R_j - R_i)   D_i = exp2(R_end - R_i)   U_j = exp2(R_j)

The mirrored state owes the decay of the token that it reached last: that factor ("due") is applied when the next chunk
reads the state. So U = exp2(R_j - R_first) has a 1 in it, as in LA, and U c stays in the range of float16.

Exponents are differences under the causal mask: nothing overflows, however strong the decay. Where it is mild, the
forward takes a cheaper form with exp2(-R): see `walk_safely`.

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
def rows(p, stride, t, i, live, col, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [C, BLOCK] of a [T, WIDTH] tensor from token t on; zeros outside."""
    p = p + t * stride + i[:, None] * stride + col[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(p, mask=live[:, None], other=0.0)
    return tl.load(p, mask=live[:, None] & (col < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(p, stride, t, i, live, col, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    p = p + t * stride + i[:, None] * stride + col[None, :]
    mask = live[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (col < WIDTH)[None, :]
    tl.store(p, value.to(p.dtype.element_ty), mask=mask)


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
    rho,  # [T]  out: s sum_n x_tn out_tn without the term j = t (see gates.py)
    gate,  # [T]  R, contiguous
    gamma,  # float: log2-decay of this head, for HEAD_GATE
    rden,  # [T]  backward of the normaliser
    dden,  # [T]
    S,  # [BM, BN] float32, the state where the walk begins
    z,  # its column (or row, transposed) of the normaliser: [BM], or [BN] for DQ and DK
    t0,  # first token of the segment, int64
    t1,  # its end
    m0,  # first row and column of this tile of the state
    n0,
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
    OUT: tl.constexpr,  # False: only the state is wanted, and BM may be a part of M
    RHO: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTORED: tl.constexpr = False,
):
    """Walks the tokens [t0, t1) by chunks, writes out, and returns the state at the end of the walk."""
    MIRROR: tl.constexpr = ROLE >= 2
    BACK: tl.constexpr = REVERSE != MIRROR  # walks from t1 down to t0
    DTYPE: tl.constexpr = b.dtype.element_ty
    # dg is a long sum of q.dq - k.dk, where pairs of tokens must cancel; but dq rounds S where dk rounds U c. So what
    # rounding takes off P, S and U c goes through the matrix units too: about twice the digits of the dtype remain.
    TWICE: tl.constexpr = RHO and PRECISION != "ieee"
    i = tl.arange(0, C)
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    chunks = tl.cdiv((t1 - t0).to(tl.int32), C)
    due = 0.0
    for step in range(0, chunks):
        t = t0 + (chunks - 1 - step if BACK else step) * C
        count = tl.minimum(t1 - t, C).to(tl.int32)
        live = i < count
        xb = operand(rows(b, b_t, t, i, live, m, M, BM), DTYPE, PRECISION)
        xc = operand(rows(c, c_t, t, i, live, n, N, BN), DTYPE, PRECISION)

        # decays; a token past the end takes the R of its neighbour, so that no exponent is positive
        if GATE == 1:
            head = tl.load(gate + t + (count - 1 if REVERSE else 0))
            end = tl.load(gate + t + (0 if REVERSE else count - 1))
            R = tl.load(gate + t + i, mask=live, other=0.0)
            R = tl.where(live, R, head if REVERSE else end)
        elif GATE == 2:
            head = gamma
            end = gamma * count
            R = gamma * (tl.maximum(count - i, 1) if REVERSE else tl.minimum(i + 1, count))
        if FACTORED:
            E = tl.exp2((R - end if MIRROR else -R).to(tl.float32))
            D = tl.exp2((end - R if MIRROR else R).to(tl.float32))
            gain = tl.exp2(end.to(tl.float32))
            if RHO and ROLE == 1:
                last = (step == chunks - 1) & (i == (0 if BACK else count - 1))
            xf = xc.to(tl.float32) * E[:, None]
            xh = operand(xf, DTYPE, PRECISION)
        elif GATE != 0:
            if MIRROR:
                U = tl.exp2((R - head).to(tl.float32))
                D = tl.exp2((end - R).to(tl.float32) + due)
                gain = tl.exp2((end - head).to(tl.float32) + due)
                due = head.to(tl.float32)
            else:
                U = tl.exp2((end - R).to(tl.float32))
                D = tl.exp2(R.to(tl.float32))
                gain = tl.exp2(end.to(tl.float32))
            if RHO and ROLE == 1:  # the state at the end is for dg alone, which wants it without its last token
                U = tl.where((step == chunks - 1) & (i == (0 if BACK else count - 1)), 0.0, U)
        if NORMALIZE and ROLE != 0:
            w = tl.load(rden + t + i, mask=live, other=0.0)
            dd = tl.load(dden + t + i, mask=live, other=0.0)

        if OUT:
            xa = operand(rows(a, a_t, t, i, live, m, M, BM), DTYPE, PRECISION)
            P = tl.dot(xa, tl.trans(xb), input_precision=PRECISION)
            high = operand(S, DTYPE, PRECISION)
            y = tl.dot(xa, high, input_precision=PRECISION)
            if TWICE:
                y = tl.dot(xa, operand(S - high.to(tl.float32), DTYPE, PRECISION), y, input_precision=PRECISION)
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
            if FACTORED:
                pass
            elif GATE == 1:
                P = P * tl.exp2((R[None, :] - R[:, None] if MIRROR else R[:, None] - R[None, :]).to(tl.float32))
            elif GATE == 2:
                # the distance is exact, where a difference of two rounded R is not
                P = P * tl.exp2(gamma * tl.abs(i[:, None] - i[None, :]))
            P = tl.where(keep, P, 0.0)
            high = operand(P, DTYPE, PRECISION)
            if FACTORED:
                y = tl.dot(high, xh, y, input_precision=PRECISION)
                if TWICE:
                    y = tl.dot(operand(P - high.to(tl.float32), DTYPE, PRECISION), xh, y, input_precision=PRECISION)
                    y = tl.dot(high, operand(xf - xh.to(tl.float32), DTYPE, PRECISION), y, input_precision=PRECISION)
                y = y * D[:, None]
            else:
                if GATE != 0:
                    y = y * D[:, None]
                y = tl.dot(high, xc, y, input_precision=PRECISION)
            if RHO:
                if TWICE and not FACTORED:
                    y = tl.dot(operand(P - high.to(tl.float32), DTYPE, PRECISION), xc, y, input_precision=PRECISION)
                xx = operand(rows(x, x_t, t, i, live, n, N, BN), DTYPE, PRECISION)
                tl.store(rho + t + i, scale * tl.sum(xx.to(tl.float32) * y, 1), mask=live)
                y += own[:, None] * xc.to(tl.float32)
            y = y * scale
            if NORMALIZE and ROLE == 0:
                qz = tl.sum(xa.to(tl.float32) * z[None, :], 1)
                if GATE != 0:
                    qz = qz * D
                y = y / (scale * (tl.sum(P, 1) + qz) + EPS)[:, None]
            store_rows(out, out_t, t, i, live, n, y, N, BN)

        # the state moves on
        if FACTORED:
            if RHO and ROLE == 1:
                xf = tl.where(last[:, None], 0.0, xf)
                xh = operand(xf, DTYPE, PRECISION)
            S = tl.dot(tl.trans(xb), xh, S, input_precision=PRECISION)
            if TWICE:
                S = tl.dot(
                    tl.trans(xb), operand(xf - xh.to(tl.float32), DTYPE, PRECISION), S, input_precision=PRECISION
                )
            S = S * gain
        elif NORMALIZE:
            if ROLE != 2 or not OUT:  # dv itself needs no z
                if ROLE == 0:
                    zk = xb.to(tl.float32)
                elif ROLE == 1:
                    zk = xc.to(tl.float32)
                else:
                    zk = (xb if ROLE == 2 else xc).to(tl.float32) * dd[:, None]
                if GATE != 0:
                    zk = zk * U[:, None]
                    z = z * gain
                z += tl.sum(zk, 0)
            if MIRROR:
                U = U * w if GATE != 0 else w
        if GATE != 0 and not FACTORED:
            S = S * gain
        if FACTORED:
            pass
        elif GATE != 0 or (NORMALIZE and MIRROR):
            xc = xc.to(tl.float32) * U[:, None]
            high = operand(xc, DTYPE, PRECISION)
            S = tl.dot(tl.trans(xb), high, S, input_precision=PRECISION)
            if TWICE:
                S = tl.dot(
                    tl.trans(xb), operand(xc - high.to(tl.float32), DTYPE, PRECISION), S, input_precision=PRECISION
                )
        else:
            S = tl.dot(tl.trans(xb), xc, S, input_precision=PRECISION)
    if MIRROR and GATE != 0 and not FACTORED:
        S = S * tl.exp2(due)
        z = z * tl.exp2(due)
    return S, z


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
    a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, gate, gamma, rden, dden, S, z, t0, t1, m0, n0, scale,
    EPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    ROLE: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, OUT: tl.constexpr,
    RHO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk`, by the factored form where the gates of the whole segment allow it.

    W_ij = D_i E_j with E_j = exp2(-R_j) needs no exponential per pair of tokens, and one scaled c serves both products:
    out = s D * (tril(a b^T) (E c) + a S),  S <- exp2(R_end) (S + b^T (E c)).  It overflows under strong decay.
    """
    if GATE != 0 and not NORMALIZE and b.dtype.element_ty != tl.float16:
        if mild(gate, gamma, t0, t1, C, GATE):
            S, z = walk(
                a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, gate, gamma, rden, dden, S, z, t0, t1, m0, n0, scale,
                EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, OUT, RHO, PRECISION, True,
            )  # fmt: skip
        else:
            S, z = walk(
                a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, gate, gamma, rden, dden, S, z, t0, t1, m0, n0, scale,
                EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, OUT, RHO, PRECISION,
            )  # fmt: skip
    else:
        S, z = walk(
            a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, gate, gamma, rden, dden, S, z, t0, t1, m0, n0, scale,
            EPS, M, N, BM, BN, C, ROLE, GATE, REVERSE, NORMALIZE, OUT, RHO, PRECISION,
        )  # fmt: skip
    return S, z


@triton.jit
def walk_tokens(
    a, a_t, b, b_t, c, c_t, out, out_t, x, x_t, rho, gate, gamma, rden, dden, S, z, t0, t1, m0, n0, scale,
    EPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    ROLE: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, OUT: tl.constexpr,
    RHO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk` with the same arguments, one token at a time; `gate` holds the log2-decay of each token."""
    MIRROR: tl.constexpr = ROLE >= 2
    BACK: tl.constexpr = REVERSE != MIRROR
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    tokens = (t1 - t0).to(tl.int32)
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

        if OUT:
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
                tl.store(rho + t, scale * tl.sum(xx * y, 0))
            y = scale * (y + p * xc)
            if NORMALIZE and ROLE == 0:
                y = y / (scale * (p + tl.sum(xa * z, 0)) + EPS)
            tl.store(out + t * out_t + n, y.to(out.dtype.element_ty), mask=n < N)

        if RHO and ROLE == 1:
            xc = tl.where(step == tokens - 1, 0.0, xc)
        if NORMALIZE:
            if ROLE == 0:
                z += xb
            elif ROLE == 1:
                z += xc
            elif ROLE == 3:
                z += xc * dd
            elif not OUT:
                z += xb * dd
            if MIRROR:
                xc = xc * w
        S += xb[:, None] * xc[None, :]
        if GATE != 0 and MIRROR:
            S = S * gain + S * rest
            if NORMALIZE and (ROLE != 2 or not OUT):
                z = z * gain + z * rest
    return S, z
