"""What PyTorch is told about an operator, in the order in which it asks.

`Operator("chunk", ...)` registers `la::chunk` and `la::chunk_backward`:

- schema: hand-written, without defaults (rules are called without the arguments that equal a default)
- kernels: by device; each checks the contract first
- fake: shapes and dtypes without data, with the same checks
- autograd: reverse and forward mode, for both operators, to any order
- vmap: the new dimension joins the batch, or the heads (`rules.py`, with the next two)
- autocast: q, k and v are cast; gates and states are left alone
- FLOP formulas and DTensor sharding rules: when the PyTorch modules that ask for them are imported

and is the function that the public ones call: through the dispatcher, or in plain eager calls around it.
Why each is done this way: docs/registration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import cache_key, derivatives, late, private, rules

NAMESPACE = "la"
library = torch.library.Library(NAMESPACE, "FRAGMENT")
cache_key.mark(NAMESPACE)

FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? g_gamma, Tensor? initial_state, bool output_final_state, "
    "Tensor? cu_seqlens, float? scale, bool normalize, bool reverse) -> (Tensor o, Tensor? final_state)"
)
BACKWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? g_gamma, Tensor? initial_state, Tensor? cu_seqlens, "
    "float? scale, bool normalize, bool reverse, Tensor? o, Tensor do, Tensor? dfinal_state, bool gate_grad) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor? dg, Tensor? dg_gamma, Tensor? dinitial_state)"
)

Kernel = rules.Kernel
Forward = tuple[Tensor, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def define(name: str, schema: str) -> torch._ops.OpOverload:
    """Adds an operator to the namespace. `Autograd`, fakes and the rest are registered by name afterwards.

    Compiled graphs hand it the strides that eager code would: slices of a packed projection, uncopied (docs/compile).
    """
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# ------------------------------------------------------------------------------------------------------- fake functions


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
    reverse: bool,
) -> Forward:
    checks.attention(q, k, v, g, g_gamma, initial_state, cu_seqlens, normalize)
    state = None
    if output_final_state:
        shape = (checks.states(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3] + (1 if normalize else 0))
        state = v.new_empty(shape, dtype=checks.state_dtype(q))
    return v.new_empty(v.shape), state


def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
    reverse: bool,
    o: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
    gate_grad: bool,
) -> Gradients:
    checks.backward(q, k, v, g, g_gamma, initial_state, cu_seqlens, normalize, o, do, dfinal_state)

    def like(x: Tensor | None, wanted: bool = True) -> Tensor | None:
        return x.new_empty(x.shape) if x is not None and wanted else None

    gradients: Any = like(q), like(k), like(v), like(g, gate_grad), like(g_gamma, gate_grad), like(initial_state)
    return gradients


# -------------------------------------------------------------------------------------------------------------- kernels


def scale_of(q: Tensor, scale: float | None) -> float:
    """A float, as the schema makes of it where a call goes through the dispatcher."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _checked_forward(kernel: Kernel) -> Kernel:
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        g_gamma: Tensor | None,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
        scale: float | None,
        normalize: bool,
        reverse: bool,
    ) -> Forward:
        checks.attention(q, k, v, g, g_gamma, initial_state, cu_seqlens, normalize)
        scale = scale_of(q, scale)
        return kernel(q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse)

    return forward


def _checked_backward(kernel: Kernel) -> Kernel:
    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        g_gamma: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float | None,
        normalize: bool,
        reverse: bool,
        o: Tensor | None,
        do: Tensor,
        dfinal_state: Tensor | None,
        gate_grad: bool,
    ) -> Gradients:
        checks.backward(q, k, v, g, g_gamma, initial_state, cu_seqlens, normalize, o, do, dfinal_state)
        scale = scale_of(q, scale)
        return kernel(
            q, k, v, g, g_gamma, initial_state, cu_seqlens, scale, normalize, reverse, o, do, dfinal_state, gate_grad
        )

    return backward


# ------------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: Forward) -> None:
    """Keeps what the backward operator takes. The output itself only where the normaliser needs it."""
    q, k, v, g, g_gamma, initial_state, _, cu_seqlens, scale, normalize, reverse = inputs
    o = output[0] if normalize else None
    ctx.save_for_backward(q, k, v, g, g_gamma, initial_state, cu_seqlens, o)
    ctx.options = scale, normalize, reverse
    ctx.set_materialize_grads(False)


