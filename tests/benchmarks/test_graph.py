"""The counting rule on graphs whose launches are known."""

import mlx.core as mx
import pytest

from benchmarks.graph import Launch, PretendedMetal, at_load, mark, shape_only, trace

X = mx.zeros((4, 8))


@pytest.fixture(autouse=True)
def metal():
    with PretendedMetal():
        yield


def names(function, **arguments) -> list[str]:
    return [launch.name for launch in trace(function, arguments) for _ in range(launch.count)]


def only(function, **arguments) -> Launch:
    (launch,) = trace(function, arguments)
    return launch


def test_views_count_nothing() -> None:
    def views(x):
        a, b = mx.split(x[:, 1:7], 2, axis=1)
        joined = x.reshape(2, 2, 8).flatten(0, 1).view(mx.int32)
        return mx.broadcast_to(a.T[None], (5, 3, 4)), b[..., None].squeeze(-1), joined

    assert names(views, x=X) == []


@pytest.mark.parametrize("operation", [lambda x: x.T.reshape(-1), lambda x: x[:, :6].reshape(8, 3)])
def test_a_reshape_that_has_to_copy_counts(operation) -> None:
    assert names(operation, x=X) == ["Reshape"]


def test_contiguous_counts_where_it_copies() -> None:
    assert names(lambda x: mx.contiguous(x), x=X) == []
    assert names(lambda x: mx.contiguous(x.T), x=X) == ["Contiguous"]
    large = shape_only((2, 1 << 16), mx.float32)  # half of a large buffer is not kept alive
    assert names(lambda x: mx.contiguous(x[:1]), x=large) == ["Contiguous"]


def test_a_known_graph() -> None:
    def known(x, w):
        return mx.softmax(x @ w, axis=-1).sum(axis=-1) * 2

    assert names(known, x=X, w=mx.zeros((8, 3))) == ["Matmul", "Softmax", "Reduce", "Multiply"]


def test_a_planted_operation_is_noticed() -> None:
    def block(x, w):
        return mx.fast.rms_norm(x, w, 1e-6) @ x.T

    def planted(x, w):
        return block(x, w).astype(mx.bfloat16)

    w = mx.zeros((8,))
    assert names(planted, x=X, w=w) == [*names(block, x=X, w=w), "AsType"]


def test_operations_of_mx_fast_count_one() -> None:
    heads = shape_only((1, 2, 1, 64), mx.float32)
    assert names(lambda q: mx.fast.rope(q, 32, traditional=False, base=1e4, scale=1.0, offset=3), q=heads) == [
        "fast.rope"
    ]
    assert names(lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0), q=heads) == [
        "fast.scaled_dot_product_attention"
    ]


def test_a_compiled_piece_counts_what_mx_compile_leaves() -> None:
    def gated(x, y):
        return x * mx.sigmoid(y) + 1

    assert len(names(gated, x=X, y=X)) == 3
    assert names(mx.compile(gated, shapeless=True), x=X, y=X) == ["compiled gated"]
    assert len(names(mx.compile(lambda x: mx.softmax(x + 1, axis=-1) * 2), x=X)) == 3  # nothing fuses with a softmax
    once_more = mx.compile(lambda x, y: mx.compile(gated)(x, y) * 2)
    assert len(names(once_more, x=X, y=X)) == 1


def test_kernels_count_one_and_keep_their_name() -> None:
    kernel = mx.fast.metal_kernel(name="twice", input_names=["x"], output_names=["a", "b"], source="a[0] = x[0];")

    def run(x):
        how = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
        a, b = kernel(inputs=[x + 1], output_shapes=[(4,), (2, 2)], output_dtypes=[mx.float32, mx.bfloat16], **how)
        return a + 1, b

    launches = trace(run, {"x": X})
    assert [launch.name for launch in launches] == ["Add", "kernel twice", "Add"]
    assert launches[1].read == 4 * 8 * 4 and launches[1].written == 4 * 4 + 4 * 2


def test_code_that_asks_hears_of_metal() -> None:
    assert mx.metal.is_available() and mx.default_device() == mx.gpu


def test_bytes_are_those_of_the_memory_that_is_touched() -> None:
    row = shape_only((1, 8), mx.bfloat16)
    add = only(lambda x, r: x + r, x=shape_only((4, 8), mx.bfloat16), r=row)
    assert (add.read, add.written, add.inputs) == (4 * 8 * 2 + 8 * 2, 4 * 8 * 2, ("x", "r"))
    half = only(lambda x: mx.exp(x[:, :4]), x=X)
    assert (half.read, half.written) == (4 * 4 * 4, 4 * 4 * 4)
    taken = only(lambda t, i: t[i], t=shape_only((1000, 8), mx.float32), i=mx.zeros((3,), mx.uint32))
    assert (taken.read, taken.written) == (3 * 8 * 4 + 3 * 4, 3 * 8 * 4)


def test_of_chosen_experts_only_their_part_is_read() -> None:
    bank = {"w": shape_only((16, 8, 4), mx.float32)}
    ids = mx.zeros((1, 2), mx.uint32)

    def chosen(x, w, i):
        return mx.gather_mm(x, w, lhs_indices=i, rhs_indices=i)

    (launch,) = trace(chosen, bank | {"x": shape_only((1, 1, 8), mx.float32), "i": ids}, touched={"w": 2 / 16})
    assert launch.read == 2 * 8 * 4 * 4 + 8 * 4 + 2 * 4


def test_weights_that_are_laid_out_at_load_count_when_they_are_read() -> None:
    def joined(x, a, b):
        with at_load():
            both = mx.concatenate([a, b])
            mx.eval(both)
        return x @ both.T

    w = shape_only((3, 8), mx.float32)
    launch = only(joined, x=X, a=w, b=w)
    assert (launch.name, launch.read) == ("Matmul", 4 * (4 * 8 + 2 * 3 * 8))
    assert names(lambda x, a, b: x @ mx.concatenate([a, b]).T, x=X, a=w, b=w) == ["Concatenate", "Matmul"]


def test_writing_into_a_buffer_moves_what_is_written() -> None:
    def append(buffer, x):
        buffer[1:2] = x
        return buffer

    def twice_held(buffer, x):
        return append(buffer + 0, x)

    buffer, x = shape_only((100, 8), mx.float32), shape_only((1, 8), mx.float32)
    launch = only(append, buffer=buffer, x=x)
    assert (launch.count, launch.read, launch.written) == (1, 32, 32)

    def kept(buffer, x):
        before = mx.exp(buffer)
        return append(buffer, x), before

    copied = next(a for a in trace(kept, {"buffer": buffer, "x": x}) if a.name == "SliceUpdate")
    assert (copied.count, copied.written) == (2, 32 + 3200)


def test_layers_are_told_apart_by_what_operations_depend_on() -> None:
    def two_layers(x, window):
        start, shared = mx.exp(x), mx.arange(8)
        x = mark(start)
        kept = mx.sin(x)  # is needed at the end, not by the next layer
        x = mark(x + mx.arange(4)[:, None] + shared)
        x = mark(x * 2 + shared)
        return x - 1, kept

    found = [(launch.name, launch.layer) for launch in trace(two_layers, {"x": X, "window": X})]
    assert ("Exp", 0) in found and ("Sin", 1) in found and ("Multiply", 2) in found and ("Subtract", 3) in found
    assert sorted(layer for name, layer in found if name == "Arange") == [0, 1]
