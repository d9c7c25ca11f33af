"""Chains of compression over a small trained run: what they leave, that they go on, and where they end."""

import json
import os
import types

import jax
import numpy as np
import pytest
import running

import bigflax
from bigflax import chains, compress, exports, models, recipes, runs, steps, trees, weights
from bigflax.compress.report import Report
from bigflax.main import main

QUIET = dict(say=lambda text: None, turns=2, batches=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(recipe file, what its run of 60 steps left)."""
    folder = tmp_path_factory.mktemp("chains")
    recipe = running.make_recipe(folder)
    config = recipes.resolve(recipes.load(str(recipe)), ["model.n_layer=2", "fit.steps=60", "fit.log_every=60", "fit.save_every=60"])
    runs.train_run(config, say=lambda text: None)
    found = exports.trained(config.work)
    return recipe, found.run.of(found.run.model), found.weights


CHAINS = {
    "int8": [dict(do="quantize", to="int8")],
    "half, recovered, packed, int8": [
        dict(do="prune", to="50%", method="sparsegpt"), dict(do="recover", steps=5), dict(do="pack"), dict(do="quantize", to="int8"),
    ],
    "half of the channels, recovered": [dict(do="narrow", axis="mlp", keep=0.5), dict(do="recover", steps=5)],
    "half of the layers, int8": [dict(do="layers", keep=0.5), dict(do="quantize", to="int8")],
    "low rank, int8": [dict(do="factorize", to=0.7), dict(do="quantize", to="int8")],
    "formats by a budget": [dict(do="quantize", to=["int3:16", "int4:16", "int8"], within="5.5 bits", tables="int8", method="gptq")],
    "ranks by a budget": [dict(do="factorize", to=0.6, spread=True)],
    "half of the layers, int4 learned, tables too": [
        dict(do="layers", keep=0.5), dict(do="qat", to="int4:16", tables="int8", steps=5, options=dict(damp=0.1)),
    ],
    "int4 and nothing else of the mlp": [dict(do="quantize", rules=[("blocks/mlp/(up|down)", "int4:16")], method="gptq")],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_each_step_is_measured_and_saved(trained, name):
    _, run, params = trained
    chain = CHAINS[name]
    report = chains.compress(run, params, chain=chain, name="measured", **QUIET)
    folder = os.path.join(run.work, "compress", "measured")
    assert [row.step for row in report.rows] == ["start", *(chains.name_of(i, said) for i, said in enumerate(chain, 1))]
    assert Report.read(folder) == report
    assert {"report.json", "report.txt", "quality.png", "error.png"} <= {*os.listdir(folder)}
    for row in report.rows[1:]:
        model, loaded = bigflax.load(os.path.join(folder, row.step), mesh=run.mesh)
        assert trees.nbytes(loaded) == row.memory and trees.count(loaded) == row.numbers
        again = run.of(model).evaluator()(loaded)
        assert again["loss"] == pytest.approx(row.metrics["loss"], rel=1e-6)
        assert row.kl >= 0 and row.speed > 0 and row.disk > 0
        said = {part: w for part, w in weights.named_weights(loaded) if part in row.chosen}
        assert bool(row.chosen) == name.endswith("by a budget") and len(said) == len(row.chosen)
        for part, value in row.chosen.items():  # what stands there is what was chosen
            w = said[part]
            assert value is None or (w.a.shape[-1] == value if isinstance(value, int) else w.qtype == value.partition(":")[0])
    start, last = report.rows[0], report.rows[-1]
    assert last.disk < start.disk and last.memory < start.memory
    assert name.startswith("half of") or (last.error and all(0 < x < 1.5 for errors in last.error.values() for x in errors))


@pytest.mark.slow
def test_a_chain_goes_on_where_it_stopped(trained, monkeypatch):
    _, run, params = trained
    chain = [dict(do="quantize", rules=[("blocks/mlp/up", "int8")]), dict(do="quantize", rules=[("blocks/mlp/down", "int8")])]
    done = []
    counting = lambda link, **said: done.append(said) or steps.STEPS["quantize"](link, **said)
    monkeypatch.setattr(chains, "STEPS", {**steps.STEPS, "quantize": counting})
    chains.compress(run, params, chain=chain[:1], name="resumed", **QUIET)
    report = chains.compress(run, params, chain=chain, name="resumed", **QUIET)
    assert len(done) == 2  # the first step was read
    whole = chains.compress(run, params, chain=chain, name="whole", **QUIET)
    assert whole.rows[-1].metrics == report.rows[-1].metrics
    chains.compress(run, params, chain=[{**chain[0], "rules": [("blocks/mlp/up", "int4")]}, chain[1]], name="resumed", **QUIET)
    assert len(done) == 6  # another first step: both are made again
    other = jax.tree.map(lambda w: w * 1.01, params)
    chains.compress(run, other, chain=chain, name="whole", **QUIET)
    assert len(done) == 8  # and so are those of other weights


@pytest.mark.slow
def test_the_gate_keeps_the_last_good_step(trained):
    _, run, params = trained
    said = []
    chain = [dict(do="quantize", rules=[("blocks/mlp/up", "int8")]), dict(do="quantize", rules=[("embed/tokens", "int2")]),
             dict(do="pack")]  # fmt: skip
    report = chains.compress(run, params, chain=chain, name="gate", max_loss=0.0005, **{**QUIET, "say": said.append})
    assert len(report.rows) == 3 and report.loss(report.rows[1]) <= 0.0005 < report.loss(report.rows[2])
    assert "kept: " + os.path.join(run.work, "compress", "gate", "1-quantize") in said[-1]


@pytest.mark.slow
def test_what_recovers_is_judged_after_it(trained):
    _, run, params = trained
    chain = [dict(do="prune", to="90%", method="magnitude"), dict(do="recover", steps=40, lr=3e-3, weight=1.0)]
    report = chains.compress(run, params, chain=chain, name="recovers", max_loss=1.0, **QUIET)
    assert len(report.rows) == 3
    assert report.rows[2].kl < report.rows[1].kl
    _, loaded = bigflax.load(os.path.join(run.work, "compress", "recovers", "2-recover"))
    masked = [w for _, w in weights.named_weights(loaded) if isinstance(w, weights.Masked)]
    assert masked and all(bool(np.all(np.asarray(w.w)[~np.asarray(w.mask)] == 0)) for w in masked)


@pytest.mark.slow
def test_rounding_that_is_learned_loses_less(trained):
    _, run, params = trained
    said, ended = dict(to="int2", tables="int2"), lambda name, step: chains.compress(run, params, chain=[step], name=name, **QUIET).rows[-1]
    rounded = ended("rounded", dict(do="quantize", **said))
    learned = ended("learned", dict(do="qat", method="rtn", steps=60, lr=3e-3, weight=1.0, **said))
    assert learned.kl < 0.5 * rounded.kl and learned.metrics["loss"] < rounded.metrics["loss"]
    assert (learned.memory, learned.disk) == (rounded.memory, rounded.disk)
    _, loaded = bigflax.load(os.path.join(run.work, "compress", "learned", "1-qat-int2-rtn"))
    assert {w.qtype for _, w in weights.named_weights(loaded) if isinstance(w, weights.Quantized)} == {"int2"}


@pytest.mark.slow
def test_the_verb(trained, capsys):
    recipe, run, _ = trained
    assert main(["compress", f"--work={run.work}", "--recipe=int4", "--config.compress.batches=2", "--config.compress.turns=2"]) == 0
    out = capsys.readouterr().out
    assert "1-quantize-int4-32" in out and "worse by" in out
    said = "[{'do': 'quantize', 'to': 'int8'}]"
    assert main(["compress", f"--config={recipe}", f"--config.compress.chain={said}", "--config.compress.turns=2", "--max-loss=50%"]) == 0
    with open(os.path.join(run.work, "compress", "chain", "report.json")) as file:
        assert [row["step"] for row in json.load(file)["rows"]] == ["start", "1-quantize-int8"]
    model, _ = bigflax.load(os.path.join(run.work, "compress", "chain", "1-quantize-int8"))
    assert model.source and os.path.exists(os.path.join(model.source, "tokenizer.json"))


@pytest.mark.slow
def test_a_mixture_and_its_table_go_through_chains(tmp_path):
    """int4-gptq reaches every expert; tables alone become narrow ones. Both are saved and loaded as they are."""
    recipe = running.make_recipe(tmp_path)
    lines = recipe.read_text().replace(
        'name="gpt2", size="tiny", n_embd=32, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0',
        'name="mixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4',
    )
    recipe.write_text(lines)
    run = runs.Run(recipes.resolve(recipes.load(str(recipe))))
    run, params = run.of(run.model), run.init_state().weights
    for name, said in {"int4-gptq": recipes.load_chain("int4-gptq"), "small-tables": recipes.load_chain("small-tables")[:1]}.items():
        report = chains.compress(run, params, chain=said, name=name, say=lambda text: None, turns=1, batches=1)
        model, loaded = bigflax.load(os.path.join(run.work, "compress", name, report.rows[1].step), mesh=run.mesh)
        kinds = {leaf: type(w).__name__ for leaf, w in weights.named_weights(loaded) if weights.is_typed(w)}
        if name == "small-tables":
            assert report.rows[1].step == "1-factorize-0.5-frequency" and kinds == dict.fromkeys(["embed/tokens", "head/w"], "LowRank")
        else:
            assert {"blocks/mlp/gate", "blocks/mlp/up", "blocks/mlp/down", "blocks/attention/q", "embed/tokens"} <= kinds.keys()
            assert "blocks/mlp/router/w" not in kinds and set(kinds.values()) == {"QArray"}
            assert loaded["blocks"]["mlp"]["up"].qtype == "int4" and weights.shape(loaded["blocks"]["mlp"]["up"]) == (1, 4, 32, 64)
        assert run.of(model).evaluator()(loaded)["loss"] == pytest.approx(report.rows[1].metrics["loss"], rel=1e-6)


def test_tables_alone_need_a_table_and_go_by_their_own_method():
    steps.check([dict(do="factorize", tables=0.5, method="frequency")])
    with pytest.raises(ValueError, match="or `tables` alone"):
        steps.check([dict(do="factorize", method="frequency")])
    with pytest.raises(ValueError, match="no share"):
        steps.check([dict(do="factorize", tables="half")])
    assert chains.name_of(1, dict(do="quantize", to="int8", tables="int8")) == "1-quantize-int8"
    pictures = types.SimpleNamespace(run=None, model=models.create("vit", size="tiny"), params={}, forward=None, batches=[])
    with pytest.raises(ValueError, match="no table of words"):
        steps.STEPS["factorize"](pictures, tables=0.5)


MISTAKES = {
    "no chain": ([], "at least one step"),
    "no such step": ([dict(do="squeeze")], "'squeeze'; it can"),
    "pruned codes": ([dict(do="quantize", to="int8"), dict(do="prune", to="50%")], "only codes to work on"),
    "nothing to do": ([dict(do="quantize")], "`to`, for all of them, or `rules`"),
    "layers by what": ([dict(do="layers", keep=1, by="luck")], "not 'luck'"),
    "heads by what": ([dict(do="narrow", axis="mlp", keep=0.5, by="luck")], "not 'luck'"),
    "no such weight": ([dict(do="quantize", rules=[("block/.*", "int8")])], "'block/.*' matches no weight"),
    "no such format": ([dict(do="quantize", to="int9")], "no format"),
    "no such method": ([dict(do="prune", to="50%", method="wandb")], "'wanda'"),
    "no such option": ([dict(do="quantize", to="int8", method="rtn", damping=1)], "rtn takes no 'damping'"),
    "no such format later": ([dict(do="prune", to="50%", method="magnitude"), dict(do="quantize", to="int9")], "no format"),
    "no such weight later": (
        [dict(do="prune", to="50%", method="magnitude"), dict(do="quantize", rules=[("block/.*", "int8")])],
        "'block/.*' matches no weight",
    ),
    "no such option of the optimizer": ([dict(do="recover", steps=1, momentun=0.9)], "recover takes no 'momentun'"),
    "a step without what it needs": ([dict(do="recover")], "recover needs 'steps'"),
    "a step with what it has no use for": ([dict(do="pack", to="int8")], "pack takes no 'to'"),
    "several formats and no budget": ([dict(do="quantize", to=["int4", "int8"])], "within='4.5 bits', go together"),
    "a budget and one format": ([dict(do="quantize", to="int4", within="5 bits")], "within='4.5 bits', go together"),
    "no such budget": ([dict(do="quantize", to=["int4", "int8"], within="5 bit")], "'5 bit' is no budget"),
    "one of several that is no format": ([dict(do="quantize", to=["int4", "int9"], within="5 bits")], "'int9' is no format"),
    "a budget that nothing fits": (
        [dict(do="quantize", to=["int4:16", "int8"], within="4 bits")],
        "step 1, quantize: '4 bits' is too little",
    ),
    "a budget of zeros": ([dict(do="prune", to="50%", within="4 bits")], "wanda takes no 'within'"),
    "spread over what": ([dict(do="factorize", to=0.5, spread="wide")], "spread is true or false"),
    "a group of one of several": ([dict(do="quantize", to=["int4:24", "int8"], within="6 bits")], "a group of 24 does not divide 32"),
    "a group behind channels": (
        [
            dict(do="narrow", axis="mlp", keep=0.5),
            dict(do="recover", steps=9),
            dict(do="quantize", rules=[("blocks/mlp/down", "int4:128")]),
        ],
        "step 3, quantize: a group of 128 does not divide 64 inputs",
    ),
    "a group behind channels, learned": (
        [dict(do="narrow", axis="mlp", keep=0.5), dict(do="qat", rules=[("blocks/mlp/down", "int4:128")], steps=9)],
        "step 2, qat: a group of 128 does not divide 64 inputs",
    ),
    "a group behind low rank": (
        [dict(do="factorize", to=12), dict(do="quantize", to="int4:16")],
        "step 2, quantize: a group of 16 does not divide 12 inputs",
    ),
    "a group behind zeros that are packed": (
        [dict(do="prune", to="2:4"), dict(do="pack"), dict(do="quantize", rules=[("blocks/mlp/down", "int4:128")])],
        "step 3, quantize: a group of 128 does not divide 64 inputs",
    ),
    "more layers than are left": ([dict(do="layers", keep=1), dict(do="layers", keep=2)], "step 2, layers: of the 1 layers of blocks"),
    "more channels than are left": (
        [dict(do="narrow", axis="mlp", keep=64, by="magnitude"), dict(do="narrow", axis="mlp", keep=128, by="magnitude")],
        "step 2, narrow",
    ),
    "a group that does not divide": ([dict(do="quantize", to="int4:24")], "a group of 24 does not divide 32 inputs; nearest is 8"),
    "a norm": ([dict(do="quantize", rules=[("norm/scale", "int8")])], "norm/scale, which has no inputs"),
}


@pytest.mark.slow
@pytest.mark.parametrize("chain, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_any_step_has_worked(trained, chain, message):
    _, run, params = trained
    with pytest.raises(ValueError, match=message):
        chains.compress(run, params, chain=chain, name="mistakes", **QUIET)
    assert not os.path.exists(os.path.join(run.work, "compress", "mistakes"))


CHECKED = {
    "corrected, or what": ([dict(do="quantize", to="int4", method="gptq", correct="yes")], "correct is true or false, not 'yes'"),
    "corrected by nothing": (
        [dict(do="prune", to="2:4", method="magnitude", correct=True)],
        "leave out correct, or take wanda, sparsegpt, alps",
    ),
    "a step without what it needs": ([dict(do="qat", to="int4")], "qat needs 'steps'"),
    "nothing to do": ([dict(do="qat", steps=1)], "`to`, for all of them, or `rules`"),
    "no such format": ([dict(do="qat", to="int9", steps=1)], "'int9' is no format"),
    "no whole numbers": ([dict(do="qat", to="nf4", steps=1)], "'nf4' has steps of unequal size"),
    "no whole numbers in tables": ([dict(do="qat", to="int4", tables="fp8", steps=1)], "'fp8' has steps of unequal size"),
    "no whole numbers by rule": ([dict(do="qat", rules=[("a", "int4"), (".*", "mxfp4")], steps=1)], "'mxfp4' has steps of unequal size"),
    "no such method": ([dict(do="qat", to="int8", method="smoothquant", steps=1)], "unknown method 'smoothquant'"),
    "no such option of the method": ([dict(do="qat", to="int4", steps=1, options=dict(points=3))], "gptq takes no 'points'"),
    "no such option": ([dict(do="qat", to="int4", steps=1, momentun=0.9)], "qat takes no 'momentun'"),
    "learned behind codes": (
        [dict(do="quantize", to="int8"), dict(do="qat", to="int4", steps=1)],
        "qat behind quantize finds no array left",
    ),
    "learned behind zeros": (
        [dict(do="prune", to="50%"), dict(do="pack"), dict(do="qat", to="int4", steps=1)],
        "qat behind prune finds no array left",
    ),
    "pruned behind learned": ([dict(do="qat", to="int4", steps=1), dict(do="prune", to="50%")], "prune behind qat has only codes"),
}


@pytest.mark.parametrize("chain, message", CHECKED.values(), ids=CHECKED)
def test_what_contradicts_itself_is_said_without_a_model(chain, message):
    with pytest.raises(ValueError, match=message):
        steps.check(chain)


def test_some_of_the_matrices_may_learn_behind_others():
    steps.check([dict(do="prune", rules=[("blocks/mlp/.*", "2:4")]), dict(do="qat", rules=[("blocks/attention/.*", "int4")], steps=1)])
    steps.check(
        [dict(do="layers", keep=0.5), dict(do="recover", steps=1), dict(do="qat", to="int4", steps=1, method="awq", weight=1.0, clip=None)]
    )


@pytest.mark.slow
def test_too_few_batches_for_the_last_step_are_told_before_the_first(trained):
    _, run, params = trained
    with run.loader("train") as loader:
        batch = {name: x[:1] for name, x in next(loader).items()}
    link = steps.Link(run, params, [batch], (run.model, params))
    half, last = dict(do="narrow", axis="mlp", keep=0.5), dict(do="quantize", to="int8", method="gptq")
    with pytest.raises(ValueError, match="step 3, quantize: gptq needs as many positions as a matrix has inputs, 64 of blocks/mlp/down"):
        steps.foresee(link, [half, dict(do="recover", steps=9), last])
    steps.foresee(link, [half, dict(do="quantize", rules=[("blocks/mlp/up", "int8")], method="gptq")])  # 32 inputs, 32 positions


@pytest.mark.slow
def test_what_only_numbers_tell_ends_what_is_foreseen(trained):
    """How many zeros SparseGPT leaves to an output is not known ahead: no group is refused behind it."""
    _, run, params = trained
    with run.loader("train") as loader:
        link = steps.Link(run, params, [next(loader)], (run.model, params))
    steps.foresee(link, [dict(do="prune", to="50%", method="sparsegpt"), dict(do="pack"), dict(do="quantize", to="int4:24")])


@pytest.mark.slow
def test_a_folder_of_typed_weights_is_no_beginning_of_a_recipe(trained, tmp_path, capsys):
    recipe, run, params = trained
    small = compress.quantize(run.model, params, [("blocks/mlp/up", "int8")])
    bigflax.save(run.model, small, str(tmp_path / "small"), tokenizer=run.tokenizer)
    lines = recipe.read_text().replace('name="gpt2", size="tiny", n_embd=32, n_layer=1, n_head=2, n_positions=32, ', "")
    (tmp_path / "recipe.py").write_text(lines)
    told = [f"--config.model.source={tmp_path / 'small'}", f"--config.work={tmp_path / 'work'}"]
    assert main(["train", f"--config={tmp_path / 'recipe.py'}", *told]) == 2
    assert "holds typed weights (blocks/mlp/up), which a recipe does not begin with" in capsys.readouterr().err


def test_every_chain_of_the_recipe_is_one():
    for name in recipes.chain_table():
        steps.check(recipes.load_chain(name))
    with pytest.raises(ValueError, match="'int8'"):
        recipes.load_chain("int9")
    assert chains.read_loss("1%") == 0.01 and chains.read_loss("0.5") == 0.5
    with pytest.raises(ValueError, match="no share such as 1%"):
        chains.read_loss("much")


def test_weights_to_begin_with_are_asked_for(tmp_path, capsys):
    recipe = running.make_recipe(tmp_path)
    assert main(["compress", f"--config={recipe}", "--recipe=int8"]) == 2
    assert "there are no weights; train it, or name some" in capsys.readouterr().err
    assert main(["compress", "--recipe=int8"]) == 2
    assert "--work=DIR, or a recipe" in capsys.readouterr().err
    jax.clear_caches()