def _formula(operator: Operator) -> Kernel:
    """The autograd formula of the forward operator: a shuffle of arguments, since compiled graphs hold it."""

    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
        q, k, v, g, g_gamma, initial_state, cu_seqlens, o = ctx.saved_tensors
        scale, normalize, reverse = ctx.options
        if do is None and dfinal_state is None:
            return (None,) * 11
        if do is None:
            do = v.new_zeros(v.shape)
        gate_grad = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        run: Kernel = operator.backward
        # Here too a plain eager call goes around the dispatcher; gradients of gradients are for it to record.
        eager = private.AVAILABLE and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        tensors = (q, k, v, g, g_gamma, initial_state, cu_seqlens, do, dfinal_state)
        if eager and plain(*tensors) and not any(x is not None and private.inside_transform(x) for x in tensors):
            run = operator.backward_kernels.get(q.device.type, run)
        dq, dk, dv, dg, dg_gamma, dS0 = run(
            q, k, v, g, g_gamma, initial_state, cu_seqlens, scale, normalize, reverse, o, do, dfinal_state, gate_grad
        )
        return dq, dk, dv, dg, dg_gamma, dS0, None, None, None, None, None

    return backward


def _forward_function(operator: Operator, run: Kernel) -> Any:
    """The forward operator as a differentiable function around `run`."""

    class LinearAttention(private.SingleLevelFunction):
        _compiled_autograd_key = staticmethod(private.compiled_autograd_key)

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Forward:
            output: Forward = run(*inputs)
            _save(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:6], inputs[7])
            ctx.output_final_state = inputs[6]
            return output

        backward = staticmethod(_formula(operator))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Forward:
            q, k, v, g, g_gamma, initial_state, cu_seqlens, *_ = ctx.saved_tensors
            primals = (q, k, v, g, g_gamma, initial_state, ctx.output_final_state, cu_seqlens, *ctx.options)
            # Forward mode is off in here. Nested transforms (jvp of jvp) need it on for the levels below; this level
            # then must not see its own tangents again, so the primals shed them.
            nested = private.transforms_nested()
            if nested:
                primals = tuple(private.without_tangent(x) for x in primals)
            with private.forward_grad(nested), rules.uncast(q.device.type):
                return derivatives.tangent(operator.forward, primals, tangents)

    return LinearAttention


def _backward_function(operator: Operator, run: Kernel) -> Any:
    """The backward operator as a function with a reverse mode: double backward."""

    class LinearAttentionBackward(private.SingleLevelFunction):
        _compiled_autograd_key = staticmethod(private.compiled_autograd_key)

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Gradients:
            output: Gradients = run(*inputs)
            tensors = [x if isinstance(x, Tensor) else None for x in inputs]
            ctx.save_for_backward(*tensors)
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
            return tuple(derivatives.vjp_of_gradients(operator.forward, inputs, ctx.needs_input_grad, cotangents))

    return LinearAttentionBackward


def autograd_kernel(op: Kernel, function: Callable[[Kernel], Any], composite: Kernel | None = None) -> Kernel:
    """The kernel at the "Autograd" key: differentiate if anybody asks, else pass on.

    `composite`, where given, is the operator in terms of others that have a forward mode: it runs when an input carries
    a tangent.
    """

    def below(*inputs: Any) -> Any:
        with private.below_autograd():
            return op(*inputs)

    def next_level(*inputs: Any) -> Any:
        # A Function runs its forward with both modes off. Under nested transforms the levels below record their own
        # derivatives inside that forward: left off, they would be zero, without a word.
        with torch.enable_grad(), private.forward_grad(private.transforms_nested()), private.below_autograd():
            return op(*inputs)

    apply, apply_transformed = function(below).apply, function(next_level).apply

    def kernel(*inputs: Any) -> Any:
        transforms = private.transforms_active()
        if composite is not None and (transforms or private.forward_mode()) and private.any_tangent(*inputs):
            return composite(*inputs)
        if transforms:
            with private.single_level():
                return apply_transformed(*inputs)
        if private.forward_mode() or (torch.is_grad_enabled() and private.any_requires_grad(*inputs)):
            return apply(*inputs)
        with private.below_autograd():
            return op(*inputs)

    return kernel


def _no_forward_mode(kernel: Kernel) -> Kernel:
    """For releases of torch without the private names: an error in the place of a tangent that is silently zero."""

    def guarded(*inputs: Any) -> Any:
        if private.forward_mode():
            raise NotImplementedError(
                f"forward-mode differentiation of {NAMESPACE} operators needs {', '.join(private.MISSING)}, "
                f"which torch {torch.__version__} lacks; use reverse mode"
            )
        return kernel(*inputs)

    return guarded


# ------------------------------------------------------------------------------------------------------------- operator

