"""Convolutional networks: the parts by hand in NumPy and beside PyTorch, and the contract of running statistics through step, mesh and checkpoint."""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import FAMILIES, load_tensors, torch_model

import bigflax
from bigflax import checkpoint, models, nn, sharding, train, trees, weights
from bigflax.models import convnet

B, S, C, O = 2, 7, 4, 6
X = np.random.default_rng(0).normal(size=(B, S, S, C)).astype(np.float32)
CLOSE = dict(rtol=1e-4, atol=2e-5)  # float32: the same sums in another order


def made(module):
    """Weights of which none is zero or one (variances above zero), and the module as a function of them, with or without a key."""
    model, rng = nn.model(Given(module), x=jax.ShapeDtypeStruct(X.shape, X.dtype)), np.random.default_rng(1)

    def draw(name, s):
        if s.dtype == jnp.int32:
            return jnp.full(s.shape, 5, s.dtype)
        return jnp.asarray(rng.uniform(0.5, 2.0, s.shape) if name.endswith("var") else rng.normal(size=s.shape) * 0.5, jnp.float32)

    params = trees.map_named(draw, model.shapes())
    return params, jax.jit(model.apply)


class Given(linen.Module):
    module: linen.Module

    @linen.compact
    def __call__(self, x):
        return self.module.clone(parent=self, name="m")(x)


# -- parts by hand ---------------------------------------------------------------------------------------------------------


def conv_by_hand(x, w, *, stride=1, before=0, after=0, groups=1, dilation=1):
    """Every output by itself: the sum over the kernel's taps and the channels of its group."""
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    k, ins, outs = w.shape[0], w.shape[2], w.shape[3]
    size = (x.shape[1] - (k - 1) * dilation - 1) // stride + 1
    y = np.zeros((x.shape[0], size, size, outs))
    for b, i, j, o in np.ndindex(*y.shape):
        g = o // (outs // groups)
        patch = x[
            b, i * stride : i * stride + (k - 1) * dilation + 1 : dilation, j * stride : j * stride + (k - 1) * dilation + 1 : dilation
        ]
        y[b, i, j, o] = (patch[..., g * ins : (g + 1) * ins] * w[..., o]).sum()
    return y


CONVS = {  # the module, and what the hand must be told
    "3 x 3": (convnet.Conv(O, 3), dict(before=1, after=1)),
    "stride 2": (convnet.Conv(O, 3, 2), dict(stride=2, before=1, after=1)),
    "even kernel, stride 2": (convnet.Conv(O, 2, 2), dict(stride=2)),
    "patches": (convnet.Conv(O, 3, 3, "valid"), dict(stride=3)),
    "TensorFlow's padding": (convnet.Conv(O, 4, 2, "same"), dict(stride=2, before=1, after=2)),
    "TensorFlow's padding, even": (convnet.Conv(O, 2, 1, "same"), dict(before=0, after=1)),
    "groups": (convnet.Conv(O, 3, groups=2), dict(before=1, after=1, groups=2)),
    "depthwise": (convnet.Conv(C, 3, groups=-1), dict(before=1, after=1, groups=C)),
    "dilated": (convnet.Conv(O, 3, dilation=2), dict(before=2, after=2, dilation=2)),
    "bias": (convnet.Conv(O, 1, bias=True), dict()),
}


