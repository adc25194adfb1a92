"""The account of a program's cycles and operations, against programs whose account is known."""

import jax
import jax.numpy as jnp
import pytest

from deq_flax import GMRES, Anderson, Implicit, Unroll, fixed_point
from deq_flax.compilation.operations import operations_by_part
from deq_flax.compilation.program import parts_of
from deq_flax.nn.convolution_primitive import Window, convolve_nhwc


def fusion(name, cycles, frame=0, op_name="jit(step)/mul"):
    metadata = f'metadata={{op_name="{op_name}" stack_frame_id={frame}}}'
    return f'  %{name} = f32[2]{{0}} fusion(%a), calls=%f, {metadata}, backend_config={{"estimated_cycles":"{cycles}"}}'


def loop(name, body, op_name, trips=None, condition="c"):
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    return f'  %{name} = (f32[2]{{0}}) while(%t), condition=%{condition}, body=%{body}, metadata={{op_name="{op_name}"}}{known}'


HLO = f"""HloModule jit_step

FileNames
1 "/somewhere/deq_flax/train/step.py"
2 "/venv/optax/update.py"

FunctionNames
1 "step"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=17 end_line=17}}
2 {{file_name_id=2 function_name_id=1 line=5 end_line=5}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}

%inner (p: f32[2]) -> f32[2] {{
{fusion("x", 3)}
}}

%forward (p: f32[2]) -> f32[2] {{
{fusion("g", 100)}
{loop("known", "inner", "jit(step)/jvp()/while/body/while", 5)}
{loop("seldom", "inner", "jit(step)/jvp()/while/body/while")}
}}

%adjoint (p: f32[2]) -> f32[2] {{
{fusion("h", 40)}
}}

%branch (p: f32[2]) -> f32[2] {{
{fusion("b", 9)}
}}

%cheap (p: f32[2]) -> f32[2] {{
{fusion("i", 2)}
}}

%below (p: s32[]) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(6)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %n), direction=LT
}}

ENTRY %main (p: f32[2]) -> f32[2] {{
{fusion("e", 7, 2)}
{loop("w1", "forward", "jit(step)/jvp()/while")}
{loop("w2", "adjoint", "jit(step)/transpose(jvp())/while")}
{loop("chunks", "branch", "jit(step)/jvp()/while", condition="below")}
  %cond = f32[2]{{0}} conditional(%q, %a, %a), branch_computations={{%branch, %cheap}}
  ROOT %done = f32[2]{{0}} copy(%e)
}}
"""


@pytest.mark.parametrize("counter", ["s32", "u32"])
def test_cycles_are_counted_by_part(counter):
    """A loop of the compiler's own counts with an unsigned number."""
    parts = {part.name: part for part in parts_of(HLO.replace("s32", counter))}
    assert {name: part.cycles for name, part in parts.items()} == {
        "outside": 7 + 6 * 9 + 2,  # chunks of a scan, and the cheaper branch
        "forward iteration": 100 + 5 * 3 + 3,
        "adjoint iteration": 40,
    }
    (largest,) = parts["forward iteration"].largest(1)
    assert largest.cycles == 100 and largest.opcode == "fusion" and largest.op_name == "jit(step)/mul"


def test_iterations_of_all_parts_of_a_batch_are_added_up():
    """With `train.accumulate` a loop of known length is around the solvers'."""
    entry = HLO.index("ENTRY")
    program = HLO[:entry] + HLO[entry:].replace("ENTRY %main", "%part").replace("jit(step)/", "jit(step)/while/body/")
    program += "ENTRY %main (p: f32[2]) -> f32[2] {\n" + loop("parts", "part", "jit(step)/while", 3) + "\n}\n"
    single = {part.name: part.cycles for part in parts_of(HLO)}
    assert {part.name: part.cycles for part in parts_of(program)} == {name: 3 * cycles for name, cycles in single.items()}


def test_a_step_that_is_usually_taken_counts():
    taken = HLO.replace("%branch, %cheap}", '%branch, %cheap}, metadata={op_name="jit(step)/within_limit/cond"}')
    assert parts_of(taken)[0].cycles - parts_of(HLO)[0].cycles == 9 - 2