_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def plain(*tensors: Any) -> bool:
    """May a call go around the dispatcher? Nothing then may want to see it: no tracer, transform, mode or subclass."""
    for x in tensors:
        if type(x) not in _PLAIN:
            return False
    return not (
        private.transforms_active()
        or private.forward_mode()
        or private.dispatch_modes()
        or private.function_modes()
        or private.any_autocast()
        or private.profiling()
    )


class Operator:
    """One operator of the family and its backward, registered; calling it runs the forward.

    `forward` and `backward` map device types to kernels with the signatures of `reference`'s functions, the backward
    with those of `_fake_backward`. `chunk` is the chunk length that the FLOP formula counts (0: token by token).
    """

    def __init__(self, name: str, forward: dict[str, Kernel], backward: dict[str, Kernel], chunk: int) -> None:
        self.name = name
        self.kernels = {device: _checked_forward(kernel) for device, kernel in forward.items()}
        self.backward_kernels = {device: _checked_backward(kernel) for device, kernel in backward.items()}
        self.forward = define(name, FORWARD)
        self.backward = define(f"{name}_backward", BACKWARD)

        guard = (lambda kernel: kernel) if private.AVAILABLE else _no_forward_mode
        for op, kernels, fake, axes in (
            (self.forward, self.kernels, _fake_forward, rules.FORWARD_AXES),
            (self.backward, self.backward_kernels, _fake_backward, rules.BACKWARD_AXES),
        ):
            path = op._schema.name
            for device, kernel in kernels.items():
                library.impl(path, guard(kernel), device.upper())
            torch.library.register_fake(path, fake, lib=library)
            torch.library.register_vmap(path, rules.vmap(op, axes), lib=library)
            library.impl(path, rules.legacy_vmap(rules.vmap(op, axes)), "Batched")
            if private.exclude_keys is not None:
                for device in ("cpu", "cuda"):
                    library.impl(
                        path, rules.autocast_kernel(op, device, op is self.forward), f"Autocast{device.upper()}"
                    )

        if private.AVAILABLE:
            library.impl(name, autograd_kernel(self.forward, lambda run: _forward_function(self, run)), "Autograd")
            library.impl(
                f"{name}_backward",
                autograd_kernel(self.backward, lambda run: _backward_function(self, run), self._composite_backward),
                "Autograd",
            )
            # In plain eager calls the same function runs around the kernel itself.
            self._eager = {device: _forward_function(self, kernel).apply for device, kernel in self.kernels.items()}
        else:
            self._fall_back()

        def count() -> None:
            from torch.utils.flop_counter import register_flop_formula

            for op, passes in ((self.forward, 1), (self.backward, 3)):
                register_flop_formula(op.overloadpacket)(
                    lambda q, k, v, *_, passes=passes, out_shape=None, **__: rules.flops(q, v, chunk, passes)
                )

        def shard() -> None:
            from . import sharding

            sharding.register(self.forward, self.backward)

        late.when_imported("torch.utils.flop_counter", count)
        late.when_imported("torch.distributed.tensor", shard)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        g_gamma: Tensor | None,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
        scale: float | None,
        normalize: bool,
        reverse: bool,
    ) -> Forward:
        checks.options(scale, output_final_state=output_final_state, normalize=normalize, reverse=reverse)
        inputs = (q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse)
        eager = private.AVAILABLE and not torch.compiler.is_compiling()
        given = q is not None and k is not None and v is not None
        if eager and given and plain(q, k, v, g, g_gamma, initial_state, cu_seqlens):
            device = q.device.type
            if device in self.kernels:
                if torch.is_grad_enabled() and private.any_requires_grad(q, k, v, g, g_gamma, initial_state):
                    return self._eager[device](*inputs)
                return self.kernels[device](*inputs)
        checks.tensors(
            q=q,
            k=k,
            v=v,
            g_or_None=g,
            g_gamma_or_None=g_gamma,
            initial_state_or_None=initial_state,
            cu_seqlens_or_None=cu_seqlens,
        )
        return self.forward(*inputs)

    def _composite_backward(self, *inputs: Any) -> Gradients:
        """The backward operator by calls of the forward one."""
        with rules.uncast(inputs[0].device.type):
            return derivatives.gradients(self.forward, *inputs[:10], *inputs[11:])

    def _fall_back(self) -> None:
        """Reverse mode alone, by the public `register_autograd`."""
        torch.library.register_autograd(
            self.forward._schema.name,
            _formula(self),
            setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
            lib=library,
        )

        def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.set_materialize_grads(False)

        def double(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
            return tuple(derivatives.vjp_of_gradients(self.forward, inputs, ctx.needs_input_grad, cotangents))

        torch.library.register_autograd(self.backward._schema.name, double, setup_context=setup, lib=library)
