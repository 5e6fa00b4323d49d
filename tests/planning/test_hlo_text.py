"""XLA's text as JAX 0.10 to 0.12 write it: how often loops turn, elements of tuples, and what is refused."""

import pytest

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.planning.executions import Loops, executions
from hybridnorm_jax.planning.hlo_text import arrays, parse_module, tuple_elements
from hybridnorm_jax.planning.matrix_products import matrix_products, total_flops

# A loop of 3 around a loop of 5, each with a product of 4x4 matrices, as JAX 0.10 writes it.
NESTED = """HloModule jit_f, is_scheduled=true

%inner_body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}

%inner_condition (p.1: (s32[], f32[4,4])) -> pred[] {
  %p.1 = (s32[], f32[4,4]{1,0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%p.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%j.1, %five), direction=LT
}

%outer_body (p.2: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p.2 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.2), index=0
  %x.2 = f32[4,4]{1,0} get-tuple-element(%p.2), index=1
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]{1,0}) tuple(%zero, %x.2)
  %inner = (s32[], f32[4,4]{1,0}) while(%start), condition=%inner_condition, body=%inner_body
  %x.3 = f32[4,4]{1,0} get-tuple-element(%inner), index=1
  %y.2 = f32[4,4]{1,0} dot(%x.3, %x.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%i, %one.2)
  ROOT %out.2 = (s32[], f32[4,4]{1,0}) tuple(%next.2, %y.2)
}

%outer_condition (p.3: (s32[], f32[4,4])) -> pred[] {
  %p.3 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %three = s32[] constant(3)
  ROOT %less.3 = pred[] compare(%i.3, %three), direction=LT
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %zero.4 = s32[] constant(0)
  %start.4 = (s32[], f32[4,4]{1,0}) tuple(%zero.4, %a)
  %outer = (s32[], f32[4,4]{1,0}) while(%start.4), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[4,4]{1,0} get-tuple-element(%outer), index=1
}
"""
PRODUCT = 2 * 4**3


def _with_hashes(text):
    """The same program as JAX 0.12 writes it: %p#0 stands where an element of a tuple is read."""
    kept, elements = [], {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" = ")
        if "get-tuple-element(" in rest and not name.startswith("ROOT"):
            source = rest.partition("(")[2].partition(")")[0]
            elements[name] = f"{source}#{rest.rpartition('index=')[2]}"
        else:
            kept.append(line)
    written = "\n".join(kept)
    for name, element in sorted(elements.items(), key=lambda each: -len(each[0])):
        written = written.replace(f"{name})", f"{element})").replace(f"{name},", f"{element},")
    return written + "\n"


@pytest.mark.parametrize("text", [NESTED, _with_hashes(NESTED)], ids=["JAX 0.10", "JAX 0.12"])
def test_a_loop_in_a_loop_runs_as_often_as_both_say(text):
    assert ("#0" in text) == (text != NESTED)
    loops = Loops()
    times = {each.instruction.name: each.times for each in executions(parse_module(text), loops)}
    assert (times["inner"], times["y"], times["y.2"], loops.unknown) == (3, 3 * 5, 3, [])
    assert total_flops(matrix_products(text)) == (3 * 5 + 3) * PRODUCT


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%five = s32[] constant(5)", "%five = s32[] get-tuple-element(%p.1), index=0"),
        ("compare(%j.1, %five), direction=LT", "compare(%j.1, %five), direction=NE"),
        ("%zero = s32[] constant(0)", "%zero = s32[] get-tuple-element(%p.2), index=0"),
        ("%next = s32[] add(%j, %one)", "%next = s32[] add(%one, %one)"),
        ("%next = s32[] add(%j, %one)", "%next = s32[] multiply(%j, %one)"),
    ],
)
def test_a_loop_that_does_not_say_how_often_it_turns_is_told_of(old, new):
    assert old in NESTED
    loops = Loops(unknown_trips=7)
    times = {each.instruction.name: each.times for each in executions(parse_module(NESTED.replace(old, new)), loops)}
    assert (times["y"], loops.unknown) == (3 * 7, ["inner"])


def test_a_loop_turns_as_often_as_a_balanced_load_asks_for_where_it_says_so():
    unknown = NESTED.replace("compare(%j.1, %five), direction=LT", "compare(%j.1, %five), direction=NE")
    path = "jit(step)/mean_turns_9/while/body/mean_turns_4/while"
    named = unknown.replace("body=%inner_body", f'body=%inner_body, metadata={{op_name="{path}"}}')
    for text, turns, found in [(named, 4, ["inner"]), (named.replace("_4/while", "_4/body"), 1, [])]:
        loops = Loops()
        times = {each.instruction.name: each.times for each in executions(parse_module(text), loops)}
        assert (times["y"], loops.balanced) == (3 * turns, found)
        assert loops.unknown == ([] if found else ["inner"])


def test_what_xla_has_written_of_a_loop_is_believed():
    text = NESTED.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"11"}}')
    assert {each.instruction.name: each.times for each in executions(parse_module(text), Loops())}["y"] == 33


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ENTRY ", "", "no ENTRY"),
        ("dot(%x, %x)", "dot(%nothing, %x)", "reads %nothing"),
        ("dot(%x, %x)", "dot(%p#2, %x)", "no such element"),
        ("dot(%x, %x)", "dot(x, x)", "operands without names"),
        ("f32[4,4]{1,0} dot(%x, %x)", "dot(%x, %x) : tensor<4x4xf32>", "%y = dot"),
        ("body=%inner_body", "body=%gone", "calls gone"),
        ("}\n\n%inner_condition", "}\n  %lost = s32[] constant(5)\n%inner_condition", "outside of a computation"),
    ],
)
def test_a_text_of_another_format_is_refused_in_one_line(old, new, message):
    assert old in NESTED
    with pytest.raises(UserError) as error:
        parse_module(NESTED.replace(old, new))
    assert message in str(error.value)
    assert "known is the text of JAX 0.10 to 0.12" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_instruction_over_several_lines_is_one():
    text = NESTED.replace(
        "%y = f32[4,4]{1,0} dot(%x, %x), ",
        '%y = f32[4,4]{1,0} dot(%x, %x), frontend_attributes={kernel={\n"block": "8"\n}}, metadata={op_name="a/b"}, ',
    )
    module = parse_module(text)
    assert module.computations["inner_body"]["y"].op_name == "a/b"
    assert module.computations["inner_body"]["y"].numbers("lhs_contracting_dims") == [1]


def test_shapes_are_read():
    (array,) = arrays("bf16[8,100]{1,0:T(8,128)(2,1)S(1)}")
    assert (array.dtype, array.sizes, array.bytes) == ("bf16", (8, 100), 1600)
    shape = "((f32[2]{0}, s8[3]{0}), /*index=1*/f32[2]{0}, u32[]{:S(2)})"
    assert tuple_elements(shape) == ["(f32[2]{0}, s8[3]{0})", "f32[2]{0}", "u32[]{:S(2)}"]