def test_collectives_are_those_of_a_part():
    gather = "  %g{} = f32[8,4]{{1,0}} all-gather(%p), replica_groups={{{{0,1}}}}"
    fused = "  %h = f32[2]{0} fusion(%a), calls=%fused"
    program = HLO.replace(fusion("x", 3), gather.format(1)).replace(
        "%branch (p", f"%fused (p) {{\n{gather.format(2)}\n}}\n%branch (p"
    )
    program = program.replace(fusion("e", 7, 2), f"{gather.format(3)}\n{fused}")
    sent = {part.name: {n: len(found) for n, found in part.sent.items() if found} for part in parts_of(program)}
    assert sent == {"outside": {1: 2}, "forward iteration": {1: 1, 5: 1}, "adjoint iteration": {}}


def test_of_many_branches_the_median_counts():
    """A solver reads as much of its history as is filled, by one of several branches."""
    program = HLO.replace("{%branch, %cheap}", "{%cheap, %branch, %branch}")
    assert parts_of(program)[0].cycles - parts_of(HLO)[0].cycles == 9 - 2


def test_an_operation_has_the_line_of_ours_that_it_comes_from():
    outside = parts_of(HLO)[0]
    assert [operation.line for operation in outside.operations] == ["train/step.py:17", "", ""]


def test_operations_are_those_of_the_products():
    def program(a, b):
        def step(z, _):
            return jax.lax.cond(z.sum() > 0, lambda z: jnp.sin(z @ a), lambda z: z @ a @ a, z), None

        return jax.lax.scan(step, b, None, length=5)[0]

    jaxpr = jax.make_jaxpr(jax.jit(program))(jnp.ones((3, 3)), jnp.ones((2, 3))).jaxpr
    assert operations_by_part(jaxpr) == {"outside": 5 * 2 * 2 * 3 * 3}


@pytest.mark.parametrize("limit", [None, 7], ids=["as many steps", "a limit"])
def test_the_operations_of_an_unrolled_iteration_are_those_of_its_steps(limit):
    """Six free steps, two with their gradient. With a limit the free ones are a loop of unknown length."""

    def loss(w, x, limit):
        gradient = Unroll(8, last=2)
        return fixed_point(lambda z: jnp.tanh(z @ w + x), x, gradient=gradient, max_steps=limit).value.sum()

    limit = None if limit is None else jnp.int32(limit)
    parts = operations_by_part(jax.make_jaxpr(jax.grad(loss))(jnp.ones((16, 16)), jnp.ones((4, 16)), limit).jaxpr)
    f = 2 * 4 * 16 * 16
    steps = 1 + 2 + 2 * 2  # that of the residual, the two steps, and their gradients with respect to w and to the state
    free = {"outside": (steps + 6) * f} if limit is None else {"outside": steps * f, "forward iteration": f}
    assert parts == free


def test_products_that_a_loop_repeats_unchanged_are_none_of_its_own():
    def program(a, z):
        return jax.lax.while_loop(lambda z: z.sum() < 9, lambda z: jnp.sin(z @ jnp.tanh(a @ a)), z)

    jaxpr = jax.make_jaxpr(jax.jit(program))(jnp.ones((3, 3)), jnp.ones((2, 3))).jaxpr
    assert operations_by_part(jaxpr)["forward iteration"] == 2 * 2 * 3 * 3


@pytest.mark.parametrize("adjoint", [Anderson(), GMRES()], ids=["anderson", "gmres"])
def test_an_iteration_counts_the_products_of_f_alone(adjoint):
    def loss(w, x):
        return fixed_point(lambda z: jnp.tanh(z @ w + x), 0 * x, solver=Anderson(), gradient=Implicit(adjoint)).value.sum()

    jaxpr = jax.make_jaxpr(jax.jit(jax.grad(loss)))(jnp.ones((16, 16)), jnp.ones((4, 16))).jaxpr
    parts = operations_by_part(jaxpr)
    assert parts["forward iteration"] == 2 * 4 * 16 * 16
    assert parts.keys() <= {"outside", "forward iteration", "adjoint iteration"}
    if isinstance(adjoint, Anderson):
        assert parts["adjoint iteration"] == 2 * 4 * 16 * 16


def test_convolutions_count_without_the_zeros_of_a_dilation():
    window = Window((2, 2), ((1, 1), (1, 1)))
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    forward = jax.make_jaxpr(lambda x: convolve_nhwc(x, kernel, window))(x).jaxpr
    assert operations_by_part(forward)["outside"] == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    backward = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(convolve_nhwc(x, kernel, window) ** 2)))(x).jaxpr
    both = operations_by_part(backward)["outside"]
    assert 1.9 < both / operations_by_part(forward)["outside"] < 2.5