@pytest.mark.parametrize("module, options", CONVS.values(), ids=CONVS)
def test_convolution(module, options):
    params, apply = made(module)
    want = conv_by_hand(X, np.asarray(params["m"]["w"], np.float64), **options) + (params["m"]["b"] if module.bias else 0)
    np.testing.assert_allclose(apply(params, x=X), want, **CLOSE)
    assert apply(params, x=X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_typed_weight_is_the_array_that_it_stands_for():
    params, apply = made(convnet.Conv(O, 3))
    axes = "_ _ embed -> mlp"
    typed = weights.lora(weights.quantize(params["m"]["w"], "int8", axes=axes), 2, axes=axes, rng=jax.random.key(0))
    typed = weights.LoRA(typed.base, typed.a, jnp.ones_like(typed.b), typed.alpha)
    np.testing.assert_allclose(apply({"m": {"w": typed}}, x=X), apply({"m": {"w": weights.dense(typed)}}, x=X), **CLOSE)
    assert np.abs(apply({"m": {"w": typed}}, x=X) - apply(params, x=X)).max() > 0.1


def test_pooling():
    """Windows of three, two apart, around the image's edge."""
    y, updates = jax.jit(convnet.MaxPool(3, 2, 1).apply)({}, X)
    around = np.pad(X, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    want = np.stack([[around[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, 7, 2)] for i in range(0, 7, 2)]).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(y, want)
    assert updates == {}


def test_batch_norm():
    """Without a key by the running statistics, with one by the batch's, towards which the running ones move."""
    params, apply = made(convnet.BatchNorm(0.1, 0.3))
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params["m"])
    y, updates = apply(params, x=X)
    np.testing.assert_allclose(y, (X - p["mean"]) / np.sqrt(p["var"] + 0.1) * p["scale"] + p["bias"], **CLOSE)
    assert updates == {}
    y, updates = apply(params, x=X, rng=jax.random.key(0))
    rows = X.reshape(-1, C)
    np.testing.assert_allclose(y, (X - rows.mean(0)) / np.sqrt(rows.var(0) + 0.1) * p["scale"] + p["bias"], **CLOSE)
    np.testing.assert_allclose(updates["mean"], 0.7 * p["mean"] + 0.3 * rows.mean(0), **CLOSE)
    np.testing.assert_allclose(updates["var"], 0.7 * p["var"] + 0.3 * rows.var(0, ddof=1), **CLOSE)
    assert updates["count"] == 6 and updates["count"].dtype == jnp.int32


def test_batch_norm_is_that_of_pytorch():
    """Output, gradients, and the running statistics after two steps."""
    torch = pytest.importorskip("torch")
    params, _ = made(convnet.BatchNorm())
    p, theirs = params["m"], torch.nn.BatchNorm2d(C)
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
    theirs.load_state_dict({name: torch.from_numpy(np.array(p[ours])) for name, ours in names.items()})
    apply = jax.jit(lambda p, x: convnet.BatchNorm().apply({"params": p}, x, rngs={"dropout": jax.random.key(0)}))
    rng = np.random.default_rng(2)
    for _ in range(2):
        x, g = rng.normal(size=(2, *X.shape)).astype(np.float32)
        y, updates = apply(p, x)
        trained = {name: p[name] for name in ("scale", "bias")}
        grads = jax.grad(lambda t, x, rest=p, g=g: (apply(rest | t, x)[0] * g).sum(), (0, 1))(trained, x)
        x_t = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
        y_t = theirs(x_t)
        theirs.zero_grad()
        (y_t * torch.from_numpy(g.transpose(0, 3, 1, 2).copy())).sum().backward()
        np.testing.assert_allclose(y, y_t.detach().numpy().transpose(0, 2, 3, 1), **CLOSE)
        np.testing.assert_allclose(grads[1], x_t.grad.numpy().transpose(0, 2, 3, 1), **CLOSE)
        np.testing.assert_allclose(grads[0]["scale"], theirs.weight.grad.numpy(), rtol=1e-4, atol=2e-4)  # sums of 98 terms of size one
        np.testing.assert_allclose(grads[0]["bias"], theirs.bias.grad.numpy(), rtol=1e-4, atol=2e-4)
        p = p | updates
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        np.testing.assert_allclose(p[names[name]], getattr(theirs, name).numpy(), **CLOSE)


def test_drop_path_leaves_out_whole_samples():
    """Of 4,000 a quarter, to five deviations (0.034), and the others grow by 4/3; without a key none."""
    x = jnp.ones((4000, 2, 2, 1))
    run = jax.jit(lambda **rngs: DropPath().apply({}, x, rngs=rngs))
    y = np.asarray(run(dropout=jax.random.key(0)))
    assert {tuple(np.unique(sample)) for sample in y} == {(0.0,), (np.float32(4 / 3),)}
    assert abs((y == 0).mean() - 0.25) < 0.034
    np.testing.assert_array_equal(run(), 1.0)


class DropPath(linen.Module):
    def __call__(self, x):
        return convnet.drop_path(self, x, jnp.float32(0.25))


def test_stochastic_depth_rises_from_layer_to_layer():
    model = models.create("convnext", size="tiny", drop_path_rate=0.4)
    assert [stage.layers.rates for stage in model.module.stages.modules] == [(0.0, 0.1), pytest.approx((0.2, 0.3, 0.4))]
    params, x = jax.jit(model.init)(jax.random.key(0)), {"pixel_values": jnp.ones((8, 3, 32, 32))}
    params = jax.tree.map(lambda w: jnp.where(w == 1e-6, 1.0, w), params)  # layer scale hides what it scales at the start
    one, again, other, plain = (
        np.asarray(jax.jit(model.apply)(params, **x, **key)["logits"])
        for key in ({"rng": jax.random.key(0)}, {"rng": jax.random.key(0)}, {"rng": jax.random.key(1)}, {})
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - plain).max() > 1e-3 and np.ptp(plain, 0).max() < 1e-5 < np.ptp(one, 0).max()


# -- a step in training ----------------------------------------------------------------------------------------------------


def squares(model, train_=True):
    def loss_fn(params, batch, rng):
        out = model.apply(params, rng=rng if train_ else None, pixel_values=batch["pixel_values"])
        return jnp.mean((out["logits"] - batch["target"]) ** 2), {}, out.get("updates", {})

    return loss_fn


def batch_of(rows, channels=3, size=32, labels=5, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {"pixel_values": draw(rows, channels, size, size), "target": draw(rows, labels)}


TRAINED = {
    "bottleneck": ("resnet", dict(embedding_size=6, hidden_sizes=[8, 12], depths=[2, 3])),
    "stride in the first": ("resnet", dict(
        embedding_size=6, hidden_sizes=[8, 12], depths=[1, 2], downsample_in_bottleneck=True, downsample_in_first_stage=True,
    )),
    "basic": ("resnet", dict(embedding_size=6, hidden_sizes=[8, 12], depths=[2, 3], layer_type="basic")),
}  # fmt: skip


SLOW = pytest.param(
    "mobilenet_v2", dict(depth_multiplier=0.25, classifier_dropout_prob=0.0, tf_padding=False, output_stride=8), id="mobilenet", marks=pytest.mark.slow
)  # fmt: skip


@pytest.mark.parametrize("family, config", [*(pytest.param(*case, id=name) for name, case in TRAINED.items()), SLOW])
def test_two_steps_with_batch_statistics_are_those_of_pytorch(family, config, tmp_path, monkeypatch):
    """PyTorch in its training mode beside `train_step`, SGD: every weight and every statistic, through the files."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setitem(FAMILIES, family, config)
    theirs = torch_model(family, "image_classification").train()
    theirs.save_pretrained(tmp_path / "start")
    model, params = bigflax.load(str(tmp_path / "start"))
    rate = {"resnet": 1e-2, "mobilenet_v2": 1e-5}[
        family
    ]  # the gradient of this random MobileNet is of length 230: no large step is repeatable
    state = train.init_state(params, optax.sgd(rate), mesh=sharding.make_mesh(devices=jax.devices()[:1]), axes=model.axes)
    step = train.train_step(squares(model), optax.sgd(rate), state)
    descent = torch.optim.SGD(theirs.parameters(), rate)
    for seed in range(2):
        batch = batch_of(8, size=64, seed=seed)
        state, metrics = step(state, batch)
        given = {name: torch.from_numpy(x) for name, x in batch.items()}
        loss = ((theirs(pixel_values=given["pixel_values"]).logits - given["target"]) ** 2).mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
        assert float(metrics["loss"].value) == pytest.approx(loss.item(), rel=1e-4)
    assert step.compiled._cache_size() == 1
    theirs.save_pretrained(tmp_path / "theirs")
    bigflax.save(model, state.weights, str(tmp_path / "ours"))
    want, got = load_tensors(tmp_path / "theirs"), load_tensors(tmp_path / "ours")
    assert got.keys() == want.keys()
    for name, w in want.items():
        # 1e-3 of the largest: a variance of few values divides, in layer after layer, and the second step begins where the first ended
        assert got[name].dtype == w.dtype and np.abs(got[name] - w).max() <= 1e-3 * max(np.abs(w).max(), 1e-3), name


SMALL = dict(embedding_size=8, hidden_sizes=(16,), depths=(3,), num_labels=5)


def states_after(sizes, *, accumulate=1, rows=16, steps=2):
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:count])
    model, tx = models.create("resnet", size="tiny", **SMALL), optax.sgd(0.01)
    state = train.init_state(model.init, tx, mesh=mesh, axes=model.axes)
    step = train.train_step(squares(model), tx, state, accumulate=accumulate)
    for seed in range(steps):
        state, metrics = step(state, jax.device_put(batch_of(rows, size=16, seed=seed), sharding.batch_sharding(mesh)))
    assert step.compiled._cache_size() == 1
    return jax.device_get(state.weights), float(metrics["loss"].value)


@functools.cache
def one_device():
    return states_after({"data": 1})


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_eight_devices_are_one(sizes):
    """The statistics are those of the global batch, of which each device has its own rows."""
    (want, loss), (got, loss8) = one_device(), states_after(sizes)
    assert loss8 == pytest.approx(loss, rel=1e-5)
    for (name, a), (_, b) in zip(trees.named_leaves(got), trees.named_leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 0.1), err_msg=name)  # sums in another order
    assert got["stem"]["0"]["norm"]["count"] == 2 and not np.allclose(got["stem"]["0"]["norm"]["mean"], 0)


def test_micro_batches_average_their_statistics():
    """Each normalizes by its own; the running ones move once, towards the mean of theirs."""
    model = models.create("resnet", size="tiny", **SMALL)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = batch_of(16, size=16)
    apply = jax.jit(lambda x: model.apply(params, rng=jax.random.key(0), pixel_values=x)["updates"])
    halves = [apply(batch["pixel_values"][i::2]) for i in range(2)]
    got = dict(trees.named_leaves(states_after({"data": 1}, accumulate=2, steps=1)[0]))
    for name, a in halves[0].items():
        np.testing.assert_allclose(got[name], (a + halves[1][name]) / 2, rtol=1e-5, atol=1e-6, err_msg=name)
    assert got["stages_0/blocks_1/body/0/norm/count"].tolist() == [1, 1]


def test_statistics_are_neither_optimized_nor_decayed_and_a_checkpoint_has_them(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = models.create("cnn", size="tiny", num_labels=5)
    tx = bigflax.optim.make(lr=1e-2, steps=10, axes=model.axes)
    new = lambda: train.init_state(model.init, tx, mesh=mesh, axes=model.axes)
    state = new()
    frozen = {name for name, _ in trees.named_leaves(state.frozen)}
    assert frozen == {f"stem/{i}/norm/{leaf}" for i in (0, 2) for leaf in ("mean", "var", "count")}
    assert not any(name.endswith(("/mean", "/var", "/count")) and "norm" in name for name, _ in trees.named_leaves(state.opt))
    batches = [batch_of(4, channels=1, size=28, seed=i) for i in range(4)]
    still = train.train_step(squares(model, train_=False), tx, state)(state, batches[0])[0]  # no key, no updates
    jax.tree.map(np.testing.assert_array_equal, still.frozen, jax.device_get(new().frozen))
    state = new()
    step = train.train_step(squares(model), tx, state)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for i, batch in enumerate(batches):
            state, _ = step(state, batch)
            if i == 1:
                checkpoints.save(2, state)
        checkpoints.wait()
        again = checkpoints.restore(train.state_like(model.init, tx, mesh=mesh, axes=model.axes)).state
    assert int(again.frozen["stem"]["0"]["norm"]["count"]) == 2
    for batch in batches[2:]:
        again, _ = step(again, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(again))  # bit for bit


def test_a_small_network_learns_digits_of_its_own():
    """Bars that stand or lie, in noise: a network that normalizes by what it has seen tells them apart without a key too."""
    model, tx = models.create("cnn", size="tiny", image_size=8, dropout=0.0), optax.adam(1e-2)
    state = train.init_state(model.init, tx, mesh=sharding.make_mesh(devices=jax.devices()[:1]), axes=model.axes)

    def loss_fn(params, batch, rng):
        out = model.apply(params, rng=rng, pixel_values=batch["x"])
        loss = optax.softmax_cross_entropy_with_integer_labels(out["logits"], batch["y"]).mean()
        return loss, {"accuracy": jnp.mean(out["logits"].argmax(-1) == batch["y"])}, out.get("updates", {})

    def bars(seed):
        rng = np.random.default_rng(seed)
        y, at, x = rng.integers(0, 2, 64), rng.integers(0, 8, 64), rng.normal(size=(64, 1, 8, 8)) * 0.3
        for i in range(64):
            x[i, 0][(at[i],) if y[i] else (slice(None), at[i])] += 2
        return {"x": x.astype(np.float32), "y": y}

    step = train.train_step(loss_fn, tx, state)
    for seed in range(60):
        state, _ = step(state, bars(seed))
    assert train.evaluate(train.eval_step(loss_fn), state.weights, [bars(100 + i) for i in range(4)])["accuracy"] > 0.95


@pytest.mark.parametrize("family", ["cnn", "convnext", "mobilenet_v2", "resnet"])
def test_axes_name_every_dimension_and_what_is_a_statistic(family):
    model = models.create(family, size="tiny")
    axes = dict(trees.named_leaves(model.axes))
    for name, leaf in trees.named_leaves(model.shapes()):
        ax = weights.parse_axes(axes[name])
        assert len(ax.names) == len(leaf.shape), name
        assert ("statistic" in ax.names) == name.endswith(("norm/mean", "norm/var")), name
        assert leaf.dtype == (jnp.int32 if name.endswith("/count") else jnp.float32), name
        assert bool(ax.first) == name.rsplit("/", 1)[-1].startswith(("w", "up", "down")) or name.endswith("bias"), name  # what decays


# -- the small network beside PyTorch's modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm, pools", [(True, None), (False, None), (True, [1, 5])], ids=["norm", "no norm", "pools"])
def test_the_small_network_is_pytorchs_modules(batch_norm, pools, tmp_path):
    torch = pytest.importorskip("torch")
    made = dict(num_channels=2, image_size=12, hidden_sizes=[6, 10], dense_size=9, num_labels=5)
    model = models.create("cnn", **made, batch_norm=batch_norm, pools=pools)
    first, second = pools or (2, 2)
    shapes, rng = model.shapes(), np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 0.9, s.shape) * (9 if s.dtype == jnp.int32 else 1), s.dtype), shapes)
    bigflax.save(model, params, str(tmp_path))

    class Layer(torch.nn.Module):
        def __init__(self, before, after, window):
            super().__init__()
            self.window = window
            self.conv = torch.nn.Conv2d(before, after, 3, padding=1, bias=not batch_norm)
            self.norm = torch.nn.BatchNorm2d(after) if batch_norm else torch.nn.Identity()

        def forward(self, x):
            return torch.nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), self.window)

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(Layer(2, 6, first), Layer(6, 10, second))
            self.dense, self.classifier = torch.nn.Linear(10 * (12 // first // second) ** 2, 9), torch.nn.Linear(9, 5)

        def forward(self, x):
            return self.classifier(torch.relu(self.dense(self.layers(x).flatten(1))))

    theirs, x = Small().eval(), rng.normal(size=(3, 2, 12, 12)).astype(np.float32)
    theirs.load_state_dict({name: torch.from_numpy(w) for name, w in load_tensors(tmp_path).items()})
    with torch.no_grad():
        want = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(params, pixel_values=x)["logits"], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("head", models.family("cnn").HEADS)
def test_saved_and_loaded(head, tmp_path):
    model = models.create("cnn", size="tiny", head=head)
    params = trees.map_named(lambda name, w: w + 3 if w.dtype == jnp.int32 else w, jax.jit(model.init)(jax.random.key(0)))
    bigflax.save(model, params, str(tmp_path))
    again, loaded = bigflax.load(str(tmp_path))
    assert jax.tree.map(lambda w: w.dtype, loaded) == jax.tree.map(lambda w: w.dtype, params) and again.axes == model.axes
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    half = bigflax.load(str(tmp_path), dtype="bfloat16")[1]
    assert {w.dtype.name for w in jax.tree.leaves(half)} == {"bfloat16", "int32"}
    bigflax.save(again, half, str(tmp_path / "half"), dtype="bfloat16")
    assert {w.dtype.name for w in load_tensors(tmp_path / "half").values()} == {"bfloat16", "int64"}


# -- mistakes --------------------------------------------------------------------------------------------------------------

build = lambda family, **config: models.create(family, size="tiny", **config)
MISTAKES = {
    "channels": (lambda: jax.eval_shape(build("resnet").apply, build("resnet").shapes(), pixel_values=np.ones((1, 32, 32, 3))),
                 r"pixel_values are \[B, 3, H, W\] here, not \[1, 32, 32, 3\]"),
    "image of another size": (lambda: jax.eval_shape(build("cnn").apply, build("cnn").shapes(), pixel_values=np.ones((1, 1, 32, 32))),
                              r"a last state of \[8, 8, 16\] does not fit a head made for \[7, 7, 16\]"),
    "one value": (lambda: convnet.BatchNorm().init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(0)}, np.ones((1, 1, 1, 3))),
                  "needs more than one value a channel"),
    "groups": (lambda: made(convnet.Conv(O, 3, groups=3)), "3 groups do not divide 4 channels in and 6 out"),
    "padding": (lambda: made(convnet.Conv(O, 3, padding="SAME")), "unknown padding 'SAME'; there are 'same'"),
    "stages": (lambda: build("resnet", depths=[1]), r"hidden_sizes \[16, 32\] and depths \[1\] must list the same stages, 1 to 8"),
    "number of stages": (lambda: build("convnext", num_stages=3), r"num_stages 3 is not the number of depths \[2, 3\]"),
    "kind of layer": (lambda: build("resnet", layer_type="wide"), "unknown layer_type 'wide'"),
    "too many layers": (lambda: build("cnn", image_size=3), r"hidden_sizes \[8, 16\] are not 1 to 8 layers, .* an image of 3 pixels"),
    "pooled away": (lambda: build("cnn", image_size=8, pools=[3, 3]), r"pooling by \[3, 3\] leaves something of an image of 8 pixels"),
    "attentions": (lambda: jax.eval_shape(functools.partial(build("resnet").apply, attentions=True), build("resnet").shapes()),
                   "a ConvNet takes no 'attentions'; it takes 'hidden_states'"),
    "pools": (lambda: build("cnn", pools=[2]), r"hidden_sizes \[8, 16\] are not 1 to 8 layers, after which pooling by \[2\]"),
}  # fmt: skip


@pytest.mark.parametrize("make, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
